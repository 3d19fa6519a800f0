"""Analyse a screening class by class: maps to graph, spectrum, clusters, and how suspicious each cluster is.

A class depends on no other, and its result is one file that appears whole: a run that was killed goes on with the classes that have
none. Classes are spread over processes of one thread each, which on small classes is faster than threads within a class;
classes too large to be several in memory at once are done one after the other, with all threads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lrpfast.errors import InputError, NumericsError
from lrpfast.files import make_folder, remove_temporaries, replacing
from lrpfast.screening import discriminant
from lrpfast.screening import manifest as manifests
from lrpfast.screening.graph import nearest_neighbours, neighbour_count, neighbour_graph, normalise_maps
from lrpfast.screening.rank import Group, suspicious_groups
from lrpfast.screening.spectral import EIGENPAIRS, cluster, cluster_count, laplacian_spectrum
from lrpfast.screening.store import FOLDER, Store
from lrpfast.screening.threads import one_thread

_LARGE = 8192  # samples: such a class is done alone
_GROUP = tuple(field.name for field in dataclasses.fields(Group))
_FORMAT = 5  # of the files of classes; changed with what the analysis computes, so that old ones are made again


@dataclasses.dataclass(frozen=True)
class ClassAnalysis:
    """What the maps of a class look like.

    Parameters
    ----------
    clusters
        int32 [n], the cluster of each sample, numbered by falling size.
    eigenvalues
        float64 [m], the smallest of the graph's normalised Laplacian.
    embedding
        float32 [n, m], its eigenvectors.
    groups
        The most suspicious groups of maps, the first one first; they are no partition.
    """

    clusters: np.ndarray
    eigenvalues: np.ndarray
    embedding: np.ndarray
    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Options:
    """How classes are analysed: neighbours a map (None: `neighbour_count`), eigenpairs, and the seed of k-means."""

    neighbours: int | None = None
    eigenpairs: int = EIGENPAIRS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.neighbours is not None and self.neighbours < 1:
            raise InputError(f"neighbours is {self.neighbours}; it must be at least 1")
        if self.eigenpairs < 2:
            raise InputError(f"eigenpairs is {self.eigenpairs}; it must be at least 2")


def analyse_maps(
    maps: np.ndarray,
    options: Options = Options(),  # noqa: B008
    features: np.ndarray | None = None,
) -> ClassAnalysis:
    """Analyse the maps of one class (SpRAy, Lapuschkin et al. 2019).

    Parameters
    ----------
    maps
        [n, H, W] real, n ≥ 1.
    options
        See `Options`.
    features
        [n, C] real: the relevance of what the model's last layer reads. None, or C = 0: groups are told by the maps alone.

    Raises
    ------
    NumericsError
        NaN or infinity in a map, or in the features.
    """
    points = normalise_maps(maps)  # first, since it looks for NaN
    amounts = discriminant.amounts(maps)
    if features is not None and not np.isfinite(features).all():
        raise NumericsError("the relevance of features holds NaN or infinity")
    carrying = None if features is None else discriminant.carrying(features)
    return analyse_points(points, discriminant.blurred(amounts), amounts, options, carrying)


def analyse_points(
    points: np.ndarray,
    evidence: np.ndarray,
    maps: np.ndarray,
    options: Options = Options(),  # noqa: B008
    features: np.ndarray | None = None,
) -> ClassAnalysis:
    """Cluster any points [n, d], tell members by any evidence [n, e] or features [n, c], and say where by maps [n, H, W]; else as
    `analyse_maps`."""
    with one_thread() if len(points) <= _LARGE else contextlib.nullcontext():
        return _analyse_points(points, evidence, maps, options, features)


def _analyse_points(
    points: np.ndarray, evidence: np.ndarray, maps: np.ndarray, options: Options, features: np.ndarray | None
) -> ClassAnalysis:
    count = neighbour_count(len(points)) if options.neighbours is None else min(options.neighbours, len(points) - 1)
    graph = neighbour_graph(nearest_neighbours(points, count)[0])
    spectrum = laplacian_spectrum(graph, options.eigenpairs)
    chosen = cluster_count(spectrum.eigenvalues)
    clusters = cluster(spectrum, chosen, options.seed)
    levels = (cluster(spectrum, k, options.seed, starts=3) for k in range(2, len(spectrum.eigenvalues) + 1))
    size = (maps.shape[1], maps.shape[2])
    flat = maps.reshape(len(maps), -1)
    groups = suspicious_groups(normalise_maps(maps), flat, evidence, levels, size, features=features)
    return ClassAnalysis(clusters, spectrum.eigenvalues, spectrum.eigenvectors.astype(np.float32), tuple(groups))


def analyse(
    folder: str | os.PathLike[str],
    *,
    neighbours: int | None = None,
    eigenpairs: int = EIGENPAIRS,
    seed: int = 0,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Analyse all classes of a finished screening into `folder/analysis/`; those already there are kept.

    Parameters
    ----------
    folder
        Of the screening.
    neighbours, eigenpairs, seed
        See `Options`. With others than before, classes are analysed again.
    processes
        How many at once; None: as many as the process may use cores.
    progress
        Called with the number of classes done and of all.

    Raises
    ------
    ScreeningError
        There is no finished screening, or another process works on it.
    NumericsError
        A map holds NaN or infinity.
    OutputError
        Something cannot be written.
    """
    options = Options(neighbours, eigenpairs, seed)
    with manifests.locked(folder):
        store = Store(folder)
        make_folder(Path(folder, FOLDER))
        remove_temporaries(Path(folder, FOLDER))
        mark = _mark(store, options)
        labels = store.labels()
        todo = [label for label in labels if read_mark(folder, label) != mark]
        done = len(labels) - len(todo)
        if progress is not None:
            progress(done, len(labels))
        for _ in _run(store, todo, options, mark, processes or _cores()):
            done += 1
            if progress is not None:
                progress(done, len(labels))


