"""3 x 3 convolutions of stride 1 by Winograd's minimal filtering, F(2 x 2, 3 x 3), in C++ (csrc/winograd_cpu.h).

It takes 4 / 9 of the multiplications of the direct form, twice the speed on large layers, and rounds no worse: sums are nine times
shorter. Larger tiles, which would save more, lose digits and are not offered. A value of the result depends on its own window alone,
in rounding errors too, so that a window of zeros gives zero exactly. Infinities may come out as NaN.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrpfast.ops import native

# Tiles, and filters, that are worked on at a time: products stay in the second-level cache, inputs near it.
_BLOCK, _CHUNK = 56, 128
_PANEL = 32  # filters, in the transformed weight's innermost dimension


def fits(x: Tensor, weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
         groups: int) -> bool:  # fmt: skip
    """Whether `convolution` computes this layer. `x` may be a fake tensor; sizes behind dimension 0 are plain numbers."""
    plain = [*weight_shape[2:]] == [3, 3] and [*stride, *dilation, groups] == [1] * 5
    if not plain or not native.takes(x) or x.dtype is not torch.float32 or not all(0 <= p <= 2 for p in padding):
        return False
    filters, channels = weight_shape[:2]
    out_size = [int(n) + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    return filters % _PANEL == 0 and channels % 16 == 0 and min(out_size) >= 2


def is_fast() -> bool:
    """Whether the processor has fused multiply-adds, so that it can be expected to win over oneDNN's direct form."""
    return native.extension is not None and native.extension.cpu_capability() != "default"


def transformed_weight(weight: Tensor) -> Tensor:
    """G g Gᵀ of each filter `[K, C, 3, 3]`, by way of float64: `[16, K / 32, C, 32]` in float32."""
    filters, channels = weight.shape[:2]
    rows = _transform(weight.double(), 2)
    both = _transform(rows, 3)
    return both.permute(2, 3, 0, 1).reshape(16, filters // _PANEL, _PANEL, channels).mT.float().contiguous()


def _transform(g: Tensor, dim: int) -> Tensor:
    first, middle, last = g.unbind(dim)
    outer = first + last
    return torch.stack([first, (outer + middle) / 2, (outer - middle) / 2, last], dim)


def convolution(x: Tensor, transformed: Tensor, bias: Tensor | None, padding: Sequence[int], relu: bool) -> Tensor:
    """The convolution of images `[N, C, H, W]` with `transformed_weight`'s filters, and a ReLU; channels-last."""
    size = [n + 2 * p - 2 for n, p in zip(x.shape[2:], padding, strict=True)]
    out = torch.empty((x.shape[0], transformed.shape[1] * _PANEL, *size), memory_format=torch.channels_last)
    return _run(x, transformed, bias, padding, out, add=False, relu=relu)


def convolution_add_(out: Tensor, x: Tensor, transformed: Tensor, padding: Sequence[int]) -> Tensor:
    """Add the convolution to `out`, which is returned: the same memory where it lies channels-last."""
    out = out.contiguous(memory_format=torch.channels_last)
    return _run(x, transformed, None, padding, out, add=True, relu=False)


def _run(
    x: Tensor, transformed: Tensor, bias: Tensor | None, padding: Sequence[int], out: Tensor, add: bool, relu: bool
) -> Tensor:
    assert native.extension is not None
    x = x.contiguous(memory_format=torch.channels_last)
    channels, filters = x.shape[1], out.shape[1]
    chunk = min(_CHUNK, filters)
    threads = torch.get_num_threads()
    workspace = torch.empty(threads * 16 * _BLOCK * (channels + chunk + 32))
    native.extension.winograd(
        x.data_ptr(), transformed.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), workspace.data_ptr(),
        x.shape[0], x.shape[2:], out.shape[2:], padding, channels, filters, _BLOCK, chunk, add, relu, threads,
    )  # fmt: skip
    return out
