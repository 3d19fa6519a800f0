"""The oracles themselves: worked cases of RULES.md, cases computed by hand, and identities that must hold whatever the formulas.

An oracle that is wrong in the same way as the library would hide it, so these tests use nothing of either but their results.
"""

import pytest
import torch
from torch import nn

from tests.oracles.jacobian import DenseLayer, fold, layer_relevance, negative, positive
from tests.oracles.network import Net, distance, explain, one_hot_seed, stability
from tests.oracles.specs import EPSILON, FLAT, GAMMA, GRADIENT, WSQUARE, ZERO, ZPLUS, Spec, everywhere


def tiny_linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    return layer


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# R for x, R_y, worked out by hand. The layer is y0 = 2a - b + 1, y1 = -a + 3b - 2 at a = 1, b = 2: z = (1, 3).
TWO = ([[2.0, -1.0], [-1.0, 3.0]], [1.0, -2.0])
BY_HAND = [
    # s = (1/1, 6/3) = (1, 2); Wᵀs = (2 - 2, -1 + 6)
    (Spec("Epsilon", {"epsilon": 0.0}), (1.0, 6.0), (0.0, 10.0)),
    (ZERO, (1.0, 6.0), (0.0, 10.0)),
    # ẑ = (2 + 1, 6): s = (1, 2); W⁺ᵀs = (2, 6)
    (Spec("ZPlus", {"stabilizer": 0.0}), (3.0, 12.0), (2.0, 12.0)),
    # s⁺ = (1, 2); z⁻ = (-2, -1 - 2): s⁻ = (-1.5, -4); W⁻ᵀs⁻ = (4, 1.5): 2 (2, 12) - (4, 3)
    (Spec("AlphaBeta", {"alpha": 2.0, "beta": 1.0, "stabilizer": 0.0}), (3.0, 12.0), (0.0, 21.0)),
    # both z > 0. P = [[4, -1], [-1, 6]]: Px + b + b⁺ = (4 - 2 + 1 + 1, -1 + 12 - 2) = (4, 9); s = (1, 2): Pᵀs = (2, 11)
    (Spec("Gamma", {"gamma": 1.0, "stabilizer": 0.0}), (4.0, 18.0), (2.0, 22.0)),
    # l = -1, h = 3: Wx = (0, 5); W⁺l = (-2, -3); W⁻h = (-3, -3): denominator (5, 11); s = (1, 1):
    # x⊙(1, 2) - l⊙(2, 3) - h⊙(-1, -1)
    (Spec("ZBox", {"low": -1, "high": 3, "stabilizer": 0.0}), (5.0, 11.0), (1.0 + 2.0 + 3.0, 4.0 + 3.0 + 3.0)),
    # W² = [[4, 1], [1, 9]]: denominator (5 + 1, 10 + 4) = (6, 14)
    (Spec("WSquare", {"stabilizer": 0.0}), (6.0, 14.0), (5.0, 10.0)),
    (Spec("Flat", {"stabilizer": 0.0}), (6.0, 14.0), (10.0, 10.0)),
    (GRADIENT, (1.0, 1.0), (1.0, 2.0)),
]


@pytest.mark.parametrize(("spec", "r", "expected"), BY_HAND, ids=lambda v: str(v) if isinstance(v, Spec) else "")
def test_rules_match_cases_computed_by_hand(spec, r, expected):
    found = layer_relevance(spec, tiny_linear(*TWO), row(1.0, 2.0), row(*r))
    assert torch.allclose(found, row(*expected), rtol=1e-12, atol=1e-12), found


