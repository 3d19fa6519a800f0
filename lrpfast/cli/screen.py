"""`lrpfast screen`, `report` and `export-virelay`: a folder of images in; shards, findings and a report out.

The folder is held for the whole command: two commands that screen into it at once would analyse what is not complete.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lrpfast import models, screening
from lrpfast.cli import setup
from lrpfast.cli.names import count
from lrpfast.cli.options import EngineOptions, ModelOptions
from lrpfast.errors import InputError, ScreeningError
from lrpfast.files import check_writable
from lrpfast.models import Loaded

REPORT = "report.html"
_NAMED = 5  # findings named on the terminal
_BATCH = {"cpu": 16, "cuda": 64}


def run(
    model: ModelOptions,
    engine: EngineOptions,
    *,
    data: str,
    output: Path,
    target: str,
    seed: str,
    pool: int,
    batch_size: int | None,
    shard_size: int,
    workers: int | None,
    runner: str,
    stages: Sequence[str],
) -> None:
    """Screen a dataset, or go on with it; see the command's help.

    Raises
    ------
    LrpfastError
        What stops the run.
    """
    screening.require()
    from lrpfast.screening import manifest
    from lrpfast.screening.explain import check_same

    check_writable(output)
    _check_apart(data, output)
    terminal = Console(stderr=True)
    with terminal.status(f"loading {model.spec}"):
        loaded = setup.load(model)
        recipe = recipe_of(loaded, model, engine, local=runner == "local")
    with terminal.status(f"listing {data}"):
        source = screening.open_source(data, recipe.preprocessing, recipe.model, output)
    with manifest.locked(output):
        if "explain" in stages:
            size = batch_size or _BATCH.get(setup.device_of(engine).type, _BATCH["cpu"])
            click.echo(f"{count(len(source), 'image')} in {data}", err=True)
            summary = screening.explain_dataset(
                recipe, source, output, target=target, seed=seed, pool=pool, batch_size=size, shard_size=shard_size,
                workers=workers, engine=runner,
            )  # fmt: skip
            _tell(summary, output, len(recipe.model.categories) or recipe.model.outputs)
        else:
            check_same(recipe, source, output, target=target, seed=seed, pool=pool, shard_size=shard_size)
            _check_complete(output)
        if "analyse" in stages:
            with _classes(terminal, "analysing") as progress:
                screening.analyse(output, progress=progress)
        if "verify" in stages:
            with _classes(terminal, "verifying") as progress:
                found = screening.verify(output, source, logits_of(loaded, engine), progress=progress)
            _tell_findings(found, source)
        if "report" in stages:
            with terminal.status("writing the report"):
                screening.write_report(output, source)
            click.echo(f"report: {output / REPORT}")


def run_report(folder: Path) -> None:
    """Write the report of a screening again. Raises `LrpfastError`."""
    screening.require()
    from lrpfast.screening import manifest

    manifest.read(folder)  # before the lock, which would make the folder
    with manifest.locked(folder):
        screening.write_report(folder, _source(folder))
    click.echo(f"report: {folder / REPORT}")


def run_export(folder: Path, output: Path) -> None:
    """Write a screening as a project of ViRelAy. Raises `LrpfastError`."""
    screening.require()
    from lrpfast.screening import manifest

    manifest.read(folder)
    check_writable(output)
    with manifest.locked(folder):
        screening.export_virelay(folder, output, screening.reopen(folder))
    click.echo(f"project: {output / 'project.yaml'}")


def recipe_of(loaded: Loaded, model: ModelOptions, engine: EngineOptions, *, local: bool) -> Any:
    """Return the recipe of what the options name: in this process from the model that is loaded, in others from the options."""
    from lrpfast.screening import recipes
    from lrpfast.screening.listing import Model

    preprocessing = loaded.preprocessing
    build: Callable[[], Any]
    if local:
        build = functools.partial(_build, loaded, engine)
    else:
        build = functools.partial(
            _load_and_build, model, engine, [place for place in (os.getcwd(), *sys.path) if place]
        )
    if loaded.program is not None:
        known = {"composite": loaded.program.metadata["composite"], "precision": loaded.program.metadata["dtype"]}
        content: Any = loaded.program.exported
    else:
        composite = setup.composite_of(loaded, engine)
        known = {"composite": recipes.describe(composite), "precision": engine.precision}
        content = loaded.model if not isinstance(loaded.model, torch.nn.Module) else loaded.model.state_dict()
    # Class names decide what the folders of the data mean.
    named = recipes.digest({"categories": loaded.categories})
    description = {"spec": loaded.spec, "digest": recipes.digest(content), "categories": named}
    example = torch.zeros(1, preprocessing.channels, *preprocessing.size)
    run: Any = loaded.model if loaded.program is None else loaded.program
    outputs = recipes.count_outputs(run, example, logits_of(loaded, engine, move=False))
    setup.check_categories(loaded, outputs)
    return recipes.Recipe(build, known, description, preprocessing, Model(loaded.categories, outputs))


def logits_of(loaded: Loaded, engine: EngineOptions, *, move: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward pass: images [N, C, H, W] on the CPU to logits [N, classes], float32, there; `move`: on the device to use."""
    from lrpfast.screening.recipes import logits

    forward: Callable[[torch.Tensor], Any]
    if loaded.program is not None:
        program = loaded.program
        forward, like = (lambda x: program(x).output), models.like(program.exported)
    elif isinstance(loaded.model, torch.nn.Module):
        module = loaded.model.to(setup.device_of(engine)) if move else loaded.model
        forward, like = module, models.like(module)
    else:
        assert loaded.model is not None
        forward, like = loaded.model.module(), models.like(loaded.model)

    def call(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return logits(forward(images.to(like.device, like.dtype))).float().cpu()

    return call


def _build(loaded: Loaded, engine: EngineOptions) -> Any:
    from lrpfast.screening.recipes import Runnable, count_features, runnable

    if loaded.program is not None:
        recorded = loaded.program.metadata["recorded"]
        return Runnable(*setup.make_runnable(loaded, engine), count_features(loaded.program.exported.graph, recorded))
    return runnable(lambda record: setup.make_explainer(loaded, engine, record))


def _load_and_build(model: ModelOptions, engine: EngineOptions, places: list[str]) -> Any:
    """In another process: its modules are searched where this one's are."""
    sys.path += [place for place in places if place not in sys.path]
    return _build(setup.load(model), engine)


def _check_apart(data: str, output: Path) -> None:
    if os.path.isdir(data) and Path(output).resolve().is_relative_to(Path(data).resolve()):
        raise InputError(f"the output folder {output} lies in the data {data}, and would be one of its classes")


def _check_complete(folder: Path) -> None:
    from lrpfast.screening import manifest

    known = manifest.read(folder)
    there = sum(manifest.shard_path(folder, shard).exists() for shard in range(known.shards))
    if there < known.shards:
        raise ScreeningError(f"{folder} has {there} of {known.shards} shards; run the stage explain to the end first")


def _source(folder: Path) -> Any:
    """The data, for pictures; None with a warning where they are gone."""
    try:
        return screening.reopen(folder)
    except InputError as error:
        setup.warn(f"{error}; the report is written without pictures of the images")
        return None


@contextlib.contextmanager
def _classes(terminal: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many classes a stage has done, on a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("classes"), TimeRemainingColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, redirect_stdout=False) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tell_findings(found: Sequence[Any], source: Any) -> None:
    """Name the first findings; the report has all of them."""
    from lrpfast.screening.report import percent

    flagged = [finding for finding in found if finding.flagged]
    names = {entry.index: entry.name for entry in source.classes}
    classes = len({finding.label for finding in flagged})
    click.echo(f"suspicious: {count(len(flagged), 'group')} in {count(classes, 'class', 'classes')}")
    for finding in flagged[:_NAMED]:
        moved = finding.effect.moved.value
        name, images = names.get(finding.label, finding.label), count(len(finding.sample), "image")
        click.echo(
            f"  {name}: {finding.group.size} of {images}; what they have in common "
            f"moves {percent(moved)} more of other images to this class, when it is pasted, than the same place of the class's others"
        )


def _tell(summary: Any, output: Path, classes: int) -> None:
    explained = summary.samples - len(summary.skipped)
    now = summary.samples - summary.earlier
    speed = f" ({now:,} now, {now / summary.seconds:.3g} images/s)" if now else " (all by earlier runs)"
    click.echo(f"explained: {explained:,} of {count(summary.samples, 'image')}{speed}")
    if summary.skipped:
        click.echo(f"skipped: {len(summary.skipped):,}, listed in {output / 'skipped.jsonl'}")
    if summary.agreement == summary.agreement:  # there are some
        click.echo(f"prediction = label: {summary.agreement:.1%}")
        if summary.agreement < min(0.5, 2 / classes) and explained >= 100:
            setup.warn(
                "the model hardly ever predicts the label: do the classes of the data mean the model's outputs (--classes), and is the "
                "preprocessing the model's?"
            )
