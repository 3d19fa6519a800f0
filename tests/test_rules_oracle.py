"""Every rule of RULES.md section 2 on every kind of layer, against the dense-matrix oracle in float64.

One network holds many branches, each a layer with its own input, rule and surroundings, so that a layer is captured once for
all rules. The surroundings choose the schedule: behind a ReLU the input is proved nonnegative, in front of one the output is used only by
a ReLU, and what lies above decides whether relevance can stand where that ReLU gives zero (it can under the flat rule and under a
free seed, and then the cheap schedule would be wrong).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from tests.oracles.agree import Parallel, assert_agrees, make_seed
from tests.oracles.jacobian import layer_relevance
from tests.oracles.network import Net, distance
from tests.oracles.specs import ALPHA2_BETA1, EPSILON, FLAT, GAMMA, LAYER_RULES, PASS, ZBOX, ZERO, ZPLUS, Spec, to_rule

# said by the user's own model when it runs
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


@dataclass(frozen=True)
class Case:
    """A layer to build (with or without bias) and the shape of one sample."""

    name: str
    build: Callable[[bool], nn.Module]
    shape: tuple[int, ...]


def conv(cls: type[nn.Module], *args: object, **options: object) -> Callable[[bool], nn.Module]:
    return lambda bias: cls(*args, bias=bias, **options)


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d

CASES = [
    Case("linear", conv(nn.Linear, 5, 4), (5,)),
    Case("linear-one-output", conv(nn.Linear, 3, 1), (3,)),
    Case("linear-rank3", conv(nn.Linear, 4, 3), (2, 4)),
    Case("linear-rank4", conv(nn.Linear, 3, 4), (2, 2, 3)),
    Case("conv1d", conv(C1, 2, 3, 3), (2, 7)),
    Case("conv1d-stride-leftover", conv(C1, 2, 3, 3, stride=3), (2, 8)),
    Case("conv1d-stride-above-kernel", conv(C1, 2, 3, 2, stride=3, padding=1), (2, 9)),
    Case("conv1d-dilation", conv(C1, 2, 3, 3, dilation=2, padding=3), (2, 8)),
    Case("conv1d-groups", conv(C1, 4, 6, 3, groups=2, padding=1), (4, 6)),
    Case("conv1d-depthwise", conv(C1, 3, 6, 3, groups=3, stride=2), (3, 7)),
    Case("conv1d-same-even-kernel", conv(C1, 2, 3, 4, padding="same", dilation=3), (2, 10)),
    Case("conv1d-valid", conv(C1, 2, 3, 3, padding="valid"), (2, 6)),
    Case("conv1d-reflect", conv(C1, 2, 3, 3, padding=2, padding_mode="reflect"), (2, 6)),
    Case("conv1d-circular-same", conv(C1, 2, 2, 4, padding="same", padding_mode="circular"), (2, 6)),
    Case("conv2d", conv(C2, 2, 3, 3, padding=1), (2, 4, 5)),
    Case("conv2d-pointwise-stride", conv(C2, 3, 4, 1, stride=2), (3, 5, 4)),
    Case("conv2d-uneven", conv(C2, 2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 5)),
    Case("conv2d-stride-dilation-groups", conv(C2, 4, 4, 3, stride=2, dilation=2, groups=2, padding=2), (4, 6, 7)),
    Case("conv2d-depthwise", conv(C2, 4, 4, 3, groups=4, padding=1), (4, 4, 4)),
    Case("conv2d-depthwise-multiplier", conv(C2, 2, 6, 3, groups=2, stride=2), (2, 6, 5)),
    Case("conv2d-same-even-kernel", conv(C2, 2, 2, (2, 4), padding="same"), (2, 4, 5)),
    Case("conv2d-wide-padding", conv(C2, 1, 2, 2, padding=3), (1, 3, 3)),
    Case("conv2d-reflect", conv(C2, 2, 2, 3, padding=(1, 2), padding_mode="reflect", stride=2), (2, 5, 5)),
    Case("conv2d-circular", conv(C2, 2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    Case("conv2d-replicate", conv(C2, 2, 2, 3, padding=2, padding_mode="replicate"), (2, 4, 3)),
    Case("conv3d", conv(C3, 1, 2, 2, padding=1), (1, 3, 2, 3)),
    Case("conv3d-uneven", conv(C3, 2, 2, (1, 3, 2), stride=(1, 2, 1), dilation=(1, 1, 2)), (2, 2, 5, 4)),
    Case("conv3d-depthwise", conv(C3, 2, 4, 2, groups=2, stride=2), (2, 3, 4, 4)),
    Case("conv3d-circular", conv(C3, 1, 2, 3, padding=1, padding_mode="circular"), (1, 3, 3, 3)),
    Case("convtranspose1d", conv(T1, 2, 3, 3), (2, 5)),
    Case("convtranspose1d-stride", conv(T1, 2, 3, 3, stride=3, padding=1, output_padding=2), (2, 4)),
    Case("convtranspose1d-groups", conv(T1, 4, 6, 3, groups=2, stride=2, dilation=2), (4, 4)),
    Case("convtranspose2d", conv(T2, 2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 3)),
    Case("convtranspose2d-gaps", conv(T2, 2, 2, 2, stride=3), (2, 3, 2)),
    Case(
        "convtranspose2d-uneven",
        conv(T2, 2, 3, (3, 2), stride=(1, 2), padding=(2, 0), output_padding=(0, 1)),
        (2, 4, 3),
    ),
    Case("convtranspose2d-depthwise", conv(T2, 3, 3, 3, groups=3, padding=1, dilation=2), (3, 4, 4)),
    Case("convtranspose3d", conv(T3, 2, 2, 2, stride=2), (2, 2, 2, 2)),
    Case(
        "convtranspose3d-groups", conv(T3, 2, 4, (1, 2, 3), groups=2, stride=(1, 1, 2), padding=(0, 1, 1)), (2, 2, 3, 3)
    ),
]

# What stands above a layer: nothing; a ReLU under a free seed; a ReLU and a dense layer with a rule of either kind.
TAILS: tuple[Spec | str | None, ...] = (None, "relu", EPSILON, FLAT)


class Branches(Parallel):
    """Branches of one layer each, in the surroundings that choose its schedule."""

    def layer(self, case: Case, rule: Spec, relu_below: bool, tail: Spec | str | None, bias: bool) -> None:
        x = torch.randn(self.batch, *case.shape, dtype=torch.float64).clamp(-2.5, 2.5)
        x = torch.where(torch.rand_like(x) < 0.1, torch.zeros_like(x), x)

        def build(net: Net, h: int, prefix: str) -> int:
            self.rules[prefix] = rule
            h = net.layer(prefix, case.build(bias), net.relu(h) if relu_below else h)
            return h if tail is None else net.relu(h)

        words = (
            str(rule),
            "x >= 0" if relu_below else "signed",
            "bias" if bias else "no bias",
            "relu above" if tail else "",
        )
        self.add(" ".join(words), x, build, tail if isinstance(tail, Spec) else None)

    def make_exact(self) -> None:
        """Round all numbers to few multiples of 1/2: sums are then exact, and zeros of x, of W and of z are exact and frequent."""
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(dyadic(torch.randn_like(parameter)))
        self.inputs = [dyadic(x) for x in self.inputs]


def dyadic(t: Tensor) -> Tensor:
    return torch.round(t * 2).clamp(-2, 2) / 2


# Every schedule: signed or proved nonnegative, what stands above, with or without a bias.
SURROUNDINGS = list(itertools.product((False, True), TAILS, (True, False)))


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.name for case in CASES])
def test_every_rule_on_every_layer(number: int, case: Case):
    """Each rule meets all 16 surroundings as the cases go by (7 and 16 have no common divisor)."""
    branches = Branches()
    for r, rule in enumerate(LAYER_RULES):
        branches.layer(case, rule, *SURROUNDINGS[(7 * number + 5 * r) % 16])
    branches.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2d", "linear"])
@pytest.mark.parametrize("tail", TAILS, ids=lambda tail: f"above-{tail}")
def test_every_rule_in_every_surrounding(name: str, tail: Spec | str | None):
    case = next(c for c in CASES if c.name == name)
    branches = Branches()
    for rule, below in itertools.product(LAYER_RULES, (False, True)):
        branches.layer(case, rule, below, tail, bias=True)
    branches.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv2d-circular", "conv3d", "convtranspose2d"])
def test_exact_zeros_of_x_and_z(name: str):
    case = next(c for c in CASES if c.name == name)
    branches = Branches(batch=3)
    for r, rule in enumerate(LAYER_RULES):
        branches.layer(case, rule, False, (None, "relu")[r % 2], bias=r % 4 < 2)
        branches.layer(case, rule, True, (None, "relu", FLAT)[r % 3], bias=r % 4 >= 2)
    branches.make_exact()
    branches.check()


NOT_POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda v: v.clamp(max=-0.5),
    "clamp_max": lambda v: v.clamp_max(-0.5),
    "clamp-both": lambda v: v.clamp(0.5, -0.5),
    "hardtanh": lambda v: nn.functional.hardtanh(v, -2.0, -0.5),
    "clamp-tensor": lambda v: v.clamp(max=torch.tensor([-0.5, 0.5, -1.0, 0.2], dtype=v.dtype)),
}


@pytest.mark.slow
def test_a_clip_below_zero_is_not_taken_for_positive():
    """Behind a ReLU, too: its bound decides, and the schedule for inputs >= 0 would be wrong."""
    branches = Parallel()
    for rule, (name, clip) in itertools.product((ZPLUS, ALPHA2_BETA1, GAMMA), NOT_POSITIVE.items()):

        def build(net: Net, h: int, prefix: str, rule: Spec = rule, clip: Callable[[Tensor], Tensor] = clip) -> int:
            branches.rules[prefix] = rule
            return net.layer(prefix, nn.Linear(4, 3), net.op("pass", clip, net.relu(h)))

        branches.add(f"{rule} {name}", (4,), build)
    branches.check()


@pytest.mark.slow
@pytest.mark.parametrize("share", [1e-6, 1e-12, 1e-20])
def test_parts_of_z_that_differ_by_many_digits(share: float):
    """A negative part far smaller than the positive one, and the reverse: it must not be had by subtracting large numbers."""
    branches = Branches()
    for rule, below in itertools.product((ALPHA2_BETA1, GAMMA, ZPLUS, EPSILON), (False, True)):
        for sign in (1.0, -1.0):
            layer = nn.Conv2d(3, 4, 3, padding=1).double()
            with torch.no_grad():
                large = sign * (0.5 + torch.rand_like(layer.weight))
                layer.weight.copy_(torch.where(torch.rand_like(large) < 0.3, -share * large, large))
                layer.bias.copy_(sign * torch.tensor([-share, 0.0, 0.5, -2 * share], dtype=torch.float64))
            case = Case("digits", lambda bias, layer=layer: layer, (3, 4, 4))
            branches.layer(case, rule, below, EPSILON if below else None, bias=True)
    branches.check()


OPTIONS = [
    Spec("Epsilon", {"epsilon": 0.5}),
    Spec("ZPlus", {"stabilizer": 0.25}),
    Spec("AlphaBeta", {"alpha": 3.5, "beta": 2.5, "stabilizer": 0.1}),
    Spec("Gamma", {"gamma": 0.0}),
    Spec("Gamma", {"gamma": 1000.0, "stabilizer": 0.1}),
    Spec("WSquare", {"stabilizer": 0.1}),
    Spec("Flat", {"stabilizer": 0.1}),
    Spec("ZBox", {"low": -3, "high": 4, "stabilizer": 0.1}),
]


@pytest.mark.parametrize("below", [False, True], ids=["signed", "behind-relu"])
def test_options_of_the_rules(below: bool):
    case = next(c for c in CASES if c.name == "conv2d")
    branches = Branches()
    for rule in OPTIONS:
        branches.layer(case, rule, below, EPSILON if below else None, bias=True)
    branches.check()


SQUARE = nn.Conv2d(3, 3, 3, padding=1).double()


@pytest.mark.parametrize(
    "form", ["number", "integer", "channel list", "channel tensor", "channel 1CHW", "pixel", "mixed"]
)
def test_forms_of_the_box(form: str):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64) * 2 - 1
    low, high = torch.tensor([-1.0, -2.0, -1.5]).double(), torch.tensor([1.0, 1.5, 3.0]).double()
    low_pixel = -1 - torch.rand(3, 4, 5, dtype=torch.float64)
    forms = {
        "number": (-1.5, 2.5, -1.5, 2.5),
        "integer": (-1, 2, -1.0, 2.0),
        "channel list": (low.tolist(), high.tolist(), low, high),
        "channel tensor": (low, high, low, high),
        "channel 1CHW": (low.view(1, 3, 1, 1), high.view(1, 3, 1, 1), low, high),
        "pixel": (low_pixel, -low_pixel, low_pixel, -low_pixel),
        "mixed": (-2, high, -2.0, high),
    }
    given_low, given_high, oracle_low, oracle_high = forms[form]
    r = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rule = lrpfast.rules.ZBox(low=given_low, high=given_high)
    model = nn.Sequential(SQUARE).eval()
    found = lrpfast.Explainer(model, x, composite=lrpfast.Composite(rules=[("conv", rule)]))(x, target=r)
    spec = Spec("ZBox", {"low": oracle_low, "high": oracle_high})
    assert distance(found.relevance, layer_relevance(spec, SQUARE, x, r)) <= 1e-9


def test_box_per_feature_of_a_dense_layer():
    layer, x = nn.Linear(3, 4).double(), torch.rand(2, 3, dtype=torch.float64)
    low, high, r = [-0.5, -1.0, 0.0], [1.0, 2.0, 1.5], torch.randn(2, 4, dtype=torch.float64)
    composite = lrpfast.Composite(rules=[("linear", lrpfast.rules.ZBox(low=low, high=high))])
    found = lrpfast.Explainer(nn.Sequential(layer).eval(), x, composite=composite)(x, target=r)
    assert distance(found.relevance, layer_relevance(Spec("ZBox", {"low": low, "high": high}), layer, x, r)) <= 1e-9


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 3, 3, padding=1), nn.Linear(5, 5)], ids=lambda v: type(v).__name__)
def test_pass_leaves_relevance_as_it_is(layer: nn.Module):
    x, r = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    composite = lrpfast.Composite(rules=[("conv", to_rule(PASS)), ("linear", to_rule(PASS))])
    found = lrpfast.Explainer(nn.Sequential(layer.double()).eval(), x, composite=composite)(x, target=r)
    assert torch.equal(found.relevance, r)


def test_pass_between_layers():
    net = Net()
    h = net.relu(net.layer("a", nn.Conv2d(2, 2, 3, padding=1), net.input()))
    h = net.relu(net.layer("b", nn.Conv2d(2, 2, 3, padding=1), h))
    net.layer("c", nn.Conv2d(2, 2, 3), h)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    net.double().eval()
    assert_agrees(net, {"a": ZBOX, "b": PASS, "c": EPSILON}, [x], make_seed(net, [x]))


def test_worked_cases_of_the_rules_page():
    def run(weight: list[float], bias: float | None, rule: object, r: float) -> Tensor:
        layer = nn.Linear(2, 1, bias=bias is not None).double()
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([weight]))
            if bias is not None:
                layer.bias.fill_(bias)
        x, seed = torch.ones(1, 2, dtype=torch.float64), torch.full((1, 1), r, dtype=torch.float64)
        composite = lrpfast.Composite(rules=[("linear", rule)])
        return lrpfast.Explainer(nn.Sequential(layer).eval(), x, composite=composite)(x, target=seed).relevance[0]

    double = {"dtype": torch.float64}
    assert torch.allclose(
        run([1, -1], None, lrpfast.rules.Epsilon(1e-6), 1), torch.tensor([1e6, -1e6], **double), rtol=1e-9
    )
    assert torch.equal(run([1, -1], None, to_rule(ZERO), 1), torch.zeros(2, **double))
    one, two = lrpfast.rules.AlphaBeta(1.0, 0.0), lrpfast.rules.AlphaBeta(2.0, 1.0)
    assert torch.allclose(run([1, -1], -1, one, -1), torch.tensor([-1.0, 0.0], **double), atol=2e-6)
    assert torch.allclose(run([1, -1], -1, two, -1), torch.tensor([-2.0, 0.5], **double), atol=4e-6)