def test_gamma_below_zero_by_hand():
    # y = a - 2b + 0.5 at (1, 2): z = -2.5. N = [[1, -4]] for γ = 1: Nx + b + b⁻ = 1 - 8 + 0.5 = -6.5; R = 13: s = -2
    layer = tiny_linear([[1.0, -2.0]], [0.5])
    found = layer_relevance(Spec("Gamma", {"gamma": 1.0, "stabilizer": 0.0}), layer, row(1.0, 2.0), row(13.0))
    assert torch.allclose(found, row(-2.0, 16.0))
    # signed x = (-1, 1): z = -1 - 2 + 0.5; P = [[2, -2]] meets x⁻: Nx⁺ + Px⁻ + b = -4 - 2 + 0.5 = -5.5; R = 11: s = -2
    found = layer_relevance(Spec("Gamma", {"gamma": 1.0, "stabilizer": 0.0}), layer, row(-1.0, 1.0), row(11.0))
    assert torch.allclose(found, row(4.0, 8.0))


def test_worked_cases_of_the_rules_page():
    found = layer_relevance(EPSILON, tiny_linear([[1.0, -1.0]]), row(1.0, 1.0), row(1.0))
    assert torch.allclose(found, row(1e6, -1e6))
    biased = tiny_linear([[1.0, -1.0]], [-1.0])
    found = layer_relevance(Spec("AlphaBeta", {"alpha": 1.0, "beta": 0.0}), biased, row(1.0, 1.0), row(-1.0))
    assert torch.allclose(found, row(-1.0, 0.0), atol=2e-6)
    found = layer_relevance(Spec("AlphaBeta", {"alpha": 2.0, "beta": 1.0}), biased, row(1.0, 1.0), row(-1.0))
    assert torch.allclose(found, row(-2.0, 0.5), atol=4e-6)


def test_zero_drops_exact_zeros():
    found = layer_relevance(ZERO, tiny_linear([[1.0, -1.0], [1.0, 1.0]]), row(1.0, 1.0), row(5.0, 4.0))
    assert torch.equal(found, row(2.0, 2.0))


def test_flat_counts_taps_in_bounds():
    layer = nn.Conv1d(1, 1, 3, padding=1, dtype=torch.float64)
    found = layer_relevance(FLAT, layer, torch.zeros(1, 1, 3, dtype=torch.float64), row(2.0, 3.0, 2.0)[None])
    # the border outputs have two taps, the middle one three: s = (1, 1, 1)
    assert torch.allclose(found, row(2.0, 3.0, 2.0)[None], atol=1e-5)


CONVOLUTIONS = [
    (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (2, 7)),
    (nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding=(1, 0)), (2, 4, 5)),
    (nn.Conv3d(1, 2, 2, padding=1), (1, 3, 2, 3)),
    (nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4)),
    (nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=2), (2, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: type(v).__name__)
def test_modified_weights_are_the_modified_matrix_under_zero_padding(layer, shape):
    dense = DenseLayer(layer, shape)
    x = torch.randn(2, *shape, dtype=torch.float64)
    by_matrix = x.reshape(2, -1) @ dense.weight.T + dense.bias
    assert torch.allclose(by_matrix, layer.double()(x).reshape(2, -1))
    jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].reshape(-1), x[0])
    assert torch.allclose(dense.weight, jacobian.reshape(dense.weight.shape))
    assert torch.equal(dense.matrix(positive), positive(dense.weight))
    assert torch.equal(dense.matrix(negative), negative(dense.weight))
    assert torch.allclose(dense.matrix(torch.square), dense.weight**2)
    assert torch.equal(dense.matrix(torch.ones_like), (dense.weight != 0).double())


@pytest.mark.parametrize("layer", [c[0] for c in CONVOLUTIONS] + [nn.Linear(2, 3)], ids=lambda v: type(v).__name__)
def test_fold_computes_batch_norm_after_the_layer(layer):
    shape = next((s for c, s in CONVOLUTIONS if c is layer), (2,))
    layer = layer.double()
    channels = layer(torch.zeros(1, *shape, dtype=torch.float64)).shape[1]
    rank = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape) + 1]
    norm = rank(channels).double().train()
    for _ in range(3):
        norm(layer(torch.randn(4, *shape, dtype=torch.float64)))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.eval()
    x = torch.randn(2, *shape, dtype=torch.float64)
    assert torch.allclose(fold(layer, norm)(x), norm(layer(x)))


