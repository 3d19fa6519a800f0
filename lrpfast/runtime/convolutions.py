"""Convolutions and their transposes as steps: in oneDNN, with weights in its own layout, in the way that is fastest here.

torch's operators reorder a weight at every call. Here that is done once, for the size of batch that is expected. A transpose is a
plain convolution with flipped weights where the stride is 1, and a transposed convolution elsewhere; which way wins is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfast.graph import Constants, argument, is_tensor, operation_name, rank, static_sizes, value
from lrpfast.ops.transposes import TRANSPOSES, fits_plain_convolution, flipped_weight, left_over
from lrpfast.runtime.step import Step
from lrpfast.runtime.tune import Tuner

aten = torch.ops.aten

_Epilogue = tuple[str, list[float], str]  # an activation's name, numbers and algorithm
_NO_EPILOGUE: _Epilogue = ("none", [], "")
_SHOWN = {"relu": "ReLU", "hardtanh": "clamp"}


def _epilogue(node: fx.Node) -> _Epilogue | None:
    """An activation as an epilogue; those alone that oneDNN computes to the last digit as torch does."""
    if node.target is aten.relu.default:
        return "relu", [], ""
    if node.target is aten.hardtanh.default:
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
        return "hardtanh", [float(low), float(high)], ""
    return None


class Convolutions:
    """Lowers the convolutions of one program.

    Parameters
    ----------
    constants
        The program's.
    batch
        The batch that weights are laid out, and ways are timed, for; any other runs as well.
    tuner
        Where given, ways are chosen by timing.

    Attributes
    ----------
    tuned
        The steps that were chosen by timing, and under which key of the tuner.
    """

    def __init__(self, constants: Constants, batch: int, tuner: Tuner | None) -> None:
        self._constants = constants
        self._batch = batch
        self._tuner = tuner
        self._prepared: dict[tuple[str, str], torch.Tensor] = {}
        self.tuned: dict[fx.Node, str] = {}

    def _prepare(self, node: fx.Node, kind: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        key = (node.target, kind)
        if key not in self._prepared:
            with torch.no_grad():
                self._prepared[key] = make(self._constants[node.target])
        return self._prepared[key]

    def _weight(self, node: fx.Node) -> Any:
        if node.op != "get_attr" or rank(node) != 4:
            return node
        return self._prepare(node, "weight", lambda t: t.contiguous(memory_format=torch.channels_last))

    def forward(self, node: fx.Node, activation: fx.Node | None) -> Step:
        """A convolution, and in the same call the activation that alone uses it, where oneDNN has it."""
        x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
        if transposed or not _one_dnn(node) or weight.op != "get_attr":
            return Step(node, node.target, (x, self._weight(weight), *node.args[2:]))
        packed = self._packed(weight, _channels_last, x, stride, padding, dilation, groups)
        layer = (x, packed, bias, stride, padding, dilation, groups)
        epilogue = None if activation is None else _epilogue(activation)
        if activation is None or epilogue is None:
            return Step(node, *_pointwise(*layer, _NO_EPILOGUE))
        return Step(activation, *_pointwise(*layer, epilogue), note=f"with its {_SHOWN[operation_name(activation)]}")

    def dgrad(self, node: fx.Node) -> Step:
        """The transpose of a convolution, in the way that is fastest here."""
        own = self._plain_convolution(node) or self._transposed_convolution(node)
        if own is None:
            return self._torch_backward(node)
        if self._tuner is None or _work(node, self._batch) < _WORTH_TUNING:
            return own
        return self._fastest(self._tuner, [own, self._torch_backward(node)])

    def _torch_backward(self, node: fx.Node) -> Step:
        s, weight = node.args[:2]
        function = TRANSPOSES["conv_dgrad"][1]
        return Step(node, function, (s, self._weight(weight), *node.args[2:]), note="torch's backward")

    def _plain_convolution(self, node: fx.Node) -> Step | None:
        if not self.is_plain(node):
            return None
        function, args = _pointwise(*self.plain_operands(node), _NO_EPILOGUE)
        return Step(node, function, args, note="as a convolution")

    def _fastest(self, tuner: Tuner, ways: list[Step]) -> Step:
        """The way that is fastest here."""
        node = ways[0].node
        batch = self._timing_batch(node.args[0])
        described = [f"{value(a).dtype} {_real_size(a, batch)}" if is_tensor(a) else str(a) for a in node.args]
        key = f"{operation_name(node)} {', '.join(described)}"
        chosen = tuner.choose(key, lambda: self._calls(ways, batch))
        self.tuned[node] = key
        self._prepared.pop((node.args[1].target, "weight"), None)  # a whole layer's weights, for one way alone
        return next((way for way in ways if way.note == chosen), ways[0])

    def _timing_batch(self, s: fx.Node) -> int:
        """The batch that ways are timed with: as many samples as tell a large layer's time, which is proportional."""
        return max(1, min(self._batch, _TIMED_ELEMENTS // math.prod(_real_size(s, 1))))

    def _calls(self, ways: list[Step], batch: int) -> dict[str, Callable[[], object]]:
        """The ways on random values, by their notes."""
        generator = torch.Generator().manual_seed(0)  # its own: the user's random numbers stay theirs
        drawn: dict[fx.Node, torch.Tensor] = {}

        def real(node: fx.Node) -> torch.Tensor:
            if node.op == "get_attr":
                return self._constants[node.target]
            if node not in drawn:
                values = torch.randn(_real_size(node, batch), generator=generator).to(value(node).dtype)
                drawn[node] = _channels_last(values)
            return drawn[node]

        def call(step: Step, args: Any) -> object:
            with torch.no_grad():
                return step.function(*args)

        return {way.note: functools.partial(call, way, fx.map_arg(way.args, real)) for way in ways}

    def _transposed_convolution(self, node: fx.Node) -> Step | None:
        """A strided transpose in oneDNN, with its weight in oneDNN's layout; None where that does not take it."""
        s, weight, size, stride, padding, dilation, groups = node.args
        if weight.op != "get_attr" or not _one_dnn(node):
            return None
        rest = left_over(size, static_sizes(s, (2, 3)), value(weight).shape[2:], stride, padding, dilation)
        if any(not 0 <= r < t for r, t in zip(rest, stride, strict=True)):
            return None
        like = [self._batch, *static_sizes(s, (1, 2, 3))]
        packed = self._prepare(
            weight,
            f"transposed {like} {rest} {stride} {padding} {dilation}",
            lambda t: torch.ops.mkldnn._reorder_convolution_transpose_weight(
                _channels_last(t), padding, rest, stride, dilation, groups, like
            ),
        )
        function = torch.ops.mkldnn._convolution_transpose_pointwise.default
        args = (s, packed, None, padding, rest, stride, dilation, groups, *_NO_EPILOGUE)
        return Step(node, function, args, note="as a transposed convolution")

    def is_plain(self, node: fx.Node) -> bool:
        """Whether a transpose is a plain convolution with flipped weights that are made beforehand."""
        _, weight, size, stride, padding, dilation, groups = node.args
        fits = fits_plain_convolution(value(weight).shape, stride, padding, dilation, groups)
        return weight.op == "get_attr" and fits and _one_dnn(node)

    def plain_operands(self, node: fx.Node) -> tuple[fx.Node, torch.Tensor, None, list[int], list[int], list[int], int]:
        """Operands of the plain convolution that a transpose is."""
        s, weight, _, stride, padding, dilation, groups = node.args
        inverse = [d * (k - 1) - p for d, k, p in zip(dilation, value(weight).shape[2:], padding, strict=True)]

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
        size = [self._batch, *(int(n) for n in value(x).shape[1:])]
        kind = f"{arrange.__name__} {size} {stride} {padding} {dilation}"
        return self._prepare(
            weight,
            kind,
            lambda t: torch.ops.mkldnn._reorder_convolution_weight(arrange(t), padding, stride, dilation, groups, size),
        )


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


# Multiplications below which no choice of kernel shows.
_WORTH_TUNING = 5_000_000


# Elements of the operand that ways are timed with, at most: more takes memory and says the same.
_TIMED_ELEMENTS = 2**21


def _real_size(node: fx.Node, batch: int) -> list[int]:
    return [n if isinstance(n, int) else batch for n in value(node).shape]


def _work(node: fx.Node, batch: int) -> int:
    """Multiplications of a transpose of a convolution."""
    s, weight = node.args[:2]
    return batch * math.prod(static_sizes(s, (2, 3))) * value(weight).numel()
