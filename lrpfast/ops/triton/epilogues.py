"""Epilogues: what becomes of a matrix product before it is stored, each one function of a line.

All take the product with its bias in float32, two further operands of the result's shape (or None), and the stabiliser.
"""

from __future__ import annotations

import triton.language as tl  # noqa: F401  Triton's interpreter looks for it in the module of every device function

from .language import jit, quotient, rectified


@jit
def plain(z, first, second, eps):  # type: ignore[no-untyped-def]
    """A convolution or dense layer, or its transpose."""
    return z


@jit
def relu(z, first, second, eps):  # type: ignore[no-untyped-def]
    return rectified(z)


@jit
def add_relu(z, first, second, eps):  # type: ignore[no-untyped-def]
    """A residual block's end."""
    return rectified(z + first)


@jit
def ratio(z, first, second, eps):  # type: ignore[no-untyped-def]
    """The product is a denominator: ``s = carrier * message / S(z)``."""
    return quotient(first, second, z, eps, False)


@jit
def zero_ratio(z, first, second, eps):  # type: ignore[no-untyped-def]
    """The same with eps 0: 0 where z is 0 (rule LRP-0)."""
    return quotient(first, second, z, 0.0, True)


@jit
def message_ratio(z, first, second, eps):  # type: ignore[no-untyped-def]
    """The product is a message: ``carrier * z / S(denominator)``."""
    return quotient(first, z, second, eps, False)


@jit
def relevance(z, first, second, eps):  # type: ignore[no-untyped-def]
    """The product is a message in ratio form: ``R = carrier * z``."""
    return z * first


# ---- Weights modified on chip ----------------------------------------------------------------------------------------


@jit
def as_is(weight, gamma):  # type: ignore[no-untyped-def]
    return weight


@jit
def positive(weight, gamma):  # type: ignore[no-untyped-def]
    """W⁺ of the rule ZPlus."""
    return rectified(weight)


@jit
def favoured(weight, gamma):  # type: ignore[no-untyped-def]
    """``W + gamma W⁺`` of the rule Gamma."""
    return weight + gamma * rectified(weight)
