"""The stateful callable that every engine runs: a batch of decoded images in, the rows of a shard out.

Maps are summed over channels and averaged over the cells of the pool on the device, right behind the program and before anything is
copied from it: a map of 224 x 224 pixels and three channels leaves as 28 x 28 numbers of two bytes, a 384th. The engine's program has no
hook for this and needs none; the two steps are a thousandth of its time. The relevance of the last features, by channel, leaves with it.

The average over cells is two matrix products, `rows @ map @ columns`, so that it also exists where the side is no multiple of the
cells: a pixel on a border belongs to both neighbours in proportion. Where it is a multiple, this is average pooling; in each case the
mean of the map is the mean of the relevance.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lrpfast.errors import InputError, LrpfastError, NumericsError, ScreeningError, TargetError
from lrpfast.explanation import FEATURES, Explanation
from lrpfast.screening.recipes import Runnable, logits
from lrpfast.screening.schema import TOP, Record, to_half
from lrpfast.screening.sources import Source

# By column: arrays [n, ...] (the images of a batch may be a tensor), lists of str.
Columns = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pooling:
    """What is explained of each sample and how large its map is.

    Parameters
    ----------
    target
        "label": the sample's class; "prediction": the arg max.
    seed
        The relevance at the output: "logit" or "one".
    height, width
        Of the maps.
    """

    target: str
    seed: str
    height: int
    width: int


def decode(source: Source, positions: list[int], shape: tuple[int, ...]) -> Columns:
    """Read samples: columns `sample`, `path`, `label`, `image` [n, C, H, W], and `reason`, empty or why there is no image."""
    records, tensors, reasons = [], [], []
    for position in positions:
        record, tensor, reason = _read(source, position, shape)
        records.append(record)
        tensors.append(tensor)
        reasons.append(reason)
    return {
        "sample": np.array(positions, dtype=np.int64),
        "path": [path.encode(errors="surrogateescape").decode(errors="replace") for path, _ in records],
        "label": np.array([label for _, label in records], dtype=np.int32),
        "image": _stacked(tensors, shape),
        "reason": reasons,
    }


def _read(source: Source, position: int, shape: tuple[int, ...]) -> tuple[tuple[str, int], torch.Tensor | None, str]:
    place = (f"sample {position}", -1)
    try:
        record, tensor = source.sample(position)
        place = _place(record)
    except Exception as error:
        # Damaged files make decoders raise nearly anything; none of it may end a run of days.
        told = str(error) if isinstance(error, LrpfastError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # a Dataset that cannot read a sample cannot tell its label
            place = _place(source.record(position))
        return place, None, told or type(error).__name__
    if tuple(tensor.shape) != shape:
        return place, None, f"{record.path} has the shape {list(tensor.shape)}, the others {list(shape)}"
    return place, tensor, ""


def _place(record: Record) -> tuple[str, int]:
    if not -(2**31) <= record.label < 2**31:  # as shards hold it
        raise InputError(f"{record.path} has the label {record.label}, which is no index of a class")
    return record.path, record.label


def _stacked(tensors: list[torch.Tensor | None], shape: tuple[int, ...]) -> torch.Tensor:
    like = next((tensor for tensor in tensors if tensor is not None), torch.empty(0))
    empty = torch.zeros(shape, dtype=like.dtype)
    return torch.stack([empty if tensor is None else tensor for tensor in tensors])


class PooledExplainer:
    """Explains batches and pools their maps; made once in each worker.

    Parameters
    ----------
    build
        Makes what explains.
    pooling
        What of a sample is explained, and to what size its map is pooled.
    """

    def __init__(self, build: Callable[[], Runnable], pooling: Pooling) -> None:
        self._runnable, self._pooling = build(), pooling
        self._cells: dict[tuple[torch.Size, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._runnable.device

    def __call__(self, batch: Columns) -> Columns:
        """Explain a batch as `decode` gives it; returns the columns of a shard, and `reason`.

        A row with a reason holds nothing else than sample, path and label: its image could not be read, or its values are not
        finite, or its label is no class of the model.
        """
        pooling, count = self._pooling, len(batch["sample"])
        rows: Columns = {
            "sample": np.asarray(batch["sample"], dtype=np.int64),
            "path": [str(path) for path in batch["path"]],
            "label": np.asarray(batch["label"], dtype=np.int32),
            "reason": [str(reason) for reason in batch["reason"]],
            "target": np.full(count, -1, np.int32),
            "prediction": np.full(count, -1, np.int32),
            "top5_class": np.full((count, TOP), -1, np.int32),
            "top5_logit": np.full((count, TOP), np.nan, np.float32),
            "target_logit": np.full(count, np.nan, np.float32),
            "map": np.zeros((count, pooling.height, pooling.width), np.float16),
            "scale": np.ones(count, np.float32),
            "features": np.zeros((count, self._runnable.features), np.float16),
            "features_scale": np.ones(count, np.float32),
            "conservation": np.full(count, np.nan, np.float32),
        }
        if pooling.target == "label":
            for index in np.flatnonzero(rows["label"] < 0):
                rows["reason"][index] = rows["reason"][index] or f"{rows['path'][index]} has no label"
        images = torch.as_tensor(batch["image"])
        self._fill(rows, images, [index for index in range(count) if not rows["reason"][index]])
        return rows

    def _fill(self, rows: Columns, images: torch.Tensor, chosen: list[int]) -> None:
        """Explain the chosen rows; where one cannot be, one by one, to find which; where memory lacks, by halves."""
        if not chosen:
            return
        try:
            found = self._explain(images if len(chosen) == len(images) else images[chosen], rows["label"][chosen])
        except (NumericsError, TargetError) as error:
            if len(chosen) > 1:
                for index in chosen:
                    self._fill(rows, images, [index])
            else:
                rows["reason"][chosen[0]] = f"{rows['path'][chosen[0]]}: {error}"
            return
        except torch.OutOfMemoryError as error:
            if len(chosen) == 1:
                raise ScreeningError(f"no memory for a single image on {self._runnable.device}: {error}") from error
            half = len(chosen) // 2
            self._fill(rows, images, chosen[:half])
            self._fill(rows, images, chosen[half:])
            return
        for name, values in found.items():
            rows[name][chosen] = values

    def _explain(self, images: torch.Tensor, labels: np.ndarray) -> dict[str, np.ndarray]:
        device, dtype = self._runnable.device, self._runnable.dtype
        inputs = images.to(device, dtype, non_blocking=True)
        target = torch.as_tensor(labels, dtype=torch.int64).to(device) if self._pooling.target == "label" else None
        explanation = self._runnable.explain(inputs, target=target, seed=self._pooling.seed)
        output = logits(explanation.output)
        top = output.topk(min(TOP, output.shape[1]), dim=1)
        maps, scale = to_half(self._pooled(explanation).cpu().numpy())
        features, features_scale = to_half(self._features(explanation).float().cpu().numpy())
        resolved = explanation.target
        missing = ((0, 0), (0, TOP - top.indices.shape[1]))
        return {
            "target": resolved.int().cpu().numpy(),
            "prediction": output.argmax(1).int().cpu().numpy(),
            "top5_class": np.pad(top.indices.int().cpu().numpy(), missing, constant_values=-1),
            "top5_logit": np.pad(top.values.float().cpu().numpy(), missing, constant_values=np.nan),
            "target_logit": output.gather(1, resolved[:, None])[:, 0].float().cpu().numpy(),
            "map": maps,
            "scale": scale,
            "features": features,
            "features_scale": features_scale,
            "conservation": explanation.conservation().float().cpu().numpy(),
        }

    def _features(self, explanation: Explanation) -> torch.Tensor:
        return explanation.layers[FEATURES] if self._runnable.features else torch.zeros(len(explanation.target), 0)

    def _pooled(self, explanation: Explanation) -> torch.Tensor:
        heat = explanation.heatmap()
        heat = heat.to(torch.promote_types(heat.dtype, torch.float32))
        key = (heat.shape[1:], heat.dtype)
        if key not in self._cells:
            rows, columns = (
                averaging(side, cells).to(heat.device, heat.dtype)
                for side, cells in zip(heat.shape[1:], (self._pooling.height, self._pooling.width), strict=True)
            )
            self._cells[key] = rows, columns.T.contiguous()
        rows, columns = self._cells[key]
        return rows @ (heat @ columns)


def averaging(side: int, cells: int) -> torch.Tensor:
    """Return the matrix [cells, side], float64, that averages `side` values over `cells` cells of equal length."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * side / cells
    pixels = torch.arange(side, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return covered.clamp(min=0) * (cells / side)
