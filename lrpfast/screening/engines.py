"""Where the work is done: on this machine, decoding in processes beside the explaining one; or on a Ray cluster.

Both run the same callable, `PooledExplainer`, on batches of the same form, and give its rows to the one process that writes shards. An
engine may give rows in any order and more than once; what is written is for `shards.Collector` to decide.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from lrpfast.errors import LrpfastError, ScreeningError
from lrpfast.screening import missing
from lrpfast.screening.pooled import Columns, PooledExplainer, Pooling, decode
from lrpfast.screening.recipes import Runnable
from lrpfast.screening.sources import Source

ENGINES = ("local", "ray")
_AHEAD = 4  # batches that each process decodes in advance
_BLOCK = 2  # batches that a task of Ray decodes, and a replica takes at once


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to do.

    Parameters
    ----------
    source, shape
        The samples, and the shape [C, H, W] that each has.
    build, pooling
        What explains, and how its maps are pooled.
    shards
        The positions of each shard that is to be made.
    batch_size
        Samples explained at once.
    workers
        local: processes that decode, 0 for none beside the one that explains. ray: replicas that explain. None: as fits the machine.
    """

    source: Source
    shape: tuple[int, ...]
    build: Callable[[], Runnable]
    pooling: Pooling
    shards: Sequence[range]
    batch_size: int
    workers: int | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """Rows that were explained, and the seconds that the explaining waited for them to be decoded; None: not known.

    The first ones have no rows: the engine is ready.
    """

    rows: Columns
    waited: float | None


_READY = Done({}, None)


def run(engine: str, work: Work) -> Generator[Done, None, None]:
    """Do the work with an engine, "local" or "ray".

    Raises
    ------
    ScreeningError
        There is no such engine, or one of its processes died.
    MissingDependencyError
        Ray is not installed.
    """
    if engine not in ENGINES:
        raise ScreeningError(f"there is no engine {engine!r}; there are {', '.join(ENGINES)}")
    return local(work) if engine == "local" else on_ray(work)


class _Batches(Dataset[Columns]):
    """Decoded batches, by the positions in them."""

    def __init__(self, source: Source, shape: tuple[int, ...]) -> None:
        self._source, self._shape = source, shape

    def __getitem__(self, positions: Any) -> Columns:
        return decode(self._source, positions, self._shape)


def local(work: Work) -> Generator[Done, None, None]:
    """Do the work here: a DataLoader decodes in processes of its own while this one explains. Raises as `run`."""
    explain = PooledExplainer(work.build, work.pooling)
    on_gpu = explain.device.type == "cuda"
    workers = _decoders(on_gpu) if work.workers is None else work.workers
    batches = [
        [*shard[start : start + work.batch_size]]
        for shard in work.shards
        for start in range(0, len(shard), work.batch_size)
    ]
    loader = DataLoader(
        _Batches(work.source, work.shape),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        collate_fn=_as_it_is,
        pin_memory=on_gpu,
        worker_init_fn=_silent_when_cut_off,
    )
    yield _READY
    began = time.perf_counter()
    for batch in loader:
        waited = time.perf_counter() - began
        yield Done(explain(batch), waited)
        began = time.perf_counter()


@contextlib.contextmanager
def telling_of_lost_workers() -> Iterator[None]:
    """Say in words what torch raises where a decoding process dies: from a signal's handler, so anywhere in the main thread."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or isinstance(error, LrpfastError):
            raise
        raise ScreeningError(
            f"a process that reads images died ({str(error).partition(chr(10))[0]}); where memory ran out, lower --workers or "
            "--batch-size. What was written is complete: start again to go on"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _silent_when_cut_off(_: int) -> None:
    """Let a process that decodes be silent where the explaining one is interrupted, which ends it and says so itself.

    Tensors are handed over by a thread of Python's, which prints a traceback where the other side goes away in the middle.
    """
    tell = sys.excepthook

    def tell_unless_cut_off(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not isinstance(error, (EOFError, ConnectionError)):
            tell(kind, error, where)

    sys.excepthook = tell_unless_cut_off


def _decoders(on_gpu: bool) -> int:
    """How many processes decode: a CPU that explains has few cores to spare, and decodes twenty images in the time of one map."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(16, cores - 1)) if on_gpu else max(1, cores // 8)


