"""The maps are zennit's: zennit's composites on a small network with the layers of ResNet and AlexNet, and some on such networks
themselves, in float32 and in float64.

In float32 the yardstick is zennit itself: how far its float32 map lies from its float64 map of the same input. In float64
the two implementations agree to 1e-8 with plain zennit and a tiny `bn.eps`, and as well with the usual `eps` once zennit's
merged batch norm is made the identity (`exact`, see the oracle).
"""

import copy
import functools

import pytest
import torch
from torch import nn

import lrpfast
from tests.networks import images, small_network, torchvision_network, value_range
from tests.oracles.zennit_oracle import COMPOSITES, zennit_attribute, zennit_model

SIZE = 64
# What runs of each network; the rest on request.
ALWAYS: dict[str, tuple[str, ...]] = {
    "small": COMPOSITES,
    "resnet18": ("epsilon_plus_flat", "epsilon_gamma_box", "guided_backprop"),
    "resnet50": (),
    "alexnet": (),
    "vgg11_bn": (),
    "vgg16": (),
}


# A network's tests follow one another, so that one float64 network of half a gigabyte is held at a time.
CASES = [
    pytest.param(network, composite, marks=[] if composite in chosen else pytest.mark.exhaustive)
    for network, chosen in ALWAYS.items()
    for composite in COMPOSITES
]


def network_of(name: str) -> nn.Module:
    return small_network(SIZE) if name == "small" else torchvision_network(name)


class Case:
    """A network in both precisions, each exported once for all composites, a batch, the predicted classes and the data's range."""

    def __init__(self, network: str, eps: float | None = None) -> None:
        model = network_of(network)
        if eps is not None:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eps = eps
        self.models = {torch.float32: model, torch.float64: copy.deepcopy(model).double()}
        self.inputs = images(2, SIZE, seed=7)
        self.low, self.high = value_range(self.inputs)
        with torch.no_grad():
            self.targets = model(self.inputs).argmax(1)

    def batch(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.inputs.to(dtype), self.low.to(dtype), self.high.to(dtype)

    @functools.cached_property
    def references(self) -> dict[torch.dtype, nn.Module]:
        return {dtype: zennit_model(model, exact=True) for dtype, model in self.models.items()}

    @functools.cached_property
    def exported(self) -> dict[torch.dtype, torch.export.ExportedProgram]:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        return {
            dtype: torch.export.export(model, (self.inputs.to(dtype),), dynamic_shapes=shapes)
            for dtype, model in self.models.items()
        }

    def zennit(self, composite: str, dtype: torch.dtype, seed: str = "logit") -> torch.Tensor:
        inputs, low, high = self.batch(dtype)
        return zennit_attribute(self.references[dtype], inputs, self.targets, composite, low, high, seed=seed)

    def lrpfast(self, composite: str, dtype: torch.dtype, seed: str = "logit") -> torch.Tensor:
        inputs, low, high = self.batch(dtype)
        explainer = lrpfast.Explainer(self.exported[dtype], inputs, composite=built(composite, low, high))
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


def some(*others: str) -> list[object]:
    """The small network, and `others` on request."""
    return ["small", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in others)]


@pytest.mark.parametrize("network", some("alexnet", "resnet18"))
def test_maps_are_zennits_for_the_seed_one(network: str) -> None:
    chosen, composite = case(network), "epsilon_plus_flat"
    exact = chosen.zennit(composite, torch.float64, seed="one")
    assert distance(chosen.lrpfast(composite, torch.float64, seed="one"), exact) < 1e-8
    # the two seeds differ, so that one passed off as the other is found
    assert distance(chosen.zennit(composite, torch.float64), exact) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("network", some("resnet18", "vgg11_bn", "resnet50"))
def test_maps_are_those_of_plain_zennit_where_the_batch_norms_have_a_tiny_eps(network: str) -> None:
    chosen = Case(network, eps=1e-15)
    inputs, low, high = chosen.batch(torch.float64)
    plain = zennit_model(chosen.models[torch.float64], exact=False)
    for composite in ("epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "guided_backprop"):
        reference = zennit_attribute(plain, inputs, chosen.targets, composite, low, high)
        assert distance(chosen.lrpfast(composite, torch.float64), reference) < 1e-8