def read_analysis(folder: str | os.PathLike[str], label: int) -> ClassAnalysis:
    """Read the analysis of a class.

    Raises
    ------
    InputError
        It was not analysed yet.
    """
    path = class_path(folder, label)
    try:
        with np.load(path) as file:
            groups = tuple(
                Group(**{name: _scalar_or_array(values[index]) for name, values in columns.items()})
                for columns in [{name: file[f"group_{name}"] for name in _GROUP}]
                for index in range(len(columns["members"]))
            )
            return ClassAnalysis(file["clusters"], file["eigenvalues"], file["embedding"], groups)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"class {label} of {folder} has no analysis that can be read ({error}); analyse it") from error


def read_current(store: Store, label: int) -> ClassAnalysis:
    """Read the analysis of a class of a store, as `read_analysis`.

    Raises
    ------
    InputError
        It was not analysed yet, or with other samples: shards were made again since.
    """
    found = read_analysis(store.folder, label)
    mark = read_mark(store.folder, label)
    # Earlier versions wrote down the screening and not its shards: the number of samples has to do.
    earlier = store.manifest.fingerprint in mark and len(found.clusters) == store.count(label)
    if not earlier and store.identity not in mark:
        raise InputError(
            f"class {label} of {store.folder} was analysed before shards were made again; analyse it again"
        )
    return found


def read_mark(folder: str | os.PathLike[str], label: int) -> str:
    """What the analysis of a class depended on; empty where there is none that can be read."""
    try:
        with np.load(class_path(folder, label)) as file:
            return str(file["mark"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return ""


def class_path(folder: str | os.PathLike[str], label: int) -> Path:
    """Where the analysis of a class is."""
    return Path(folder, FOLDER, f"class-{label:05d}.npz")


def _mark(store: Store, options: Options) -> str:
    """What an analysis depends on."""
    return json.dumps([_FORMAT, store.identity, dataclasses.asdict(options)])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _enough(classes: int, processes: int) -> bool:
    """Whether processes, which take seconds to start, are worth it."""
    return processes > 1 and classes >= 8 * processes


def _run(store: Store, labels: list[int], options: Options, mark: str, processes: int) -> Iterator[int]:
    """Analyse classes; yields each one that is done."""
    small = [label for label in labels if store.count(label) <= _LARGE]
    if _enough(len(small), processes):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        with concurrent.futures.ProcessPoolExecutor(
            processes, context, initializer=_start_worker, initargs=(store.folder,)
        ) as pool:
            tasks = [pool.submit(_work, label, options, mark) for label in small]
            try:
                for task in concurrent.futures.as_completed(tasks):
                    yield task.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        labels = [label for label in labels if store.count(label) > _LARGE]
    for label in labels:
        yield _analyse_class(store, label, options, mark)


_store: Store | None = None  # of a worker


def _start_worker(folder: Path) -> None:
    global _store
    _store = Store(folder)


def _work(label: int, options: Options, mark: str) -> int:
    assert _store is not None
    return _analyse_class(_store, label, options, mark)


def _analyse_class(store: Store, label: int, options: Options, mark: str) -> int:
    try:
        found = analyse_maps(store.maps(label), options, store.features(label))
    except NumericsError as error:
        raise NumericsError(f"class {label}: {error}") from error
    columns: dict[str, Any] = {
        f"group_{name}": np.array([getattr(group, name) for group in found.groups]) for name in _GROUP
    }
    with replacing(class_path(store.folder, label)) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            mark=mark,
            clusters=found.clusters,
            eigenvalues=found.eigenvalues,
            embedding=found.embedding,
            **columns,
        )
    return label


def _scalar_or_array(value: Any) -> Any:
    return value if isinstance(value, np.ndarray) else value.item()
