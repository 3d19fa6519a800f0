"""The plan: what an explainer will do and why, as a table."""

from __future__ import annotations

import collections
import dataclasses
import io
import math
from typing import Any, NamedTuple

import torch
from torch import fx

from lrpfast.graph import is_tensor, operation_name, value
from lrpfast.ops.filters import Filters
from lrpfast.ops.products import Product
from lrpfast.relevance import Joint
from lrpfast.runtime import Executor
from lrpfast.runtime.lower import is_view
from lrpfast.runtime.step import Step

_MAC_OPERATIONS = ("convolution", "linear", "conv_dgrad")


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation of the model: its rule, which entry of the composite gave it, how it is done, and its cost.

    `kernels` counts the steps of the program that are the layer's own: kernels, where each step is one. `gmacs` counts multiplications
    of the explanation, and `forward_gmacs` those of the model's own pass, a sample.
    """

    layer: str
    operation: str
    rule: str
    why: str
    how: str
    kernels: int
    forward_gmacs: float
    gmacs: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan; `str` gives the table."""

    composite: str
    rows: tuple[Row, ...]
    facts: str
    steps: int
    choices: tuple[str, ...] = ()

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"composite {self.composite}", title_justify="left", pad_edge=False)
        for name in ("layer", "operation", "rule", "from", "how"):
            table.add_column(name, overflow="fold")
        table.add_column("kernels", justify="right")
        table.add_column("GMAC forward", justify="right")
        table.add_column("relevance", justify="right")
        for row in self.rows:
            costs = [f"{c:.3f}" if c else "" for c in (row.forward_gmacs, row.gmacs)]
            table.add_row(row.layer, row.operation, row.rule, row.why, row.how, str(row.kernels or ""), *costs)
        buffer = io.StringIO()
        Console(file=buffer, width=140, force_terminal=False, no_color=True).print(table)
        forward, total = sum(r.forward_gmacs for r in self.rows), sum(r.gmacs for r in self.rows)
        ratio = f", {(forward + total) / forward:.2f} times the forward pass" if forward else ""
        chosen = "".join(f"\n  {line}" for line in self.choices)
        return (
            f"{buffer.getvalue()}facts: {self.facts}\nsteps: {self.steps}\n"
            f"{f'kernels chosen by timing:{chosen}' if chosen else 'kernels: the defaults, nothing was timed'}\n"
            f"multiplications a sample: {forward:.3f} GMAC forward, {total:.3f} GMAC for the relevance{ratio}"
        )


def make_plan(joint: Joint, executor: Executor, composite: str) -> Plan:
    """Describe a joint program and the executor that runs it."""
    backward: dict[str, float] = {}
    for node in joint.program.graph.nodes:
        if node.op == "call_function" and node not in joint.forward:
            path = node.meta.get("path", "")
            backward[path] = backward.get(path, 0.0) + _gmacs(node)
    kernels = collections.Counter(step.node.meta.get("path", "") for step in executor.steps if not is_view(step.node))
    rows = []
    for node, assignment in joint.rules.items():
        layer = assignment.layer
        rule = str(assignment.rule) if assignment.rule is not None else "default"
        own = _gmacs(node)
        path = node.meta.get("path", "")
        cost = backward.pop(path, 0.0) if own else 0.0
        how = joint.notes.get(node, "")
        rows.append(Row(layer.name, layer.operation, rule, assignment.why, how, kernels.pop(path, 0), own, cost))
    return Plan(composite, tuple(rows), str(joint.facts), len(executor.steps), tuple(executor.choices))


class StepTime(NamedTuple):
    """What one step of a program took: ``flops`` counts multiplications and additions of convolutions and dense layers (none with
    padding), ``bytes`` what is read and written at least."""

    module: str
    operation: str
    seconds: float
    flops: float
    bytes: int


def step_time(step: Step, seconds: float, batch: int) -> StepTime:
    """Put a time beside what the step has to do for a batch."""
    node = step.node
    name = operation_name(node) + (f" ({step.note})" if step.note else "")
    flops = sum(2e9 * batch * _gmacs(layer) * _within(layer) for layer in step.computes or (node,))
    touched: list[fx.Node] = []
    fx.map_arg((step.args, step.kwargs), touched.append)
    tensors = [t for n in {*touched, node, *step.also} for t in _tensors(n.meta.get("val"))]
    tensors += [t for t in map(_weight, step.args) if t is not None]
    size = sum(math.prod(n if isinstance(n, int) else batch for n in t.shape) * t.element_size() for t in tensors)
    return StepTime(node.meta.get("path", ""), name, seconds, flops, size)


def _weight(argument: object) -> torch.Tensor | None:
    """The tensor that a step reads, of an argument that is not the value of a node."""
    if isinstance(argument, Product):
        argument = argument.weight
    if isinstance(argument, Filters):
        argument = argument.weight
    return argument if isinstance(argument, torch.Tensor) else None


def _within(node: fx.Node) -> float:
    """The share of a convolution's multiplications that meet values and not the padding, which good kernels leave out."""
    name = operation_name(node)
    if name not in ("convolution", "conv_dgrad") or (name == "convolution" and node.args[6]):
        return 1.0
    shift = 1 if name == "conv_dgrad" else 0  # a transpose takes the size of its result as well
    sizes = node.args[2] if shift else value(node.args[0]).shape[2:]
    outs = value(node.args[0] if shift else node).shape[2:]
    kernel = value(node.args[1]).shape[2:]
    share = 1.0
    for n, out, k, stride, padding, dilation in zip(sizes, outs, kernel, *node.args[3:6], strict=True):
        met = sum(0 <= o * stride - padding + tap * dilation < n for o in range(out) for tap in range(k))
        share *= met / (out * k)
    return share


def _tensors(found: Any) -> list[torch.Tensor]:
    results = found if isinstance(found, (tuple, list)) else [found]
    return [t for t in results if isinstance(t, torch.Tensor)]


def _gmacs(node: fx.Node) -> float:
    """Multiplications of a step for one sample, in 10⁹."""
    if operation_name(node) not in (*_MAC_OPERATIONS, "matmul") or not is_tensor(node):
        return 0.0
    weight = node.args[1]
    shape = [s if isinstance(s, int) else 1 for s in value(node).shape]
    weights = value(weight).shape
    count = 1
    if operation_name(node) in ("linear", "matmul"):
        for size in shape:
            count *= size
        return count * int(weights[-1] if operation_name(node) == "linear" else weights[-2]) / 1e9
    transposed = operation_name(node) == "convolution" and node.args[6]
    positions = value(node.args[0]).shape if transposed or operation_name(node) == "conv_dgrad" else shape
    for size in positions[2:]:
        count *= int(size)
    for size in weights:
        count *= int(size)
    return count / 1e9
