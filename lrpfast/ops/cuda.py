"""Dense layers of one sample in CUDA C++ (csrc/dense.cu): one read of the weight gives all that is asked of it.

As in `native`, the extension takes pointers and trusts them; what it may be handed is decided here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import extension

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MOST_INPUTS = 512 * 56  # sums that the threads of a block hold in registers
_BLOCKS_A_MULTIPROCESSOR = 2

available: bool = extension is not None and bool(extension.build_info()["cuda_built"])


def takes_dense(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take a layer: one sample, rows of whole 16 bytes, on a GPU; a fake tensor will do."""
    code = _DTYPE_CODES.get(weight.dtype)
    if not available or code is None or not (x.is_cuda and weight.is_cuda) or x.dtype != weight.dtype:
        return False
    inputs = weight.shape[1]
    return (
        x.dim() == weight.dim() == 2
        and x.shape[0] == 1
        and weight.is_contiguous()
        and inputs * weight.element_size() % 16 == 0
        and inputs <= _MOST_INPUTS
    )


def dense_pair(x: Tensor, weight: Tensor, bias: Tensor | None, positive_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(Wx + b, W⁺x + b⁺)` for `x` `[1, I]`, from one read of `weight` `[O, I]`."""
    assert extension is not None
    x = x.contiguous()
    outputs, inputs = weight.shape
    z, z_plus = (x.new_empty((1, outputs)) for _ in range(2))
    with torch.cuda.device(x.device):
        problem = extension.cuda_dense_pair(
            x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(positive_bias), z.data_ptr(), z_plus.data_ptr(), outputs,
            inputs, _DTYPE_CODES[x.dtype], torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    _check(problem)
    return z, z_plus


def dense_ratio_dgrad(
    x: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor | None, message: Tensor, eps: float
) -> Tensor:
    """`Wᵀ(carrier * message / S(Wx + b))` for `x` `[1, I]`, from one read of `weight` `[O, I]`; all of one dtype."""
    assert extension is not None
    x, message = x.contiguous(), message.contiguous()
    carrier = None if carrier is None else carrier.contiguous()
    outputs, inputs = weight.shape
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    blocks = min(outputs, multiprocessors * _BLOCKS_A_MULTIPROCESSOR)
    partial = torch.empty((blocks, inputs), dtype=torch.float32, device=x.device)
    result = torch.empty_like(x)
    with torch.cuda.device(x.device):
        problem = extension.cuda_dense_ratio_dgrad(
            x.data_ptr(), weight.data_ptr(), _pointer(bias), _pointer(carrier), message.data_ptr(), partial.data_ptr(),
            result.data_ptr(), outputs, inputs, blocks, _DTYPE_CODES[x.dtype], eps,
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    _check(problem)
    return result


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check(problem: str | None) -> None:
    if problem is not None:
        raise RuntimeError(f"a CUDA kernel of lrpfast could not be started: {problem}")
