"""The shards of a screening: written whole, checked before they are trusted, read by no one until they have their name.

A shard is the unit of work. Its samples, the rows that could be explained and the list of those that could not, are one file, which
is written to a temporary name, brought to the disk and renamed. So a shard that is there is done, one that is not is not, and there
is nothing third, however the process ended.

One that was removed may be made again with other values: an image that was damaged is whole now. So whatever is computed of shards keeps
their `identity` with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrpfast.errors import OutputError, ScreeningError
from lrpfast.files import replacing
from lrpfast.screening import schema
from lrpfast.screening.manifest import Manifest, shard_path
from lrpfast.screening.schema import ShardInfo, Skipped

SKIPPED = "skipped.jsonl"


class Collector:
    """Gathers rows, in whatever order they come, and gives each shard when all of its samples are there."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._parts: dict[int, list[dict[str, Any]]] = {}
        self._seen: dict[int, np.ndarray] = {}

    def add(self, rows: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Take rows; yield the number and the rows of each shard that they complete. What came before is passed over."""
        shards = rows["sample"] // self._manifest.shard_size
        for shard in np.unique(shards).tolist():
            positions = self._manifest.positions(shard)
            seen = self._seen.setdefault(shard, np.zeros(len(positions), bool))
            own = np.flatnonzero(shards == shard)
            place = rows["sample"][own] - positions.start
            _, first = np.unique(place, return_index=True)
            own, place = own[first], place[first]
            own, place = own[~seen[place]], place[~seen[place]]
            seen[place] = True
            self._parts.setdefault(shard, []).append(_chosen(rows, own))
            if seen.all():
                del self._seen[shard]
                yield shard, _joined(self._parts.pop(shard))


def write(folder: Path, manifest: Manifest, shard: int, rows: dict[str, Any]) -> ShardInfo:
    """Write a shard of which all rows are there; rows with a `reason` go to the list of those skipped.

    Raises
    ------
    OutputError
        It cannot be written: the disk is full, say. What was there before is unharmed.
    """
    failed = [index for index, reason in enumerate(rows["reason"]) if reason]
    skipped = tuple(
        sorted(
            (
                Skipped(int(rows["sample"][i]), rows["path"][i], int(rows["label"][i]), rows["reason"][i])
                for i in failed
            ),
            key=lambda entry: entry.sample,
        )
    )
    positions = manifest.positions(shard)
    explained = _chosen(rows, np.setdiff1d(np.arange(len(rows["sample"])), failed))
    table = schema.table(explained, manifest.height, manifest.width)
    info = ShardInfo(manifest.fingerprint, shard, positions.start, positions.stop, skipped, _digest(table))
    table = table.replace_schema_metadata(info.to_metadata())
    path = shard_path(folder, shard)
    try:
        with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
            # The bytes of a map are as good as random.
            packed = {name: "none" if name.startswith("map.") else "zstd" for name in _leaves(table.schema)}
            pq.write_table(table, file, compression=packed, use_dictionary=False, write_page_checksum=True)
    except pa.ArrowException as error:
        raise OutputError(f"{path} cannot be written: {error}") from error
    return info


def check(folder: Path, manifest: Manifest, shard: int) -> ShardInfo | None:
    """Read a shard through; None where there is none yet.

    Raises
    ------
    ScreeningError
        It is damaged, or of another screening.
    """
    path = shard_path(folder, shard)
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        info = ShardInfo.from_metadata(table.schema.metadata)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ScreeningError(f"{path} is damaged: {reason}") from error
    positions = manifest.positions(shard)
    found = {*table["sample"].to_pylist(), *(entry.sample for entry in info.skipped)}
    if info.fingerprint != manifest.fingerprint or info.shard != shard:
        raise ScreeningError(f"{path} is of another screening")
    if found != {*positions} or table.num_rows + len(info.skipped) != len(positions):
        raise ScreeningError(f"{path} is damaged: it lacks samples")
    return info


def finished(folder: Path, manifest: Manifest, warn: Callable[[str], None]) -> dict[int, ShardInfo]:
    """Return what the shards that are done say of themselves; `warn` of those that have to be made again."""
    done: dict[int, ShardInfo] = {}
    for shard in range(manifest.shards):
        try:
            info = check(folder, manifest, shard)
        except ScreeningError as error:
            warn(f"{error}; its samples are explained again")
            continue
        if info is not None:
            done[shard] = info
    return done


def identity(folder: Path, manifest: Manifest) -> str:
    """Return a digest of the screening and of what all its shards hold, 32 hexadecimal digits: the same where the folder was copied,
    another where a shard was made again with other values.

    Raises
    ------
    ScreeningError
        A shard is not there, or cannot be read.
    """
    paths = [shard_path(folder, shard) for shard in range(manifest.shards)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ScreeningError(
            f"{len(missing)} of {len(paths)} shards of {folder} are not there yet, the first is {missing[0].name}: "
            "start the screening again, with the same settings, to complete it"
        )
    found = hashlib.blake2b(manifest.fingerprint.encode(), digest_size=16)
    for path in paths:
        found.update(_footer(path))
    return found.hexdigest()


def write_skipped(folder: Path, infos: dict[int, ShardInfo]) -> list[Skipped]:
    """Write the list of all samples that were skipped, one a line, and return it. Raises `OutputError`."""
    skipped = [entry for shard in sorted(infos) for entry in infos[shard].skipped]
    with replacing(folder / SKIPPED, durable=True) as temporary:
        lines = (json.dumps(vars(entry)) for entry in skipped)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return skipped


def agreement(folder: Path, manifest: Manifest) -> float:
    """The share of the explained samples with a label whose prediction it is; NaN without any."""
    right = total = 0
    for shard in range(manifest.shards):
        with contextlib.suppress(FileNotFoundError):
            found = pq.read_table(shard_path(folder, shard), columns=["label", "prediction"])
            label = found["label"].to_numpy()
            right += int((label == found["prediction"].to_numpy()).sum())
            total += int((label >= 0).sum())
    return right / total if total else float("nan")


def _chosen(rows: dict[str, Any], indices: np.ndarray) -> dict[str, Any]:
    return {
        name: values[indices] if isinstance(values, np.ndarray) else [values[index] for index in indices]
        for name, values in rows.items()
    }


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(values, np.ndarray)
        else [value for part in parts for value in part[name]]
        for name, values in parts[0].items()
    }


def _digest(table: pa.Table) -> str:
    """Of all values. A footer alone tells of most columns no more than the least and the greatest."""
    found = hashlib.blake2b(digest_size=16)
    for batch in table.to_batches():
        found.update(batch.serialize())
    return found.hexdigest()


def _footer(path: Path) -> bytes:
    """What a Parquet file says of itself at its end, `ShardInfo` included: some kilobytes, where a shard has megabytes."""
    try:
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            return file.read(length)
    except OSError as error:
        reason = error.strerror or error
        raise ScreeningError(f"{path} is damaged: {reason}. Remove it and start the screening again") from error


def _leaves(columns: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_nested(f.type) else f.name for f in columns]
