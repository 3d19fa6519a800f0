"""The rules, as data.

A rule is a frozen dataclass: its name, its parameters and nothing else, so that it can be compared, printed and saved. What
a rule does to a layer stands in `lrpfast.relevance`: one function a rule, found by the rule's class. `KINDS` says
which kinds of operation a rule may be given to; an entry of a composite never matches an operation outside of it.

The formulas are those of Bach et al. 2015, Montavon et al. 2017 and Montavon et al. 2019; every class names its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from lrpfast.errors import RuleError

PARAMETRISED = frozenset({"conv", "linear"})


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base of all rules. `kinds` names the kinds of operation that the rule may be given to."""

    kinds: ClassVar[frozenset[str]] = PARAMETRISED

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("epsilon", "stabilizer") and not (_is_number(value) and 0 <= value < math.inf):
                raise RuleError(f"{type(self).__name__}: {field.name} must be a finite number >= 0, got {value!r}")

    def __str__(self) -> str:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        shown = [f"{k}={_brief(v)}" for k, v in vars(self).items() if not _same(v, defaults[k])]
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True)
class Zero(Rule):
    """LRP-0: ``R_x = x * Wᵀ(R_y / z)``; where ``z`` is exactly zero nothing is passed on (Bach et al. 2015, eq. 56)."""


@dataclasses.dataclass(frozen=True)
class Epsilon(Rule):
    """LRP-ε: ``R_x = x * Wᵀ(R_y / S(z))`` (Bach et al. 2015, eq. 58).

    `epsilon` is added to the denominator with its sign, ``S(z) = z + ε`` where ``z >= 0``, else ``z - ε``.
    """

    epsilon: float = 1e-6
    kinds: ClassVar[frozenset[str]] = PARAMETRISED | {"batch_norm", "norm"}


@dataclasses.dataclass(frozen=True)
class ZPlus(Rule):
    """z⁺: the positive contributions alone, ``W⁺x⁺ + W⁻x⁻ + b⁺`` in the denominator (Montavon et al. 2017, eq. 15)."""

    stabilizer: float = 1e-6


@dataclasses.dataclass(frozen=True)
class AlphaBeta(Rule):
    """LRP-αβ: positive contributions weighted by α, negative ones by β, ``α - β = 1`` (Bach et al. 2015, eq. 60)."""

    alpha: float = 2.0
    beta: float = 1.0
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < math.inf):
                raise RuleError(f"AlphaBeta: {name} must be a finite number >= 0, got {value!r}")
        if not math.isclose(self.alpha - self.beta, 1.0, rel_tol=1e-12, abs_tol=1e-12):
            raise RuleError(f"AlphaBeta: alpha - beta must be 1, got {self.alpha} - {self.beta}")


@dataclasses.dataclass(frozen=True)
class Gamma(Rule):
    """LRP-γ, generalised to signed inputs: favours positive contributions by γ (Montavon et al. 2019, sec. 10.2.2)."""

    gamma: float = 0.25
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_is_number(self.gamma) and 0 <= self.gamma < math.inf):
            raise RuleError(f"Gamma: gamma must be a finite number >= 0, got {self.gamma!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """zB, for inputs from a box: ``Wx - W⁺low - W⁻high`` in the denominator (Montavon et al. 2017, eq. 14).

    `low` and `high` are the least and the greatest value that the layer's input can take: a number, a value a channel
    (sequence or tensor ``[C]``, or ``[1, C, 1, 1]``), or a tensor of the input's shape without the batch.
    """

    low: Any = dataclasses.field(default=None)
    high: Any = dataclasses.field(default=None)
    stabilizer: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is None or self.high is None:
            raise RuleError("ZBox needs the range of the input: ZBox(low=..., high=...)")


@dataclasses.dataclass(frozen=True)
class WSquare(Rule):
    """w²: relevance in proportion to the squared weights, whatever the input (Montavon et al. 2017, eq. 12)."""

    stabilizer: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Flat(Rule):
    """Flat: relevance spread evenly over the inputs of each output (Lapuschkin et al. 2019)."""

    stabilizer: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Pass(Rule):
    """The relevance goes through unchanged; the operation's input and output have one shape."""

    kinds: ClassVar[frozenset[str]] = PARAMETRISED | {"activation", "batch_norm", "norm"}


@dataclasses.dataclass(frozen=True)
class Norm(Rule):
    """For linear operations without parameters: ``R_x = x * Jᵀ(R_y / S(y))``; sums share in proportion."""

    stabilizer: float = 1e-6
    kinds: ClassVar[frozenset[str]] = frozenset({"sum", "avg_pool"})


@dataclasses.dataclass(frozen=True)
class Gradient(Rule):
    """The plain vector-Jacobian product of the relevance; every operation has it."""

    kinds: ClassVar[frozenset[str]] = frozenset(
        {"conv", "linear", "activation", "batch_norm", "norm", "sum", "avg_pool", "max_pool", "mul", "other"}
    )


@dataclasses.dataclass(frozen=True)
class GuidedReLU(Rule):
    """ReLU of guided backpropagation: ``g * 1[x > 0] * 1[g > 0]`` (Springenberg et al. 2015)."""

    kinds: ClassVar[frozenset[str]] = frozenset({"relu"})


@dataclasses.dataclass(frozen=True)
class DeconvReLU(Rule):
    """ReLU of the deconvolution method: ``max(g, 0)`` (Zeiler and Fergus 2014)."""

    kinds: ClassVar[frozenset[str]] = frozenset({"relu"})


@dataclasses.dataclass(frozen=True)
class SmoothReLU(Rule):
    """ReLU with the gradient of a softplus: ``g * sigmoid(beta * x)`` (Dombrowski et al. 2019)."""

    beta: float = 10.0
    kinds: ClassVar[frozenset[str]] = frozenset({"relu"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_is_number(self.beta) and 0 < self.beta < math.inf):
            raise RuleError(f"SmoothReLU: beta must be a finite number > 0, got {self.beta!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _brief(value: object) -> str:
    text = f"{value:g}" if _is_number(value) else repr(value).replace("\n", " ")
    return text if len(text) <= 40 else text[:37] + "..."


def _same(value: object, default: object) -> bool:
    return _is_number(value) and value == default
