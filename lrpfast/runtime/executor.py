"""Execute: a joint program as straight Python code, generated once.

Each step is one call of a bound function; values are local variables, deleted after their last use. The function is a
generator: it runs the model's forward, yields the output, is sent the target, and runs the backward walk. So what is saved
between the two is freed as the walk consumes it, and the caller can check the output before any relevance is computed.

For K targets of one sample the part that depends on the target runs K times; all else (the forward pass, every
denominator) runs once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import fx

from lrpfast.graph import operation_name
from lrpfast.ops import native, reference
from lrpfast.relevance import Joint
from lrpfast.runtime.convolutions import Convolutions
from lrpfast.runtime.lower import Lowering
from lrpfast.runtime.memory import give_back_free_memory, keep_freed_memory
from lrpfast.runtime.samples import samples_meet
from lrpfast.runtime.step import Step
from lrpfast.runtime.tune import Tuner

Run = Generator[Any, Any, None]

# What the values of a part of a batch may take. Small enough that an explanation's peak stays near that of a gradient of the
# whole batch, large enough that convolutions and dense layers are as fast as on all of it.
_PART_BYTES = 336 * 2**20


class Executor:
    """Runs a joint program.

    Parameters
    ----------
    joint
        The program.
    backend
        "native": the compiled operators; "triton": those of the GPU; "torch": the pure-torch references.
    repeated
        Whether the part that depends on the target is to run several times.
    batch
        The batch that weights are laid out for; any other runs as well.
    tuner
        Where given, kernels are chosen by timing.
    timer
        Called with (node, note, seconds) after every step, for profiles.
    """

    def __init__(
        self,
        joint: Joint,
        backend: str,
        repeated: bool = False,
        batch: int = 8,
        tuner: Tuner | None = None,
        timer: Callable[[fx.Node, str, float], None] | None = None,
    ) -> None:
        graph = joint.program.graph
        nodes = [n for n in graph.nodes if n.op != "output"]
        self._inputs = joint.program.inputs
        self._results = joint.program.outputs
        self.recorded = joint.recorded
        target = self._inputs[-1]
        seeded = _reached_from(target, nodes)
        backward = [n for n in nodes if n.op == "call_function" and n not in joint.forward]
        segments = {
            "forward": [n for n in nodes if n in joint.forward and n.op == "call_function"],
            "shared": [n for n in backward if n not in seeded] if repeated else [],
            "seeded": [n for n in backward if n in seeded] if repeated else backward,
        }
        ordered = [n for n in nodes if n.op != "call_function"] + [n for s in segments.values() for n in s]
        keep = set(self._results)
        if repeated:
            keep |= _used_by(segments["seeded"]) - set(segments["seeded"])
        self._device = self._inputs[0].meta["val"].device
        on_cpu = all(i.meta["val"].device.type == "cpu" for i in self._inputs)
        if on_cpu:
            keep_freed_memory()
        lowering, self.tuned = _lowering(joint, ordered, keep, backend, batch, tuner)
        steps = lowering.steps()
        self.steps = steps
        self.choices = [] if tuner is None else _choices(self.tuned, tuner)
        self._source, self._names = _generate(
            lowering, steps, segments, self._inputs, self._results, keep, repeated, timer
        )
        scope = dict(self._names)
        exec(compile(self._source, "<joint program>", "exec"), scope)
        self._function: Callable[..., Run] = scope["run"]
        self.samples_are_separate = not samples_meet(joint)
        in_parts = on_cpu and self.samples_are_separate
        self._settled: set[int] = set()
        self._part = max(1, _PART_BYTES // max(1, _bytes_a_sample(lowering, steps))) if in_parts else None

    def chunks(self, batch: int) -> list[tuple[int, int]]:
        """The parts that a batch is run in: begin and end of each, all of about one size."""
        count = 1 if self._part is None else max(1, -(-batch // self._part))
        size = max(1, -(-batch // count))
        return [(begin, min(batch, begin + size)) for begin in range(0, max(batch, 1), size)]

    def start(self, *inputs: torch.Tensor) -> Run:
        """Begin a run: `next` gives the output; `send(target)` then gives the relevances, once for each target."""
        return self._function(*inputs)

    def settle(self, batch: int) -> None:
        """After a run. The first of a size leaves what kernels keep for that size between its values' memory, and the next run then
        finds no room there for its largest ones; given back, that room is not in memory beside what they take instead."""
        if batch not in self._settled:
            self._settled.add(batch)
            give_back_free_memory(self._device)


def _lowering(
    joint: Joint, nodes: list[fx.Node], keep: set[fx.Node], backend: str, batch: int, tuner: Tuner | None
) -> tuple[Lowering, dict[fx.Node, str]]:
    """The lowering for a backend, and where it will say which steps were chosen by timing."""
    constants = joint.program.constants
    if backend == "triton":
        from lrpfast.ops import triton
        from lrpfast.runtime.lower_gpu import GpuLowering
        from lrpfast.runtime.products_gpu import Products

        products = Products(constants, triton, batch, tuner)
        convolutions = Convolutions(constants, batch, False, None)
        return GpuLowering(joint.program, nodes, keep, triton, convolutions, products), products.tuned
    convolutions = Convolutions(constants, batch, backend == "native", tuner)
    kernels = native if backend == "native" else reference
    return Lowering(joint.program, nodes, keep, kernels, convolutions), convolutions.tuned


def _choices(tuned: dict[fx.Node, str], tuner: Tuner) -> list[str]:
    """A line for each step that was chosen by timing: what was taken and what each way takes."""
    lines = []
    for node, key in tuned.items():
        entry = tuner.choices[key]
        times = ", ".join(f"{way} {seconds * 1000:.2f} ms" for way, seconds in entry["seconds"].items())
        lines.append(f"{node.meta.get('path', '') or operation_name(node)}: {entry['way']} ({times})")
    return lines


def _bytes_a_sample(lowering: Lowering, steps: list[Step]) -> int:
    """The most that live at once, and two more of the largest value, which is what the allocator's gaps come to."""
    root = lowering.liveness.root
    last = {root.get(n, n): i for i, nodes in _last_uses(steps).items() for n in nodes}
    live: dict[fx.Node, int] = {}
    peak = largest = 0
    for index, step in enumerate(steps):
        own = root.get(step.node, step.node)
        if own is step.node:
            live[own] = _sample_bytes(own)
            largest = max(largest, live[own])
            peak = max(peak, sum(live.values()))
        for node in [n for n in live if last.get(n, index) <= index]:
            del live[node]
    return peak + 2 * largest


