"""How a worker gets what explains: a recipe that can be pickled, called once in each process.

Compiling an explainer takes seconds and its weights do not travel well, so a worker makes its own and keeps it. The recipe also says
what it makes, for the manifest: a digest of the weights, the composite, the precision.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export import ExportedProgram

import lrpfast
from lrpfast import composites
from lrpfast.capture import check_mode, explain_failure
from lrpfast.errors import CaptureError, InputError, LrpfastError
from lrpfast.explanation import FEATURES
from lrpfast.export import SavedProgram
from lrpfast.images import Preprocessing
from lrpfast.models import black
from lrpfast.rules import Rule
from lrpfast.screening.listing import Model


@dataclasses.dataclass(frozen=True)
class Runnable:
    """What explains a batch, an `Explainer` or a saved program, the device and dtype of its inputs, and how many channels of the
    last features it tells the relevance of, as the layer `FEATURES`."""

    explain: Callable[..., lrpfast.Explanation]
    device: torch.device
    dtype: torch.dtype
    features: int = 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make what explains, and what it is.

    Parameters
    ----------
    build
        Makes it. For engines with several processes it must be possible to pickle it.
    settings
        What of the explaining the maps depend on: composite, precision. As JSON holds it.
    description
        The model: its name, the digest of its weights. As JSON holds it.
    preprocessing
        From image to input.
    model
        The names and number of its classes.
    """

    build: Callable[[], Runnable]
    settings: dict[str, Any]
    description: dict[str, Any]
    preprocessing: Preprocessing
    model: Model


def recipe(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    composite: str | lrpfast.Composite = "epsilon_plus_flat",
    precision: str | None = None,
    backend: str = "auto",
    categories: Iterable[str] = (),
) -> Recipe:
    """Make the recipe of a module in eval mode; images come to the device and dtype of its parameters.

    Raises
    ------
    InputError
        The model's output for a black image is not one vector of logits a sample, or the composite is as `describe` refuses it.
    CaptureError
        The model does not run on images of that size and number of channels, or is in training mode with batch norms.
    LrpfastError
        As `lrpfast.composites.get`.
    """
    ranged = isinstance(composite, str) and composites.needs_range(composite)
    chosen = composites.get(composite, **({"low": preprocessing.low, "high": preprocessing.high} if ranged else {}))
    outputs = count_outputs(model, black(model, preprocessing), model)
    build = functools.partial(_build, model, preprocessing, chosen, precision, backend)
    return Recipe(
        build,
        {"composite": describe(chosen), "precision": precision},
        {"spec": type(model).__qualname__, "digest": digest(model.state_dict())},
        preprocessing,
        Model(tuple(categories), outputs),
    )


def runnable(make: Callable[[tuple[str, ...]], tuple[lrpfast.Explainer, torch.Tensor]]) -> Runnable:
    """Return what explains and tells of the last features, or, where the model has no such layer, what explains.

    Parameters
    ----------
    make
        From the layers to record to a compiled explainer, and an input that it takes.
    """
    try:
        recorded: tuple[str, ...] = (FEATURES,)
        explainer, example = make(recorded)
    except InputError:
        recorded = ()
        explainer, example = make(recorded)
    features = count_features(explainer.program.graph, recorded)
    return Runnable(explainer, example.device, example.dtype, features)


def count_features(graph: fx.Graph, recorded: Sequence[str]) -> int:
    """How many channels the layer `FEATURES` has, the last outputs of a graph being the recorded layers; 0 where it is not recorded."""
    if FEATURES not in recorded:
        return 0
    outputs: Any = graph.output_node().args[0]
    return int(outputs[len(outputs) - len(recorded) + recorded.index(FEATURES)].meta["val"].shape[1])


