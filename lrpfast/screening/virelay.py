"""Export to ViRelAy, the viewer for such analyses (Anders et al. 2021, "Software for Dataset-wide XAI").

ViRelAy's published specification of a project and the code that loads one disagree in places; what is written here is what the
loader reads (checked with virelay 0.6): paths relative to `project.yaml`; a label map whose entries have all three of `index`,
`word_net_id` and `name`; labels as uint16; attributions that carry their global sample ids; one analysis file with one group a class,
named exactly as the class's `word_net_id`, and the same names of embeddings and clusterings in every group.

Two more things are as the viewer's code needs them. Images are three channels of uint8: of floating-point images it guesses the
range from the extremes, and shows dark ones wrongly. Maps have the images' channels, a third of the relevance in each: it adds
channels up, but fails on a single one.

Images and maps have one size, the model's input; maps are enlarged to it in whole cells. The files are filled class by class, so the
export of a large screening needs no large memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from lrpfast.errors import InputError, LrpfastError, OutputError
from lrpfast.files import check_writable, make_folder, replacing
from lrpfast.screening.analysis import read_current
from lrpfast.screening.manifest import check_source
from lrpfast.screening.schema import ClassInfo
from lrpfast.screening.sources import Source, reopen
from lrpfast.screening.store import Store

CLUSTERING, EMBEDDING, GROUP = "eigengap", "spectral", "most-suspicious-group"
_METHOD = "SpRAy"
_MOST_LABELS = 2**16  # what uint16 can tell apart


def export_virelay(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    source: Source | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a project for ViRelAy: `project.yaml`, label map, and HDF5 files of images, attributions and the analysis.

    Parameters
    ----------
    folder
        Of the screening, analysed.
    output
        The folder to write; made where it is absent. Files of an earlier export are replaced.
    source
        Its samples; None: opened again.
    progress
        Called with the number of samples done and of all.

    Returns
    -------
    pathlib.Path
        `output/project.yaml`, which is written last.

    Raises
    ------
    InputError
        A class was not analysed, or before shards were made again; the data are gone, or there are more classes than ViRelAy can hold.
    ScreeningError
        There is no finished screening, or the source is another.
    OutputError
        Something cannot be written.
    """
    store = Store(folder)
    source = reopen(folder) if source is None else source
    check_source(folder, store.manifest, source.digest(), len(source))
    if len(store.manifest.classes) >= _MOST_LABELS:
        raise InputError(
            f"ViRelAy holds fewer than {_MOST_LABELS} classes, the model has {len(store.manifest.classes)}"
        )
    check_writable(output)
    output = make_folder(output)
    ids = word_net_ids(store.manifest.classes)
    try:
        with replacing(output / "label-map.json") as temporary:
            temporary.write_text(json.dumps(_label_map(store, ids), indent=1) + "\n", encoding="utf-8")
        with replacing(output / "analysis.h5") as temporary, h5py.File(temporary, "w") as file:
            _write_analysis(file, store, ids)
        with (
            replacing(output / "dataset.h5") as images,
            replacing(output / "attributions.h5") as maps,
            h5py.File(images, "w") as image_file,
            h5py.File(maps, "w") as map_file,
        ):
            _write_samples(image_file, map_file, store, source, progress)
    except OSError as error:
        if isinstance(error, LrpfastError):
            raise
        raise OutputError(f"the project cannot be written to {output}: {error}") from error
    path = output / "project.yaml"
    with replacing(path) as temporary:
        temporary.write_text(_project(store), encoding="utf-8")
    return path


def word_net_ids(classes: tuple[ClassInfo, ...]) -> dict[int, str]:
    """The id of each class by its index; a class without one gets `class-00012`, which sorts and names an HDF5 group."""
    return {entry.index: entry.word_net_id or f"class-{entry.index:05d}" for entry in classes}


def _label_map(store: Store, ids: dict[int, str]) -> list[dict[str, object]]:
    return [{"index": e.index, "word_net_id": ids[e.index], "name": e.name} for e in store.manifest.classes]


def _project(store: Store) -> str:
    """The project file. JSON is YAML, and quotes whatever a name holds."""
    manifest = store.manifest
    strategy = "true_label" if manifest.settings.get("target", "label") == "label" else "predicted_label"
    spec = str(manifest.model.get("spec", "model"))
    data = str(manifest.settings.get("data", "data"))
    project = {
        "name": f"Screening of {spec}",
        "model": spec,
        "label_map": "label-map.json",
        "dataset": {"name": os.path.basename(data.rstrip("/")) or data, "type": "hdf5", "path": "dataset.h5"},
        "attributions": {
            "attribution_method": f"LRP, {manifest.settings.get('composite', 'lrpfast')}",
            "attribution_strategy": strategy,
            "sources": ["attributions.h5"],
        },
        "analyses": [{"analysis_method": _METHOD, "sources": ["analysis.h5"]}],
    }
    return json.dumps({"project": project}, indent=2) + "\n"