def _sample_bytes(node: fx.Node) -> int:
    """Bytes of a value, or of the values of an operation that returns several, a sample."""
    results = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
    tensors = [t for t in results if isinstance(t, torch.Tensor)]
    return sum(math.prod(n for n in t.shape if isinstance(n, int)) * t.element_size() for t in tensors)


def _reached_from(start: fx.Node, nodes: list[fx.Node]) -> set[fx.Node]:
    reached = {start}
    for node in nodes:
        if any(a in reached for a in node.all_input_nodes):
            reached.add(node)
    return reached


def _used_by(nodes: list[fx.Node]) -> set[fx.Node]:
    return {a for n in nodes for a in n.all_input_nodes}


def _generate(
    lowering: Lowering, steps: list[Step], segments: dict[str, list[fx.Node]], inputs: list[fx.Node],
    results: list[fx.Node], keep: set[fx.Node], repeated: bool, timer: Callable | None,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    names: dict[str, Any] = {"_clock": time.perf_counter, "_timer": timer}
    ids: dict[int, str] = {}

    def name_of(thing: Any, prefix: str) -> str:
        if id(thing) not in ids:
            ids[id(thing)] = f"_lrp_{prefix}{len(ids)}"
            names[ids[id(thing)]] = thing
        return ids[id(thing)]

    def render(arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return name_of(lowering.constant(arg.target), "c") if arg.op == "get_attr" else arg.name
        if isinstance(arg, (list, tuple)):
            return "[" + ", ".join(map(render, arg)) + "]"
        if arg is None or isinstance(arg, (bool, int, str)):
            return repr(arg)
        return name_of(arg, "k")

    last = _last_uses(steps)
    lines = [f"def run({', '.join(i.name for i in inputs[:-1])}):"]
    seeded = set(segments["seeded"])
    forward_done = False
    indent = "    "
    produced = {n for s in steps for n in (s.node, *s.also)}
    for index, step in enumerate(steps):
        if step.node in seeded and not forward_done:
            forward_done = True
            lines.append(f"{indent}{inputs[-1].name} = yield {render(results[0])}")
            if repeated:
                lines.append(f"{indent}while True:")
                indent = "        "
        arguments = ", ".join([*map(render, step.args), *(f"{k}={render(v)}" for k, v in step.kwargs.items())])
        names_made = ", ".join(n.name for n in (step.node, *step.also))
        call = f"{names_made} = {name_of(step.function, 'f')}({arguments})"
        if timer is None:
            lines.append(indent + call)
        else:
            lines.append(
                f"{indent}_t = _clock(); {call}; _timer({name_of(step.node, 'n')}, {step.note!r}, _clock() - _t)"
            )
        dead = [n.name for n in last.get(index, []) if n not in keep and (n in produced or n in inputs[:-1])]
        if repeated and forward_done:
            dead = [d for d in dead if d in {n.name for n in seeded}]
        if dead:
            lines.append(f"{indent}del {', '.join(dead)}")
    if not forward_done:
        lines.append(f"{indent}{inputs[-1].name} = yield {render(results[0])}")
        if repeated:  # nothing depends on the target: an output without classes
            lines.append(f"{indent}while True:")
            indent = "        "
    relevances = ", ".join(render(r) for r in results[1:])
    lines.append(f"{indent}{inputs[-1].name} = yield ({relevances},)")
    return "\n".join(lines) + "\n", names


def _last_uses(steps: list[Step]) -> dict[int, list[fx.Node]]:
    last: dict[fx.Node, int] = {}
    for index, step in enumerate(steps):
        last.update(dict.fromkeys((step.node, *step.also), index))
        for node in _nodes_in((step.args, step.kwargs)):
            last[node] = index
    result: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        if node.op != "get_attr":
            result.setdefault(index, []).append(node)
    return result


def _nodes_in(arg: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(arg, found.append)
    return found
