"""Composites: which layer gets which rule.

A composite is a list of (match, rule) pairs, first match wins. A match is the kind of an operation ("conv"), a glob on the
path of a module ("layer4.*"), or a callable that takes a `LayerInfo`. A pair in `first` applies to those matching layers
that no other matching layer precedes: the ones that the input reaches first, in the order of execution.

The functions below build the composites of zennit under zennit's names in snake_case, and the classical ones of the
literature. `names()` lists them; `get(name)` builds one by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lrpfast import rules as R
from lrpfast.errors import CompositeError

# What a match may name. The finer kinds ("relu", "conv_transpose") are kinds of the same operation beside the general one.
KINDS = (
    "any", "conv", "conv_transpose", "linear", "batch_norm", "norm", "activation", "relu", "sum", "avg_pool",
    "max_pool", "mul",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerInfo:
    """One operation of the captured model, as a composite sees it.

    Attributes
    ----------
    name
        Path of the module in the user's model that performs the operation; ``name@1`` for its second call.
    kinds
        The kinds of the operation, the general one first: ``("activation", "relu")``.
    operation
        Name of the torch operation, such as ``"conv2d"``.
    index, count
        Position among the layers with parameters in the order of execution, and their number: a layer of
        ``index / count < 0.5`` lies in the lower half of the network. For operations without parameters: the number of
        layers before it.
    input_shape, output_shape
        Shapes with the batch as -1.
    """

    name: str
    kinds: tuple[str, ...]
    operation: str
    index: int
    count: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def kind(self) -> str:
        """The general kind of the operation."""
        return self.kinds[0]


Match = str | Callable[[LayerInfo], bool]
Pair = tuple[Match, R.Rule]


@dataclasses.dataclass(frozen=True)
class Composite:
    """Rules for the layers of a model.

    Parameters
    ----------
    rules
        Pairs of a match and a rule; the first that matches a layer, and whose rule can be applied to its kind, wins.
    first
        Pairs for the layers that the input reaches first; they are looked at before `rules`.
    name
        For messages and plans.

    Raises
    ------
    CompositeError
        A pair is malformed.
    """

    rules: Sequence[Pair] = ()
    first: Sequence[Pair] = ()
    name: str = "custom"

    def __post_init__(self) -> None:
        for where in ("rules", "first"):
            pairs = tuple(getattr(self, where))
            for pair in pairs:
                _check_pair(pair, where)
            object.__setattr__(self, where, pairs)


def _check_pair(pair: Any, where: str) -> None:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise CompositeError(f"Composite: {where} holds pairs (match, rule), got {pair!r}")
    match, rule = pair
    if isinstance(rule, type) and issubclass(rule, R.Rule):
        raise CompositeError(f"Composite: {where} holds the class {rule.__name__}; give a rule, {rule.__name__}()")
    if not isinstance(rule, R.Rule):
        raise CompositeError(f"Composite: {where} holds {rule!r}, which is not a rule of lrpfast.rules")
    if not (isinstance(match, str) or callable(match)):
        raise CompositeError(
            f"Composite: a match is a kind of operation ({', '.join(KINDS)}), a glob on module paths, or a callable "
            f"that takes a LayerInfo; got {match!r}"
        )


def matches(pair: Pair, layer: LayerInfo) -> bool:
    """Whether a pair's match accepts a layer and its rule can be applied to the layer's kind."""
    match, rule = pair
    if not rule.kinds.intersection(layer.kinds):
        return False
    if callable(match):
        return bool(match(layer))
    if match in KINDS:
        return match == "any" or match in layer.kinds
    return fnmatchcase(layer.name.split("@")[0], match) or fnmatchcase(layer.name, match)


_ZPLUS_BASE = (("sum", R.Norm()), ("avg_pool", R.Norm()))
_GRADIENT = (("any", R.Gradient()),)


def _dense_epsilon(epsilon: float) -> Pair:
    return ("linear", R.Epsilon(epsilon))


def epsilon_plus(epsilon: float = 1e-6) -> Composite:
    """z⁺ in convolutions, ε in dense layers."""
    return Composite([("conv", R.ZPlus()), _dense_epsilon(epsilon)], name="epsilon_plus")


def epsilon_plus_flat(epsilon: float = 1e-6) -> Composite:
    """`epsilon_plus` with the flat rule in the first layer."""
    first = [("conv", R.Flat()), ("linear", R.Flat())]
    return Composite([("conv", R.ZPlus()), _dense_epsilon(epsilon)], first=first, name="epsilon_plus_flat")


def epsilon_gamma_box(low: Any = None, high: Any = None, gamma: float = 0.25, epsilon: float = 1e-6) -> Composite:
    """γ in convolutions, ε in dense layers, zB with the data's range in the first convolution."""
    return Composite(
        [("conv", R.Gamma(gamma)), _dense_epsilon(epsilon)],
        first=[("conv", _box("epsilon_gamma_box", low, high))],
        name="epsilon_gamma_box",
    )


def epsilon_alpha2_beta1(epsilon: float = 1e-6) -> Composite:
    """α=2, β=1 in convolutions, ε in dense layers."""
    return Composite([("conv", R.AlphaBeta(2.0, 1.0)), _dense_epsilon(epsilon)], name="epsilon_alpha2_beta1")


def epsilon_alpha2_beta1_flat(epsilon: float = 1e-6) -> Composite:
    """`epsilon_alpha2_beta1` with the flat rule in the first layer."""
    first = [("conv", R.Flat()), ("linear", R.Flat())]
    return dataclasses.replace(epsilon_alpha2_beta1(epsilon), first=first, name="epsilon_alpha2_beta1_flat")


