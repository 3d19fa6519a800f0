"""How long the analysis of a screening takes, and how much memory: one class, a large class, and a whole dataset.

    python -m benchmarks.screening_scale one  [--samples 1300]     seconds of one class, without its picture
    python -m benchmarks.screening_scale one  --samples 50000      the same, and the peak memory of the process
    python -m benchmarks.screening_scale one  --features 2048      with the relevance of as many features beside the maps
    python -m benchmarks.screening_scale all -o FOLDER [--classes 1000] [--minutes 3]     from shards to the analysis of all classes
    python -m benchmarks.screening_scale imagenet --explain 2.9 --pooled 0.05 ...          a calculation from measured rates

Maps are synthetic, 28 x 28: objects at some places, noise, and in every tenth class a tag. Classes are spread over all shards, which is the
hard case. `all` can be stopped and started again, as a screening can; it says what each start did, and its time is the sum.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import threading
import time
from pathlib import Path

import click
import numpy as np

from benchmarks import machine
from lrpfast.files import make_folder, replacing
from lrpfast.screening import manifest as manifests
from lrpfast.screening import schema, shards
from lrpfast.screening.analysis import analyse, analyse_maps
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.schema import ClassInfo
from lrpfast.screening.store import Store

SIDE, PER_CLASS, SHARD = 28, 1280, 1000


def maps_of(label: int, samples: int, seed: int = 0) -> np.ndarray:
    """Maps [n, SIDE, SIDE] float32 of a class."""
    rng = np.random.default_rng([seed, label])
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    centre = rng.normal(SIDE / 2, 3, (samples, 2, 1, 1)).astype(np.float32)
    width = rng.uniform(2, 5, (samples, 1, 1)).astype(np.float32)
    maps = np.exp(-((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) / width**2)
    maps += rng.normal(0, 0.1, maps.shape).astype(np.float32)
    if label % 10 == 0:
        maps[: samples // 20, 1:4, 1:4] += 3
    return maps.astype(np.float32)


def features_of(label: int, samples: int, count: int) -> np.ndarray:
    """Relevance of features [n, count] float32 of a class: of each some samples have it, of a few of them most."""
    rng = np.random.default_rng([1, label])
    return (np.maximum(rng.normal(size=(samples, count)), 0) * rng.lognormal(0, 1.5, count)).astype(np.float32)


def write_shards(folder: Path, classes: int, features: int) -> None:
    """Write the shards of a screening of `classes` x PER_CLASS samples, class after class in turn; those there are kept."""
    samples = classes * PER_CLASS
    infos = tuple(ClassInfo(label, f"class {label}") for label in range(classes))
    known = Manifest({"data": "synthetic", "target": "label"}, {"spec": "none"}, infos, SIDE, SIDE, samples, SHARD, "0")
    manifests.begin(make_folder(folder), known)
    # A shard takes 1000 following samples, sample i being of class i % classes: drawn by class, kept as float16.
    half = np.lib.format.open_memmap(folder / "drawn.npy", "w+", np.float16, (samples, SIDE, SIDE))
    inner = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float16, (samples, features))
    scale, inner_scale = np.empty((2, samples), dtype=np.float32)
    for label in range(classes):
        half[label::classes], scale[label::classes] = schema.to_half(maps_of(label, PER_CLASS))
        own = slice(label, None, classes)
        inner[own], inner_scale[own] = schema.to_half(features_of(label, PER_CLASS, features))
    for shard in range(known.shards):
        own = np.array(known.positions(shard))
        label = (own % classes).astype(np.int32)
        count = len(own)
        rows = {
            "sample": own,
            "path": [f"/data/images/class-{i % classes:04d}/{i:08d}.jpeg" for i in own.tolist()],
            "label": label,
            "target": label,
            "prediction": label,
            "top5_class": np.repeat(label[:, None], 5, 1),
            "top5_logit": np.ones((count, 5), dtype=np.float32),
            "target_logit": np.ones(count, dtype=np.float32),
            "map": half[own],
            "scale": scale[own],
            "features": np.asarray(inner[own]),
            "features_scale": inner_scale[own],
            "conservation": np.ones(count, dtype=np.float32),
            "reason": [""] * count,
        }
        shards.write(folder, known, shard, rows)
    del half, inner
    for drawn in ("drawn.npy", "features.npy"):
        (folder / drawn).unlink()


class Peak:
    """Largest memory of this process and its children together, in bytes: proportional set size, sampled ten times a second."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.bytes = max(self.bytes, sum(map(_memory, _family(os.getpid()))))


