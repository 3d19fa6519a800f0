"""The report: one HTML file that shows what was found to somebody who was not there.

It opens with the answer, then ranks the classes, then shows for each what stands behind its rank: images with their maps, what the
model did when the region was covered and pasted, the class as a scatter, its eigenvalues. Everything is inside the file; nothing is
fetched, so it can be mailed and opened in ten years. The page is readable without scripts; they add hovering and zooming.

Whatever comes from the data, a path or the name of a class, is escaped by the template engine.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from lrpfast import __version__, viz
from lrpfast.errors import InputError, LrpfastError, ScreeningError
from lrpfast.files import replacing
from lrpfast.screening import embed, findings
from lrpfast.screening.analysis import ClassAnalysis, read_current, read_mark
from lrpfast.screening.manifest import check_source
from lrpfast.screening.rank import class_score
from lrpfast.screening.sources import Source, reopen
from lrpfast.screening.spectral import cluster_count
from lrpfast.screening.store import FOLDER, Store

NAME = "report.html"
CLASSES = 20  # shown with images
_RANKED = 200  # rows of the ranking
_IMAGES = 8  # of a group
_OTHERS = 4  # of the rest of the class, to compare
_THUMBNAIL = 112


def write_report(
    folder: str | os.PathLike[str], source: Source | None = None, *, classes: int = CLASSES, images: int = _IMAGES
) -> Path:
    """Write `folder/report.html` from findings.json and the analysis.

    Parameters
    ----------
    folder
        Of the screening, verified.
    source
        Its samples, for the images; None: opened again. Where they are gone, the report has maps alone and says so.
    classes
        How many classes are shown with images, the first in the ranking.
    images
        How many of each group.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    ScreeningError
        There is no finished screening with findings, shards were made again since, or the source is another.
    InputError
        A class was not analysed, or before shards were made again.
    OutputError
        The report cannot be written.
    """
    content = findings.read(folder)
    store = Store(folder)
    # Earlier versions did not write down the shards.
    if content.get("shards", store.identity) != store.identity:
        raise ScreeningError(
            f"the findings of {folder} are of shards that were made again since; start the screening again to complete it"
        )
    note = ""
    if source is not None:
        check_source(folder, store.manifest, source.digest(), len(source))
    else:
        try:
            source = reopen(folder)
        except LrpfastError as error:
            note = f"The images are not shown: {error}."
    ranking = rank_classes(content["findings"])
    shown = [_class_section(store, source, entries, images) for entries in ranking[:classes]]
    text = _environment().get_template("report.html.j2").render(
        version=__version__,
        content=content,
        title=f"Screening of {content['model']}",
        ranking=ranking[:_RANKED],
        beyond=max(0, len(ranking) - _RANKED),
        flagged=[entries for entries in ranking if entries[0]["flagged"]],
        near=_count_effects(content),
        shown=shown,
        thumbnails={s["label"]: s["thumbnail"] for s in shown},
        shown_labels={section["label"] for section in shown},
        skipped=content["samples"] - store.columns().num_rows,
        quiet=content["classes_analysed"] - len(ranking),
        note=note,
        data=[section["plot"] for section in shown],
    )  # fmt: skip
    path = Path(folder, NAME)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def rank_classes(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Group findings, in their order, by class: a class stands where its first finding does."""
    by_class: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        by_class.setdefault(entry["class"]["index"], []).append(entry)
    return list(by_class.values())


def _count_effects(content: dict[str, Any]) -> int:
    """How many groups surely move predictions, be they far from their class or not."""
    lows = [entry["effect"]["moved"]["low"] for entry in content["findings"]]
    return sum(low is not None and low > content["flag"]["effect"] for low in lows)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lrpfast.screening"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "nats": _nats, "bar": _bar}
    environment.filters["shown"] = lambda value, form: percent(value) if form == "percent" else _nats(value)
    return environment


def percent(share: float | None) -> str:
    """A share as the page says it: 31%, 5.2%; a dash where it is not known."""
    if share is None:
        return "–"
    text = f"{100 * share:.0f}%" if abs(share) >= 0.0995 else f"{100 * share:.2g}%"
    return text.replace("-", "−")


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}".replace("-", "−")


def _bar(estimate: dict[str, float | None], low: float, high: float) -> dict[str, float]:
    """Where a bar from 0, and its interval, stand on a scale from `low` to `high`; in percent."""

    def place(value: float | None, otherwise: float) -> float:
        at = otherwise if value is None else value
        return 100 * (min(max(at, low), high) - low) / (high - low)

    zero, value = place(0.0, 0.0), place(estimate["value"], 0.0)
    start, stop = place(estimate["low"], low), place(estimate["high"], high)
    return {"left": min(zero, value), "width": abs(value - zero), "start": start, "extent": stop - start, "zero": zero}


