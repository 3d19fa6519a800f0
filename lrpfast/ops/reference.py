"""Every fused operator in pure torch: what the other backends are tested against, and what runs where they cannot.

Written to be run, step by step and in few passes: temporaries are reused, and `out` may be the message itself. For code
that is to be traced, see `decompositions`, the same formulas as expressions.

Computation is in at least float32: half-precision operands are converted first and the result is rounded once.
"""

from collections.abc import Iterator
from typing import Any

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
    blocks = _blocks(carrier, message, denominator, out)
    for own_carrier, own, own_denominator, own_out in blocks:
        _ratio_block(own_carrier, own, own_denominator, eps, own_out)
    return out


_BLOCK = 1 << 18


def _blocks(
    carrier: Tensor | None, message: Tensor, denominator: Tensor, out: Tensor
) -> Iterator[tuple[Tensor | None, Tensor, Tensor, Tensor]]:
    """The operands, in pieces whose temporaries stay in the cache where all of them number their elements alike."""
    given = [t for t in (carrier, message, denominator, out) if t is not None]
    alike = all(t.shape == out.shape and t.stride() == out.stride() for t in given)
    size = out.numel()
    dense = out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last))
    if not (alike and dense and size > _BLOCK):
        yield carrier, message, denominator, out
        return
    flat = [None if t is None else t.as_strided((size,), (1,)) for t in (carrier, message, denominator, out)]
    for start in range(0, size, _BLOCK):
        a, b, c, d = (None if t is None else t[start : start + _BLOCK] for t in flat)
        assert b is not None and c is not None and d is not None
        yield a, b, c, d


def _ratio_block(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float, out: Tensor) -> None:
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
    if eps == 0:
        out.masked_fill_(zeros, 0)


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


def gamma_pair(
    carrier: Tensor | None,
    message: Tensor,
    z: Tensor,
    z_plus: Tensor,
    gamma: float,
    eps: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The two ratios of the Gamma rule for a signed output, for `R = carrier * message`.

    `R / S(z + gamma z_plus)` where `z > 0`, and `R / S((1 + gamma) z - gamma z_plus)` where `z < 0`; 0 elsewhere. All
    operands are of one shape; the results have the message's dtype.
    """
    if out is None:
        out = (torch.empty_like(z, dtype=message.dtype), torch.empty_like(z, dtype=message.dtype))
    dtype = compute_dtype(message, z, carrier)
    for sample in range(z.shape[0]):  # temporaries of a sample stay in the cache
        own_carrier, own, own_z, own_plus = _sample(sample, dtype, carrier, message, z, z_plus)
        # Both denominators have the sign of z and the size |z| + gamma (z⁺ + max(-z, 0)): the sign is put on last.
        negative = own_z.clamp(max=0)
        size = own_z.abs().add_(own_plus, alpha=gamma).sub_(negative, alpha=gamma)
        s = _product(own_carrier, own).div_(size.add_(eps))
        upper = torch.ops.aten.threshold_backward(s, own_z, 0)  # s where z > 0: in a fraction of the time of a where
        lower = torch.ops.aten.threshold_backward(s, negative.neg_(), 0)
        out[0][sample].copy_(upper)
        torch.neg(lower, out=out[1][sample]) if out[1].dtype == dtype else out[1][sample].copy_(lower.neg_())
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
    """The two ratios of the AlphaBeta rule, `alpha R / S(z_plus)` and `-beta R / S(z_minus)`, for `R = carrier * message`.

    Where `z_plus` is None it is `carrier - z_minus`: the carrier is then a ReLU of the layer's output, and where it is not
    zero this loses no digits. All operands are of one shape; the results have the message's dtype.
    """
    if out is None:
        out = (torch.empty_like(z_minus, dtype=message.dtype), torch.empty_like(z_minus, dtype=message.dtype))
    dtype = compute_dtype(message, z_minus, carrier)
    for sample in range(z_minus.shape[0]):
        own_carrier, own, own_plus, own_minus = _sample(sample, dtype, carrier, message, z_plus, z_minus)
        if own_plus is None:
            own_plus = own_carrier - own_minus
        relevance = _product(own_carrier, own)
        minus = ratio(None, relevance, own_minus, eps).mul_(-beta)
        out[0][sample].copy_(ratio(None, relevance, own_plus, eps, out=relevance).mul_(alpha))
        out[1][sample].copy_(minus)
    return out


def _sample(index: int, dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """One sample of each tensor, in the dtype of the computation."""
    return [None if t is None else t[index].to(dtype) for t in tensors]


def _product(carrier: Tensor | None, message: Tensor) -> Tensor:
    """The relevance, in memory of its own."""
    return message.clone() if carrier is None else carrier * message


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
