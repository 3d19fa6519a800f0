"""What samples there are: a folder of classes, a CSV file or tar archives become one table, once.

The position of a sample in this table is its number for the whole screening. So the table is made when a screening begins and kept with
it: a file that is added or vanishes later moves no other one.

Columns: `path`, bytes as the file system has them, relative to the root; `label`, the index of the model's output; for archives also
`archive`, the archive's path likewise, `offset` and `size` of the member. A stretch of an archive that cannot be read is one sample
of size -1, so that it is told like an image that cannot be read.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import hashlib
import importlib
import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa

from lrpfast.errors import InputError
from lrpfast.images import SUFFIXES
from lrpfast.screening.schema import ClassInfo

NAME = "samples.parquet"
DAMAGED = -1  # the size of what cannot be read
_INDEX = re.compile(r"([+-]?\d+)(?:\.0*)?")  # pandas writes integers as floats where one is missing
_WORD_NET_ID = re.compile(r"n\d{8}")
_BLOCK = 512  # of a tar archive
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Model:
    """What the model knows of classes: the names of its outputs, empty where not known, and their number."""

    categories: tuple[str, ...] = ()
    outputs: int | None = None


@dataclasses.dataclass(frozen=True)
class Listing:
    """The samples of a source, and their classes."""

    table: pa.Table
    classes: tuple[ClassInfo, ...]

    def digest(self) -> str:
        """Return a digest of the samples and their labels."""
        found = hashlib.blake2b(digest_size=16)
        for name in self.table.column_names:
            found.update(name.encode())
            column = self.table[name]
            # No path holds a zero byte.
            is_path = pa.types.is_binary(column.type)
            found.update(b"\0".join(column.to_pylist()) if is_path else column.to_numpy().tobytes())
        return found.hexdigest()


def list_folder(root: Path, model: Model) -> Listing:
    """List a folder of classes: the images anywhere below a folder of the root are of its class.

    Raises
    ------
    InputError
        There are no class folders or no images, or the folders do not fit the model's classes.
    """
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(f"{root} is no folder of classes: it holds no folders")
    paths: list[bytes] = []
    labels: list[str] = []
    for name in names:
        found = [os.path.join(name, path) for path in _images(root / name)]
        paths += map(os.fsencode, found)
        labels += [name] * len(found)
    if not paths:
        raise InputError(f"no images in the folders of {root} (looked for {', '.join(sorted(SUFFIXES))})")
    return _named(str(root), paths, labels, names, model)


def list_csv(path: Path, model: Model) -> Listing:
    """List a CSV file of path and label; paths are relative to its folder.

    A first line with the names `path` and `label` says which columns they are; else they are the first two. Labels are indices of
    the model's outputs, or names of classes; a negative index is no label.

    Raises
    ------
    InputError
        It cannot be read, a line has no label, labels are neither all indices nor all names, or do not fit the model's classes.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from error
    head = [cell.strip().lower() for cell in rows[0]] if rows else []
    columns, first = ((head.index("path"), head.index("label")), 1) if {"path", "label"} <= {*head} else ((0, 1), 0)
    known = {category.casefold() for category in model.categories}
    if not first and "label" in head and "label" not in known:
        raise InputError(f"{path}, line 1: the header is {','.join(rows[0])!r}; it must be path,label")
    paths, labels, places = [], [], []
    for number, row in enumerate(rows[first:], first + 1):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= max(columns) or not row[columns[0]].strip() or not row[columns[1]].strip():
            raise InputError(f"{path}, line {number}: a path and a label are needed, got {','.join(row)!r}")
        paths.append(os.fsencode(row[columns[0]].strip()))
        labels.append(row[columns[1]].strip())
        places.append(f"line {number}")
    if not paths:
        raise InputError(f"{path} lists no images")
    return _labelled(
        str(path), paths, labels, places, model, advice="; where line 1 is a header, it must be path,label"
    )


