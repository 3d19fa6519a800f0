"""Every family of torchvision's convolutional classifiers, from AlexNet to ConvNeXt, and a few of timm's.

Each family is held against an independent implementation of RULES.md (`tests/oracles/autograd_lrp.py`: eager, relevance
form, no capture, no proofs) in float64; against torch's own gradient; and, where theory gives a number, against theory.
Capturing a deep network takes seconds, so here each family takes one composite, in turn; `make test ARGS="-m exhaustive"` takes the rest.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import rules
from tests.networks import FAMILIES, bias_free, images, torchvision_network, value_range
from tests.oracles.autograd_lrp import autograd_relevance, hardsigmoid, methods

# the overview composite picks its rules by the place of a layer; tests/test_zennit_parity.py and others have zennit's nine
COMPOSITES = tuple(name for name in lrpfast.composites.names() if name != "overview")
GRADIENT = lrpfast.Composite([("any", rules.Gradient())], name="gradient")
pytestmark = pytest.mark.large

# ReLU networks whose batch norms all fold: what LRP-0 says of them is known
RECTIFIER = (
    "alexnet", "vgg11_bn", "resnet18", "googlenet", "inception_v3", "squeezenet1_1", "shufflenet_v2_x1_0", "mnasnet1_0",
    "regnet_x_400mf",
)  # fmt: skip
TIMM = ("resnet10t", "repvgg_a0", "ghostnet_100", "mixnet_s", "convnextv2_atto")


class Case:
    """A network in float64, exported once for all composites (which takes longest), a batch, its classes and the data's range."""

    def __init__(self, family: str, biases: bool = True) -> None:
        self.model = torchvision_network(family, dtype=torch.float64)
        if not biases:
            self.model = bias_free(self.model)
        self.inputs = images(2, FAMILIES[family], seed=7, dtype=torch.float64)
        self.low, self.high = value_range(self.inputs)
        with torch.no_grad():
            self.output = self.model(self.inputs)
        self.targets = self.output.argmax(1)

    @functools.cached_property
    def exported(self) -> torch.export.ExportedProgram:
        return torch.export.export(self.model, (self.inputs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))

    def composite(self, name: str) -> lrpfast.Composite:
        options = {"low": self.low, "high": self.high} if lrpfast.composites.needs_range(name) else {}
        return lrpfast.composites.get(name, **options)

    def explain(self, composite: lrpfast.Composite) -> lrpfast.Explanation:
        return lrpfast.explain(self.exported, self.inputs, target=self.targets, composite=composite)


# Two: tests that run for a few families take squeezenet1_1 and resnet18 in turn.
@functools.lru_cache(maxsize=2)
def case(family: str) -> Case:
    return Case(family)


@functools.lru_cache(maxsize=2)
def case_without_biases(family: str) -> Case:
    return Case(family, biases=False)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class ExactHardsigmoid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return hardsigmoid(x)


def with_exact_gradients(model: nn.Module) -> nn.Module:
    """A copy whose hardsigmoids have the gradient 1/6 in full: torch's own has it in float32, whatever the dtype."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, name, ExactHardsigmoid())
    return model


def check_against_oracle(family: str, composite: str) -> None:
    chosen = case(family)
    explanation = chosen.explain(chosen.composite(composite))
    method = methods(chosen.low, chosen.high)[composite]
    output, relevance = autograd_relevance(chosen.model, chosen.inputs, chosen.targets, method)
    assert distance(output, chosen.output) < 1e-12  # the oracle explains this very model
    assert distance(explanation.output, chosen.output) < 1e-12
    assert distance(explanation.relevance, relevance) < 1e-8


# Their blocks stand in smaller families as well: run on request alone.
LARGE = ("efficientnet_v2_s", "mobilenet_v3_large", "vgg11", "wide_resnet50_2")


def in_turn() -> list[object]:
    """All pairs of family and composite; of each family but the large ones one is run, the rest on request."""
    pairs = []
    for index, family in enumerate(FAMILIES):
        for place, composite in enumerate(COMPOSITES):
            rest = place != index % len(COMPOSITES) or family in LARGE
            mark = pytest.mark.exhaustive if rest else pytest.mark.slow
            pairs.append(pytest.param(family, composite, marks=[mark]))
    return pairs


def some(quick: tuple[str, ...], *others: str) -> list[object]:
    """`quick`, and `others` on request."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in others if name not in quick)]


