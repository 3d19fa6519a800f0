"""`lrpfast explain`: images in; maps, overlays, arrays and a few lines of text out.

What can be wrong with the whole run (no images, a folder that cannot be written, the model, the target) is found
before anything is computed. What is wrong with one image is told, and the others are done.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils._pytree import tree_leaves

from lrpfast import images as image_files
from lrpfast import viz
from lrpfast.cli import setup
from lrpfast.cli.names import count, unique_stems
from lrpfast.cli.options import EngineOptions, ModelOptions
from lrpfast.errors import InputError, LrpfastError, NumericsError
from lrpfast.files import check_writable, make_folder
from lrpfast.models import Loaded

_TOP = 3
_LEGIBLE = 224  # smaller pictures are enlarged towards so many pixels, by whole pixels


@dataclasses.dataclass(frozen=True)
class _Sample:
    """An image to be explained."""

    path: Path
    view: Image.Image
    tensor: torch.Tensor


@dataclasses.dataclass(frozen=True)
class _Result:
    """An image explained for K targets: relevance [K, C, H, W], the output [classes], targets and conservation [K]."""

    sample: _Sample
    relevance: np.ndarray
    output: np.ndarray
    targets: tuple[int, ...]
    conservation: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _Failure:
    """An image that could not be explained, and why."""

    path: Path
    error: LrpfastError


class _Runner:
    """A compiled model or a saved explanation, called with samples."""

    def __init__(self, loaded: Loaded, engine: EngineOptions, targets: Sequence[int], seed: str) -> None:
        self._explain, self._device, self._dtype = setup.make_runnable(loaded, engine)
        self._targets, self._seed = list(targets), seed

    def __call__(self, samples: Sequence[_Sample]) -> Iterator[_Result | _Failure]:
        """Explain a batch; one with values that are not finite is explained image by image, to find which has them."""
        try:
            explanation = self._run(samples)
        except NumericsError as error:
            if len(samples) == 1:
                yield _Failure(samples[0].path, error)
                return
            for sample in samples:
                yield from self([sample])
            return
        relevance = explanation.relevance.detach().float().cpu().numpy()
        # A model may return its one tensor within a dictionary or a tuple.
        (returned,) = (leaf for leaf in tree_leaves(explanation.output) if isinstance(leaf, torch.Tensor))
        output = returned.detach().double().cpu().numpy().reshape(len(samples), -1)
        targets = explanation.target.cpu().numpy().reshape(len(samples), -1)
        conservation = explanation.conservation().detach().double().cpu().numpy().reshape(len(samples), -1)
        for row, sample in enumerate(samples):
            maps = relevance[row].reshape(targets.shape[1], *sample.tensor.shape)
            yield _Result(
                sample, maps, output[row], tuple(map(int, targets[row])), tuple(map(float, conservation[row]))
            )

    def _run(self, samples: Sequence[_Sample]) -> Any:
        inputs = torch.stack([sample.tensor for sample in samples]).to(self._device, self._dtype)
        target: Any = None
        if len(self._targets) == 1:
            target = self._targets[0]
        elif self._targets:
            target = torch.tensor(self._targets, device=self._device).expand(len(samples), -1)
        try:
            return self._explain(inputs, target=target, seed=self._seed)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"no memory for {len(samples)} images at once on {self._device}; lower --batch-size"
            ) from error


def run(
    paths: Sequence[Path],
    model: ModelOptions,
    engine: EngineOptions,
    *,
    output: Path,
    targets: Sequence[str],
    seed: str,
    batch_size: int,
    percentile: float | None,
    colormap: str,
) -> int:
    """Explain images and write and print the results; see the command's help.

    Returns
    -------
    int
        How many images failed. Each was told on stderr.

    Raises
    ------
    LrpfastError
        What stops the run as a whole.
    """
    files = image_files.find(paths, exclude=output)
    if not files:
        raise InputError(
            f"no images in {', '.join(map(str, paths))} (looked for {', '.join(sorted(image_files.SUFFIXES))})"
        )
    if any(path.is_dir() and path.resolve() == output.resolve() for path in paths):
        raise InputError(f"the output folder {output} is searched for images; the maps would be explained next time")
    check_writable(output)
    stems = unique_stems(files)
    loaded = setup.load(model)
    indices = list(dict.fromkeys(loaded.class_index(target) for target in targets))
    terminal = Console(stderr=True)
    with terminal.status(f"compiling {loaded.spec}"):
        runner = _Runner(loaded, engine, indices, seed)
    failed = 0
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=terminal, disable=not terminal.is_terminal, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        task = progress.add_task("", total=len(files))
        say = _Voice(terminal)
        for outcome in _outcomes(files, loaded, runner, batch_size):
            if isinstance(outcome, _Result):
                written = _write(outcome, output, stems[outcome.sample.path], percentile, colormap)
                say.result(str(outcome.sample.path), _lines(outcome, loaded, written))
            else:
                failed += 1
                say.failure(outcome)
            progress.advance(task)
    if failed:
        click.echo(f"lrpfast: {failed} of {count(len(files), 'image')} failed", err=True)
    return failed


class _Voice:
    """Says results on stdout and failures on stderr, above the progress bar where there is one."""

    def __init__(self, terminal: Console) -> None:
        self._terminal = terminal

    def result(self, title: str, lines: Sequence[str]) -> None:
        text = "\n".join([title, *(f"  {line}" for line in lines)])
        self._say(text, err=False, shared=sys.stdout.isatty())

    def failure(self, failure: _Failure) -> None:
        # Messages about reading name the file already.
        text = str(failure.error)
        named = text if str(failure.path) in text else f"{failure.path}: {text}"
        self._say(f"lrpfast: {named}", err=True, shared=True)

    def _say(self, text: str, *, err: bool, shared: bool) -> None:
        text = os.fsencode(text).decode(errors="replace")  # names of files need not be text
        if shared and self._terminal.is_terminal:
            self._terminal.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            click.echo(text, err=err)


def _outcomes(files: Sequence[Path], loaded: Loaded, runner: _Runner, batch_size: int) -> Iterator[_Result | _Failure]:
    """Explain files in batches; what cannot be read takes no place in a batch."""
    samples: list[_Sample] = []
    for path in files:
        try:
            view = loaded.preprocessing.view(image_files.read(path, loaded.preprocessing.channels))
        except InputError as error:
            yield _Failure(path, error)
            continue
        samples.append(_Sample(path, view, loaded.preprocessing.tensor(view)))
        if len(samples) == batch_size:
            yield from runner(samples)
            samples = []
    if samples:
        yield from runner(samples)


def _write(result: _Result, folder: Path, stem: str, percentile: float | None, colormap: str) -> str:
    make_folder(folder)
    view = result.sample.view
    times = max(1, _LEGIBLE // max(view.size))
    size = (view.height * times, view.width * times)
    large = view.resize((size[1], size[0]), Image.Resampling.NEAREST)
    several = len(result.targets) > 1
    endings: list[str] = []
    for target, relevance in zip(result.targets, result.relevance, strict=True):
        mark = f"-{target}" if several else ""
        heatmap = relevance.sum(axis=0)
        pictures = {
            f"-map{mark}.png": viz.render(heatmap, percentile=percentile, colormap=colormap, size=size),
            f"-overlay{mark}.png": viz.overlay(large, heatmap, percentile=percentile, colormap=colormap),
        }
        for ending, picture in pictures.items():
            viz.save(picture, folder / f"{stem}{ending}")
        endings += pictures
    viz.save_array(result.relevance if several else result.relevance[0], folder / f"{stem}.npy")
    # As a shell writes several files of one beginning.
    return f"{folder / stem}{{{','.join([*endings, '.npy'])}}}"


def _lines(result: _Result, loaded: Loaded, written: str) -> list[str]:
    lines = []
    output = result.output
    shifted = np.exp(output - output.max())
    probabilities = shifted / shifted.sum()
    if len(output) > 1:
        for index in np.argsort(-output, kind="stable")[:_TOP]:
            lines.append(f"{probabilities[index]:7.2%}  {_class(loaded, index)}")
    for target, conservation in zip(result.targets, result.conservation, strict=True):
        lines.append(
            f"explained: {_class(loaded, target)}, logit {output[target]:.4g}, conservation {conservation:.4f}"
        )
    lines.append(f"written: {written}")
    return lines


def _class(loaded: Loaded, index: int) -> str:
    return f"{loaded.categories[index]} ({index})" if index < len(loaded.categories) else f"class {index}"
