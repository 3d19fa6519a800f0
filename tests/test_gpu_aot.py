"""What the compiler makes of the kernels for an A100 (sm_80) and an H100 (sm_90), neither of which need be here.

The usual variants are compiled once for all tests, in a process of their own: in this one the kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_kernels import needs_triton

pytestmark = needs_triton
ROOT = Path(__file__).parent.parent
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may have


def compiled(*arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.aot", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def usual() -> list[dict]:
    return compiled()


def check(kernel: dict) -> None:
    """What every kernel has to hold."""
    named = f"{kernel['name']} on sm_{kernel['capability']}"
    found = kernel["instructions"]
    assert kernel["stack"] == kernel["local"] == found["local"] == 0, f"{named} spills registers"
    assert kernel["registers"] <= 255
    assert kernel["shared"] <= SHARED[kernel["capability"]]
    assert found["load16"], f"{named} reads less than 16 bytes at a time"
    if not kernel["name"].startswith("channel_sum"):  # whose program writes 16 sums of thousands of values
        assert found["store16"], f"{named} writes less than 16 bytes at a time"
    if kernel["matrix"]:
        expected = "wgmma" if kernel["capability"] == 90 else "mma"
        assert found[expected] and not found["wgmma" if expected == "mma" else "mma"], f"{named} has no {expected}"
        assert kernel["registers"] * 32 * kernel["warps"] <= 65536, f"{named}: not one block fits a multiprocessor"
    else:
        assert kernel["registers"] <= 128, f"{named}: fewer than 16 warps fit a multiprocessor"


def test_usual_variants(usual: list[dict]) -> None:
    assert {kernel["capability"] for kernel in usual} == {80, 90}
    for kernel in usual:
        check(kernel)


def test_elementwise_kernels_access_16_bytes_alone(usual: list[dict]) -> None:
    """All loads and stores of operands, and so as few instructions as there can be."""
    flat = [k for k in usual if not k["matrix"]]
    assert len(flat) == 6
    for kernel in flat:
        found = kernel["instructions"]
        assert (found["load"], found["store"]) == (found["load16"], found["store16"]), kernel["name"]


def test_matrix_kernels_are_among_them(usual: list[dict]) -> None:
    names = [kernel["name"] for kernel in usual if kernel["matrix"]]
    for family in ("1x1 ratio", "3x3 ratio", "1x1 pair", "ratio_dgrad 256"):
        assert any(name.startswith(family) for name in names), names


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_variant(dtype: str, capability: str) -> None:
    kernels = compiled("--capability", capability, "--all", "--dtype", dtype)
    assert len(kernels) > 40
    for kernel in kernels:
        check(kernel)