def _family(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return []
    return [process, *(one for child in children for one in _family(int(child)))]


def _memory(process: int) -> int:
    """What the process holds, shared pages divided among their holders."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


@click.group()
def main() -> None:
    """Measure the analysis of a screening."""


@main.command()
@click.option("--samples", default=1300, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--features", default=0, show_default=True)
def one(samples: int, rounds: int, features: int) -> None:
    """One class: median seconds, and the peak memory."""
    maps, inner = maps_of(0, samples), features_of(0, samples, features)
    analyse_maps(maps[:100])  # what is loaded on first use
    seconds = []
    with Peak() as peak:
        for _ in range(rounds):
            began = time.perf_counter()
            analyse_maps(maps, features=inner)
            seconds.append(time.perf_counter() - began)
    click.echo(f"{machine.line(machine.describe(os.cpu_count() or 1))}; load {os.getloadavg()[0]:.1f}")
    click.echo(
        f"{samples} maps with {features} features: {np.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
        f"peak memory {peak.bytes / 2**30:.2f} GiB"
    )


@main.command("all")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--classes", default=1000, show_default=True)
@click.option("--features", default=0, show_default=True)
@click.option("--processes", default=2, show_default=True)
@click.option("--minutes", type=float, default=1e9, help="Stop after this; start again to go on.")
def all_classes(output: Path, classes: int, features: int, processes: int, minutes: float) -> None:
    """All classes: write the shards where they are not there, then sort them by class and analyse."""
    if not (output / "written").exists():
        write_shards(output, classes, features)
        (output / "written").touch()
        click.echo("the shards are written; start again to measure")
        return
    log = output / "seconds.json"
    spent = json.loads(log.read_text()) if log.exists() else {"sort": 0.0, "analyse": 0.0, "cpu": 0.0, "peak": 0}
    with Peak() as peak:
        began = time.perf_counter()
        store = Store(output)
        sorted_at = time.perf_counter()
        done = (0, len(store.labels()))

        def tell(*now: int) -> None:
            nonlocal done
            done = now
            if time.perf_counter() - began > 60 * minutes:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            analyse(output, processes=processes, progress=tell)
    spent["sort"] += sorted_at - began
    spent["analyse"] += time.perf_counter() - sorted_at
    # On a machine that is busy with other things the processor time is the honest number.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent["cpu"] += sum(one.ru_utime + one.ru_stime for one in used)
    spent["peak"] = max(spent["peak"], peak.bytes)
    with replacing(log) as temporary:
        temporary.write_text(json.dumps(spent))
    click.echo(
        f"{done[0]} of {done[1]} classes, {len(store):,} maps; load {os.getloadavg()[0]:.1f}; sorting {spent['sort']:.0f} s, "
        f"analysis {spent['analyse']:.0f} s, processor time {spent['cpu']:.0f} s, peak memory {spent['peak'] / 2**30:.2f} GiB"
    )


@main.command()
@click.option("--explain", "explained", type=float, required=True, help="Images a second explained, measured.")
@click.option("--decode", type=float, required=True, help="Images a second decoded by one core, measured.")
@click.option("--cores", default=16, show_default=True, help="That decode for one device.")
@click.option(
    "--analyse", "analysis", type=float, required=True, help="Seconds of the analysis of all classes, measured."
)
@click.option("--forward", type=float, required=True, help="Forward passes a second, measured.")
@click.option("--images", default=1_281_167, show_default=True)
@click.option("--classes", default=1000, show_default=True)
def imagenet(
    explained: float, decode: float, cores: int, analysis: float, forward: float, images: int, classes: int
) -> None:
    """Calculate a screening of the whole ImageNet training set, on one device and on eight, from rates measured elsewhere."""
    # Of each class three groups: 24 members covered at six places, pasting twice into 192 images.
    tried = classes * 3 * (24 * 6 + 2 * 192)
    for devices in (1, 8):
        rate = min(explained * devices, decode * cores * devices)
        explain_seconds, verify_seconds = images / rate, tried / (forward * devices)
        limit = "explaining" if explained < decode * cores else "decoding"
        total = explain_seconds + analysis + verify_seconds
        click.echo(
            f"{devices} device(s), {cores} cores each: explaining {explain_seconds / 60:.1f} min (limited by {limit}), "
            f"analysis {analysis / 60:.1f} min, verification {verify_seconds / 60:.1f} min; together {total / 60:.1f} min"
        )


if __name__ == "__main__":
    main()
