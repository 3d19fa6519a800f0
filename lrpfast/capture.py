"""Capture: a torch model becomes one functional graph.

`torch.export` traces the model with a symbolic batch size and keeps the operations that people think in (conv2d, relu,
max_pool2d). In-place calls become functional ones: here where nothing else shares the memory that they write, which is what
networks do with their ReLUs and residual sums; else by ``run_decompositions({})``, which always can and takes as long as the
export. What comes out has no modules, so shared modules, functional and in-place calls and several outputs need no care
anywhere behind this file.

The model is only read: parameters enter the program as they are, detached and sharing memory.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import linecache
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lrpfast.errors import CaptureError, InputError, LrpfastError
from lrpfast.graph import Builder, Program, operation_name

aten = torch.ops.aten


@dataclasses.dataclass
class Captured:
    """A captured model: the program of one output, and how the model packs this output."""

    program: Program
    pack: Callable[[torch.Tensor], Any]


def capture(model: torch.nn.Module | ExportedProgram, inputs: tuple[torch.Tensor, ...]) -> Captured:
    """Capture a model as a functional graph with a dynamic batch.

    Parameters
    ----------
    model
        The model, in eval mode where it has batch norms; or an exported program.
    inputs
        Example inputs, dim 0 the batch.

    Raises
    ------
    CaptureError
        The model cannot be captured; the message names the place in the user's code.
    """
    if isinstance(model, torch.nn.Module):
        check_mode(model)
    try:
        with _source_lines_forgotten():
            exported = model if isinstance(model, ExportedProgram) else _export(model, _example_batch(inputs))
            return _read(_functional(exported))
    except LrpfastError:
        raise
    except Exception as error:
        raise CaptureError(explain_failure(model, inputs, error)) from error


def check_mode(model: torch.nn.Module) -> None:
    """Raise a CaptureError where a module normalises with the statistics of the batch."""
    for name, module in model.named_modules():
        batch_statistics = isinstance(module, torch.nn.modules.batchnorm._NormBase) and module.training
        if batch_statistics and (
            module.track_running_stats or not isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
        ):
            raise CaptureError(
                f"the {type(module).__name__} {name!r} is in training mode: it would normalise with the statistics of "
                "the batch, so that a sample's map depended on its neighbours. Call model.eval() first"
            )


_EXPORT_BATCH = 7  # unlike most sizes in a model, so that nothing is taken for equal to the batch by chance


def _example_batch(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """A batch of zeros: torch.export takes a size of 0 or 1 for a constant, and the values do not matter."""
    return tuple(torch.zeros((_EXPORT_BATCH, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in inputs)


def _export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> ExportedProgram:
    shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings(), torch.no_grad(), _as_it_was(model), _branches_on_the_batch() as branches:
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, inputs, dynamic_shapes=_nest(model, shapes), strict=False)
    if branches:
        raise CaptureError(
            f"the model branches on the size of the batch, so that a sample's map would depend on how many are explained with it: "
            f"{branches[0]}. Decide by something else, or wrap the branch that is wanted"
        )
    return exported


@contextmanager
def _as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Give each module the attributes back that it had: a forward pass may set some, and torch.export puts copies of containers in
    their place, which two modules then no longer share."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    contents = [
        (held, copy.copy(held)) for _, owned in before for held in owned.values() if type(held) in (list, dict, set)
    ]
    try:
        yield
    finally:
        for module, owned in before:
            for name in vars(module).keys() - owned.keys():
                del vars(module)[name]
            vars(module).update(owned)
        for held, content in contents:
            if _identities(held) != _identities(content):
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)


def _identities(held: list | dict | set) -> list[int]:
    """What a container holds, without comparing tensors."""
    return [id(value) for value in (itertools.chain.from_iterable(held.items()) if isinstance(held, dict) else held)]


# To try a branch with.
_SIZES = (*range(1, 7), *range(8, 34), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1024, 10_000)


@contextmanager
def _branches_on_the_batch() -> Iterator[list[str]]:
    """The places where code outside of torch decides by a size that is not fixed, other than it would for another size. Tracing would
    take the way of the example's batch, silently where the size is compared with 0 or 1, of which torch.export assumes it is neither."""
    found: list[str] = []
    decide = torch.SymBool.__bool__
    torch_folder = f"{Path(torch.__file__).parent}{os.sep}"
    thread = threading.get_ident()

    def noticed(condition: torch.SymBool) -> bool:
        taken = decide(condition)
        caller: Any = sys._getframe(1)
        while caller.f_code.co_filename == torch.__file__:  # the truth of a size itself
            caller = caller.f_back
        place = caller.f_code.co_filename
        if threading.get_ident() == thread and not place.startswith(torch_folder):
            expression = condition.node.expr
            sizes = expression.free_symbols
            others = (expression.subs(dict.fromkeys(sizes, size)) for size in _SIZES) if len(sizes) == 1 else ()
            if any(bool(other) != taken for other in others):
                shown = str(expression).replace(str(*sizes), "batch")
                found.append(f"{shown} in {place}, line {caller.f_lineno}")
        return taken

    torch.SymBool.__bool__ = noticed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        torch.SymBool.__bool__ = decide  # type: ignore[method-assign]


