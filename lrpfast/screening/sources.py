"""Where the samples come from: files in folders of classes or listed in a CSV file, members of tar archives, a torch Dataset.

A source is asked for samples by their position, in processes of its own and in any order; so it holds a list of what there is and
opens each file when it is asked for it. It can be pickled. Whatever is wrong with a sample is an `InputError` of that sample.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from lrpfast import images
from lrpfast.errors import InputError, ScreeningError
from lrpfast.files import replacing
from lrpfast.images import Preprocessing
from lrpfast.screening import listing as lists
from lrpfast.screening import manifest as manifests
from lrpfast.screening.listing import DAMAGED, Listing, Model
from lrpfast.screening.schema import ClassInfo, Record

SPECS = "a folder of class folders, a .csv file, .tar archives, or module:factory of a torch.utils.data.Dataset"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Source(ABC):
    """A dataset, by position.

    Attributes
    ----------
    spec
        What it was opened by; files by their absolute path.
    preprocessing
        From image to input.
    classes
        The classes, in the order of their indices; an index is that of the model's output.
    """

    def __init__(self, spec: str, preprocessing: Preprocessing, classes: tuple[ClassInfo, ...]) -> None:
        self.spec, self.preprocessing, self.classes = spec, preprocessing, classes

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are, those that cannot be read among them."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """Where a sample is, and its class: -1 without one. Raises `InputError` where a Dataset fails to say."""

    @abstractmethod
    def _read(self, index: int) -> Image.Image | torch.Tensor:
        """An image, or a tensor [C, H, W] as the model takes it."""

    @abstractmethod
    def check(self) -> None:
        """Raise `InputError` where the data as a whole are gone: a disk that is not mounted."""

    @property
    def listing(self) -> Listing | None:
        """The list of samples, where there is one to keep."""
        return None

    def digest(self) -> str:
        """Return a digest of what samples there are and of what class."""
        return f"{len(self)} samples" if self.listing is None else self.listing.digest()

    def sample(self, index: int) -> tuple[Record, torch.Tensor]:
        """Return a sample's record and its tensor, from one reading. Raises as `tensor`."""
        return self.record(index), self.tensor(index)

    def tensor(self, index: int) -> torch.Tensor:
        """Return a sample as the model takes it: floating point, [C, H, W].

        Raises
        ------
        InputError
            It cannot be read.
        """
        return self._tensor(self._read(index))

    def image(self, index: int) -> Image.Image:
        """Return a sample as the model sees it, resized and cropped, as a picture; of a tensor, the normalisation undone.

        Raises
        ------
        InputError
            It cannot be read.
        """
        found = self._read(index)
        return (
            _rendered(found, self.preprocessing) if isinstance(found, torch.Tensor) else self.preprocessing.view(found)
        )

    def _tensor(self, found: Image.Image | torch.Tensor) -> torch.Tensor:
        if isinstance(found, torch.Tensor):
            return found
        return self.preprocessing.tensor(self.preprocessing.view(found))


class FileSource(Source):
    """Image files, by their paths under a root."""

    def __init__(self, spec: str, root: str, found: Listing, preprocessing: Preprocessing) -> None:
        super().__init__(spec, preprocessing, found.classes)
        self._root, self._listing = root, found
        self._paths, self._labels = _column(found.table, "path"), _column(found.table, "label")

    def __len__(self) -> int:
        return self._listing.table.num_rows

    @property
    def listing(self) -> Listing:
        return self._listing

    def record(self, index: int) -> Record:
        return Record(self._path(index), self._labels[index].as_py())

    def check(self) -> None:
        if not os.path.exists(self._root):
            raise InputError(f"the data are not there any more: there is no {self._root}")

    def _path(self, index: int) -> str:
        return os.path.join(self._root, os.fsdecode(self._paths[index].as_py()))

    def _read(self, index: int) -> Image.Image | torch.Tensor:
        return images.read(self._path(index), self.preprocessing.channels)


