"""Pooling of channels-last images: the maximum with the place of the winner, and the ways back of maximum and average.

As in C++ the winner is the number of its tap, one byte a window, and the ways back gather: each input position sums what the
windows that cover it send there. So nothing is zeroed beforehand, nothing is added by two programs, and every run gives the same
bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrpfast.ops import transposes

from .language import jit, on_device, takes, wide

_TILE = 1024  # elements that a program holds

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def max_pool_kernel(  # type: ignore[no-untyped-def]
    x, y, winners, places, height, width, out_height, out_width, channels,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """As in torch the first of equals wins, and a NaN over all."""
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    column, row, image = place % out_width, place // out_width % out_height, place // (out_width * out_height)
    there = (place < places)[:, None] & (channel < channels)[None, :]
    best = tl.full((PLACES, CHANNELS), float("-inf"), tl.float32)
    winner = tl.full((PLACES, CHANNELS), -1, tl.int32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            top, left = row * STRIDE_H - PAD_H + i * DILATION_H, column * STRIDE_W - PAD_W + j * DILATION_W
            within = (top >= 0) & (top < height) & (left >= 0) & (left < width)
            at = ((image * height + top) * width + left)[:, None] * channels + channel[None, :]
            value = wide(tl.load(x + at, there & within[:, None], other=0.0))
            wins = within[:, None] & ((value > best) | (value != value) | (winner < 0))
            best = tl.where(wins, value, best)
            winner = tl.where(wins, i * KERNEL_W + j, winner)
    own = place[:, None] * channels + channel[None, :]
    tl.store(y + own, best.to(y.dtype.element_ty), there)
    tl.store(winners + own, winner.to(tl.uint8), there)


@jit
def pool_dgrad_kernel(  # type: ignore[no-untyped-def]
    message, winners, out, places, height, width, out_height, out_width, channels, divisor,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    COUNT_PADDING: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`out` has the size of the pool's input; `winners` is None for an average, whose divisor is `divisor` unless that is 0."""
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    column, row, image = place % width, place // width % height, place // (width * height)
    there = (place < places)[:, None] & (channel < channels)[None, :]
    total = tl.zeros((PLACES, CHANNELS), tl.float32)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            down, right = row + PAD_H - i * DILATION_H, column + PAD_W - j * DILATION_W
            window_row, window_column = down // STRIDE_H, right // STRIDE_W
            sends = (down >= 0) & (down % STRIDE_H == 0) & (window_row < out_height)
            sends = sends & (right >= 0) & (right % STRIDE_W == 0) & (window_column < out_width)
            at = ((image * out_height + window_row) * out_width + window_column)[:, None] * channels + channel[None, :]
            inside = there & sends[:, None]
            sent = wide(tl.load(message + at, inside, other=0.0))
            if winners is not None:
                won = tl.load(winners + at, inside, other=255) == i * KERNEL_W + j
                total += tl.where(inside & won, sent, 0.0)
            else:
                start_row, start_column = window_row * STRIDE_H - PAD_H, window_column * STRIDE_W - PAD_W
                end_row = tl.minimum(start_row + KERNEL_H, height + PAD_H)
                end_column = tl.minimum(start_column + KERNEL_W, width + PAD_W)
                if COUNT_PADDING:
                    count = (end_row - start_row) * (end_column - start_column)
                else:
                    rows = tl.minimum(end_row, height) - tl.maximum(start_row, 0)
                    count = rows * (tl.minimum(end_column, width) - tl.maximum(start_column, 0))
                share = tl.where(sends, tl.where(divisor != 0, divisor, count), 1).to(tl.float32)
                total += tl.div_rn(sent, tl.broadcast_to(share[:, None], (PLACES, CHANNELS)))
    tl.store(out + place[:, None] * channels + channel[None, :], total.to(out.dtype.element_ty), there)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _tile(channels: int) -> tuple[int, int]:
    """Places and channels of a program: channels are neighbours in memory."""
    width = min(triton.next_power_of_2(channels), 128)
    return _TILE // width, width


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Windows along one dimension, as torch counts them: none begins in the padding behind the last value."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _pool_dgrad(
    message: Tensor, winners: Tensor | None, size: list[int], kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], divisor: int, count_padding: bool,
) -> Tensor:  # fmt: skip
    message = message.contiguous(memory_format=torch.channels_last)
    out = message.new_empty((*message.shape[:2], *size)).contiguous(memory_format=torch.channels_last)
    batch, channels = message.shape[:2]
    places, width = _tile(channels)
    count = batch * size[0] * size[1]
    if out.numel():
        with on_device(out):
            pool_dgrad_kernel[(-(-count // places), -(-channels // width))](
                message, winners, out, count, *size, *message.shape[2:], channels, divisor, *kernel, *(stride or kernel),
                *padding, *dilation, count_padding, places, width, num_warps=4,
            )  # fmt: skip
    return out


# ---- Operators -------------------------------------------------------------------------------------------------------


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> tuple[Tensor, Tensor]:
    """Max pooling of images: the maxima, and one byte a window that says which tap won, as `max_pool_dgrad` takes it.

    `x` is `[N, C, H, W]`; the results lie channels-last. As in torch the first of equals wins, and a NaN over all.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    stride = stride or kernel
    batch, channels, *size = x.shape
    windows = zip(size, kernel, stride, padding, dilation, strict=True)
    out_size = [_windows(n, k, t, p, d, ceil) for n, k, t, p, d in windows]
    y = x.new_empty((batch, channels, *out_size)).contiguous(memory_format=torch.channels_last)
    winners = torch.empty_like(y, dtype=torch.uint8)
    places, width = _tile(channels)
    count = batch * out_size[0] * out_size[1]
    if y.numel():
        with on_device(x):
            max_pool_kernel[(-(-count // places), -(-channels // width))](
                x, y, winners, count, *size, *out_size, channels, *kernel, *stride, *padding, *dilation, places, width,
                num_warps=4,
            )  # fmt: skip
    return y, winners


def max_pool_dgrad(
    q: Tensor, winners: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil: bool,
) -> Tensor:  # fmt: skip
    """Each value of a pooled map at the place that won, zero elsewhere; `winners` is that of `max_pool`."""
    return _pool_dgrad(q, winners, size, kernel, stride, padding, dilation, 0, False)


def avg_pool_dgrad(
    t: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], ceil: bool, include: bool,
    divisor: int | None, rows: Tensor, columns: Tensor,
) -> Tensor:  # fmt: skip
    """The transpose of average pooling; see `transposes.fast_avg_pool_dgrad`."""
    if t.dim() != 4 or not takes(t):
        return transposes.fast_avg_pool_dgrad(t, size, kernel, stride, padding, ceil, include, divisor, rows, columns)
    return _pool_dgrad(t, None, size, kernel, stride, padding, [1, 1], divisor or 0, include)
