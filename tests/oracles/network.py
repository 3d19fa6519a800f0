"""Relevance of a whole network, in relevance form, one node at a time, in float64.

A `Net` is a list of nodes. As an `nn.Module` it runs them with ordinary torch operations: that is the user's model. `explain`
walks the same list backwards with the formulas of RULES.md sections 2 and 3 as they stand: no ratio form, no schedule, no facts
proved, no fused anything. What a node means to the rules (a sum, a route, a gate) is stated by the test that builds the net, not
recognised, so a wrong recognition in the library shows as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .jacobian import layer_relevance, stabilise
from .specs import Spec

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Node:
    """One value of a network: how it is computed, and which rule of RULES.md its kind takes.

    kind is one of: input, layer, pass, relu, norm (linear and homogeneous), sum, route, max_pool, gate (signal first), product,
    matmul, quotient (divisor last), normaliser (layer, RMS, group and instance norm), batch_norm.
    """

    index: int
    name: str
    kind: str
    args: tuple[int, ...]
    compute: Function
    layer: str | None = None
    batch_norm: str | None = None


class Net(nn.Module):
    """A network described as data; each method appends one node and returns its index."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.nodes: list[Node] = []
        self.result = -1

    def _append(self, kind: str, args: Sequence[int], compute: Function, name: str = "", **more: Any) -> int:
        index = len(self.nodes)
        self.nodes.append(Node(index, name or f"{kind}{index}", kind, tuple(args), compute, **more))
        self.result = index
        return index

    def input(self) -> int:
        return self._append("input", (), lambda: None)

    def layer(self, name: str, layer: nn.Module, x: int, batch_norm: nn.Module | None = None) -> int:
        """Append a dense or convolution layer, with a batch norm that must be folded into it where one is given."""
        if name not in self.layers:  # a name used twice is one module used twice
            self.layers[name] = layer
        if batch_norm is None:
            return self._append("layer", (x,), lambda v: self.layers[name](v), name, layer=name)
        norm = f"{name}_bn"
        self.layers[norm] = batch_norm
        return self._append(
            "layer", (x,), lambda v: self.layers[norm](self.layers[name](v)), name, layer=name, batch_norm=norm
        )

    def module(self, kind: str, name: str, module: nn.Module, x: int) -> int:
        """Append a module without a rule of section 2: an activation, a pool, a norm."""
        self.layers[name] = module
        return self._append(kind, (x,), lambda v: self.layers[name](v), name, layer=name)

    def op(self, kind: str, compute: Function, *args: int) -> int:
        return self._append(kind, args, compute)

    def relu(self, x: int) -> int:
        return self.op("relu", torch.relu, x)

    def add(self, *args: int) -> int:
        return self.op("sum", lambda *values: sum(values[1:], values[0]), *args)

    def kind_of(self, node: Node) -> str:
        """Return the operation kind by which a composite matches this node."""
        if node.kind == "layer":
            return "linear" if isinstance(self.layers[str(node.layer)], nn.Linear) else "conv"
        kinds = {"pass": "activation", "relu": "relu", "norm": "avg_pool", "normaliser": "norm"}
        return kinds.get(node.kind, node.kind)

    def values(self, *inputs: Tensor, noise: Function | None = None) -> list[Tensor]:
        """Return the value of every node, safe from in-place operations; each goes through `noise`, where given."""
        given = iter(inputs)
        values: list[Tensor] = []
        for node in self.nodes:
            value = next(given) if node.kind == "input" else node.compute(*(values[i].clone() for i in node.args))
            values.append(value if noise is None else noise(value))
        return values

    def forward(self, *inputs: Tensor) -> Tensor:
        given = iter(inputs)
        values: list[Tensor] = []
        for node in self.nodes:
            values.append(next(given) if node.kind == "input" else node.compute(*(values[i] for i in node.args)))
        return values[self.result]


def vjp(compute: Function, values: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """Return the vector-Jacobian product of `compute` with respect to each of its arguments."""
    with torch.enable_grad():
        leaves = [v.detach().clone().requires_grad_() for v in values]
        y = compute(*leaves)
        grads = torch.autograd.grad(y, leaves, cotangent, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for v, g in zip(values, grads, strict=True)]


def sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    """Transpose of the broadcast from `shape` to the shape of `t`."""
    return t.sum_to_size(shape)


def hold_normaliser(module: nn.Module, x: Tensor) -> Function:
    """Return the linear function that a normalising layer is once its normaliser is held at its value for `x`."""
    if isinstance(module, nn.RMSNorm):
        dims = tuple(range(-len(module.normalized_shape), 0))
        eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
        scale = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps).detach()
        return lambda v: v * scale * (1 if module.weight is None else module.weight.detach())
    eps = module.eps
    if isinstance(module, nn.LayerNorm):
        dims = tuple(range(-len(module.normalized_shape), 0))
        shape = x.shape
        affine_shape = tuple(module.normalized_shape)
    else:
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else x.shape[1]
        dims = (2,)
        shape = torch.Size((x.shape[0], groups, -1))
        affine_shape = (1, x.shape[1], *[1] * (x.dim() - 2))
    grouped = x.reshape(shape)
    deviation = torch.sqrt(grouped.var(dims, unbiased=False, keepdim=True) + eps).detach()

    def linear(v: Tensor) -> Tensor:
        v = v.reshape(shape)
        v = ((v - v.mean(dims, keepdim=True)) / deviation).reshape(x.shape)
        if module.weight is not None:
            v = v * module.weight.detach().reshape(affine_shape)
        if module.bias is not None:
            v = v + module.bias.detach().reshape(affine_shape)
        return v

    return linear


