"""Batches in a row: order, values, ends, and that the next batch is asked for before this one's results are taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from lrpfast.errors import InputError
from lrpfast.pipeline import explain_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def explainer() -> lrpfast.Explainer:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    return lrpfast.Explainer(model.eval().to(DEVICE), torch.zeros(1, 3, 12, 8, device=DEVICE), "epsilon_plus")


def test_every_batch_comes_back_pooled_in_order(explainer: lrpfast.Explainer) -> None:
    batches = [torch.randn(n, 3, 12, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 4)]
    targets: list[Tensor | int | None] = [None, 2, torch.tensor([0, 1, 2, 3])]
    found = list(explain_batches(explainer, zip(batches, targets, strict=True), DEVICE, size=4))
    assert len(found) == 3
    for pooled, x, target in zip(found, batches, targets, strict=True):
        expected = explainer(x.to(DEVICE), target)
        cells = expected.relevance.sum(1).reshape(len(x), 4, 3, 4, 2).mean((2, 4)).cpu()
        assert pooled.maps.dtype is torch.float16 and pooled.maps.shape == (len(x), 4, 4)
        torch.testing.assert_close(
            pooled.maps.float() * pooled.scale[:, None, None], cells, rtol=0, atol=1e-3 * float(cells.abs().max())
        )
        torch.testing.assert_close(pooled.scale, cells.abs().amax((1, 2)))
        assert torch.equal(pooled.target, expected.target.cpu())
        torch.testing.assert_close(pooled.output, expected.output.cpu())
        assert not pooled.maps.is_cuda


def test_the_next_batch_is_on_its_way_meanwhile(explainer: lrpfast.Explainer) -> None:
    asked = []

    def batches() -> Iterator[tuple[Tensor, None]]:
        for index in range(4):
            asked.append(index)
            yield torch.randn(1, 3, 12, 8), None

    results = explain_batches(explainer, batches(), DEVICE, size=2)
    next(results)
    assert asked == [0, 1, 2]
    assert len(list(results)) == 3


def test_a_map_of_zeros_stays_one(explainer: lrpfast.Explainer) -> None:
    with torch.no_grad():
        biases = [explainer._model[i].bias.clone() for i in (0, 4)]
        for i in (0, 4):
            explainer._model[i].bias.zero_()
        (pooled,) = explain_batches(explainer, [(torch.zeros(2, 3, 12, 8), 1)], DEVICE, size=2)
        for i, bias in zip((0, 4), biases, strict=True):
            explainer._model[i].bias.copy_(bias)
    assert not pooled.maps.any() and pooled.scale.tolist() == [1.0, 1.0]


def test_nothing_and_nonsense(explainer: lrpfast.Explainer) -> None:
    assert list(explain_batches(explainer, [], DEVICE)) == []
    with pytest.raises(InputError, match="size must be at least 1, got 0"):
        next(explain_batches(explainer, [], DEVICE, size=0))
    with pytest.raises(InputError, match=r"explain_batches takes images \[N, C, H, W\], got \[2, 3\]"):
        next(explain_batches(explainer, [(torch.zeros(2, 3), None)], DEVICE))
