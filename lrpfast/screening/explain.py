"""The first stage: every sample of a source explained once, its pooled map kept in a shard.

What is here is the order of things that makes it safe to kill: the folder is locked, the list of samples is written, then the manifest,
which is the beginning; then shards, each whole. What is done is found by looking at what is there, so there is no record that could be
wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path

from lrpfast.errors import InputError, LrpfastError, ScreeningError
from lrpfast.screening import engines, manifest, shards
from lrpfast.screening.engines import Work
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.pooled import Pooling
from lrpfast.screening.progress import Explained
from lrpfast.screening.recipes import Recipe
from lrpfast.screening.schema import Skipped
from lrpfast.screening.sources import DatasetSource, Source, save_listing

TARGETS = ("label", "prediction")
_TOLD = 10  # skipped images named on the terminal in a run


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a screening's first stage did.

    Attributes
    ----------
    samples
        How many samples the source has.
    skipped
        Those that could not be explained.
    earlier
        How many samples earlier runs had done.
    seconds
        What this run took, without compiling.
    agreement
        The share of explained samples with a label whose prediction it is; NaN where none has one.
    """

    samples: int
    skipped: tuple[Skipped, ...]
    earlier: int
    seconds: float
    agreement: float


def explain_dataset(
    recipe: Recipe,
    source: Source,
    folder: str | os.PathLike[str],
    *,
    target: str = "label",
    seed: str = "logit",
    pool: int = 28,
    batch_size: int = 16,
    shard_size: int = 1000,
    workers: int | None = None,
    engine: str = "local",
    progress: Callable[[int, int], Explained] = Explained,
) -> Summary:
    """Explain all samples of a source, or those that an earlier call left.

    Parameters
    ----------
    recipe
        What explains; `lrpfast.screening.recipe(model, preprocessing)` makes one of a module.
    source
        The samples; see `open_source`.
    folder
        Where shards and manifest go; made where it is absent.
    target
        The class explained: "label", a sample's own; "prediction", the arg max.
    seed
        The relevance at the output: "logit" or "one".
    pool
        Maps are averaged over at most `pool` x `pool` cells; a smaller input keeps its size.
    batch_size
        Samples explained at once.
    shard_size
        Samples a file.
    workers
        local: processes that decode; ray: replicas that explain. None: as fits the machine.
    engine
        "local" or "ray".
    progress
        Makes what tells of progress, from the number of samples and of those already done.

    Raises
    ------
    ScreeningError
        The folder is in use, or holds a screening with other settings.
    OutputError
        A file cannot be written. What was written before is complete.
    InputError
        No sample can be read, or the data are gone.
    LrpfastError
        The model cannot be explained.
    """
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if min(pool, batch_size, shard_size) < 1:
        raise InputError("pool, batch_size and shard_size must be at least 1")
    folder = Path(folder)
    shape = input_shape(source, recipe)
    asked = _asked(recipe, source, shape, target, seed, pool, shard_size)
    with manifest.locked(folder):
        if not (folder / manifest.NAME).exists():
            save_listing(source, folder)
        manifest.begin(folder, asked)
        return _explain(recipe, source, folder, asked, shape, Pooling(target, seed, asked.height, asked.width),
                        batch_size, workers, engine, progress)  # fmt: skip


def check_same(
    recipe: Recipe,
    source: Source,
    folder: str | os.PathLike[str],
    *,
    target: str = "label",
    seed: str = "logit",
    pool: int = 28,
    shard_size: int = 1000,
) -> None:
    """Find that `explain_dataset`, with the same arguments, would go on with what `folder` holds: for the stages after it.

    Raises
    ------
    ScreeningError
        It holds no screening, or another one; the message says what differs.
    InputError
        No sample can be read.
    """
    manifest.check(folder, _asked(recipe, source, input_shape(source, recipe), target, seed, pool, shard_size))


def _asked(
    recipe: Recipe, source: Source, shape: tuple[int, ...], target: str, seed: str, pool: int, shard_size: int
) -> Manifest:
    return Manifest(
        settings={"data": source.spec, "target": target, "seed": seed, **recipe.settings},
        model={
            **recipe.description,
            "outputs": recipe.model.outputs,
            "preprocessing": recipe.preprocessing.to_dict(),
        },
        classes=tuple(source.classes),
        height=min(pool, shape[1]),
        width=min(pool, shape[2]),
        samples=len(source),
        shard_size=shard_size,
        listing=source.digest(),
    )


def _explain(
    recipe: Recipe,
    source: Source,
    folder: Path,
    plan: Manifest,
    shape: tuple[int, ...],
    pooling: Pooling,
    batch_size: int,
    workers: int | None,
    engine: str,
    progress: Callable[[int, int], Explained],
) -> Summary:
    warnings: list[str] = []
    done = shards.finished(folder, plan, warnings.append)
    earlier = sum(len(plan.positions(shard)) for shard in done)
    pending = [plan.positions(shard) for shard in range(plan.shards) if shard not in done]
    told = 0
    began = time.perf_counter()
    with progress(plan.samples, earlier) as bar:
        for warning in warnings:
            bar.warn(warning)
        if pending:
            collector = shards.Collector(plan)
            work = Work(source, shape, recipe.build, pooling, pending, batch_size, workers)
            with engines.telling_of_lost_workers(), contextlib.closing(engines.run(engine, work)) as parts:
                next(parts)
                bar.begin()
                began = time.perf_counter()
                for part in parts:
                    bar.advance(len(part.rows["sample"]), part.waited)
                    for shard, rows in collector.add(part.rows):
                        if any(rows["reason"]):
                            source.check()  # a disk that is gone is no thousand of damaged images
                        done[shard] = shards.write(folder, plan, shard, rows)
                        for entry in done[shard].skipped[: max(0, _TOLD - told)]:
                            bar.warn(f"skipped: {entry.reason}")
                        told += len(done[shard].skipped)
    seconds = time.perf_counter() - began
    if len(done) < plan.shards:
        raise ScreeningError(f"{plan.shards - len(done)} shards are missing in {folder}; start again to go on")
    skipped = shards.write_skipped(folder, done)
    if len(skipped) == plan.samples:
        raise InputError(f"none of the {plan.samples} samples can be explained; the first: {skipped[0].reason}")
    return Summary(plan.samples, tuple(skipped), earlier, seconds, shards.agreement(folder, plan))


def input_shape(source: Source, recipe: Recipe) -> tuple[int, ...]:
    """The shape [C, H, W] of the samples: that of the preprocessing, or, of a Dataset's tensors, that of the first one.

    Raises `InputError` where the first samples of a Dataset cannot be read.
    """
    if not isinstance(source, DatasetSource):
        return (recipe.preprocessing.channels, *recipe.preprocessing.size)
    for index in range(min(100, len(source))):
        try:
            return tuple(source.tensor(index).shape)
        except LrpfastError as error:
            first = error
    raise InputError(f"none of the first samples of {source.spec} can be read: {first}")
