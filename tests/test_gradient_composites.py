"""Composites whose result is a (modified) gradient, against torch's autograd on a copy of the model with other ReLUs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from tests.oracles.agree import assert_agrees, make_seed
from tests.oracles.network import Net, distance
from tests.oracles.specs import GRADIENT, NORM, ZPLUS, Spec
from tests.test_norms import trained, with_statistics

Rule = Callable[[Tensor, Tensor], Tensor]
BACKWARD: dict[str, Rule] = {
    "guided_backprop": lambda x, g: g * (x > 0) * (g > 0),
    "deconvnet": lambda x, g: g.clamp(min=0),
    "beta_smooth": lambda x, g: g * torch.sigmoid(10.0 * x),
    "gradient": lambda x, g: g * (x > 0),
}


class OtherReLU(nn.Module):
    """A ReLU with another backward pass."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.clamp(min=0)

            @staticmethod
            def backward(ctx, g):
                return rule(ctx.saved_tensors[0], g)

        self.apply_ = Function.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_(x)


class Block(nn.Module):
    """Everything that the gradient has to go through: folded and free batch norm, residual, gate, pools, norms, activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(2, 4, 3, padding=1), with_statistics(nn.BatchNorm2d(4))
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.max, self.free = nn.MaxPool2d(2), with_statistics(nn.BatchNorm2d(4))
        self.inner, self.gelu = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.GELU()
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.norm, self.avg = trained(nn.GroupNorm(2, 4)), nn.AdaptiveAvgPool2d(2)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(self.max(self.relu1(self.bn(self.stem(x)))))
        y = self.gelu(self.inner(x))
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        x = self.relu2(self.norm(x + 0.5 * y) - 0.1)
        return self.head(self.relu3(self.up(self.avg(x))).flatten(1))


def with_other_relus(model: nn.Module, rule: Rule) -> nn.Module:
    model = copy.deepcopy(model)
    for name in ("relu1", "relu2", "relu3"):
        setattr(model, name, OtherReLU(rule))
    return model


@pytest.fixture
def model() -> nn.Module:
    return Block().double().eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKWARD)
def test_modified_gradient(model: nn.Module, kind: str):
    x, target = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 4, 2])
    other = with_other_relus(model, BACKWARD[kind])
    leaf = x.clone().requires_grad_()
    output = other(leaf)
    chosen, own = nn.functional.one_hot(target, 5).double(), torch.randn_like(output)
    gradient = lrpfast.Composite(rules=[("any", lrpfast.rules.Gradient())])
    explainer = lrpfast.Explainer(model, x, composite=gradient if kind == "gradient" else kind)
    for seed, found in (
        (chosen * output.detach(), explainer(x, target=target)),
        (chosen, explainer(x, target=target, seed="one")),
        (own, explainer(x, target=own)),
    ):
        (expected,) = torch.autograd.grad(output, leaf, seed, retain_graph=True)
        assert distance(found.relevance, expected) <= 1e-9


@pytest.mark.parametrize("batch", [1, 3])
def test_gradient_of_instance_norm(batch: int):
    """As torch writes its gradient, it views memory in ways that only one layout allows."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), trained(nn.InstanceNorm2d(4, affine=True)), nn.Flatten(), nn.Linear(64, 3)
    )
    model, x = model.double().eval(), torch.randn(batch, 2, 4, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    found = lrpfast.explain(model, x, target=1, composite="guided_backprop", seed="one").relevance
    assert distance(found, expected) <= 1e-9


class Attention(nn.Module):
    """A block of attention over [N, C, L]: softmax, and products of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(5, 18), trained(nn.LayerNorm(6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.embed(x).chunk(3, -1)
        attention = torch.softmax(q @ k.transpose(1, 2) / 6**0.5, -1)
        mixed = torch.bmm(attention, v)
        return self.out(self.norm(mixed + v).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["guided_backprop", "deconvnet", "beta_smooth", "any"])
def test_gradient_of_attention(composite: str):
    """There is no ReLU, so each of these is the gradient, through softmax and the products of activations as well."""
    model = Attention().double().eval()
    x, target = torch.randn(3, 4, 5, dtype=torch.float64), torch.tensor([0, 3, 2])
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf).gather(1, target[:, None]).sum(), leaf)
    gradient = lrpfast.Composite(rules=[("any", lrpfast.rules.Gradient())])
    explainer = lrpfast.Explainer(model, x, composite=gradient if composite == "any" else composite)
    assert distance(explainer(x, target=target, seed="one").relevance, expected) <= 1e-9


def test_excitation_backprop_takes_the_gradient_of_attention():
    """z⁺ in the layers, but through softmax and the products of activations the plain gradient."""
    net = Net()
    h = net.input()
    q, k, v = (net.layer(name, nn.Linear(5, 6), h) for name in "qkv")
    scores = net.op("matmul", lambda a, b: a @ b.transpose(1, 2), q, k)
    attention = net.op("softmax", lambda s: s.softmax(-1), scores)
    net.layer("out", nn.Linear(6, 4), net.op("matmul", torch.bmm, attention, v))
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_agrees(net.double().eval(), EXCITATION, [x], make_seed(net, [x]))


@pytest.mark.slow
def test_smoothness_is_an_option(model: nn.Module):
    x, target = torch.randn(2, 2, 8, 8, dtype=torch.float64), torch.tensor([1, 3])
    leaf = x.clone().requires_grad_()
    other = with_other_relus(model, lambda x, g: g * torch.sigmoid(3.0 * x))
    (expected,) = torch.autograd.grad(other(leaf).gather(1, target[:, None]).sum(), leaf)
    composite = lrpfast.composites.beta_smooth(beta=3.0)
    found = lrpfast.Explainer(model, x, composite=composite)(x, target=target, seed="one")
    assert distance(found.relevance, expected) <= 1e-9


def block_as_data() -> Net:
    net = Net()
    h = net.relu(net.layer("stem", nn.Conv2d(2, 4, 3, padding=1), net.input(), with_statistics(nn.BatchNorm2d(4))))
    h = net.op("max_pool", lambda v: nn.functional.max_pool2d(v, 2), h)
    h = net.module("batch_norm", "free", with_statistics(nn.BatchNorm2d(4)), h)
    inner = net.module("pass", "gelu", nn.GELU(), net.layer("inner", nn.Conv2d(4, 4, 3, padding=1), h))
    h = net.relu(net.add(inner, h))
    h = net.op("norm", lambda v: nn.functional.avg_pool2d(v, 2), h)
    h = net.op("route", lambda v: v.flatten(1), h)
    net.layer("head", nn.Linear(16, 5), net.relu(net.layer("hidden", nn.Linear(16, 16), h)))
    return net.double().eval()


EXCITATION = {"conv": ZPLUS, "linear": ZPLUS, "sum": NORM, "avg_pool": NORM, "any": GRADIENT}


@pytest.mark.slow
def test_excitation_backprop():
    """z⁺ in layers, Norm in sums and average pools, and the plain gradient of everything else, ReLUs included."""
    net, x = block_as_data(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    seed = make_seed(net, [x])
    expected = assert_agrees(net, EXCITATION, [x], seed)
    found = lrpfast.Explainer(net, x, composite="excitation_backprop")(x, target=seed)
    assert distance(found.relevance, expected.relevance[0]) <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Spec("GuidedReLU"), Spec("DeconvReLU"), Spec("SmoothReLU", {"beta": 2.0})], ids=str)
def test_modified_relu_between_relevance_rules(rule: Spec):
    """The rule of a ReLU may be mixed with LRP rules in the layers, in any order."""
    net, x = block_as_data(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    for layers in (ZPLUS, Spec("Flat"), Spec("Epsilon")):
        assert_agrees(net, {"conv": layers, "linear": GRADIENT, "relu": rule}, [x], make_seed(net, [x]))
