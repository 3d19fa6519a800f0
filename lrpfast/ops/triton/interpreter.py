"""Puts right what Triton's interpreter computes otherwise than a GPU does: bfloat16.

The interpreter keeps a bfloat16 as its 16 bits. Converting from float32 it cuts the lower bits off where a GPU rounds to
nearest even, and in a matrix product it multiplies the bits as if they were integers (seen in Triton 3.7 and 3.8). Both would hide errors
of the kernels, or show errors that they do not have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def put_right() -> None:
    """Replace two methods of the interpreter's builder."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return TensorHandle(_widened(source.data), tl.float32)
        return cast(self, source, kind)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        pair = [TensorHandle(_widened(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return dot(self, *pair, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


def _rounded(values: np.ndarray) -> np.ndarray:
    narrow = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return narrow.view(torch.uint16).numpy()


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
