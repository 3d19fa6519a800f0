"""What a shard holds: the columns of its Parquet file, and how a map becomes float16 and a float32 again.

A map of relevance may have any magnitude, and float16 spans 2^-24 to 65504 only. So each map is divided by a power of two that
brings its largest magnitude to about 2^14: nothing overflows, what is 2^-38 of the largest still shows, and the scaling itself
is exact. `map * scale` is the relevance.

What could not be read stands in the file's metadata, not in a file of its own: it appears together with the rows or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

TOP = 5  # classes kept a sample
_LARGEST = 15  # scaled maps stay below 2^15
_FIELD = b"lrpfast"


@dataclasses.dataclass(frozen=True)
class ClassInfo:
    """A class: its index among the model's outputs, its name, and its WordNet id (n01440764) where it has one."""

    index: int
    name: str
    word_net_id: str | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A sample of a source: where it is, and its class; -1 where it has none."""

    path: str
    label: int


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A sample that could not be explained, and why."""

    sample: int
    path: str
    label: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """What a shard says of itself: of which screening it is, the samples `start` to `stop` - 1, those skipped, and a digest of its
    values, which shards of earlier versions do not have."""

    fingerprint: str
    shard: int
    start: int
    stop: int
    skipped: tuple[Skipped, ...] = ()
    digest: str = ""

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return it as metadata of a Parquet file."""
        return {_FIELD: json.dumps(dataclasses.asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None) -> ShardInfo:
        """Undo `to_metadata`. Raises `ValueError` where a file has none."""
        if not metadata or _FIELD not in metadata:
            raise ValueError("it is no shard of a screening")
        fields: dict[str, Any] = json.loads(metadata[_FIELD])
        skipped = tuple(Skipped(**entry) for entry in fields.pop("skipped"))
        return cls(**fields, skipped=skipped)


def shard_schema(height: int, width: int) -> pa.Schema:
    """Return the columns of a shard whose maps are `height` x `width`.

    `sample` is the position in the source; `target` the class explained; `map` row-major, summed over channels and averaged over
    the cells of the pool; `features` the relevance of the channels that the last layer reads, none where it is not known;
    `top5_class` -1 and `top5_logit` NaN where the model has fewer classes.
    """
    columns = [
        ("sample", pa.int64()),
        ("path", pa.string()),
        ("label", pa.int32()),
        ("target", pa.int32()),
        ("prediction", pa.int32()),
        ("top5_class", pa.list_(pa.int32(), TOP)),
        ("top5_logit", pa.list_(pa.float32(), TOP)),
        ("target_logit", pa.float32()),
        ("map", pa.list_(pa.float16(), height * width)),
        ("scale", pa.float32()),
        ("features", pa.list_(pa.float16())),
        ("features_scale", pa.float32()),
        ("conservation", pa.float32()),
    ]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def to_half(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale maps [N, H, W], or features [N, C], to float16.

    Returns
    -------
    tuple
        The maps, float16 of the same shape, and the scale of each, float32 [N]: a power of two, 1 for a map of zeros.
    """
    wide = maps.astype(np.float64)
    each = (-1, *[1] * (maps.ndim - 1))
    largest = np.abs(wide).max(axis=tuple(range(1, maps.ndim)), initial=0.0)
    _, exponent = np.frexp(largest)
    exponent = np.where(largest > 0, np.clip(exponent - _LARGEST, -126, 127), 0)
    return np.ldexp(wide, -exponent.reshape(each)).astype(np.float16), np.ldexp(1.0, exponent).astype(np.float32)


def from_half(maps: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Undo `to_half`: float32 maps, the relevance, from maps float16 [N, ...] and scale float32 [N]."""
    return maps.astype(np.float32) * scale.reshape(-1, *[1] * (maps.ndim - 1))


def table(columns: dict[str, Any], height: int, width: int) -> pa.Table:
    """Make the rows of a shard, in the order of the samples.

    Parameters
    ----------
    columns
        By the names of `shard_schema`: numpy arrays [N], [N, 5] and, for `map`, float16 [N, H, W], for `features` float16 [N, C];
        `path` a sequence of str.
    """
    schema = shard_schema(height, width)
    order = np.argsort(columns["sample"], kind="stable")
    arrays = [_array(_ordered(columns[field.name], order), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _ordered(values: Any, order: np.ndarray) -> Any:
    return values[order] if isinstance(values, np.ndarray) else [values[index] for index in order]


def _array(values: np.ndarray | Sequence[str], kind: pa.DataType) -> pa.Array:
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values, type=kind)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], flat, type=kind)
