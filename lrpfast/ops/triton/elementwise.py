"""Elementwise steps: one pass over memory, operands read in the order in which they lie.

A program takes `_BLOCK` neighbouring elements, 16 bytes a thread and access. Its first element is counted in 64 bits, the distance
to it in 32. Where one row of an operand serves the whole batch, its place is the remainder by the row's size.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from lrpfast.ops import reference
from lrpfast.ops.layouts import ratio_layout, same_layout

from .language import blocks, jit, on_device, quotient, rectified, take, wide

_BLOCK = 1024

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@jit
def ratio_kernel(  # type: ignore[no-untyped-def]
    carrier, message_a, message_b, denominator, out, size, row_size, eps,
    CARRIER_ROW: tl.constexpr, DENOMINATOR_ROW: tl.constexpr, ZERO_RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ratio`, and where `message_b` is given `ratio_sum`."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < size
    message = wide(tl.load(message_a + start + within, inside, other=0.0))
    if message_b is not None:
        message += wide(tl.load(message_b + start + within, inside, other=0.0))
    own = start + within
    z = wide(tl.load(denominator + (own % row_size if DENOMINATOR_ROW else own), inside, other=1.0))
    factor = None
    if carrier is not None:
        factor = wide(tl.load(carrier + (own % row_size if CARRIER_ROW else own), inside, other=0.0))
    result = quotient(factor, message, z, eps, ZERO_RULE)
    tl.store(out + start + within, result.to(out.dtype.element_ty), inside)


@jit
def gamma_pair_kernel(carrier, message, z, z_plus, upper, lower, size, gamma, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < size
    relevance = wide(tl.load(message + start + within, inside, other=0.0))
    if carrier is not None:
        relevance *= wide(tl.load(carrier + start + within, inside, other=0.0))
    own = wide(tl.load(z + start + within, inside, other=1.0))
    plus = wide(tl.load(z_plus + start + within, inside, other=0.0))
    # Both denominators have the sign of z and the size |z| + gamma (z⁺ + max(-z, 0)).
    depth = tl.abs(own) + gamma * plus - gamma * tl.where(own < 0, own, 0.0)
    s = tl.div_rn(relevance, depth + eps)
    tl.store(upper + start + within, tl.where(own > 0, s, 0.0).to(upper.dtype.element_ty), inside)
    tl.store(lower + start + within, tl.where(own < 0, -s, 0.0).to(lower.dtype.element_ty), inside)


@jit
def alpha_beta_pair_kernel(  # type: ignore[no-untyped-def]
    carrier, message, z_plus, z_minus, first, second, size, alpha, beta, eps,
    ZERO_RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < size
    relevance = wide(tl.load(message + start + within, inside, other=0.0))
    minus = wide(tl.load(z_minus + start + within, inside, other=-1.0))
    if carrier is not None:
        y = wide(tl.load(carrier + start + within, inside, other=0.0))
        relevance *= y
    plus = y - minus if z_plus is None else wide(tl.load(z_plus + start + within, inside, other=1.0))
    s_plus = alpha * quotient(None, relevance, plus, eps, ZERO_RULE)
    s_minus = -beta * quotient(None, relevance, minus, eps, ZERO_RULE)
    tl.store(first + start + within, s_plus.to(first.dtype.element_ty), inside)
    tl.store(second + start + within, s_minus.to(second.dtype.element_ty), inside)


@jit
def select_by_sign_kernel(x, upper, lower, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < size
    above = wide(tl.load(x + start + within, inside, other=0.0)) >= 0
    a = tl.load(upper + start + within, inside, other=0.0)
    b = tl.load(lower + start + within, inside, other=0.0)
    tl.store(out + start + within, tl.where(above, a, b), inside)


@jit
def add_relu_kernel(a, b, out, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < size
    total = wide(tl.load(a + start + within, inside, other=0.0)) + wide(tl.load(b + start + within, inside, other=0.0))
    tl.store(out + start + within, rectified(total).to(out.dtype.element_ty), inside)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _ratio(
    carrier: Tensor | None, message: Tensor, other: Tensor | None, denominator: Tensor, eps: float, out: Tensor
) -> bool:
    """Run the kernel if it can take these operands; whether it did."""
    if not take(carrier, message, other, denominator, out) or out.dtype != message.dtype:
        return False
    if other is not None and other.dtype != message.dtype:
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
    if out.numel():
        with on_device(out):
            ratio_kernel[blocks(out.numel(), _BLOCK)](
                carrier, message, other, denominator, out, out.numel(), layout.row_size, eps, layout.carrier_broadcast,
                layout.denominator_broadcast, eps == 0, _BLOCK, num_warps=4,
            )  # fmt: skip
    return True


def _alike(*tensors: Tensor | None) -> bool:
    """Whether kernels can read all of these, and all number their elements alike."""
    given = [t for t in tensors if t is not None]
    return take(*given) and same_layout(tuple((t.shape, t.stride()) for t in given))


def _pair_results(like: Tensor, message: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(like, dtype=message.dtype), torch.empty_like(like, dtype=message.dtype)


# ---- Operators -------------------------------------------------------------------------------------------------------


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
    out = out or _pair_results(z, message)
    if not _alike(carrier, message, z, z_plus, *out) or any(o.dtype != message.dtype for o in out):
        return reference.gamma_pair(carrier, message, z, z_plus, gamma, eps, out=out)
    if z.numel():
        with on_device(z):
            gamma_pair_kernel[blocks(z.numel(), _BLOCK)](
                carrier, message, z, z_plus, *out, z.numel(), gamma, eps, _BLOCK, num_warps=4
            )
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
    out = out or _pair_results(z_minus, message)
    if not _alike(carrier, message, z_plus, z_minus, *out) or any(o.dtype != message.dtype for o in out):
        return reference.alpha_beta_pair(carrier, message, z_plus, z_minus, alpha, beta, eps, out=out)
    if z_minus.numel():
        with on_device(z_minus):
            alpha_beta_pair_kernel[blocks(z_minus.numel(), _BLOCK)](
                carrier,
                message,
                z_plus,
                z_minus,
                *out,
                z_minus.numel(),
                alpha,
                beta,
                eps,
                eps == 0,
                _BLOCK,
                num_warps=4,
            )
    return out


def select_by_sign(x: Tensor, upper: Tensor, lower: Tensor, out: Tensor | None = None) -> Tensor:
    """`upper` where `x >= 0`, else `lower`: all of one shape, `upper` and `lower` of one dtype; `out` may be either."""
    if out is None:
        out = torch.empty_like(upper)
    if not _alike(x, upper, lower, out) or not upper.dtype == lower.dtype == out.dtype:
        return torch.where(x >= 0, upper, lower, out=out)
    if x.numel():
        with on_device(x):
            select_by_sign_kernel[blocks(x.numel(), _BLOCK)](x, upper, lower, out, x.numel(), _BLOCK, num_warps=4)
    return out


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """`relu(a + b)` for two tensors of one shape and dtype."""
    if a.dtype != b.dtype or not _alike(a, b):
        return torch.add(a, b).relu_()
    out = torch.empty_like(a)
    if a.numel():
        with on_device(a):
            add_relu_kernel[blocks(a.numel(), _BLOCK)](a, b, out, a.numel(), _BLOCK, num_warps=4)
    return out
