"""Facts: what can be proved about the values of a program, whatever the input.

`x >= 0` decides which schedule a rule may take (RULES §5), so it is never assumed: a value is non-negative only if the
operation that makes it guarantees so, given what is proved of its arguments. Each entry below is one such argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from lrpfast.graph import Program, argument, operation_name

# A value of these is >= 0 whatever the arguments are.
_ALWAYS = {"relu", "sigmoid", "hardsigmoid", "softplus", "exp", "abs", "softmax", "_softmax", "square", "relu6"}
# A value of these is >= 0 where every tensor argument is.
_KEEPS = {
    # averages, and the maxima of windows
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum", "amax",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d",
    # sums and products
    "add", "mul", "div", "sqrt", "maximum",
    # activations that are >= 0 for what is >= 0
    "leaky_relu", "hardswish", "silu", "tanh", "elu", "gelu",
    # what only moves values
    "reshape", "permute", "slice", "select", "cat", "expand", "squeeze", "unsqueeze", "flip", "roll", "repeat",
    "index_select", "index", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "native_channel_shuffle", "getitem",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is proved of a program.

    Attributes
    ----------
    nonnegative
        Values that are >= 0 for every input; layers' weights are not looked at.
    only_relu
        Values whose single user is a ReLU.
    """

    nonnegative: frozenset[fx.Node]
    only_relu: frozenset[fx.Node]

    def __str__(self) -> str:
        return f"{len(self.nonnegative)} values proved >= 0, {len(self.only_relu)} used by a ReLU alone"


def prove(program: Program) -> Facts:
    """Prove facts by one walk through the graph."""
    nonnegative: set[fx.Node] = set()
    only_relu: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" and not _is_weight(node):
            tensor = program.constants[node.target]
            if tensor.is_floating_point() and bool((tensor >= 0).all()):
                nonnegative.add(node)
        elif node.op == "call_function" and _is_nonnegative(node, nonnegative):
            nonnegative.add(node)
        users = list(node.users)
        if len(users) == 1 and users[0].op == "call_function" and operation_name(users[0]) == "relu":
            only_relu.add(node)
    return Facts(frozenset(nonnegative), frozenset(only_relu))


def _is_weight(node: fx.Node) -> bool:
    """Whether a constant is weight or bias of layers alone: its sign proves nothing, and to look at it, it may have to be made."""
    return all(operation_name(user) in ("convolution", "linear") and user.args[0] is not node for user in node.users)


def _is_nonnegative(node: fx.Node, known: set[fx.Node]) -> bool:
    name = operation_name(node)
    if name in _ALWAYS:
        return True
    special = _SPECIAL.get(name)
    if special is not None:
        return special(node, known)
    if name not in _KEEPS:
        return False
    numbers = [a for a in node.args if isinstance(a, (int, float))] if name in ("add", "mul", "div") else []
    numbers.append(node.kwargs.get("alpha", 1))
    operands = [a for a in node.all_input_nodes if _carries_values(a)]
    return all(n >= 0 for n in numbers) and all(a in known for a in operands)


def _carries_values(node: fx.Node) -> bool:
    """Whether a node is floating-point values (or a tuple of results), rather than sizes or indices."""
    fake = node.meta.get("val")
    return isinstance(fake, (tuple, list)) or (isinstance(fake, torch.Tensor) and fake.is_floating_point())


def _clamped(node: fx.Node, known: set[fx.Node]) -> bool:
    low = argument(node, 1, "min", argument(node, 1, "min_val", -1.0))
    return node.args[0] in known or (isinstance(low, (int, float)) and low >= 0)


def _padded(node: fx.Node, known: set[fx.Node]) -> bool:
    return node.args[0] in known and argument(node, 2, "value", 0) >= 0


def _powered(node: fx.Node, known: set[fx.Node]) -> bool:
    exponent = node.args[1]
    return node.args[0] in known or (isinstance(exponent, (int, float)) and exponent % 2 == 0)


_SPECIAL: dict[str, Callable[[fx.Node, set[fx.Node]], bool]] = {
    "hardtanh": _clamped,
    "clamp": _clamped,
    "clamp_min": _clamped,
    "constant_pad_nd": _padded,
    "pow": _powered,
}


def depends_on_input(program: Program) -> frozenset[fx.Node]:
    """The values (and tuples of them) that the model's inputs reach.

    A comparison ends the way: what it yields is a mask, which chooses and takes no relevance. Integers and complex numbers
    do not end it, so that relevance which would have to pass through them meets an operation without a rule, and an error.
    """
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or any(a in reached for a in node.all_input_nodes):
            fake = node.meta.get("val")
            if isinstance(fake, (tuple, list)) or (isinstance(fake, torch.Tensor) and fake.dtype is not torch.bool):
                reached.add(node)
    return frozenset(reached)
