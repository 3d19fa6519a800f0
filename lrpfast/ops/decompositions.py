"""Every fused operator as an expression of plain ATen operations: nothing in place, no `out`, no layout.

For what traces: `torch.export` (`ExportedProgram.run_decompositions(DECOMPOSITIONS)`), ONNX, `torch.compile`.
The stabiliser is a comparison here: compilers drop the addition of zero that the reference relies on.
"""

import torch
from torch import Tensor

from . import schema
from .reference import compute_dtype


def stabilise(z: Tensor, eps: float) -> Tensor:
    """S(z) of RULES.md §1."""
    return torch.where(z >= 0, z + eps, z - eps)


def ratio(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """`carrier * message / S(denominator)`; see `reference.ratio`."""
    dtype = compute_dtype(message, denominator, carrier)
    return _ratio(carrier, message.to(dtype), denominator.to(dtype), eps).to(message.dtype)


def ratio_sum(carrier: Tensor | None, message_a: Tensor, message_b: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """`carrier * (message_a + message_b) / S(denominator)`; see `reference.ratio_sum`."""
    dtype = compute_dtype(message_a, denominator, carrier)
    total = message_a.to(dtype) + message_b.to(dtype)
    return _ratio(carrier, total, denominator.to(dtype), eps).to(message_a.dtype)


def gamma_pair(
    carrier: Tensor | None, message: Tensor, z: Tensor, z_plus: Tensor, gamma: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The two ratios of the Gamma rule; see `reference.gamma_pair`."""
    dtype = compute_dtype(message, z, carrier)
    wide, shift = z.to(dtype), z_plus.to(dtype) * gamma
    denominator = torch.where(wide > 0, wide + shift, wide * (1 + gamma) - shift)
    s = _ratio(carrier, message.to(dtype), denominator, eps)
    return torch.where(wide > 0, s, 0).to(message.dtype), torch.where(wide < 0, s, 0).to(message.dtype)


def alpha_beta_pair(
    carrier: Tensor | None,
    message: Tensor,
    z_plus: Tensor | None,
    z_minus: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The two ratios of the AlphaBeta rule; see `reference.alpha_beta_pair`."""
    if z_plus is None:
        assert carrier is not None
        z_plus = carrier - z_minus
    return ratio(carrier, message, z_plus, eps) * alpha, ratio(carrier, message, z_minus, eps) * -beta


def channel_sum(carrier: Tensor | None, message: Tensor, groups: int) -> Tensor:
    """Sum of `carrier * message` over the channels of each group; see `reference.channel_sum`."""
    dtype = compute_dtype(message, message, carrier)
    terms = message.to(dtype) if carrier is None else carrier.to(dtype) * message.to(dtype)
    return terms.unflatten(1, (groups, message.shape[1] // groups)).sum(2).to(message.dtype)


def _ratio(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float) -> Tensor:
    stable = denominator if eps == 0 else stabilise(denominator, eps)
    result = message / stable if carrier is None else message * (carrier.to(message.dtype) / stable)
    return result if eps != 0 else torch.where(denominator == 0, 0, result)


DECOMPOSITIONS = {getattr(torch.ops.lrpfast, name).default: globals()[name] for name in schema.OPERATORS}
