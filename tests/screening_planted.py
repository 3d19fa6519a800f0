"""A finished screening with a planted tag, made without a network's training: what the tests of its later stages share.

Two classes of images 32 x 32, bright on the left and bright on the right. A "model" adds up the two halves, and takes a bright
tag in the upper left corner for class 1. Maps are what an exact explanation would give, with noise: relevance where the object is,
and, in the tagged images of class 1, mostly on the tag. Some images of class 0 have relevance in a feature that no other has; their
maps look like all others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lrpfast.images import Preprocessing
from lrpfast.screening import manifest as manifests
from lrpfast.screening import schema, shards
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.schema import ClassInfo, Record
from lrpfast.screening.sources import Source

SIDE, CELLS = 32, 16
TAG = (slice(2, 6), slice(2, 6))
PREPROCESSING = Preprocessing(size=(SIDE, SIDE), resize=(SIDE, SIDE), mean=(0.0,), std=(1.0,))
NAMES = ("left & first", "<b>right</b>")


class Planted(Source):
    """`count` images a class, in turn; the first `tagged` of class 1 have the tag."""

    def __init__(self, count: int = 60, tagged: int = 8, root: str = "/data") -> None:
        super().__init__("planted", PREPROCESSING, tuple(ClassInfo(i, name) for i, name in enumerate(NAMES)))
        self.count, self.tagged, self.root = count, tagged, root
        self.gone: set[int] = set()

    def __len__(self) -> int:
        return 2 * self.count

    def check(self) -> None:
        pass

    def label(self, index: int) -> int:
        return index % 2

    def is_tagged(self, index: int) -> bool:
        return self.label(index) == 1 and index // 2 < self.tagged

    def record(self, index: int) -> Record:
        return Record(f"{self.root}/{index:03d} <i>'&\".png", self.label(index))

    def _read(self, index: int) -> Tensor:
        from lrpfast.errors import InputError

        if index in self.gone:
            raise InputError(f"sample {index} does not exist")
        rng = np.random.default_rng(index)
        image = rng.uniform(0, 0.1, (1, SIDE, SIDE))
        half = slice(0, SIDE // 2) if self.label(index) == 0 else slice(SIDE // 2, SIDE)
        top = int(rng.integers(8, 16))
        image[0, top : top + 10, half] += rng.uniform(0.3, 0.6)
        if self.is_tagged(index):
            image[(0, *TAG)] = 1.0
        return torch.from_numpy(image.astype(np.float32))


def model(images: Tensor) -> Tensor:
    """Logits [N, 2]."""
    left, right = images[..., : SIDE // 2].mean((1, 2, 3)), images[..., SIDE // 2 :].mean((1, 2, 3))
    tag = images[(slice(None), 0, *TAG)].mean((1, 2)).sub(0.8).clamp(min=0)
    return torch.stack([20 * left, 20 * right + 100 * tag], dim=1)


def heatmaps(source: Planted) -> np.ndarray:
    """[N, CELLS, CELLS] float32."""
    maps = np.empty((len(source), CELLS, CELLS), dtype=np.float32)
    for index in range(len(source)):
        image = source._read(index).numpy()[0]
        if source.is_tagged(index):
            strong = image.copy()
            strong[TAG] *= 20
            image = strong
        rng = np.random.default_rng(1000 + index)
        maps[index] = image.reshape(CELLS, 2, CELLS, 2).mean((1, 3)) + rng.normal(0, 0.02, (CELLS, CELLS))
    return maps


def is_tinted(index: int) -> bool:
    return index % 2 == 0 and 40 <= index < 60


def features(count: int) -> np.ndarray:
    """[N, 6] float32: the relevance of the last features."""
    found = np.random.default_rng(2).uniform(0, 1, (count, 6))
    found[[is_tinted(index) for index in range(count)], 4] += 4
    return found.astype(np.float32)


def screening(folder: Path, source: Planted, shard_size: int = 25, skipped: tuple[int, ...] = ()) -> Path:
    """Write the shards of a screening of `source`."""
    manifest = Manifest(
        settings={"data": "planted", "target": "label", "composite": "epsilon_plus_flat", "seed": "logit"},
        model={"spec": "tests:model", "preprocessing": PREPROCESSING.to_dict()},
        classes=source.classes,
        height=CELLS,
        width=CELLS,
        samples=len(source),
        shard_size=shard_size,
        listing=source.digest(),
    )
    with manifests.locked(folder):
        manifests.begin(folder, manifest)
        maps = heatmaps(source)
        images = torch.stack([source.tensor(index) for index in range(len(source))])
        logits = model(images).numpy()
        labels = np.array([source.label(index) for index in range(len(source))], dtype=np.int32)
        half, scale = schema.to_half(maps)
        inner, inner_scale = schema.to_half(features(len(source)))
        order = np.argsort(-logits, axis=1)
        top_class = np.pad(order, ((0, 0), (0, 3)), constant_values=-1).astype(np.int32)
        top_logit = np.pad(np.take_along_axis(logits, order, 1), ((0, 0), (0, 3)), constant_values=np.nan)
        for shard in range(manifest.shards):
            own = np.array(manifest.positions(shard))
            shards.write(
                folder,
                manifest,
                shard,
                {
                    "sample": own,
                    "path": [source.record(index).path for index in own.tolist()],
                    "label": labels[own],
                    "target": labels[own],
                    "prediction": order[own, 0].astype(np.int32),
                    "top5_class": top_class[own],
                    "top5_logit": top_logit[own].astype(np.float32),
                    "target_logit": logits[own, labels[own]],
                    "map": half[own],
                    "scale": scale[own],
                    "features": inner[own],
                    "features_scale": inner_scale[own],
                    "conservation": np.ones(len(own), dtype=np.float32),
                    "reason": ["unreadable" if index in skipped else "" for index in own.tolist()],
                },
            )
    return folder
