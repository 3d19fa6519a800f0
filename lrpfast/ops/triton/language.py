"""What all kernels share: the arithmetic of the rules as device functions of a line or two, and what may be handed to a kernel.

Arithmetic is in float32 whatever the operands are stored in; a result is rounded once, when it is stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether kernels run in Triton's interpreter, on the CPU: decided by the environment when this module is imported.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    from .interpreter import put_right

    put_right()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, which mypy does not know the type of."""
    return triton.jit(function)


# ---- The arithmetic --------------------------------------------------------------------------------------------------


@jit
def wide(values):  # type: ignore[no-untyped-def]
    """As float32, which the arithmetic is in."""
    return values.to(tl.float32)


@jit
def stabilised(z, eps):  # type: ignore[no-untyped-def]
    """S(z) of RULES §1; sgn(0) = +1, also for -0.0."""
    return z + tl.where(z >= 0, eps, -eps)


@jit
def quotient(carrier, message, z, eps, ZERO_RULE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``carrier * message / S(z)``, divided first: for the carriers of the rules the quotient neither over- nor underflows.

    `tl.div_rn` rounds as IEEE does; Triton's ``/`` is the approximate division.
    """
    stable = stabilised(z, eps)
    result = tl.div_rn(message, stable) if carrier is None else message * tl.div_rn(carrier, stable)
    if ZERO_RULE:
        result = tl.where(z == 0, 0.0, result)
    return result


@jit
def rectified(values):  # type: ignore[no-untyped-def]
    """A ReLU that lets NaN through, as torch's does and `tl.maximum` does not."""
    return tl.where(values < 0, 0.0, values)


# ---- What a kernel may be handed -------------------------------------------------------------------------------------


def takes(tensor: Tensor) -> bool:
    """Whether kernels can read a tensor's values; a fake tensor will do."""
    there = tensor.is_cuda or (INTERPRETED and tensor.is_cpu)
    return there and tensor.dtype in DTYPES and not tensor.is_neg()


def take(*tensors: Tensor | None) -> bool:
    """Whether kernels can read all of these, which lie on one device."""
    given = [t for t in tensors if t is not None]
    return all(takes(t) and t.device == given[0].device for t in given)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be that of their operands."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def blocks(size: int, block: int) -> tuple[int]:
    """A grid that covers `size` elements."""
    return (-(-size // block),)
