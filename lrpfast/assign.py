"""Assign: every operation that relevance may reach gets its rule from the composite; first match wins."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase

from torch import fx

from lrpfast.composites import KINDS, Composite, LayerInfo, Pair, matches
from lrpfast.errors import CompositeError, RuleError
from lrpfast.facts import depends_on_input
from lrpfast.graph import Program, is_tensor, known_shape, operation_name
from lrpfast.kinds import kinds_of
from lrpfast.rules import PARAMETRISED, Rule


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The rule of one operation, and which entry of the composite gave it."""

    layer: LayerInfo
    rule: Rule | None
    why: str


def assign(program: Program, composite: Composite) -> dict[fx.Node, Assignment]:
    """Choose a rule for every operation that has a kind.

    Raises
    ------
    RuleError
        A layer with parameters is matched by no entry.
    CompositeError
        An entry names a module (a glob) and matches none.
    """
    layers = _layers(program)
    firsts = _first_layers(program, layers, composite)
    used: set[int] = set()
    result = {}
    for node, layer in layers.items():
        rule, why = _choose(composite, layer, node in firsts, used)
        if rule is None and PARAMETRISED.intersection(layer.kinds):
            raise RuleError(
                f"the layer {layer.name or layer.operation!r} ({layer.kind}) is matched by no entry of the composite "
                f"{composite.name!r}; add one, such as ({layer.kind!r}, lrpfast.rules.Epsilon())"
            )
        result[node] = Assignment(layer, rule, why)
    _check_globs(composite, used, layers)
    return result


def _choose(composite: Composite, layer: LayerInfo, is_first: bool, used: set[int]) -> tuple[Rule | None, str]:
    pairs = [(p, "first: ") for p in composite.first if is_first] + [(p, "") for p in composite.rules]
    for pair, where in pairs:
        if matches(pair, layer):
            used.add(id(pair))
            return pair[1], where + _match_name(pair)
    return None, "default"


def _match_name(pair: Pair) -> str:
    return pair[0] if isinstance(pair[0], str) else getattr(pair[0], "__name__", "callable")


def _layers(program: Program) -> dict[fx.Node, LayerInfo]:
    reached = depends_on_input(program)
    nodes = [n for n in program.graph.nodes if n.op == "call_function" and n in reached and kinds_of(n)]
    count = sum(bool(PARAMETRISED.intersection(kinds_of(n))) for n in nodes)
    result = {}
    index = 0
    for node in nodes:
        kinds = kinds_of(node)
        value = node if is_tensor(node) else next(iter(node.users))
        source = next((a for a in node.all_input_nodes if is_tensor(a) and a in reached), node.all_input_nodes[0])
        result[node] = LayerInfo(
            node.meta["path"], kinds, operation_name(node), index, count, known_shape(source), known_shape(value)
        )
        index += bool(PARAMETRISED.intersection(kinds))
    return result


def _first_layers(program: Program, layers: dict[fx.Node, LayerInfo], composite: Composite) -> set[fx.Node]:
    """Layers that match an entry of `first` and have no such layer before them."""
    behind: set[fx.Node] = set()
    firsts: set[fx.Node] = set()
    for node in program.graph.nodes:
        matching = node in layers and any(matches(p, layers[node]) for p in composite.first)
        follows = any(a in behind for a in node.all_input_nodes)
        if matching and not follows:
            firsts.add(node)
        if matching or follows:
            behind.add(node)
    return firsts


def _check_globs(composite: Composite, used: set[int], layers: dict[fx.Node, LayerInfo]) -> None:
    """A glob that fits no module is a slip of the pen, and its layers would silently get another rule."""
    names = [layer.name for layer in layers.values()]
    for pair in (*composite.rules, *composite.first):
        match = pair[0]
        if not isinstance(match, str) or match in KINDS or id(pair) in used:
            continue
        fitting = [n for n in names if fnmatchcase(n.split("@")[0], match) or fnmatchcase(n, match)]
        if not fitting:
            shown = sorted({n for n in names if n})
            listed = ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
            raise CompositeError(
                f"the composite {composite.name!r} has an entry for {match!r}, which is neither a kind of operation "
                f"({', '.join(KINDS)}) nor fits any module of the model; its modules: {listed}"
            )
