"""Schema, fake and registration of every fused operator.

The operators are declared with `torch.library.define` and not with `torch.library.custom_op`: they are forward-only, so
the autograd wrapper that `custom_op` puts around each call buys nothing and costs more than a small kernel takes.

Every implementation writes into a result allocated here, exactly as its fake says it is laid out; the backends allocate
nothing and cannot disagree with the fake.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import gpu, native, reference

_LIBRARY = torch.library.Library("lrpfast", "DEF")  # kept: the declarations go when this object goes


def ratio_result(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """The uninitialised result of `ratio`: like the message."""
    _check_operand("ratio: carrier", carrier, message)
    _check_operand("ratio: denominator", denominator, message)
    return torch.empty_like(message)


def ratio_sum_result(
    carrier: Tensor | None, message_a: Tensor, message_b: Tensor, denominator: Tensor, eps: float
) -> Tensor:
    """The uninitialised result of `ratio_sum`: like the first message."""
    torch._check(
        message_a.shape == message_b.shape and message_a.dtype == message_b.dtype,
        lambda: f"ratio_sum: messages differ: {_describe(message_a)} and {_describe(message_b)}",
    )
    _check_operand("ratio_sum: carrier", carrier, message_a)
    _check_operand("ratio_sum: denominator", denominator, message_a)
    return torch.empty_like(message_a)


def gamma_pair_result(
    carrier: Tensor | None, message: Tensor, z: Tensor, z_plus: Tensor, gamma: float, eps: float
) -> tuple[Tensor, Tensor]:
    """The uninitialised results of `gamma_pair`: laid out like `z`, of the message's dtype."""
    _check_same_shape("gamma_pair", carrier, message, z, z_plus)
    return torch.empty_like(z, dtype=message.dtype), torch.empty_like(z, dtype=message.dtype)


def alpha_beta_pair_result(
    carrier: Tensor | None,
    message: Tensor,
    z_plus: Tensor | None,
    z_minus: Tensor,
    alpha: float,
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The uninitialised results of `alpha_beta_pair`: laid out like `z_minus`, of the message's dtype."""
    _check_same_shape("alpha_beta_pair", carrier, message, z_plus, z_minus)
    torch._check(
        carrier is not None or z_plus is not None, lambda: "alpha_beta_pair: neither z_plus nor a carrier given"
    )
    return torch.empty_like(z_minus, dtype=message.dtype), torch.empty_like(z_minus, dtype=message.dtype)


def channel_sum_result(carrier: Tensor | None, message: Tensor, groups: int) -> Tensor:
    """The uninitialised result of `channel_sum`: `[N, groups, *spatial]`, contiguous."""
    torch._check(message.dim() >= 2, lambda: f"channel_sum: the message {_describe(message)} is not [N, C, *spatial]")
    torch._check(
        groups > 0 and message.shape[1] % groups == 0,
        lambda: f"channel_sum: {message.shape[1]} channels do not divide into {groups} groups",
    )
    _check_operand("channel_sum: carrier", carrier, message)
    return message.new_empty((message.shape[0], groups, *message.shape[2:]))


def _check_operand(name: str, operand: Tensor | None, message: Tensor) -> None:
    if operand is None:
        return
    one_row = operand.dim() == message.dim() > 0 and operand.shape[0] == 1 and operand.shape[1:] == message.shape[1:]
    torch._check(
        one_row or operand.shape == message.shape,
        lambda: (
            f"{name} {_describe(operand)} has neither the message's shape nor 1 for its batch: {_describe(message)}"
        ),
    )


def _check_same_shape(name: str, *tensors: Tensor | None) -> None:
    given = [t for t in tensors if t is not None]
    torch._check(
        all(t.shape == given[0].shape for t in given),
        lambda: f"{name}: operands differ in shape: {', '.join(_describe(t) for t in given)}",
    )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ratio": ("(Tensor? carrier, Tensor message, Tensor denominator, float eps) -> Tensor", ratio_result),
    "ratio_sum": (
        "(Tensor? carrier, Tensor message_a, Tensor message_b, Tensor denominator, float eps) -> Tensor",
        ratio_sum_result,
    ),
    "gamma_pair": (
        "(Tensor? carrier, Tensor message, Tensor z, Tensor z_plus, float gamma, float eps) -> (Tensor, Tensor)",
        gamma_pair_result,
    ),
    "alpha_beta_pair": (
        "(Tensor? carrier, Tensor message, Tensor? z_plus, Tensor z_minus, float alpha, float beta, float eps)"
        " -> (Tensor, Tensor)",
        alpha_beta_pair_result,
    ),
    "channel_sum": ("(Tensor? carrier, Tensor message, int groups) -> Tensor", channel_sum_result),
}


def _into_result(compute: Callable[..., Any], result: Callable[..., Any]) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Tensor:
        return compute(*arguments, out=result(*arguments))

    return implementation


def _on_gpu(name: str) -> Callable[..., Any]:
    """The Triton operator, loaded when it is first called; without Triton the reference."""

    def compute(*arguments: Any, out: Any) -> Any:
        kernels, _ = gpu.load()
        return getattr(kernels or reference, name)(*arguments, out=out)

    return compute


for _name, (_signature, _result) in OPERATORS.items():
    _LIBRARY.define(_name + _signature, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"lrpfast::{_name}", _result, lib=_LIBRARY)
    _LIBRARY.impl(_name, _into_result(getattr(native, _name), _result), "CPU")
    _LIBRARY.impl(_name, _into_result(_on_gpu(_name), _result), "CUDA")
    _LIBRARY.impl(_name, _into_result(getattr(reference, _name), _result), "CompositeExplicitAutograd")
