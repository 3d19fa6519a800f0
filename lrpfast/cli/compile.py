"""`lrpfast compile`: a model and its explanation as one file."""

from __future__ import annotations

from pathlib import Path

import click

from lrpfast.cli import setup
from lrpfast.cli.options import EngineOptions, ModelOptions
from lrpfast.errors import OutputError
from lrpfast.files import check_writable, make_folder


def run(
    model: ModelOptions, engine: EngineOptions, output: Path | None, onnx: Path | None, record: tuple[str, ...]
) -> None:
    """Write the program of the model as .pt2, as .onnx, or both; `record` as of `lrpfast.Explainer`.

    Raises
    ------
    OutputError
        No file is asked for, one has another suffix, or cannot be written.
    LrpfastError
        As `setup.load` and `setup.make_explainer`.
    """
    wanted = [(path, suffix) for path, suffix in ((output, ".pt2"), (onnx, ".onnx")) if path is not None]
    if not wanted:
        raise OutputError("nothing to write: give -o FILE.pt2, --onnx FILE.onnx, or both")
    for path, suffix in wanted:
        if path.suffix != suffix:
            raise OutputError(f"the name {path} does not end in {suffix}")
        check_writable(path.parent)
    loaded = setup.load(model)
    explainer, _ = setup.make_explainer(loaded, engine, record)
    for path, suffix in wanted:
        make_folder(path.parent)
        if suffix == ".onnx":
            explainer.export_onnx(path)
        else:
            explainer.save(path, extra=loaded.describe())
        click.echo(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")