@contextmanager
def _source_lines_forgotten() -> Iterator[None]:
    """Let go of the files whose lines torch.export keeps for the stack of each node, some megabytes; they are read again when needed."""
    before = set(linecache.cache)
    try:
        yield
    finally:
        for name in set(linecache.cache) - before:
            if linecache.cache[name][1:2] not in ((), (None,)):  # else its source is in no file
                del linecache.cache[name]


def _nest(model: torch.nn.Module, shapes: tuple) -> tuple:
    """`*args` in a forward takes its specs nested once more."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    nested: list[Any] = []
    rest = list(shapes)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            nested.append(tuple(rest))
            rest = []
        elif rest:
            nested.append(rest.pop(0))
    return tuple(nested + rest)


# Operations whose results are memory of their own, and which give no view of their operands.
_FRESH = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "layer_norm", "group_norm", "add", "sub", "mul", "div", "cat", "relu", "relu6", "hardtanh", "silu", "hardswish", "gelu",
    "sigmoid", "hardsigmoid", "leaky_relu", "elu", "tanh", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "mean", "sym_size",
}  # fmt: skip


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """An exported program whose in-place calls, if any, `_read` can take as functional ones."""
    writes = [n for n in exported.graph.nodes if _is_in_place(n)]
    if all(_owns_what_it_writes(n) for n in writes):
        return exported
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return exported.run_decompositions({})


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _owns_what_it_writes(node: fx.Node) -> bool:
    """Whether an in-place call writes memory that no other value shares."""
    operand = node.args[0]
    if (
        not isinstance(operand, fx.Node)
        or not operation_name(node).endswith("_")
        or not hasattr(aten, operation_name(node)[:-1])
    ):
        return False
    made = operand.op == "call_function" and operation_name(operand).removesuffix("_") in _FRESH
    made = made and (not _is_in_place(operand) or _owns_what_it_writes(operand))
    return made and all(
        operation_name(user).removesuffix("_") in _FRESH for user in operand.users if user.op == "call_function"
    )


def explain_failure(
    model: torch.nn.Module | ExportedProgram, inputs: tuple[torch.Tensor, ...], error: Exception
) -> str:
    """Say where in the user's code the capture failed, and why, without torch's pages of advice."""
    shapes = ", ".join(f"[batch, {', '.join(map(str, x.shape[1:]))}]" for x in inputs)
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    kind = type(error).__name__
    advice = "check that the model runs on inputs of this shape"
    if "GuardOnDataDependent" in kind or "data-dependent" in str(error) or "Dynamic control flow" in str(error):
        advice = "the model's code branches on the values of a tensor, which no fixed program can do; use torch.where"
    elif "ConstraintViolation" in kind or "specialized" in str(error) or "Constraints violated" in str(error):
        advice = "the model fixes the batch size; take it from x.shape[0], or use -1 in a reshape"
    return (
        f"the model {type(model).__name__} cannot be captured for inputs {shapes}: {kind}: {reason}"
        f"{_place(model, error)}\n{advice[0].upper()}{advice[1:]}"
    )


def _place(model: torch.nn.Module | ExportedProgram, error: BaseException) -> str:
    """The deepest frame that runs a forward of one of the model's modules outside of torch."""
    paths = {id(m): n for n, m in model.named_modules()} if isinstance(model, torch.nn.Module) else {}
    torch_folder = str(Path(torch.__file__).parent)
    place = ""
    current: BaseException | None = error
    while current is not None and not place:
        for frame, line in traceback.walk_tb(current.__traceback__):
            owner = frame.f_locals.get("self")
            if id(owner) in paths and not frame.f_code.co_filename.startswith(torch_folder):
                name = paths[id(owner)] or type(owner).__name__
                place = f"\n  in {name!r} ({frame.f_code.co_filename}, line {line})"
            elif id(owner) in paths and paths[id(owner)] and frame.f_code.co_name == "forward":
                place = f"\n  in {paths[id(owner)]!r} ({type(owner).__name__})"
        current = current.__cause__ or current.__context__
    return place


