"""Lower: choose for every node of a joint program the function that computes it.

The result of a choice is a `Step`: a plain function and its arguments, in which nodes stand for values. Three things are
decided here, once: which kernel (a convolution with its ReLU in one call, a stride-1 transpose as a convolution with flipped
weights), in which memory (in place where the operand dies), and in which layout (channels-last weights).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import fx

from lrpfast.graph import (
    Program,
    argument,
    is_tensor,
    operation_name,
    rank,
    same_shape,
    same_sizes,
    value,
)
from lrpfast.ops import native, reference
from lrpfast.ops.reference import Scales
from lrpfast.ops.transposes import TRANSPOSES
from lrpfast.runtime.convolutions import Convolutions
from lrpfast.runtime.fusion import Either, find_groups
from lrpfast.runtime.step import Step

aten = torch.ops.aten


# Operations whose result may lie in their operand's memory though their schema does not say so.
_VIEWS = {"getitem", "constant_pad_nd", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"}


def is_view(node: fx.Node) -> bool:
    """Whether a value may lie in the memory of its first operand."""
    if node.op != "call_function" or not node.all_input_nodes:
        return False
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and any(r.alias_info is not None for r in schema.returns)
    return aliases or operation_name(node) in _VIEWS


class Liveness:
    """When each value, and the memory that it may share with others, is used for the last time."""

    def __init__(self, nodes: list[fx.Node], keep: Iterable[fx.Node]) -> None:
        self._nodes = nodes
        self.position = {n: i for i, n in enumerate(nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            first = node.all_input_nodes[0] if is_view(node) else node
            self.root[node] = self.root.get(first, first)
        last: dict[fx.Node, int] = {}
        for node in nodes:
            for used in node.all_input_nodes:
                root = self.root[used]
                last[root] = max(last.get(root, -1), self.position[node])
        for node in keep:
            last[self.root[node]] = len(nodes)
        self._last = last

    def dies_at(self, value_node: fx.Node, user: fx.Node) -> bool:
        """Whether `user` is the last to need the memory of a value."""
        return self._last[self.root[value_node]] == self.position[user]

    def lives_until(self, value_node: fx.Node, user: fx.Node) -> bool:
        """Whether the memory of a value still holds it when `user` runs."""
        root = self.root[value_node]
        return self._last.get(root, -1) >= self.position[user] or not self.owned(value_node)

    def last_user(self, value_node: fx.Node) -> fx.Node:
        """The last node to need the memory of a value."""
        return self._nodes[self._last[self.root[value_node]]]

    def owned(self, node: fx.Node) -> bool:
        """Whether a value's memory was made by a step, at full size, so that it may be written."""
        root = self.root[node]
        made = root.op == "call_function" and operation_name(root) not in ("getitem",)
        expanded = node
        while expanded is not root:
            if operation_name(expanded) == "expand":
                return False
            expanded = expanded.all_input_nodes[0]
        return made


