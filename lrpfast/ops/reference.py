"""Every fused operator in pure torch: what the other backends are tested against, and what runs where they cannot.

Written to be run, step by step and in few passes: temporaries are reused, and `out` may be the message itself. For code
that is to be traced, see `decompositions`, the same formulas as expressions.

Computation is in at least float32: half-precision operands are converted first and the result is rounded once.
"""

import torch
from torch import Tensor


def ratio(
    carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """`carrier * message / S(denominator)`; a carrier of None counts as ones.

    S is the stabiliser of RULES.md §1: `S(z) = z + eps` where `z >= 0`, `z - eps` where `z < 0`; sgn(0) = +1, also
    for -0.0.

    Parameters
    ----------
    carrier, denominator
        Of the message's shape, or with size 1 in dimension 0. They may be the same tensor.
    message
        Gives the result its shape, dtype and layout.
    eps
        The stabiliser. With 0 the result is 0 exactly where the denominator is 0 (rule LRP-0).
    out
        Where to write; may be `message`.
    """
    if out is None:
        out = torch.empty_like(message)
    dtype = compute_dtype(message, denominator, carrier)
    operands = [t for t in (carrier, message, denominator) if t is not None]
    free = out.dtype == dtype and all(out.data_ptr() != t.data_ptr() for t in operands)
    work = out if free else torch.empty_like(message, dtype=dtype)

    z = denominator.to(dtype)
    if eps != 0:
        stable = work if z.shape == message.shape else torch.empty_like(z)
        torch.add(z, 0.0, out=stable)  # -0.0 becomes 0.0, whose sign is +1: a tenth of the time of compare and select
        torch.copysign(torch.full((), eps, dtype=dtype), stable, out=stable).add_(z)
    else:
        stable = z
        zeros = z == 0  # before anything is written: out may be the denominator
    if carrier is None:
        torch.div(message, stable, out=out)
    else:  # the quotient first: for the carriers of the rules it lies in [0, 1] and can neither overflow nor underflow
        one_row = carrier.shape != message.shape and z.shape != message.shape
        torch.mul(message, torch.div(carrier, stable, out=None if one_row else work), out=out)
    return out if eps != 0 else out.masked_fill_(zeros, 0)


def ratio_sum(
    carrier: Tensor | None,
    message_a: Tensor,
    message_b: Tensor,
    denominator: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """`carrier * (message_a + message_b) / S(denominator)`: `ratio` where two messages meet; `out` may be either."""
    if out is None:
        out = torch.empty_like(message_a)
    dtype = compute_dtype(message_a, denominator, carrier)
    total = torch.add(message_a.to(dtype), message_b.to(dtype))
    if out.dtype == dtype:
        return ratio(carrier, total, denominator, eps, out=out)
    return out.copy_(ratio(carrier, total, denominator, eps, out=total))


def channel_sum(carrier: Tensor | None, message: Tensor, groups: int, out: Tensor | None = None) -> Tensor:
    """Sum of `carrier * message` over the channels of each group: `[N, C, *spatial]` to `[N, groups, *spatial]`.

    `carrier` is of the message's shape, or with size 1 in dimension 0, or None for ones. The result has the message's
    dtype and is contiguous.
    """
    if out is None:
        out = message.new_empty((message.shape[0], groups, *message.shape[2:]))
    dtype = compute_dtype(message, message, carrier)
    terms = message.to(dtype) if carrier is None else carrier.to(dtype) * message.to(dtype)
    return out.copy_(terms.unflatten(1, (groups, message.shape[1] // groups)).sum(2))


def compute_dtype(message: Tensor, denominator: Tensor, carrier: Tensor | None) -> torch.dtype:
    """What the operators compute in: the widest dtype of the operands, at least float32."""
    dtype = torch.promote_types(torch.promote_types(message.dtype, denominator.dtype), torch.float32)
    return dtype if carrier is None else torch.promote_types(dtype, carrier.dtype)
