"""Programs as files: ``.pt2`` to explain without the model, and ONNX to explain without Python.

Both hold the portable rendering of the joint program. A ``.pt2`` file is an ordinary `torch.export` archive, which
`torch.export.load` opens without lrpfast; beside the program lies a JSON record that says what it is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from lrpfast import __version__, checks
from lrpfast.building import building, without_autocast
from lrpfast.errors import (
    InputError,
    MissingDependencyError,
    ProgramError,
    TargetError,
    UnsupportedOperationError,
)
from lrpfast.explanation import Explanation
from lrpfast.files import replacing
from lrpfast.graph import Program, known_shape
from lrpfast.relevance import Joint, Seed
from lrpfast.runtime.portable import portable

_RECORD = "lrpfast.json"


def _exported(joint: Joint) -> tuple[ExportedProgram, Program]:
    program = portable(joint.program)
    examples = tuple(
        torch.zeros(
            [2 if s == -1 else s for s in known_shape(n)], dtype=n.meta["val"].dtype, device=n.meta["val"].device
        )
        for n in program.inputs
    )
    shapes = tuple({0: Dim.DYNAMIC} for _ in examples)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(program.module().eval(), examples, dynamic_shapes=shapes, strict=False), program


def save_program(joint: Joint, path: str | PathLike[str], metadata: dict[str, Any]) -> None:
    """Write a joint program to a ``.pt2`` file, whole or not at all."""
    exported, program = _exported(joint)
    inputs = program.inputs[:-1]
    output_shape = known_shape(program.outputs[0])
    record = {
        "lrpfast": __version__,
        "seed": joint.seed.value,
        "input_shapes": [list(known_shape(n)[1:]) for n in inputs],
        "dtype": str(inputs[0].meta["val"].dtype).removeprefix("torch."),
        "classes": output_shape[1] if len(output_shape) == 2 else 1,
        "recorded": list(joint.recorded),
        **metadata,
    }
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise InputError(f"save: extra must hold what JSON can, {error}") from error
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(exported, temporary, extra_files={_RECORD: text})


class SavedProgram:
    """An explanation program from a file; called like an `Explainer`.

    Attributes
    ----------
    metadata
        What the file says of itself: composite, input_shapes (without the batch), dtype, seed, the version of lrpfast, and
        what was given to `Explainer.save` as `extra`.
    """

    def __init__(self, exported: ExportedProgram, metadata: dict[str, Any]) -> None:
        self.metadata = metadata
        self.exported = exported
        self._module = exported.module()
        self._tensors = [*exported.state_dict.values(), *exported.constants.values()]

    def __call__(
        self,
        inputs: torch.Tensor | Sequence[torch.Tensor],
        target: int | Sequence[int] | torch.Tensor | None = None,
        seed: str | None = None,
    ) -> Explanation:
        """Explain a batch; see `Explainer.__call__`. Each of K targets takes a run of its own.

        Raises
        ------
        InputError, TargetError, NumericsError
            As `Explainer.__call__`; also for a seed other than the one that the program was saved with.
        """
        kind = Seed(self.metadata["seed"])
        if seed is not None and seed != kind.value:
            raise InputError(f"this program was saved with the seed {kind.value!r}; seed must not be {seed!r}")
        tensors = self._checked(checks.as_inputs(inputs))
        with torch.no_grad(), without_autocast(tensors[0].device):
            return self._explain(tensors, target, kind)

    def _checked(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        shapes = self.metadata["input_shapes"]
        if len(tensors) != len(shapes):
            raise InputError(f"this program takes {len(shapes)} inputs, {len(tensors)} were given")
        checks.check_inputs(tensors, [t for t in self._tensors if t.is_floating_point()][:1])
        for tensor, shape in zip(tensors, shapes, strict=True):
            if list(tensor.shape[1:]) != shape:
                raise InputError(
                    f"this program takes inputs of shape {shape} a sample, got {list(tensor.shape[1:])}; it is compiled for "
                    "one size"
                )
        return tensors

    def _explain(self, inputs: tuple[torch.Tensor, ...], target: Any, kind: Seed) -> Explanation:
        count = len(inputs)
        if kind is Seed.TENSOR:
            if not (isinstance(target, torch.Tensor) and target.is_floating_point()):
                raise TargetError(
                    "this program takes the relevance at the output as its target, a floating-point tensor"
                )
            results = [self._module(*inputs, target)]
            output = results[0][0]
            resolved = checks.check_output_relevance(target, output)
            total = resolved.flatten(1).sum(1)
        else:
            if isinstance(target, torch.Tensor) and target.is_floating_point():
                raise TargetError("this program takes class indices as its target, not the relevance at the output")
            batch, device = inputs[0].shape[0], inputs[0].device
            if target is None:
                asked = torch.full((batch,), -1, dtype=torch.int64, device=device)
            else:
                asked = checks.class_indices(target, batch, self.metadata["classes"])
            columns = asked.unbind(1) if asked.dim() == 2 else [asked]
            results = [self._module(*inputs, c.contiguous().to(device)) for c in columns]
            output = results[0][0]
            checks.check_finite(output, "the model's output")
            resolved = checks.resolve_target(None if target is None else asked, output)
            total = checks.seed_relevance(output, resolved, kind)
        several = kind is not Seed.TENSOR and resolved.dim() == 2
        maps = [torch.stack(c, 1) if several else c[0] for c in zip(*(r[1:] for r in results), strict=True)]
        for result in maps:
            checks.check_finite(result, "the relevance")
        relevance = maps[0] if count == 1 else tuple(maps[:count])
        layers = dict(zip(self.metadata["recorded"], maps[count:], strict=True))
        return Explanation(relevance, output, resolved, layers, total)


def load(path: str | PathLike[str]) -> SavedProgram:
    """Load a program that `Explainer.save` wrote. Neither the model nor its code is needed.

    Raises
    ------
    ProgramError
        There is no such file, it is damaged, or it is not a program of lrpfast.
    """
    name = fspath(path)
    if not Path(name).is_file():
        raise ProgramError(f"there is no program file {name!r}")
    files = {_RECORD: ""}
    try:
        with building(torch.device("cpu")), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.load(name, extra_files=files)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ProgramError(f"{name!r} cannot be read as a program (torch.export archive): {reason}") from error
    try:
        metadata = json.loads(files[_RECORD])
        Seed(metadata["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(
            f"{name!r} is a torch.export archive, but not an explanation program; make one with Explainer.save"
        ) from error
    return SavedProgram(exported, metadata)


def export_onnx(joint: Joint, path: str | PathLike[str], opset: int, metadata: dict[str, Any]) -> None:
    """Write a joint program to an ONNX file, whole or not at all; see `Explainer.export_onnx`."""
    if opset < 18:
        raise InputError(f"export_onnx needs opset 18 or newer, got {opset}")
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name} is needed to export to ONNX: pip install 'lrpfast[onnx]'"
        ) from error
    exported, program = _exported(joint)
    names = [n.name for n in program.inputs]
    inputs = ["input" if len(names) == 2 else f"input_{i}" for i in range(len(names) - 1)] + names[-1:]
    maps = ["relevance" if len(names) == 2 else f"relevance_{i}" for i in range(len(names) - 1)]
    outputs = ["output", *maps, *(f"layer:{name}" for name in joint.recorded)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                exported,
                input_names=inputs,
                output_names=outputs,
                opset_version=opset,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
        assert converted is not None
    except Exception as error:
        raise UnsupportedOperationError(f"the program cannot be written as ONNX: {_innermost(error)}") from error
    proto = converted.model_proto
    for key, text in {"lrpfast": __version__, "composite": str(metadata.get("composite", ""))}.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, text
    with replacing(path) as temporary:
        onnx.save(proto, fspath(temporary))


def _innermost(error: BaseException) -> str:
    """The first line of the error that the exporter's own errors wrap: it names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