def _read(exported: ExportedProgram) -> Captured:
    """Turn an exported program into a `Program`: parameters become constants, what they alone determine is computed."""
    signature = exported.graph_signature
    for spec in signature.output_specs:
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION, OutputKind.PARAMETER_MUTATION):
            raise CaptureError(
                f"the model changes {spec.target!r} when it runs (a buffer, a parameter or its own input); call "
                "model.eval(), or keep such state out of forward"
            )
    fake_mode = _fake_mode(exported)
    builder = Builder(fake_mode)
    env: dict[fx.Node, Any] = {}
    lifted = {s.arg.name: s for s in signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            env[node] = _placeholder(builder, exported, node, lifted[node.name])
        elif node.op == "call_function":
            builder.path = _path(node)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            env[node] = _call(builder, node, args, kwargs)
            if _is_in_place(node):
                env[node.args[0]] = env[node]  # whoever reads the operand from here on reads what was written
        elif node.op == "output":
            result, pack = _single_output(exported, node)
            builder.graph.output(env[result])
        else:
            raise CaptureError(
                f"the model uses {node.op} {node.target!r} (control flow of higher order), which lrpfast cannot explain"
            )
    return Captured(Program(builder.graph, builder.constants, fake_mode), pack)


def _fake_mode(exported: ExportedProgram) -> Any:
    for node in exported.graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, FakeTensor):
            return fake.fake_mode
    raise CaptureError("the model has neither parameters nor inputs that are tensors")


def _placeholder(builder: Builder, exported: ExportedProgram, node: fx.Node, spec: Any) -> Any:
    if spec.kind is InputKind.USER_INPUT:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            raise InputError(
                f"the model's input {node.name!r} is not a tensor; wrap the model so that it takes tensors"
            )
        return builder.placeholder(node.name, node.meta["val"])
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        tensors = exported.state_dict if spec.target in exported.state_dict else exported.constants
        return builder.constant(tensors[spec.target].detach(), spec.target)
    raise CaptureError(f"the model takes {node.name!r} ({spec.kind}), which lrpfast cannot explain")


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]
    call = key.rsplit("@", 1)[1] if "@" in key else ""
    return f"{path}@{call}" if call else path


_RANDOM = {torch.Tag.nondeterministic_seeded}


def _call(builder: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Append a call; one whose arguments are all constants is computed now."""
    flat = pytree.arg_tree_leaves(args, kwargs)
    nodes = [a for a in flat if isinstance(a, fx.Node)]
    foldable = isinstance(node.target, torch._ops.OpOverload) and not _RANDOM.intersection(node.target.tags)
    values = [a for a in flat if isinstance(a, _Values)]
    if foldable and all(n.op == "get_attr" for n in nodes) and not values:
        real_args, real_kwargs = fx.map_arg((args, kwargs), builder.tensor)
        with torch.no_grad():
            result = node.target(*real_args, **real_kwargs)
        if isinstance(result, torch.Tensor):
            return builder.constant(result.detach(), node.name)
        return _Values(tuple(result)) if isinstance(result, (tuple, list)) else result
    if values:
        (holder,) = values
        return builder.constant(holder.tensors[args[1]].detach(), node.name)
    target = node.target
    if _is_in_place(node):
        target = getattr(getattr(aten, operation_name(node)[:-1]), target._overloadname)
    fakes = pytree.tree_leaves(node.meta.get("val"))
    known = all(isinstance(f, FakeTensor) and f.fake_mode is builder.fake_mode for f in fakes)
    if known:
        return builder.call_of(node.meta["val"], target, args, kwargs)
    return builder.call(target, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Values:
    """The results of an operation on constants that returns several tensors."""

    tensors: tuple[torch.Tensor, ...]


def _single_output(exported: ExportedProgram, node: fx.Node) -> tuple[fx.Node, Callable[[torch.Tensor], Any]]:
    results = [
        (index, value)
        for index, value in enumerate(node.args[0])
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
    ]
    if len(results) != 1:
        raise CaptureError(
            f"the model returns {len(results)} tensors and LRP explains one; wrap the model in a module whose forward "
            "returns the tensor to explain"
        )
    ((index, result),) = results
    spec = exported.call_spec.out_spec
    others = list(node.args[0])

    def pack(output: torch.Tensor) -> Any:
        leaves = [_of_batch(leaf, len(output)) for leaf in others]
        leaves[index] = output
        return pytree.tree_unflatten(leaves, spec)

    return result, pack


def _of_batch(leaf: Any, batch: int) -> Any:
    """What a model returns beside its tensor; a size that hangs on the batch for this one."""
    size = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    if not isinstance(size, torch.SymInt):
        return leaf
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
