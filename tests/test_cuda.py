"""What nvcc makes of the CUDA sources, for the architectures that the package is built for: no local memory, registers within bounds.

The numbers that the kernels compute are checked where there is a GPU (tests/test_gpu_device.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]
# Registers that a thread may have: a block of 512 threads of the dense kernels has 65,536 to share.
MOST_REGISTERS = {"dense": 128, "ratio": 64}


def architectures() -> list[str]:
    """As CMakeLists.txt names them."""
    (listed,) = re.findall(r"set\(CMAKE_CUDA_ARCHITECTURES ([\w\- ]+)\)", (ROOT / "CMakeLists.txt").read_text())
    return [name.split("-")[0] for name in listed.split()]


def test_the_architectures_are_those_of_ampere_and_hopper() -> None:
    assert architectures() == ["80", "90"]


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
