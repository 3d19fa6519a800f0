"""Batch norm, folded and not, and the norms whose normaliser depends on the sample (RULES.md section 3)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lrpfast
from tests.oracles.agree import TOPS, Parallel, assert_agrees, make_seed
from tests.oracles.jacobian import layer_relevance
from tests.oracles.network import Net, distance
from tests.oracles.specs import EPSILON, LAYER_RULES, ZPLUS, Spec, everywhere, to_rule

SHAPE = (2, 4, 5)


def with_statistics(norm: nn.Module) -> nn.Module:
    """Give a batch norm statistics and parameters of a trained network: none of them the neutral one."""
    norm = norm.double().eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.3, 2.0)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


FOLDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), lambda: nn.BatchNorm2d(3), SHAPE),
    "conv2d-no-bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), lambda: nn.BatchNorm2d(3, eps=1e-3), SHAPE),
    "conv2d-not-affine": (lambda: nn.Conv2d(2, 3, 3), lambda: nn.BatchNorm2d(3, affine=False), SHAPE),
    "conv2d-groups": (lambda: nn.Conv2d(2, 4, 3, groups=2, stride=2), lambda: nn.BatchNorm2d(4), SHAPE),
    "conv2d-circular": (
        lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        lambda: nn.BatchNorm2d(2),
        SHAPE,
    ),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), lambda: nn.BatchNorm1d(3), (2, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), lambda: nn.BatchNorm3d(2), (1, 3, 3, 3)),
    "linear": (lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4), (5,)),
    "linear-no-bias": (lambda: nn.Linear(5, 4, bias=False), lambda: nn.BatchNorm1d(4), (5,)),
    "convtranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), lambda: nn.BatchNorm2d(3), (2, 3, 3)),
    "convtranspose2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 3, 3)),
}


@pytest.mark.parametrize("name", FOLDS)
def test_batch_norm_is_folded_into_the_layer_below(name: str):
    layer, norm, shape = FOLDS[name]
    branches = Parallel()
    number = list(FOLDS).index(name)
    for k, rule in enumerate(LAYER_RULES[number % 2 :: 2]):  # every other rule: each meets half of the layers

        def build(net: Net, h: int, prefix: str, rule: Spec = rule, k: int = k) -> int:
            branches.rules[prefix] = rule
            h = net.layer(prefix, layer(), net.relu(h) if k % 4 < 2 else h, with_statistics(norm()))
            return net.relu(h) if k % 3 else h

        branches.add(str(rule), shape, build, TOPS[k % 2])
    branches.check()


def test_batch_norm_is_folded_through_dropout():
    conv, norm = nn.Conv2d(2, 3, 3).double(), with_statistics(nn.BatchNorm2d(3))
    model = nn.Sequential(conv, nn.Dropout(0.5), norm).eval()
    x, r = torch.randn(2, *SHAPE, dtype=torch.float64), torch.randn(2, 3, 2, 3, dtype=torch.float64)
    found = lrpfast.Explainer(model, x, composite=lrpfast.Composite(rules=[("conv", to_rule(ZPLUS))]))(x, target=r)
    assert distance(found.relevance, layer_relevance(ZPLUS, conv, x, r, norm)) <= 1e-9


def after_a_pool(net: Net, h: int, prefix: str) -> int:
    h = net.op(
        "max_pool", lambda v: nn.functional.max_pool2d(v, 2), net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
    )
    return net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm2d(3)), h)


def after_a_relu(net: Net, h: int, prefix: str) -> int:
    h = net.relu(net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h))
    return net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm2d(3)), h)


def before_relu_and_layer(net: Net, h: int, prefix: str) -> int:
    """The order of DenseNet: norm, relu, conv."""
    h = net.relu(after_a_relu(net, h, prefix))
    return net.layer(f"{prefix}b", nn.Conv2d(3, 2, 3), h)


def on_the_input(net: Net, h: int, prefix: str) -> int:
    h = net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm2d(2)), h)
    return net.relu(net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h))


def of_a_value_used_twice(net: Net, h: int, prefix: str) -> int:
    """The layer's own output is used beside its batch norm, so the norm cannot be folded into it."""
    h = net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
    normed = net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm2d(3)), h)
    return net.add(normed, h)


def over_another_dimension(net: Net, h: int, prefix: str) -> int:
    """The norm's channels are not the dense layer's features, though there are as many of them."""
    h = net.layer(f"{prefix}a", nn.Linear(4, 4), net.op("route", lambda v: v[:, 0, :, :4], h))
    return net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm1d(4)), h)


