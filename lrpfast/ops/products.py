"""Convolutions of our own, in C++, with what follows them elementwise in the same call: float32, and the first two kinds in bfloat16
as well; channels-last.

Four kinds of layers, the first three with their weights laid out once:

- `Winograd`: 3 x 3 filters, stride 1, by Winograd's minimal filtering F(2 x 2, 3 x 3) (csrc/winograd_cpu.h). It takes 4 / 9 of the
  multiplications of the direct form, half its time on large layers, and rounds no worse: sums are nine times shorter. Larger
  tiles, which would save more, lose digits. With stride 2, and as the transpose of such a layer, by phases and F(2, 2), it takes
  25 / 36. A value of the result depends on its own window alone, in rounding errors too: a window of zeros gives zero exactly.
  Infinities may come out as NaN. In bfloat16 only the transformed tiles and filters are rounded, and the result: the error is that
  of rounding operands, times 5 / 3.
- `Pointwise`: 1 x 1 filters, a product of matrices (csrc/pointwise_cpu.h). It also takes the positive part of a layer with signed
  input (RULES §2: ``W⁺x⁺ + W⁻x⁻``), and its transpose, in one product, in float32.
- `Depthwise`: one filter a channel, of any window, or the transpose of such a layer (csrc/depthwise_cpu.h). It is bound by memory.
- `Direct`: any window, or the transpose of such a layer, for few places and a large weight (csrc/convolution_cpu.h). The weight is
  read once from where the model has it, and takes no memory of its own.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lrpfast.ops import native
from lrpfast.ops.filters import PANEL, Filters, floats

_SKEW = 16  # kSkew of csrc/matrix_cpu.h
_PLACES = 196  # that are worked on at a time by `Direct`: their rows stay in the second-level cache, or near it
_CHUNK = 128  # filters that are worked on at a time by `Winograd`, at most: products stay in the second-level cache
# Pieces of work that a thread should have, at least: one that is slower then holds the other up less (csrc/parallel.h).
_PIECES = 4

Clamp = tuple[float, float]  # the smallest and the largest value
RELU: Clamp = (0.0, math.inf)

_Then = tuple[int, bool, bool, float, float, int, int, int, float]  # Epilogue of csrc/ops.h, pointers as numbers


def _then(
    bias: Tensor | None = None, *, add: bool = False, clamp: Clamp | None = None, carrier: Tensor | None = None,
    message_a: Tensor | None = None, message_b: Tensor | None = None, eps: float = 0.0,
) -> _Then:  # fmt: skip
    """What becomes of sums; operands lie as the result does, and live as long as the call."""
    low, high = clamp or (0.0, 0.0)
    a, b = _pointer(message_a), _pointer(message_b)
    return _pointer(bias), add, clamp is not None, low, high, _pointer(carrier), a, b, eps


def is_fast() -> bool:
    """Whether the processor has fused multiply-adds, so that these can be expected to keep up with oneDNN."""
    return native.extension is not None and native.extension.cpu_capability() != "default"


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies pairs of bfloat16, and these can be expected to keep up with oneDNN: where that has the tiles
    of AMX, it is three times as fast."""
    pairs = native.extension is not None and native.extension.cpu_capability() == "avx512_bf16"
    return pairs and not torch.cpu._is_amx_tile_supported()


def takes(x: Tensor) -> bool:
    """Whether values of this tensor's dtype and device can be read; a fake tensor will do. Bfloat16 is for the first two kinds alone."""
    return native.takes(x) and x.dim() == 4


