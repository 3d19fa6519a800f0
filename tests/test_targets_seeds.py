"""Targets and seeds over whatever stands last in a model, against the oracle with the seed written out as a tensor.

With one target a sample the last dense layer needs one row of its weights, not all: every rule has that shortcut or must refuse it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfast
from tests.oracles.agree import to_composite
from tests.oracles.network import Net, distance, explain, one_hot_seed
from tests.oracles.specs import EPSILON, LAYER_RULES, ZPLUS, Spec
from tests.test_norms import with_statistics

TARGETS = torch.tensor([[0, 2], [1, 1], [2, 0]])


def assert_targets_agree(net: Net, rules: dict[str, Spec], x: Tensor, squeezed: bool = False) -> None:
    """Compare int, [N], [N, K] and default targets under both seeds with the oracle."""
    net = net.double().eval()
    with torch.no_grad():
        output = net(x)
    columns = output[:, None] if squeezed else output
    classes = columns.shape[1]
    explainer = lrpfast.Explainer(net, x, composite=to_composite(net, rules))

    def expected(target: Tensor, seed: str) -> Tensor:
        return explain(net, rules, [x], one_hot_seed(columns, target, seed).reshape(output.shape)).relevance[0]

    targets = TARGETS % classes
    for seed in ("logit", "one"):
        for k in range(2):
            found = explainer(x, target=targets[:, k], seed=seed)
            assert distance(found.relevance, expected(targets[:, k], seed)) <= 1e-9, (seed, k)
            assert torch.equal(found.target, targets[:, k])
        several = explainer(x, target=targets, seed=seed)
        assert several.relevance.shape == (3, 2, *x.shape[1:])
        for k in range(2):
            assert distance(several.relevance[:, k], expected(targets[:, k], seed)) <= 1e-9, (seed, k)
        last = torch.full((3,), classes - 1)
        assert distance(explainer(x, target=classes - 1, seed=seed).relevance, expected(last, seed)) <= 1e-9
        best = columns.argmax(1)
        assert distance(explainer(x, seed=seed).relevance, expected(best, seed)) <= 1e-9
        kept = several.output_relevance
        assert torch.allclose(
            kept, columns.gather(1, targets) if seed == "logit" else torch.ones_like(kept), rtol=1e-12
        )
        shares = several.relevance.flatten(2).sum(2) / kept
        assert torch.allclose(several.conservation(), shares, rtol=1e-9, equal_nan=True)  # 0 of 0 is no share


@pytest.mark.parametrize("rule", LAYER_RULES, ids=str)
@pytest.mark.parametrize("below", ["signed", "relu"])
def test_every_rule_in_the_last_layer(rule: Spec, below: str):
    net = Net()
    h = net.layer("a", nn.Linear(6, 5), net.input())
    net.layer("head", nn.Linear(5, 3), net.relu(h) if below == "relu" else h)
    assert_targets_agree(net, {"a": EPSILON, "head": rule}, torch.randn(3, 6, dtype=torch.float64).clamp(-2.5, 2.5))


def features(net: Net) -> int:
    return net.relu(net.layer("a", nn.Conv2d(2, 3, 3, padding=1), net.input()))


def pooled_maps(net: Net) -> int:
    """A fully convolutional classifier, such as SqueezeNet."""
    h = net.relu(net.layer("head", nn.Conv2d(3, 3, 1), features(net)))
    return net.op("route", lambda v: v.flatten(1), net.op("norm", lambda v: F.adaptive_avg_pool2d(v, 1), h))


def behind_a_relu(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    return net.relu(net.layer("head", nn.Linear(48, 3), h))


def behind_a_batch_norm(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    return net.layer("head", nn.Linear(48, 3), h, with_statistics(nn.BatchNorm1d(3)))


def two_heads(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    other = net.op("route", lambda v: v.flatten(1), net.op("max_pool", lambda v: F.max_pool2d(v, 2), features2(net)))
    return net.add(net.layer("head", nn.Linear(48, 3), h), net.layer("aside", nn.Linear(12, 3), other))


def features2(net: Net) -> int:
    return net.relu(net.layer("b", nn.Conv2d(2, 3, 3, padding=1), 0))


def shared_head(net: Net) -> int:
    """The last layer is also used before: its row may not be taken for the whole."""
    h = net.op("route", lambda v: v.flatten(1), features(net))
    h = net.relu(net.layer("head", nn.Linear(48, 48), h))
    return net.layer("head", net.layers["head"], h)


def averaged_positions(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(2).transpose(1, 2), features(net))
    return net.op("norm", lambda v: v.mean(1), net.layer("head", nn.Linear(3, 3), h))


def scaled(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    return net.op("pass", lambda v: v * 20.0, net.layer("head", nn.Linear(48, 3), h))


def some_classes(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    return net.op("route", lambda v: v[:, 1:4], net.layer("head", nn.Linear(48, 5), h))


def joined_heads(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    parts = [net.layer(name, nn.Linear(48, out), h) for name, out in (("head", 1), ("aside", 2))]
    return net.op("route", lambda *v: torch.cat(v, 1), *parts)


def one_output(net: Net) -> int:
    h = net.op("route", lambda v: v.flatten(1), features(net))
    return net.layer("head", nn.Linear(48, 1), h)


LAST: list[Callable[[Net], int]] = [
    pooled_maps, behind_a_relu, behind_a_batch_norm, two_heads, shared_head, averaged_positions, scaled, some_classes,
    joined_heads, one_output,
]  # fmt: skip


@pytest.mark.parametrize("build", LAST, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", [EPSILON, ZPLUS], ids=str)
def test_whatever_stands_last(build: Callable[[Net], int], rule: Spec):
    net = Net()
    build(net)
    assert_targets_agree(net, {"conv": ZPLUS, "linear": rule}, torch.randn(3, 2, 4, 4, dtype=torch.float64))


def test_an_output_without_a_dimension_of_classes():
    net = Net()
    one_output(net)
    net.op("route", lambda v: v.squeeze(1), net.result)
    assert_targets_agree(
        net, {"conv": ZPLUS, "linear": EPSILON}, torch.randn(3, 2, 4, 4, dtype=torch.float64), squeezed=True
    )


def test_an_output_of_higher_rank_takes_a_tensor_alone():
    """A segmentation network: no class names one value, so the relevance at the output has to be given."""
    net = Net()
    net.layer("head", nn.Conv2d(3, 2, 1), features(net))
    net.double().eval()
    x, rules = torch.randn(3, 2, 4, 4, dtype=torch.float64), {"conv": ZPLUS}
    explainer = lrpfast.Explainer(net, x, composite=to_composite(net, rules))
    seed = torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    seed[:, 1, 2, 3] = 1.0
    found = explainer(x, target=seed)
    assert distance(found.relevance, explain(net, rules, [x], seed).relevance[0]) <= 1e-9
    assert torch.equal(found.target, seed)
    assert torch.allclose(found.output_relevance, torch.ones(3, dtype=torch.float64))
    for target in (None, 0, torch.tensor([0, 1, 0])):
        with pytest.raises(lrpfast.errors.TargetError, match=r"\[N, 2, 4, 4\]"):
            explainer(x, target=target)


def test_contrastive_seeds_as_tensors():
    """CLRP and SGLRP (RULES section 6) are tensors at the output: the map of a sum of seeds is the sum of maps."""
    net = Net()
    behind_a_batch_norm(net)
    net.double().eval()
    x, rules = torch.randn(3, 2, 4, 4, dtype=torch.float64), {"conv": ZPLUS, "linear": ZPLUS}
    explainer = lrpfast.Explainer(net, x, composite=to_composite(net, rules))
    with torch.no_grad():
        output = net(x)
    logit = one_hot_seed(output, 1)
    others = (output[:, 1:2] / 2).expand(3, 3) * (torch.arange(3) != 1)
    contrast = explainer(x, target=logit - others).relevance
    assert distance(contrast, explainer(x, target=1).relevance - explainer(x, target=others).relevance) <= 1e-9
    p = torch.softmax(output, 1)
    softmax_gradient = p[:, 1:2] * (torch.nn.functional.one_hot(torch.tensor(1), 3) - p)
    expected = explain(net, rules, [x], softmax_gradient).relevance[0]
    assert distance(explainer(x, target=softmax_gradient).relevance, expected) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_integer_targets_of_any_width(dtype: torch.dtype):
    model = nn.Sequential(nn.Linear(4, 3)).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    explainer = lrpfast.Explainer(model, x, composite="epsilon")
    expected = explainer(x, target=[0, 2, 1])
    assert expected.target.dtype is torch.int64
    found = explainer(x, target=torch.tensor([0, 2, 1], dtype=dtype))
    assert torch.equal(found.relevance, expected.relevance) and torch.equal(found.target, expected.target)


def test_a_target_in_another_precision_or_layout():
    model = nn.Sequential(nn.Linear(4, 3)).double().eval()
    x, seed = torch.randn(3, 4, dtype=torch.float64), torch.randint(-3, 4, (3, 3)).double()
    explainer = lrpfast.Explainer(model, x, composite="epsilon")
    expected = explainer(x, target=seed).relevance
    assert torch.equal(explainer(x, target=seed.float()).relevance, expected)
    assert torch.equal(explainer(x, target=seed.T.contiguous().T).relevance, expected)
    assert torch.equal(explainer(x, target=seed.clone().requires_grad_()).relevance, expected)
