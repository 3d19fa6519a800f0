"""Weights of convolutions said by what they are made of: a tensor that is there anyway, most often the model's own parameter.

What a program derives from a parameter, a batch norm folded into it and its positive part taken, is cheap to make while a weight is
laid out for a kernel (csrc/filters_cpu.h). So a weight too large to be kept in several forms is made at each call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from lrpfast.ops import native
from lrpfast.ops.reference import Scales

PANEL = 32  # filters, in the innermost dimension of a weight that is laid out

# FilterArguments of csrc/ops.h, pointers as numbers.
_Described = tuple[int, int, int, list[int], int, int, int, bool, Scales]


def floats(*size: int) -> Tensor:
    """Memory that kernels write float32 to, whatever torch's default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


@dataclasses.dataclass(frozen=True, eq=False)
class Filters:
    """The weight of a convolution, or that of its transpose.

    Attributes
    ----------
    weight
        ``[K, C, height, width]``, float32, strided as it may be.
    factors
        ``[2, K rounded up to a multiple of 32]``, float32: of each filter, the sum of the two; None: 1. The product rounds once.
    scales
        Of the positive values of that product, and of all others.
    transposed
        Whether the layer is the transpose: inputs for outputs.
    """

    weight: Tensor
    factors: Tensor | None = None
    scales: Scales = (1.0, 1.0)
    transposed: bool = False

    @classmethod
    def of(cls, weight: Tensor, factors: Tensor) -> Filters:
        """Filters with a factor each, ``[K]``."""
        exact = torch.nn.functional.pad(factors.double(), (0, -len(factors) % PANEL))
        return cls(weight, torch.stack([exact.float(), (exact - exact.float()).nan_to_num(0.0, 0.0, 0.0).float()]))

    @property
    def shape(self) -> Sequence[int]:
        """Of the layer's own filters: how many, how many channels, height and width."""
        filters, channels, *taps = self.weight.shape
        return (channels, filters, *taps) if self.transposed else (filters, channels, *taps)

    def transformed(self, strided: bool = False) -> Tensor:
        """G g Gᵀ of each filter, ``[16, K / 32, C, 32]``, see `lrpfast.ops.products.Winograd`; of 3 x 3 filters, K a multiple of 32
        and C of 16, for stride 1 or 2. Those of a transpose have their taps in reverse, so that with stride 1 it is a convolution."""
        assert native.extension is not None
        filters, channels = self.shape[:2]
        out = floats(16, filters // PANEL, channels, PANEL)
        described = self.described(self.transposed)
        native.extension.winograd_filters(described, out.data_ptr(), strided, torch.get_num_threads())
        return out

    def described(self, reversed_taps: bool = False) -> _Described:
        """What kernels take; it must not outlive the filters."""
        filter_stride, channel_stride, *taps = self.weight.stride()
        first = self.weight.data_ptr()
        if self.transposed:
            filter_stride, channel_stride = channel_stride, filter_stride
        if reversed_taps:
            last = (t * (n - 1) for t, n in zip(taps, self.weight.shape[2:], strict=True))
            first += self.weight.element_size() * sum(last)
            taps = [-t for t in taps]
        factors = 0 if self.factors is None else self.factors.data_ptr()
        filters, channels = self.shape[:2]
        return first, filter_stride, channel_stride, taps, filters, channels, factors, self.transposed, self.scales
