"""What a screening found: groups of samples with what the model did in the trial, the most certain verified effect first.

A finding is flagged where two things hold: its members lie far from the rest of their class, twice as far as the
farthest groups of most classes do, and pasting surely moves predictions. Either alone is not enough: an object's own parts move
predictions too, and a rare mode of a class that decides nothing lies far away. So flagged findings, which come first, are ordered by
both: distance times the square root of the lower end of the effect's interval. An effect seen in few trials does not stand
before a smaller one that is certain, nor a group that chance may just have made before one far beyond it. The others
follow by distance, as what is most worth a look.

`findings.json` holds everything, `findings.csv` one row a finding for a spreadsheet.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lrpfast.errors import ScreeningError
from lrpfast.files import replacing
from lrpfast.screening.intervals import Estimate
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.rank import Group
from lrpfast.screening.schema import ClassInfo
from lrpfast.screening.trial import Effect

# The limits of a flag, chosen on the tuning runs of benchmarks/clever_hans.py: times the distance of the median class's farthest group,
# or, of fewer classes than can tell that, standard deviations; and share of other images. The least limit, below that of any of
# those runs, is for classes of a few images, which have no group that is far.
_TIMES, _LEAST, _ALONE, _CLASSES = 2.0, 8.0, 13.0, 8
FLAG_EFFECT = 0.05
JSON, CSV = "findings.json", "findings.csv"
_FORMAT = 3
_EXAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Finding:
    """A group of samples of a class, and the trial of its region.

    Parameters
    ----------
    label
        The class.
    number
        Of the group within the class, by suspicion.
    group
        The group.
    effect
        What the model did.
    sample
        int64 [n], all samples of the class, in the order of `group.members`.
    paths
        n strings.
    flagged
        Whether it is a finding to act on, which `ranked` tells.
    """

    label: int
    number: int
    group: Group
    effect: Effect
    sample: np.ndarray
    paths: list[str]
    flagged: bool = False

    @property
    def typical(self) -> np.ndarray:
        """int64, positions of the members within the class, the clearest first."""
        members = np.flatnonzero(self.group.members)
        return members[np.argsort(-self.group.score[members], kind="stable")]


def flag_distance(farthest: Sequence[float]) -> float:
    """From what distance on a group can be flagged.

    How far a group by chance lies from its class depends on the images: a few drawings that are alike lie farther than any digits do.
    Most classes have no artefact, so that the median class tells it, where there are eight or more.

    Parameters
    ----------
    farthest
        Of each class with groups the distance of the farthest one.

    Returns
    -------
    float
        Standard deviations, to one decimal: twice the median, at least 8.
    """
    return round(max(_LEAST, _TIMES * float(np.median(farthest))), 1) if len(farthest) >= _CLASSES else _ALONE


def is_flagged(distance: float, effect: Effect, limit: float) -> bool:
    """Whether a group at this distance, with this effect, is a finding to act on; `limit` is `flag_distance` of the screening."""
    return distance >= limit and effect.moved.low > FLAG_EFFECT


def strength(distance: float, effect: Effect, limit: float) -> tuple[bool, float]:
    """What findings are ordered by, larger first."""
    flagged = is_flagged(distance, effect, limit)
    return (flagged, distance * math.sqrt(effect.moved.low) if flagged else distance)


def ranked(found: Sequence[Finding]) -> tuple[list[Finding], float]:
    """The findings of all classes, flagged and in their order, and the `flag_distance` of them."""
    farthest: dict[int, float] = {}
    for one in found:
        farthest[one.label] = max(one.group.distance, farthest.get(one.label, 0.0))
    limit = flag_distance([*farthest.values()])
    order = sorted(found, key=lambda one: strength(one.group.distance, one.effect, limit), reverse=True)
    return [dataclasses.replace(one, flagged=is_flagged(one.group.distance, one.effect, limit)) for one in order], limit


def write(
    folder: str | os.PathLike[str], manifest: Manifest, shards: str, found: list[Finding], classes: int, limit: float
) -> None:
    """Write findings.json and findings.csv of what `ranked` gave; `classes` were analysed, of shards of that identity.

    Raises
    ------
    OutputError
        They cannot be written.
    """
    names = {entry.index: entry for entry in manifest.classes}
    entries = [_entry(rank, finding, names) for rank, finding in enumerate(found, 1)]
    content = {
        "format": _FORMAT,
        "fingerprint": manifest.fingerprint,
        "shards": shards,
        "model": manifest.model.get("spec"),
        "settings": manifest.settings,
        "samples": manifest.samples,
        "classes_analysed": classes,
        "flag": {"distance": limit, "effect": FLAG_EFFECT},
        "findings": entries,
    }
    with replacing(Path(folder, JSON)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    with replacing(Path(folder, CSV)) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(_COLUMNS)
        table.writerows(_row(entry) for entry in entries)


def read(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read findings.json.

    Raises
    ------
    ScreeningError
        It is not there or not of this version.
    """
    path = Path(folder, JSON)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, and this lrpfast reads {_FORMAT}")
    except FileNotFoundError as error:
        raise ScreeningError(f"{folder} has no findings yet; start the screening again to complete it") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScreeningError(f"{path} cannot be read: {error}") from error
    return content


