"""The rules of RULES.md section 2 for one layer, written with dense matrices in float64.

Every dense, convolution and transposed-convolution layer is `z = Wx + b` for some matrix W. Here W is read off the layer by applying
it to every unit vector, and each rule is then the formula of RULES.md, symbol by symbol. A rule that modifies the weights gets the
matrix of the layer *with modified weights*: under zero padding that is the modified matrix itself, while under reflecting, circular
or replicating padding one input may meet several taps, and the modification belongs to each tap, not to their sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .specs import Spec

Modify = Callable[[Tensor], Tensor]


def positive(t: Tensor) -> Tensor:
    return torch.where(t > 0, t, torch.zeros_like(t))


def negative(t: Tensor) -> Tensor:
    return torch.where(t < 0, t, torch.zeros_like(t))


def stabilise(z: Tensor, epsilon: float = 1e-6) -> Tensor:
    """S(z) of RULES.md section 1, with sgn(0) = +1."""
    return torch.where(z >= 0, z + epsilon, z - epsilon)


class DenseLayer:
    """A layer, followed or not by a batch norm in eval mode, as `z = Wx + b` on flattened samples."""

    def __init__(self, layer: nn.Module, in_shape: tuple[int, ...], batch_norm: nn.Module | None = None) -> None:
        self.layer = fold(layer, batch_norm).double()
        self.in_shape = tuple(in_shape)
        self.features = 1
        for size in self.in_shape:
            self.features *= size
        zero = torch.zeros(1, *self.in_shape, dtype=torch.float64)
        with torch.no_grad():
            output = self.layer(zero)
        self.out_shape = tuple(output.shape[1:])
        self.bias = output.reshape(-1)
        self.weight = self.matrix(lambda w: w)

    def matrix(self, modify: Modify) -> Tensor:
        """Return the [outputs, inputs] matrix of the layer whose weight is `modify(weight)` and whose bias is absent."""
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            layer.weight.copy_(modify(layer.weight))
            layer.bias = None
            units = torch.eye(self.features, dtype=torch.float64).reshape(self.features, *self.in_shape)
            return layer(units).reshape(self.features, -1).T.contiguous()


def fold(layer: nn.Module, batch_norm: nn.Module | None) -> nn.Module:
    """Return a copy of `layer` that computes `batch_norm(layer(x))`: the fold of RULES.md section 3."""
    layer = copy.deepcopy(layer).double()
    if batch_norm is None:
        return layer
    count = batch_norm.num_features
    one, zero = torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    gamma = one if batch_norm.weight is None else batch_norm.weight.detach().double()
    beta = zero if batch_norm.bias is None else batch_norm.bias.detach().double()
    factor = gamma / torch.sqrt(batch_norm.running_var.double() + batch_norm.eps)
    bias = zero if layer.bias is None else layer.bias.detach()
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        groups, per_group = layer.groups, weight.shape[1]
        grouped = weight.reshape(groups, weight.shape[0] // groups, per_group, *weight.shape[2:])
        scale = factor.reshape(groups, 1, per_group, *[1] * (weight.dim() - 2))
        weight = (grouped * scale).reshape(weight.shape)
    else:
        weight = weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    layer.weight = nn.Parameter(weight)
    layer.bias = nn.Parameter((bias - batch_norm.running_mean.double()) * factor + beta)
    return layer


def bound(value: object, in_shape: tuple[int, ...]) -> Tensor:
    """Return a limit of ZBox (a number, one per channel, or one per element) as a flat [inputs] or [N, inputs] tensor."""
    t = torch.as_tensor(value, dtype=torch.float64)
    if t.dim() == 1 and len(in_shape) > 1:
        t = t.reshape(-1, *[1] * (len(in_shape) - 1))
    if t.dim() > len(in_shape):
        return t.expand(t.shape[0], *in_shape).reshape(t.shape[0], -1)
    return t.expand(in_shape).reshape(-1)


def layer_relevance(
    spec: Spec, layer: nn.Module, x: Tensor, relevance: Tensor, batch_norm: nn.Module | None = None
) -> Tensor:
    """Return R_x of one layer for R_y = `relevance`, by the formula of RULES.md section 2 for `spec`."""
    if spec.name == "Pass":
        return relevance
    dense = DenseLayer(layer, tuple(x.shape[1:]), batch_norm)
    x_flat = x.double().reshape(x.shape[0], -1)
    r_flat = relevance.double().reshape(x.shape[0], -1)
    return RULES[spec.name](dense, x_flat, r_flat, **spec.options).reshape(x.shape)


def zero(layer: DenseLayer, x: Tensor, r: Tensor) -> Tensor:
    w, b = layer.weight, layer.bias
    z = x @ w.T + b
    s = torch.where(z == 0, torch.zeros_like(z), r / torch.where(z == 0, torch.ones_like(z), z))
    return x * (s @ w)


def epsilon(layer: DenseLayer, x: Tensor, r: Tensor, epsilon: float = 1e-6) -> Tensor:
    w, b = layer.weight, layer.bias
    s = r / stabilise(x @ w.T + b, epsilon)
    return x * (s @ w)


def z_plus(layer: DenseLayer, x: Tensor, r: Tensor, stabilizer: float = 1e-6) -> Tensor:
    wp, wn, bp = layer.matrix(positive), layer.matrix(negative), positive(layer.bias)
    xp, xn = positive(x), negative(x)
    s = r / stabilise(xp @ wp.T + xn @ wn.T + bp, stabilizer)
    return xp * (s @ wp) + xn * (s @ wn)


def alpha_beta(
    layer: DenseLayer, x: Tensor, r: Tensor, alpha: float = 2.0, beta: float = 1.0, stabilizer: float = 1e-6
) -> Tensor:
    wp, wn = layer.matrix(positive), layer.matrix(negative)
    bp, bn = positive(layer.bias), negative(layer.bias)
    xp, xn = positive(x), negative(x)
    sp = r / stabilise(xp @ wp.T + xn @ wn.T + bp, stabilizer)
    sn = r / stabilise(xp @ wn.T + xn @ wp.T + bn, stabilizer)
    for_ = xp * (sp @ wp) + xn * (sp @ wn)
    against = xp * (sn @ wn) + xn * (sn @ wp)
    return alpha * for_ - beta * against


def gamma(layer: DenseLayer, x: Tensor, r: Tensor, gamma: float = 0.25, stabilizer: float = 1e-6) -> Tensor:
    w, b = layer.weight, layer.bias
    p = layer.matrix(lambda t: t + gamma * positive(t))
    n = layer.matrix(lambda t: t + gamma * negative(t))
    xp, xn = positive(x), negative(x)
    z = x @ w.T + b
    none = torch.zeros_like(z)
    above = xp @ p.T + xn @ n.T + b + gamma * positive(b)
    below = xp @ n.T + xn @ p.T + b + gamma * negative(b)
    sp = torch.where(z > 0, r / stabilise(above, stabilizer), none)
    sn = torch.where(z < 0, r / stabilise(below, stabilizer), none)
    return xp * (sp @ p + sn @ n) + xn * (sp @ n + sn @ p)


def z_box(layer: DenseLayer, x: Tensor, r: Tensor, low: object, high: object, stabilizer: float = 1e-6) -> Tensor:
    w, wp, wn = layer.weight, layer.matrix(positive), layer.matrix(negative)
    l, h = bound(low, layer.in_shape), bound(high, layer.in_shape)  # noqa: E741 - the symbols of RULES.md
    s = r / stabilise(x @ w.T - l @ wp.T - h @ wn.T, stabilizer)
    return x * (s @ w) - l * (s @ wp) - h * (s @ wn)


def w_square(layer: DenseLayer, x: Tensor, r: Tensor, stabilizer: float = 1e-6) -> Tensor:
    squared = layer.matrix(torch.square)
    s = r / stabilise(torch.ones_like(x) @ squared.T + layer.bias**2, stabilizer)
    return s @ squared


def flat(layer: DenseLayer, x: Tensor, r: Tensor, stabilizer: float = 1e-6) -> Tensor:
    ones = layer.matrix(torch.ones_like)
    s = r / stabilise(torch.ones_like(x) @ ones.T, stabilizer)
    return s @ ones


def gradient(layer: DenseLayer, x: Tensor, r: Tensor) -> Tensor:
    return r @ layer.weight


RULES: dict[str, Callable[..., Tensor]] = {
    "Zero": zero,
    "Epsilon": epsilon,
    "ZPlus": z_plus,
    "AlphaBeta": alpha_beta,
    "Gamma": gamma,
    "ZBox": z_box,
    "WSquare": w_square,
    "Flat": flat,
    "Gradient": gradient,
}
