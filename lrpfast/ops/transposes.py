"""The transposes of convolution and pooling as operators of the joint program.

Torch computes them fastest with operators that were made for training (`convolution_backward` and the pools' backwards),
which have no ONNX form. So the joint program names the transpose itself, and each rendering takes its own form: `fast_*` is
what the executor runs, `portable_*` is made of operations that every exporter knows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

aten = torch.ops.aten
_LIBRARY = torch.library.Library("lrpfast", "FRAGMENT")  # kept: the declarations go when this object goes


def fast_conv_dgrad(
    s: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """The transpose of a convolution applied to `s`: `[N, C_out, *]` to `[N, C_in, *size]`."""
    shape = (s.shape[0], weight.shape[1] * groups, *size)
    return aten.convolution_backward(
        s, _shape_carrier(s, shape), weight, None, stride, padding, dilation, False, [0] * len(size), groups,
        [True, False, False],
    )[0]  # fmt: skip


def _shape_carrier(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Memory of a shape that is never read: torch's backward operators ask their forward's input for nothing else."""
    if like.dim() == 4 and _channels_last(like):
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)
    return like.new_empty(shape, dtype=dtype)


def _channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def fits_plain_convolution(
    weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether the transpose of a convolution is a plain convolution: stride 1, and no more padding than the kernel's reach."""
    reach = [d * (k - 1) for d, k in zip(dilation, weight_shape[2:], strict=True)]
    return all(t == 1 for t in stride) and all(r >= p for r, p in zip(reach, padding, strict=True))


def flipped_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight of that convolution: input and output channels exchanged within each group, taps in reverse."""
    by_group = weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
    return by_group.flip(list(range(2, weight.dim())))


def portable_conv_dgrad(
    s: Tensor, weight: Tensor, size: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> Tensor:
    """As a plain convolution with flipped weights for stride 1, else as a transposed convolution."""
    dims = len(size)
    if fits_plain_convolution(weight.shape, stride, padding, dilation, groups):
        inverse = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        flipped = flipped_weight(weight, groups)
        return aten.convolution(s, flipped, None, stride, inverse, dilation, False, [0] * dims, groups)
    rest = left_over(size, s.shape[2:], weight.shape[2:], stride, padding, dilation)
    return aten.convolution(s, weight, None, stride, padding, dilation, True, rest, groups)


def left_over(
    size: Sequence[int], out: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:  # fmt: skip
    """What a convolution's input is larger by, in each dimension, than its windows reach: the transpose's output padding."""
    windows = zip(size, out, kernel, stride, padding, dilation, strict=True)
    return [n - ((m - 1) * t - 2 * p + d * (k - 1) + 1) for n, m, k, t, p, d in windows]


def fast_max_pool_dgrad(
    q: Tensor, indices: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil: bool,
) -> Tensor:  # fmt: skip
    """Route each value of a pooled map to the input that won: `indices` count positions of the input's plane."""
    if len(kernel) != 2:
        return portable_max_pool_dgrad(q, indices, size, kernel, stride, padding, dilation, ceil)
    carrier = _shape_carrier(indices, (*q.shape[:2], *size), q.dtype)
    return aten.max_pool2d_with_indices_backward(q, carrier, kernel, stride, padding, dilation, ceil, indices)


def portable_max_pool_dgrad(
    q: Tensor, indices: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], ceil: bool,
) -> Tensor:  # fmt: skip
    """As a scatter-add into the flattened planes."""
    count = 1
    for n in size:
        count *= n
    planes = q.new_zeros((q.shape[0], q.shape[1], count))
    return planes.scatter_add(2, indices.flatten(2), q.flatten(2)).unflatten(2, size)


def fast_avg_pool_dgrad(
    t: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], ceil: bool, include: bool,
    divisor: int | None, rows: Tensor, columns: Tensor,
) -> Tensor:  # fmt: skip
    """The transpose of average pooling: each value spread over its window."""
    carrier = _shape_carrier(t, (*t.shape[:2], *size))
    return aten.avg_pool2d_backward(t, carrier, kernel, stride, padding, ceil, include, divisor)


def portable_avg_pool_dgrad(
    t: Tensor, size: list[int], kernel: list[int], stride: list[int], padding: list[int], ceil: bool, include: bool,
    divisor: int | None, rows: Tensor, columns: Tensor,
) -> Tensor:  # fmt: skip
    """As two matrix products: the pool is `rows @ x @ columnsᵀ`."""
    return torch.matmul(torch.matmul(rows.t(), t), columns)


def _layout(like: Tensor) -> torch.memory_format:
    """The layout of a result, by its operand's strides alone, so that a fake tensor tells the same as a real one."""
    images = like.dim() == 4 and like.shape[1] > 1 and like.stride(1) == 1
    return torch.channels_last if images else torch.contiguous_format


def _dgrad_shape(s, weight, size, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
    return s.new_empty((s.shape[0], weight.shape[1] * groups, *size)).contiguous(memory_format=_layout(s))


def _plane_shape(q, indices, size, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty((*q.shape[:2], *size)).contiguous(memory_format=_layout(q))


def _pool_shape(t, size, *rest):  # type: ignore[no-untyped-def]
    return t.new_empty((*t.shape[:2], *size)).contiguous(memory_format=_layout(t))


def _laid_out(fast: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What the dispatcher calls: torch's own backward operators lay out their results by their weights too."""

    def run(operand: Tensor, *rest: object) -> Tensor:
        return fast(operand, *rest).contiguous(memory_format=_layout(operand))

    return run


TRANSPOSES: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv_dgrad": (
        "(Tensor s, Tensor weight, int[] size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor",
        fast_conv_dgrad, portable_conv_dgrad, _dgrad_shape,
    ),
    "max_pool_dgrad": (
        "(Tensor q, Tensor indices, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil)"
        " -> Tensor",
        fast_max_pool_dgrad, portable_max_pool_dgrad, _plane_shape,
    ),
    "avg_pool_dgrad": (
        "(Tensor t, int[] size, int[] kernel, int[] stride, int[] padding, bool ceil, bool include, int? divisor,"
        " Tensor rows, Tensor columns) -> Tensor",
        fast_avg_pool_dgrad, portable_avg_pool_dgrad, _pool_shape,
    ),
}  # fmt: skip

for _name, (_signature, _fast, _portable, _shape) in TRANSPOSES.items():
    _LIBRARY.define(_name + _signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lrpfast::{_name}", _shape, lib=_LIBRARY)
    _LIBRARY.impl(_name, _laid_out(_fast), "CompositeExplicitAutograd")