@dataclasses.dataclass(frozen=True, eq=False)
class Winograd:
    """A 3 x 3 convolution of stride 1 or 2, or the transpose of one of stride 2.

    Attributes
    ----------
    weight
        G g Gᵀ of each filter, ``[16, K / 32, C, 32]``; or the filters ``[K, C, 3, 3]``, to be transformed at each call; or for values
        in bfloat16 pairs of channels, ``[16, K / 32, C / 2, 32, 2]``, bfloat16. Of a transpose: those of the transpose, taps in reverse.
    padding
        0, 1 or 2, of height and width.
    stride
        1 or 2, of height and width.
    size
        Of a transpose: height and width of its result; None: a convolution.
    """

    weight: Tensor | Filters
    padding: tuple[int, ...]
    stride: int = 1
    size: tuple[int, ...] | None = None

    @staticmethod
    def fits(
        weight_shape: Sequence[int], size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], groups: int,
    ) -> bool:  # fmt: skip
        """Whether a layer with filters of this shape is one; `size` is that of its images, or of the result of a strided transpose."""
        plain = [*weight_shape[2:]] == [3, 3] and [*dilation, groups] == [1] * 3
        if not plain or [*stride] not in ([1, 1], [2, 2]) or not all(0 <= p <= 2 for p in padding):
            return False
        whole = weight_shape[0] % PANEL == 0 and weight_shape[1] % 16 == 0
        return whole and all(n + 2 * p >= 4 for n, p in zip(size, padding, strict=True))  # a tile of results, at least

    @classmethod
    def of(cls, weight: Tensor, padding: Sequence[int], stride: int = 1, size: Sequence[int] | None = None) -> Winograd:
        """Lay out filters ``[K, C, 3, 3]``. They are transformed in float64."""
        filters, channels = weight.shape[:2]
        laid_out = floats(16, filters // PANEL, channels, PANEL)
        for panel, own in enumerate(weight.split(PANEL)):  # piece by piece: in float64 a layer is large
            both = _transform(_transform(own.double(), 2, stride), 3, stride)
            laid_out[:, panel] = both.permute(2, 3, 1, 0).reshape(16, channels, PANEL)
        return cls(laid_out, tuple(padding), stride, None if size is None else tuple(size))

    @classmethod
    def in_bfloat16(
        cls, filters: Filters, padding: Sequence[int], stride: int = 1, size: Sequence[int] | None = None
    ) -> Winograd:
        """Lay out filters for values in bfloat16, rounded once, when they are transformed."""
        filters = dataclasses.replace(filters, weight=filters.weight.float())
        pairs = filters.transformed(stride == 2).unflatten(2, (-1, 2)).transpose(3, 4).to(torch.bfloat16)
        return cls(pairs.contiguous(), tuple(padding), stride, None if size is None else tuple(size))

    def empty(self, x: Tensor) -> Tensor:
        """Memory for the result."""
        size = self.size
        if size is None:
            size = _result_size(x.shape[2:], [3, 3], [self.stride] * 2, self.padding, [1, 1])
        weight = self.weight
        filters = weight.shape[0] if isinstance(weight, Filters) else weight.shape[1] * PANEL
        return _images(x.shape[0], filters, size, x.dtype)

    def run(self, x: Tensor, out: Tensor, then: _Then) -> Tensor:
        assert native.extension is not None
        channels, filters = x.shape[1], out.shape[1]
        form = _UNIT_STRIDE if self.stride == 1 else _STRIDED if self.size is None else _STRIDED_TRANSPOSE
        tiles, threads = form.tiles(out), torch.get_num_threads()
        # Equal blocks: for a small last one all weights would be read once more.
        blocks = max(1, round(tiles / form.at_once))
        block = max(1, -(-tiles // blocks))
        weight, given = self.weight, None
        if isinstance(weight, Filters) and blocks == 1:
            given = weight.described(weight.transposed)
        elif isinstance(weight, Filters):
            weight = weight.transformed(self.stride == 2)
        # Pieces enough for threads to share them evenly.
        chunk = min(_CHUNK, filters, max(PANEL, blocks * filters // (_PIECES * threads) // PANEL * PANEL))
        narrow = x.dtype is torch.bfloat16
        depth = channels // 2 if narrow else channels
        products = block * (form.operands * (depth + _SKEW) + form.products * (chunk + _SKEW))
        workspace = floats(threads * (products + (0 if given is None else 16 * chunk * channels)))
        (native.extension.winograd_bfloat16 if narrow else native.extension.winograd)(
            x.data_ptr(), 0 if isinstance(weight, Filters) else weight.data_ptr(), given, out.data_ptr(), workspace.data_ptr(),
            x.shape[0], x.shape[2:], out.shape[2:], self.padding, channels, filters, block, chunk, form.number, then, threads,
        )  # fmt: skip
        return out


@dataclasses.dataclass(frozen=True)
class _Form:
    """A form of Winograd's filtering: WinogradForm of csrc/ops.h, and of csrc/winograd_cpu.h its numbers of operands, products and
    results of a tile. `at_once`: tiles, or about as many, that are worked on at a time, so that products stay in the second-level cache.
    """

    number: int
    operands: int
    products: int
    result: int
    at_once: int

    def tiles(self, out: Tensor) -> int:
        """About as many as a result has: the first may begin outside of it."""
        return out.shape[0] * math.prod(-(-n // self.result) for n in out.shape[2:])


_UNIT_STRIDE, _STRIDED, _STRIDED_TRANSPOSE = _Form(0, 16, 16, 2, 56), _Form(1, 25, 25, 2, 44), _Form(2, 16, 25, 4, 44)


def _transform(g: Tensor, dim: int, stride: int) -> Tensor:
    first, middle, last = g.unbind(dim)
    outer = first + last
    if stride == 2:
        return torch.stack([first, outer, last, middle], dim)
    return torch.stack([first, (outer + middle) / 2, (outer - middle) / 2, last], dim)


@dataclasses.dataclass(frozen=True, eq=False)
class Pointwise:
    """A 1 x 1 convolution without padding.

    Attributes
    ----------
    weight
        ``[K / 32 rounded up, C, 32]``, padded with zeros; of a layer by sign ``[K / 32 rounded up, C, 2, 32]``, the first of the
        two for values that are not negative; in bfloat16 pairs of channels, ``[K / 32 rounded up, C / 2, 32, 2]``.
    filters
        K.
    stride
        Of height and width.
    by_sign
        Whether there are two weights.
    """

    weight: Tensor
    filters: int
    stride: tuple[int, ...]
    by_sign: bool = False

    @staticmethod
    def fits(weight_shape: Sequence[int], padding: Sequence[int], groups: int, dtype: torch.dtype) -> bool:
        """Whether a layer with filters of this shape, on values of this dtype, is one."""
        plain = [*weight_shape[2:]] == [1, 1] and not any(padding) and groups == 1
        return plain and (dtype is torch.float32 or weight_shape[1] % 2 == 0)

    @classmethod
    def of(cls, weight: Tensor, stride: Sequence[int]) -> Pointwise:
        """Lay out filters ``[K, C, 1, 1]``, float32 or bfloat16."""
        panels = _panels(weight)
        if weight.dtype is torch.bfloat16:
            panels = panels.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()
        return cls(panels, weight.shape[0], tuple(stride))

    @classmethod
    def of_two(cls, upper: Tensor, lower: Tensor, stride: Sequence[int]) -> Pointwise:
        """Two layers in one: ``upper * x⁺ + lower * x⁻``, or by a given sign `upper` where it is not negative, else `lower`."""
        both = torch.stack([_panels(upper), _panels(lower)], 2)
        return cls(both, upper.shape[0], tuple(stride), by_sign=True)

    def empty(self, x: Tensor) -> Tensor:
        """Memory for the result."""
        size = [-(-n // t) for n, t in zip(x.shape[2:], self.stride, strict=True)]
        return _images(x.shape[0], self.filters, size, x.dtype)

    def run(self, x: Tensor, out: Tensor, then: _Then, sign: Tensor | None = None) -> Tensor:
        assert native.extension is not None
        panels, depth = self.weight.shape[:2]
        width = panels * PANEL
        threads = torch.get_num_threads()
        # At a time: their products stay in the first-level cache, or near it. Of few rows threads share smaller pieces more evenly; of
        # very few, larger ones read the weight less often.
        pieces = x.shape[0] * math.prod(out.shape[2:]) / (_PIECES * threads)
        rows = 14 if depth <= 64 or 14 <= pieces < 28 else 28
        workspace = floats(threads * rows * (depth + _SKEW + (width if sign is None else 2 * width)))
        narrow = self.weight.dtype is torch.bfloat16
        (native.extension.pointwise_bfloat16 if narrow else native.extension.pointwise)(
            x.data_ptr(), self.weight.data_ptr(), self.by_sign, _pointer(sign), out.data_ptr(), workspace.data_ptr(),
            x.shape[0], x.shape[2:], out.shape[2:], self.stride, x.shape[1], self.filters, rows, then, threads,
        )  # fmt: skip
        return out


def _panels(weight: Tensor) -> Tensor:
    filters, depth = weight.shape[:2]
    padded = weight.new_zeros((-(-filters // PANEL) * PANEL, depth))
    padded[:filters] = weight.flatten(1)
    return padded.unflatten(0, (-1, PANEL)).mT.contiguous()


def _images(batch: int, channels: int, size: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty((batch, channels, *size), dtype=dtype, device="cpu", memory_format=torch.channels_last)


@dataclasses.dataclass(frozen=True, eq=False)
class Depthwise:
    """A convolution with one filter a channel, or the transpose of one.

    Attributes
    ----------
    weight
        ``[kernel height, kernel width, C]``.
    stride, padding, dilation
        Of height and width.
    size
        Of a transpose: height and width of its result; None: a convolution.
    """

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...] | None = None

    @staticmethod
    def fits(weight_shape: Sequence[int], groups: int) -> bool:
        """Whether a layer with filters of this shape is one."""
        single = weight_shape[0] == groups > 1 and weight_shape[1] == 1
        return single and all(n <= 8 for n in weight_shape[2:])

    @classmethod
    def of(
        cls, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
        size: Sequence[int] | None = None,
    ) -> Depthwise:  # fmt: skip
        """Lay out filters ``[C, 1, kernel height, kernel width]``."""
        laid_out = weight[:, 0].permute(1, 2, 0).contiguous()
        return cls(laid_out, tuple(stride), tuple(padding), tuple(dilation), None if size is None else tuple(size))

    def empty(self, x: Tensor) -> Tensor:
        """Memory for the result."""
        size = self.size
        if size is None:
            size = _result_size(x.shape[2:], self.weight.shape[:2], self.stride, self.padding, self.dilation)
        return _images(x.shape[0], x.shape[1], size)

    def run(self, x: Tensor, out: Tensor, then: _Then) -> Tensor:
        assert native.extension is not None
        native.extension.depthwise(
            x.data_ptr(), self.weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[2:], out.shape[2:],
            self.weight.shape[:2], self.stride, self.padding, self.dilation, x.shape[1], self.size is not None, then,
            torch.get_num_threads(),
        )  # fmt: skip
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Direct:
    """A convolution straight from its weight, or the transpose of one.

    Attributes
    ----------
    weight
        What it is made of.
    stride, padding, dilation
        Of height and width.
    size
        Of a transpose: height and width of its result; None: a convolution.
    """

    weight: Filters
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    size: tuple[int, ...] | None = None

    @staticmethod
    def fits(weight_shape: Sequence[int], groups: int) -> bool:
        """Whether a layer with filters of this shape is one."""
        return groups == 1 and len(weight_shape) == 4 and math.prod(weight_shape[2:]) <= 64

    def empty(self, x: Tensor) -> Tensor:
        """Memory for the result."""
        size = self.size
        if size is None:
            size = _result_size(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation)
        return _images(x.shape[0], self.weight.shape[0], size)

    def run(self, x: Tensor, out: Tensor, then: _Then) -> Tensor:
        assert native.extension is not None
        kernel = self.weight.shape[2:]
        taps, threads = math.prod(kernel), torch.get_num_threads()
        most = max(28, 2**20 // (taps * x.shape[1]))  # rows of 4 MB, or of two blocks of registers
        block = min(_PLACES, most, max(1, out.shape[0] * math.prod(out.shape[2:])))
        # Channels that are worked on at a time: a tap's panel then stays in the first-level cache.
        depth = min(256 if taps == 1 else 128 if taps <= 9 else 64, -(-x.shape[1] // 16) * 16)
        rows = block * taps * -(-x.shape[1] // depth) * (depth + _SKEW)
        workspace = floats(threads * (rows + (block + depth) * PANEL))
        native.extension.convolution(
            x.data_ptr(), self.weight.described(), out.data_ptr(), workspace.data_ptr(), x.shape[0], x.shape[2:],
            out.shape[2:], kernel, self.stride, self.padding, self.dilation, self.size is not None, block, depth, then,
            threads,
        )  # fmt: skip
        return out


def _result_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    windows = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + 2 * p - d * (k - 1) - 1) // t + 1 for n, k, t, p, d in windows)


Product = Winograd | Pointwise | Depthwise | Direct


def convolution(layer: Product, x: Tensor, bias: Tensor | None, clamp: Clamp | None = None) -> Tensor:
    """The layer on images ``[N, C, H, W]``, and a clamp, of which a ReLU is one."""
    bias = None if bias is None else bias.float().contiguous()
    return layer.run(_laid_out(x), layer.empty(x), _then(bias, clamp=clamp))


def convolution_add_(out: Tensor, layer: Product, x: Tensor) -> Tensor:
    """Add the layer's result to `out`, which is returned: the same memory where it lies channels-last."""
    return layer.run(_laid_out(x), _laid_out(out), _then(add=True))


def convolution_ratio(
    layer: Product, x: Tensor, bias: Tensor | None, carrier: Tensor | None, message_a: Tensor, message_b: Tensor | None,
    eps: float, out: Tensor | None,
) -> Tensor:  # fmt: skip
    """``carrier * (message_a + message_b) / S(z)`` with the layer's result for z, which is never stored; `out` may be a message."""
    over = out is not None and out.is_contiguous(memory_format=torch.channels_last)
    result = out if out is not None and over else layer.empty(x)
    shape = result.shape
    bias = None if bias is None else bias.float().contiguous()
    by, a, b = (_operand(t, shape) for t in (carrier, message_a, message_b))
    return layer.run(_laid_out(x), result, _then(bias, carrier=by, message_a=a, message_b=b, eps=eps))


def either_convolution(layer: Pointwise, x: Tensor, sign: Tensor) -> Tensor:
    """The result of one of a layer's two weights, see `Pointwise.of_two`; `sign` is of the result's shape."""
    assert layer.by_sign
    return layer.run(_laid_out(x), layer.empty(x), _then(), _laid_out(sign))


def _operand(tensor: Tensor | None, shape: torch.Size) -> Tensor | None:
    if tensor is None:
        return None
    return _laid_out(tensor if tensor.shape == shape else tensor.expand(shape))


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
