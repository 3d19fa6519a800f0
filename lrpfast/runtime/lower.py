"""Lower: choose for every node of a joint program the function that computes it.

The result of a choice is a `Step`: a plain function and its arguments, in which nodes stand for values. Three things are
decided here, once: which kernel (a convolution with its ReLU in one call, a stride-1 transpose as a convolution with flipped
weights), in which memory (in place where the operand dies), and in which layout (channels-last weights).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from lrpfast.graph import Program, argument, is_tensor, operation_name, rank, same_shape, value
from lrpfast.ops import native, reference
from lrpfast.ops.transposes import TRANSPOSES, fits_plain_convolution, flipped_weight

aten = torch.ops.aten


@dataclasses.dataclass
class Step:
    """One call: `node` is its result; `args` hold nodes, tensors and plain values."""

    node: fx.Node
    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


_VIEWS = {
    "reshape", "permute", "slice", "select", "expand", "squeeze", "unsqueeze", "transpose", "getitem", "view", "alias",
    "detach", "narrow", "flatten", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "constant_pad_nd",
}  # fmt: skip


class Liveness:
    """When each value, and the memory that it may share with others, is used for the last time."""

    def __init__(self, nodes: list[fx.Node], keep: Iterable[fx.Node]) -> None:
        self.position = {n: i for i, n in enumerate(nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            is_view = node.op == "call_function" and operation_name(node) in _VIEWS and node.all_input_nodes
            self.root[node] = self.root.get(node.all_input_nodes[0], node.all_input_nodes[0]) if is_view else node
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

    def __init__(self, program: Program, nodes: list[fx.Node], keep: set[fx.Node], backend: str) -> None:
        self.program = program
        self.nodes = nodes
        self.liveness = Liveness(nodes, keep)
        self.keep = keep
        self.kernels = native if backend == "native" else reference
        self._prepared: dict[tuple[str, str], torch.Tensor] = {}
        self._fused: set[fx.Node] = set()

    def steps(self) -> list[Step]:
        """The steps of the program, in order; a node that was fused into another has none."""
        result = []
        for node in self.nodes:
            if node.op != "call_function" or node in self._fused:
                continue
            lower = getattr(self, f"_lower_{operation_name(node)}", None)
            step = lower(node) if lower else None
            result.append(step or Step(node, node.target, tuple(node.args), dict(node.kwargs)))
        return result

    # --- constants ---

    def constant(self, name: str) -> torch.Tensor:
        """A constant as steps use it: convolution weights lie channels-last."""
        return self.program.constants[name]

    def _prepare(self, node: fx.Node, kind: str, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        key = (node.target, kind)
        if key not in self._prepared:
            with torch.no_grad():
                self._prepared[key] = make(self.program.constants[node.target])
        return self._prepared[key]

    def _weight(self, node: fx.Node) -> Any:
        if node.op != "get_attr" or rank(node) != 4:
            return node
        return self._prepare(node, "weight", lambda t: t.contiguous(memory_format=torch.channels_last))

    # --- layers ---

    def _lower_convolution(self, node: fx.Node) -> Step | None:
        x, weight, bias, stride, padding, dilation, transposed, out_padding, groups = node.args
        args = (x, self._weight(weight), *node.args[2:])
        users = list(node.users)
        relu = users[0] if len(users) == 1 and users[0].target is aten.relu.default else None
        if relu is not None and node not in self.keep and _fusable(node) and bias is not None:
            self._fused.add(relu)
            return Step(
                relu, torch.ops.mkldnn._convolution_pointwise.default,
                (x, args[1], bias, padding, stride, dilation, groups, "relu", [], ""), note="with its ReLU",
            )  # fmt: skip
        return Step(node, node.target, args)

    def _lower_conv_dgrad(self, node: fx.Node) -> Step:
        s, weight, size, stride, padding, dilation, groups = node.args
        shape = value(weight).shape
        plain = len(size) == 2 and fits_plain_convolution(shape, stride, padding, dilation, groups)
        if weight.op == "get_attr" and plain:
            flipped = self._prepare(
                weight, "flipped", lambda t: flipped_weight(t, groups).contiguous(memory_format=torch.channels_last)
            )
            inverse = [d * (k - 1) - p for d, k, p in zip(dilation, shape[2:], padding, strict=True)]
            args = (s, flipped, None, stride, inverse, dilation, False, [0, 0], groups)
            return Step(node, aten.convolution.default, args, note="as a convolution")
        function = TRANSPOSES["conv_dgrad"][1]
        return Step(node, function, (s, self._weight(weight), *node.args[2:]))

    def _lower_max_pool_dgrad(self, node: fx.Node) -> Step:
        return Step(node, TRANSPOSES["max_pool_dgrad"][1], tuple(node.args))

    def _lower_avg_pool_dgrad(self, node: fx.Node) -> Step:
        return Step(node, TRANSPOSES["avg_pool_dgrad"][1], tuple(node.args))

    # --- elementwise steps ---

    def _writable(self, candidate: Any, user: fx.Node) -> bool:
        """Whether `user` may write its result over an operand."""
        return self._replaceable(candidate, user, value(user))

    def _replaceable(self, candidate: Any, user: fx.Node, result: torch.Tensor) -> bool:
        return (
            is_tensor(candidate)
            and value(candidate).shape == result.shape
            and value(candidate).dtype == result.dtype
            and self.liveness.owned(candidate)
            and self.liveness.dies_at(candidate, user)
        )

    def _lower_ratio(self, node: fx.Node) -> Step:
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

    def _lower_relu(self, node: fx.Node) -> Step | None:
        return Step(node, aten.relu_.default, node.args) if self._writable(node.args[0], node) else None

    def _lower_add(self, node: fx.Node) -> Step | None:
        a, b = node.args[:2]
        if node.target is not aten.add.Tensor or not is_tensor(b) or argument(node, 2, "alpha", 1) != 1 or a is b:
            return None
        for left, right in ((a, b), (b, a)):
            if self._writable(left, node) and is_tensor(right) and value(right).dtype == value(node).dtype:
                return Step(node, aten.add_.Tensor, (left, right))
        return None

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


def _fusable(node: fx.Node) -> bool:
    """What oneDNN's convolution with an epilogue takes."""
    fake = value(node)
    plain = rank(node) == 4 and not node.args[6] and fake.device.type == "cpu"
    return plain and fake.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
