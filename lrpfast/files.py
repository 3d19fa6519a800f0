"""Files appear whole or not at all.

An explanation of a thousand images can be interrupted at any moment, by a full disk, a signal or an error in image
731. What was written until then must be usable, so every file is written to a temporary name in its own folder and
renamed when complete.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lrpfast.errors import OutputError

_TEMPORARY = ".lrpfast-"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` when the block succeeds, remove it when it does not.

    Parameters
    ----------
    path
        Where the complete file is to appear. Its folder must exist; an existing file is replaced in one step.
    durable
        Whether the file is brought to the disk before it is renamed, and its name after, so that it is complete even when the
        machine stops.

    Raises
    ------
    OutputError
        The file cannot be written (an `OSError` within the block, or of the renaming).
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
    # Short whatever the length of `path.name`, hidden from globs; the suffix stays because writers read the format
    # from it.
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        if durable:
            _to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            _to_disk(path.parent)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: str | os.PathLike[str]) -> None:
    """Remove what `replacing` left in `folder` where its process was killed. No other process may be writing there."""
    for left in Path(folder).glob(f"{_TEMPORARY}*"):
        left.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Find out whether files can be made in `folder`, or the folder itself be made, and leave nothing behind.

    Raises
    ------
    OutputError
        Saying which folder and why. Permission bits alone are no answer (read-only mounts, quotas), so it tries.
    """
    folder = Path(folder).absolute()
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"the output folder {folder} cannot be used: {existing} is not a folder")
    probe = existing / f".lrpfast-{secrets.token_hex(8)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the output folder {folder} cannot be written: {error.strerror or error} ({existing})"
        ) from error


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` and its parents where they are absent.

    Raises
    ------
    OutputError
        It cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the output folder {folder} cannot be made: {error.strerror or error}") from error
    return folder
