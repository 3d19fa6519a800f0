"""Rules as plain data: a name and its options.

The oracles read these; `to_rule` turns the same data into the library's own object, so that a test states a rule once and hands
it to both sides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spec:
    """A rule of RULES.md by its name and options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ",".join(
            f"{key}={value if isinstance(value, int | float) else '…'}" for key, value in self.options.items()
        )
        return f"{self.name}({shown})"


def to_rule(spec: Spec) -> Any:
    """Return the lrpfast rule that `spec` names."""
    from lrpfast import rules

    return getattr(rules, spec.name)(**spec.options)


ZERO = Spec("Zero")
EPSILON = Spec("Epsilon")
ZPLUS = Spec("ZPlus")
ALPHA2_BETA1 = Spec("AlphaBeta", {"alpha": 2.0, "beta": 1.0})
ALPHA1_BETA0 = Spec("AlphaBeta", {"alpha": 1.0, "beta": 0.0})
GAMMA = Spec("Gamma", {"gamma": 0.25})
ZBOX = Spec("ZBox", {"low": -3.0, "high": 3.5})
WSQUARE = Spec("WSquare")
FLAT = Spec("Flat")
PASS = Spec("Pass")
GRADIENT = Spec("Gradient")
NORM = Spec("Norm")

LAYER_RULES = (ZERO, EPSILON, ZPLUS, ALPHA2_BETA1, ALPHA1_BETA0, GAMMA, ZBOX, WSQUARE, FLAT, GRADIENT)


def everywhere(spec: Spec) -> dict[str, Spec]:
    """Return the composite that gives `spec` to every dense and convolution layer."""
    return {"conv": spec, "linear": spec}
