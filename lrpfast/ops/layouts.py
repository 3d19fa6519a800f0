"""Layouts: (shape, strides) of the operands to what an elementwise kernel is told.

A kernel numbers elements in the order of memory. That is sound if every operand is dense and orders its dimensions alike;
strides of dimensions of size 1 mean nothing and are left out. Each combination is judged once, then looked up.
"""

import functools
from typing import NamedTuple

import torch

Geometry = tuple[torch.Size, tuple[int, ...]]


class RatioLayout(NamedTuple):
    rows: int
    row_size: int
    carrier_broadcast: bool
    denominator_broadcast: bool


class ChannelLayout(NamedTuple):
    rows: int
    channels: int
    positions: int
    channels_last: bool
    carrier_broadcast: bool


@functools.lru_cache(maxsize=4096)
def ratio_layout(
    message: Geometry,
    out: Geometry | None,
    other: Geometry | None,
    denominator: Geometry,
    carrier: Geometry | None,
) -> RatioLayout | None:
    if not is_dense(message) or any(_broadcast(t, message) is not False for t in (out, other) if t is not None):
        return None
    carrier_broadcast = False if carrier is None else _broadcast(carrier, message)
    denominator_broadcast = _broadcast(denominator, message)
    if carrier_broadcast is None or denominator_broadcast is None:
        return None
    size = message[0].numel()
    if carrier_broadcast or denominator_broadcast:
        rows = message[0][0]
        return RatioLayout(rows, size // max(rows, 1), carrier_broadcast, denominator_broadcast)
    return RatioLayout(1, size, False, False)


@functools.lru_cache(maxsize=4096)
def same_layout(geometries: tuple[Geometry, ...]) -> bool:
    """Whether all operands are dense and number their elements alike."""
    first = geometries[0]
    return is_dense(first) and all(_broadcast(g, first) is False for g in geometries[1:])


@functools.lru_cache(maxsize=4096)
def channel_layout(message: Geometry, carrier: Geometry | None) -> ChannelLayout | None:
    carrier_broadcast = False if carrier is None else _broadcast(carrier, message)
    if carrier_broadcast is None:
        return None
    shape = message[0]
    positions = shape[2:].numel()
    order = _dimension_order(message)
    planes = [d for d in range(len(shape)) if shape[d] > 1]
    neighbours = [d for d in (0, *range(2, len(shape)), 1) if shape[d] > 1]
    if not is_dense(message) or order not in (planes, neighbours):
        return None
    # With a single position, or a single channel, both readings hold, and the one with the longer inner loop is faster.
    channels_last = order != planes or (order == neighbours and positions == 1)
    return ChannelLayout(shape[0], shape[1], positions, channels_last, carrier_broadcast)


def _broadcast(operand: Geometry, message: Geometry) -> bool | None:
    """Whether one row of the operand serves all rows of the message; None if elements are not numbered alike."""
    shape, strides = message
    if operand[0] == shape:
        same = all(a == b for a, b, size in zip(operand[1], strides, shape, strict=True) if size > 1)
        return False if same else None
    if len(operand[0]) != len(shape) or operand[0][0] != 1 or operand[0][1:] != shape[1:]:
        return None
    rows_outermost = strides[0] == shape[1:].numel()
    same = all(a == b for a, b, size in zip(operand[1][1:], strides[1:], shape[1:], strict=True) if size > 1)
    return True if same and rows_outermost else None


def _dimension_order(geometry: Geometry) -> list[int]:
    """Dimensions of more than one element, outermost first."""
    shape, strides = geometry
    return sorted((d for d in range(len(shape)) if shape[d] > 1), key=lambda d: -strides[d])


def is_dense(geometry: Geometry) -> bool:
    """Whether the elements fill a block of memory, each once, in some order of the dimensions."""
    shape, strides = geometry
    expected = 1
    for d in reversed(_dimension_order(geometry)):
        if strides[d] != expected:
            return False
        expected *= shape[d]
    return True
