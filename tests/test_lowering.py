"""Which calls are fused into one, and that what they compute does not change: float32 in compiled steps against float64.

In float64 nothing is fused: neither oneDNN nor the compiled operators take it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from lrpfast.ops import native


class Net(nn.Module):
    """Layers `a`, `b`, `c` of four channels, a one-by-one `skip`, and a head; `run` says how they are joined."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "abc":
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        self.skip = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x).mean((2, 3)))


def used_later(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    total = (m.b(h) + h).relu()
    return m.c(total).relu() + h  # h outlives the sum: it must not be written over


def two_convolutions(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c((m.b(h) + m.skip(h)).relu()).relu()


def two_convolutions_the_other_way_round(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    skipped = m.skip(h)
    return m.c((skipped + m.b(h)).relu()).relu()


def operand_used_in_between(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    skipped = m.skip(h)
    convolved = m.b(h)
    beside = skipped * 2.0  # after the convolution that could write its sum over `skipped`, and before the sum
    return m.c((convolved + skipped).relu()).relu() + beside


def without_relu(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(m.b(h) + h)


def summed_with_itself(m: Net, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.b((z + z).relu())


def differences(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    convolved = m.b(h)
    both = (convolved - m.skip(h)).relu()  # `convolved` dies here and may be written over; `h` below may not
    return m.c((h - both * 2).relu()).relu() + torch.sub(h, both, alpha=3)


def clamped(m: Net, x: Tensor) -> Tensor:
    return m.c(nn.functional.relu6(m.b(nn.functional.hardtanh(m.a(x), -0.5, 0.5)) * 3))


def pooled(m: Net, x: Tensor) -> Tensor:
    h = nn.functional.max_pool2d(m.a(x).relu(), 3, 2, 1)
    h = nn.functional.avg_pool2d(m.b(h).relu(), 2)
    return nn.functional.max_pool2d(m.c(h).relu(), 2, ceil_mode=True)


FUSED = {
    used_later: ["with its ReLU", "with its sum"],
    two_convolutions: ["with its ReLU", "with its sum"],
    two_convolutions_the_other_way_round: ["with its sum"],
    operand_used_in_between: ["with its ReLU", "with its sum"],
    without_relu: [],
    summed_with_itself: [],
    differences: ["with its ReLU"],
    clamped: ["with its clamp"],
    pooled: ["with its ReLU"],
}


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "gamma", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("run", FUSED, ids=lambda f: f.__name__)
def test_fused_steps_give_the_same(run: Callable[[Net, Tensor], Tensor], composite: str) -> None:
    model = Net(run).eval()
    x = torch.randn(3, 4, 11, 13, generator=torch.Generator().manual_seed(1))
    explainer = lrpfast.Explainer(model, x, composite=composite, record=("*",))
    found = explainer(x, target=2)
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), target=2, composite=composite, record=("*",))
    assert found.layers.keys() == exact.layers.keys() != set()
    maps = [(found.relevance, exact.relevance), (found.output, exact.output)]
    maps += [(found.layers[name], exact.layers[name]) for name in exact.layers]
    for a, b in maps:
        assert torch.linalg.vector_norm(a.double() - b) <= 2e-5 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("run", FUSED, ids=lambda f: f.__name__)
def test_what_is_fused(run: Callable[[Net, Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, 11, 13)
    steps = lrpfast.Explainer(Net(run).eval(), x).profile(x, repeats=1)
    notes = [step.operation for step in steps]
    for note in FUSED[run]:
        assert any(note in operation for operation in notes), notes
    assert "ge" not in notes  # the mask of a choice by sign


def test_a_max_pool_keeps_one_byte_a_window():
    x = torch.randn(2, 4, 8, 8)
    explainer = lrpfast.Explainer(Net(pooled).eval(), x)
    explainer.profile(x, repeats=1)
    compiled = explainer._latest
    functions = {s.function for s in compiled.executor(compiled.default_seed, False, 8).steps}
    assert {native.max_pool, native.max_pool_dgrad, native.avg_pool_dgrad} <= functions


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 2, 0, 1), (1, 3, 0, 1), (3, 2, 0, 1), (3, 2, 1, 1), (3, 3, 1, 1), (3, 2, 1, 2), (3, 2, 2, 2)],
)
def test_strided_transposes(kernel: int, stride: int, padding: int, dilation: int, batch: int, groups: int) -> None:
    torch.manual_seed(0)
    strided = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    for size in ((11, 13), (12, 12)):
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), strided, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        ).eval()  # fmt: skip
        x = torch.randn(batch, 3, *size)
        explainer = lrpfast.Explainer(model, x, composite="epsilon_plus")
        assert "conv_dgrad (as a transposed convolution)" in [s.operation for s in explainer.profile(x, repeats=1)]
        exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), composite="epsilon_plus").relevance
        found = explainer(x).relevance.double()
        assert torch.linalg.vector_norm(found - exact) <= 1e-5 * torch.linalg.vector_norm(exact)


def test_profile_counts_what_a_step_has_to_do() -> None:
    """3 x 3 on 5 x 5 with padding 1 meets 13 of its 15 rows and columns of taps, and its transpose as many."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.Flatten(), nn.Linear(54, 3)
    )
    x = torch.randn(2, 4, 5, 5)
    steps = lrpfast.Explainer(model.eval(), x, composite="epsilon").profile(x, repeats=1)
    flops = {(step.module, step.operation): step.flops for step in steps}
    assert flops[("1", "relu (with its ReLU)")] == pytest.approx(2 * 2 * 13 * 13 * 4 * 8)
    assert flops[("0", "conv_dgrad (as a convolution)")] == pytest.approx(2 * 2 * 13 * 13 * 4 * 8)
    assert flops[("2", "convolution")] == pytest.approx(2 * 2 * 7 * 7 * 8 * 6)  # rows 0, 2, 4: 2 + 3 + 2 taps
    assert flops[("2", "conv_dgrad (as a transposed convolution)")] == pytest.approx(2 * 2 * 7 * 7 * 8 * 6)
    assert flops[("4", "linear")] == pytest.approx(2 * 2 * 54 * 3)
    read_and_written = {(step.module, step.operation): step.bytes for step in steps}
    assert read_and_written[("4", "linear")] == 4 * (2 * 54 + 54 * 3 + 3 + 2 * 3)
