"""A dataset of noise, a network for it, and commands that screen it: what the tests of screening share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn

from lrpfast.images import Preprocessing
from lrpfast.screening.recipes import Recipe, recipe
from lrpfast.screening.schema import from_half

ROOT = Path(__file__).parent.parent
SIZE = 16
CLASSES = ("cat", "dog", "ox")
PREPROCESSING = Preprocessing(size=(SIZE, SIZE), resize=(SIZE, SIZE))
MODULE = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 8 * 8, 3)
    )
"""


def make() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 8 * 8, 3)
        ).eval()


def a_recipe(model: nn.Module | None = None, **options) -> Recipe:
    return recipe(make() if model is None else model, PREPROCESSING, **options)


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pictures(root: Path, count: int) -> Path:
    """Write `count` images a class, 00.png and so on."""
    for number, name in enumerate(CLASSES):
        for index in range(count):
            picture(root / name / f"{index:02d}.png", 100 * number + index)
    return root


def rows(folder: Path) -> dict[str, np.ndarray]:
    """All rows of a screening, by the order of its shards, and `relevance`, the maps as they were."""
    found = pq.read_table(sorted((folder / "shards").glob("*.parquet")))
    lists = ("map", "features", "top5_class", "top5_logit")
    columns = {name: found[name].to_numpy() for name in found.column_names if name not in lists}
    for name in lists:
        columns[name] = np.stack(found[name].to_numpy()) if found.num_rows else np.empty((0, 1))
    columns["relevance"] = from_half(columns["map"], columns["scale"])
    return columns


def assert_same(one: Path, other: Path) -> None:
    """Two screenings hold the same, bit for bit."""
    first, second = rows(one), rows(other)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    assert (one / "skipped.jsonl").read_text() == (other / "skipped.jsonl").read_text()


def command(data: Path | str, output: Path | str, *more: object) -> list[str]:
    words = (
        "screen",
        "--model",
        "nets:make",
        "--size",
        SIZE,
        "--data",
        data,
        "-o",
        output,
        "--stage",
        "explain",
        *more,
    )
    return [sys.executable, "-m", "lrpfast", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    """Start a command in a folder, where it finds the network as nets:make."""
    (folder / "nets.py").write_text(MODULE)
    return subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
