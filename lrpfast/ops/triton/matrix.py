"""Convolutions and dense layers as matrix products whose epilogue does the step that follows.

A convolution of channels-last images is one product: a row is an output position, a column an output channel, and the sum runs over
taps and input channels (implicit GEMM: no patch is ever written out). A dense layer is a convolution of images of one pixel, a
stride-1 transpose a convolution with flipped weights; so `matrix_kernel` serves all. Where asked it gives ``z`` and ``ẑ`` from one
load of ``x`` and ``W``, the modified weight made on chip. Two more:

- `ratio_dgrad_kernel`: ``Wᵀ(carrier * message / S(Wx + b))`` of a layer of few input channels, where neither the denominator
  nor the ratio reaches memory: the tile of ``x`` stays on chip while the output channels go by, as in attention;
- `depthwise_kernel`: a channel at a time there is nothing to multiply matrices for; it is an elementwise step over taps.

No sum is split between programs: a result does not depend on the batch it came in, and every run gives the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import epilogues
from .language import INTERPRETED, jit, on_device, quotient, wide


class Tiling(NamedTuple):
    """Rows, columns and depth of a program's tile, its warps, and the loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.depth}, {self.warps} warps, {self.stages} stages"


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def _tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile a program computes: neighbours share rows and columns, so that these are read from the L2 cache."""
    band = program // (GROUP * column_tiles)
    first = band * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    inner = program % (GROUP * column_tiles)
    return first + inner % height, inner // height


@jit
def matrix_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, first, second, out, modified_bias, modified_out, rows, outs, channels, row_size, out_row_size,
    weight_out, weight_tap, weight_in, height, width, out_height, out_width, eps, gamma,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    POINTWISE: tl.constexpr, EPILOGUE: tl.constexpr, MODIFY: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`out[row, o] = epilogue(Σ_tap,c x[row at tap, c] weight[o, tap, c] + bias[o])`, one group of channels an axis-1 program.

    Where `modified_out` is given, it takes the product with `MODIFY(weight)`, from the same load of both factors. `channels` and
    `outs` count those of a group, `row_size` and `out_row_size` those of all groups; `LONG`: places need 64 bits.
    """
    group = tl.program_id(1)
    tile_row, tile_column = _tile_of(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(outs, COLUMNS), 8)
    row = (tile_row.to(tl.int64) if LONG else tile_row) * ROWS + tl.arange(0, ROWS)
    column = tile_column * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    own_columns = column < outs
    if POINTWISE:
        top, left, base = row, row, row
    else:
        left = row % out_width * STRIDE_W - PAD_W
        top = row // out_width % out_height * STRIDE_H - PAD_H
        base = row // (out_width * out_height) * height
    x += group * channels
    weight += group * outs * weight_out
    blocks = tl.cdiv(channels, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    modified = total
    for step in range(KERNEL_H * KERNEL_W * blocks):
        tap = step // blocks
        channel = step % blocks * DEPTH + depth
        if POINTWISE:
            place, inside = row, row < rows
        else:
            down, right = top + tap // KERNEL_W * DILATION_H, left + tap % KERNEL_W * DILATION_W
            place = (base + down) * width + right
            inside = (row < rows) & (down >= 0) & (down < height) & (right >= 0) & (right < width)
        own_channels = channel < channels
        tile = tl.load(
            x + place[:, None] * row_size + channel[None, :], inside[:, None] & own_channels[None, :], other=0.0
        )
        at = weight + tap * weight_tap + channel[:, None] * weight_in + column[None, :] * weight_out
        factor = tl.load(at, own_channels[:, None] & own_columns[None, :], other=0.0)
        total = tl.dot(tile, factor, total, input_precision=PRECISION)
        if modified_out is not None:
            changed = MODIFY(wide(factor), gamma).to(factor.dtype)
            modified = tl.dot(tile, changed, modified, input_precision=PRECISION)
    if bias is not None:
        total += wide(tl.load(bias + group * outs + column, own_columns, other=0.0))[None, :]
    inside_out = (row < rows)[:, None] & own_columns[None, :]
    own = row[:, None] * out_row_size + (group * outs + column)[None, :]
    one, two = None, None
    if first is not None:
        one = wide(tl.load(first + own, inside_out, other=0.0))
    if second is not None:
        two = wide(tl.load(second + own, inside_out, other=1.0))
    tl.store(out + own, EPILOGUE(total, one, two, eps).to(out.dtype.element_ty), inside_out)
    if modified_out is not None:
        if modified_bias is not None:
            modified += wide(tl.load(modified_bias + group * outs + column, own_columns, other=0.0))[None, :]
        tl.store(modified_out + own, modified.to(modified_out.dtype.element_ty), inside_out)


@jit
def ratio_dgrad_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, carrier, message, out, rows, outs, channels, eps,
    ZERO_RULE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`out = s @ weight` with `s = carrier * message / S(x @ weightᵀ + bias)`, for `x` `[rows, channels]`, `weight` `[outs, channels]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    own_rows, own_channels = row < rows, channel < channels
    at_x = row[:, None] * channels + channel[None, :]
    tile = tl.load(x + at_x, own_rows[:, None] & own_channels[None, :], other=0.0)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, outs, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        own_columns = column < outs
        at_weight = weight + column[:, None] * channels + channel[None, :]
        factor = tl.load(at_weight, own_columns[:, None] & own_channels[None, :], other=0.0)
        z = tl.dot(tile, tl.trans(factor), input_precision=PRECISION)
        if bias is not None:
            z += wide(tl.load(bias + column, own_columns, other=0.0))[None, :]
        inside = own_rows[:, None] & own_columns[None, :]
        own = row[:, None] * outs + column[None, :]
        q = wide(tl.load(message + own, inside, other=0.0))
        y = None
        if carrier is not None:
            y = wide(tl.load(carrier + own, inside, other=0.0))
        s = quotient(y, q, z, eps, ZERO_RULE)  # outside, a message of 0 over eps, or dropped by ZERO_RULE
        total = tl.dot(s.to(factor.dtype), factor, total, input_precision=PRECISION)
    tl.store(out + at_x, total.to(out.dtype.element_ty), own_rows[:, None] & own_channels[None, :])


@jit
def depthwise_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, first, second, out, rows, channels, height, width, out_height, out_width, eps,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    EPILOGUE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One filter a channel; `weight` is `[KERNEL_H, KERNEL_W, channels]`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    own_rows, own_channels = row < rows, channel < channels
    left = row % out_width * STRIDE_W - PAD_W
    top = row // out_width % out_height * STRIDE_H - PAD_H
    base = row // (out_width * out_height) * height
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            down, right = top + i * DILATION_H, left + j * DILATION_W
            inside = own_rows & (down >= 0) & (down < height) & (right >= 0) & (right < width)
            at = ((base + down) * width + right)[:, None] * channels + channel[None, :]
            value = wide(tl.load(x + at, inside[:, None] & own_channels[None, :], other=0.0))
            factor = wide(tl.load(weight + (i * KERNEL_W + j) * channels + channel, own_channels, other=0.0))
            total += value * factor[None, :]
    if bias is not None:
        total += wide(tl.load(bias + channel, own_channels, other=0.0))[None, :]
    inside_out = own_rows[:, None] & own_channels[None, :]
    own = row[:, None] * channels + channel[None, :]
    one, two = None, None
    if first is not None:
        one = wide(tl.load(first + own, inside_out, other=0.0))
    if second is not None:
        two = wide(tl.load(second + own, inside_out, other=1.0))
    tl.store(out + own, EPILOGUE(total, one, two, eps).to(out.dtype.element_ty), inside_out)


# ---- Launchers -------------------------------------------------------------------------------------------------------

EPILOGUES: dict[str, Any] = {
    name: getattr(epilogues, name)
    for name in ("plain", "relu", "add_relu", "ratio", "zero_ratio", "message_ratio", "relevance")
}
MODIFICATIONS: dict[str, Any] = {name: getattr(epilogues, name) for name in ("positive", "favoured")}

_INTERPRETED = Tiling(32, 32, 32, 4, 1)  # small: the interpreter's time goes by the number of operations


def tilings(
    rows: int, outs: int, channels: int, element_size: int, capability: int = 90, epilogue: str = "plain",
    pair: bool = False,
) -> list[Tiling]:  # fmt: skip
    """The tilings worth timing for a product, the likeliest first; none of them spills registers.

    Parameters
    ----------
    rows, outs, channels
        Sizes of the result, and of the sum for one tap.
    element_size
        Bytes of an operand's element.
    capability
        The GPU's, as in sm_90. Before Hopper operands of a tensor-core instruction lie in registers, which two
        accumulators leave less room for.
    epilogue
        What it reads lies in registers beside the result.
    pair
        Whether the modified weight's product is made as well.
    """
    depth = 128 // element_size  # a row of 128 bytes: what the tensor cores' shared-memory layout swizzles
    shapes = [(128, 128, 8), (64, 128, 8), (128, 64, 8), (64, 64, 8 if pair or epilogue == "message_ratio" else 4)]
    if epilogue == "message_ratio":
        shapes = shapes[2:]
    if epilogue in ("ratio", "zero_ratio") and (capability < 90 or element_size == 4):
        shapes.remove((128, 128, 8))
    if pair and capability < 90:
        shapes = [s for s in shapes if s[0] == 64]
    if capability >= 90 and not pair and epilogue in ("plain", "relu") and outs >= 256 and element_size == 2:
        shapes.insert(1, (128, 256, 8))
    if outs <= 64:
        shapes = [s for s in shapes if s[1] <= 64]
    if rows <= 64:
        shapes = [s for s in shapes if s[0] <= 64]
    found = []
    for tile_rows, columns, warps in shapes:
        stages = max(2, min(4, _SHARED // ((tile_rows + columns) * depth * element_size)))
        found.append(Tiling(tile_rows, columns, max(16, min(depth, triton.next_power_of_2(channels))), warps, stages))
    return found


_SHARED = 160 * 1024  # bytes of shared memory that the tiles in flight may take; an A100 has 163 KiB a block


def largest_kept(dtype: torch.dtype) -> int:
    """Input channels of a layer that `ratio_dgrad` takes, at most: of 512 bytes a tile stays on chip without spilling registers."""
    return 512 // dtype.itemsize


def kept_tiling(channels: int, element_size: int, capability: int = 90) -> Tiling:
    """The tiling of `ratio_dgrad`: its depth is all channels, and no registers spill."""
    depth = max(16, triton.next_power_of_2(channels))
    room = 2 if capability >= 90 else 1
    size = depth * element_size
    return Tiling(128 if size <= 256 * room else 64, 64 if size <= 128 * room else 32, depth, 8, 2)


def capability_of(tensor: Tensor) -> int:
    """The compute capability of a tensor's GPU, as in sm_90."""
    major, minor = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
    return 10 * major + minor


def precision(x: Tensor, dense: bool) -> str:
    """What float32 products are computed in: TF32 where torch's own would be."""
    own = torch.backends.cuda.matmul if dense else torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if x.dtype is torch.float32 and own.fp32_precision == "tf32" else "ieee"


class _Geometry(NamedTuple):
    """Sizes and windows of a convolution as kernels take them."""

    size: tuple[int, int]
    out_size: tuple[int, int]
    windows: tuple[int, ...]  # kernel, stride, padding, dilation: two each
    pointwise: bool


@functools.lru_cache(maxsize=4096)
def _geometry(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> _Geometry:  # fmt: skip
    windows = zip(size, kernel, stride, padding, dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // t + 1 for n, k, t, p, d in windows)
    pointwise = kernel == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    return _Geometry(size, (height, width), (*kernel, *stride, *padding, *dilation), pointwise)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _as_images(tensor: Tensor | None) -> Tensor | None:
    """A dense layer's `[N, C]` as images of one pixel; images channels-last."""
    if tensor is None:
        return None
    return _channels_last(tensor[:, :, None, None] if tensor.dim() == 2 else tensor)


def _weight_strides(weight: Tensor) -> tuple[int, int, int]:
    """Between outputs, taps and inputs of a weight `[O, I, H, W]` whose taps follow one another."""
    _, _, height, width = weight.shape
    tap = weight.stride(3) if width > 1 else weight.stride(2)
    assert height == 1 or width == 1 or weight.stride(2) == width * tap
    return weight.stride(0), tap, weight.stride(1)


def _tap_order(weight: Tensor) -> Tensor:
    """A weight as the kernels read it: any for one tap, else channels innermost."""
    if weight.dim() == 2:
        return weight[:, :, None, None]
    return weight if weight.shape[2:].numel() == 1 else _channels_last(weight)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, second: Tensor | None, out: Tensor,
    modified_bias: Tensor | None, modified_out: Tensor | None, geometry: _Geometry, groups: int, eps: float,
    gamma: float, epilogue: str, modify: str | None, tiling: Tiling | None, dense: bool,
) -> None:  # fmt: skip
    batch, row_size = x.shape[:2]
    outs, channels = weight.shape[0] // groups, weight.shape[1]
    rows = batch * geometry.out_size[0] * geometry.out_size[1]
    pair = modified_out is not None
    usual = tilings(rows, outs, channels, x.element_size(), capability_of(x), epilogue, pair)[0]
    own = _INTERPRETED if INTERPRETED else tiling or usual
    if not out.numel():
        return
    with on_device(x):
        matrix_kernel[(-(-rows // own.rows) * -(-outs // own.columns), groups)](
            x, weight, bias, first, second, out, modified_bias, modified_out, rows, outs, channels, row_size,
            out.shape[1], *_weight_strides(weight), *geometry.size, *geometry.out_size, eps, gamma,
            *geometry.windows, geometry.pointwise, EPILOGUES[epilogue], MODIFICATIONS.get(modify or "", epilogues.as_is),
            precision(x, dense), max(x.numel(), out.numel(), weight.numel()) >= 2**31, own.rows, own.columns, own.depth,
            num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip


def _launch_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor | None, second: Tensor | None, out: Tensor,
    geometry: _Geometry, eps: float, epilogue: str,
) -> None:  # fmt: skip
    channels = x.shape[1]
    rows = x.shape[0] * geometry.out_size[0] * geometry.out_size[1]
    width = min(triton.next_power_of_2(channels), 64)
    tile = 1024 // width
    if not out.numel():
        return
    with on_device(x):
        depthwise_kernel[(-(-rows // tile), -(-channels // width))](
            x, weight.permute(2, 3, 1, 0).contiguous(), bias, first, second, out, rows, channels, *geometry.size,
            *geometry.out_size, eps, *geometry.windows, EPILOGUES[epilogue], tile, width, num_warps=4,
        )  # fmt: skip


# ---- Operators -------------------------------------------------------------------------------------------------------


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1), groups: int = 1, epilogue: str = "plain", first: Tensor | None = None,
    second: Tensor | None = None, eps: float = 0.0, tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """A convolution of images, or a dense layer, and the step that follows it.

    Parameters
    ----------
    x, weight
        `[N, C, H, W]` and `[O, C / groups, kh, kw]`, or `[N, C]` and `[O, C]`: of one dtype.
    epilogue
        A name of `EPILOGUES`; `first`, `second` and `eps` are its operands, of the result's shape.
    tiling
        How the product is cut into programs; None for a guess.

    Returns
    -------
    Tensor
        `[N, O, H', W']` channels-last, or `[N, O]`, of x's dtype.
    """
    images, one, two = _as_images(x), _as_images(first), _as_images(second)
    assert images is not None
    own_weight = _tap_order(weight)
    geometry = _geometry(
        tuple(images.shape[2:]), tuple(own_weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation)
    )
    out = _empty(images, weight.shape[0], geometry)
    if groups == images.shape[1] == weight.shape[0] and groups > 1:
        _launch_depthwise(images, own_weight, bias, one, two, out, geometry, eps, epilogue)
    else:
        _launch(images, own_weight, bias, one, two, out, None, None, geometry, groups, eps, 0.0, epilogue, None, tiling,
                x.dim() == 2)  # fmt: skip
    return out.flatten(1) if x.dim() == 2 else out


def convolution_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, modified_bias: Tensor | None, stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), groups: int = 1, modify: str = "positive",
    gamma: float = 0.0, epilogue: str = "plain", tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`convolution` with the weight and with the modified weight, from one load of both factors.

    `modify` names one of `MODIFICATIONS`: "positive", W⁺; "favoured", `W + gamma W⁺`. The epilogue is the first result's.
    """
    images = _as_images(x)
    assert images is not None
    own_weight = _tap_order(weight)
    geometry = _geometry(
        tuple(images.shape[2:]), tuple(own_weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation)
    )
    out, modified = (_empty(images, weight.shape[0], geometry) for _ in range(2))
    _launch(images, own_weight, bias, None, None, out, modified_bias, modified, geometry, groups, 0.0, gamma, epilogue,
            modify, tiling, x.dim() == 2)  # fmt: skip
    return (out.flatten(1), modified.flatten(1)) if x.dim() == 2 else (out, modified)


def _empty(x: Tensor, outs: int, geometry: _Geometry) -> Tensor:
    size = (x.shape[0], outs, *geometry.out_size)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def ratio_dgrad(
    x: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor | None, message: Tensor, eps: float,
    tiling: Tiling | None = None,
) -> Tensor:  # fmt: skip
    """`Wᵀ(carrier * message / S(Wx + b))` of a 1 x 1 convolution or dense layer of at most `largest_kept` input channels.

    `x` is `[N, C, H, W]` or `[N, C]`, `weight` `[O, C(, 1, 1)]`, `carrier` and `message` are of the layer's output's shape. Neither
    the denominator nor the ratio is written to memory. With `eps` 0 the ratio is 0 where the denominator is (LRP-0).
    """
    images, y, q = _as_images(x), _as_images(carrier), _as_images(message)
    assert images is not None
    outs, channels = weight.shape[:2]
    most = largest_kept(x.dtype)
    if channels > most:
        raise ValueError(f"ratio_dgrad: {channels} input channels are more than the {most} that are kept on chip")
    out = torch.empty_like(images)
    rows = images.numel() // max(channels, 1)
    own = tiling or kept_tiling(channels, x.element_size(), capability_of(x))
    if INTERPRETED:
        own = _INTERPRETED._replace(depth=own.depth)
    if out.numel():
        with on_device(x):
            ratio_dgrad_kernel[(-(-rows // own.rows),)](
                images, weight.reshape(outs, channels).contiguous(), bias, y, q, out, rows, outs, channels, eps, eps == 0,
                precision(x, x.dim() == 2), own.rows, own.columns, own.depth, num_warps=own.warps, num_stages=own.stages,
            )  # fmt: skip
    return out.flatten(1) if x.dim() == 2 else out


def dense_dgrad(s: Tensor, weight: Tensor) -> Tensor:
    """`s @ weight` for `s` `[N, O]` and a dense layer's weight `[O, I]`."""
    return convolution(s, weight.t(), None)
