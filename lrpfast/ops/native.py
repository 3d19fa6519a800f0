"""Every fused operator in C++ (lrpfast._C), for float32 and bfloat16 on the CPU.

The extension takes pointers and trusts them, so what may be handed to it is decided here: dtypes, devices, and that all
operands number their elements alike. Whatever it cannot take, the reference computes. Layouts are judged once for each
combination of shapes and strides met, then looked up.
"""

import ctypes
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import reference, transposes
from .layouts import channel_layout, ratio_layout, same_layout
from .reference import Scales

# Samples up to which a dense layer takes the time of reading its weight, whatever is computed from it; and up to which its
# transpose does. torch reads it slower than memory gives it.
FEW_SAMPLES, _FEW_MESSAGES = 4, 16

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason why it is not there."""
    try:
        from lrpfast import _C
    except ImportError as error:
        return None, f"the extension lrpfast._C does not load: {error}"
    limit = os.environ.get("LRPFAST_CPU_CAPABILITY")
    if limit and not _C.limit_cpu_capability(limit):
        warnings.warn(
            f"LRPFAST_CPU_CAPABILITY={limit!r} is none of 'default', 'avx2', 'avx512', 'avx512_bf16' and is ignored",
            RuntimeWarning,
            stacklevel=2,
        )
    return _C, ""


def _bind_openmp(extension: ModuleType) -> str:
    """Hand torch's own OpenMP runtime to the extension; a reason if that cannot be done (it then runs in one thread).

    The handle of torch's extension module finds the copy that torch is linked to, under whatever name it was shipped.
    """
    try:
        torch_library = ctypes.CDLL(torch._C.__file__)
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        addresses = [ctypes.cast(getattr(torch_library, name), ctypes.c_void_p).value for name in names]
    except (OSError, AttributeError) as error:
        return f"torch's OpenMP runtime was not found, C++ operators run in one thread: {error}"
    extension.bind_openmp(*addresses)
    return ""


extension, why_unavailable = _load()
why_single_thread = _bind_openmp(extension) if extension is not None else why_unavailable


def ratio(
    carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """`carrier * message / S(denominator)`; see `reference.ratio`."""
    if out is None:
        out = torch.empty_like(message)
    if not _ratio(carrier, message, None, denominator, eps, out):
        return reference.ratio(carrier, message, denominator, eps, out=out)
    return out


def ratio_sum(
    carrier: Tensor | None,
    message_a: Tensor,
    message_b: Tensor,
    denominator: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """`carrier * (message_a + message_b) / S(denominator)`; see `reference.ratio_sum`."""
    if out is None:
        out = torch.empty_like(message_a)
    if not _ratio(carrier, message_a, message_b, denominator, eps, out):
        return reference.ratio_sum(carrier, message_a, message_b, denominator, eps, out=out)
    return out


def gamma_pair(
    carrier: Tensor | None,
    message: Tensor,
    z: Tensor,
    z_plus: Tensor,
    gamma: float,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two ratios of the Gamma rule; see `reference.gamma_pair`."""
    if out is None:
        out = (torch.empty_like(z, dtype=message.dtype), torch.empty_like(z, dtype=message.dtype))
    if not _pair(carrier, message, z, z_plus, out, True, gamma, 0.0, eps):
        return reference.gamma_pair(carrier, message, z, z_plus, gamma, eps, out=out)
    return out


