"""Does the screening find planted artefacts that a model uses, and nothing else? Against simpler ways to look for them.

    python -m benchmarks.clever_hans run -o results/ [--minutes 3] [--set tuning|reported] [--offset N]   goes on where it was
    python -m benchmarks.clever_hans table results/ [--offset N]

A run draws images (`clever_hans_data`), trains a small network on them, explains its training images, and screens them with each method
in the same way: cluster each class, try the most suspicious clusters on the model, rank the classes as `lrpfast screen` does. The
methods differ in what is clustered. Two questions are kept apart: whether the artefact is in an image (known to the pixel), and
whether the model uses it, which is measured by drawing it into images of the other classes: used, where that moves at
least a tenth of them to the class.

The method's constants were chosen on the tuning set alone: other seeds, other artefacts. What is reported is
the reported set.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import lrpfast
from benchmarks import clever_hans_data as source
from benchmarks.clever_hans_data import CONTROLS, Data, Task
from lrpfast.explanation import FEATURES
from lrpfast.files import make_folder, replacing
from lrpfast.screening import discriminant, intervals
from lrpfast.screening.analysis import analyse_maps, analyse_points
from lrpfast.screening.findings import flag_distance, is_flagged, strength
from lrpfast.screening.graph import normalise_maps
from lrpfast.screening.rank import Group, class_score
from lrpfast.screening.trial import Effect, try_region

METHODS = ("lrp", "loss", "random", "features", "pixels", "gradient_x_input", "integrated_gradients")
PREVALENCES = (0.01, 0.02, 0.05, 0.1, 0.3, 0.8)
USED = 0.1  # share of other classes' images that the artefact itself must move to the class
CELLS = 16  # maps are CELLS x CELLS
_PER_CLASS = {"digits": 400, "shapes": 200}
_EPOCHS = 8
_MEMBERS, _RECIPIENTS, _CANDIDATES = 24, 192, 3


@dataclasses.dataclass(frozen=True)
class Run:
    """One network: what it learns, and the seed of everything."""

    task: str
    kind: str
    prevalence: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.kind}-{self.prevalence:g}-{self.seed}"

    @property
    def target(self) -> int:
        """The class that the artefact is planted into."""
        return (3 * self.seed + 1) % source.TASKS[self.task].classes


def runs(which: str, offset: int = 0) -> list[Run]:
    """The runs of the tuning or of the reported set, in the order in which they are done; with other seeds by an offset."""
    return [dataclasses.replace(run, seed=run.seed + offset) for run in _runs(which)]


def _runs(which: str) -> list[Run]:
    if which == "tuning":
        kinds = [(t, i, k) for t in source.TASKS for i, k in enumerate(source.TUNING)]
        return [Run(t, k, p, 100 + i) for t, i, k in kinds for p in (0.02, 0.05, 0.1, 0.3)] + [
            Run(t, "clean", 0.0, 120 + i) for i in range(10) for t in source.TASKS
        ]
    kinds = list(enumerate(source.REPORTED))
    found = []
    for task in source.TASKS:
        found += [Run(task, k, p, i) for p in (0.05, 0.1) for i, k in kinds]
        found += [Run(task, "clean", 0.0, 20 + i) for i in range(10)]
        found += [Run(task, k, p, i) for p in (0.3, 0.02) for i, k in kinds]
    found += [Run(t, k, 0.1, 40 + i) for i in range(2) for k in ("everywhere", "modes") for t in source.TASKS]
    return found + [Run(t, k, p, 50 + i) for p in (0.01, 0.8) for i, k in kinds for t in source.TASKS]


def network(task: Task) -> nn.Module:
    """A small convolutional network with batch norm, untrained."""

    def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    def pool() -> nn.Module:
        return nn.MaxPool2d(2)

    if task.name == "digits":
        layers = [*block(1, 16), pool(), *block(16, 32), pool(), *block(32, 64), pool()]
    else:
        layers = [*block(3, 16, 2), *block(16, 32, 2), *block(32, 64), pool(), *block(64, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, task.classes))


def train(task: Task, data: Data, seed: int) -> nn.Module:
    """Train on all images; the same weights for the same seed and threads."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = network(task).train().to(memory_format=torch.channels_last)
        batches = len(images) // 64
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=_EPOCHS * batches)
        for _ in range(_EPOCHS):
            for batch in torch.randperm(len(images)).split(64)[:batches]:
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimiser.step()
                schedule.step()
    return model.eval()


