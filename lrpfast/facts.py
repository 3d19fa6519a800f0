"""Facts: what can be proved about the values of a program, whatever the input.

`x >= 0` decides which schedule a rule may take (RULES §5), so it is never assumed: a value is non-negative only if the
operation that makes it guarantees so, given what is proved of its arguments. Each entry below is one such argument.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lrpfast.graph import Program, argument, operation_name
from lrpfast.kinds import ROUTING

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

# Functions into (0, 1): what gates are made of.
_SIGMOIDS = {"sigmoid", "hardsigmoid", "softmax", "_softmax"}
# A value of these lies between the least and the greatest value of the first argument, as it does where values are but moved.
_BETWEEN = ROUTING | {
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "mean",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
}  # fmt: skip

Bounds = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is proved of a program.

    Attributes
    ----------
    nonnegative
        Values that are >= 0 for every input; layers' weights are not looked at.
    only_relu
        Values whose single user is a ReLU.
    gates
        Values in [0, 1] that are made of sigmoids alone; a constant times such a value is one, too.
    """

    nonnegative: frozenset[fx.Node]
    only_relu: frozenset[fx.Node]
    gates: frozenset[fx.Node]

    def __str__(self) -> str:
        return f"{len(self.nonnegative)} values proved >= 0, {len(self.only_relu)} used by a ReLU alone"


def prove(program: Program) -> Facts:
    """Prove facts by one walk through the graph."""
    nonnegative: set[fx.Node] = set()
    only_relu: set[fx.Node] = set()
    bounds: dict[fx.Node, Bounds] = {}
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
        found = _sigmoid_bounds(node, bounds) if node.op == "call_function" else None
        if found is not None:
            bounds[node] = found
    gates = (node for node, found in bounds.items() if _are_of_a_gate(*found))
    return Facts(frozenset(nonnegative), frozenset(only_relu), frozenset(gates))


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
    low, high = _clip(node)
    if high is not None and not (isinstance(high, (int, float)) and high >= 0):
        return False  # the upper bound has the last word
    return node.args[0] in known or (isinstance(low, (int, float)) and low >= 0)


def _clip(node: fx.Node) -> tuple[Any, Any]:
    """The bounds of a clamp: numbers, tensors, or None."""
    if operation_name(node) == "hardtanh":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    return argument(node, 1, "min"), argument(node, 2, "max")


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


def _are_of_a_gate(low: float, high: float) -> bool:
    """Within [0, 1], or up from 0 to another constant: that times a gate, and a product with a constant passes all on."""
    slack = 1e-6  # 1/6 may be written with few digits
    return low >= -slack and (high <= 1 + slack or low <= slack)


def _sigmoid_bounds(node: fx.Node, known: dict[fx.Node, Bounds]) -> Bounds | None:
    """Between which numbers a value lies that is made of sigmoids alone; None for all else."""
    name = operation_name(node)
    if name in _SIGMOIDS:
        return 0.0, 1.0
    if name in ("hardtanh", "clamp"):
        return _hard_sigmoid(node)
    if name in _BETWEEN:
        return _hull([(float(a), float(a)) if isinstance(a, (int, float)) else known.get(a) for a in _moved(node)])
    if name == "mul" and all(a in known for a in node.args):
        corners = [a * b for a in known[node.args[0]] for b in known[node.args[1]]]
        return min(corners), max(corners)
    step = _affine(node)
    if step is None or step[0] not in known:
        return None
    x, factor, shift = step
    ends = [factor * end + shift for end in known[x]]
    return min(ends), max(ends)


def _moved(node: fx.Node) -> list[Any]:
    """The values and numbers that an operation of `_BETWEEN` chooses from."""
    name = operation_name(node)
    if name == "cat":
        return list(node.args[0])
    if name == "where":
        return list(node.args[1:])
    if name == "masked_fill":
        return [node.args[0], node.args[2]]
    return [node.args[0], argument(node, 2, "value", 0.0)] if name == "constant_pad_nd" else [node.args[0]]


def _hull(parts: list[Bounds | None]) -> Bounds | None:
    known = [p for p in parts if p is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if len(known) == len(parts) else None


def _hard_sigmoid(node: fx.Node) -> Bounds | None:
    """The bounds of a clip that is a hard sigmoid: at 0 it is in the middle of them, as ``relu6(x + 3)`` is and ``relu6(x)`` is not."""
    low, high = _clip(node)
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float)) and low < high):
        return None
    centred = math.isclose(_at_zero(node.args[0]), (low + high) / 2, rel_tol=1e-3, abs_tol=1e-3 * (high - low))
    return (low, high) if centred else None


def _at_zero(node: fx.Node) -> float:
    """What sums and products with numbers make of 0."""
    step = _affine(node)
    return 0.0 if step is None else step[1] * _at_zero(step[0]) + step[2]


def _affine(node: fx.Node) -> tuple[fx.Node, float, float] | None:
    """Operand, factor and shift of a sum or a product with a number; None for all else."""
    name = operation_name(node)
    if name not in ("add", "sub", "mul", "div") or not isinstance(node.args[1], (int, float)):
        return None
    x, number = node.args[:2]
    if name == "mul":
        return x, number, 0.0
    if name == "div":
        return (x, 1 / number, 0.0) if number and node.kwargs.get("rounding_mode") is None else None
    return x, 1.0, (number if name == "add" else -number) * argument(node, 2, "alpha", 1)


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