def excitation_backprop() -> Composite:
    """Excitation backpropagation (Zhang et al. 2018): z⁺ in all layers, Norm in sums and average pools, else gradient."""
    pairs = [("conv", R.ZPlus()), ("linear", R.ZPlus()), *_ZPLUS_BASE, *_GRADIENT]
    return Composite(pairs, name="excitation_backprop")


def deconvnet() -> Composite:
    """The gradient with rectified backward signals in ReLUs (Zeiler and Fergus 2014)."""
    return Composite([("relu", R.DeconvReLU()), *_GRADIENT], name="deconvnet")


def guided_backprop() -> Composite:
    """The gradient, rectified on both ways in ReLUs (Springenberg et al. 2015)."""
    return Composite([("relu", R.GuidedReLU()), *_GRADIENT], name="guided_backprop")


def beta_smooth(beta: float = 10.0) -> Composite:
    """The gradient of a network whose ReLUs are softplus functions (Dombrowski et al. 2019)."""
    return Composite([("relu", R.SmoothReLU(beta)), *_GRADIENT], name="beta_smooth")


def lrp_zero() -> Composite:
    """LRP-0 in all layers."""
    return Composite([("conv", R.Zero()), ("linear", R.Zero())], name="lrp_zero")


def epsilon(epsilon: float = 1e-6) -> Composite:
    """LRP-ε in all layers."""
    return Composite([("conv", R.Epsilon(epsilon)), ("linear", R.Epsilon(epsilon))], name="epsilon")


def gamma(gamma: float = 0.25) -> Composite:
    """LRP-γ in all layers."""
    return Composite([("conv", R.Gamma(gamma)), ("linear", R.Gamma(gamma))], name="gamma")


def alpha1_beta0() -> Composite:
    """α=1, β=0 in all layers: the positive contributions alone."""
    return Composite([("conv", R.AlphaBeta(1.0, 0.0)), ("linear", R.AlphaBeta(1.0, 0.0))], name="alpha1_beta0")


def w_square() -> Composite:
    """Deep Taylor for unbounded inputs: z⁺ in hidden layers, w² in the first (Montavon et al. 2017)."""
    first = [("conv", R.WSquare()), ("linear", R.WSquare())]
    return Composite([("conv", R.ZPlus()), ("linear", R.ZPlus())], first=first, name="w_square")


def deep_taylor(low: Any = None, high: Any = None) -> Composite:
    """Deep Taylor for bounded inputs: z⁺ in hidden layers, zB with the data's range in the first (Montavon et al. 2017)."""
    box = _box("deep_taylor", low, high)
    return Composite(
        [("conv", R.ZPlus()), ("linear", R.ZPlus())], first=[("conv", box), ("linear", box)], name="deep_taylor"
    )


def overview(low: Any = None, high: Any = None, epsilon: float = 0.25, gamma: float = 0.25) -> Composite:
    """LRP-0 in the top layers, ε in the middle, γ below, zB at the input (Montavon et al. 2019, sec. 10.3).

    Dense layers are the top; of the convolutions the upper half gets ε, the lower half γ. A network without dense layers
    on top (or with a single one) has LRP-0 in these alone.
    """
    box = _box("overview", low, high)
    return Composite(
        [
            ("linear", R.Zero()),
            (_upper_half, R.Epsilon(epsilon)),
            ("conv", R.Gamma(gamma)),
        ],
        first=[("conv", box), ("linear", box)],
        name="overview",
    )


def _upper_half(layer: LayerInfo) -> bool:
    return "conv" in layer.kinds and 2 * layer.index >= layer.count


def _box(composite: str, low: Any, high: Any) -> R.ZBox:
    if low is None or high is None:
        raise CompositeError(
            f"the composite {composite!r} needs the range of the data: give "
            f"lrpfast.composites.{composite}(low=..., high=...), the least and the greatest value of an input after "
            "normalisation, as numbers or one a channel"
        )
    return R.ZBox(low, high)


_BUILDERS: dict[str, Callable[..., Composite]] = {
    function.__name__: function
    for function in (
        epsilon_plus, epsilon_plus_flat, epsilon_gamma_box, epsilon_alpha2_beta1, epsilon_alpha2_beta1_flat,
        excitation_backprop, deconvnet, guided_backprop, beta_smooth, lrp_zero, epsilon, gamma, alpha1_beta0, w_square,
        deep_taylor, overview,
    )
}  # fmt: skip


def names() -> list[str]:
    """Names of the composites that `get` builds."""
    return list(_BUILDERS)


def needs_range(name: str) -> bool:
    """Whether the composite of this name takes the data's range, `low` and `high`."""
    return "low" in inspect.signature(_builder(name)).parameters


def get(composite: str | Composite, **options: Any) -> Composite:
    """Build a composite by its name; a `Composite` is returned as it is.

    Raises
    ------
    CompositeError
        There is no composite of that name, or it does not take these options.
    """
    if isinstance(composite, Composite):
        return composite
    if not isinstance(composite, str):
        raise CompositeError(f"composite must be a name or a lrpfast.Composite, got {type(composite).__name__}")
    builder = _builder(composite)
    unknown = set(options) - set(inspect.signature(builder).parameters)
    if unknown:
        raise CompositeError(f"the composite {composite!r} does not take {', '.join(sorted(unknown))}")
    return builder(**options)


def _builder(name: str) -> Callable[..., Composite]:
    if name in _BUILDERS:
        return _BUILDERS[name]
    close = difflib.get_close_matches(name, _BUILDERS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(_BUILDERS)}"
    raise CompositeError(f"no composite is called {name!r}; {hint}")
