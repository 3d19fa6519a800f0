"""The maps and features of a screening, class by class, without ever holding all of them.

Shards hold samples in the order of the source; the analysis wants all samples of a class at once. For a source that is not
sorted by class, a class is spread over all shards, and reading all of them for each of a thousand classes is out of the
question. So the shards are gone through once, and each map is written to its place in one flat file sorted by class, the
relevance of its features to a second one. The other columns, which are small, go to one Parquet file of the same order. All
live in `analysis/` and are made again where they are missing, or were made of other shards than are there now.

"Class" is the class explained, the column `target`: the label, or the prediction, as the screening was told.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrpfast.errors import InputError, OutputError, ScreeningError
from lrpfast.files import make_folder, replacing
from lrpfast.screening import manifest as manifests
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.schema import ShardInfo, from_half
from lrpfast.screening.shards import identity

_LIGHT = (
    "sample", "path", "label", "target", "prediction", "top5_class", "top5_logit", "target_logit", "scale", "features_scale",
    "conservation",
)  # fmt: skip
_BATCH = 4096  # rows read from the maps of a shard at a time
# In the metadata of the table: how many features a sample has, and the identity of the shards that it was made of.
_COUNT, _SHARDS = b"features", b"shards"
FOLDER = "analysis"


@dataclasses.dataclass(frozen=True)
class ClassSamples:
    """All samples that one class was explained for, by ascending sample.

    Parameters
    ----------
    label
        The class explained.
    sample
        int64 [n], positions in the source.
    path
        n strings.
    maps
        float32 [n, H, W], relevance.
    labels, prediction
        int32 [n], the true class (-1: unknown) and the predicted one.
    target_logit
        float32 [n].
    """

    label: int
    sample: np.ndarray
    path: Sequence[str]
    maps: np.ndarray
    labels: np.ndarray
    prediction: np.ndarray
    target_logit: np.ndarray


class Store:
    """The samples of a finished screening.

    Parameters
    ----------
    folder
        Of the screening. All shards must be there.

    Attributes
    ----------
    manifest
        What the screening is of.
    identity
        Of its shards: what was computed of others is out of date.

    Raises
    ------
    ScreeningError
        There is no screening, shards are missing or damaged, or one belongs to another screening.
    OutputError
        The sorted files cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = manifests.read(folder)
        self.identity = identity(self.folder, self.manifest)
        place = self.folder / FOLDER
        self._paths = {"map": place / "maps.f16", "features": place / "features.f16"}
        table_path = place / "samples.parquet"
        table = _read_sorted(table_path, self._paths, self.manifest, self.identity)
        if table is None:
            table = _sort(self.folder, self.manifest, self.identity, table_path, self._paths)
        self._table = table
        self._widths = _widths(self.manifest, table)
        target = table["target"].to_numpy()
        classes, starts = np.unique(target, return_index=True)
        stops = [*starts[1:].tolist(), len(target)]
        self._ranges = {int(c): (int(start), int(stop)) for c, start, stop in zip(classes, starts, stops, strict=True)}

    def __len__(self) -> int:
        """How many samples were explained."""
        return self._table.num_rows

    def labels(self) -> list[int]:
        """The classes that samples were explained for, ascending."""
        return list(self._ranges)

    def count(self, label: int) -> int:
        """How many samples a class has."""
        start, stop = self._ranges.get(label, (0, 0))
        return stop - start

    def columns(self, label: int | None = None) -> pa.Table:
        """All columns of shards but the maps, of one class or of all, sorted by class and sample."""
        if label is None:
            return self._table
        start, stop = self._ranges.get(label, (0, 0))
        return self._table.slice(start, stop - start)

    def maps(self, label: int) -> np.ndarray:
        """The maps of a class: float32 [n, H, W], relevance."""
        return self._values(label, "map", "scale").reshape(-1, self.manifest.height, self.manifest.width)

    def features(self, label: int) -> np.ndarray:
        """The relevance of the last features of a class: float32 [n, C], C = 0 where it is not known."""
        return self._values(label, "features", "features_scale")

    def _values(self, label: int, column: str, scale: str) -> np.ndarray:
        start, stop = self._ranges.get(label, (0, 0))
        width = self._widths[column]
        with open(self._paths[column], "rb") as file:
            file.seek(start * width * 2)
            half = np.fromfile(file, dtype=np.float16, count=(stop - start) * width)
        return from_half(half.reshape(stop - start, width), self.columns(label)[scale].to_numpy())

    def class_samples(self, label: int) -> ClassSamples:
        """All of a class.

        Raises
        ------
        InputError
            No sample was explained for this class.
        """
        if label not in self._ranges:
            raise InputError(f"no sample was explained for class {label}; there are {_some(self.labels())}")
        table = self.columns(label)
        return ClassSamples(
            label=label,
            sample=table["sample"].to_numpy(),
            path=table["path"].to_pylist(),
            maps=self.maps(label),
            labels=table["label"].to_numpy(),
            prediction=table["prediction"].to_numpy(),
            target_logit=table["target_logit"].to_numpy(),
        )