def _class_section(store: Store, source: Source | None, entries: list[dict[str, Any]], images: int) -> dict[str, Any]:
    """What the template needs of one class."""
    label = entries[0]["class"]["index"]
    samples, analysis = store.class_samples(label), read_current(store, label)
    position = {int(sample): at for at, sample in enumerate(samples.sample)}
    grouped = np.zeros(len(samples.sample), dtype=bool)
    groups = []
    for entry in entries:
        group = analysis.groups[entry["group"]]
        grouped |= group.members
        at = [position[example["sample"]] for example in entry["examples"][:images]]
        groups.append(
            {
                "entry": entry,
                "region": _region_picture(group.mean, group.region),
                "examples": [_example(samples, source, index, group.region) for index in at],
                "scale": _nats_scale(entry["effect"]),
            }
        )
    rest = np.random.default_rng(label).permutation(np.flatnonzero(~grouped))[:_OTHERS]
    return {
        "label": label,
        "class": entries[0]["class"],
        "size": len(samples.sample),
        "clusters": cluster_count(analysis.eigenvalues),
        "groups": groups,
        "thumbnail": _thumbnail(groups[0]),
        "others": [_example(samples, source, int(index), None) for index in rest],
        "plot": _plot(store, label, analysis, entries, samples),
    }


def _thumbnail(group: dict[str, Any]) -> str:
    example = group["examples"][0]
    return str(example.overlay or example.map)


def _nats_scale(effect: dict[str, Any]) -> list[float]:
    ends = [effect[name][end] for name in ("score_fall", "random_fall") for end in ("low", "high", "value")]
    known = [end for end in ends if end is not None]
    low, high = min([0.0, *known]), max([0.0, *known])
    return [low, high if high > low else low + 1]


def _plot(
    store: Store, label: int, analysis: ClassAnalysis, entries: list[dict[str, Any]], samples: Any
) -> dict[str, Any]:
    groups = np.stack([analysis.groups[entry["group"]].members for entry in entries])
    chosen, places = _picture(store.folder, label, analysis, groups)
    first = groups[:, chosen].argmax(axis=0)
    inside = groups[:, chosen].any(axis=0)
    score = class_score([analysis.groups[entry["group"]] for entry in entries])[chosen]
    names = {entry.index: entry.name for entry in store.manifest.classes}
    return {
        "label": label,
        "numbers": [entry["group"] for entry in entries],
        "x": [round(float(x), 4) for x in places[:, 0]],
        "y": [round(float(y), 4) for y in places[:, 1]],
        "cluster": analysis.clusters[chosen].tolist(),
        "group": np.where(inside, first, -1).tolist(),
        "score": [round(float(value), 2) for value in score],
        "name": [os.path.basename(samples.path[at]) for at in chosen],
        "prediction": [names.get(int(p), str(int(p))) for p in samples.prediction[chosen]],
        "eigenvalues": [round(float(value), 5) for value in analysis.eigenvalues],
        "clusters": cluster_count(analysis.eigenvalues),
        "of": len(samples.sample),
    }


def _picture(folder: Path, label: int, analysis: ClassAnalysis, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points drawn and their places; kept, since t-SNE takes longer than all the rest of a report."""
    path, mark = folder / FOLDER / f"picture-{label:05d}.npz", read_mark(folder, label)
    chosen = embed.chosen_points(groups)
    try:
        with np.load(path) as file:
            if str(file["mark"]) == mark and np.array_equal(file["chosen"], chosen):
                return chosen, file["places"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        pass
    places = embed.picture(analysis.embedding[chosen])
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, mark=mark, chosen=chosen, places=places)
    return chosen, places


@dataclasses.dataclass(frozen=True)
class _Example:
    """A sample as the page shows it; pictures are data URIs, "" where there is none."""

    name: str
    path: str
    link: str
    image: str
    overlay: str
    map: str


def _example(samples: Any, source: Source | None, at: int, region: np.ndarray | None) -> _Example:
    path, heatmap = samples.path[at], samples.maps[at]
    image = None
    if source is not None:
        try:
            image = source.image(int(samples.sample[at]))
        except InputError:
            image = None  # it vanished since; its map is still worth showing
    picture = cover = ""
    if image is not None:
        small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
        picture = _uri(small, "JPEG" if min(small.size) > 48 else "PNG")
        cover = _uri(viz.overlay(_at_least(small, _THUMBNAIL), heatmap, percentile=99.5), "JPEG")
    link = Path(path).as_uri() if os.path.isabs(path) else ""
    return _Example(os.path.basename(path), path, link, picture, cover, _uri(viz.render(heatmap, percentile=99.5)))


def _region_picture(mean: np.ndarray, region: np.ndarray) -> str:
    """The mean map with the region's outline."""
    scale = max(1, 224 // max(mean.shape))
    picture = np.asarray(viz.render(mean, percentile=99.5).convert("RGB")).repeat(scale, 0).repeat(scale, 1).copy()
    inside = region.repeat(scale, 0).repeat(scale, 1)
    padded = np.pad(inside, 1)
    interior = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    picture[inside & ~interior] = 0
    return _uri(Image.fromarray(picture))


def _at_least(image: Image.Image, side: int) -> Image.Image:
    factor = -(-side // max(image.size))
    return (
        image if factor <= 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    )


def _uri(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
