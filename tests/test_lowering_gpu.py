"""What is fused for a GPU, and that it computes the same: whole explanations by the Triton kernels against float64.

Where there is no GPU the kernels run in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from lrpfast.ops import triton as kernels
from lrpfast.runtime.step import Step
from tests import test_lowering as networks
from tests.triton_kernels import DEVICE, needs_triton, poisoned_memory  # noqa: F401

pytestmark = needs_triton


class Bottleneck(nn.Module):
    """A residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions between a stem and a head; `wide` inputs of the block."""

    def __init__(self, wide: int = 24, stride: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, wide, 3, stride, 1)
        self.a, self.b, self.c = nn.Conv2d(wide, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, wide, 1)
        self.last = nn.Conv2d(wide, 10, 1)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = self.c(self.b(self.a(x).relu()).relu())
        return self.head(self.last((h + x).relu()).relu().mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and grouped convolutions, and a dense layer behind a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 12, 1),
            nn.ReLU(), nn.Conv2d(12, 18, 3, 2, 1, groups=3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(72, 9), nn.ReLU(), nn.Linear(9, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def steps_of(explainer: lrpfast.Explainer) -> list[Step]:
    compiled = explainer._latest
    assert compiled is not None
    return compiled.executor(compiled.default_seed, False, 8).steps


def notes_of(explainer: lrpfast.Explainer) -> list[str]:
    return [step.note for step in steps_of(explainer)]


def assert_explains_as_float64(model: nn.Module, x: Tensor, composite: str, **call: object) -> lrpfast.Explainer:
    explainer = lrpfast.Explainer(model.to(DEVICE), x.to(DEVICE), composite=composite, backend="triton", record=("*",))
    found = explainer(x.to(DEVICE), **call)
    exact = lrpfast.explain(
        copy.deepcopy(model).cpu().double(), x.cpu().double(), composite=composite, record=("*",), **call
    )
    assert found.layers.keys() == exact.layers.keys() != set()
    pairs = [(found.relevance, exact.relevance), (found.output, exact.output)]
    pairs += [(found.layers[name], exact.layers[name]) for name in exact.layers]
    for a, b in pairs:
        assert a.shape == b.shape
        assert torch.linalg.vector_norm(a.cpu().double() - b) <= 2e-5 * torch.linalg.vector_norm(b)
    return explainer


COMPOSITES = ["epsilon_plus_flat", "gamma", "epsilon_alpha2_beta1", "epsilon"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "composite"),
    [
        pytest.param(run, name, id=f"{run.__name__} {name}", marks=[] if turn % 4 == place else pytest.mark.exhaustive)
        for turn, run in enumerate(networks.FUSED)
        for place, name in enumerate(COMPOSITES)
    ],
)
def test_fused_steps_give_the_same(run: Callable[..., Tensor], composite: str) -> None:
    x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(4))  # no denominator near 0
    assert_explains_as_float64(networks.Net(run).eval(), x, composite, target=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "composite"),
    [
        (Bottleneck, "epsilon_plus"), (Bottleneck, "gamma"), (Bottleneck, "lrp_zero"), (Bottleneck, "epsilon_alpha2_beta1"),
        (Separable, "epsilon_plus_flat"), (Separable, "alpha1_beta0"),
    ],
)  # fmt: skip
def test_networks_give_the_same(model: Callable[[], nn.Module], composite: str) -> None:
    x = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(2))
    assert_explains_as_float64(model().eval(), x, composite)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, [[0, 3], [1, 1]]])
def test_wide_layers_compute_both_products_at_once(target: object) -> None:
    """More than 256 input channels and few outputs: one read of the input gives z and its denominator, for each target as well."""
    model = Bottleneck(260).eval()
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(3))
    for composite in ("epsilon_plus", "gamma") if target is None else ("epsilon_plus",):
        explainer = assert_explains_as_float64(
            model, x, composite, target=None if target is None else torch.tensor(target)
        )
        assert "with its modified weight's" in notes_of(explainer)


def test_what_is_fused() -> None:
    x = torch.randn(2, 3, 9, 11).to(DEVICE)
    plus = lrpfast.Explainer(Bottleneck().eval().to(DEVICE), x, "epsilon_plus", backend="triton")
    notes = " | ".join(notes_of(plus))
    for expected in ("with its ReLU", "with its sum", "with its ratio", "with its layer and ratio"):
        assert expected in notes, notes
    functions = [step.function for step in steps_of(plus)]
    assert functions.count(kernels.ratio_dgrad) == 3  # a, c and last
    epsilon = lrpfast.Explainer(Bottleneck().eval().to(DEVICE), x, "epsilon", backend="triton")
    assert "with the next ratio" in " | ".join(notes_of(epsilon))
    assert len(steps_of(plus)) < len(
        steps_of(lrpfast.Explainer(Bottleneck().eval(), x.cpu(), "epsilon_plus", backend="torch"))
    )


@pytest.mark.slow
def test_a_layer_runs_before_its_input_is_written_over() -> None:
    """With gradients alone nothing needs `h` on the way back, and doubling it may write over it: after `b` has read it."""

    def run(m: networks.Net, x: Tensor) -> Tensor:
        h = m.a(x)
        convolved = m.b(h)
        return m.c((convolved + h * 2).relu())

    x = torch.randn(2, 4, 7, 9, generator=torch.Generator().manual_seed(6))
    model = networks.Net(run).eval()
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), 2, "deconvnet").relevance
    explainer = lrpfast.Explainer(model.to(DEVICE), x.to(DEVICE), "deconvnet", backend="triton")
    found = explainer(x.to(DEVICE), 2).relevance.cpu().double()
    assert torch.linalg.vector_norm(found - exact) <= 1e-5 * torch.linalg.vector_norm(exact)
    assert torch.ops.aten.mul_.Tensor in [step.function for step in steps_of(explainer)]


def test_inner_values_that_are_asked_for_are_not_absorbed() -> None:
    x = torch.randn(2, 3, 9, 11).to(DEVICE)
    explainer = lrpfast.Explainer(
        Bottleneck().eval().to(DEVICE), x, "epsilon_plus", backend="triton", record=("a", "b")
    )
    found = explainer(x).layers
    assert found.keys() == {"a", "b"} and all(bool(torch.isfinite(t).all()) for t in found.values())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision(precision: str) -> None:
    """As far from float64 as torch's own operators at that precision, at most."""
    model, x = Bottleneck().eval(), torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(4))
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), composite="epsilon_plus").relevance
    torchs = lrpfast.explain(model, x, composite="epsilon_plus", precision=precision, backend="torch").relevance
    found = lrpfast.explain(
        model.to(DEVICE), x.to(DEVICE), composite="epsilon_plus", precision=precision, backend="triton"
    ).relevance.cpu()
    errors = [float((t.double() - exact).norm() / exact.norm()) for t in (found, torchs)]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = (
        Bottleneck(stride=1).eval().to(DEVICE)
    )  # every product is ours: of a strided transpose, which is torch's, nothing is promised
    x = torch.randn(3, 3, 5, 6, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    explainer = lrpfast.Explainer(model, x, "epsilon_plus", backend="triton")
    together = explainer(x, target=1).relevance
    alone = torch.cat([explainer(x[i : i + 1], target=1).relevance for i in range(3)])
    assert torch.equal(together, alone)
