"""Tune: choose between ways to compute a step by timing them here, once, and remember the choice on disk.

Which way is fastest depends on the processor or GPU, the threads, the shapes and the libraries' versions, so a choice is kept under all
of these. All ways give the same result to rounding. The file can be deleted, damaged, or written by several processes at once: what is
not in it is timed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lrpfast.files import replacing
from lrpfast.ops import native

_ROUNDS = 5
_ROUNDS_ON_GPU = 21
_L2_BYTES = 2**26  # more than the level-2 cache of an H100 holds
# The first way is the one that is expected to win: another must be faster by more than timing scatters.
_ADVANTAGE = 0.97


def cache_directory() -> Path:
    """LRPFAST_CACHE_DIR, or ``lrpfast`` in the user's cache folder."""
    given = os.environ.get("LRPFAST_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lrpfast"


class Tuner:
    """Chooses, and remembers.

    Parameters
    ----------
    directory
        Where the file is; by default the user's cache folder.
    device
        What is timed on; by default the CPU. Each has its own file, a GPU by its name.

    Attributes
    ----------
    choices
        What was asked for so far: key -> (way, seconds of each way).
    """

    def __init__(self, directory: Path | None = None, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        self._path = (directory or cache_directory()) / f"{self._device.type}-{_machine(self._device)}.json"
        self._known = _read(self._path)
        self._new: dict[str, dict[str, Any]] = {}
        self.choices: dict[str, dict[str, Any]] = {}

    def choose(self, key: str, ways: Callable[[], Mapping[str, Callable[[], object]]]) -> str:
        """The name of the fastest of some ways; they are made and timed where the choice is not known.

        Parameters
        ----------
        key
            What is computed: operation, shapes, dtypes.
        ways
            Makes the calls, by name; the first is taken unless another is clearly faster.
        """
        entry = self._known.get(key)
        if entry is None:
            calls = ways()
            seconds = _time(calls) if self._device.type == "cpu" else _time_on(self._device, calls)
            first = next(iter(calls))
            best = min(seconds, key=lambda name: seconds[name])
            entry = {"way": best if seconds[best] < _ADVANTAGE * seconds[first] else first, "seconds": seconds}
            self._known[key] = self._new[key] = entry
        self.choices[key] = entry
        return entry["way"]

    def save(self) -> None:
        """Add the new choices to the file. Where it cannot be written, they last as long as the process."""
        if not self._new:
            return
        with suppress(OSError), _locked(self._path):
            merged = {**_read(self._path), **self._new}
            content = {"machine": _describe(self._device), "choices": merged}
            with replacing(self._path) as temporary:
                temporary.write_text(json.dumps(content, indent=1))
        self._new = {}


def _time(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each, interleaved."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def _time_on(device: torch.device, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each on a GPU, interleaved, by events on its stream; the level-2 cache is overwritten before each."""
    flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device=device)
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        for _ in range(_ROUNDS_ON_GPU):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                begin.record()
                call()
                end.record()
                end.synchronize()
                taken[name].append(begin.elapsed_time(end) / 1000)
    return {name: statistics.median(values) for name, values in taken.items()}


def _describe(device: torch.device) -> dict[str, Any]:
    return _describe_cpu() if device.type == "cpu" else _describe_gpu(device)


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    import triton

    import lrpfast

    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "lrpfast": lrpfast.__version__,
    }


def _describe_cpu() -> dict[str, Any]:
    import lrpfast

    return {
        "processor": _processor(),
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "onednn": torch.backends.mkldnn.is_available() and torch.__config__.show().partition("MKL-DNN v")[2][:6],
        "lrpfast": lrpfast.__version__,
    }


def _machine(device: torch.device) -> str:
    return hashlib.sha256(json.dumps(_describe(device), sort_keys=True).encode()).hexdigest()[:16]


def _instructions() -> str:
    """What kernels may use of the processor's: ours, and oneDNN's, which takes its own limit from the environment."""
    ours = "none" if native.extension is None else native.extension.cpu_capability()
    return f"{ours}, oneDNN {os.environ.get('ONEDNN_MAX_CPU_ISA', 'all')}"


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    kept = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "; ".join(line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() in kept)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The choices in a file; none where it is missing, damaged or of another form."""
    try:
        choices = json.loads(path.read_text())["choices"]
        return {
            str(key): {"way": str(entry["way"]), "seconds": {str(k): float(v) for k, v in entry["seconds"].items()}}
            for key, entry in choices.items()
            if entry["way"] in entry["seconds"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


@contextmanager
def _locked(path: Path) -> Any:
    """One process at a time between reading and replacing the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except ImportError:  # not POSIX: a choice may then be lost, and is timed again
            pass
        yield
