"""What can be typed: commands, options, exit statuses. No work is done here, and torch is not imported.

Results go to stdout, everything else (warnings, errors, progress) to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrpfast.cli.options import EngineOptions, ModelOptions, model_and_engine
from lrpfast.errors import LrpfastError

_MODELS = """\b
MODEL is one of
  torchvision:NAME         an architecture of torchvision (pip install torchvision)
  timm:NAME                an architecture of timm (pip install timm)
  path/to/program.pt2      an explanation written by `lrpfast compile`,
                           or a model written by torch.export.save
  package.module:factory   a torch.nn.Module, or a callable that returns one;
                           modules of the current folder are found
"""
_STATUSES = """\b
Exit status: 0, all done; 1, some images failed, each named on stderr;
2, an error that stopped the command; 130, interrupted.
"""


class _Group(click.Group):
    """A group in which an error of lrpfast ends a command with one line and a status, not with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LrpfastError as error:
            click.echo(f"lrpfast: error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("lrpfast: interrupted; every file written so far is complete", err=True)
            ctx.exit(130)


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        import lrpfast

        click.echo(f"lrpfast {lrpfast.__version__}")
        ctx.exit()


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_STATUSES
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
def main() -> None:
    """Layer-wise relevance propagation: what in an image speaks for a class, and what against it."""


@main.command(epilog=_MODELS + "\n" + _STATUSES)
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE_OR_FOLDER...")
@model_and_engine
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Where the results go."
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="CLASS",
    help="The class to explain, an index or a name; may be given several times. [default: each image's top class]",
)
@click.option(
    "--seed",
    type=click.Choice(["logit", "one"]),
    default="logit",
    show_default=True,
    help="The relevance that starts at the output: the class's logit, or one.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="Images explained at once."
)
@click.option(
    "--percentile",
    type=click.FloatRange(0, 100, min_open=True),
    metavar="P",
    help="Full colour at this percentile of an image's magnitudes. [default: 100, the largest]",
)
@click.option(
    "--colormap",
    type=click.Choice(["bwr", "seismic", "rdbu"]),
    default="bwr",
    show_default=True,
    help="Colours of the maps.",
)
def explain(images: tuple[Path, ...], model: ModelOptions, engine: EngineOptions, **options: Any) -> None:
    """Explain images: what in them speaks for a class (red), and what against it (blue).

    Folders are searched recursively. For each image NAME.jpg, three files are written: NAME-map.png, the map;
    NAME-overlay.png, the map over what the model saw; NAME.npy, the relevance of each input value as float32 [C, H,
    W]. With several targets, the maps are NAME-map-TARGET.png and so on, and the array is [K, C, H, W]. Images of the
    same name get the names of their folders in front. Printed for each image: the top classes, the class explained,
    its logit, and the conservation, which is the relevance that arrived at the input as a part of the relevance at
    the output.
    """
    from lrpfast.cli.explain import run

    failed = run(images, model, engine, **options)
    if failed:
        click.get_current_context().exit(1)


@main.command("compile", epilog=_MODELS + "\n" + _STATUSES)
@model_and_engine
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.pt2", help="Write the program here.")
@click.option("--onnx", type=click.Path(path_type=Path), metavar="FILE.onnx", help="Write it as ONNX here.")
def compile_(model: ModelOptions, engine: EngineOptions, output: Path | None, onnx: Path | None) -> None:
    """Compile a model and its explanation to one program, a file that needs neither the model's code nor its library.

    The .pt2 file also holds the preprocessing of images and the names of the classes; `lrpfast explain --model
    FILE.pt2` uses them.
    """
    from lrpfast.cli.compile import run

    run(model, engine, output, onnx)


@main.command(epilog=_MODELS + "\n" + _STATUSES)
@model_and_engine
def plan(model: ModelOptions, engine: EngineOptions) -> None:
    """Print the plan of a model: each layer, its rule and why, the operators chosen and what they cost."""
    from lrpfast.cli.plan import run

    run(model, engine)


@main.command(epilog=_STATUSES)
def info() -> None:
    """Print what is here, and of what is not, why: devices, backends, composites, optional packages."""
    from lrpfast.cli.info import run

    run()
