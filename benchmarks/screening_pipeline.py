"""What the pipeline of a screening costs over the explaining alone: `python -m benchmarks.screening_pipeline`.

The pipeline is all of `lrpfast screen --stage explain` but the decoding, which has its own limit: processes hand over batches of ready
tensors; maps are pooled, scaled, gathered and written to shards that are brought to the disk. Explaining alone is the same explainer in a
loop over the same batches in memory. Both are done in turns, in one process, on networks of `tests/networks.py`, for all images and for
a quarter of them: the figure is the ratio of the medians of what more images take more, and what a pipeline takes to begin is said
beside it. (A process that has just forked copies each page of memory that it writes to, once: so the first batch after the decoding
processes have started takes a second or two more, however many follow.) Where the machine is not idle the ratio of the processors'
time, decoding processes included, says more. `--files` measures the pipeline on JPEG files as well, and says what share of the time it
waited for them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import machine, peers
from lrpfast.images import Preprocessing
from lrpfast.screening import explain_dataset, open_source, recipe
from lrpfast.screening.recipes import Recipe
from lrpfast.screening.sources import DatasetSource, Source


class Quiet:
    """Progress that is not told, and what it was told of waiting."""

    waited = 0.0

    def __init__(self, total: int, done: int) -> None:
        Quiet.waited = 0.0

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        """Nothing to start."""

    def warn(self, message: str) -> None:
        """Show what should not be."""
        print(message)

    def advance(self, images: int, waited: float | None) -> None:
        """Add up the seconds that the explaining waited."""
        Quiet.waited += waited or 0.0


def built_once(made: Recipe) -> Recipe:
    """The recipe of what is built already: compiling is not measured."""
    runnable = made.build()
    return dataclasses.replace(made, build=lambda: runnable)


def pipeline(made: Recipe, source: Source, workers: int, batch: int) -> float:
    """Seconds of a whole screening's first stage."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"batch_size": batch, "workers": workers, "shard_size": 64, "progress": Quiet}
        return explain_dataset(made, source, folder, **options).seconds


def alone(made: Recipe, inputs: torch.Tensor, labels: torch.Tensor, batch: int) -> float:
    """Seconds of the explaining alone."""
    explain = made.build().explain
    began = time.perf_counter()
    for start in range(0, len(inputs), batch):
        explain(inputs[start : start + batch], target=labels[start : start + batch])
    return time.perf_counter() - began


@contextlib.contextmanager
def files(count: int) -> Iterator[Path]:
    """A folder of JPEG files of ImageNet's usual size, 500 x 375, smooth enough to be as large as photographs (some 100 kB)."""
    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        for index in range(count):
            folder = Path(name, f"class-{index % 2}")
            folder.mkdir(exist_ok=True)
            coarse = rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(
                folder / f"{index:04d}.jpg", quality=90
            )
        yield Path(name)


def processors() -> float:
    """Seconds that processors have spent on this process and on its children that have ended."""
    return sum(os.times()[:4])


def measure(name: str, count: int, batch: int, rounds: int, workers: int, with_files: bool) -> dict[str, Any]:
    """Times of one network."""
    work = peers.workload(name, 8)
    preprocessing = Preprocessing()
    made = built_once(recipe(work.model, preprocessing))
    inputs = work.inputs.repeat(-(-count // 8), 1, 1, 1)[:count]
    labels = work.targets.repeat(-(-count // 8))[:count]
    few = count // 4 // batch * batch
    samples = list(zip(inputs, labels.tolist(), strict=True))
    sources = {size: DatasetSource("memory", samples[:size], preprocessing, made.model) for size in (few, count)}
    alone(made, inputs[: 2 * batch], labels, batch)
    seconds: dict[str, list[tuple[float, float]]] = {"alone": [], "pipeline": []}  # of few images, and of all
    spent: dict[str, list[float]] = {"alone": [], "pipeline": []}  # by processors, on those between
    waited = []
    for turn in range(rounds):
        for what in ("alone", "pipeline") if turn % 2 else ("pipeline", "alone"):
            times, by_processors = [], []
            for size, source in sources.items():
                before = processors()
                if what == "alone":
                    times.append(alone(made, inputs[:size], labels, batch))
                else:
                    times.append(pipeline(made, source, workers, batch))
                by_processors.append(processors() - before)
            seconds[what].append((times[0], times[1]))
            spent[what].append(by_processors[1] - by_processors[0])
            if what == "pipeline":
                waited.append(Quiet.waited / times[1])
    more = {what: statistics.median(whole - some for some, whole in values) for what, values in seconds.items()}
    whole = {what: statistics.median(time_of_all for _, time_of_all in values) for what, values in seconds.items()}
    began = statistics.median(some - few / (count - few) * more["pipeline"] for some, _ in seconds["pipeline"])
    found: dict[str, Any] = {
        "model": name,
        "images": count,
        "batch": batch,
        "workers": workers,
        "images/s alone": (count - few) / more["alone"],
        "images/s pipeline": (count - few) / more["pipeline"],
        "overhead": more["pipeline"] / more["alone"] - 1,
        "overhead with the beginning": whole["pipeline"] / whole["alone"] - 1,
        "overhead of processors": statistics.median(spent["pipeline"]) / statistics.median(spent["alone"]) - 1,
        "seconds to begin": began,
        "waited": statistics.median(waited),
        "seconds": seconds,
    }
    if with_files:
        with files(count) as folder:
            taken = pipeline(
                dataclasses.replace(made, model=dataclasses.replace(made.model, categories=(), outputs=None)),
                open_source(folder, preprocessing),
                workers,
                batch,
            )
            found |= {"images/s files": count / taken, "waited files": Quiet.waited / taken}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", action="store_true", help="also from JPEG files")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.images < 4 * given.batch:
        parser.error("--images must be four batches at least")
    results = []
    for name in given.models:
        found = measure(name, given.images, given.batch, given.rounds, given.workers, given.files)
        results.append(found)
        line = (
            f"{name}: alone {found['images/s alone']:.2f} images/s, pipeline {found['images/s pipeline']:.2f}: "
            f"{found['overhead']:+.1%} ({found['overhead of processors']:+.1%} of the processors' time), "
            f"{found['seconds to begin']:.1f} s to begin ({found['overhead with the beginning']:+.1%} with it), "
            f"waiting {found['waited']:.1%} of the time"
        )
        if given.files:
            line += f"; from files {found['images/s files']:.2f}, waiting {found['waited files']:.1%}"
        print(line, flush=True)
    if given.json:
        said = {"machine": machine.describe(torch.get_num_threads()), "results": results}
        given.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
