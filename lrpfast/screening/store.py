"""The maps of a screening, class by class, without ever holding all of them.

Shards hold samples in the order of the source; the analysis wants all samples of a class at once. For a source that is not
sorted by class, a class is spread over all shards, and reading all of them for each of a thousand classes is out of the
question. So the shards are gone through once, and each map is written to its place in one flat file sorted by class. The
other columns, which are small, go to one Parquet file of the same order. Both live in `analysis/` and are made
again where they are missing or belong to another screening.

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

_LIGHT = (
    "sample", "path", "label", "target", "prediction", "top5_class", "top5_logit", "target_logit", "scale", "conservation",
)  # fmt: skip
_BATCH = 4096  # rows read from the maps of a shard at a time
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
        self._maps_path = self.folder / FOLDER / "maps.f16"
        table_path = self.folder / FOLDER / "samples.parquet"
        cells = self.manifest.height * self.manifest.width
        table = _read_sorted(table_path, self._maps_path, self.manifest.fingerprint, cells)
        if table is None:
            table = _sort(self.folder, self.manifest, table_path, self._maps_path)
        self._table = table
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
        start, stop = self._ranges.get(label, (0, 0))
        height, width = self.manifest.height, self.manifest.width
        with open(self._maps_path, "rb") as file:
            file.seek(start * height * width * 2)
            half = np.fromfile(file, dtype=np.float16, count=(stop - start) * height * width)
        scale = self.columns(label)["scale"].to_numpy()
        return from_half(half.reshape(stop - start, height, width), scale)

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


def _read_sorted(table_path: Path, maps_path: Path, fingerprint: str, cells: int) -> pa.Table | None:
    """The sorted table, where it is there, whole and of this screening."""
    try:
        table = pq.read_table(table_path)
        found = (table.schema.metadata or {}).get(b"fingerprint", b"").decode()
        whole = maps_path.stat().st_size == table.num_rows * cells * 2
    except (OSError, pa.ArrowException):
        return None
    return table.combine_chunks() if found == fingerprint and whole else None


def _sort(folder: Path, manifest: Manifest, table_path: Path, maps_path: Path) -> pa.Table:
    paths = [manifests.shard_path(folder, shard) for shard in range(manifest.shards)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ScreeningError(
            f"{len(missing)} of {len(paths)} shards of {folder} are not there yet, the first is {missing[0].name}: "
            "start the screening again, with the same settings, to complete it"
        )
    tables = [_read_light(path, shard, manifest) for shard, path in enumerate(paths)]
    table = pa.concat_tables(tables).combine_chunks()
    target = table["target"].to_numpy()
    order = np.lexsort((table["sample"].to_numpy(), target))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    table = table.take(pa.array(order)).replace_schema_metadata({"fingerprint": manifest.fingerprint})
    make_folder(table_path.parent)
    with replacing(maps_path) as temporary:
        _write_maps(temporary, paths, place, manifest.height * manifest.width)
    # The table comes last: where it is, the maps are whole.
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


def _write_maps(path: Path, shards: Sequence[Path], place: np.ndarray, cells: int) -> None:
    """Write the map of row i of all shards, one after the other, at `place[i]`; what follows each other goes in one piece."""
    row = 0
    with open(path, "wb", buffering=0) as out:
        for values in (batch for shard in shards for batch in _read_maps(shard, cells)):
            places = place[row : row + len(values)]
            row += len(values)
            order = np.argsort(places)
            for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):
                if len(run):
                    _write_at(out.fileno(), values[run], int(places[run[0]]) * cells * 2)


def _read_maps(shard: Path, cells: int) -> Iterator[np.ndarray]:
    """The maps of a shard, float16 [rows, cells], some rows at a time."""
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_BATCH, columns=["map"]):
                yield batch["map"].flatten().to_numpy(zero_copy_only=False).reshape(-1, cells)
    except (OSError, pa.ArrowException) as error:
        raise ScreeningError(f"{shard} is damaged: {error}. Remove it and start the screening again") from error


def _write_at(descriptor: int, values: np.ndarray, offset: int) -> None:
    content = memoryview(np.ascontiguousarray(values).tobytes())
    while content:
        try:
            written = os.pwrite(descriptor, content, offset)
        except OSError as error:
            raise OutputError(f"the sorted maps cannot be written: {error.strerror or error}") from error
        content, offset = content[written:], offset + written


def _some(labels: Sequence[int], most: int = 8) -> str:
    text = ", ".join(map(str, labels[:most]))
    return text if len(labels) <= most else f"{text} and {len(labels) - most} more"
