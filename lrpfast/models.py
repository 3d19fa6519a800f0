"""Find and load a model from the few words that a person types, together with what its images and classes mean.

A spec is `torchvision:NAME`, `timm:NAME`, `path/to/program.pt2` or `package.module:factory`. Each kind has one loader
here, and all give the same record, `Loaded`: the model in eval mode (or the saved explanation), how images become its
input, and the names of its classes. What is wrong with a spec, a set of weights or a checkpoint is found here, before
anything is computed or written.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import lrpfast
from lrpfast.changes import Watch
from lrpfast.errors import LrpfastError, MissingDependencyError, ModelError, ProgramError
from lrpfast.export import SavedProgram
from lrpfast.images import Preprocessing

SPECS = "torchvision:NAME, timm:NAME, path/to/program.pt2 or package.module:factory"
_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that can be explained, and what a person needs to feed it and to read its output.

    Parameters
    ----------
    spec
        What it was loaded from.
    model
        The module, in eval mode, or the exported program of one; None for a saved explanation.
    program
        The saved explanation; None for a model.
    preprocessing
        From image to input.
    categories
        Names of the classes in the order of the outputs; empty where they are not known.
    notes
        What the person should know: weights that are random, say.
    """

    spec: str
    model: nn.Module | ExportedProgram | None = None
    program: SavedProgram | None = None
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    categories: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return what a saved explanation of this model keeps of it, its `extra`; `load` reads it."""
        return {
            "model": self.spec,
            "preprocessing": self.preprocessing.to_dict(),
            "categories": list(self.categories),
        }

    def class_index(self, target: str) -> int:
        """The index of a class given as an index or a name.

        A name is compared without regard to case; one that several classes share must be given as an index.

        Raises
        ------
        ModelError
            There is no such class; the message names the nearest ones.
        """
        if target.isdecimal():
            return int(target)
        names = [name.casefold() for name in self.categories]
        matches = [index for index, name in enumerate(names) if name == target.casefold()]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ModelError(f"several classes are called {target!r}: give one of the indices {matches}")
        if not names:
            raise ModelError(
                f"target {target!r}: the names of the classes are not known here; give an index, or the names"
            )
        raise ModelError(f"no class is called {target!r}{_nearest(target, self.categories)}")


def load(
    spec: str,
    *,
    weights: str | None = None,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
) -> Loaded:
    """Load what a spec names.

    Parameters
    ----------
    spec
        `torchvision:NAME` and `timm:NAME`: an architecture of these libraries. `path/to/program.pt2`: an explanation
        that lrpfast saved, or a model that `torch.export` saved. `package.module:factory`: a module, or something that
        is called without arguments and returns one.
    weights
        Pretrained weights of torchvision ("DEFAULT", "IMAGENET1K_V2", ...) or timm ("DEFAULT", or a tag such as
        "a1_in1k"). None without a checkpoint: random weights, the same ones every time, and a note that says so (a
        factory's model keeps the weights that the factory gave it).
    checkpoint
        A file of weights: a state dict, also under "state_dict", "model_state_dict" or "model"; .safetensors too.
    num_classes
        Build the torchvision or timm architecture for so many classes.

    Returns
    -------
    Loaded

    Raises
    ------
    ModelError
        No such model or weights, a factory that fails, a checkpoint that cannot be read or does not fit.
    ProgramError
        A .pt2 file that is neither an explanation nor a model.
    MissingDependencyError
        torchvision, timm or safetensors is asked for and not installed.
    """
    if weights is not None and checkpoint is not None:
        raise ModelError("weights and a checkpoint were both given; a model has one of them")
    if spec.endswith(".pt2"):
        return _load_program(spec, weights, checkpoint, num_classes)
    source, colon, name = spec.partition(":")
    if not colon or not source or not name:
        raise ModelError(f"{spec!r} names no model; use {SPECS}")
    if source not in _LIBRARIES and (weights is not None or num_classes is not None):
        raise ModelError(
            f"weights and a number of classes can be chosen for torchvision and timm models, not for {spec!r}"
        )
    # Random weights must not differ from run to run, nor the caller's random numbers depend on what is loaded.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        library = _LIBRARIES.get(source)
        loaded = Loaded(spec, model=_from_factory(spec)) if library is None else library(name, weights, num_classes)
    model = loaded.model
    assert isinstance(model, nn.Module)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    elif weights is None and source in _LIBRARIES:
        note = f"{spec} has random weights: its classes and maps mean nothing. Give weights (DEFAULT) or a checkpoint"
        loaded = dataclasses.replace(loaded, notes=(*loaded.notes, note))
    model.eval()
    return loaded


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a model; all of them fit or none is loaded.

    Only tensors are read from the file, no code is run (`torch.load(weights_only=True)`).

    Raises
    ------
    ModelError
        The file cannot be read, or holds no state dict, or does not fit: the message names keys that are missing,
        unexpected or of another shape.
    MissingDependencyError
        A .safetensors file, and safetensors is not installed.
    """
    state = _read_state(Path(path))
    expected = model.state_dict()
    state = _without_prefix(state, expected)
    # Counters that an eval mode model does not use; old checkpoints lack them.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    reshaped = [
        f"{key} ({_shape(state[key])} in the file, {_shape(expected[key])} in the model)"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    problems = [
        _listed(*kind)
        for kind in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if kind[1]
    ]
    if problems:
        hint = (
            " (for another number of classes, build the model with it)"
            if reshaped and not missing and not unexpected
            else ""
        )
        raise ModelError(f"the checkpoint {path} does not fit the model: {'; '.join(problems)}{hint}")
    model.load_state_dict(state, strict=False)


def like(model: nn.Module | ExportedProgram) -> torch.Tensor:
    """Return a tensor whose dtype and device a model's inputs must have, as an `Explainer` wants them: the first parameter of floating
    point; without one, such a buffer, a constant of an exported program, or an empty tensor."""
    constants = model.constants.values() if isinstance(model, ExportedProgram) else ()
    tensors = (t for t in (*Watch(model).tensors(), *constants) if isinstance(t, torch.Tensor))
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def black(model: nn.Module | ExportedProgram, preprocessing: Preprocessing) -> torch.Tensor:
    """Return a black image as a model takes it: [1, C, H, W], with the dtype and device of `like`."""
    tensor = like(model)
    pixel = torch.tensor(preprocessing.low, dtype=tensor.dtype, device=tensor.device).view(1, -1, 1, 1)
    return pixel.expand(1, preprocessing.channels, *preprocessing.size).contiguous()


def _load_program(spec: str, weights: str | None, checkpoint: Any, num_classes: int | None) -> Loaded:
    if weights is not None or checkpoint is not None or num_classes is not None:
        raise ModelError(
            f"{spec} has its weights within: weights, a checkpoint and a number of classes cannot be chosen"
        )
    if not Path(spec).is_file():
        raise ModelError(f"there is no program {spec}")
    try:
        program = lrpfast.load(spec)
    except ProgramError:
        exported = _read_exported(spec)
        if exported is None:
            raise
        shapes = [meta.shape[1:] for meta in _inputs(exported)]
        preprocessing, note = _assumed(spec, shapes)
        return Loaded(spec, model=exported, preprocessing=preprocessing, notes=(note,))
    extra = program.metadata["extra"]
    categories = tuple(extra.get("categories", ()))
    if "preprocessing" in extra:
        known = Preprocessing.from_dict(extra["preprocessing"])
        return Loaded(spec, program=program, preprocessing=known, categories=categories)
    preprocessing, note = _assumed(spec, program.metadata["input_shapes"])
    return Loaded(spec, program=program, preprocessing=preprocessing, categories=categories, notes=(note,))


def _read_exported(path: str) -> ExportedProgram | None:
    """Read a model that `torch.export.save` wrote; None if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception:
        return None


def _inputs(exported: ExportedProgram) -> list[torch.Tensor]:
    named = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    return [named[name] for name in exported.graph_signature.user_inputs if name in named]


def _assumed(spec: str, shapes: Sequence[Sequence[int]]) -> tuple[Preprocessing, str]:
    """What images are assumed to need where only the shape of the input is known, and a note that says so."""
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 3):
        takes = ", ".join(str([int(side) for side in shape]) for shape in shapes)
        raise ModelError(f"{spec} takes {takes or 'no tensor'} a sample; images give [3, H, W] or [1, H, W]")
    channels, height, width = map(int, shapes[0])
    resize = (round(height * 256 / 224), round(width * 256 / 224))
    if channels == 3:
        note = f"{spec} does not say how its images were prepared; assuming ImageNet's mean and standard deviation"
        return Preprocessing(size=(height, width), resize=resize), note
    note = f"{spec} does not say how its images were prepared; assuming values in 0..1"
    return Preprocessing(size=(height, width), resize=resize, mean=(0.0,), std=(1.0,)), note


def _from_torchvision(name: str, weights: str | None, num_classes: int | None) -> Loaded:
    models = _import_library("torchvision.models", "torchvision")
    spec = f"torchvision:{name}"
    if name not in models.list_models(module=models):
        raise ModelError(
            f"torchvision has no classification model {name!r}{_nearest(name, models.list_models(module=models))}"
        )
    known = models.get_model_weights(name)
    chosen = None if weights is None else _torchvision_weights(spec, known, weights)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if chosen is None and name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # half a minute of truncated normal draws, and a warning where it is not said
    model = _build(spec, weights, lambda: models.get_model(name, weights=chosen, **options))
    # An architecture without pretrained weights still has the sizes that its oldest weights were made for (inception:
    # 299).
    like = chosen if chosen is not None else next(iter(known), None)
    preprocessing = Preprocessing() if like is None else _of_torchvision_preset(like.transforms())
    categories = () if chosen is None else tuple(chosen.meta["categories"])
    return Loaded(spec, model=model, preprocessing=preprocessing, categories=categories)


def _torchvision_weights(spec: str, known: Any, name: str) -> Any:
    member = known.__members__.get(name.rpartition(".")[2])  # "ResNet50_Weights.IMAGENET1K_V2" too
    if member is None:
        raise ModelError(f"{spec} has no weights {name!r}; there are {', '.join(known.__members__) or 'none'}")
    return member


def _of_torchvision_preset(preset: Any) -> Preprocessing:
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    return Preprocessing(
        size=(crop, crop),
        resize=(resize, resize),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _from_timm(name: str, weights: str | None, num_classes: int | None) -> Loaded:
    timm = _import_library("timm", "timm")
    data = importlib.import_module("timm.data")
    spec = f"timm:{name}"
    if not timm.is_model(name.partition(".")[0]) and not name.startswith(("hf_hub:", "hf-hub:")):
        raise ModelError(f"timm has no model {name!r}{_nearest(name.partition('.')[0], timm.list_models())}")
    tagged = name if weights in (None, "DEFAULT") else f"{name.partition('.')[0]}.{weights}"
    if weights not in (None, "DEFAULT") and tagged not in timm.list_pretrained():
        there = [full.partition(".")[2] for full in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
        raise ModelError(f"{spec} has no weights {weights!r}; there are {', '.join(there) or 'none'}")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    model = _build(spec, weights, lambda: timm.create_model(tagged, pretrained=weights is not None, **options))
    config = data.resolve_data_config(model=model)
    size = tuple(config["input_size"][1:])
    preprocessing = Preprocessing(
        size=size,
        resize=tuple(math.floor(side / config["crop_pct"]) for side in size),
        mode=config["crop_mode"] or "center",
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    categories = () if weights is None or num_classes is not None else _timm_categories(data, model)
    return Loaded(spec, model=model, preprocessing=preprocessing, categories=categories)


def _timm_categories(data: Any, model: nn.Module) -> tuple[str, ...]:
    subset = data.infer_imagenet_subset(model)
    return tuple(data.ImageNetInfo(subset).label_descriptions()) if subset else ()


def _from_factory(spec: str) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as error:
        # Told apart: the module asked for is not there, or it is and something that it imports is not.
        absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        reason = "no such module here or among the installed packages" if absent else f"{type(error).__name__}: {error}"
        raise ModelError(f"{spec}: {module_name} cannot be imported: {reason}. A model is {SPECS}") from error
    except Exception as error:
        raise ModelError(f"{spec}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise ModelError(f"{spec}: {module_name} has no {attribute!r}{_nearest(name, dir(target))}")
        target = getattr(target, name)
    if not isinstance(target, nn.Module):
        if not callable(target):
            raise ModelError(
                f"{spec} is a {type(target).__name__}; a torch.nn.Module or a callable that returns one is needed"
            )
        target = _build(spec, None, target)
    if not isinstance(target, nn.Module):
        raise ModelError(f"{spec} returned a {type(target).__name__}; a torch.nn.Module is needed")
    return target


_LIBRARIES: dict[str, Callable[[str, str | None, int | None], Loaded]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
}


def _import_library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ModelError(f"{package} is installed, but importing it fails: {error}") from error
        raise MissingDependencyError(
            f"{package} is not installed, and a {package}: model needs it: pip install {package}"
        ) from error
    except Exception as error:
        # torchvision's compiled part fails in a RuntimeError beside a torch of another version.
        raise ModelError(
            f"{package} is installed, but importing it fails ({type(error).__name__}: {error}). "
            f"It has to match torch {torch.__version__}: install both from the same index"
        ) from error


def _build(spec: str, weights: str | None, make: Callable[[], Any]) -> Any:
    torch.default_generator.manual_seed(0)  # again: importing a module may have drawn
    try:
        return make()
    except LrpfastError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if weights is None:
            raise ModelError(f"{spec} cannot be built: {reason}") from error
        raise ModelError(
            f"{spec} cannot be built with the weights {weights}: {reason}. If they cannot be downloaded here, fetch "
            "them elsewhere and give the file as a checkpoint"
        ) from error


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelError(f"there is no checkpoint {path}")
    try:
        content = (
            _load_safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except MissingDependencyError:
        raise
    except Exception as error:
        # Unpickling a damaged file can raise nearly anything.
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the checkpoint {path} cannot be read as a file of tensors ({type(error).__name__}: {reason}). "
            "Save model.state_dict() alone, not the model"
        ) from error
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        held = (
            f"keys {', '.join(map(str, list(content)[:5]))}"
            if isinstance(content, dict)
            else f"a {type(content).__name__}"
        )
        raise ModelError(
            f"the checkpoint {path} holds no state dict, at its top or under {', '.join(_NESTED)}: it has {held}"
        )
    return content


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingDependencyError(f"{path} needs safetensors: pip install safetensors") from error
    return load_file(path)


def _without_prefix(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Strip the prefixes that wrappers put before every key, in whatever order they were put."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in expected):
            return _without_prefix({key.removeprefix(prefix): value for key, value in state.items()}, expected)
    return state


def _listed(what: str, keys: Sequence[str], most: int = 5) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return f"{what}: {', '.join(keys[:most])}{more}"


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
