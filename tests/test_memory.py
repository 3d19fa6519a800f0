"""What an explanation frees is kept for the next one, unless the user wants it given back."""

import os
import platform
import subprocess
import sys

import pytest

from lrpfast.runtime.memory import keep_freed_memory

_FREE_A_QUARTER_GIBIBYTE = """
import os, torch
from lrpfast.runtime.memory import give_back_free_memory, keep_freed_memory
said = keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20
before = resident()
values = [torch.ones(2**24) for _ in range(4)]
del values
print(resident() - before)
give_back_free_memory()
print(resident() - before)
print(said)
"""


def _mebibytes_kept(keep: str) -> tuple[int, int, str]:
    environment = {**os.environ, "LRPFAST_KEEP_MEMORY": keep}
    environment.pop("LD_PRELOAD", None)  # where another allocator is preloaded, it decides
    done = subprocess.run(
        [sys.executable, "-c", _FREE_A_QUARTER_GIBIBYTE], env=environment, capture_output=True, text=True, check=True
    )
    kept, after, said = done.stdout.splitlines()
    return int(kept), int(after), said


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not os.path.exists("/proc/self/statm"),
    reason="glibc on Linux alone keeps memory, and /proc shows how much",
)
def test_freed_memory_is_kept():
    kept, after, said = _mebibytes_kept("1")
    assert 250 < kept < 270
    assert after < 20  # once it is given back
    assert "is kept" in said
    given_back, _, said = _mebibytes_kept("0")
    assert given_back < 20
    assert "LRPFAST_KEEP_MEMORY=0" in said


def test_the_state_is_said():
    assert "memory" in keep_freed_memory()
