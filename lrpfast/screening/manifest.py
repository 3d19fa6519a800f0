"""The folder of a screening: what it is a screening of, and who may write to it.

A screening goes on for days, on machines that are stopped, with commands that are typed again. So the folder says what it holds:
`manifest.json` has everything that its maps depend on, readable, and the fingerprint of it all. Who comes with other settings is
refused, and told which ones differ. What may change from run to run (the batch size, the device, the number of workers) is not in it.

The lock is a POSIX record lock, not `flock`: it is not inherited by the processes that decode images, so it ends with the process
that holds it, also when that one is killed and its children live on for some seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from lrpfast.errors import OutputError, ScreeningError
from lrpfast.files import make_folder, remove_temporaries, replacing
from lrpfast.screening.schema import ClassInfo

FORMAT = 2
NAME = "manifest.json"
_LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a screening is of.

    Parameters
    ----------
    settings
        What is explained and how: data, target, seed, composite, precision. As JSON holds it.
    model
        The model: its spec, the digest of its weights, the number of its outputs, its preprocessing.
    classes
        The classes, by their index among the outputs.
    height, width
        Of the maps.
    samples, shard_size
        How many samples the source has, and how many positions each shard takes.
    listing
        Digest of the list of samples.
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    classes: tuple[ClassInfo, ...]
    height: int
    width: int
    samples: int
    shard_size: int
    listing: str

    @property
    def fingerprint(self) -> str:
        """Digest of everything that the maps depend on, 32 hexadecimal digits."""
        return hashlib.blake2b(json.dumps(self._known(), sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def shards(self) -> int:
        """How many shards there are when all is explained."""
        return -(-self.samples // self.shard_size)

    def positions(self, shard: int) -> range:
        """The samples of a shard, as positions in the source."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.samples))

    def to_dict(self) -> dict[str, Any]:
        """Return it as `manifest.json` holds it."""
        return {"format": FORMAT, "fingerprint": self.fingerprint, **self._known()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Manifest:
        """Undo `to_dict`. Raises `KeyError` or `TypeError` where the fields are others."""
        return cls(
            settings=fields["settings"],
            model=fields["model"],
            classes=tuple(ClassInfo(**entry) for entry in fields["classes"]),
            height=fields["map"]["height"],
            width=fields["map"]["width"],
            samples=fields["samples"],
            shard_size=fields["shard_size"],
            listing=fields["listing"],
        )

    def _known(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "model": self.model,
            "classes": [dataclasses.asdict(entry) for entry in self.classes],
            "map": {"height": self.height, "width": self.width},
            "samples": self.samples,
            "shard_size": self.shard_size,
            "listing": self.listing,
        }


def shard_path(folder: str | os.PathLike[str], shard: int) -> Path:
    """Where a shard is."""
    return Path(folder, "shards", f"shard-{shard:06d}.parquet")


def read(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a screening.

    Raises
    ------
    ScreeningError
        The folder holds no screening, one of another version of lrpfast, or a manifest that was changed.
    """
    path = Path(folder, NAME)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ScreeningError(
                f"{folder} holds a screening of format {fields['format']}, this lrpfast reads {FORMAT}; use the version that wrote it"
            )
        manifest = Manifest.from_dict(fields)
        told = fields["fingerprint"]
    except FileNotFoundError as error:
        raise ScreeningError(f"{folder} holds no screening: there is no {path}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ScreeningError(f"{path} cannot be read as the manifest of a screening: {error}") from error
    if manifest.fingerprint != told:
        raise ScreeningError(f"{path} was changed: its fingerprint is {manifest.fingerprint}, and it says {told}")
    return manifest


def begin(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Make `folder` the place of a screening, or find that it is already; call it within `locked`.

    Raises
    ------
    ScreeningError
        It holds another screening; the message says what differs.
    OutputError
        It cannot be written.
    """
    folder = Path(folder)
    if (folder / NAME).exists():
        check(folder, manifest)
    else:
        make_folder(folder / "shards")
        with replacing(folder / NAME, durable=True) as temporary:
            temporary.write_text(json.dumps(manifest.to_dict(), indent=1) + "\n", encoding="utf-8")
    remove_temporaries(folder)
    remove_temporaries(folder / "shards")


def check(folder: str | os.PathLike[str], manifest: Manifest) -> None:
    """Find that `folder` holds this screening.

    Raises
    ------
    ScreeningError
        It holds none, or another one; the message says what differs.
    """
    there = read(folder)
    if there.fingerprint != manifest.fingerprint:
        raise ScreeningError(
            f"{folder} holds a screening with other settings, and the two must not mix: "
            f"{'; '.join(_differences(there, manifest))}. Give the same settings to go on with it, or another folder"
        )


def check_source(folder: str | os.PathLike[str], manifest: Manifest, digest: str, samples: int) -> None:
    """Find that samples, given by their number and digest, are those that the screening in `folder` explained.

    Raises
    ------
    ScreeningError
        They are others: their images would stand for samples that were not looked at.
    """
    if digest != manifest.listing:
        raise ScreeningError(
            f"the source is not what {folder} explained: {samples} samples, there {manifest.samples}, or other paths or labels; "
            "give that source, or start the screening of this one in another folder"
        )


def _differences(there: Manifest, asked: Manifest) -> list[str]:
    """Say in words what differs, the settings that a person chose first."""
    before, after = _flat(there._known()), _flat(asked._known())
    keys = [key for key in (*before, *(k for k in after if k not in before)) if before.get(key) != after.get(key)]
    said = [
        f"{key} is {_short(before.get(key))} there and {_short(after.get(key))} now"
        for key in keys
        if not key.startswith("classes") and key not in ("listing", "model.digest", "model.categories")
    ]
    if "model.digest" in keys:
        said.append("the model has other weights")
    if "listing" in keys:
        said.append("the data are others")
    if any(key.startswith("classes") or key == "model.categories" for key in keys):
        said.append("the classes are others")
    return said


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix.removeprefix('settings.')}{key}"] = value
    return flat


def _short(value: Any) -> str:
    """Write a setting; text whole, since paths differ at their end."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 or isinstance(value, str) else f"{text[:77]}..."


# Locks that this process holds, by real path: the thread and how many times. A record lock cannot tell two runs in one process apart.
_held: dict[str, tuple[int, int]] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the folder for this process; within it, again.

    Raises
    ------
    ScreeningError
        Another process, or another thread of this one, holds it; the message says which.
    OutputError
        The folder cannot be made or written.
    """
    folder = make_folder(folder)
    key = os.path.realpath(folder)
    thread = threading.get_ident()
    with _guard:
        owner, depth = _held.get(key, (thread, 0))
        if owner != thread:
            raise ScreeningError(f"{folder} is in use by another thread of this process")
        file = _lock(folder) if depth == 0 else None
        _held[key] = (thread, depth + 1)
    try:
        yield
    finally:
        with _guard:
            _held[key] = (thread, depth)
            if file is not None:
                del _held[key]
                file.close()


def _lock(folder: Path) -> IO[str]:
    path = folder / _LOCK
    try:
        # Open as long as the lock is held.
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read() or "another process"
        file.close()
        raise ScreeningError(
            f"{folder} is in use by {holder}; wait until it is done, or end it and start this again"
        ) from error
    except OSError as error:
        file.close()
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return file