class Lowering:
    """Lowers the nodes of one program for one backend."""

    def __init__(
        self,
        program: Program,
        nodes: list[fx.Node],
        keep: set[fx.Node],
        kernels: ModuleType,
        convolutions: Convolutions,
    ) -> None:
        self.program = program
        self.convolutions = convolutions
        self.nodes = nodes
        self.liveness = Liveness(nodes, keep)
        self.keep = keep
        self.kernels = kernels
        self.fused = kernels is not reference  # whether there are kernels for what torch does in several passes
        self._kept: dict[str, torch.Tensor] = {}
        self._computed: set[fx.Node] = set()  # by an earlier step, together with its operand
        self._postponed: set[fx.Node] = set()  # to the step that adds it to another value

    def steps(self) -> list[Step]:
        """The steps of the program, in order; a node that was fused into another has none."""
        fused = self._fused()
        result: list[Step] = []
        for node in self.nodes:
            if node.op != "call_function" or node in self._computed:
                continue
            result += fused[node] if node in fused else self._lower(node)
        return [step for step in result if step.node not in self._postponed]

    def _lower(self, node: fx.Node) -> list[Step]:
        lower = getattr(self, f"_lower_{operation_name(node)}", None)
        made = lower(node) if lower else None
        if made is None:
            return [Step(node, node.target, tuple(node.args), dict(node.kwargs))]
        return made if isinstance(made, list) else [made]

    # --- groups of nodes in one call ---

    def _fused(self) -> dict[fx.Node, list[Step]]:
        """The steps of each group that one call computes, at its last node, and none at the nodes that they replace."""
        steps: dict[fx.Node, list[Step]] = {}
        if self.kernels is not native:
            return steps
        for group in find_groups(self.nodes, self):
            if isinstance(group, Either):
                made = self.convolutions.either(group)
            elif operation_name(group.last) in ("ratio", "ratio_sum"):
                (ratio,) = self._lower(group.last)
                read = [n for replaced in group.replaced for n in replaced.all_input_nodes]
                out = next((m for m in group.last.args[1:-2] if self._writable(m, group.last, read)), None)
                made = self.convolutions.ratio(group.last, group.layer, ratio, out)
            else:
                assert not isinstance(group.layer, fx.Node)
                made = self.convolutions.signed(group.last, group.layer)
            if made is not None:
                steps[group.last] = made
                steps |= {node: [] for node in group.replaced}
        return steps

    def readable(self, node: fx.Node, at: fx.Node, instead_of: set[fx.Node]) -> bool:
        """Whether the memory of a value still holds it at a node, if some of the nodes that use it do not run."""
        return self.liveness.lives_until(node, at) or self.liveness.last_user(node) in instead_of

    # --- constants ---

    def constant(self, name: str) -> torch.Tensor:
        """A constant that a step takes as it is; all that take it take the same tensor."""
        if name not in self._kept:
            self._kept[name] = self.program.constants[name]
        return self._kept[name]

    # --- layers ---

    def _lower_convolution(self, node: fx.Node) -> list[Step] | Step | None:
        steps = self.convolutions.forward(node, self.only_user(node))
        self._computed |= {step.node for step in steps} - {node}
        return steps

    def _lower_conv_dgrad(self, node: fx.Node) -> list[Step] | Step | None:
        return self.convolutions.dgrad(node)

    def only_user(self, node: fx.Node) -> fx.Node | None:
        """The only user of a value that nothing else needs."""
        users = list(node.users)
        return users[0] if len(users) == 1 and node not in self.keep else None

    def _lower_linear(self, node: fx.Node) -> Step | None:
        """A dense layer; one of few samples, bound by reading its weight, in one reading with its modified weight's."""
        x, weight, bias = node.args
        if rank(node) != 2:
            return None
        if not self._reads_once(node, weight):
            return Step(node, reference.dense, node.args)
        scaled = self.program.constants.scaled(weight.target)
        if scaled is not None:
            source, scales = scaled
            return Step(node, native.dense, (x, self.constant(source), bias, scales), note="weight modified on the way")
        for other in x.users:
            modified = self._scales(other, node)
            if modified is not None and other not in self._computed:
                self._computed.add(other)
                return Step(
                    node, native.dense_pair, (x, weight, bias, other.args[2], modified),
                    note="with its modified weight's", also=(other,), computes=(node, other),
                )  # fmt: skip
        return Step(node, native.dense, node.args)

    def _scales(self, node: fx.Node, layer: fx.Node) -> Scales | None:
        """Of a node that is a dense layer of the same input with that layer's weight modified: how."""
        if node.target is not aten.linear.default or node.args[0] is not layer.args[0] or not is_tensor(node.args[1]):
            return None
        source, scales = self.program.constants.scaled(node.args[1].target) or (None, None)
        return scales if source == layer.args[1].target else None

    def _lower_matmul(self, node: fx.Node) -> Step | None:
        """A dense layer's transpose."""
        a, weight = node.args
        dense = weight.op == "get_attr" and rank(a) == rank(weight) == 2 and self.kernels is native
        if not dense:
            return None
        source, scales = self.program.constants.scaled(weight.target) or (weight.target, None)
        # Rows that no relevance reaches are not read: infinities in them, which make NaN of it, would go unnoticed.
        if not bool(torch.isfinite(self.program.constants[source].sum())):
            return None
        if scales is None or not self._reads_once(node, weight):
            return Step(node, native.dense_dgrad, (a, weight))
        return Step(node, native.dense_dgrad, (a, self.constant(source), scales), note="weight modified on the way")

    def _reads_once(self, node: fx.Node, weight: fx.Node) -> bool:
        """Whether a dense layer's time is that of reading its weight, so that a modified one is not worth the memory."""
        small = self.convolutions.batch <= native.FEW_SAMPLES and weight.op == "get_attr"
        return small and self.kernels is native and value(node).dtype is torch.float32 and native.extension is not None

    # --- pooling ---

    def _lower_max_pool2d_with_indices(self, node: fx.Node) -> Step | None:
        return Step(node, self.kernels.max_pool, tuple(node.args)) if self._compact(node) else None

    def _lower_max_pool_dgrad(self, node: fx.Node) -> Step:
        pool = node.args[1].args[0]
        compact = operation_name(pool) == "max_pool2d_with_indices" and self._compact(pool)
        return Step(node, self.kernels.max_pool_dgrad if compact else TRANSPOSES["max_pool_dgrad"][1], tuple(node.args))

    def _compact(self, pool: fx.Node) -> bool:
        """Whether a max pool keeps one byte a window. Who won is asked by its way back alone."""
        taps = pool.args[1][0] * pool.args[1][1]
        return self.fused and taps <= 256 and self.kernels.takes(value(pool)[0])

    def _lower_avg_pool_dgrad(self, node: fx.Node) -> Step:
        function = self.kernels.avg_pool_dgrad if self.fused else TRANSPOSES["avg_pool_dgrad"][1]
        return Step(node, function, tuple(node.args))

    # --- elementwise steps ---

    def _writable(self, candidate: Any, user: fx.Node, reads: Iterable[fx.Node] = ()) -> bool:
        """Whether `user` may write its result over an operand, while it also reads what some nodes that it replaces would."""
        return self._replaceable(candidate, user, value(user), reads)

    def _replaceable(self, candidate: Any, user: fx.Node, result: torch.Tensor, reads: Iterable[fx.Node] = ()) -> bool:
        return (
            is_tensor(candidate)
            and same_sizes(value(candidate).shape, result.shape)
            and value(candidate).dtype == result.dtype
            and self.liveness.owned(candidate)
            and self.liveness.dies_at(candidate, user)
            # Elementwise an operand may be the result itself, but no other view of its memory: of that, places are read after they
            # were written. What is read otherwise may not be in that memory at all.
            and not any(n is not candidate and self._meet(n, candidate) for n in user.all_input_nodes)
            and not any(self._meet(n, candidate) for n in reads)
        )

    def _meet(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two values may share memory."""
        return self.liveness.root[one] is self.liveness.root[other]

    def _still_holds(self, operand: fx.Node, user: fx.Node, later: fx.Node) -> bool:
        """Whether an operand of `user` holds its value when `later` runs: nothing writes over it in between."""
        return self.liveness.dies_at(operand, user) or self.liveness.lives_until(operand, later)

    def _lower_ratio(self, node: fx.Node) -> Step | None:
        carrier, message, denominator, eps = node.args
        if self._writable(message, node):
            return Step(node, self.kernels.ratio, (carrier, message, denominator, eps, message))
        layout = next((t for t in (denominator, carrier) if t is not None and same_shape(t, node)), message)
        return Step(node, _ratio_laid_out(self.kernels.ratio), (carrier, message, denominator, eps, layout))

    def _lower_ratio_sum(self, node: fx.Node) -> Step:
        carrier, a, b, denominator, eps = node.args
        out = next((m for m in (a, b) if self._writable(m, node)), None)
        return Step(node, self.kernels.ratio_sum, (carrier, a, b, denominator, eps, out))

    def _lower_gamma_pair(self, node: fx.Node) -> Step:
        """Written over the message and `z_plus`, where these die here."""
        return self._pair(node, self.kernels.gamma_pair, (node.args[1], node.args[3]), node.args[2])

    def _lower_alpha_beta_pair(self, node: fx.Node) -> Step:
        return self._pair(node, self.kernels.alpha_beta_pair, tuple(node.args[1:4]), node.args[3])

    def _pair(self, node: fx.Node, function: Callable[..., Any], candidates: tuple, like: fx.Node) -> Step:
        free = [c for c in candidates if self._replaceable(c, node, node.meta["val"][0])][:2]
        return Step(
            node, _into_pair(function), (*node.args, *(free + [like, like])[:2], *(len(free) > i for i in range(2)))
        )

    def _lower_channel_sum(self, node: fx.Node) -> Step:
        return Step(node, self.kernels.channel_sum, tuple(node.args))

    def _lower_where(self, node: fx.Node) -> Step | None:
        """A choice by the sign of a value in one pass, without the mask."""
        condition, upper, lower = node.args
        by_sign = is_tensor(condition) and condition.target is aten.ge.Scalar and condition.args[1] == 0
        if not by_sign or not self.fused or self.only_user(condition) is not node:
            return None
        x = condition.args[0]
        same = (
            all(is_tensor(t) and same_sizes(value(t).shape, value(node).shape) for t in (x, upper, lower))
            and value(upper).dtype == value(lower).dtype == value(node).dtype
        )
        if not same or not self.liveness.lives_until(x, node):
            return None
        self._postponed.add(condition)
        # Elementwise in x as well, but of x itself alone.
        out = next((t for t in (upper, lower) if self._writable(t, node, [] if t is x else [x])), None)
        return Step(node, self.kernels.select_by_sign, (x, upper, lower, out))

    def _lower_relu(self, node: fx.Node) -> Step | None:
        return Step(node, aten.relu_.default, node.args) if self._writable(node.args[0], node) else None

    def _lower_add(self, node: fx.Node) -> Step | None:
        a, b = node.args[:2]
        if not is_plain_sum(node) or a is b:
            return None
        relu = self.only_user(node)
        same = value(a).dtype == value(b).dtype and same_sizes(value(a).shape, value(b).shape)
        if relu is not None and relu.target is aten.relu.default and self.fused and same:
            self._computed.add(relu)
            return Step(relu, self.kernels.add_relu, (a, b), note="with its sum")
        for left, right in ((a, b), (b, a)):
            if self._writable(left, node) and is_tensor(right) and value(right).dtype == value(node).dtype:
                return self._accumulated(node, left, right) or Step(node, aten.add_.Tensor, (left, right))
        return None

    def _lower_sub(self, node: fx.Node) -> Step | None:
        a, b = node.args[:2]
        plain = node.target is aten.sub.Tensor and argument(node, 2, "alpha", 1) == 1 and a is not b
        if not plain or not self._writable(a, node) or (is_tensor(b) and value(b).dtype != value(node).dtype):
            return None
        return Step(node, aten.sub_.Tensor, (a, b))

    def _accumulated(self, node: fx.Node, left: fx.Node, right: fx.Node) -> Step | None:
        """The sum of two transposes: the second is added to the first by the convolution that computes it."""
        both = all(n.target is torch.ops.lrpfast.conv_dgrad.default for n in (left, right))
        if not both or len(right.users) != 1 or right in self.keep:
            return None
        s = right.args[0]
        if self._meet(s, left) or not self._still_holds(s, right, node):
            return None
        added = self.convolutions.dgrad_added(right, left, node)
        if added is not None:
            self._postponed.add(right)
        return added

    def _lower_mul(self, node: fx.Node) -> Step | None:
        a, b = node.args[:2]
        for left, right in ((a, b), (b, a)):
            if (
                a is not b
                and self._writable(left, node)
                and (not is_tensor(right) or value(right).dtype == value(node).dtype)
            ):
                return Step(node, aten.mul_.Tensor, (left, right))
        return None


@functools.cache
def _ratio_laid_out(ratio: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`ratio` whose result lies in memory as another operand does.

    A message may be an expanded view (behind an average pool), whose own layout would turn everything below it contiguous.
    """

    def laid_out(
        carrier: torch.Tensor | None, message: torch.Tensor, denominator: torch.Tensor, eps: float, like: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(like, dtype=message.dtype)
        return ratio(carrier, message, denominator, eps, out)

    return laid_out


@functools.cache
def _into_pair(function: Callable[..., Any]) -> Callable[..., Any]:
    """A pair operator told for each result which operand to write over, or which to make memory like."""

    def run(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        *operands, first, second, over_first, over_second = args
        dtype = operands[1].dtype
        out = (
            first if over_first else torch.empty_like(first, dtype=dtype),
            second if over_second else torch.empty_like(second, dtype=dtype),
        )
        return function(*operands, out=out)

    return run


def is_plain_sum(node: fx.Node) -> bool:
    """Whether a node is the sum of two tensors."""
    tensors = node.target is aten.add.Tensor and all(is_tensor(a) for a in node.args[:2])
    return tensors and argument(node, 2, "alpha", 1) == 1
