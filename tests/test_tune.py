"""Choosing kernels by timing: what is chosen, what is remembered, and that no file or process can spoil it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.runtime import convolutions, tune
from lrpfast.runtime.tune import Tuner


def way(seconds: float):
    return lambda: time.sleep(seconds)


def never() -> dict:
    raise AssertionError("timed again")


def test_the_faster_way_is_taken_and_remembered(tmp_path: Path) -> None:
    tuner = Tuner(tmp_path)
    assert tuner.choose("key", lambda: {"first": way(0.03), "second": way(0.001)}) == "second"
    assert tuner.choose("key", never) == "second"
    assert Tuner(tmp_path)._known == {}  # not written yet
    tuner.save()
    again = Tuner(tmp_path)
    assert again.choose("key", never) == "second"
    assert again.choices["key"]["seconds"]["first"] > again.choices["key"]["seconds"]["second"] >= 0.001


def test_the_first_way_is_taken_where_they_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_time", lambda calls: {"first": 1.0, "second": 0.98})
    assert Tuner(tmp_path).choose("key", lambda: {"first": way(0), "second": way(0)}) == "first"
    monkeypatch.setattr(tune, "_time", lambda calls: {"first": 1.0, "second": 0.96})
    assert Tuner(tmp_path).choose("key", lambda: {"first": way(0), "second": way(0)}) == "second"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"choices": 3}', '{"choices": {"key": {"way": "gone", "seconds": {"first": 1}}}}', "\x00\xff",
     '{"choices": {"key": {"way": "first", "seconds": {"first": "fast"}}}}'],
)  # fmt: skip
def test_a_damaged_file_is_rebuilt(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_time", lambda calls: {"first": 1.0, "second": 4.0})
    path = Tuner(tmp_path)._path
    path.write_text(content)
    tuner = Tuner(tmp_path)
    assert tuner.choose("key", lambda: {"first": way(0), "second": way(0)}) == "first"
    tuner.save()
    assert list(json.loads(path.read_text())["choices"]) == ["key"]
    assert Tuner(tmp_path).choose("key", never) == "first"


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tuner = Tuner(tmp_path / "file" / "below")
    assert tuner.choose("key", lambda: {"first": way(0.001), "second": way(0.03)}) == "first"
    tuner.save()


def test_other_threads_or_versions_have_choices_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Tuner(tmp_path)._path
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert Tuner(tmp_path)._path != here
    monkeypatch.undo()
    monkeypatch.setattr(lrpfast, "__version__", "77")
    assert Tuner(tmp_path)._path != here


@pytest.mark.slow
def test_processes_that_tune_at_once_lose_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from lrpfast.runtime.tune import Tuner
        print("ready", flush=True)
        sys.stdin.readline()
        for i in range(25):
            tuner = Tuner(Path(sys.argv[1]))
            tuner.choose(f"{sys.argv[2]} {i}", lambda: {"a": lambda: None, "b": lambda: None})
            tuner.save()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, str(n)], **pipes) for n in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        with process.stdin, process.stdout:
            process.stdin.write("go\n")
    assert [process.wait(120) for process in running] == [0, 0]
    (written,) = tmp_path.glob("*.json")
    assert len(json.loads(written.read_text())["choices"]) == 50
    assert not list(tmp_path.glob("*.tmp"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
def test_choices_change_no_map_and_stand_in_the_plan(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(calls: dict) -> dict[str, float]:
        first, second = calls
        return {first: 1e-3 if own else 2e-3, second: 2e-3 if own else 1e-3}

    monkeypatch.setenv("LRPFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(convolutions, "_WORTH_TUNING", 0)
    monkeypatch.setattr(tune, "_time", times)
    x = torch.randn(4, 3, 20, 20)
    plain = lrpfast.Explainer(network(), x, composite="epsilon_plus", autotune=False)
    assert not list(tmp_path.iterdir())
    tuned = lrpfast.Explainer(network(), x, composite="epsilon_plus")
    assert list(tmp_path.glob("cpu-*.json"))
    a, b = plain(x).relevance, tuned(x).relevance
    assert torch.linalg.vector_norm(a - b) <= 1e-6 * torch.linalg.vector_norm(a)
    assert "nothing was timed" in str(plain.plan())
    assert sum(row.kernels for row in plain.plan().rows) > len(plain.plan().rows)
    shown = str(tuned.plan()).partition("kernels chosen by timing:")[2]
    if own:
        assert "2: as a convolution (as a convolution 1.00 ms, torch's backward 2.00 ms)" in shown
        assert "4: as a transposed convolution (as a transposed convolution 1.00 ms, torch's backward 2.00 ms)" in shown
    else:
        assert "2: torch's backward (as a convolution 2.00 ms, torch's backward 1.00 ms)" in shown


def test_timing_draws_no_random_numbers_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRPFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(convolutions, "_WORTH_TUNING", 0)
    model, x = network(), torch.randn(2, 3, 20, 20)
    torch.manual_seed(3)
    lrpfast.Explainer(model, x, composite="epsilon_plus")
    assert list(tmp_path.glob("cpu-*.json"))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_other_instructions_have_choices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    before = tune._machine(cpu)
    monkeypatch.setattr(tune, "_instructions", lambda: "avx2, oneDNN all")
    assert tune._machine(cpu) != before
    monkeypatch.undo()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert tune._machine(cpu) != before
