"""Build the joint program: the forward graph, the seed, and one walk backwards through the propagators."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import fx

import lrpfast.ops  # noqa: F401  declares torch.ops.lrpfast
from lrpfast.assign import Assignment
from lrpfast.errors import CaptureError, InputError, UnsupportedOperationError
from lrpfast.explanation import FEATURES
from lrpfast.facts import Facts, depends_on_input, prove
from lrpfast.graph import Builder, Program, describe, is_tensor, operation_name, rank, same_sizes, value
from lrpfast.kinds import kinds_of
from lrpfast.ops import transposes  # noqa: F401  declares the transposes
from lrpfast.relevance import affine, attention, elementwise, normalisation, pooling, routing  # noqa: F401  register
from lrpfast.relevance.walk import Message, OneHot, Walk, propagator

aten = torch.ops.aten


class Seed(enum.Enum):
    """The relevance at the output (RULES §6)."""

    LOGIT = "logit"
    ONE = "one"
    TENSOR = "tensor"


@dataclasses.dataclass(frozen=True)
class Joint:
    """A joint program and what is known of it.

    Attributes
    ----------
    program
        Takes the inputs and the target (class indices ``[N]``, -1 for the arg max; for `Seed.TENSOR` the relevance at the
        output); returns the output, the relevance of each input, and that of each recorded layer.
    forward
        The nodes that compute the model's output: the first part of the graph.
    """

    program: Program
    seed: Seed
    recorded: tuple[str, ...]
    forward: frozenset[fx.Node]
    facts: Facts
    rules: dict[fx.Node, Assignment]
    notes: dict[fx.Node, str]


def transform(
    program: Program, rules: dict[fx.Node, Assignment], seed: Seed = Seed.LOGIT, record: tuple[str, ...] = ()
) -> Joint:
    """Transform a canonical program with its rules into the joint program.

    Raises
    ------
    UnsupportedOperationError, RuleError
        Relevance reaches an operation that has no rule; a rule does not fit its layer.
    InputError
        A name in `record` fits no layer that relevance can reach.
    CaptureError
        The output has no dimension for the samples.
    """
    build, mapping = _copy(program)
    output = mapping[program.outputs[0]]
    forward = frozenset(build.graph.nodes)
    copied = Program(build.graph, build.constants, program.fake_mode)
    facts = prove(copied)
    walk = Walk(build, facts, depends_on_input(copied), {mapping[n]: a for n, a in rules.items()}, output)
    inputs = copied.inputs
    order = list(build.graph.nodes)
    if output not in walk.reached:
        raise UnsupportedOperationError(
            f"the model's output ({describe(output)}) depends on the input through comparisons alone, or not at all: no relevance "
            "can reach the input"
        )
    if rank(output) == 0:
        raise CaptureError(
            f"the model's output ({describe(output)}) is one number for the whole batch, whose samples LRP explains one by one: wrap the "
            "model so that it returns a number, or a vector, for each sample"
        )
    recorded = _recorded_values(walk, order, record)
    walk.send(output, _seed(walk, output, seed, inputs[-1]))
    relevance, layers = _run(walk, order, inputs, recorded)
    if FEATURES in layers:
        layers[FEATURES] = _by_channel(walk, layers[FEATURES], _last_features(walk, order)[1])
    results = [output, *(relevance[i] for i in inputs), *(layers[name] for name in recorded)]
    build.graph.output(tuple(results))
    build.graph.eliminate_dead_code()
    live = set(build.graph.nodes)
    return Joint(
        Program(build.graph, build.constants, program.fake_mode), seed, tuple(recorded),
        frozenset(n for n in forward if n in live), facts, walk.rules, walk.notes,
    )  # fmt: skip


def default_seed(program: Program) -> Seed:
    """The seed of a call without a target: the logit, where a class names one value of the output."""
    return Seed.LOGIT if rank(program.outputs[0]) <= 2 else Seed.TENSOR


def _copy(program: Program) -> tuple[Builder, dict[fx.Node, fx.Node]]:
    build = Builder(program.fake_mode)
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr":
            build.path = node.meta["path"]
            mapping[node] = build.adopt(program.constants, node)
        else:
            mapping[node] = build.graph.node_copy(node, lambda n: mapping[n])
    return build, mapping


def _seed(walk: Walk, output: fx.Node, seed: Seed, last_input: fx.Node) -> Message:
    """Add the program's last input and make the message at the output."""
    name = "relevance" if seed is Seed.TENSOR else "target"
    with walk.build.graph.inserting_after(last_input):
        if seed is Seed.TENSOR:
            return Message((walk.build.placeholder(name, value(output)),))
        with walk.build.fake_mode:
            indices = torch.empty((value(output).shape[0],), dtype=torch.int64, device=value(output).device)
        target = walk.build.placeholder(name, indices)
    carrier = output if seed is Seed.LOGIT else None
    if rank(output) == 1:
        return Message((walk.call(aten.ones_like.default, output),), carrier)
    best = walk.call(aten.argmax.default, output, 1)
    resolved = walk.call(aten.where.self, walk.call(aten.lt.Scalar, target, 0), best, target)
    resolved.meta["target"] = True
    column = walk.call(aten.unsqueeze.default, resolved, 1)
    one_hot = walk.call(aten.scatter.value, walk.call(aten.zeros_like.default, output), 1, column, 1.0)
    return Message((one_hot,), carrier, OneHot(resolved))