def list_archives(pattern: str, model: Model) -> Listing:
    """List tar archives in WebDataset's form: members of one name up to the first dot are one sample, `.cls` its label.

    Parameters
    ----------
    pattern
        An archive, a folder of them, or a name with braces and wild cards: ``train-{000..146}.tar``. The label may also stand in
        ``.json``, under "label" or "cls". Members whose name begins with a dot are left out.

    Raises
    ------
    InputError
        There is no archive, or none with images, or none with labels.
    """
    archives = find_archives(pattern)
    paths: list[bytes] = []
    labels: list[str] = []
    places: list[tuple[bytes, int, int]] = []
    for archive in archives:
        for sample in _members(archive):
            paths.append(os.fsencode(sample.path))
            labels.append(sample.label)
            places.append((os.fsencode(archive), sample.offset, sample.size))
    if all(size == DAMAGED for _, _, size in places):
        raise InputError(f"no images in the archives of {pattern}")
    if not any(labels):
        raise InputError(f"no sample in the archives of {pattern} has a label: no member .cls, and none in .json")
    listing = _labelled(pattern, paths, labels, [*map(os.fsdecode, paths)], model)
    table = listing.table
    for name, kind, column in zip(
        ("archive", "offset", "size"), (pa.binary(), pa.int64(), pa.int64()), zip(*places, strict=True), strict=True
    ):
        table = table.append_column(name, pa.array(column, kind))
    return dataclasses.replace(listing, table=table)


def find_archives(pattern: str) -> list[str]:
    """Expand braces, wild cards and a folder to the paths of archives, in the order of their names.

    Raises `InputError` where there is none, or where one is compressed.
    """
    found: list[str] = []
    for name in _braces(pattern):
        if os.path.isdir(name):
            found += sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        elif os.path.exists(name) or not glob.has_magic(name):
            found.append(name)
        else:
            found += sorted(glob.glob(name))
    if not found:
        raise InputError(f"there is no archive {pattern}")
    for name in found:
        if not name.endswith(".tar"):
            raise InputError(
                f"{name} is no .tar file; a compressed archive cannot be read from the middle: unpack it to .tar"
            )
    return found


