"""From options to a model that is ready to be explained: what `explain`, `compile` and `plan` have in common."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import click
import torch

import lrpfast
from lrpfast import composites, models
from lrpfast.cli.options import EngineOptions, ModelOptions
from lrpfast.errors import InputError, ModelError

DEFAULT_COMPOSITE = "epsilon_plus_flat"


def warn(message: str) -> None:
    """Tell the person on stderr."""
    click.echo(f"lrpfast: warning: {message}", err=True)


def load(options: ModelOptions) -> models.Loaded:
    """Load the model that the options name, say on stderr what there is to say about it, and apply what they say of
    images.

    Raises
    ------
    LrpfastError
        As `models.load`; and for a file of class names that cannot be read, or a preprocessing that makes no sense.
    """
    # The `lrpfast` script, unlike `python -m lrpfast`, does not look for modules in the current folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    categories = None if options.classes is None else _read_categories(options.classes)
    loaded = models.load(
        options.spec, weights=options.weights, checkpoint=options.checkpoint, num_classes=options.num_classes
    )
    for note in loaded.notes:
        warn(note)
    changes: dict[str, Any] = {}
    if options.size is not None:
        changes |= {"size": options.size, "resize": options.size, "mode": "center"}
    if options.no_normalise:
        if options.mean is not None or options.std is not None:
            raise InputError("--no-normalise was given together with --mean or --std")
        channels = loaded.preprocessing.channels
        changes |= {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    if options.mean is not None:
        changes["mean"] = options.mean
    if options.std is not None:
        changes["std"] = options.std
    preprocessing = dataclasses.replace(loaded.preprocessing, **changes)
    return dataclasses.replace(
        loaded, preprocessing=preprocessing, categories=loaded.categories if categories is None else categories
    )


def device_of(options: EngineOptions) -> torch.device:
    """Return the device to compute on. Raises `InputError` where it is unknown or not there."""
    if options.device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"the device {options.device!r} cannot be used: {reason}") from error
    return device


def composite_of(loaded: models.Loaded, options: EngineOptions) -> composites.Composite:
    """Return the composite that the options name, with the range of the model's images where it takes one."""
    name = options.composite or DEFAULT_COMPOSITE
    bounds: dict[str, Any] = {}
    if composites.needs_range(name):
        bounds = {"low": loaded.preprocessing.low, "high": loaded.preprocessing.high}
    return composites.get(name, **bounds)


def make_explainer(
    loaded: models.Loaded, options: EngineOptions, record: tuple[str, ...] = ()
) -> tuple[lrpfast.Explainer, torch.Tensor]:
    """Compile the loaded module for its image size; `record` as of `lrpfast.Explainer`.

    Returns
    -------
    tuple
        The explainer, and the black image that it was compiled for: its device and dtype are those of the inputs.

    Raises
    ------
    ModelError
        It is a saved explanation, which is compiled already.
    InputError
        There are names of classes, and more or fewer than the model has outputs.
    LrpfastError
        As `lrpfast.Explainer`.
    """
    if loaded.model is None:
        raise ModelError(f"{loaded.spec} is a saved explanation, compiled already; a model is needed here")
    composite = composite_of(loaded, options)
    model = loaded.model
    if isinstance(model, torch.nn.Module):
        model = model.to(device_of(options))
    elif options.device is not None:
        raise ModelError(f"{loaded.spec} was exported for a device; leave --device out")
    example = models.black(model, loaded.preprocessing)
    explainer = lrpfast.Explainer(
        model,
        example,
        composite=composite,
        precision=options.precision,
        backend=options.backend or "auto",
        record=record,
    )
    outputs: Any = explainer.program.graph.output_node().args[0]
    shape = outputs[0].meta["val"].shape
    if len(shape) == 2:
        check_categories(loaded, shape[1])
    return explainer, example


def make_runnable(loaded: models.Loaded, options: EngineOptions) -> tuple[Any, torch.device, torch.dtype]:
    """Return what explains, a compiled model or the saved explanation, and the device and dtype of its inputs.

    Raises
    ------
    ModelError
        Options are given that a saved explanation does not leave open.
    LrpfastError
        As `make_explainer`.
    """
    if loaded.program is None:
        explainer, example = make_explainer(loaded, options)
        return explainer, example.device, example.dtype
    fixed = [f"--{field}" for field, value in dataclasses.asdict(options).items() if value is not None]
    if fixed:
        raise ModelError(f"{loaded.spec} is a saved explanation, compiled already; leave {', '.join(fixed)} out")
    program = loaded.program
    check_categories(loaded, program.metadata["classes"])
    return program, models.like(program.exported).device, getattr(torch, program.metadata["dtype"])


def check_categories(loaded: models.Loaded, outputs: int) -> None:
    """Raise an `InputError` where the names of the classes, if there are any, are not as many as the model's outputs."""
    if loaded.categories and len(loaded.categories) != outputs:
        raise InputError(
            f"there are {len(loaded.categories)} names of classes, and {loaded.spec} has {outputs} outputs; give --classes a file with one "
            "name a line, in the order of the outputs"
        )


def _read_categories(path: Path) -> tuple[str, ...]:
    try:
        # Without the mark that some editors put before the first name.
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the class names {path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines)
    if not names:
        raise InputError(f"the class names {path} are none: the file is empty")
    if "" in names:
        raise InputError(
            f"{path}, line {names.index('') + 1} is empty; the names of the classes stand one a line, in the order of the outputs"
        )
    return names