def _widths(manifest: Manifest, table: pa.Table) -> dict[str, int]:
    """How many values of each column a sample has."""
    return {"map": manifest.height * manifest.width, "features": int(table.schema.metadata[_COUNT])}


def _read_sorted(table_path: Path, paths: dict[str, Path], manifest: Manifest, of: str) -> pa.Table | None:
    """The sorted table, where it is there, whole and of these shards."""
    try:
        table = pq.read_table(table_path)
        if (table.schema.metadata or {}).get(_SHARDS, b"").decode() != of:
            return None
        widths = _widths(manifest, table)
        whole = all(paths[name].stat().st_size == table.num_rows * width * 2 for name, width in widths.items())
    except (OSError, KeyError, pa.ArrowException):
        return None
    return table.combine_chunks() if whole else None


def _sort(folder: Path, manifest: Manifest, of: str, table_path: Path, paths: dict[str, Path]) -> pa.Table:
    shards = [manifests.shard_path(folder, shard) for shard in range(manifest.shards)]
    tables = [_read_light(path, shard, manifest) for shard, path in enumerate(shards)]
    table = pa.concat_tables(tables).combine_chunks()
    target = table["target"].to_numpy()
    order = np.lexsort((table["sample"].to_numpy(), target))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    marks = {_SHARDS: of, _COUNT: str(_count_features(shards))}
    table = table.take(pa.array(order)).replace_schema_metadata(marks)
    make_folder(table_path.parent)
    table_path.unlink(missing_ok=True)  # lest it stand beside values that are not its own
    for column, width in _widths(manifest, table).items():
        with replacing(paths[column]) as temporary:
            _write_values(temporary, shards, place, column, width)
    # The table comes last: where it is, the others are whole.
    with replacing(table_path) as temporary, open(temporary, "wb") as file:
        pq.write_table(table, file)
    return table.combine_chunks()


def _read_light(path: Path, shard: int, manifest: Manifest) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            info = ShardInfo.from_metadata(file.schema_arrow.metadata)
            table = file.read(columns=list(_LIGHT))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ScreeningError(f"{path} is damaged: {error}. Remove it and start the screening again") from error
    if (info.fingerprint, info.shard) != (manifest.fingerprint, shard):
        raise ScreeningError(f"{path} belongs to another screening; remove it and start the screening again")
    return table.replace_schema_metadata(None)


def _count_features(shards: Sequence[Path]) -> int:
    """How many features a sample has: those of the first one."""
    for batch in (batch for shard in shards for batch in _read(shard, "features", rows=1)):
        return len(batch.flatten())
    return 0


def _write_values(path: Path, shards: Sequence[Path], place: np.ndarray, column: str, width: int) -> None:
    """Write the values of row i of all shards, one after the other, at `place[i]`; what follows each other goes in one piece."""
    row = 0
    with open(path, "wb", buffering=0) as out:
        if width == 0:
            return
        for values in (values for shard in shards for values in _read_values(shard, column, width)):
            places = place[row : row + len(values)]
            row += len(values)
            order = np.argsort(places)
            for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):
                if len(run):
                    _write_at(out.fileno(), values[run], int(places[run[0]]) * width * 2)


def _read_values(shard: Path, column: str, width: int) -> Iterator[np.ndarray]:
    """A column of a shard, float16 [rows, width], some rows at a time."""
    for batch in _read(shard, column, _BATCH):
        values = batch.flatten().to_numpy(zero_copy_only=False)
        if len(values) != len(batch) * width:
            raise ScreeningError(f"{shard} is damaged: not every sample has {width} values of {column}")
        yield values.reshape(-1, width)


def _read(shard: Path, column: str, rows: int) -> Iterator[pa.Array]:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=rows, columns=[column]):
                yield batch[column]
    except (OSError, pa.ArrowException) as error:
        raise ScreeningError(f"{shard} is damaged: {error}. Remove it and start the screening again") from error


def _write_at(descriptor: int, values: np.ndarray, offset: int) -> None:
    content = memoryview(np.ascontiguousarray(values).tobytes())
    while content:
        try:
            written = os.pwrite(descriptor, content, offset)
        except OSError as error:
            raise OutputError(f"the sorted values cannot be written: {error.strerror or error}") from error
        content, offset = content[written:], offset + written


def _some(labels: Sequence[int], most: int = 8) -> str:
    text = ", ".join(map(str, labels[:most]))
    return text if len(labels) <= most else f"{text} and {len(labels) - most} more"