def _braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        width = len(bounds[1])
        choices = [f"{number:0{width}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    else:
        choices = match[1].split(",")
    for choice in choices:
        yield from _braces(f"{pattern[: match.start()]}{choice}{pattern[match.end() :]}")


def _images(folder: Path) -> Iterator[str]:
    """Paths relative to `folder` of the images in it, in the order of their names."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(root, name), folder)


@dataclasses.dataclass
class _Member:
    """An image within an archive, or a damaged stretch of it."""

    path: str
    offset: int
    size: int
    label: str = ""


def _members(archive: str) -> Iterator[_Member]:
    """The samples of an archive; damage is stepped over, and is a sample that cannot be read."""
    groups: dict[str, _Member] = {}
    labels: dict[str, str] = {}
    damage: list[_Member] = []
    try:
        with open(archive, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for info in _headers(file, archive, length, damage):
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not stem:
                    continue  # ".name" is no sample's, as in WebDataset; macOS writes such beside each file
                suffix = ending.lower()
                key = f"{folder}/{stem}" if folder else stem
                if f".{suffix.rpartition('.')[2]}" in SUFFIXES:
                    groups.setdefault(key, _Member(f"{archive}::{info.name}", info.offset_data, info.size))
                elif suffix in ("cls", "json"):
                    content = _content(file, info, length)
                    labels[key] = labels.get(key) or (
                        content.decode(errors="replace").strip() if suffix == "cls" else _json_label(content)
                    )
    except OSError as error:
        damage.append(_Member(f"{archive}::*", 0, DAMAGED))
        if not isinstance(error, tarfile.TarError) and not os.path.exists(archive):
            raise InputError(f"there is no archive {archive}") from error
    for key, member in groups.items():
        member.label = labels.get(key, "")
    yield from groups.values()
    yield from damage


def _headers(file: IO[bytes], archive: str, length: int, damage: list[_Member]) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive; what lies between them and is not empty goes to `damage`."""
    expected = 0

    def gap(end: int) -> None:
        place = file.tell()
        file.seek(expected)
        empty = all(not file.read(min(_CHUNK, end - start)).strip(b"\0") for start in range(expected, end, _CHUNK))
        file.seek(place)
        if not empty:
            damage.append(_Member(f"{archive}::bytes {expected} to {end}", expected, DAMAGED))

    try:
        # Blocks that are no header are stepped over, rather than taken as the end of the archive.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (info := tar.next()) is not None:
                gap(info.offset)
                expected = info.offset_data + -(-info.size // _BLOCK) * _BLOCK if info.isfile() else info.offset_data
                vars(tar)["members"].clear()  # it keeps all headers otherwise
                yield info
    except (tarfile.TarError, EOFError) as error:
        # Where the last member is cut, that member is the one that cannot be read.
        if expected <= length:
            damage.append(_Member(f"{archive}::bytes {expected} to {length} ({error})", expected, DAMAGED))
        return
    gap(length)


def _content(file: IO[bytes], info: tarfile.TarInfo, length: int) -> bytes:
    place = file.tell()
    file.seek(info.offset_data)
    content = file.read(min(info.size, length))
    file.seek(place)
    return content


def _json_label(content: bytes) -> str:
    try:
        fields = json.loads(content)
        found = next((fields[key] for key in ("label", "cls") if key in fields), None)
        return "" if found is None else str(found)
    except (ValueError, TypeError):
        return ""


def _labelled(
    origin: str, paths: Sequence[bytes], labels: Sequence[str], places: Sequence[str], model: Model, advice: str = ""
) -> Listing:
    """Labels as a person wrote them, `places` where: all indices, or all names; empty for what cannot be read."""
    distinct = sorted({label for label in labels if label})
    index = {label: int(match[1]) for label in distinct if (match := _INDEX.fullmatch(label))}
    known = {category.casefold() for category in model.categories}
    if not index or (len(index) < len(distinct) and all(label.casefold() in known for label in distinct)):
        return _named(origin, paths, labels, distinct, model)
    if len(index) < len(distinct):
        name, number = (next(i for i, x in enumerate(labels) if x and (x in index) is kind) for kind in (False, True))
        raise InputError(
            f"{origin}: labels must be all indices or all names; {places[name]} has the name {labels[name]!r}, {places[number]} the index "
            f"{labels[number]}{advice}"
        )
    highest = max(index.values())
    if model.outputs is not None and highest >= model.outputs:
        raise InputError(f"{origin} has the label {highest}, and the model's classes are 0 to {model.outputs - 1}")
    indices = [max(index.get(label, -1), -1) for label in labels]
    return _listing(paths, indices, complete_classes({}, {*indices} - {-1}, model))


def _named(origin: str, paths: Sequence[bytes], labels: Sequence[str], names: Sequence[str], model: Model) -> Listing:
    index = _indices(origin, names, model)
    indices = [index.get(label, -1) for label in labels]
    return _listing(paths, indices, complete_classes({index[name]: name for name in names}, {*index.values()}, model))


def _indices(origin: str, names: Sequence[str], model: Model) -> dict[str, int]:
    """Which output of the model each named class is.

    By the names of the model's classes; else by WordNet ids, where the model has ImageNet's 1,000 classes; else in the order of the
    names, as torchvision's ImageFolder numbers them, where there are as many as outputs.
    """
    categories: dict[str, list[int]] = defaultdict(list)
    for index, category in enumerate(model.categories):
        categories[category.casefold()].append(index)
    known = {name: categories.get(name.casefold(), []) for name in names}
    if all(len(found) == 1 for found in known.values()):
        return {name: found[0] for name, found in known.items()}
    unknown = [name for name, found in known.items() if len(found) != 1]
    if len(unknown) < len(names):
        raise InputError(f"{origin}: these classes are none of the model's, or several: {_some(unknown)}")
    if model.outputs is None or len(names) == model.outputs:
        return {name: index for index, name in enumerate(sorted(names))}
    if model.outputs == 1000 and all(_WORD_NET_ID.fullmatch(name) for name in names):
        ids = _imagenet_ids()
        if ids and all(name in ids for name in names):
            return {name: ids[name] for name in names}
    classes = "1 class" if len(names) == 1 else f"{len(names)} classes"
    raise InputError(
        f"{origin} has {classes} ({_some(names)}) and the model has {model.outputs} outputs: name the outputs as the classes "
        "are named, in a file with one name a line, and give it as --classes"
    )


def _imagenet_ids() -> dict[str, int]:
    """The WordNet ids of ImageNet's 1,000 classes, which timm knows; empty without timm."""
    try:
        info = importlib.import_module("timm.data").ImageNetInfo()
    except Exception:
        return {}  # its import fails in many ways beside a torchvision of another torch
    return {name: index for index, name in enumerate(info.label_names())}


def complete_classes(names: dict[int, str], present: set[int], model: Model) -> tuple[ClassInfo, ...]:
    """All classes of the model, or those present where it is not known how many it has."""
    indices = range(model.outputs) if model.outputs is not None else sorted(present)

    def named(index: int) -> str:
        own = names.get(index, f"class {index}")
        return model.categories[index] if index < len(model.categories) else own

    def word_net_id(index: int) -> str | None:
        return names[index] if _WORD_NET_ID.fullmatch(names.get(index, "")) else None

    return tuple(ClassInfo(index, named(index), word_net_id(index)) for index in indices)


def _listing(paths: Sequence[bytes], indices: Sequence[int], classes: tuple[ClassInfo, ...]) -> Listing:
    return Listing(pa.table({"path": pa.array(paths, pa.binary()), "label": pa.array(indices, pa.int32())}), classes)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
