"""The maps are zennit's: five networks, zennit's composites, in float32 and in float64.

In float32 the yardstick is zennit itself: how far its float32 map lies from its float64 map of the same input. In float64
the two implementations agree to 1e-8 with plain zennit and a tiny `bn.eps`, and as well with the usual `eps` once zennit's
merged batch norm is made the identity (`exact`, see the oracle).
"""

import functools

import pytest
import torch

import lrpfast
from tests.networks import images, torchvision_network, value_range
from tests.oracles.zennit_oracle import COMPOSITES, zennit_attribute, zennit_model

SIZE = 64
QUICK = ("alexnet", "resnet18")
SLOW = ("vgg11_bn", "vgg16", "resnet50")


def marks(network: str, place: int) -> list[pytest.MarkDecorator]:
    """All composites of the quick networks; two slow ones take a third each, in turn, and the rest on request."""
    if network in QUICK:
        return []
    in_turn = network != "vgg16" and place % len(SLOW) == SLOW.index(network)
    return [pytest.mark.slow if in_turn else pytest.mark.exhaustive]


# A network's tests follow one another, so that one float64 network of half a gigabyte is held at a time.
CASES = [
    pytest.param(network, composite, marks=marks(network, place))
    for network in (*QUICK, *SLOW)
    for place, composite in enumerate(COMPOSITES)
]


class Case:
    """A network in both precisions, a batch, the predicted classes and the data's range."""

    def __init__(self, network: str, eps: float | None = None) -> None:
        model = torchvision_network(network)
        if eps is not None:
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eps = eps
        self.models = {torch.float32: model, torch.float64: torchvision_network(network, dtype=torch.float64)}
        for module, other in zip(model.modules(), self.models[torch.float64].modules(), strict=True):
            if isinstance(module, torch.nn.BatchNorm2d):
                other.eps = module.eps
        self.inputs = images(2, SIZE, seed=7)
        self.low, self.high = value_range(self.inputs)
        with torch.no_grad():
            self.targets = model(self.inputs).argmax(1)

    def batch(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.inputs.to(dtype), self.low.to(dtype), self.high.to(dtype)

    @functools.cached_property
    def references(self) -> dict[torch.dtype, torch.nn.Module]:
        return {dtype: zennit_model(model, exact=True) for dtype, model in self.models.items()}

    def zennit(self, composite: str, dtype: torch.dtype, seed: str = "logit") -> torch.Tensor:
        inputs, low, high = self.batch(dtype)
        return zennit_attribute(self.references[dtype], inputs, self.targets, composite, low, high, seed=seed)

    def lrpfast(self, composite: str, dtype: torch.dtype, seed: str = "logit") -> torch.Tensor:
        inputs, low, high = self.batch(dtype)
        explainer = lrpfast.Explainer(self.models[dtype], inputs, composite=built(composite, low, high))
        explanation = explainer(inputs, target=self.targets, seed=seed)
        assert isinstance(explanation.relevance, torch.Tensor)
        return explanation.relevance


@functools.lru_cache(maxsize=1)
def case(network: str) -> Case:
    return Case(network)


def built(composite: str, low: torch.Tensor, high: torch.Tensor) -> lrpfast.Composite:
    options = {"low": low, "high": high} if lrpfast.composites.needs_range(composite) else {}
    return lrpfast.composites.get(composite, **options)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| in float64."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("network", "composite"), CASES)
def test_maps_are_zennits(network: str, composite: str) -> None:
    chosen = case(network)
    exact = chosen.zennit(composite, torch.float64)
    own = distance(chosen.zennit(composite, torch.float32), exact)
    assert own > 0
    assert distance(chosen.lrpfast(composite, torch.float64), exact) < 1e-8
    assert distance(chosen.lrpfast(composite, torch.float32), chosen.zennit(composite, torch.float32)) < 10 * own


@pytest.mark.parametrize("network", ["alexnet", "resnet18"])
def test_maps_are_zennits_for_the_seed_one(network: str) -> None:
    chosen, composite = case(network), "epsilon_plus_flat"
    exact = chosen.zennit(composite, torch.float64, seed="one")
    assert distance(chosen.lrpfast(composite, torch.float64, seed="one"), exact) < 1e-8
    # the two seeds differ, so that one passed off as the other is found
    assert distance(chosen.zennit(composite, torch.float64), exact) > 0.1


@pytest.mark.parametrize(
    "network", ["resnet18", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("vgg11_bn", "resnet50"))]
)
def test_maps_are_those_of_plain_zennit_where_the_batch_norms_have_a_tiny_eps(network: str) -> None:
    chosen = Case(network, eps=1e-15)
    inputs, low, high = chosen.batch(torch.float64)
    plain = zennit_model(chosen.models[torch.float64], exact=False)
    for composite in ("epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "guided_backprop"):
        reference = zennit_attribute(plain, inputs, chosen.targets, composite, low, high)
        assert distance(chosen.lrpfast(composite, torch.float64), reference) < 1e-8