def on_ray(work: Work) -> Generator[Done, None, None]:
    """Do the work on a Ray cluster: that of RAY_ADDRESS, or one that is there, or one on this machine. Raises as `run`.

    Tasks decode, replicas explain: one on each GPU, or, without any, one on each CPU slot but those that decode. Where a process or
    a machine is lost, Ray does its tasks again elsewhere.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise missing(error) from error
    own = not ray.is_initialized()
    if own:
        # The modules of this process, for those of the cluster.
        environment = {"PYTHONPATH": os.pathsep.join(place for place in (os.getcwd(), *sys.path) if place)}
        ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": environment})
    try:
        yield from _stream(ray, work)
    except ray.exceptions.RayError as error:
        cause = _cause(error)
        if isinstance(cause, LrpfastError):
            raise cause from error
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise ScreeningError(
            f"the Ray cluster failed: {told[-1]}. What was written is complete: start again to go on"
        ) from error
    finally:
        if own:
            ray.shutdown()


def _stream(ray: Any, work: Work) -> Iterator[Done]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    positions = np.concatenate([np.arange(shard.start, shard.stop) for shard in work.shards])
    replicas, slot, share = _slots(ray.cluster_resources(), work.workers)
    read = functools.partial(_decoded, ray.put(work.source), ray.put(positions), work.shape)
    rows = (
        ray.data.range(len(positions), override_num_blocks=-(-len(positions) // (_BLOCK * work.batch_size)))
        .map_batches(read, batch_size=work.batch_size, num_cpus=share)
        .map_batches(
            _Replica,
            fn_constructor_args=(work.build, work.pooling),
            batch_size=work.batch_size,
            compute=ray.data.ActorPoolStrategy(size=replicas),
            **slot,
        )
    )
    yield _READY
    for batch in rows.iter_batches(batch_size=None, batch_format="numpy"):
        yield Done({name: [*v] if name in ("path", "reason") else np.asarray(v) for name, v in batch.items()}, None)


def _slots(there: dict[str, float], asked: int | None) -> tuple[int, dict[str, float], float]:
    """How many replicas, what each takes, and how many CPUs a task that decodes takes.

    Some CPUs stay for decoding, or nothing would ever reach a replica. The shares differ, lest Ray run both steps as one, one after the
    other. Beside replicas on CPUs decoding is little work.
    """
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    if gpus:
        return asked or gpus, {"num_gpus": 1.0, "num_cpus": 0.5}, 1.0
    replicas = asked or max(1, cpus - max(1, cpus // 8))
    return replicas, {"num_cpus": min(1.0, (cpus - 0.5) / replicas)}, 0.25


@functools.lru_cache(maxsize=4)
def _fetched(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _decoded(source: Any, positions: Any, shape: tuple[int, ...], batch: dict[str, np.ndarray]) -> dict[str, Any]:
    torch.set_num_threads(1)
    read = decode(_fetched(source), _fetched(positions)[batch["id"]].tolist(), shape)
    return _columns({**read, "image": read["image"].numpy()})


class _Replica:
    """`PooledExplainer` as Ray calls it."""

    def __init__(self, build: Callable[[], Runnable], pooling: Pooling) -> None:
        self._explain = PooledExplainer(build, pooling)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _columns(self._explain({**batch, "image": np.array(batch["image"])}))


def _columns(rows: Columns) -> dict[str, Any]:
    return {name: np.array(v, dtype=object) if isinstance(v, list) else v for name, v in rows.items()}


def _cause(error: BaseException) -> BaseException | None:
    """The first error of ours among the causes."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, LrpfastError):
        seen = getattr(seen, "cause", None) or seen.__cause__
    return seen
