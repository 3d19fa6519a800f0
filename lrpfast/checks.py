"""What a call may be given, and what may leave it: each check raises an error that names the thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lrpfast.errors import InputError, ModelError, NumericsError, TargetError
from lrpfast.relevance import Seed


def as_inputs(inputs: Any) -> tuple[torch.Tensor, ...]:
    """A tensor or a sequence of tensors as a tuple.

    Raises
    ------
    InputError
        Anything else.
    """
    given = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(given, (tuple, list)) or not given:
        raise InputError(f"inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
    for index, tensor in enumerate(given):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"input {index} is a {type(tensor).__name__}, not a tensor")
    return tuple(given)


def check_inputs(inputs: tuple[torch.Tensor, ...], parameters: Iterable[torch.Tensor], finite: bool = True) -> None:
    """Rank, batch, dtype, device and values of the inputs.

    Raises
    ------
    InputError
        A wrong shape, dtype or device.
    NumericsError
        NaN or infinity.
    """
    weights = next((p for p in parameters if p.is_floating_point()), None)
    for index, tensor in enumerate(inputs):
        name = "the input" if len(inputs) == 1 else f"input {index}"
        if tensor.layout is not torch.strided:
            raise InputError(f"{name} is sparse ({tensor.layout}); give it as a dense tensor, such as input.to_dense()")
        if tensor.dim() < 2:
            raise InputError(
                f"{name} has the shape {list(tensor.shape)}; dim 0 must be the batch, so at least 2 are needed"
            )
        if tensor.shape[0] != inputs[0].shape[0]:
            raise InputError(f"{name} has a batch of {tensor.shape[0]}, the first input one of {inputs[0].shape[0]}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} is {tensor.dtype}; relevance needs floating point, such as input.float() / 255")
        if weights is not None and tensor.dtype != weights.dtype:
            raise InputError(f"{name} is {tensor.dtype}, the model {weights.dtype}; convert one of them")
        if weights is not None and tensor.device != weights.device:
            raise InputError(f"{name} is on {tensor.device}, the model on {weights.device}; move one of them")
        if finite:
            check_finite(tensor, name)


def as_names(record: Any) -> tuple[str, ...]:
    """Names of modules to record, as a tuple: of none, one or several.

    Raises
    ------
    InputError
        Anything else than strings.
    """
    given = (record,) if isinstance(record, str) else () if record is None else record
    names = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"record must be names of modules, such as ('layer4', 'features.*'), got {record!r}")
    return names


def check_finite(tensor: torch.Tensor, name: str, first: int = 0) -> None:
    """Raise a NumericsError where a tensor has NaN or infinity; the message says in which samples, counted from `first`."""
    if bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all()):
        return
    bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
    samples = (bad.nonzero().flatten() + first).tolist()
    shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
    kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    raise NumericsError(f"{name} holds {kind} in sample {shown} of the batch")


def check_parameters(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise an error that names a parameter or buffer without values, or with NaN. A program would hide NaN: a convolution with its
    ReLU in one call makes zero of it. Infinities are in the masks of many models.

    Raises
    ------
    ModelError
        A tensor is on the device "meta".
    NumericsError
        NaN.
    """
    for name, tensor in named:
        if tensor.is_meta:
            raise ModelError(f"{name!r} of the model has no values: it is on the device 'meta'; load its weights")
        suspect = tensor.is_floating_point() and tensor.numel() and not bool(torch.isfinite(tensor.detach().sum()))
        if suspect and bool(tensor.isnan().any()):
            raise NumericsError(f"{name!r} of the model holds NaN; load its weights again")


def check_seed(seed: str) -> Seed:
    """The kind of seed by its name; raises an InputError for another."""
    if seed not in (Seed.LOGIT.value, Seed.ONE.value):
        raise InputError(f"seed must be 'logit' or 'one', got {seed!r}; give your own relevance as the target")
    return Seed(seed)