def measured_use(model: nn.Module, task: Task, run: Run) -> float | None:
    """Share of fresh images of other classes that the artefact itself moves to the class, over what was there before."""
    if run.kind in ("clean", "modes"):
        return None
    kind = "corner" if run.kind == "everywhere" else run.kind
    fresh = source.make(task, "clean", run.target, 0.0, 400 // task.classes, 10_000 + run.seed)
    others = fresh.images[fresh.labels != run.target]
    rng = np.random.default_rng(run.seed)
    pasted = np.stack([source.plant(image, kind, run.seed, rng)[0] for image in others]).astype(np.float32)
    with torch.no_grad():
        before, after = ((model(torch.from_numpy(x)).argmax(1) == run.target).float() for x in (others, pasted))
    return float((after - before).mean())


def pooled(values: np.ndarray) -> np.ndarray:
    """[N, H, W] averaged over blocks to [N, CELLS, CELLS]."""
    count, height, width = values.shape
    return values.reshape(count, CELLS, height // CELLS, CELLS, width // CELLS).mean((2, 4))


def explain(model: nn.Module, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """LRP's maps [N, CELLS, CELLS] of each image for its label, and the relevance of the last features [N, 64]."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    explainer = lrpfast.Explainer(model, images[:2], autotune=False, record=(FEATURES,))
    maps, inner = [], []
    for batch, label in zip(images.split(128), labels.split(128), strict=True):
        found = explainer(batch, target=label)
        maps.append(pooled(found.heatmap().numpy()))
        inner.append(found.layers[FEATURES].numpy())
    return np.concatenate(maps), np.concatenate(inner)


def attribute(model: nn.Module, data: Data, method: str) -> np.ndarray:
    """Maps [N, CELLS, CELLS] of each image for its label, by gradient_x_input or integrated_gradients (8 steps)."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    parts = []
    for batch, label in zip(images.split(128), labels.split(128), strict=True):
        if method == "gradient_x_input":
            found = (batch * _gradient(model, batch, label)).sum(1)
        else:
            steps = [(step + 0.5) / 8 for step in range(8)]
            found = (batch * sum(_gradient(model, step * batch, label) for step in steps) / 8).sum(1)
        parts.append(pooled(found.numpy()))
    return np.concatenate(parts)


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(model(images).gather(1, labels[:, None]).sum(), images)[0]


def features(model: nn.Module, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Penultimate activations [N, 64] and the loss of each image [N]."""
    images, labels = torch.from_numpy(data.images), torch.from_numpy(data.labels)
    with torch.no_grad():
        inner = torch.cat([model[:-1](batch) for batch in images.split(256)])
        loss = nn.functional.cross_entropy(model[-1](inner), labels, reduction="none")
    return inner.numpy(), loss.numpy()


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate of a class: the group, and what the trial gave."""

    group: Group
    effect: Effect


def screen_class(
    model: nn.Module,
    data: Data,
    label: int,
    points: np.ndarray,
    maps: np.ndarray | None,
    others: Tensor,
    features: np.ndarray | None = None,
) -> list[Found]:
    """Cluster the images of a class and try the most suspicious clusters.

    `points` [n, ...] are clustered, and members told by them. `maps` [n, CELLS, CELLS] say where; None: the points are the maps,
    beside which members may be told by `features` [n, C].
    """
    own = data.images[data.labels == label]
    if maps is None:
        analysis = analyse_maps(points, features=features)
    else:
        evidence = blurred_channels(points) if points.ndim == 4 else points.astype(np.float64)
        analysis = analyse_points(normalise_maps(points), evidence, discriminant.amounts(maps))
    rng = np.random.default_rng(label)
    found = []
    for group in analysis.groups[:_CANDIDATES]:
        members, rest = np.flatnonzero(group.members), np.flatnonzero(~group.members)
        members = members[np.argsort(-group.score[members])][:_MEMBERS]
        rest = rng.permutation(rest)[:_RECIPIENTS]
        chosen = torch.from_numpy(own[members]), torch.from_numpy(own[rest])
        found.append(Found(group, try_region(model, group.region, label, *chosen, others)))
    return found


def blurred_channels(images: np.ndarray) -> np.ndarray:
    """[n, C, CELLS, CELLS] as what a discriminant tells members by, as maps are."""
    return np.concatenate([discriminant.blurred(images[:, channel]) for channel in range(images.shape[1])], axis=1)


def wanted(run: Run) -> tuple[str, ...]:
    """The methods of a run. Where nothing is planted for a method to find, the question is what the screening flags."""
    return METHODS if run.kind in source.REPORTED and 0.02 <= run.prevalence <= 0.3 else METHODS[:1]


def do(run: Run, folder: Path, methods: tuple[str, ...]) -> dict[str, Any]:
    """Train, and screen with each method that has no result yet; the model and each result are kept as soon as they are there."""
    task = source.TASKS[run.task]
    data = source.make(task, run.kind, run.target, run.prevalence, _PER_CLASS[run.task], run.seed)
    path, weights = folder / f"{run.name}.json", folder / "models" / f"{run.name}.pt"
    model = network(task)
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        model.eval().to(memory_format=torch.channels_last)
    else:
        model = train(task, data, run.seed)
        with replacing(weights) as temporary:
            torch.save(model.state_dict(), temporary)
    with torch.no_grad():
        predicted = torch.cat([model(x).argmax(1) for x in torch.from_numpy(data.images).split(256)]).numpy()
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
    else:
        result = {**dataclasses.asdict(run), "target": run.target, "use": measured_use(model, task, run), "methods": {}}
        result["accuracy"] = float((predicted == data.labels).mean())
    for method in methods:
        if method not in result["methods"]:
            began = time.perf_counter()
            found = _one_method(run, model, data, predicted, method)
            result["methods"][method] = {**found, "seconds": round(time.perf_counter() - began, 1)}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(result, indent=1))
    return result


def _one_method(run: Run, model: nn.Module, data: Data, predicted: np.ndarray, method: str) -> dict[str, object]:
    if method in ("loss", "random"):
        return _simple(method, run, data, features(model, data)[1])
    if method in ("pixels", "features"):
        channels = data.images.shape[1]
        small = np.stack([pooled(data.images[:, c]) for c in range(channels)], axis=1)
        maps = _deviation(small, data.labels)
        points = small if method == "pixels" else features(model, data)[0]
        return _score(run, data, _screen(model, source.TASKS[run.task], data, predicted, points, maps))
    points, inner = explain(model, data) if method == "lrp" else (attribute(model, data, method), None)
    return _score(run, data, _screen(model, source.TASKS[run.task], data, predicted, points, None, inner))


def _deviation(pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N, CELLS, CELLS]: how far each cell lies from the mean of its class; where an image is special."""
    out = np.empty((len(pixels), CELLS, CELLS))
    for label in np.unique(labels):
        own = pixels[labels == label]
        out[labels == label] = np.abs(own - own.mean(0)).max(1)
    return out


def _screen(
    model: nn.Module,
    task: Task,
    data: Data,
    predicted: np.ndarray,
    points: np.ndarray,
    maps: np.ndarray | None,
    inner: np.ndarray | None = None,
) -> dict[int, list[Found]]:
    rng = np.random.default_rng(0)
    found = {}
    for label in range(task.classes):
        others = np.flatnonzero((data.labels != label) & (predicted != label))
        recipients = torch.from_numpy(data.images[rng.permutation(others)[:_RECIPIENTS]])
        own = data.labels == label
        where, told = (None if values is None else values[own] for values in (maps, inner))
        found[label] = screen_class(model, data, label, points[own], where, recipients, told)
    return found


def _score(run: Run, data: Data, found: dict[int, list[Found]]) -> dict[str, object]:
    """What the table needs, of one method in one run."""
    limit = flag_distance([max(one.group.distance for one in own) for own in found.values() if own])
    best = {
        label: max((strength(one.group.distance, one.effect, limit) for one in own), default=(False, -1.0))
        for label, own in found.items()
    }
    order = sorted(best, key=lambda label: best[label], reverse=True)
    out: dict[str, object] = {
        "limit": limit,
        "flagged": [label for label in order if best[label][0]],
        "candidates": {label: [_candidate(one, limit) for one in own] for label, own in found.items()},
    }
    if run.kind not in ("clean", "modes", "everywhere"):
        planted = data.planted[data.labels == run.target]
        own = found[run.target]
        score = class_score([one.group for one in own]) if own else np.zeros(len(planted))
        out |= _image_scores(planted, score)
        out["rank"] = order.index(run.target) + 1 if own else len(order)
        out["f1"] = max((_f1(planted, one.group.members) for one in own), default=0.0)
    return out


def _candidate(one: Found, limit: float) -> dict[str, float]:
    return {
        "size": one.group.size,
        "cells": int(one.group.region.sum()),
        "suspicion": one.group.suspicion,
        "distance": one.group.distance,
        "moved": one.effect.moved.value,
        "moved_low": one.effect.moved.low,
        "control": one.effect.control.value,
        "occlusion_low": one.effect.occlusion.low,
        "flagged": is_flagged(one.group.distance, one.effect, limit),
    }


def _simple(method: str, run: Run, data: Data, loss: np.ndarray) -> dict[str, object]:
    """Ranking by loss, and at random: an image with an artefact in use is classified easily, so a low loss is suspicious."""
    rng = np.random.default_rng(run.seed)
    score = -loss if method == "loss" else rng.random(len(loss))
    means = {int(label): float(score[data.labels == label].mean()) for label in np.unique(data.labels)}
    order = sorted(means, key=lambda label: -means[label])
    out: dict[str, object] = {}
    if run.kind not in ("clean", "modes", "everywhere"):
        own = data.labels == run.target
        out |= _image_scores(data.planted[own], score[own])
        out["rank"] = order.index(run.target) + 1
    return out


def _image_scores(planted: np.ndarray, score: np.ndarray) -> dict[str, object]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    return {"auroc": float(roc_auc_score(planted, score)), "ap": float(average_precision_score(planted, score))}


def _f1(truth: np.ndarray, members: np.ndarray) -> float:
    both = int((truth & members).sum())
    return 2 * both / (int(truth.sum()) + int(members.sum()))


@click.group()
def main() -> None:
    """Measure the detection of planted artefacts."""


@main.command("run")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--set", "which", type=click.Choice(["tuning", "reported"]), default="reported", show_default=True)
@click.option(
    "--offset", default=0, show_default=True, help="Added to all seeds: runs that nobody has looked at before."
)
@click.option("--minutes", type=float, default=1e9, help="Begin no run after this.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="These alone; default: all.")
@click.option("--task", "tasks", multiple=True, type=click.Choice([*source.TASKS]), help="These alone; default: both.")
@click.option("--threads", type=int, default=1, show_default=True)
def run_command(
    output: Path,
    which: str,
    offset: int,
    minutes: float,
    methods: tuple[str, ...],
    tasks: tuple[str, ...],
    threads: int,
) -> None:
    """Do the runs that have no result yet; each run is one file."""
    torch.set_num_threads(threads)
    make_folder(output / "models")
    began = time.perf_counter()
    for run in runs(which, offset):
        path, own = output / f"{run.name}.json", [m for m in wanted(run) if not methods or m in methods]
        have = json.loads(path.read_text())["methods"] if path.exists() else ()
        if all(method in have for method in own) or (tasks and run.task not in tasks):
            continue
        if time.perf_counter() - began > 60 * minutes:
            break
        result = do(run, output, tuple(own))
        lrp = result["methods"].get("lrp", {})
        click.echo(
            f"{run.name}: accuracy {result['accuracy']:.2f}, use {result['use']}, LRP: "
            f"{ {k: lrp.get(k) for k in ('auroc', 'rank', 'f1', 'flagged')} }"
        )


@main.command("table")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--offset", default=0, show_default=True, help="As it was given to run.")
def table_command(folder: Path, offset: int) -> None:
    """Print what the runs in a folder found, as Markdown."""
    names = {run.name for run in runs("reported", offset)}
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if path.stem in names]
    for line in summary(results):
        click.echo(line)


def summary(results: list[dict[str, Any]]) -> list[str]:
    """The tables, from the results of runs."""
    planted = [r for r in results if r["kind"] in source.REPORTED and 0.02 <= r["prevalence"] <= 0.3]
    used = [r for r in planted if r["use"] >= USED]
    lines = [
        f"{len(planted)} runs with an artefact in 2 to 30% of a class; the model uses it in {len(used)} of them.",
        "",
        "| method | runs | AUROC, median | AUROC ≥ 0.95 | AP, median | first in the class ranking | flagged | F1, median |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method in METHODS:
        own = [(r, r["methods"][method]) for r in used if method in r["methods"]]
        if not own:
            continue
        auroc, ap = ([m[key] for _, m in own] for key in ("auroc", "ap"))
        f1 = [m["f1"] for _, m in own if "f1" in m]
        first = intervals.rate(sum(m["rank"] == 1 for _, m in own), len(own))
        flagged = sum(r["target"] in m["flagged"] for r, m in own) if "flagged" in own[0][1] else None
        lines.append(
            f"| {method} | {len(own)} | {np.median(auroc):.3f} | {sum(a >= 0.95 for a in auroc)} | {np.median(ap):.2f} | "
            f"{round(first.value * len(own))} ({first.low:.0%} to {first.high:.0%}) | {'–' if flagged is None else flagged} | "
            f"{f'{np.median(f1):.2f}' if f1 else '–'} |"
        )
    lines += [
        "",
        "| run | use | AUROC | AP | rank | F1 | flagged |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in sorted(
        (r for r in results if r["kind"] in source.REPORTED), key=lambda r: (r["task"], r["kind"], r["prevalence"])
    ):
        m = r["methods"].get("lrp")
        if m:
            lines.append(
                f"| {r['task']}, {r['kind']}, {r['prevalence']:.0%} | {r['use']:.2f} | {m['auroc']:.3f} | {m['ap']:.2f} | {m['rank']} | "
                f"{m['f1']:.2f} | {'yes' if r['target'] in m['flagged'] else 'no'}"
                f"{', and others' if set(m['flagged']) - {r['target']} else ''} |"
            )
    lines.append("")
    for kind in CONTROLS:
        own = [r for r in results if r["kind"] == kind and "lrp" in r["methods"]]
        hits = sum(bool(r["methods"]["lrp"]["flagged"]) for r in own)
        told = intervals.rate(hits, len(own))
        lines.append(f"{kind}: something flagged in {hits} of {len(own)} runs ({told.low:.0%} to {told.high:.0%}).")
    wins = [
        f"{r['task']}, {r['kind']}, {r['prevalence']:.0%}: {method} {m['auroc']:.3f} against {r['methods']['lrp']['auroc']:.3f}"
        for r in used
        for method, m in r["methods"].items()
        if method != "lrp" and m["auroc"] > r["methods"]["lrp"]["auroc"] + 0.01
    ]
    return [*lines, "", "A baseline has the higher AUROC in: " + ("; ".join(wins) or "none") + "."]


if __name__ == "__main__":
    main()
