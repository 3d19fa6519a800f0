"""Recorded programs, on a CPU with a recorder that calls again: padding, choice of size, parts, threads. And batches split for memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from lrpfast import explainer as explainer_module
from lrpfast.errors import InputError, MemoryLimitError, NumericsError
from lrpfast.runtime.graphs import Replay
from lrpfast.runtime.splitting import run_parts


class CallsAgain:
    """Records as a CUDA graph does, as far as memory goes: inputs and results always lie in the same place."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def record(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        results = tuple(r.clone() for r in function())

        def again() -> None:
            self.replayed.append(results[0].shape[0])
            for kept, new in zip(results, function(), strict=True):
                kept.copy_(new)

        return again, results


def doubled(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return 2 * x, x + target[:, None]


def replay(sizes: list[int]) -> tuple[Replay, CallsAgain]:
    recorder = CallsAgain()
    return Replay(recorder, doubled, (torch.zeros(2, 3),), sizes), recorder


def test_a_batch_is_padded_to_the_next_size() -> None:
    recorded, recorder = replay([8, 1, 4, 4])
    assert recorded.sizes == [1, 4, 8]
    assert [recorded.size_for(n) for n in (0, 1, 2, 4, 5, 8, 9)] == [None, 1, 4, 4, 8, 8, None]
    for batch, size in ((1, 1), (3, 4), (4, 4), (5, 8)):
        x, target = torch.randn(batch, 3), torch.arange(batch)
        output, relevance = recorded((x,), target)
        assert torch.equal(output, 2 * x) and torch.equal(relevance, x + target[:, None])
        assert recorder.replayed.pop() == size


def test_results_outlive_the_next_call() -> None:
    recorded, _ = replay([2])
    first, _ = recorded((torch.ones(2, 3),), torch.zeros(2, dtype=torch.int64))
    recorded((torch.zeros(2, 3),), torch.zeros(2, dtype=torch.int64))
    assert torch.equal(first, torch.full((2, 3), 2.0))


def test_threads_take_turns() -> None:
    recorded, _ = replay([1, 4])
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for turn in range(50):
            x = torch.randn(1 + turn % 4, 3, generator=generator)
            output, _ = recorded((x,), torch.zeros(x.shape[0], dtype=torch.int64))
            if not torch.equal(output, 2 * x):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CallsAgain:
    """As on a GPU, without one."""
    recorder = CallsAgain()
    monkeypatch.setattr(explainer_module, "_recorder", lambda device: recorder)
    return recorder


def test_a_recorded_explanation_is_that_of_a_call(model: nn.Module, recorder: CallsAgain) -> None:
    x = torch.randn(11, 3, 12, 12)
    eager = lrpfast.Explainer(model, x, "epsilon_plus_flat", record=("0",))
    warm = lrpfast.Explainer(model, x, "epsilon_plus_flat", record=("0",))
    warm.warmup([1, 4])
    for batch, replayed in ((1, [1]), (3, [4]), (4, [4]), (11, [4, 4, 4])):
        for target in (None, 2, torch.arange(batch) % 5):
            found, expected = warm(x[:batch], target), eager(x[:batch], target)
            assert recorder.replayed == replayed
            recorder.replayed.clear()
            assert torch.equal(found.target, expected.target)
            for a, b in (
                (found.relevance, expected.relevance), (found.output, expected.output),
                (found.layers["0"], expected.layers["0"]), (found.conservation(), expected.conservation()),
            ):  # fmt: skip
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_was_not_recorded_runs_as_before(model: nn.Module, recorder: CallsAgain) -> None:
    x = torch.randn(2, 3, 12, 12)
    explainer = lrpfast.Explainer(model, x)
    explainer.warmup([2])
    assert explainer(x, torch.tensor([[0, 1], [2, 3]])).relevance.shape == (2, 2, 3, 12, 12)
    explainer(x, torch.ones(2, 5))
    explainer(x, seed="one")
    assert explainer(x[:0]).relevance.shape == (0, 3, 12, 12)
    assert recorder.replayed == []
    explainer.warmup([2], seed="one")
    explainer(x, seed="one")
    assert recorder.replayed == [2]


def test_a_recorded_call_checks_what_it_gives(model: nn.Module, recorder: CallsAgain) -> None:
    x = torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[3].weight.fill_(1e10)
    explainer = lrpfast.Explainer(model, x)
    explainer.warmup([4])
    with pytest.raises(NumericsError, match="the model's output holds .* in sample 1 "):
        explainer(torch.cat([x[:1], 1e35 * x[:1]]))
    with pytest.raises(lrpfast.errors.TargetError, match="target 9 is out of range"):
        explainer(x, 9)


def test_a_model_changed_since_is_captured_anew(model: nn.Module, recorder: CallsAgain) -> None:
    x = torch.randn(2, 3, 12, 12)
    explainer = lrpfast.Explainer(model, x)
    explainer.warmup([2])
    with torch.no_grad():
        model[-1].weight.mul_(2)
    found = explainer(x).output
    torch.testing.assert_close(found, model(x))
    assert recorder.replayed == []


def test_samples_that_meet_are_not_padded(recorder: CallsAgain) -> None:
    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).flip(0)

    explainer = lrpfast.Explainer(Meets().eval(), torch.randn(2, 4))
    with pytest.raises(InputError, match="samples of a batch meet"):
        explainer.warmup([4])


