"""LRP of a whole network as a modified autograd, written from RULES.md alone: the oracle of the model families.

The model runs as it is, eagerly, inside a `TorchFunctionMode` that replaces each torch function by one whose backward pass
carries relevance: what autograd calls the gradient of a value *is* the relevance of that value, so relevances of branches
add up by themselves, and reshapes, slices, concatenations and max pools need nothing (the transpose of a routing is its
gradient). No graph is captured, nothing is proved about signs, every rule is the general formula, and there is one message
form: everything that lrpfast does otherwise.

The batch norm after a convolution or dense layer is folded when it is met: the layer's output remembers how it was made,
and the normalised value is computed from the layer's input with folded weights.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Linear = Callable[[Tensor, Tensor], Tensor]  # (input, weight) -> output of the layer without its bias
Parts = Callable[["Layer", Tensor, Tensor], Tensor]  # (layer, input, relevance of the output) -> relevance of the input


def stabilise(z: Tensor, epsilon: float = 1e-6) -> Tensor:
    """S(z)."""
    return z + torch.where(z >= 0, epsilon, -epsilon).to(z)


def pos(t: Tensor) -> Tensor:
    """t⁺."""
    return t.clamp(min=0)


def neg(t: Tensor) -> Tensor:
    """t⁻."""
    return t.clamp(max=0)


def vjp(function: Callable[[Tensor], Tensor], at: Tensor, vector: Tensor) -> Tensor:
    """The transposed Jacobian of `function` at `at`, applied to `vector`."""
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        return torch.autograd.grad(function(point), point, vector)[0]


@dataclasses.dataclass
class Layer:
    """A dense or convolution layer: z = linear(x, weight) + bias, the bias shaped so that it broadcasts."""

    linear: Linear
    weight: Tensor
    bias: Tensor

    def transposed(self, weight: Tensor, x: Tensor, s: Tensor) -> Tensor:
        """Wᵀs for the weights given."""
        return vjp(lambda at: self.linear(at, weight), x, s)


# ---- The rules of section 2, each the general formula ----------------------------------------------------------------


def gradient(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
    return layer.transposed(layer.weight, x, r)


def epsilon(layer: Layer, x: Tensor, r: Tensor, epsilon: float = 1e-6) -> Tensor:
    z = layer.linear(x, layer.weight) + layer.bias
    return x * layer.transposed(layer.weight, x, r / stabilise(z, epsilon))


def zero(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
    z = layer.linear(x, layer.weight) + layer.bias
    return x * layer.transposed(layer.weight, x, torch.where(z == 0, 0.0, r / z))


def alpha_beta(layer: Layer, x: Tensor, r: Tensor, alpha: float = 2.0, beta: float = 1.0) -> Tensor:
    w, b, f, t = layer.weight, layer.bias, layer.linear, layer.transposed
    s_p = r / stabilise(f(pos(x), pos(w)) + f(neg(x), neg(w)) + pos(b))
    s_n = r / stabilise(f(pos(x), neg(w)) + f(neg(x), pos(w)) + neg(b))
    activating = pos(x) * t(pos(w), x, s_p) + neg(x) * t(neg(w), x, s_p)
    inhibiting = pos(x) * t(neg(w), x, s_n) + neg(x) * t(pos(w), x, s_n)
    return alpha * activating - beta * inhibiting


def z_plus(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
    return alpha_beta(layer, x, r, 1.0, 0.0)


def gamma(layer: Layer, x: Tensor, r: Tensor, gamma: float = 0.25) -> Tensor:
    w, b, f, t = layer.weight, layer.bias, layer.linear, layer.transposed
    p, n = w + gamma * pos(w), w + gamma * neg(w)
    z = f(x, w) + b
    s_p = (z > 0) * r / stabilise(f(pos(x), p) + f(neg(x), n) + b + gamma * pos(b))
    s_n = (z < 0) * r / stabilise(f(pos(x), n) + f(neg(x), p) + b + gamma * neg(b))
    return pos(x) * (t(p, x, s_p) + t(n, x, s_n)) + neg(x) * (t(n, x, s_p) + t(p, x, s_n))


def z_box(layer: Layer, x: Tensor, r: Tensor, low: Tensor, high: Tensor) -> Tensor:
    w, f, t = layer.weight, layer.linear, layer.transposed
    low, high = low.to(x).expand_as(x), high.to(x).expand_as(x)
    s = r / stabilise(f(x, w) - f(low, pos(w)) - f(high, neg(w)))
    return x * t(w, x, s) - low * t(pos(w), x, s) - high * t(neg(w), x, s)


def w_square(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
    square = layer.weight**2
    return layer.transposed(square, x, r / stabilise(layer.linear(torch.ones_like(x), square) + layer.bias**2))


def flat(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
    ones = torch.ones_like(layer.weight)
    return layer.transposed(ones, x, r / stabilise(layer.linear(torch.ones_like(x), ones)))


# ---- The rules of section 3 and the modified gradients ---------------------------------------------------------------


def guided(x: Tensor, g: Tensor) -> Tensor:
    return g * (x > 0) * (g > 0)


def deconv(x: Tensor, g: Tensor) -> Tensor:
    return pos(g)


def smooth(x: Tensor, g: Tensor) -> Tensor:
    return g * torch.sigmoid(10.0 * x)


def hardsigmoid(x: Tensor) -> Tensor:
    """torch's hardsigmoid, written so that its gradient is exact."""
    return F.relu6(x + 3) / 6


