"""Convolutions and their transposes as steps, in the way that is fastest here.

torch's operators reorder a weight at every call. Here that is done once: for oneDNN, in the layout that it chooses for the size of
batch that is expected, or for a product of our own (lrpfast.ops.products), which takes half the time for 3 x 3 layers and spares
what follows elementwise a pass over memory. A transpose is a plain convolution with flipped weights where the stride is 1, and a
transposed convolution elsewhere. Which way wins is timed, layer by layer.

Large weights are not laid out for one image. Each layer has three of them (z, z⁺, and its transpose), together more than the gradient
takes; so they are read from where the model has them, and made on the way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from lrpfast.graph import Constants, argument, is_tensor, operation_name, rank, static_sizes, value
from lrpfast.ops import products
from lrpfast.ops.filters import Filters
from lrpfast.ops.products import RELU, Clamp, Depthwise, Direct, Pointwise, Product, Winograd
from lrpfast.ops.transposes import TRANSPOSES, fits_plain_convolution, flipped_weight, left_over
from lrpfast.runtime.fusion import Either, SignedPart
from lrpfast.runtime.step import Step
from lrpfast.runtime.tune import Tuner

aten = torch.ops.aten

_Epilogue = tuple[str, list[float], str]  # an activation's name, numbers and algorithm
_NO_EPILOGUE: _Epilogue = ("none", [], "")
_SHOWN = {"relu": "ReLU", "hardtanh": "clamp"}

# Ways to compute a layer, as `plan()` shows them.
_DIRECT, _TRANSPOSED, _BACKWARD = "as a convolution", "as a transposed convolution", "torch's backward"
_OWN: dict[type, str] = {
    Winograd: "by Winograd", Pointwise: "as a product", Depthwise: "channel by channel", Direct: "straight from its weight",
}  # fmt: skip

_Ways = dict[str, Callable[[], list[Step]]]


def _epilogue(node: fx.Node) -> _Epilogue | None:
    """An activation as an epilogue; those alone that oneDNN computes to the last digit as torch does."""
    if node.target is aten.relu.default:
        return "relu", [], ""
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
        return "hardtanh", [float(low), float(high)], ""
    return None


def _clamp(activation: fx.Node) -> Clamp:
    """The same activation as a clamp."""
    epilogue = _epilogue(activation)
    assert epilogue is not None
    low, high = epilogue[1] or RELU
    return low, high


class Convolutions:
    """Lowers the convolutions of one program.

    Parameters
    ----------
    constants
        The program's.
    batch
        The batch that weights are laid out, and ways are timed, for; any other runs as well. Also an attribute.
    compiled
        Whether the compiled operators may be used.
    tuner
        Where given, ways are chosen by timing.

    Attributes
    ----------
    tuned
        The steps that were chosen by timing, and under which key of the tuner.
    """

    def __init__(self, constants: Constants, batch: int, compiled: bool, tuner: Tuner | None) -> None:
        self._constants = constants
        self.batch = batch
        self._compiled = compiled
        self._tuner = tuner
        self._prepared: dict[tuple[str, str], Any] = {}
        self.tuned: dict[fx.Node, str] = {}

    def _prepare(self, node: fx.Node, kind: str, make: Callable[[torch.Tensor], Any]) -> Any:
        key = (node.target, kind)
        if key not in self._prepared:
            with torch.no_grad():
                self._prepared[key] = make(self._constants[node.target])
        return self._prepared[key]

    def _weight(self, node: fx.Node) -> Any:
        if node.op != "get_attr" or rank(node) != 4:
            return node
        return self._prepare(node, "weight", lambda t: t.contiguous(memory_format=torch.channels_last))

    def forward(self, node: fx.Node, activation: fx.Node | None) -> list[Step]:
        """A convolution, and in the same call the activation that alone uses it, where there is one that has it."""
        x, weight = node.args[:2]
        if not self._takes(node):
            return [Step(node, node.target, (x, self._weight(weight), *node.args[2:]))]
        epilogue = None if activation is None else _epilogue(activation)
        ways: _Ways = {_DIRECT: lambda: [self._direct(node, activation, epilogue)]}
        clamped = None if epilogue is None else activation
        ways = self._with_own(node, self._own_layer(node), ways, lambda own: self._own(node, own, clamped))
        return self._fastest(node, ways)

    def ratio(self, node: fx.Node, layer: fx.Node | SignedPart, ratio: Step, out: fx.Node | None) -> list[Step] | None:
        """A ratio and the layer that is its denominator; `ratio` is the step of the former, None where there is no better way."""
        convolution = layer if isinstance(layer, fx.Node) else layer.first
        x, bias = (convolution.args[0] if isinstance(layer, fx.Node) else layer.x), convolution.args[2]
        make = self._own_layer(convolution) if isinstance(layer, fx.Node) else self._signed_layer(layer)
        carrier, message, *other = node.args[:-2]
        operands = [t for t in (carrier, message, *other) if t is not None]
        if make is None or any(value(t).dtype is not value(x).dtype for t in operands):
            return None

        def own(made: Product) -> list[Step]:
            args = (made, x, bias, carrier, message, other[0] if other else None, node.args[-1], out)
            note = f"in a convolution {_name(type(made), convolution.args[3])}"
            return [Step(node, products.convolution_ratio, args, note=note, computes=(convolution,))]

        kind, layer_of = make
        if isinstance(layer, SignedPart):
            return own(layer_of())
        ways: _Ways = {_DIRECT: lambda: [self._direct(convolution, None, None), ratio]}
        ways = self._with_own(convolution, (kind, layer_of), ways, own, first=True)
        return self._fastest(convolution, ways, "in its ratio")

    def signed(self, node: fx.Node, part: SignedPart) -> list[Step] | None:
        """The positive part of a layer with signed input, in one call; None where there is none."""
        make = self._signed_layer(part)
        if make is None:
            return None
        args = (make[1](), part.x, part.first.args[2])
        return [Step(node, products.convolution, args, note=make[0], computes=(part.first,))]

    def either(self, group: Either) -> list[Step] | None:
        """One of two transposes, by the sign of a value; None where there is no better way than both."""
        uppers, lowers = (self._own_layer(t, by_sign=True) for t in (group.upper, group.lower))
        if uppers is None or lowers is None or _OWN[Pointwise] != uppers[0]:
            return None
        upper, lower = group.upper.args[1], group.lower.args[1]
        layer = self._prepare(
            upper,
            f"either {lower.target}",
            lambda t: Pointwise.of_two(flipped_weight(t, 1), flipped_weight(self._constants[lower.target], 1), (1, 1)),
        )
        args = (layer, group.upper.args[0], group.x)
        note = f"of two transposes, {_OWN[Pointwise]}"
        # Of each place one of the two is computed: the work of one.
        return [Step(group.last, products.either_convolution, args, note=note, computes=(group.upper,))]

    def dgrad(self, node: fx.Node) -> list[Step]:
        """The transpose of a convolution, in the way that is fastest here."""
        ways: _Ways = {}
        if self._is_plain(node):
            ways[_DIRECT] = lambda: [Step(node, *_pointwise(*self._plain_operands(node), _NO_EPILOGUE), note=_DIRECT)]
        elif (transposed := self._transposed_convolution(node)) is not None:
            ways[_TRANSPOSED] = transposed
        ways[_BACKWARD] = lambda: [self._torch_backward(node)]
        ways = self._with_own(node, self._own_layer(node), ways, lambda own: self._own(node, own, None))
        return self._fastest(node, ways)

    def dgrad_added(self, node: fx.Node, total: fx.Node, add: fx.Node) -> Step | None:
        """The transpose added to a value that may be written, as the step of the sum; None where its way does not add."""
        (step,) = self.dgrad(node)
        if step.function is products.convolution:
            function: Callable[..., Any] = products.convolution_add_
            args: tuple = (total, step.args[0], node.args[0])
        elif step.note == _DIRECT:
            s, packed, _, stride, padding, dilation, groups = self._plain_operands(node)
            function = torch.ops.mkldnn._convolution_pointwise_.binary
            args = (total, s, packed, None, padding, stride, dilation, groups, "add", 1.0, None, [], None)
        else:
            return None
        return Step(add, function, args, note=f"added {step.note}", computes=(node,))

    # --- ways ---

    def _takes(self, node: fx.Node) -> bool:
        """Whether a convolution is one for oneDNN: plain, of images, its weight known."""
        return not node.args[6] and node.args[1].op == "get_attr" and _one_dnn(node)

    def _direct(self, node: fx.Node, activation: fx.Node | None, epilogue: _Epilogue | None) -> Step:
        x, weight, bias, stride, padding, dilation, _, _, groups = node.args
        packed = self._packed(weight, _channels_last, x, stride, padding, dilation, groups)
        layer = (x, packed, bias, stride, padding, dilation, groups)
        if activation is None or epilogue is None:
            return Step(node, *_pointwise(*layer, _NO_EPILOGUE))
        note = f"with its {_SHOWN[operation_name(activation)]}"
        return Step(activation, *_pointwise(*layer, epilogue), note=note, computes=(node,))

    def _own(self, node: fx.Node, layer: Product, activation: fx.Node | None) -> list[Step]:
        bias = node.args[2] if node.target is aten.convolution.default else None
        with_it = f", with its {_SHOWN[operation_name(activation)]}" if activation else ""
        note = _name(type(layer), node.args[3]) + with_it
        args = (layer, node.args[0], bias, None if activation is None else _clamp(activation))
        return [Step(activation or node, products.convolution, args, note=note, computes=(node,))]

    def _own_layer(self, node: fx.Node, by_sign: bool = False) -> tuple[str, Callable[[], Product]] | None:
        """A convolution, or a transpose, as a product of our own: its name and how it is made."""
        is_forward = node.target is aten.convolution.default
        x, weight = node.args[:2]
        if not self._compiled or not products.is_fast() or not products.takes(value(x)):
            return None
        if is_forward and not self._takes(node) or weight.op != "get_attr" or rank(weight) != 4:
            return None
        narrow = value(x).dtype is torch.bfloat16
        if narrow and not products.multiplies_bfloat16():
            return None
        shape = tuple(value(weight).shape)
        stride, padding, dilation, groups = (node.args[i] for i in ((3, 4, 5, 8) if is_forward else (3, 4, 5, 6)))
        windows = (tuple(stride), tuple(padding), tuple(dilation), None if is_forward else tuple(node.args[2]))
        if Depthwise.fits(shape, groups) and not narrow:
            make = functools.partial(self._prepare, weight, f"depthwise {windows}", lambda t: Depthwise.of(t, *windows))
            return _OWN[Depthwise], make
        at_call = self._is_made_at_call(weight) and Direct.fits(shape, groups) and not by_sign
        winograd = self._winograd(node, at_call)
        if winograd is not None:
            return winograd
        if at_call:
            return _OWN[Direct], lambda: Direct(self._filters(weight, not is_forward), *windows)
        if not is_forward:
            if not self._is_plain(node):
                return None
            padding, shape = _inverse_padding(node), (shape[1], shape[0], *shape[2:])
        if Pointwise.fits(shape, padding, groups, value(x).dtype) and not (narrow and by_sign):
            make = functools.partial(
                self._prepare, weight, f"product {'' if is_forward else 'flipped '}{stride}",
                lambda t: Pointwise.of(t if is_forward else flipped_weight(t, 1), stride),
            )  # fmt: skip
            return _OWN[Pointwise], make
        return None

    def _winograd(self, node: fx.Node, at_call: bool) -> tuple[str, Callable[[], Product]] | None:
        """A layer, or a transpose, by Winograd's filtering, where that takes it. A transpose of stride 1 is a plain convolution."""
        is_forward = node.target is aten.convolution.default
        x, weight = node.args[:2]
        stride, padding, dilation, groups = (node.args[i] for i in ((3, 4, 5, 8) if is_forward else (3, 4, 5, 6)))
        shape, sizes, size = tuple(value(weight).shape), static_sizes(x, (2, 3)), None
        if not is_forward:
            shape = (shape[1], shape[0], *shape[2:])
            if self._is_plain(node):
                padding = _inverse_padding(node)
            elif [*stride] == [2, 2]:
                size = tuple(node.args[2])
            else:
                return None
        tiles = self.batch * math.prod(-(-n // (2 * t)) for n, t in zip(size or sizes, stride, strict=True))
        too_few = at_call and tiles < _TILES_FOR_ONE  # to be worth transforming a weight
        if too_few or not Winograd.fits(shape, size or sizes, stride, padding, dilation, groups):
            return None
        name, form = _name(Winograd, stride), (tuple(padding), stride[0], size)
        kind = f"winograd {'' if is_forward else 'flipped '}{form}"
        if value(x).dtype is torch.bfloat16:
            return name, functools.partial(
                self._prepare,
                weight,
                kind,
                lambda t: Winograd.in_bfloat16(self._filters(weight, not is_forward), *form),
            )
        many = 16 * 4 * math.prod(shape[:2]) >= _LARGE_WEIGHT and tiles >= _ENOUGH_TILES  # to spread the time over
        if at_call or many:
            return name, lambda: Winograd(self._filters(weight, not is_forward), *form)
        return name, functools.partial(
            self._prepare, weight, kind, lambda t: Winograd.of(t if is_forward else flipped_weight(t, 1), *form)
        )

    def _is_made_at_call(self, weight: fx.Node) -> bool:
        """Whether a weight is so large beside the values of a batch that no other form of it is kept."""
        weighs = value(weight)
        large = self.batch == 1 and self._compiled and weighs.nbytes >= _LARGE_FOR_ONE and weighs.dtype is torch.float32
        return large and self._constants.filters(weight.target) is not None

    def _filters(self, node: fx.Node, transposed: bool) -> Filters:
        """A weight by what it is made of, which takes no memory; by itself where that is not known."""
        filters = self._constants.filters(node.target) or Filters(self._prepare(node, "as it is", lambda t: t))
        return dataclasses.replace(filters, transposed=transposed)

    def _signed_layer(self, part: SignedPart) -> tuple[str, Callable[[], Product]] | None:
        own = self._own_layer(part.first, by_sign=True)
        if own is None or own[0] != _OWN[Pointwise] or part.negative.op != "get_attr":
            return None
        stride, negative = part.first.args[3], part.negative.target
        return own[0], functools.partial(
            self._prepare,
            part.first.args[1],
            f"parts {negative} {stride}",
            lambda t: Pointwise.of_two(t, self._constants[negative], stride),
        )

    def _with_own(
        self, node: fx.Node, own: tuple[str, Callable[[], Product]] | None, ways: _Ways,
        step: Callable[[Product], list[Step]], first: bool = False,
    ) -> _Ways:  # fmt: skip
        """The ways with that of our own among them, first where it is expected to be the fastest; alone where no form of the weight
        is kept, which others would need."""
        if own is None:
            return ways
        kind, make = own
        mine: _Ways = {kind: lambda: step(make())}
        if self._is_made_at_call(node.args[1]) and kind != _OWN[Depthwise]:
            return mine
        return {**mine, **ways} if first or kind != _OWN[Pointwise] else {**ways, **mine}

    def _torch_backward(self, node: fx.Node) -> Step:
        s, weight = node.args[:2]
        function = TRANSPOSES["conv_dgrad"][1]
        return Step(node, function, (s, self._weight(weight), *node.args[2:]), note=_BACKWARD)

    def _fastest(self, node: fx.Node, ways: _Ways, where: str = "") -> list[Step]:
        """The way that is fastest here; without a tuner, or for little work, the first, which is expected to be."""
        expected = next(iter(ways.values()))
        if self._tuner is None or len(ways) == 1 or _work(node, self.batch) < _WORTH_TUNING:
            return expected()
        batch = self._timing_batch(node.args[0])
        described = [f"{value(a).dtype} {_real_size(a, batch)}" if is_tensor(a) else str(a) for a in node.args]
        key = f"{operation_name(node)} {', '.join(described)} {where}: {', '.join(ways)}"
        before = dict(self._prepared)
        chosen = self._tuner.choose(key, lambda: self._calls({name: way() for name, way in ways.items()}, batch))
        self._prepared = before  # the layouts of the other ways are each as large as the weight
        self.tuned[node] = key
        return ways.get(chosen, expected)()

    def _timing_batch(self, s: fx.Node) -> int:
        """The batch that ways are timed with: as many samples as tell a large layer's time, which is proportional."""
        return max(1, min(self.batch, _TIMED_ELEMENTS // math.prod(_real_size(s, 1))))

    def _calls(self, ways: dict[str, list[Step]], batch: int) -> dict[str, Callable[[], object]]:
        """The ways on random values."""
        generator = torch.Generator("cpu").manual_seed(0)  # its own: the user's random numbers stay theirs
        drawn: dict[fx.Node, torch.Tensor] = {}

        def real(node: fx.Node) -> torch.Tensor:
            if node.op == "get_attr":
                return self._constants[node.target]
            if node not in drawn:
                values = torch.rand(_real_size(node, batch), generator=generator, dtype=torch.float32, device="cpu").to(
                    value(node).dtype
                )
                drawn[node] = _channels_last(values)
            return drawn[node]

        def call(steps: list[Step]) -> None:
            made: dict[fx.Node, Any] = {}
            with torch.no_grad():
                for step in steps:
                    args = fx.map_arg(step.args, lambda n: made[n] if n in made else real(n))
                    made[step.node] = step.function(*args)

        return {name: functools.partial(call, steps) for name, steps in ways.items()}

    def _transposed_convolution(self, node: fx.Node) -> Callable[[], list[Step]] | None:
        """A strided transpose in oneDNN, with its weight in oneDNN's layout; None where that does not take it."""
        s, weight, size, stride, padding, dilation, groups = node.args
        if weight.op != "get_attr" or not _one_dnn(node):
            return None
        rest = left_over(size, static_sizes(s, (2, 3)), value(weight).shape[2:], stride, padding, dilation)
        if any(not 0 <= r < t for r, t in zip(rest, stride, strict=True)):
            return None
        like = [self.batch, *static_sizes(s, (1, 2, 3))]

        def steps() -> list[Step]:
            packed = self._prepare(
                weight,
                f"transposed {like} {rest} {stride} {padding} {dilation}",
                lambda t: torch.ops.mkldnn._reorder_convolution_transpose_weight(
                    _channels_last(t), padding, rest, stride, dilation, groups, like
                ),
            )
            function = torch.ops.mkldnn._convolution_transpose_pointwise.default
            args = (s, packed, None, padding, rest, stride, dilation, groups, *_NO_EPILOGUE)
            return [Step(node, function, args, note=_TRANSPOSED)]

        return steps

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a transpose is a plain convolution with flipped weights that are made beforehand."""
        _, weight, size, stride, padding, dilation, groups = node.args
        fits = fits_plain_convolution(value(weight).shape, stride, padding, dilation, groups)
        return weight.op == "get_attr" and fits and _one_dnn(node)

    def _plain_operands(
        self, node: fx.Node
    ) -> tuple[fx.Node, torch.Tensor, None, list[int], list[int], list[int], int]:
        """Operands of the plain convolution that a transpose is."""
        s, weight, _, stride, padding, dilation, groups = node.args
        inverse = _inverse_padding(node)

        def flip(t: torch.Tensor) -> torch.Tensor:
            return _channels_last(flipped_weight(t, groups))

        return (
            s,
            self._packed(weight, flip, s, stride, inverse, dilation, groups),
            None,
            stride,
            inverse,
            dilation,
            groups,
        )

    def _packed(
        self, weight: fx.Node, arrange: Callable[[torch.Tensor], torch.Tensor], x: fx.Node, stride: list[int],
        padding: list[int], dilation: list[int], groups: int,
    ) -> torch.Tensor:  # fmt: skip
        """A weight in the layout that oneDNN chooses for the layer; torch would reorder it at every call."""
        size = [self.batch, *(int(n) for n in value(x).shape[1:])]
        kind = f"{arrange.__name__} {size} {stride} {padding} {dilation}"
        return self._prepare(
            weight,
            kind,
            lambda t: torch.ops.mkldnn._reorder_convolution_weight(arrange(t), padding, stride, dilation, groups, size),
        )


def _inverse_padding(node: fx.Node) -> list[int]:
    """That of the plain convolution that a transpose is."""
    _, weight, _, _, padding, dilation, _ = node.args
    return [d * (k - 1) - p for d, k, p in zip(dilation, value(weight).shape[2:], padding, strict=True)]


def _name(kind: type[Product], stride: Sequence[int]) -> str:
    """A way of our own as `plan()` shows it."""
    return _OWN[kind] + (" in phases" if kind is Winograd and stride[0] == 2 else "")


def _one_dnn(node: fx.Node) -> bool:
    """Whether oneDNN's convolution takes what torch's does: images in float32 or bfloat16 on a CPU that has it."""
    fake = value(node)
    if rank(node) != 4 or fake.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    narrow = fake.dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return fake.dtype is torch.float32 or narrow


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _pointwise(
    x: fx.Node, weight: torch.Tensor, bias: fx.Node | None, stride: list[int], padding: list[int], dilation: list[int],
    groups: int, epilogue: _Epilogue,
) -> tuple[Callable[..., Any], tuple]:  # fmt: skip
    """oneDNN's convolution with an epilogue: the function and its arguments."""
    args: tuple = (x, weight, bias, padding, stride, dilation, groups, *epilogue)
    return torch.ops.mkldnn._convolution_pointwise.default, args


# Of Winograd's weights: bytes, and tiles of a batch. A VGG has such layers, and half as much memory again without this; it costs
# them 5 to 10% of their time.
_LARGE_WEIGHT, _ENOUGH_TILES = 2**23, 150

# Bytes of a weight of which no other form is kept for a batch of one (smaller ones come to few megabytes together), and tiles from
# which on such a one is transformed at each call.
_LARGE_FOR_ONE, _TILES_FOR_ONE = 2**17, 40

# Multiplications below which no choice of kernel shows.
_WORTH_TUNING = 5_000_000


# Elements of the operand that ways are timed with, at most: more takes memory and says the same.
_TIMED_ELEMENTS = 2**21


def _real_size(node: fx.Node, batch: int) -> list[int]:
    return [n if isinstance(n, int) else batch for n in value(node).shape]


def _work(node: fx.Node, batch: int) -> int:
    """Multiplications of a convolution, or of its transpose."""
    x, weight = node.args[:2]
    outputs = node if operation_name(node) == "convolution" else x
    return batch * math.prod(static_sizes(outputs, (2, 3))) * value(weight).numel()