class ArchiveSource(FileSource):
    """Members of tar archives."""

    def __init__(self, spec: str, root: str, found: Listing, preprocessing: Preprocessing) -> None:
        super().__init__(spec, root, found, preprocessing)
        self._places = tuple(_column(found.table, name) for name in ("archive", "offset", "size"))

    def _path(self, index: int) -> str:
        return os.fsdecode(self._paths[index].as_py())

    def _read(self, index: int) -> Image.Image | torch.Tensor:
        path = self._path(index)
        archive, offset, size = (column[index].as_py() for column in self._places)
        if size == DAMAGED:
            raise InputError(f"{path}: the archive is damaged here")
        try:
            with open(archive, "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        if len(content) < size:
            raise InputError(f"{path} cannot be read: the archive ends within it")
        return images.read(path, self.preprocessing.channels, io.BytesIO(content))


class DatasetSource(Source):
    """A map-style `torch.utils.data.Dataset` whose samples are (image or tensor, label), or one of both."""

    def __init__(self, spec: str, dataset: Any, preprocessing: Preprocessing, model: Model) -> None:
        self._dataset = dataset
        names = getattr(dataset, "classes", None)
        own = {i: str(name) for i, name in enumerate(names)} if isinstance(names, (list, tuple)) else {}
        super().__init__(spec, preprocessing, lists.complete_classes(own, {*own}, model))
        targets = getattr(dataset, "targets", None)
        self._targets = None if targets is None or len(targets) != len(dataset) else torch.as_tensor(targets)

    def __len__(self) -> int:
        return len(self._dataset)

    def record(self, index: int) -> Record:
        label = int(self._targets[index]) if self._targets is not None else _label(self._item(index))
        return Record(self._path(index), label)

    def check(self) -> None:
        pass  # there is no telling

    def sample(self, index: int) -> tuple[Record, torch.Tensor]:
        item = self._item(index)
        label = int(self._targets[index]) if self._targets is not None else _label(item)
        return Record(self._path(index), label), self._tensor(self._picture(index, item))

    def _path(self, index: int) -> str:
        return f"{self.spec}[{index}]"

    def _read(self, index: int) -> Image.Image | torch.Tensor:
        return self._picture(index, self._item(index))

    def _item(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except Exception as error:
            # It is a person's own code.
            raise InputError(f"{self._path(index)}: {type(error).__name__}: {error}") from error

    def _picture(self, index: int, item: Any) -> Image.Image | torch.Tensor:
        found = item[0] if isinstance(item, (tuple, list)) else item
        if isinstance(found, Image.Image):
            return found
        if isinstance(found, torch.Tensor) and found.is_floating_point() and found.dim() == 3:
            return found.detach()
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(f"{self._path(index)} is {kind}; a PIL image or a floating-point tensor [C, H, W] is needed")

    def __reduce__(self) -> tuple[Any, ...]:
        # A dataset may hold what cannot be pickled; its factory makes it again.
        model = Model(tuple(c.name for c in self.classes), len(self.classes))
        return (_dataset_source, (self.spec, self.preprocessing, model, [*sys.path]))


def open_source(
    spec: str | os.PathLike[str],
    preprocessing: Preprocessing,
    model: Model | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Source:
    """Open a dataset.

    Parameters
    ----------
    spec
        A folder of class folders; a .csv or .tsv file of path and label; tar archives in WebDataset's form (one, a folder of them, or
        a pattern with braces or wild cards); or `module:factory` of a map-style Dataset.
    preprocessing
        From image to input; not for a Dataset's tensors, which are taken as they are.
    model
        The names and the number of the model's classes: what a label's index means. Without, classes are numbered in the order
        of their names.
    folder
        The folder of a screening. Where it holds one of the same data, its list of samples is taken, so that the samples keep their
        numbers whatever was added or removed since.

    Raises
    ------
    InputError
        There are no such data, or they do not fit the model's classes.
    """
    text, kind = _kind(os.fspath(spec))
    model = model or Model()
    if kind is None:
        return _dataset_source(text, preprocessing, model, [])
    found = None if folder is None else _kept(folder, text)
    if found is None:
        found = _listed(text, kind, model)
    return kind(text, _root(text, kind), found, preprocessing)


def reopen(folder: str | os.PathLike[str]) -> Source:
    """Open the data of a screening again.

    Raises
    ------
    ScreeningError
        The folder holds no screening.
    InputError
        The data are not there any more.
    """
    manifest = manifests.read(folder)
    model = Model(tuple(entry.name for entry in manifest.classes), len(manifest.classes))
    preprocessing = Preprocessing.from_dict(manifest.model["preprocessing"])
    return open_source(manifest.settings["data"], preprocessing, model, folder)


def save_listing(source: Source, folder: str | os.PathLike[str]) -> None:
    """Keep the list of samples with the screening. Raises `OutputError`."""
    if source.listing is not None:
        with replacing(Path(folder, lists.NAME), durable=True) as temporary, open(temporary, "wb") as file:
            pq.write_table(source.listing.table, file, compression="zstd")


def _kept(folder: str | os.PathLike[str], spec: str) -> Listing | None:
    """The list of samples of a screening of the same data."""
    if not Path(folder, manifests.NAME).exists():
        return None
    manifest = manifests.read(folder)
    if manifest.settings["data"] != spec:
        return None
    path = Path(folder, lists.NAME)
    try:
        found = Listing(pq.read_table(path), manifest.classes)
    except (OSError, pa.ArrowException) as error:
        raise ScreeningError(f"{path} cannot be read: {error}") from error
    if found.digest() != manifest.listing:
        raise ScreeningError(f"{path} is not the list that the screening was begun with")
    return found


def _kind(spec: str) -> tuple[str, type[FileSource] | None]:
    """The spec, its paths absolute, and the kind of files it means; None for a Dataset."""
    absolute = os.path.abspath(spec)
    if os.path.isdir(spec):
        with os.scandir(spec) as entries:
            names = [(entry.name, entry.is_dir()) for entry in entries]
        archives = any(name.endswith(".tar") for name, _ in names) and not any(is_folder for _, is_folder in names)
        return absolute, ArchiveSource if archives else FileSource
    if spec.lower().endswith((".csv", ".tsv")):
        return absolute, FileSource
    if spec.endswith(".tar") or any(c in spec for c in "*?[{"):
        return absolute, ArchiveSource
    if _FACTORY.fullmatch(spec) and not os.path.exists(spec):
        return spec, None
    if not os.path.exists(spec):
        raise InputError(f"there are no data {spec}; they are {SPECS}")
    raise InputError(f"{spec} is none of {SPECS}")


def _root(spec: str, kind: type[FileSource]) -> str:
    return os.path.dirname(spec) if kind is ArchiveSource or not os.path.isdir(spec) else spec


def _listed(spec: str, kind: type[FileSource], model: Model) -> Listing:
    if kind is ArchiveSource:
        return lists.list_archives(spec, model)
    return lists.list_folder(Path(spec), model) if os.path.isdir(spec) else lists.list_csv(Path(spec), model)


def _dataset_source(spec: str, preprocessing: Preprocessing, model: Model, places: list[str]) -> DatasetSource:
    """Call the factory; `places` are searched for its module besides this process's own."""
    sys.path += [place for place in places if place not in sys.path]
    name, _, attribute = spec.partition(":")
    try:
        found: Any = importlib.import_module(name)
        for part in attribute.split("."):
            found = getattr(found, part)
        if not hasattr(found, "__getitem__") or isinstance(found, type):
            found = found()
        samples = len(found)
        _ = found.__getitem__
    except Exception as error:
        # It is a person's own code.
        raise InputError(
            f"{spec} gives no map-style torch.utils.data.Dataset, one with a length: {type(error).__name__}: {error}"
        ) from error
    if samples == 0:
        raise InputError(f"the dataset {spec} is empty")
    return DatasetSource(spec, found, preprocessing, model)


def _label(item: Any) -> int:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        return -1
    try:
        return int(item[1])
    except (TypeError, ValueError) as error:
        raise InputError(f"a label is {item[1]!r}; an integer is needed") from error


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pa.ChunkedArray) else column


def _rendered(tensor: torch.Tensor, preprocessing: Preprocessing) -> Image.Image:
    values = tensor.detach().double().cpu().numpy().transpose(1, 2, 0)
    if values.shape[2] == preprocessing.channels:
        values = values * np.array(preprocessing.std) + np.array(preprocessing.mean)
    else:
        values = values.mean(axis=2, keepdims=True)
        low, high = values.min(), values.max()
        values = (values - low) / (high - low if high > low else 1.0)
    pixels = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