def _entry(rank: int, finding: Finding, names: dict[int, ClassInfo]) -> dict[str, Any]:
    group = finding.group
    info = names.get(finding.label, ClassInfo(finding.label, str(finding.label)))
    typical = finding.typical
    return {
        "rank": rank,
        "flagged": finding.flagged,
        "class": dataclasses.asdict(info),
        "group": finding.number,
        "size": group.size,
        "class_size": len(finding.sample),
        "share": group.size / len(finding.sample),
        "distance": group.distance,
        "told_by": "features" if group.by_features else "maps",
        "suspicion": {
            "total": group.suspicion,
            "smallness": group.smallness,
            "compactness": group.compactness,
            "concentration": group.concentration,
            "separation": group.separation,
        },
        "region": {
            "height": group.region.shape[0],
            "width": group.region.shape[1],
            "cells": np.argwhere(group.region).tolist(),
        },
        "effect": effect_to_dict(finding.effect),
        "examples": [
            {
                "sample": int(finding.sample[at]),
                "path": finding.paths[at],
                "score": round(float(group.score[at]), 2),
            }
            for at in typical[:_EXAMPLES]
        ],
        "samples": finding.sample[typical].tolist(),
    }


_ESTIMATES = ("score_fall", "random_fall", "occlusion", "pasted", "control", "moved")
_COLUMNS = [
    "rank", "flagged", "class_index", "class_name", "word_net_id", "group", "size", "class_size", "share", "suspicion", "distance",
    "told_by", *(f"{name}{end}" for name in _ESTIMATES for end in ("", "_low", "_high")), "members_tried", "recipients", "example",
]  # fmt: skip


def _row(entry: dict[str, Any]) -> list[Any]:
    effect = entry["effect"]
    estimates = [effect[name][end] for name in _ESTIMATES for end in ("value", "low", "high")]
    kind = entry["class"]
    example = entry["examples"][0]["path"] if entry["examples"] else ""
    return [
        entry["rank"], entry["flagged"], kind["index"], kind["name"], kind["word_net_id"] or "", entry["group"],
        entry["size"], entry["class_size"], entry["share"], entry["suspicion"]["total"], entry["distance"], entry["told_by"], *estimates,
        effect["members"], effect["recipients"], example,
    ]  # fmt: skip


def effect_to_dict(effect: Effect) -> dict[str, Any]:
    """As JSON holds it: the end of an interval that has none is null."""
    out: dict[str, Any] = {"members": effect.members, "recipients": effect.recipients}
    for name in _ESTIMATES:
        values = dataclasses.asdict(getattr(effect, name))
        out[name] = {end: value if math.isfinite(value) else None for end, value in values.items()}
    return out


def effect_from_dict(fields: dict[str, Any]) -> Effect:
    """Undo `effect_to_dict`. Raises `KeyError` or `TypeError` where the fields are others."""
    open_ends = {"low": -math.inf, "high": math.inf, "value": math.nan}
    estimates = {
        name: Estimate(**{end: open_ends[end] if value is None else value for end, value in fields[name].items()})
        for name in _ESTIMATES
    }
    return Effect(members=fields["members"], recipients=fields["recipients"], **estimates)
