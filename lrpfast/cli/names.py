"""Names of results: two images of the same name, from different folders, must not overwrite each other's."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

_STEM_BYTES = 200  # of the 255 that file systems allow a name


def unique_stems(files: Sequence[Path]) -> dict[Path, str]:
    """Name the results of each file so that no two collide, also where upper and lower case are one.

    A file's stem where no other file has it; else with its suffix (cat-jpg, cat-png), or with as many folders in
    front as tell the files of that stem apart (home-cat, zoo-cat); a number behind where all this does not.
    """
    same_stem: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        same_stem[_stem(file, 0).casefold()].append(file)
    names: dict[Path, str] = {}
    for group in same_stem.values():
        most = 2 * max(len(file.absolute().parts) for file in group)
        level = next(
            (level for level in range(most) if len({_stem(file, level).casefold() for file in group}) == len(group)),
            most,
        )
        names |= {file: _stem(file, level) for file in group}
    taken: set[str] = set()
    for file in files:
        numbered = (names[file] if number == 1 else f"{names[file]}-{number}" for number in itertools.count(1))
        names[file] = next(name for name in numbered if name.casefold() not in taken)
        taken.add(names[file].casefold())
    return names


def _stem(file: Path, level: int) -> str:
    """Name a file in more and more detail: stem, stem-suffix, folder-stem, folder-stem-suffix, ..."""
    folders, with_suffix = divmod(level, 2)
    parts = [*file.absolute().parts[1:-1]][-folders:] if folders else []
    name = "-".join([*parts, file.stem, *([file.suffix[1:]] if with_suffix else [])])
    return os.fsencode(name)[-_STEM_BYTES:].decode(errors="ignore")


def count(number: int, one: str, several: str = "") -> str:
    """Say a number of things: 1 image, 1,000 images."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