def alpha_beta_pair(
    carrier: Tensor | None,
    message: Tensor,
    z_plus: Tensor | None,
    z_minus: Tensor,
    alpha: float,
    beta: float,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two ratios of the AlphaBeta rule; see `reference.alpha_beta_pair`."""
    if out is None:
        out = (torch.empty_like(z_minus, dtype=message.dtype), torch.empty_like(z_minus, dtype=message.dtype))
    if not _pair(carrier, message, z_plus, z_minus, out, False, alpha, beta, eps):
        return reference.alpha_beta_pair(carrier, message, z_plus, z_minus, alpha, beta, eps, out=out)
    return out


def select_by_sign(x: Tensor, upper: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """`upper` where `x >= 0`, else `lower`: all of one shape, `upper` and `lower` of one dtype; `out` may be either."""
    if out is None:
        out = torch.empty_like(upper)
    codes = [_dtype_code(t) for t in (x, upper, lower, out)]
    geometries = tuple((t.shape, t.stride()) for t in (x, upper, lower, out))
    if extension is None or None in codes or not codes[1] == codes[2] == codes[3] or not same_layout(geometries):
        return torch.where(x >= 0, upper, lower, out=out)
    extension.select_by_sign(
        x.data_ptr(), _DTYPE_CODES[x.dtype], upper.data_ptr(), lower.data_ptr(), _DTYPE_CODES[upper.dtype],
        out.data_ptr(), out.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """`relu(a + b)` for two tensors of one shape and dtype."""
    code = _dtype_code(a)
    same = extension is not None and code is not None and _dtype_code(b) == code
    if not same or not same_layout(((a.shape, a.stride()), (b.shape, b.stride()))):
        return torch.add(a, b).relu_()
    assert extension is not None
    out = torch.empty_like(a)
    extension.add_relu(a.data_ptr(), b.data_ptr(), code, out.data_ptr(), out.numel(), torch.get_num_threads())
    return out


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
    """A dense layer: `x` ``[N, I]``, `weight` ``[O, I]``, which may be scaled (`reference.scaled`).

    In float32 the weight is read once, at the memory's speed; where N is large, products of matrices are faster.
    """
    if not _reads_once(x, weight, FEW_SAMPLES):
        return reference.dense(x, weight, bias, scales)
    z = x.new_empty((x.shape[0], weight.shape[0]))
    if scales is None:
        _dense(x, weight, bias, None, z, None, (1.0, 1.0))
    else:
        _dense(x, weight, None, bias, None, z, scales)
    return z


def dense_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, scaled_bias: Tensor | None, scales: Scales
) -> tuple[Tensor, Tensor]:
    """`dense` with the weight and its bias as they are, and with the weight scaled and a bias of its own: one reading for both."""
    if not _reads_once(x, weight, FEW_SAMPLES):
        return dense(x, weight, bias), dense(x, weight, scaled_bias, scales)
    z = x.new_empty((x.shape[0], weight.shape[0]))
    scaled_z = torch.empty_like(z)
    _dense(x, weight, bias, scaled_bias, z, scaled_z, scales)
    return z, scaled_z


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, scaled_bias: Tensor | None, z: Tensor | None, scaled_z: Tensor | None,
    scales: Scales,
) -> None:  # fmt: skip
    assert extension is not None
    x = x.contiguous()
    biases = [None if b is None else b.contiguous() for b in (bias, scaled_bias)]
    pointers = (0 if t is None else t.data_ptr() for t in (*biases, z, scaled_z))
    extension.dense(
        x.data_ptr(), weight.data_ptr(), *pointers, x.shape[0], *weight.shape, scales, torch.get_num_threads()
    )


def dense_dgrad(s: Tensor, weight: Tensor, scales: Scales | None = None) -> Tensor:
    """``s @ weight`` for `s` ``[N, O]`` and a dense layer's weight ``[O, I]``, which may be scaled; see `dense`."""
    if not _reads_once(s, weight, _FEW_MESSAGES):
        return torch.matmul(s, weight if scales is None else reference.scaled(weight, scales))
    assert extension is not None
    s = s.contiguous()
    out = s.new_empty((s.shape[0], weight.shape[1]))
    extension.dense_dgrad(
        s.data_ptr(), weight.data_ptr(), out.data_ptr(), *s.shape, weight.shape[1], scales is not None, scales or (1.0, 1.0),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _reads_once(x: Tensor, weight: Tensor, samples: int) -> bool:
    """Whether a dense layer is one for the kernels: at most so many samples, float32, the weight row by row."""
    plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu and weight.is_contiguous()
    return extension is not None and plain and x.shape[0] <= samples


def channel_sum(carrier: Tensor | None, message: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Sum of `carrier * message` over the channels of each group; see `reference.channel_sum`."""
    if out is None:
        out = message.new_empty((message.shape[0], groups, *message.shape[2:]))
    if not _channel_sum(carrier, message, groups, out):
        return reference.channel_sum(carrier, message, groups, out=out)
    return out


def max_pool(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil: bool
) -> tuple[Tensor, Tensor]:
    """Max pooling of images: the maxima, and one byte a window that says which tap won, as `max_pool_dgrad` takes it.

    `x` is `[N, C, H, W]`, float32 or bfloat16; the results lie channels-last. As in torch the first of equals wins, and a NaN
    over all.
    """
    assert extension is not None and kernel[0] * kernel[1] <= 256, "a winner is one byte"
    x = x.contiguous(memory_format=torch.channels_last)
    stride = stride or kernel
    size = x.shape[2:]
    windows = zip(size, kernel, stride, padding, dilation, strict=True)
    out_size = [_pooled(n, k, t, p, d, ceil) for n, k, t, p, d in windows]
    y = torch.empty((*x.shape[:2], *out_size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    winners = torch.empty_like(y, dtype=torch.uint8)
    extension.max_pool(
        x.data_ptr(), _DTYPE_CODES[x.dtype], y.data_ptr(), winners.data_ptr(), x.shape[0], size, out_size, kernel, stride,
        padding, dilation, x.shape[1], torch.get_num_threads(),
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
    if extension is None or t.dim() != 4 or _dtype_code(t) is None:
        return transposes.fast_avg_pool_dgrad(t, size, kernel, stride, padding, ceil, include, divisor, rows, columns)
    return _pool_dgrad(t, None, size, kernel, stride, padding, [1, 1], divisor or 0, include)


def _pool_dgrad(
    message: Tensor, winners: Tensor | None, size: list[int], kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], divisor: int, count_padding: bool,
) -> Tensor:  # fmt: skip
    assert extension is not None
    message = message.contiguous(memory_format=torch.channels_last)
    result = torch.empty(
        (*message.shape[:2], *size), dtype=message.dtype, device=message.device, memory_format=torch.channels_last
    )
    extension.pool_dgrad(
        message.data_ptr(), _DTYPE_CODES[message.dtype], 0 if winners is None else winners.data_ptr(),
        result.data_ptr(), message.shape[0], size, message.shape[2:], kernel, stride or kernel, padding, dilation,
        message.shape[1], divisor, count_padding, torch.get_num_threads(),
    )  # fmt: skip
    return result


def _pooled(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """Windows along one dimension, as torch counts them: none begins in the padding behind the last value."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _ratio(
    carrier: Tensor | None, message: Tensor, other: Tensor | None, denominator: Tensor, eps: float, out: Tensor
) -> bool:
    """Run the kernel if it can take these operands; whether it did."""
    if extension is None:
        return False
    message_code = _dtype_code(message)
    carrier_code = 0 if carrier is None else _dtype_code(carrier)
    denominator_code = _dtype_code(denominator)
    if message_code is None or carrier_code is None or denominator_code is None:
        return False
    if _dtype_code(out) != message_code or (other is not None and _dtype_code(other) != message_code):
        return False
    layout = ratio_layout(
        (message.shape, message.stride()),
        None if out is message else (out.shape, out.stride()),
        None if other is None else (other.shape, other.stride()),
        (denominator.shape, denominator.stride()),
        None if carrier is None else (carrier.shape, carrier.stride()),
    )
    if layout is None:
        return False
    extension.ratio(
        0 if carrier is None else carrier.data_ptr(),
        carrier_code,
        layout.carrier_broadcast,
        message.data_ptr(),
        0 if other is None else other.data_ptr(),
        message_code,
        denominator.data_ptr(),
        denominator_code,
        layout.denominator_broadcast,
        out.data_ptr(),
        layout.rows,
        layout.row_size,
        eps,
        torch.get_num_threads(),
    )
    return True


def _pair(
    carrier: Tensor | None,
    message: Tensor,
    first: Tensor | None,
    second: Tensor,
    out: tuple[Tensor, Tensor],
    gamma_rule: bool,
    gamma_or_alpha: float,
    beta: float,
    eps: float,
) -> bool:
    """Run the kernel if it can take these operands; whether it did."""
    if extension is None:
        return False
    given = [t for t in (carrier, message, first, second) if t is not None]
    codes = [_dtype_code(t) for t in given]
    if None in codes or any(_dtype_code(o) != _dtype_code(message) for o in out):
        return False
    if not same_layout(tuple((t.shape, t.stride()) for t in (*given, *out))):
        return False
    operands: list[int] = []
    for tensor in (carrier, message, first, second):
        operands += [0, 0] if tensor is None else [tensor.data_ptr(), _DTYPE_CODES[tensor.dtype]]
    extension.pair(
        *operands,
        out[0].data_ptr(),
        out[1].data_ptr(),
        message.numel(),
        gamma_rule,
        gamma_or_alpha,
        beta,
        eps,
        torch.get_num_threads(),
    )
    return True


def _channel_sum(carrier: Tensor | None, message: Tensor, groups: int, out: Tensor) -> bool:
    """Run the kernel if it can take these operands; whether it did."""
    if extension is None:
        return False
    message_code = _dtype_code(message)
    carrier_code = 0 if carrier is None else _dtype_code(carrier)
    if message_code is None or carrier_code is None or _dtype_code(out) != message_code or not out.is_contiguous():
        return False
    layout = channel_layout(
        (message.shape, message.stride()), None if carrier is None else (carrier.shape, carrier.stride())
    )
    if layout is None:
        return False
    extension.channel_sum(
        0 if carrier is None else carrier.data_ptr(),
        carrier_code,
        layout.carrier_broadcast,
        message.data_ptr(),
        message_code,
        out.data_ptr(),
        layout.rows,
        layout.channels,
        groups,
        layout.positions,
        layout.channels_last,
        torch.get_num_threads(),
    )
    return True


def takes(tensor: Tensor) -> bool:
    """Whether the kernels read values of this tensor's dtype and device; a fake tensor will do."""
    return extension is not None and _dtype_code(tensor) is not None


def _dtype_code(tensor: Tensor) -> int | None:
    """The kernel's code of the tensor's dtype; None if no kernel can read it as it lies in memory."""
    if not tensor.is_cpu or tensor.is_neg():
        return None
    return _DTYPE_CODES.get(tensor.dtype)