@pytest.mark.parametrize(("family", "composite"), in_turn())
def test_relevance_is_that_of_the_independent_implementation(family: str, composite: str) -> None:
    check_against_oracle(family, composite)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_the_overview_composite_runs(family: str) -> None:
    explanation = case(family).explain(case(family).composite("overview"))
    assert explanation.relevance.isfinite().all()
    assert explanation.relevance.abs().max() > 0


@pytest.mark.parametrize("family", some(("squeezenet1_1", "resnet18"), *FAMILIES))
def test_gradient_everywhere_is_torchs_gradient(family: str) -> None:
    chosen = case(family)
    x = chosen.inputs.clone().requires_grad_()
    output = with_exact_gradients(chosen.model)(x)
    seed = nn.functional.one_hot(chosen.targets, output.shape[1]) * output.detach()
    (reference,) = torch.autograd.grad(output, x, seed)
    assert distance(chosen.explain(GRADIENT).relevance, reference) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("family", some(("squeezenet1_1", "resnet18"), *FAMILIES))
def test_float32_module_and_both_backends_agree(family: str) -> None:
    """The user's way in: a module in float32, compiled for the example, with the automatic backend and the reference one."""
    chosen = case(family)
    model, inputs = torchvision_network(family), chosen.inputs.float()
    exact = chosen.explain(chosen.composite("epsilon_plus_flat"))
    with torch.no_grad():
        own = distance(model(inputs).double(), chosen.output)
    for backend in ("auto", "torch"):
        explanation = lrpfast.Explainer(model, inputs, backend=backend)(inputs, target=chosen.targets)
        assert explanation.relevance.dtype == torch.float32
        assert distance(explanation.output.double(), chosen.output) < 10 * own
        assert distance(explanation.relevance.double(), exact.relevance) < 2e-3


@pytest.mark.parametrize("family", some(("squeezenet1_1", "resnet18"), *RECTIFIER))
def test_zero_on_a_bias_free_rectifier_network_is_gradient_times_input(family: str) -> None:
    chosen = case_without_biases(family)
    # the ratio y/S(y) of sums and average pools has to be one as well, so their stabiliser is as good as none
    share = rules.Norm(stabilizer=1e-100)
    composite = lrpfast.Composite(
        [("conv", rules.Zero()), ("linear", rules.Zero()), ("sum", share), ("avg_pool", share)], name="zero"
    )
    explanation = chosen.explain(composite)
    x = chosen.inputs.clone().requires_grad_()
    logits = chosen.model(x).gather(1, explanation.target[:, None])
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert distance(explanation.relevance, chosen.inputs * gradient) < 1e-9
    torch.testing.assert_close(explanation.conservation(), torch.ones(2, dtype=torch.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("family", some(("squeezenet1_1", "resnet18"), *RECTIFIER, "densenet121"))
@pytest.mark.parametrize("composite", ["alpha1_beta0", "w_square"])
def test_relevance_is_conserved_where_nothing_absorbs_it(family: str, composite: str) -> None:
    """Without biases, z⁺, w² and the sharing in sums lose what the stabiliser takes and nothing else."""
    chosen = case_without_biases(family)
    explanation = chosen.explain(chosen.composite(composite))
    # the logit layer's own output is a signed sum that z⁺ shares by its positive part: that it conserves too is the point
    torch.testing.assert_close(explanation.conservation(), torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", some(("resnet10t",), *TIMM))
def test_timm_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    from tests.networks import with_statistics

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = timm.create_model(name, pretrained=False, num_classes=10)
    model = with_statistics(model, [images(8, 64, seed=101)]).double()
    inputs = images(2, 64, seed=7, dtype=torch.float64)
    with torch.no_grad():
        output = model(inputs)
    explanation = lrpfast.explain(model, inputs)
    assert distance(explanation.output, output) < 1e-12
    assert explanation.relevance.abs().max() > 0
    x = inputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(with_exact_gradients(model)(x).gather(1, explanation.target[:, None]).sum(), x)
    assert distance(lrpfast.explain(model, inputs, composite=GRADIENT, seed="one").relevance, gradient) < 1e-9
