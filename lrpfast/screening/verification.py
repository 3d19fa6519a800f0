"""Try the most suspicious groups of each class on the model, and write down what was found.

The images come from the source again, a few dozen a class: the clearest members of a group, others of the class as a control,
and images of other classes to paste into. Which ones is fixed by the class's number, so that a run that was killed and one that was not
find the same. A class is one file; what is there is not done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrpfast.errors import InputError
from lrpfast.files import remove_temporaries, replacing
from lrpfast.screening import findings
from lrpfast.screening import manifest as manifests
from lrpfast.screening.analysis import read_current, read_mark
from lrpfast.screening.findings import Finding, effect_from_dict, effect_to_dict
from lrpfast.screening.rank import Group
from lrpfast.screening.sources import Source
from lrpfast.screening.store import FOLDER, Store
from lrpfast.screening.trial import Effect, Predict, try_region

MEMBERS, RECIPIENTS, CANDIDATES = 24, 192, 3
_FORMAT = 1


def verify(
    folder: str | os.PathLike[str],
    source: Source,
    model: Predict,
    *,
    candidates: int = CANDIDATES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Try the groups of an analysed screening on the model; write findings.json and findings.csv.

    Parameters
    ----------
    folder
        Of the screening, analysed.
    source
        Its samples: those that were explained.
    model
        Inputs [N, C, H, W] on the CPU to logits [N, classes]; what was explained, in eval mode.
    candidates
        Groups tried of each class, the most suspicious ones.
    progress
        Called with the number of classes done and of all.

    Returns
    -------
    list of Finding
        Of all classes, in their order: `findings.ranked`.

    Raises
    ------
    InputError
        A class was not analysed, or before shards were made again.
    ScreeningError
        There is no finished screening, another process works on it, or the source is another.
    OutputError
        Something cannot be written.
    """
    with manifests.locked(folder):
        store = Store(folder)
        manifests.check_source(folder, store.manifest, source.digest(), len(source))
        remove_temporaries(Path(folder, FOLDER))
        labels = store.labels()
        found: list[Finding] = []
        if progress is not None:
            progress(0, len(labels))
        for done, label in enumerate(labels, 1):
            found += _verify_class(store, source, model, label, candidates)
            if progress is not None:
                progress(done, len(labels))
        found, limit = findings.ranked(found)
        findings.write(folder, store.manifest, store.identity, found, len(labels), limit)
        return found


def trial_path(folder: str | os.PathLike[str], label: int) -> Path:
    """Where the trials of a class are."""
    return Path(folder, FOLDER, f"trial-{label:05d}.json")


def _verify_class(store: Store, source: Source, model: Predict, label: int, candidates: int) -> list[Finding]:
    groups = read_current(store, label).groups[:candidates]
    if not groups:
        return []
    path = trial_path(store.folder, label)
    mark = json.dumps([_FORMAT, read_mark(store.folder, label), candidates])
    effects = _read_trial(path, mark)
    table = store.columns(label)
    sample, paths = table["sample"].to_numpy(), table["path"].to_pylist()
    if effects is None:
        recipients = _images(source, _recipients(store, label), RECIPIENTS)
        effects = [_try_group(source, model, label, group, sample, recipients) for group in groups]
        content = {"mark": mark, "effects": [None if e is None else effect_to_dict(e) for e in effects]}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return [
        Finding(label, number, group, effect, sample, paths)
        for number, (group, effect) in enumerate(zip(groups, effects, strict=True))
        if effect is not None
    ]


def _read_trial(path: Path, mark: str) -> list[Effect | None] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["mark"] != mark:
            return None
        return [None if fields is None else effect_from_dict(fields) for fields in content["effects"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _recipients(store: Store, label: int) -> Iterable[int]:
    """Samples of other classes that the model does not take for this one, in a random order; no more than are ever needed."""
    table = store.columns()
    other = table["target"].to_numpy() != label
    other &= (table["label"].to_numpy() != label) & (table["prediction"].to_numpy() != label)
    rng = np.random.default_rng(label)
    rows = np.flatnonzero(other)
    chosen = rng.choice(rows, min(len(rows), 2 * RECIPIENTS), replace=False)
    return table["sample"].to_numpy()[chosen].tolist()


def _try_group(
    source: Source, model: Predict, label: int, group: Group, sample: np.ndarray, recipients: Tensor | None
) -> Effect | None:
    """None where too few images can still be read, or there is nothing to paste into."""
    members = np.flatnonzero(group.members)
    members = members[np.argsort(-group.score[members], kind="stable")]
    rest = np.random.default_rng(label).permutation(np.flatnonzero(~group.members))
    own = _images(source, sample[members].tolist(), MEMBERS)
    if own is None or recipients is None:
        return None
    foreign = _images(source, sample[rest].tolist(), RECIPIENTS)
    return try_region(model, group.region, label, own, own[:0] if foreign is None else foreign, recipients, seed=label)


def _images(source: Source, samples: Iterable[int], most: int) -> Tensor | None:
    """The first `most` samples that can be read and have the shape of the first, stacked; None where there is none."""
    found: list[Tensor] = []
    for sample in samples:
        if len(found) == most:
            break
        try:
            tensor = source.tensor(sample)
        except InputError:
            continue  # a file that vanished since it was explained: others stand in
        if not found or tensor.shape == found[0].shape:
            found.append(tensor)
    return torch.stack(found) if found else None