def relu_network(bias: bool) -> Net:
    net = Net()
    x = net.input()
    h = net.relu(net.layer("a", nn.Conv2d(2, 4, 3, padding=1, bias=bias), x))
    h = net.op(
        "norm", lambda v: nn.functional.avg_pool2d(v, 2), net.relu(net.layer("b", nn.Conv2d(4, 4, 3, bias=bias), h))
    )
    net.layer("c", nn.Linear(16, 3, bias=bias), net.op("route", lambda v: v.flatten(1), h))
    return net.double()


def test_zero_is_gradient_times_input_without_bias():
    net, x = relu_network(False), torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    output = net(x)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), x)
    # LRP-0 divides by y/S(y) = 1 - 1e-6/y in the pool alone, which the net stabilises as RULES.md says
    found = explain(net, everywhere(ZERO), [x.detach()], one_hot_seed(output.detach(), 1))
    assert distance(found.relevance[0], x * gradient) < 1e-3
    assert found.relevance[0].sum() == pytest.approx(float(output[:, 1].sum().detach()), rel=1e-3)


@pytest.mark.parametrize("spec", [FLAT, WSQUARE], ids=str)
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: type(v).__name__)
def test_rules_without_an_input_factor_conserve(spec, layer, shape):
    layer = nn.utils.skip_init(type(layer), layer.in_channels, layer.out_channels, layer.kernel_size, bias=False)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, *shape, dtype=torch.float64)
    layer, r = layer.double(), torch.randn_like(layer.double()(x).detach())
    found = layer_relevance(Spec(spec.name, {"stabilizer": 0.0}), layer, x, r)
    assert torch.allclose(found.sum(), r.sum())


@pytest.mark.parametrize("spec", [ZPLUS, GAMMA], ids=str)
def test_rules_without_bias_conserve(spec):
    net, x = relu_network(False), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    seed = one_hot_seed(net(x).detach(), torch.tensor([0, 2]), "one")
    found = explain(net, everywhere(spec), [x], seed)
    assert torch.allclose(found.relevance[0].sum((1, 2, 3)), torch.ones(2, dtype=torch.float64), atol=1e-3)


def test_distance_is_relative_to_the_largest_entry_of_each_sample():
    a, b = torch.tensor([[1.0, 2.0], [1e-9, 0.0]]), torch.tensor([[1.0, 4.0], [1e-9, 0.0]])
    assert distance(a, b) == pytest.approx(0.5)
    assert distance(b + torch.tensor([[0.0, 0.0], [1e-9, 0.0]]), b) == pytest.approx(1.0)
    assert distance(torch.zeros(1, 2), torch.zeros(1, 2)) == 0
    assert distance(torch.full((1, 2), float("nan")), torch.zeros(1, 2)) == float("inf")


def test_stability_sees_cancellation_and_ties():
    net = Net()
    x = net.input()
    net.layer("a", nn.Linear(2, 1, bias=False), x)
    net.double()
    with torch.no_grad():
        net.layers["a"].weight.copy_(torch.tensor([[0.1, 0.2]]))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert stability(net, everywhere(EPSILON), [row(1.0, 1.0)], one) < 1e-11
    assert stability(net, everywhere(EPSILON), [row(2.0, -1.0)], one) > 1e-9
    tie = Net()
    tie.op("max_pool", lambda v: nn.functional.max_pool1d(v, 2), tie.input())
    seed = torch.ones(1, 1, 8, dtype=torch.float64)
    assert stability(tie, {}, [row(*[1.0, 3.0, 0.0, 0.0] * 4)[None]], seed) < 1e-11
    assert stability(tie, {}, [row(*[2.0, 2.0] * 8)[None]], seed) > 0.1