def _write_analysis(file: h5py.File, store: Store, ids: dict[int, str]) -> None:
    """One group a class; every group has the same names."""
    for label in store.labels():
        found = read_current(store, label)
        group = file.create_group(ids[label])
        group["index"] = store.columns(label)["sample"].to_numpy().astype(np.uint32)
        # One width for all classes would cut the large ones: the loader takes each group's own.
        embedding = group.create_dataset(f"embedding/{EMBEDDING}", data=_wide(found.embedding))
        embedding.attrs["eigenvalue"] = _wide(found.eigenvalues[None])[0].astype(np.float32)
        group.create_dataset(f"cluster/{CLUSTERING}", data=found.clusters.astype(np.int32))
        members = found.groups[0].members if found.groups else np.zeros(len(found.clusters), dtype=bool)
        group.create_dataset(f"cluster/{GROUP}", data=members.astype(np.int32))


def _wide(embedding: np.ndarray) -> np.ndarray:
    """At least two columns, which the viewer draws: a class of one sample has one eigenvector."""
    missing = max(0, 2 - embedding.shape[1])
    return np.pad(embedding.astype(np.float32), ((0, 0), (0, missing)))


def _write_samples(
    images: h5py.File,
    maps: h5py.File,
    store: Store,
    source: Source,
    progress: Callable[[int, int], None] | None,
) -> None:
    """The dataset has a row for each position of the source, which so is the id; one that could not be read is an empty row."""
    rows, count, classes = store.manifest.samples, len(store), len(store.manifest.classes)
    samples = store.columns()["sample"].to_numpy()
    channels, height, width = _shape(source, samples)
    chunk = (1, channels, height, width)
    data = images.create_dataset("data", (rows, channels, height, width), np.uint8, chunks=chunk, fillvalue=0)
    attribution = maps.create_dataset("attribution", (count, channels, height, width), np.float32)
    prediction = maps.create_dataset("prediction", (count, classes), np.float32)
    # In the order of the store: classes one after the other.
    maps["index"] = samples.astype(np.uint32)
    labels = store.columns()["label"].to_numpy()
    # A label that is not known (-1) is shown as the class explained.
    labels = np.where(labels >= 0, labels, store.columns()["target"].to_numpy()).astype(np.uint16)
    maps["label"] = labels
    by_row = np.zeros(rows, dtype=np.uint16)
    by_row[samples] = labels
    images["label"] = by_row
    done = 0
    for label in store.labels():
        heatmaps, table = store.maps(label), store.columns(label)
        logits = _logits(table["top5_class"], table["top5_logit"], classes)
        for sample, heatmap, values in zip(table["sample"].to_pylist(), heatmaps, logits, strict=True):
            data[sample] = _image(source, sample, (channels, height, width))
            attribution[done] = _enlarged(heatmap / channels, height, width)
            prediction[done] = values
            done += 1
            if progress is not None:
                progress(done, count)


def _shape(source: Source, samples: np.ndarray) -> tuple[int, int, int]:
    """Of the first image that can be read: (3, H, W)."""
    for sample in samples.tolist():
        try:
            image = source.image(sample)
        except InputError:
            continue
        return 3, image.height, image.width
    raise InputError("none of the images can be read any more; the export needs them")


def _image(source: Source, sample: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A sample as the viewer shows it, uint8 [3, H, W]; black where it cannot be read any more, or is of another size."""
    try:
        values = np.asarray(source.image(sample).convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    except InputError:
        return np.zeros(shape, dtype=np.uint8)
    return values if values.shape == shape else np.zeros(shape, dtype=np.uint8)


def _enlarged(heatmap: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * heatmap.shape[0] // height
    columns = np.arange(width) * heatmap.shape[1] // width
    return heatmap[rows[:, None], columns[None, :]]


def _logits(top_classes: object, top_logits: object, classes: int) -> np.ndarray:
    """[n, classes]: the five largest logits, and for all others, which were not kept, the smallest of the five."""
    chosen, values = (np.array(column.to_pylist()) for column in (top_classes, top_logits))  # type: ignore[attr-defined]
    out = np.repeat(np.nanmin(values, axis=1, keepdims=True), classes, axis=1).astype(np.float32)
    rows, columns = np.nonzero(chosen >= 0)
    out[rows, chosen[rows, columns]] = values[rows, columns]
    return out
