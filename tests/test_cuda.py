"""The CUDA kernels without a GPU: what nvcc makes of them for the architectures that the package is built for, and what they compute.

For the second a small header stands in for CUDA, and the kernels' threads are threads of this machine. On a GPU itself:
tests/test_gpu_device.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
# Registers that a thread may have: a block of 512 threads of the dense kernels has 65,536 to share.
MOST_REGISTERS = {"dense": 128, "ratio": 64}


def architectures() -> list[str]:
    """As CMakeLists.txt names them."""
    (listed,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([\w\- ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    return [name.split("-")[0] for name in listed.split()]


def test_the_architectures_are_those_of_ampere_and_hopper() -> None:
    assert architectures() == ["80", "90"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_the_dense_kernels_compute_what_they_should(tmp_path: Path) -> None:
    program = tmp_path / "emulation"
    source = ROOT / "tests" / "cpp" / "cuda_emulation.cpp"
    subprocess.run(["c++", "-std=c++20", "-O1", "-pthread", source, "-o", program], check=True, capture_output=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [
        ("ratio", "90"), ("dense", "90"), pytest.param("ratio", "80", marks=pytest.mark.exhaustive),
        pytest.param("dense", "80", marks=pytest.mark.exhaustive),
    ],
)  # fmt: skip
def test_no_kernel_uses_local_memory(source: str, architecture: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "nvcc", "-std=c++17", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v", "-Werror",
            "all-warnings", "-cubin", "-o", tmp_path / "kernels.cubin", ROOT / "csrc" / f"{source}.cu",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(kernels) == len(frames) == len(registers) >= (18 if source == "dense" else 1)
    for kernel, frame, used in zip(kernels, frames, registers, strict=True):
        assert frame == ("0", "0", "0"), f"{kernel} uses local memory"
        assert used <= MOST_REGISTERS[source], f"{kernel} uses {used} registers"
