"""The one representation that every pass reads and writes: an fx graph in which each value knows its shape.

A `Program` holds an `fx.Graph` of ATen and lrpfast operators. Tensors that do not depend on the input (weights, and
whatever was derived from them when the program was built) are constants: `get_attr` nodes whose tensors lie in `constants`.
Each node carries in ``meta["val"]`` a fake tensor with symbolic batch size, computed when the node is made by
calling the operator on the fakes of its arguments; so passes may ask for any shape, and a pass that builds something
malformed fails where it builds it. ``meta["path"]`` names the module of the user's model that a node comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode

from lrpfast.ops.reference import Scales

aten = torch.ops.aten


class Constants(MutableMapping[str, torch.Tensor]):
    """Tensors by name. Derived ones can be let go, and are made again when they are asked for.

    An executor keeps weights as its kernels take them; what they were derived through would be a second copy of the model.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor | None] = {}
        self._makers: dict[str, Callable[[], torch.Tensor]] = {}
        self._scaled: dict[str, tuple[str, Scales]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor is None:
            with torch.no_grad():
                tensor = self._tensors[name] = self._makers[name]()
        return tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]
        self._makers.pop(name, None)
        self._scaled.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def derive(self, name: str, make: Callable[[], torch.Tensor]) -> None:
        """Say how a constant is made. `make` may ask for other constants, and must not hold on to what it gets."""
        self._makers[name] = make

    def scale(self, name: str, source: str, scales: Scales) -> None:
        """Say that a constant is another one, its positive values and its negative ones multiplied by a number each."""
        self._scaled[name] = source, scales

    def scaled(self, name: str) -> tuple[str, Scales] | None:
        """The constant that one is made of by `scale`, and how; None where it is not, or where that constant is gone."""
        found = self._scaled.get(name)
        return found if found is not None and found[0] in self._tensors else None

    def is_derived(self, name: str) -> bool:
        return name in self._makers

    def maker(self, name: str) -> Callable[[], torch.Tensor]:
        """How a constant is made, which outlives its name; of one that was given, the tensor."""
        if name in self._makers:
            return self._makers[name]
        given = self[name]
        return lambda: given

    def let_go(self, *names: str) -> None:
        """Drop the derived tensors of these names, of all without any."""
        for name in names or self._makers:
            if name in self._makers:
                self._tensors[name] = None


@dataclasses.dataclass
class Program:
    """A graph with its constants; printable through `str`."""

    graph: fx.Graph
    constants: Constants
    fake_mode: FakeTensorMode

    def __str__(self) -> str:
        return str(self.graph)

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def outputs(self) -> list[fx.Node]:
        (node,) = [n for n in self.graph.nodes if n.op == "output"]
        values = node.args[0]
        return list(values) if isinstance(values, (tuple, list)) else [values]

    def drop_unused(self) -> Program:
        """Remove what no output needs; the program itself."""
        self.graph.eliminate_dead_code()
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        for name in set(self.constants) - used:
            del self.constants[name]
        return self

    def module(self) -> fx.GraphModule:
        """The graph as a module with the constants as its buffers."""
        self.graph.eliminate_dead_code()
        root = torch.nn.Module()
        for node in self.graph.nodes:
            if node.op == "get_attr":
                root.register_buffer(node.target, self.constants[node.target], persistent=True)
        self.graph.lint()
        return fx.GraphModule(root, self.graph)


class Builder:
    """Appends nodes to a program, computing the fake value of each."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self.constants = Constants()
        self.path = ""
        self._by_identity: dict[int, fx.Node] = {}
        self._derived: dict[tuple, fx.Node] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}

    def placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        node.meta["path"] = ""
        return node

    def constant(self, tensor: torch.Tensor, hint: str) -> fx.Node:
        """A constant; the same tensor object yields the same node."""
        known = self._by_identity.get(id(tensor))
        if known is not None:
            return known
        name = _free_name(hint, self.constants)
        self.constants[name] = tensor
        node = self.graph.create_node("get_attr", name, name=name)
        with self.fake_mode:
            node.meta["val"] = self.fake_mode.from_tensor(tensor, static_shapes=True)
        node.meta["path"] = self.path
        self._by_identity[id(tensor)] = node
        return node

    def derived(self, key: tuple, make: Callable[[], torch.Tensor], hint: str) -> fx.Node:
        """A constant that is computed once for each key, however many layers ask for it; see `Constants.derive`."""
        if key not in self._derived:
            count = len(self.constants)
            with torch.no_grad():
                node = self._derived[key] = self.constant(make(), hint)
            if len(self.constants) > count:  # and `make` did not hand on a tensor that was there before
                self.constants.derive(node.target, make)
        return self._derived[key]

    def adopt(self, constants: Constants, name: str) -> fx.Node:
        """A constant of another program."""
        if constants.is_derived(name):
            return self.derived(("adopted", name), lambda: constants[name], name)
        return self.constant(constants[name], name)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The value of a constant."""
        return self.constants[node.target]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call and compute its fake value."""
        node = self.graph.call_function(target, args, kwargs)
        fakes, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        # The Python dispatcher keeps composite operators symbolic; in C++ they would fix the batch.
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = target(*fakes, **fake_kwargs)
        node.meta["path"] = self.path
        return node

    def size(self, node: fx.Node, dim: int) -> int | fx.Node:
        """A size: an int, or a node where it depends on the batch."""
        size = node.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        key = (node, dim)
        if key not in self._sizes:
            self._sizes[key] = self.call(aten.sym_size.int, node, dim)
        return self._sizes[key]

    def shape(self, node: fx.Node) -> list[int | fx.Node]:
        return [self.size(node, d) for d in range(rank(node))]


def _free_name(hint: str, taken: Container[str]) -> str:
    base = "".join(c if c.isalnum() else "_" for c in hint).strip("_") or "constant"
    if base[0].isdigit():
        base = f"c{base}"
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


def value(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node."""
    return node.meta["val"]


def rank(node: fx.Node) -> int:
    return value(node).dim()


def static_sizes(node: fx.Node, dims: Iterable[int]) -> list[int]:
    """Sizes that do not depend on the batch."""
    return [int(value(node).shape[d]) for d in dims]


def known_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape with -1 for sizes that depend on the batch."""
    return tuple(s if isinstance(s, int) else -1 for s in value(node).shape)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    return same_sizes(value(a).shape, value(b).shape)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every batch.

    Symbols are compared as expressions. Comparing the sizes themselves would ask whether they are equal for the batch that
    the model was captured with, and the answer, once given, binds the program to that batch.
    """
    return len(a) == len(b) and all(
        x == y
        if isinstance(x, int) and isinstance(y, int)
        else not isinstance(x, int) and not isinstance(y, int) and x.node.expr == y.node.expr
        for x, y in zip(a, b, strict=True)
    )


def is_size(size: Any, number: int) -> bool:
    """Whether a size is this number, whatever the batch."""
    return isinstance(size, int) and size == number


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensor_args(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or name, else its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def operation_name(node: fx.Node) -> str:
    """``conv2d`` for ``aten.conv2d.default``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def describe(node: fx.Node) -> str:
    """Operation and place of a node, for messages."""
    path = node.meta.get("path", "")
    where = f"in the module {path!r}" if path else "in the model's own forward"
    return f"the operation {operation_name(node)!r} {where}"


def normalise_dim(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def as_list(value: Any, length: int) -> list[int]:
    """ATen's int-list arguments may be an int, one element or `length` elements."""
    values: Sequence[int] = list(value) if isinstance(value, (list, tuple)) else [value]
    return list(values) * length if len(values) == 1 else list(values)
