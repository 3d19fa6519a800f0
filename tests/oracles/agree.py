"""Compare the library with the network oracle: one call for a whole test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .network import Net, Result, Rules, distance, explain
from .specs import Spec, everywhere, to_rule

TOLERANCE = 1e-9


def to_composite(net: Net, rules: Rules) -> Any:
    """Return the lrpfast.Composite that says what `rules` says to the oracle: names before kinds, "any" last."""
    import lrpfast

    named = [(f"layers.{name}", to_rule(spec)) for name, spec in rules.items() if name in net.layers]
    kinds = [(kind, to_rule(spec)) for kind, spec in rules.items() if kind not in net.layers and kind != "any"]
    rest = [("any", to_rule(rules["any"]))] if "any" in rules else []
    return lrpfast.Composite(rules=[*named, *kinds, *rest])


def as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_agrees(
    net: Net,
    rules: Rules,
    inputs: Sequence[Tensor],
    seed: Tensor,
    labels: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    **options: Any,
) -> Result:
    """Assert that lrpfast's map of `net` is the oracle's; return the oracle's result."""
    import lrpfast

    expected = explain(net, rules, inputs, seed)
    explainer = lrpfast.Explainer(net, tuple(inputs), composite=to_composite(net, rules), **options)
    found = explainer(tuple(inputs) if len(inputs) > 1 else inputs[0], target=seed)
    assert distance(found.output, expected.output) <= 1e-12, "the output itself differs"
    relevance = as_tuple(found.relevance)
    assert len(relevance) == len(expected.relevance)
    names = list(labels) or [f"input {i}" for i in range(len(relevance))]
    wrong = {
        name: error
        for name, a, b in zip(names, relevance, expected.relevance, strict=True)
        if not (error := distance(a, b)) <= tolerance
    }
    assert not wrong, "relative errors: " + ", ".join(f"{name}: {error:.1e}" for name, error in wrong.items())
    return expected


def make_seed(net: Net, inputs: Sequence[Tensor]) -> Tensor:
    """Return a random relevance of the output's shape, signed and without small entries."""
    with torch.no_grad():
        output = net(*inputs)
    sign = torch.where(torch.rand_like(output) < 0.5, -1.0, 1.0).to(output)
    return sign * (0.5 + torch.rand_like(output))


class Parallel:
    """Several small networks beside each other in one Net, each with its own input, so that one capture serves them all.

    The outputs are flattened and concatenated. `tops` puts a dense layer with the given rule on top of a network, which decides in
    which form relevance reaches it: None leaves the free seed, in relevance form.
    """

    def __init__(self, batch: int = 2) -> None:
        self.net, self.rules, self.batch = Net(), everywhere(Spec("Epsilon")), batch
        self.inputs: list[Tensor] = []
        self.labels: list[str] = []
        self.ends: list[int] = []

    def add(
        self,
        label: str,
        x: Tensor | tuple[int, ...],
        build: Callable[[Net, int, str], int],
        top: Spec | None = None,
    ) -> None:
        """Append a network: `build(net, node, prefix)` appends its nodes above `node` and returns the last."""
        prefix = f"n{len(self.inputs)}"
        x = x if isinstance(x, Tensor) else torch.randn(self.batch, *x, dtype=torch.float64)
        start = len(self.net.nodes)
        end = build(self.net, self.net.input(), prefix)
        self.net.double().eval()
        end = self.net.op("route", lambda v: v.flatten(1), end)
        if top is not None:
            features = self._features(start, end, x)
            end = self.net.layer(f"{prefix}_top", torch.nn.Linear(features, 3).double(), end)
            self.rules[f"{prefix}_top"] = top
        self.ends.append(end)
        self.inputs.append(x)
        self.labels.append(f"{label} below {top or 'a free seed'}")

    def _features(self, start: int, end: int, x: Tensor) -> int:
        values: dict[int, Tensor] = {start: x}
        with torch.no_grad():
            for node in self.net.nodes[start + 1 : end + 1]:
                values[node.index] = node.compute(*(values[i] for i in node.args))
        return values[end].shape[1]

    def check(self, tolerance: float = TOLERANCE) -> None:
        self.net.op("route", lambda *values: torch.cat(values, 1), *self.ends)
        net = self.net.double().eval()
        assert_agrees(net, self.rules, self.inputs, make_seed(net, self.inputs), self.labels, tolerance)


# Relevance arrives in relevance form from a free seed, in ratio form from an ε layer.
TOPS = (None, Spec("Epsilon"))
