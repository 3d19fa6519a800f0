"""The rules of RULES §2 for convolutions, transposed convolutions and dense layers.

`Layer` hides the differences between these: it runs the layer, or its transpose, with any weight. Each rule is then one
function that reads like its line in RULES §2, with the cheaper exact schedules of RULES §5 where facts allow them. Modified
weights are computed when the program is built and shared between all that need them.

A rule function takes the layer and the message at its output and returns the message at its input.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfast.errors import CompositeError, RuleError, UnsupportedOperationError
from lrpfast.graph import describe, rank, static_sizes, value
from lrpfast.ops.reference import Scales
from lrpfast.relevance.walk import Message, Walk, expand_like, filled, is_relu_of, propagates
from lrpfast.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Pass,
    Rule,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
)  # fmt: skip

aten = torch.ops.aten
ops = torch.ops.lrpfast


class Layer:
    """A layer ``z = Wx + b`` as rules see it: the layer and its transpose with any weight.

    Attributes
    ----------
    x, z
        Input and output in the joint program.
    nonnegative
        Whether ``x >= 0`` is proved.
    """

    def __init__(self, walk: Walk, node: fx.Node) -> None:
        x, weight, bias = node.args[:3]
        if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
            raise UnsupportedOperationError(
                f"{describe(node)} takes its weights from the input, so it is a product of two signals, for which "
                "there is no rule"
            )
        self.walk, self.node = walk, node
        self.x, self.z = x, node
        self.nonnegative = x in walk.facts.nonnegative

    # --- weights ---

    @property
    def fake_weight(self) -> torch.Tensor:
        """Shape, dtype and device of the weight; rules need no more, and its values may have to be made."""
        return value(self.node.args[1])

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.node.args[2] is None else self.walk.build.tensor(self.node.args[2])

    def modified(
        self, key: tuple, modify: Callable[[torch.Tensor], torch.Tensor], scales: Scales | None = None
    ) -> tuple[fx.Node, fx.Node | None]:
        """Weight and bias with one elementwise modification; made once for each key.

        `scales` says, of a modification that multiplies positive values and negative ones by a number each, which numbers:
        kernels that read a weight once can do it on the way.
        """
        build = self.walk.build

        def made(source: fx.Node) -> fx.Node:
            hint = f"{source.target}_{'_'.join(map(str, key))}"
            make = build.constants.maker(source.target)
            node = build.derived((*key, source.target), lambda: modify(make()), hint, value(source))
            if scales is not None:
                build.constants.scale(node.target, source.target, scales)
            return node

        return made(self.node.args[1]), None if self.node.args[2] is None else made(self.node.args[2])

    @property
    def plus(self) -> tuple[fx.Node, fx.Node | None]:
        return self.modified(("plus",), lambda t: t.clamp(min=0), (1.0, 0.0))

    @property
    def minus(self) -> tuple[fx.Node, fx.Node | None]:
        return self.modified(("minus",), lambda t: t.clamp(max=0), (0.0, 1.0))

    # --- the layer and its transpose ---

    @property
    def is_conv(self) -> bool:
        return self.node.target is aten.convolution.default

    @property
    def transposed(self) -> bool:
        return self.is_conv and bool(self.node.args[6])

    @property
    def groups(self) -> int:
        return self.node.args[8] if self.is_conv else 1

    def forward(self, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        return self.walk.call(self.node.target, x, weight, bias, *self.node.args[3:])

    def dgrad(self, s: fx.Node, weight: fx.Node) -> fx.Node:
        """``Wᵀs``."""
        if not self.is_conv:
            return self.walk.call(aten.matmul.default, s, weight)
        stride, padding, dilation, transposed, _, groups = self.node.args[3:]
        size = static_sizes(self.x, range(2, rank(self.x)))
        if not transposed:
            return self.walk.call(ops.conv_dgrad.default, s, weight, size, stride, padding, dilation, groups)
        none = [0] * len(size)
        result = self.walk.call(
            aten.convolution.default, s, weight, None, stride, padding, dilation, False, none, groups
        )
        for dim, count in enumerate(size, 2):  # an output padding of a stride or more lets one window too many in
            if value(result).shape[dim] != count:
                result = self.walk.call(aten.slice.Tensor, result, dim, 0, count)
        return result

    def dgrad_pair(self, s: fx.Node, first: fx.Node, second: fx.Node) -> tuple[fx.Node, fx.Node]:
        """``(W₁ᵀs, W₂ᵀs)``, as one transpose with stacked input channels where the layer has one group."""
        if self.groups != 1 or self.transposed:
            return self.dgrad(s, first), self.dgrad(s, second)
        build = self.walk.build
        key = ("stacked", first.target, second.target)
        makers = [build.constants.maker(w.target) for w in (first, second)]
        stacked = build.derived(key, lambda: torch.cat([make() for make in makers], 1), f"{first.target}_stacked")
        both = self.dgrad(s, stacked)
        dim, count = (1 if self.is_conv else rank(both) - 1), value(first).shape[1]
        first_part = self.walk.call(aten.slice.Tensor, both, dim, 0, count)
        return first_part, self.walk.call(aten.slice.Tensor, both, dim, count, 2 * count)

    # --- constants of the input's shape ---

    def evaluate(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer on a real tensor, now."""
        return self.node.target(x, weight, bias, *self.node.args[3:])

    def input_constant(self, make: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """A batch of one made by shape, padded as the layer pads its input.

        Padding that the layer performs as an operation of its own (``padding_mode``, an uneven ``"same"``) belongs to the
        layer: the constant is made for the value before it, and padded alike.
        """
        source, pads = self.x, []
        while source.meta.get("layer_padding"):
            pads.append(source)
            source = source.args[0]
        x = make([1, *static_sizes(source, range(1, rank(source)))])
        for pad in reversed(pads):
            args = [self.walk.build.tensor(a) if isinstance(a, fx.Node) else a for a in pad.args[1:]]
            x = pad.target(x, *args)
        return x


class TargetRow(Layer):
    """The logit layer where each sample has one target: the target's row of ``W`` in place of ``W`` (RULES §5).

    ``x`` is ``[N, I]``; a row layer's ``z`` is ``[N, 1]``.
    """

    def __init__(self, walk: Walk, node: fx.Node, target: fx.Node) -> None:
        super().__init__(walk, node)
        self.target = target
        self.column = walk.call(aten.unsqueeze.default, target, 1)
        self.z = walk.call(aten.gather.default, node, 1, self.column)
        self._rows: dict[fx.Node, fx.Node] = {}

    def row(self, tensor: fx.Node) -> fx.Node:
        if tensor not in self._rows:
            self._rows[tensor] = self.walk.call(aten.index_select.default, tensor, 0, self.target)
        return self._rows[tensor]

    def forward(self, x: Any, weight: fx.Node, bias: fx.Node | None) -> fx.Node:
        product = self.walk.call(aten.mul.Tensor, x, self.row(weight))
        total = self.walk.call(aten.sum.dim_IntList, product, [1], True)
        if bias is None:
            return total
        return self.walk.call(aten.add.Tensor, total, self.walk.call(aten.unsqueeze.default, self.row(bias), 1))

    def dgrad(self, s: fx.Node, weight: fx.Node) -> fx.Node:
        return self.walk.call(aten.mul.Tensor, s, self.row(weight))


@propagates("convolution", "linear")
def _layer(walk: Walk, node: fx.Node, message: Message, rule: Rule | None) -> None:
    if rule is None:
        raise UnsupportedOperationError(f"{describe(node)} takes its weights from the input; there is no rule for that")
    layer = Layer(walk, node)
    if message.seed is not None and node is walk.output and not layer.is_conv and type(rule) in _BY_ROW:
        layer = TargetRow(walk, node, message.seed.target)
        one = walk.call(aten.ones_like.default, layer.z)
        message = Message((one,), None if message.carrier is None else layer.z)
    walk.send(layer.x, _RULES[type(rule)](layer, message, rule))


# --- RULES §2, line by line -------------------------------------------------------------------------------------------


def _zero(layer: Layer, message: Message, rule: Zero) -> Message:
    return _epsilon(layer, message, Epsilon(0.0))


def _epsilon(layer: Layer, message: Message, rule: Epsilon) -> Message:
    _note(layer, "1 + 1: z is the layer's output")
    s = layer.walk.ratio(message, _own_denominator(layer, message), rule.epsilon)
    return Message((layer.dgrad(s, layer.node.args[1]),), layer.x)


def _own_denominator(layer: Layer, message: Message) -> fx.Node:
    """``z``; behind a ReLU its output serves: equal where relevance is, and ``z`` need not be kept."""
    carrier = message.carrier
    return carrier if carrier is not None and is_relu_of(carrier, layer.z) else layer.z


def _zplus(layer: Layer, message: Message, rule: ZPlus) -> Message:
    denominator = _positive_part(layer)
    s = layer.walk.ratio(message, denominator, rule.stabilizer)
    weight, _ = layer.plus
    if layer.nonnegative:
        _note(layer, "2 + 1: x >= 0, W⁺ alone")
        return Message((layer.dgrad(s, weight),), layer.x)
    _note(layer, "3 + 2: signed x")
    return _by_sign(layer, layer.dgrad(s, weight), layer.dgrad(s, layer.minus[0]))


def _positive_part(layer: Layer) -> fx.Node:
    """``W⁺x⁺ + W⁻x⁻ + b⁺``."""
    weight, bias = layer.plus
    if layer.nonnegative:
        return layer.forward(layer.x, weight, bias)
    positive = layer.forward(_part(layer, "relu"), weight, bias)
    return layer.walk.call(aten.add.Tensor, positive, layer.forward(_part(layer, "minus"), layer.minus[0], None))


def _negative_part(layer: Layer) -> fx.Node:
    """``W⁻x⁺ + W⁺x⁻ + b⁻``."""
    weight, bias = layer.minus
    if layer.nonnegative:
        return layer.forward(layer.x, weight, bias)
    positive = layer.forward(_part(layer, "relu"), weight, bias)
    return layer.walk.call(aten.add.Tensor, positive, layer.forward(_part(layer, "minus"), layer.plus[0], None))


def _part(layer: Layer, part: str) -> fx.Node:
    """``x⁺`` or ``x⁻``."""
    if part == "relu":
        return layer.walk.call(aten.clamp_min.default, layer.x, 0)
    return layer.walk.call(aten.clamp_max.default, layer.x, 0)


def _by_sign(layer: Layer, positive: fx.Node, negative: fx.Node) -> Message:
    """``x⁺ * positive + x⁻ * negative`` as a message with the carrier ``x``."""
    walk = layer.walk
    return Message((walk.call(aten.where.self, walk.call(aten.ge.Scalar, layer.x, 0), positive, negative),), layer.x)


def _alpha_beta(layer: Layer, message: Message, rule: AlphaBeta) -> Message:
    if rule.beta == 0:
        return _zplus(layer, message, ZPlus(rule.stabilizer))
    walk = layer.walk
    plus, minus = layer.plus[0], layer.minus[0]
    behind_relu = is_relu_of(message.carrier, layer.z)
    z_plus = None if behind_relu else _positive_part(layer)  # y - z⁻: both of one sign where y > 0
    pair = walk.call(
        ops.alpha_beta_pair.default, message.carrier, walk.single(message), z_plus, _negative_part(layer), rule.alpha,
        rule.beta, rule.stabilizer,
    )  # fmt: skip
    s_plus, s_minus = (walk.call(operator.getitem, pair, i) for i in range(2))
    if layer.nonnegative:
        _note(layer, "2 + 2: x >= 0, z⁺ = y - z⁻" if behind_relu else "3 + 2: x >= 0, W⁺ and W⁻")
        return Message((layer.dgrad(s_plus, plus), layer.dgrad(s_minus, minus)), layer.x)
    _note(layer, "5 + 4: signed x")
    positive = walk.call(aten.add.Tensor, layer.dgrad(s_plus, plus), layer.dgrad(s_minus, minus))
    negative = walk.call(aten.add.Tensor, layer.dgrad(s_plus, minus), layer.dgrad(s_minus, plus))
    return _by_sign(layer, positive, negative)


def _gamma(layer: Layer, message: Message, rule: Gamma) -> Message:
    walk, gamma, eps = layer.walk, rule.gamma, rule.stabilizer
    p_weight, p_bias = layer.modified(("gamma", gamma), lambda t: t + gamma * t.clamp(min=0), (1 + gamma, 1.0))
    if layer.nonnegative and is_relu_of(message.carrier, layer.z):
        _note(layer, "2 + 1: x >= 0, z < 0 carries nothing")
        s = walk.ratio(message, layer.forward(layer.x, p_weight, p_bias), eps)
        return Message((layer.dgrad(s, p_weight),), layer.x)
    n_weight, _ = layer.modified(("gamma_minus", gamma), lambda t: t + gamma * t.clamp(max=0), (1.0, 1 + gamma))
    pair = walk.call(
        ops.gamma_pair.default, message.carrier, walk.single(message), layer.z, _positive_part(layer), gamma, eps
    )
    s_p, s_n = (walk.call(operator.getitem, pair, i) for i in range(2))
    upper = walk.call(aten.add.Tensor, layer.dgrad(s_p, p_weight), layer.dgrad(s_n, n_weight))
    if layer.nonnegative:
        _note(layer, "2 + 2: x >= 0, signed output")
        return Message((upper,), layer.x)
    _note(layer, "3 + 4: signed x")
    lower = walk.call(aten.add.Tensor, layer.dgrad(s_p, n_weight), layer.dgrad(s_n, p_weight))
    return _by_sign(layer, upper, lower)


def _zbox(layer: Layer, message: Message, rule: ZBox) -> Message:
    _note(layer, "1 + 2: W⁺l + W⁻h is a constant")
    walk = layer.walk
    low, high = (layer.input_constant(functools.partial(_bound, layer, b)) for b in (rule.low, rule.high))
    if bool((low > high).any()):
        raise RuleError(f"ZBox at {walk.rule_path(layer.node)!r}: low is greater than high")
    plus, minus = layer.plus[0], layer.minus[0]
    offset = layer.evaluate(low, walk.build.tensor(plus), layer.bias)  # the bias: z has it, the denominator has not
    offset = offset + layer.evaluate(high, walk.build.tensor(minus), None)
    denominator = walk.call(aten.sub.Tensor, layer.z, walk.constant(offset, "box_offset"))
    s = walk.ratio(message, denominator, rule.stabilizer)
    # x Wᵀs - l W⁺ᵀs - h W⁻ᵀs = (x - l) W⁺ᵀs + (x - h) W⁻ᵀs
    terms = [
        walk.call(
            aten.mul.Tensor,
            walk.call(aten.sub.Tensor, layer.x, walk.constant(bound.contiguous(), "box_bound")),
            gradient,
        )
        for bound, gradient in zip((low, high), layer.dgrad_pair(s, plus, minus), strict=True)
    ]
    return Message((walk.call(aten.add.Tensor, *terms),))


def _bound(layer: Layer, bound: Any, shape: list[int]) -> torch.Tensor:
    """A bound of the box as a tensor ``[1, *]``: from a number, a value a channel, or a tensor of the input's shape."""
    weight = layer.fake_weight
    try:
        tensor = torch.as_tensor(bound).detach().to(dtype=weight.dtype, device=weight.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RuleError(f"ZBox: {bound!r} is not a number or a tensor of numbers") from error
    if not bool(torch.isfinite(tensor).all()):
        raise RuleError("ZBox: low and high must be finite")
    if tensor.dim() == 1 and tensor.numel() == shape[1] and len(shape) > 2:
        tensor = tensor.reshape(-1, *[1] * (len(shape) - 2))
    count = 1
    for size in shape:
        count *= size
    try:
        return tensor.expand(shape).contiguous()
    except RuntimeError:
        if tensor.numel() == count:  # given in the input's own shape, which a flatten precedes
            return tensor.reshape(shape)
        raise CompositeError(
            f"ZBox at {layer.walk.rule_path(layer.node)!r}: low and high of shape {list(tensor.shape)} do not fit an input of "
            f"shape {shape[1:]}; give a number, {shape[1]} values (one a channel), or a tensor of the input's shape"
        ) from None


def _w_square(layer: Layer, message: Message, rule: WSquare) -> Message:
    _note(layer, "0 + 1: the denominator is a constant")
    walk = layer.walk
    weight, bias = layer.modified(("square",), torch.square)
    if isinstance(layer, TargetRow):
        denominator = layer.forward(walk.call(aten.ones_like.default, layer.x), weight, bias)
    else:
        ones = layer.input_constant(lambda shape: filled(layer.fake_weight, shape, 1.0))
        real_bias = None if bias is None else walk.build.tensor(bias)
        denominator = walk.constant(layer.evaluate(ones, walk.build.tensor(weight), real_bias), "square_sum")
    return Message((layer.dgrad(walk.ratio(message, denominator, rule.stabilizer), weight),))


def _flat(layer: Layer, message: Message, rule: Flat) -> Message:
    """All weights are one, so the transpose sees the sum of a group's channels alone, and all inputs of a group get the same."""
    _note(layer, "a channel sum and a one-channel transpose")
    walk, x = layer.walk, layer.x
    if not layer.is_conv:
        total = walk.call(aten.sum.dim_IntList, walk.relevance(message), [-1], True)
        return Message(
            (expand_like(walk, walk.call(aten.div.Tensor, total, layer.fake_weight.shape[1] + rule.stabilizer), x),)
        )
    groups = layer.groups
    channels = value(x).shape[1] // groups
    ones = torch.ones(
        (groups, 1, *layer.fake_weight.shape[2:]), dtype=layer.fake_weight.dtype, device=layer.fake_weight.device
    )
    everywhere = layer.input_constant(lambda shape: filled(layer.fake_weight, shape, 1.0))[:, :groups]
    taps = layer.evaluate(everywhere, ones, None) * channels
    total = walk.call(ops.channel_sum.default, message.carrier, walk.single(message), groups)
    s = walk.call(ops.ratio.default, None, total, walk.constant(taps, "taps"), rule.stabilizer)
    spread = layer.dgrad(s, walk.constant(ones, "ones"))  # [N, groups, *]
    if channels == 1:
        return Message((spread,))
    spatial = walk.build.shape(x)[2:]
    by_group = walk.call(aten.unsqueeze.default, spread, 2)
    batch = walk.build.size(x, 0)
    grown = walk.call(aten.expand.default, by_group, [batch, groups, channels, *spatial])
    return Message((walk.call(aten.reshape.default, grown, [batch, groups * channels, *spatial]),))


def _pass(layer: Layer, message: Message, rule: Pass) -> Message:
    if value(layer.x).shape[1:] != value(layer.z).shape[1:]:
        raise RuleError(
            f"Pass at {layer.walk.rule_path(layer.node)!r}: the layer's input {list(value(layer.x).shape[1:])} and output "
            f"{list(value(layer.z).shape[1:])} have different shapes"
        )
    return message


def _gradient(layer: Layer, message: Message, rule: Gradient) -> Message:
    _note(layer, "0 + 1: the gradient")
    return Message((layer.dgrad(layer.walk.relevance(message), layer.node.args[1]),))


def _note(layer: Layer, text: str) -> None:
    layer.walk.notes[layer.node] = text


_RULES: dict[type[Rule], Callable[[Layer, Message, Any], Message]] = {
    Zero: _zero,
    Epsilon: _epsilon,
    ZPlus: _zplus,
    AlphaBeta: _alpha_beta,
    Gamma: _gamma,
    ZBox: _zbox,
    WSquare: _w_square,
    Flat: _flat,
    Pass: _pass,
    Gradient: _gradient,
}
# Rules whose formula holds row by row; the others spread over or pass on a whole output.
_BY_ROW = {Zero, Epsilon, ZPlus, AlphaBeta, Gamma, WSquare, Gradient}