@pytest.mark.parametrize("sizes", [[], [0], [2, -1], [1.5], [True]])
def test_sizes_are_checked(model: nn.Module, sizes: list) -> None:
    explainer = lrpfast.Explainer(model, torch.randn(1, 3, 12, 12))
    with pytest.raises(InputError, match="batch_sizes must be integers of at least 1"):
        explainer.warmup(sizes)


def test_on_a_cpu_programs_are_made(model: nn.Module) -> None:
    explainer = lrpfast.Explainer(model)
    with pytest.raises(InputError, match="warmup: no program yet"):
        explainer.warmup([1])
    explainer(torch.randn(2, 3, 12, 12))
    compiled = explainer._latest
    assert compiled is not None and len(compiled._executors) == 1
    explainer.warmup([1, 8])
    assert len(compiled._executors) == 2 and not compiled.replays


# ---- Splitting -------------------------------------------------------------------------------------------------------


def fits(limit: int, ran: list[tuple[int, int]]) -> Callable[[int, int], list[int]]:
    def run(begin: int, end: int) -> list[int]:
        ran.append((begin, end))
        if end - begin > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return list(range(begin, end))

    return run


@pytest.mark.parametrize(("batch", "limit"), [(1, 1), (7, 7), (7, 3), (8, 1), (5, 4), (100, 9)])
def test_a_batch_that_does_not_fit_is_halved(batch: int, limit: int) -> None:
    ran: list[tuple[int, int]] = []
    results = run_parts(fits(limit, ran), [(0, batch)])
    assert sum(results, []) == list(range(batch))
    failed = sum(end - begin > limit for begin, end in ran)
    assert failed <= max(batch - 1, 0).bit_length()  # what did not fit is not tried again


def test_parts_after_one_that_did_not_fit_are_cut_at_once() -> None:
    ran: list[tuple[int, int]] = []
    assert sum(run_parts(fits(2, ran), [(0, 4), (4, 8)]), []) == list(range(8))
    assert ran == [(0, 4), (0, 2), (2, 4), (4, 6), (6, 8)]


def test_what_cannot_be_split_says_so() -> None:
    with pytest.raises(
        MemoryLimitError, match="explaining one sample takes more memory .* no smaller batch is possible"
    ):
        run_parts(fits(0, []), [(0, 2)])
    with pytest.raises(MemoryLimitError, match="explaining a batch of 4 takes more memory"):
        run_parts(fits(2, []), [(0, 4)], divisible=False)


def test_an_explanation_is_split(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 12, 12)
    explainer = lrpfast.Explainer(model, x)
    expected = explainer(x, 1)
    run, sizes = explainer_module._run, []

    def limited(compiled, executor, inputs, *rest):  # type: ignore[no-untyped-def]
        sizes.append(inputs[0].shape[0])
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(compiled, executor, inputs, *rest)

    monkeypatch.setattr(explainer_module, "_run", limited)
    found = explainer(x, 1)
    assert sizes == [5, 3, 2, 1, 2]
    torch.testing.assert_close(found.relevance, expected.relevance)
    assert torch.equal(found.target, expected.target)
