"""Sums over channels: one pass, the channels of a group summed in float32 in a fixed order.

Channels-last, a program takes some rows of one group, whose channels are neighbours; otherwise neighbouring positions of one
group, whose channels are planes apart.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lrpfast.ops import reference
from lrpfast.ops.layouts import channel_layout

from .language import jit, on_device, take, wide

_TILE = 4096  # elements that a program holds at a time

# ---- Kernel ----------------------------------------------------------------------------------------------------------


@jit
def channel_sum_kernel(  # type: ignore[no-untyped-def]
    carrier, message, out, images, positions, channels, groups, own_channels,
    CHANNELS_LAST: tl.constexpr, CARRIER_ROW: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`out[n, g, p] = Σ_c carrier * message` over the `own_channels` of group g."""
    group = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    image, position = place // positions, place % positions
    there = place < images * positions
    total = tl.zeros((PLACES,), tl.float32)
    for first in range(0, own_channels, CHANNELS):
        own = first + tl.arange(0, CHANNELS)
        channel = group * own_channels + own
        place_step, channel_step = (channels, 1) if CHANNELS_LAST else (1, positions)
        at = position[:, None] * place_step + channel[None, :] * channel_step
        inside = there[:, None] & (own < own_channels)[None, :]
        row = image[:, None] * (positions * channels)
        terms = wide(tl.load(message + row + at, inside, other=0.0))
        if carrier is not None:
            terms *= wide(tl.load(carrier + (at if CARRIER_ROW else row + at), inside, other=0.0))
        total += tl.sum(terms, 1)
    tl.store(out + (image * groups + group) * positions + position, total.to(out.dtype.element_ty), there)


# ---- Operator --------------------------------------------------------------------------------------------------------


def channel_sum(carrier: Tensor | None, message: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Sum of `carrier * message` over the channels of each group; see `reference.channel_sum`."""
    if out is None:
        out = message.new_empty((message.shape[0], groups, *message.shape[2:]))
    layout = channel_layout(
        (message.shape, message.stride()), None if carrier is None else (carrier.shape, carrier.stride())
    )
    fits = layout is not None and take(carrier, message, out) and out.dtype == message.dtype and out.is_contiguous()
    if not fits or layout is None:
        return reference.channel_sum(carrier, message, groups, out=out)
    if out.numel():
        own = layout.channels // groups
        width = min(triton.next_power_of_2(own), 256 if layout.channels_last else 16)
        places = _TILE // width if layout.channels_last else 256
        places = min(places, 256, triton.next_power_of_2(layout.rows * layout.positions))
        with on_device(message):
            channel_sum_kernel[(-(-layout.rows * layout.positions // places), groups)](
                carrier, message, out, layout.rows, layout.positions, layout.channels, groups, own, layout.channels_last,
                layout.carrier_broadcast, places, width, num_warps=4,
            )  # fmt: skip
    return out