@dataclasses.dataclass
class Method:
    """What a composite prescribes. `plain`: whatever is named by no field has the plain gradient (else the rules of section 3)."""

    conv: Parts
    dense: Parts
    first: Parts | None = None
    norm_sums: bool = True
    plain: bool = False
    relu: Callable[[Tensor, Tensor], Tensor] | None = None


def methods(low: Tensor, high: Tensor) -> dict[str, Method]:
    """The composites by name; `low` and `high` bound the data, [1, C, 1, 1]."""

    def box(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
        return z_box(layer, x, r, low, high)

    def backprop(relu: Callable[[Tensor, Tensor], Tensor] | None) -> Method:
        return Method(gradient, gradient, norm_sums=False, plain=True, relu=relu)

    return {
        "epsilon_plus": Method(z_plus, epsilon),
        "epsilon_plus_flat": Method(z_plus, epsilon, first=flat),
        "epsilon_gamma_box": Method(gamma, epsilon, first=box),
        "epsilon_alpha2_beta1": Method(alpha_beta, epsilon),
        "epsilon_alpha2_beta1_flat": Method(alpha_beta, epsilon, first=flat),
        "excitation_backprop": Method(z_plus, z_plus, plain=True),
        "deconvnet": backprop(deconv),
        "guided_backprop": backprop(guided),
        "beta_smooth": backprop(smooth),
        "gradient": backprop(None),
        "lrp_zero": Method(zero, zero),
        "epsilon": Method(epsilon, epsilon),
        "gamma": Method(gamma, gamma),
        "alpha1_beta0": Method(z_plus, z_plus),
        "w_square": Method(z_plus, z_plus, first=w_square),
        "deep_taylor": Method(z_plus, z_plus, first=box),
    }


class _Carry(torch.autograd.Function):
    """`value` with the backward pass R_x = backward(R_y) for the inputs `xs`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, backward: Callable[[Tensor], tuple[Tensor, ...]], *xs: Tensor) -> Tensor:
        ctx.relevance = backward
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *relevances: Tensor) -> Any:
        return None, None, *ctx.relevance(relevances[0])


def _carry(value: Tensor, backward: Callable[[Tensor], tuple[Tensor, ...]], *xs: Tensor) -> Tensor:
    return _Carry.apply(value.detach(), backward, *xs)


_ACTIVATIONS = {
    "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "silu", "silu_", "gelu", "hardswish",
    "hardswish_", "tanh", "tanh_", "elu", "elu_", "mish",
}  # fmt: skip
_GATES = {"sigmoid", "sigmoid_", "hardsigmoid", "hardsigmoid_"}
_SUMS = {"add", "__add__", "__radd__", "add_", "__iadd__"}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "mul_", "__imul__"}
_AVERAGES = {"mean", "adaptive_avg_pool2d", "avg_pool2d"}
_ROUTES = {
    "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "contiguous", "cat", "chunk", "split", "pad",
    "dropout", "dropout_", "__getitem__", "squeeze", "unsqueeze", "clone", "detach", "narrow", "size", "dim", "numel",
}  # fmt: skip


class RelevanceMode(TorchFunctionMode):
    """Runs a model forward so that autograd then computes relevance by `method`."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.layers = 0
        # id of a layer's output -> (that output, so that the id stays taken, the layer's input, the layer)
        self.sources: dict[int, tuple[Tensor, Tensor, Layer]] = {}

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__", "requires_grad_"):
            return func(*args, **kwargs)
        handler = self._handler(name)
        if handler is not None:
            return handler(func, name, args, kwargs)
        if name in _ROUTES or name.endswith("_shape") or not _differentiable(args):
            return func(*args, **_not_in_place(kwargs))
        raise NotImplementedError(f"the oracle has no rule for torch function {name!r}")

    def _handler(self, name: str) -> Callable[[Any, str, tuple, dict], Any] | None:
        for names, handler in (
            ({"conv2d", "linear"}, self._layer),
            ({"batch_norm"}, self._batch_norm),
            ({"layer_norm"}, self._layer_norm),
            (_ACTIVATIONS, self._activation),
            (_GATES, self._gate),
            (_SUMS, self._sum),
            (_PRODUCTS, self._product),
            (_AVERAGES, self._average),
        ):
            if name in names:
                return handler
        return None

    def _layer(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        named = _bound(name, args, kwargs)
        x, weight, bias = named.pop("input"), named.pop("weight"), named.pop("bias", None)
        axes = (1, -1, 1, 1) if name == "conv2d" else (-1,)
        zero_bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
        layer = Layer(
            lambda at, w: func(at, w, None, **named),
            weight.detach(),
            (zero_bias if bias is None else bias.detach()).view(axes),
        )
        self.layers += 1
        output = self._carry_layer(layer, x, first=self.layers == 1, kind=name)
        self.sources[id(output)] = (output, x, layer)
        return output

    def _carry_layer(self, layer: Layer, x: Tensor, *, first: bool, kind: str) -> Tensor:
        method = self.method
        rule = method.conv if kind == "conv2d" else method.dense
        if first and method.first is not None:
            rule = method.first
        layer.rule = rule  # type: ignore[attr-defined]  # the batch norm that follows keeps it
        at = x.detach()
        return _carry(layer.linear(at, layer.weight) + layer.bias, lambda r: (rule(layer, at, r),), x)

    def _batch_norm(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        named = _bound(name, args, kwargs)
        x = named["input"]
        factor = (named["running_var"] + named.get("eps", 1e-5)).rsqrt()
        factor = factor * named["weight"].detach() if named.get("weight") is not None else factor
        shift = -named["running_mean"] * factor
        shift = shift + named["bias"].detach() if named.get("bias") is not None else shift
        if id(x) in self.sources:
            _, source, layer = self.sources[id(x)]
            out = (-1, *[1] * (layer.weight.ndim - 1))
            bias_axes = layer.bias.shape
            folded = Layer(
                layer.linear,
                layer.weight * factor.view(out),
                (layer.bias.view(-1) * factor + shift).view(bias_axes),
            )
            rule, at = layer.rule, source.detach()  # type: ignore[attr-defined]
            return _carry(folded.linear(at, folded.weight) + folded.bias, lambda r: (rule(folded, at, r),), source)
        axes = (1, -1, *[1] * (x.ndim - 2))
        scale = factor.view(axes)
        passed = scale if self.method.plain else torch.ones_like(scale)
        return _carry(x.detach() * scale + shift.view(axes), lambda r: (r * passed,), x)

    def _layer_norm(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        if self.method.plain:
            return func(*args, **kwargs)
        named = _bound(name, args, kwargs)
        x, axes = named["input"], tuple(range(-len(named["normalized_shape"]), 0))
        at = x.detach()
        deviation = (at.var(axes, unbiased=False, keepdim=True) + named.get("eps", 1e-5)).sqrt()
        weight, bias = named["weight"].detach(), named["bias"].detach()

        def linear(v: Tensor) -> Tensor:
            return (v - v.mean(axes, keepdim=True)) / deviation * weight

        y = linear(at) + bias
        return _carry(y, lambda r: (at * vjp(linear, at, r / stabilise(y)),), x)

    def _activation(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        x, rest = args[0], args[1:]
        at = x.detach().clone()
        # an in-place variant would overwrite a value that a rule below still reads
        value = func(at.clone(), *rest, **_not_in_place(kwargs))
        relu = self.method.relu
        if name in ("relu", "relu_") and relu is not None:
            return _carry(value, lambda g: (relu(at, g),), x)
        if self.method.plain:
            return _carry(value, lambda g: (vjp(lambda v: func(v.clone(), *rest, **_not_in_place(kwargs)), at, g),), x)
        return _carry(value, lambda r: (r,), x)

    def _gate(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        if self.method.plain:
            # torch's own derivative of hardsigmoid is 1/6 rounded to float32, also in float64
            exact = hardsigmoid if name.startswith("hardsigmoid") else func
            return self._activation(exact, name, args[:1], {})
        gate = func(args[0].detach().clone(), *args[1:], **_not_in_place(kwargs))
        return gate.detach()

    def _sum(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        a, b = args[:2]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return torch.add(a, b)
        a_at, b_at = a.detach(), b.detach()
        y = a_at + b_at
        if not self.method.norm_sums:
            return _carry(y, lambda g: (g, g), a, b)
        assert a.shape == b.shape, "the oracle has no broadcasting sum"
        return _carry(y, lambda r: (a_at * r / stabilise(y), b_at * r / stabilise(y)), a, b)

    def _product(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        a, b = args[:2]
        if self.method.plain or not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return torch.mul(a, b)
        # the gate is detached and a parameter is a leaf: the signal is what has a history
        signals = [t for t in (a, b) if t.grad_fn is not None]
        assert len(signals) == 1, "the oracle has no rule for a product of two signals"
        value = a.detach() * b.detach()
        assert signals[0].shape == value.shape
        return _carry(value, lambda r: (r,), signals[0])

    def _average(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        if not self.method.norm_sums:
            return func(*args, **kwargs)
        x, rest = args[0], args[1:]
        at = x.detach()
        y = func(at, *rest, **kwargs)
        return _carry(y, lambda r: (at * vjp(lambda v: func(v, *rest, **kwargs), at, r / stabilise(y)),), x)


_SIGNATURES = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "linear": ("input", "weight", "bias"),
    "batch_norm": tuple(inspect.signature(F.batch_norm).parameters),
    "layer_norm": tuple(inspect.signature(F.layer_norm).parameters),
}


def _bound(name: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    return {**dict(zip(_SIGNATURES[name], args, strict=False)), **kwargs}


def _not_in_place(kwargs: dict) -> dict:
    return {key: False if key == "inplace" else value for key, value in kwargs.items()}


def _differentiable(args: tuple) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args)


def autograd_relevance(
    model: nn.Module, inputs: Tensor, targets: Tensor, method: Method, *, seed: str = "logit"
) -> tuple[Tensor, Tensor]:
    """Output of `model` and relevance of `inputs` for the classes `targets`, both in the dtype of `model`."""
    with torch.enable_grad():
        x = inputs.detach().clone().requires_grad_()
        with RelevanceMode(method):
            output = model(x.clone())
        at_output = nn.functional.one_hot(targets, output.shape[1]).to(output)
        at_output = at_output * output.detach() if seed == "logit" else at_output
        relevance = torch.autograd.grad(output, x, at_output)[0]
    return output.detach(), relevance