def _run(
    walk: Walk, order: list[fx.Node], inputs: list[fx.Node], recorded: dict[str, fx.Node]
) -> tuple[dict[fx.Node, fx.Node], dict[str, fx.Node]]:
    names_at: dict[fx.Node, list[str]] = {}
    for name, node in recorded.items():
        names_at.setdefault(node, []).append(name)
    relevance: dict[fx.Node, fx.Node] = {}
    layers: dict[str, fx.Node] = {}
    for node in reversed(order):
        if node not in walk.reached:
            continue
        walk.build.path = node.meta.get("path", "")
        message = walk.collect(node)
        if node in names_at or node in inputs:
            total = _total(walk, node, message)
            layers.update(dict.fromkeys(names_at.get(node, []), total))
            relevance[node] = total
        if message is not None and node not in inputs:
            assignment = walk.rules.get(node)
            propagator(node)(walk, node, message, assignment.rule if assignment else None)
    return relevance, layers


def _total(walk: Walk, node: fx.Node, message: Message | None) -> fx.Node:
    return walk.call(aten.zeros_like.default, node) if message is None else walk.relevance(message)


def _recorded_values(walk: Walk, order: list[fx.Node], record: tuple[str, ...]) -> dict[str, fx.Node]:
    """The value that leaves each module named in `record`; for `FEATURES` what the last layer reads."""
    leaving = _leaving_values(order, walk.output) if record else {}
    reached = [name for name, node in leaving.items() if node in walk.reached]
    result: dict[str, fx.Node] = {}
    for pattern in record:
        if pattern == FEATURES:
            result[FEATURES], _ = _last_features(walk, order)
            continue
        names = _fitting(reached, pattern)
        if not names and (apart := _fitting(leaving, pattern)):
            raise InputError(
                f"record: {pattern!r} fits {', '.join(apart)}, whose values do not depend on the input: no relevance reaches them"
            )
        if not names:
            listed = ", ".join(reached[:12]) + (", ..." if len(reached) > 12 else "")
            raise InputError(f"record: {pattern!r} fits no layer of the model; its layers: {listed}")
        result.update({n: leaving[n] for n in names})
    return result


def _fitting(names: Iterable[str], pattern: str) -> list[str]:
    return [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.split("@")[0], pattern)]


def _last_features(walk: Walk, order: list[fx.Node]) -> tuple[fx.Node, int]:
    """What the last dense layer or convolution that the input reaches reads, before it was flattened, and its dimension of channels."""

    def by_sample(node: fx.Node) -> bool:
        return same_sizes(value(node).shape[:1], value(walk.output).shape[:1])

    layers = [node for node in order if {"linear", "conv"} & {*kinds_of(node)} and node.args[0] in walk.reached]
    if not layers:
        raise InputError(
            f"record: {FEATURES!r} is what the last dense layer reads; the model has none, and no convolution"
        )
    read = found = layers[-1].args[0]
    if not by_sample(read):
        raise InputError(
            f"record: {FEATURES!r} is what the last layer reads, by sample; {describe(layers[-1])} reads {list(value(read).shape)}"
        )
    while operation_name(found) == "reshape" and by_sample(found.args[0]):
        found = found.args[0]
    return found, rank(found) - 1 if found is read and kinds_of(layers[-1]) == ("linear",) else 1


def _by_channel(walk: Walk, relevance: fx.Node, channel: int) -> fx.Node:
    """[N, C]: what belongs to each channel, wherever it is."""
    places = [dim for dim in range(1, rank(relevance)) if dim != channel]
    return walk.call(aten.sum.dim_IntList, relevance, places) if places else relevance


def _leaving_values(order: list[fx.Node], output: fx.Node) -> dict[str, fx.Node]:
    """For each module the last of its values that is used outside of it."""
    leaving: dict[str, fx.Node] = {}
    for node in order:
        if node.op != "call_function" or not is_tensor(node) or not value(node).is_floating_point():
            continue
        for path in (node.meta["path"], *node.meta.get("aliases", ())):
            for module in _enclosing(path):
                if node is output or any(not _inside(u, module) for u in node.users):
                    leaving[module] = node
    return leaving


def _enclosing(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _inside(node: fx.Node, module: str) -> bool:
    return any(module in _enclosing(p) for p in (node.meta["path"], *node.meta.get("aliases", ())))