def count_outputs(
    model: torch.nn.Module | ExportedProgram | SavedProgram, example: torch.Tensor, forward: Callable[..., Any]
) -> int:
    """How many classes a model tells apart.

    Parameters
    ----------
    model
        A module in eval mode, or what was made of one.
    example
        An input of one sample.
    forward
        Runs the model.

    Raises
    ------
    CaptureError
        It does not run on such an input, or has batch norms in training mode, which would change when it runs.
    InputError
        Its output is no vector a sample.
    """
    if isinstance(model, torch.nn.Module):
        check_mode(model)
    try:
        with torch.no_grad():
            output = logits(forward(example))
    except LrpfastError:
        raise
    except Exception as error:
        # It is a person's own code. A saved program says itself what it takes.
        if isinstance(model, SavedProgram):
            raise
        raise CaptureError(explain_failure(model, (example,), error)) from error
    if output.dim() != 2 or output.shape[1] < 2:
        raise InputError(f"the model returns {list(output.shape)} for one image; a screening needs logits [1, classes]")
    return output.shape[1]


def logits(output: Any) -> torch.Tensor:
    """Return the one tensor that a model returned, be it within a dictionary or a tuple. Raises `InputError`."""
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    if len(leaves) != 1:
        raise InputError(f"the model returns {len(leaves)} tensors; a screening needs one, the logits")
    return leaves[0]


def describe(composite: lrpfast.Composite) -> str:
    """Say what a composite is in words that are the same in every process: its name, and a digest of its rules with all their values.

    Raises
    ------
    InputError
        A match is a callable that no other process could import by its name, or a value of a rule is of a kind that has no digest.
    """
    return f"{composite.name} {hashlib.blake2b(_told(composite).encode(), digest_size=4).hexdigest()}"


def _told(composite: lrpfast.Composite) -> str:
    """All that a composite is."""
    name = composite.name
    if name in composites.names() and not composites.needs_range(name) and composite == composites.get(name):
        # As earlier versions wrote it, whose folders can be gone on with: it leaves out nothing of these few round numbers.
        return "; ".join(f"{match}: {rule}" for match, rule in (*composite.first, *composite.rules))
    pairs = {"first": composite.first, "rules": composite.rules}
    return json.dumps(
        {where: [[_match_name(match), _rule_values(rule)] for match, rule in pairs[where]] for where in pairs}
    )


def _match_name(match: composites.Match) -> list[str]:
    """A string as it is; a callable's module and name, by which pickle knows it as well."""
    if isinstance(match, str):
        return [match]
    module, name = str(getattr(match, "__module__", "")), str(getattr(match, "__qualname__", ""))
    try:
        found = pkgutil.resolve_name(f"{module}:{name}")
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not match or module == "__main__":
        raise InputError(
            f"the composite matches layers by {match!r}, which has no name that another process could import: what goes on with the "
            "screening could not tell whether it is the same. Give a function of a module"
        )
    return [module, name]


def _rule_values(rule: Rule) -> list[Any]:
    # Not `str(rule)`, which is cut and rounded for people.
    return [
        type(rule).__name__,
        {name: _exact(value, f"{type(rule).__name__}.{name}") for name, value in vars(rule).items()},
    ]


def _exact(value: Any, name: str) -> Any:
    """A value of a rule with nothing left out, as JSON holds it."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (tuple, list)):
        return [_exact(entry, name) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        value = torch.as_tensor(np.array(value))
    if isinstance(value, torch.Tensor):
        return {"tensor": digest({"": value})}
    raise InputError(
        f"{name} of the composite is a {type(value).__name__}, of which there is no digest; give a number, a sequence or a tensor"
    )


def digest(content: dict[str, Any] | ExportedProgram) -> str:
    """Return a digest of tensors by name, of an exported program's also of its code; 32 hexadecimal digits."""
    found = hashlib.blake2b(digest_size=16)
    state = content
    if isinstance(content, ExportedProgram):
        found.update(str(content.graph_module.code).encode())
        state = {**content.state_dict, **content.constants}
    assert isinstance(state, dict)
    for name in sorted(state):
        tensor = state[name]
        if isinstance(tensor, torch.Tensor):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        else:
            found.update(f"{name} {tensor!r}".encode())
    return found.hexdigest()


def _build(
    model: torch.nn.Module,
    preprocessing: Preprocessing,
    composite: lrpfast.Composite,
    precision: str | None,
    backend: str,
) -> Runnable:
    example = black(model, preprocessing)

    def make(record: tuple[str, ...]) -> tuple[lrpfast.Explainer, torch.Tensor]:
        return lrpfast.Explainer(model, example, composite, precision, backend, record), example

    return runnable(make)
