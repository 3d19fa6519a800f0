"""The one representation that every pass reads and writes: an fx graph in which each value knows its shape.

A `Program` holds an `fx.Graph` of ATen and lrpfast operators. Tensors that do not depend on the input (weights, and
whatever was derived from them when the program was built) are constants: `get_attr` nodes whose tensors lie in `constants`.
Each node carries in ``meta["val"]`` a fake tensor with symbolic batch size, computed when the node is made by
calling the operator on the fakes of its arguments; so passes may ask for any shape, and a pass that builds something
malformed fails where it builds it. ``meta["path"]`` names the module of the user's model that a node comes from.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensorMode

from lrpfast.errors import UnsupportedOperationError
from lrpfast.ops.filters import Filters
from lrpfast.ops.reference import Scales

aten = torch.ops.aten

# Of derived constants, what is held: enough that the weights of a layer are not made several times by one pass.
_HELD_BYTES = 2**25


class Constants(MutableMapping[str, torch.Tensor]):
    """Tensors by name. Of derived ones the latest few are held, the others are made again when they are asked for.

    A program, and an executor that keeps weights as its kernels take them, would else be a second and a third copy of the model.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor | None] = {}
        self._makers: dict[str, Callable[[], torch.Tensor]] = {}
        self._held: OrderedDict[str, int] = OrderedDict()  # derived ones that are there, the latest last: bytes
        self._names: dict[int, str] = {}  # by identity; of tensors that are gone as well
        self._scaled: dict[str, tuple[str, Scales]] = {}
        self._folded: dict[str, Filters] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor is None:
            with torch.no_grad():
                tensor = self._makers[name]()
            self._hold(name, tensor)
        elif name in self._held:
            self._held.move_to_end(name)
        return tensor

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor
        self._names[id(tensor)] = name

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]
        for record in (self._makers, self._held, self._scaled, self._folded):
            record.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The name of this very tensor, where it is here."""
        name = self._names.get(id(tensor))
        return name if name is not None and self._tensors.get(name) is tensor else None

    def derive(self, name: str, tensor: torch.Tensor | None, make: Callable[[], torch.Tensor]) -> None:
        """Add a constant that is derived; None where it was not made yet. `make` asks for other constants by `maker`, and must not
        hold on to what it gets."""
        self._makers[name] = make
        if tensor is None:
            self._tensors[name] = None
        else:
            self._hold(name, tensor)

    def _hold(self, name: str, tensor: torch.Tensor) -> None:
        self[name] = tensor
        self._held[name] = tensor.nbytes
        while sum(self._held.values()) > _HELD_BYTES and len(self._held) > 1:
            self.let_go(next(iter(self._held)))

    def scale(self, name: str, source: str, scales: Scales) -> None:
        """Say that a constant is another one, its positive values and its negative ones multiplied by a number each."""
        self._scaled[name] = source, scales

    def scaled(self, name: str) -> tuple[str, Scales] | None:
        """The constant that one is made of by `scale`, and how; None where it is not, or where that constant is gone."""
        found = self._scaled.get(name)
        return found if found is not None and found[0] in self._tensors else None

    def fold(self, name: str, filters: Filters) -> None:
        """Say that a derived constant is a tensor that is there anyway, each of its filters multiplied by a factor."""
        self._folded[name] = filters

    def filters(self, name: str) -> Filters | None:
        """A weight said by what it is made of; None where it is derived in another way."""
        source, scales = self._scaled.get(name, (name, None))
        if source in self._folded:
            filters = self._folded[source]
        elif source in self._tensors and source not in self._makers:
            filters = Filters(self[source])
        else:
            return None
        return filters if scales is None else dataclasses.replace(filters, scales=scales)

    def adopt(self, name: str, others: Constants, others_name: str) -> None:
        """Take over what another program's constants say of one by `fold`."""
        if others_name in others._folded:
            self._folded[name] = others._folded[others_name]

    def is_derived(self, name: str) -> bool:
        return name in self._makers

    def maker(self, name: str) -> Callable[[], torch.Tensor]:
        """How to get a constant, which outlives its name: a program drops those that no step takes."""
        if name not in self._makers:
            given = self[name]
            return lambda: given
        make = self._makers[name]
        return lambda: self[name] if self._makers.get(name) is make else make()

    def let_go(self, *names: str) -> None:
        """Drop the derived tensors of these names, of all without any."""
        for name in names or tuple(self._held):
            if self._held.pop(name, None) is not None:
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
        """A copy of the graph as a module with the constants as its buffers."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        graph.eliminate_dead_code()
        root = torch.nn.Module()
        for node in graph.nodes:
            if node.op == "get_attr":
                root.register_buffer(node.target, self.constants[node.target], persistent=True)
        graph.lint()
        return fx.GraphModule(root, graph)


class Builder:
    """Appends nodes to a program, computing the fake value of each."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.graph = fx.Graph()
        self.constants = Constants()
        self.path = ""
        self._nodes: dict[str, fx.Node] = {}  # of constants
        self._derived: dict[tuple, fx.Node] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}

    def placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        node.meta["path"] = ""
        return node

    def constant(self, tensor: torch.Tensor, hint: str) -> fx.Node:
        """A constant; the same tensor object yields the same node."""
        known = self.constants.name_of(tensor)
        if known is not None:
            return self._nodes[known]
        node = self._constant_node(self._fake(tensor), hint)
        self.constants[node.target] = tensor
        return node

    def derived(
        self, key: tuple, make: Callable[[], torch.Tensor], hint: str, like: torch.Tensor | None = None
    ) -> fx.Node:
        """A constant that is computed once for each key, however many layers ask for it; see `Constants.derive`.

        Given a fake tensor that it is `like`, it is made where its values are asked for, not before: most are laid out for a kernel
        once, and none else needs them.
        """
        if key in self._derived:
            return self._derived[key]
        tensor = None
        if like is None:
            with torch.no_grad():
                tensor = make()
            known = self.constants.name_of(tensor)
            if known is not None:  # `make` handed on what was there before
                self._derived[key] = self._nodes[known]
                return self._derived[key]
            like = self._fake(tensor)
        node = self._derived[key] = self._constant_node(like, hint)
        self.constants.derive(node.target, tensor, make)
        return node

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.fake_mode:
            return self.fake_mode.from_tensor(tensor, static_shapes=True)

    def _constant_node(self, fake: torch.Tensor, hint: str) -> fx.Node:
        name = _free_name(hint, self.constants)
        node = self._nodes[name] = self.graph.create_node("get_attr", name, name=name)
        node.meta["val"] = fake
        node.meta["path"] = self.path
        return node

    def adopt(self, constants: Constants, given: fx.Node) -> fx.Node:
        """A constant of another program."""
        name = given.target
        if not constants.is_derived(name):
            return self.constant(constants[name], name)
        node = self.derived(("adopted", name), lambda: constants[name], name, value(given))
        self.constants.adopt(node.target, constants, name)
        return node

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The value of a constant."""
        return self.constants[node.target]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call and compute its fake value."""
        node = self.call_of(None, target, args, kwargs)
        if _lacks_operand(target, args):
            raise UnsupportedOperationError(
                f"{describe(node)} takes a result beside the first of another operation, such as the indices of a max pool; there is no "
                "rule for that"
            )
        fakes, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        # The Python dispatcher keeps composite operators symbolic; in C++ they would fix the batch.
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():
            node.meta["val"] = target(*fakes, **fake_kwargs)
        return node

    def call_of(self, fake: Any, target: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> fx.Node:
        """Append a call whose fake value is known."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = fake
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


def _lacks_operand(target: Callable[..., Any], args: tuple) -> bool:
    """Whether a tensor that an operator has to have is None, as results are that no canonical form gives."""
    schema = getattr(target, "_schema", None)
    required = [] if schema is None else [isinstance(a.type, torch.TensorType) for a in schema.arguments]
    return any(a is None and needed for a, needed in zip(args, required, strict=False))


def _free_name(hint: str, taken: Container[str]) -> str:
    """A name for a constant that is not taken, nor an attribute of every module, which `Program.module` makes it one of."""
    base = "".join(c if c.isalnum() else "_" for c in hint).strip("_") or "constant"
    if base[0].isdigit():
        base = f"c{base}"
    name, count = base, 0
    while name in taken or hasattr(torch.nn.Module, name):
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