def modified_gradient(spec: Spec, x: Tensor, g: Tensor) -> Tensor:
    """Return the backward step of a ReLU that a gradient-modifying composite replaces."""
    if spec.name == "GuidedReLU":
        return g * (x > 0) * (g > 0)
    if spec.name == "DeconvReLU":
        return g * (g > 0)
    assert spec.name == "SmoothReLU", spec
    return g / (1 + torch.exp(-spec.options.get("beta", 10.0) * x))


def messages(net: Net, node: Node, spec: Spec | None, values: Sequence[Tensor], y: Tensor, r: Tensor) -> list[Tensor]:
    """Return R at each argument of `node`, given R = `r` at its value `y`; `spec` is None for the rule of section 3."""
    kind = node.kind
    if spec is not None and spec.name == "Gradient":
        return vjp(node.compute, values, r)
    if kind == "relu" and spec is not None and spec.name != "Pass":
        return [modified_gradient(spec, values[0], r)]
    if kind == "layer":
        assert spec is not None, f"no rule given for layer {node.name}"
        norm = None if node.batch_norm is None else net.layers[node.batch_norm]
        return [layer_relevance(spec, net.layers[str(node.layer)], values[0], r, norm)]
    if kind == "batch_norm" and spec is not None and spec.name == "Epsilon":
        s = r / stabilise(y, spec.options.get("epsilon", 1e-6))
        return [values[0] * vjp(node.compute, values, s)[0]]
    if kind in ("pass", "relu", "batch_norm"):
        return [r]
    if kind in ("route", "max_pool"):
        return vjp(node.compute, values, r)
    if kind in ("sum", "norm"):
        s = r / stabilise(y, 1e-6 if spec is None else spec.options.get("stabilizer", 1e-6))
        return [v * g for v, g in zip(values, vjp(node.compute, values, s), strict=True)]
    if kind == "gate":
        return [sum_to(r, values[0].shape), torch.zeros_like(values[1])]
    if kind == "quotient":  # the divisor is a normaliser, held constant
        return [sum_to(y * r / stabilise(y), values[0].shape), torch.zeros_like(values[1])]
    if kind in ("product", "matmul"):
        s = r / stabilise(y)
        return [0.5 * v * g for v, g in zip(values, vjp(node.compute, values, s), strict=True)]
    assert kind == "normaliser", kind
    module = net.layers[str(node.layer)]
    epsilon = 1e-6 if spec is None else spec.options.get("epsilon", 1e-6)
    s = r / stabilise(y, epsilon)
    return [values[0] * vjp(hold_normaliser(module, values[0]), values, s)[0]]


@dataclass(frozen=True)
class Result:
    """What the oracle found: the output, R at each input, and R at every node by its name."""

    output: Tensor
    relevance: tuple[Tensor, ...]
    nodes: dict[str, Tensor]
    values: list[Tensor]


Rules = Mapping[str, Spec]


def explain(net: Net, rules: Rules, inputs: Sequence[Tensor], seed: Tensor, noise: Function | None = None) -> Result:
    """Return the relevance of every node for R = `seed` at the output.

    rules maps a layer name or an operation kind to a rule; a name counts before a kind, and "any" (for Gradient) stands for the rest.
    With `noise` the values are slightly off: see `stability`.
    """
    with torch.no_grad():
        values = net.values(*(x.double() for x in inputs), noise=noise)
    relevance = [torch.zeros_like(v) for v in values]
    relevance[net.result] = seed.double().clone()
    for node in reversed(net.nodes[: net.result + 1]):
        if node.kind == "input":
            continue
        spec = rules.get(node.name) or rules.get(net.kind_of(node)) or rules.get("any")
        arguments = [values[i] for i in node.args]
        for i, message in zip(
            node.args, messages(net, node, spec, arguments, values[node.index], relevance[node.index]), strict=True
        ):
            relevance[i] = relevance[i] + message.detach()
    found = tuple(relevance[n.index] for n in net.nodes if n.kind == "input")
    return Result(values[net.result], found, {n.name: relevance[n.index] for n in net.nodes}, values)


def one_hot_seed(output: Tensor, target: int | Tensor, seed: str = "logit") -> Tensor:
    """Return R at an output [N, classes]: the logit of the target, or one, and zero elsewhere."""
    index = torch.as_tensor(target).expand(output.shape[0])
    chosen = torch.zeros_like(output)
    for n in range(output.shape[0]):
        chosen[n, index[n]] = output[n, index[n]] if seed == "logit" else 1.0
    return chosen


def stability(net: Net, rules: Rules, inputs: Sequence[Tensor], seed: Tensor, size: float = 1e-13) -> float:
    """Return by how much R at the inputs moves, as a share of its largest entry, when every value moves by about `size` of itself.

    Relevance is a ratio, and where a denominator happens to be nearly zero its sign, hence the map, hangs on rounding: no two correct
    programs agree there. The same holds for a tie in max pooling between values that are equal only up to rounding. A test draws
    again instead of loosening its tolerance. Exact zeros stay zero under the noise, so structural zeros and their ties count as stable.
    """
    base = explain(net, rules, inputs, seed)
    worst = 0.0
    for number in range(2):
        generator = torch.Generator().manual_seed(number)

        def noise(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            return t * (1 + size * torch.randn(t.shape, generator=generator, dtype=t.dtype))

        moved = explain(net, rules, inputs, seed, noise)
        worst = max(worst, *(distance(a, b) for a, b in zip(moved.relevance, base.relevance, strict=True)))
    return worst


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest magnitude of `b`, sample by sample: the measure of every comparison."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.detach().double().reshape(a.shape[0], -1), b.detach().double().reshape(b.shape[0], -1)
    difference, scale = (a - b).abs().amax(1), b.abs().amax(1)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return float("inf")
    return float(torch.where(difference == 0, difference, difference / scale).max())
