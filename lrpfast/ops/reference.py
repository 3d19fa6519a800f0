"""Every fused operator in pure torch: what the other backends are tested against, and what runs where they cannot.

Written to be run, step by step and in few passes: temporaries are reused, and `out` may be the message itself. For code
that is to be traced, see `decompositions`, the same formulas as expressions.

Computation is in at least float32: half-precision operands are converted first and the result is rounded once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Scales = tuple[float, float]  # of positive values, of all others


def scaled(weight: Tensor, scales: Scales) -> Tensor:
    """A weight whose positive values and whose others are multiplied by a number each: (1, 0) gives W⁺, (1 + γ, 1) W + γW⁺."""
    return torch.where(weight > 0, weight * scales[0], weight * scales[1])


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, scales: Scales | None = None) -> Tensor:
    """A dense layer: `x` ``[N, I]``, `weight` ``[O, I]``, which may be scaled.

    For few samples on a CPU the weight is the left factor, so that it is read once, in its own order.
    """
    if scales is not None:
        weight = scaled(weight, scales)
    if not 1 < x.shape[0] <= _FEW or x.device.type != "cpu" or x.dtype is not torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    product = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return product.t().contiguous()


_FEW = 16  # samples; of more, a product of matrices reads the weight often enough to keep it in the caches


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
    for own_out, own_carrier, own, own_denominator in _blocks(out, carrier, message, denominator):
        _ratio_block(own_carrier, own, own_denominator, eps, own_out)
    return out


_BLOCK = 1 << 18


def _blocks(out: Tensor, *operands: Tensor | None) -> Iterator[list[Any]]:
    """The result and the operands in pieces whose temporaries stay in the cache, where all number their elements alike."""
    tensors = [t for t in (out, *operands) if t is not None]
    alike = all(t.shape == out.shape and t.stride() == out.stride() for t in tensors)
    size = out.numel()
    dense = out.is_contiguous() or (out.dim() == 4 and out.is_contiguous(memory_format=torch.channels_last))
    if not (alike and dense and size > _BLOCK):
        yield [out, *operands]
        return
    flat = [None if t is None else t.as_strided((size,), (1,)) for t in (out, *operands)]
    for start in range(0, size, _BLOCK):
        yield [None if t is None else t[start : start + _BLOCK] for t in flat]


def _ratio_block(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float, out: Tensor) -> None:
    dtype = compute_dtype(message, denominator, carrier)
    operands = [t for t in (carrier, message, denominator) if t is not None]
    free = out.dtype == dtype and all(out.data_ptr() != t.data_ptr() for t in operands)
    work = out if free else torch.empty_like(message, dtype=dtype)

    z = denominator.to(dtype)
    if eps != 0:
        stable = work if z.shape == message.shape else torch.empty_like(z)
        torch.add(z, 0.0, out=stable)  # -0.0 becomes 0.0, whose sign is +1: a tenth of the time of compare and select
        torch.copysign(torch.full((), eps, dtype=dtype, device="cpu"), stable, out=stable).add_(z)
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
    for own_out, own_carrier, a, b, own_denominator in _blocks(out, carrier, message_a, message_b, denominator):
        _ratio_block(own_carrier, torch.add(a.to(dtype), b.to(dtype)), own_denominator, eps, own_out)
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
    """The two ratios of the Gamma rule for a signed output, for `R = carrier * message`.

    `R / S(z + gamma z_plus)` where `z > 0`, and `R / S((1 + gamma) z - gamma z_plus)` where `z < 0`; 0 elsewhere. All
    operands are of one shape; the results have the message's dtype.
    """
    if out is None:
        out = (torch.empty_like(z, dtype=message.dtype), torch.empty_like(z, dtype=message.dtype))
    dtype = compute_dtype(message, z, carrier)
    for first, second, *operands in _blocks(out[0], out[1], carrier, message, z, z_plus):
        own_carrier, own, own_z, own_plus = _widened(dtype, operands)
        # Both denominators have the sign of z and the size |z| + gamma (z⁺ + max(-z, 0)): the sign is put on last.
        negative = own_z.clamp(max=0)
        size = own_z.abs().add_(own_plus, alpha=gamma).sub_(negative, alpha=gamma)
        s = _product(own_carrier, own).div_(size.add_(eps))
        upper = torch.ops.aten.threshold_backward(s, own_z, 0)  # s where z > 0: in a fraction of the time of a where
        lower = torch.ops.aten.threshold_backward(s, negative.neg_(), 0)
        first.copy_(upper)
        torch.neg(lower, out=second) if second.dtype == dtype else second.copy_(lower.neg_())
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
    for first, second, *operands in _blocks(out[0], out[1], carrier, message, z_plus, z_minus):
        own_carrier, own, own_plus, own_minus = _widened(dtype, operands)
        if own_plus is None:
            own_plus = own_carrier - own_minus
        relevance = _product(own_carrier, own)
        minus = ratio(None, relevance, own_minus, eps)
        plus = ratio(None, relevance, own_plus, eps, out=relevance)
        for result, quotient, factor in ((first, plus, alpha), (second, minus, -beta)):  # operands are all read by now
            torch.mul(quotient, factor, out=result if result.dtype == dtype else quotient)
            if result.dtype != dtype:
                result.copy_(quotient)
    return out


def _widened(dtype: torch.dtype, tensors: list[Tensor | None]) -> list[Any]:
    """The operands in the dtype of the computation."""
    return [None if t is None else t.to(dtype) for t in tensors]


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