def after_a_sum(net: Net, h: int, prefix: str) -> int:
    a, b = (net.layer(f"{prefix}{name}", nn.Conv2d(2, 3, 3, padding=1), h) for name in "ab")
    return net.relu(net.module("batch_norm", f"{prefix}bn", with_statistics(nn.BatchNorm2d(3)), net.add(a, b)))


ALONE = [
    after_a_pool, after_a_relu, before_relu_and_layer, on_the_input, of_a_value_used_twice, over_another_dimension, after_a_sum,
]  # fmt: skip


@pytest.mark.parametrize("rule", [None, EPSILON, Spec("Epsilon", {"epsilon": 0.3})], ids=str)
def test_batch_norm_that_cannot_be_folded(rule: Spec | None):
    branches = Parallel()
    if rule is not None:
        branches.rules["batch_norm"] = rule
    for build in ALONE:
        for top in TOPS:
            branches.add(build.__name__, SHAPE, build, top)
    branches.check()


def trained(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


NORMALISERS: dict[str, Callable[[], nn.Module]] = {
    "layer-last": lambda: nn.LayerNorm(5),
    "layer-three": lambda: nn.LayerNorm((4, 4, 5), eps=1e-3),
    "layer-plain": lambda: nn.LayerNorm((4, 5), elementwise_affine=False),
    "layer-no-bias": lambda: nn.LayerNorm(5, bias=False),
    "rms": lambda: nn.RMSNorm(5),
    "rms-plain": lambda: nn.RMSNorm((4, 5), eps=1e-3, elementwise_affine=False),
    "group": lambda: nn.GroupNorm(2, 4),
    "group-one": lambda: nn.GroupNorm(1, 4, eps=1e-3),
    "group-plain": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance-plain": lambda: nn.InstanceNorm2d(4),
}


@pytest.mark.parametrize("name", NORMALISERS)
def test_normaliser_is_held_constant(name: str):
    def build(net: Net, h: int, prefix: str) -> int:
        h = net.layer(f"{prefix}a", nn.Conv2d(2, 4, 3, padding=1), h)
        return net.module("normaliser", f"{prefix}norm", trained(NORMALISERS[name]()), h)

    def behind_relu(net: Net, h: int, prefix: str) -> int:
        h = net.relu(net.layer(f"{prefix}a", nn.Conv2d(2, 4, 3, padding=1), h))
        return net.relu(net.module("normaliser", f"{prefix}norm", trained(NORMALISERS[name]()), h))

    branches = Parallel()
    branches.add(f"{name} behind a relu", SHAPE, behind_relu)
    for top in TOPS:
        branches.add(name, SHAPE, build, top)
    branches.check()


def test_epsilon_of_the_norm_is_the_composites():
    net = Net()
    h = net.layer("a", nn.Conv2d(2, 4, 3, padding=1), net.input())
    net.module("normaliser", "norm", trained(nn.LayerNorm(5)), h)
    net.double().eval()
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert_agrees(net, everywhere(EPSILON) | {"norm": Spec("Epsilon", {"epsilon": 0.5})}, [x], make_seed(net, [x]))


def test_layer_norm_over_channels_as_in_convnext():
    def block(net: Net, h: int, prefix: str) -> int:
        h = net.layer(f"{prefix}stem", nn.Conv2d(2, 4, 2, stride=2), h)
        inner = net.layer(f"{prefix}dw", nn.Conv2d(4, 4, 3, padding=1, groups=4), h)
        inner = net.op("route", lambda v: v.permute(0, 2, 3, 1), inner)
        inner = net.module("normaliser", f"{prefix}norm", trained(nn.LayerNorm(4)), inner)
        inner = net.op("pass", nn.functional.gelu, net.layer(f"{prefix}up", nn.Linear(4, 8), inner))
        inner = net.op("route", lambda v: v.permute(0, 3, 1, 2), net.layer(f"{prefix}down", nn.Linear(8, 4), inner))
        scale = torch.randn(4, 1, 1, dtype=torch.float64)
        return net.add(net.op("pass", lambda v: scale * v, inner), h)

    branches = Parallel()
    for top in TOPS:
        branches.add("convnext block", (2, 6, 6), block, top)
    branches.check()


def test_running_statistics_of_instance_norm_are_refused_by_name():
    """With tracked statistics it is affine with constants; it has no rule yet, and must not be taken for the other kind."""
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, nn.Flatten(), nn.Linear(18, 2)).eval()
    with pytest.raises(lrpfast.errors.UnsupportedOperationError, match=r"instance_norm.*'1'.*running statistics"):
        lrpfast.Explainer(model, torch.randn(2, *SHAPE), composite="epsilon")