def refuse_classes(shape: Sequence[Any]) -> None:
    """Raise the TargetError of an output in which a class does not name one value."""
    raise TargetError(
        f"the model's output has the shape [N, {', '.join(map(str, shape[1:]))}], so a class does not name one value; give the "
        "relevance at the output as the target, a floating-point tensor of this shape"
    )


def check_target(target: Any, batch: int, output: torch.Tensor) -> torch.Tensor | None:
    """What is asked of a batch, before anything runs: None, class indices, or the relevance at the output.

    `output` is the output for a batch of any size.

    Raises
    ------
    TargetError
        A wrong shape, dtype or value.
    NumericsError
        NaN or infinity.
    """
    if target is None:
        return None
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        _check_output_shape(target, (batch, *output.shape[1:]))
        check_finite(target, "target")
        return target
    return class_indices(target, batch, output.shape[1] if output.dim() == 2 else 1)


def resolve_target(target: int | Sequence[int] | torch.Tensor | None, output: torch.Tensor) -> torch.Tensor:
    """Class indices, int64 ``[N]`` or ``[N, K]``, on the output's device.

    Raises
    ------
    TargetError
        A wrong shape, dtype or value.
    """
    if target is None:
        return output.argmax(1) if output.dim() == 2 and output.numel() else _zeros(output)
    return class_indices(target, output.shape[0], output.shape[1] if output.dim() == 2 else 1).to(output.device)


def class_indices(target: int | Sequence[int] | torch.Tensor, batch: int, classes: int) -> torch.Tensor:
    """The class indices that a target names, int64 ``[N]`` or ``[N, K]``; raises a TargetError as `resolve_target`."""
    indices = _indices(target)
    if indices.dim() == 0:
        indices = indices.expand(batch).clone()
    if indices.dim() not in (1, 2) or indices.shape[0] != batch:
        raise TargetError(
            f"target has the shape {list(indices.shape)}; it must be [{batch}] or [{batch}, K] for a batch of {batch}"
        )
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= classes):
        wrong = indices[(indices < 0) | (indices >= classes)].flatten()[0].item()
        raise TargetError(f"target {wrong} is out of range: the model has {classes} outputs, 0 to {classes - 1}")
    if indices.dim() == 2 and indices.shape[1] == 0:
        raise TargetError("target has the shape [N, 0]: there is nothing to explain")
    return indices


def _zeros(output: torch.Tensor) -> torch.Tensor:
    return torch.zeros(output.shape[0], dtype=torch.int64, device=output.device)


def _indices(target: Any) -> torch.Tensor:
    if isinstance(target, bool):
        raise TargetError("target is a bool; it must be an int, an int64 tensor, or a floating-point tensor")
    try:
        indices = target if isinstance(target, torch.Tensor) else torch.as_tensor(target, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"target must be None, an int, or a tensor, got {type(target).__name__}") from error
    if indices.is_floating_point() or indices.dtype == torch.bool or indices.is_complex():
        raise TargetError(f"target is {indices.dtype}; class indices must be int64")
    return indices.to(torch.int64)


def check_output_relevance(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The relevance at the output as given, in the output's dtype.

    Raises
    ------
    TargetError
        It does not have the output's shape.
    NumericsError
        NaN or infinity.
    """
    _check_output_shape(target, output.shape)
    check_finite(target, "target")
    return target.detach().to(dtype=output.dtype, device=output.device)


def _check_output_shape(target: torch.Tensor, shape: Sequence[int]) -> None:
    if tuple(target.shape) != tuple(shape):
        raise TargetError(
            f"target is a floating-point tensor of shape {list(target.shape)}: as the relevance at the output it must have "
            f"the output's shape {list(shape)}"
        )


def seed_relevance(output: torch.Tensor, target: torch.Tensor, seed: Seed) -> torch.Tensor:
    """The relevance at the output that a seed stands for, shaped like the target."""
    if seed is Seed.ONE:
        return torch.ones_like(target, dtype=output.dtype)
    if output.dim() == 1:
        return output if target.dim() == 1 else output[:, None].expand(target.shape)
    columns = target if target.dim() == 2 else target[:, None]
    return output.gather(1, columns).reshape(target.shape)
