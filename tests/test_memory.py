"""What an explanation frees is kept for the next one, unless the user wants it given back."""

import linecache
import os
import platform
import subprocess
import sys

import pytest
import torch

import lrpfast
from lrpfast.runtime import executor
from lrpfast.runtime.memory import keep_freed_memory

_FREE_A_QUARTER_GIBIBYTE = """
import os, torch
from lrpfast.runtime.memory import give_back_free_memory, give_back_large_pieces, keep_freed_memory
said = keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") // 2**20
before = resident()
with give_back_large_pieces(torch.device("cpu")):
    values = [torch.ones(2**24) for _ in range(4)]
    del values
print(resident() - before)
values = [torch.ones(2**24) for _ in range(4)]
del values
print(resident() - before)
give_back_free_memory(torch.device("cpu"))
print(resident() - before)
print(said)
"""


def _mebibytes_kept(keep: str) -> tuple[int, int, int, str]:
    environment = {**os.environ, "LRPFAST_KEEP_MEMORY": keep}
    environment.pop("LD_PRELOAD", None)  # where another allocator is preloaded, it decides
    done = subprocess.run(
        [sys.executable, "-c", _FREE_A_QUARTER_GIBIBYTE], env=environment, capture_output=True, text=True, check=True
    )
    while_made, kept, after, said = done.stdout.splitlines()
    return int(while_made), int(kept), int(after), said


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not os.path.exists("/proc/self/statm"),
    reason="glibc on Linux alone keeps memory, and /proc shows how much",
)
def test_freed_memory_is_kept():
    while_made, kept, after, said = _mebibytes_kept("1")
    assert while_made < 20  # what a program is made through is not
    assert 250 < kept < 270
    assert after < 20  # once it is given back
    assert "is kept" in said
    while_made, given_back, _, said = _mebibytes_kept("0")
    assert while_made < 20 and given_back < 20
    assert "LRPFAST_KEEP_MEMORY=0" in said


def test_memory_is_given_back_after_the_first_run_of_each_size(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    ).eval()
    explainer = lrpfast.Explainer(model, torch.randn(2, 3, 8, 8))
    given_back: list[torch.device] = []
    monkeypatch.setattr(executor, "give_back_free_memory", given_back.append)
    counts = []
    for size in (2, 2, 3, 2, 3, 1, 1):
        explainer(torch.randn(size, 3, 8, 8), target=0)
        counts.append(len(given_back))
    assert counts == [1, 1, 2, 2, 2, 3, 3]
    assert set(given_back) == {torch.device("cpu")}


def test_source_lines_that_capture_reads_are_forgotten():
    linecache.cache["<cell>"] = (3, None, ["x\n"], "<cell>")  # a notebook's, which is in no file
    linecache.getlines(__file__)
    before = set(linecache.cache)
    lrpfast.Explainer(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()).eval(), torch.randn(1, 3))
    after = set(linecache.cache)
    assert before <= after
    assert not [name for name in after - before if os.path.exists(name)]
    del linecache.cache["<cell>"]


def test_the_state_is_said():
    assert "memory" in keep_freed_memory()
