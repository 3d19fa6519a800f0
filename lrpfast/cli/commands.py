"""What can be typed: commands, options, exit statuses. No work is done here, and torch is not imported.

Results go to stdout, everything else (warnings, errors, progress) to stderr.
"""

from __future__ import annotations

import errno
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
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            click.echo(f"lrpfast: error: the output cannot be written: {error.strerror}", err=True)
            ctx.exit(2)


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
@click.option(
    "--record",
    multiple=True,
    metavar="GLOB",
    help="Have the program return the relevance of these modules' outputs as well; @features: of each channel that the last "
    "layer reads, which a screening looks for groups in. May be given several times.",
)
def compile_(
    model: ModelOptions, engine: EngineOptions, output: Path | None, onnx: Path | None, record: tuple[str, ...]
) -> None:
    """Compile a model and its explanation to one program, a file that needs neither the model's code nor its library.

    The .pt2 file also holds the preprocessing of images and the names of the classes; `lrpfast explain --model
    FILE.pt2` uses them.
    """
    from lrpfast.cli.compile import run

    run(model, engine, output, onnx, record)


@main.command(epilog=_MODELS + "\n" + _STATUSES)
@model_and_engine
def plan(model: ModelOptions, engine: EngineOptions) -> None:
    """Print the plan of a model: each layer, its rule and why, the operators chosen and what they cost."""
    from lrpfast.cli.plan import run

    run(model, engine)


_DATA = """\b
DATA is one of
  a folder of class folders             each image belongs to the folder of the root it is below
  a .csv or .tsv file                   of path and label; paths are relative to the file, a header must
                                        be path,label; labels are all indices (negative: none) or all names
  .tar archives, in WebDataset's form   one, a folder of them, or 'train-{000..146}.tar'
  package.module:factory                a torch.utils.data.Dataset of (image or tensor, label)
Classes are matched with the model's by name, else by WordNet id, else by their order.
"""
_SCREEN_STATUSES = """\b
Exit status: 0, all done (images that could not be read are listed in skipped.jsonl);
2, an error that stopped the command; 130, interrupted. Give the same command again to go on.
"""
_STAGES = ("explain", "analyse", "verify", "report")


@main.command(epilog=_MODELS + "\n" + _DATA + "\n" + _SCREEN_STATUSES)
@model_and_engine
@click.option("--data", required=True, metavar="DATA", help="The images, see below.")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="Where the results go."
)
@click.option(
    "--target",
    type=click.Choice(["label", "prediction"]),
    default="label",
    show_default=True,
    help="The class explained: an image's own, or the one that the model says.",
)
@click.option(
    "--seed",
    type=click.Choice(["logit", "one"]),
    default="logit",
    show_default=True,
    help="The relevance that starts at the output: the class's logit, or one.",
)
@click.option(
    "--pool", type=click.IntRange(1), default=28, show_default=True, metavar="N", help="Average maps over N x N cells."
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Images explained at once. [default: 16; 64 on a GPU]"
)
@click.option(
    "--shard-size", type=click.IntRange(1), default=1000, show_default=True, metavar="N", help="Images a file."
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    metavar="N",
    help="Processes that decode images; with ray, replicas that explain. [default: as fits the machine]",
)
@click.option(
    "--engine",
    "runner",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Explain on this machine, or on a Ray cluster (RAY_ADDRESS).",
)
@click.option(
    "--stage",
    "stages",
    type=click.Choice(_STAGES),
    multiple=True,
    help="Only this stage; may be given several times. [default: all, in this order]",
)
def screen(model: ModelOptions, engine: EngineOptions, stages: tuple[str, ...], **options: Any) -> None:
    """Screen a dataset for decisions that rest on the wrong thing: a watermark, a border, a ruler.

    Every image is explained once; the maps of each class are clustered (SpRAy); suspicious clusters are tried on the model; and
    FOLDER/report.html shows the classes and clusters, those first whose effect on the model is largest. findings.json and findings.csv
    hold the same. A screening that was stopped, in whatever way, goes on when the same command is given again.
    """
    from lrpfast.cli.screen import run

    run(model, engine, stages=[stage for stage in _STAGES if not stages or stage in stages], **options)


@main.command(epilog=_STATUSES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
def report(folder: Path) -> None:
    """Write the report of a screening again, FOLDER/report.html, from what was found."""
    from lrpfast.cli.screen import run_report

    run_report(folder)


@main.command("export-virelay", epilog=_STATUSES)
@click.argument("folder", type=click.Path(path_type=Path), metavar="FOLDER")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="PROJECT", help="The project's folder."
)
def export_virelay(folder: Path, output: Path) -> None:
    """Write a screening as a project of ViRelAy: images, maps, embeddings and clusters; open PROJECT/project.yaml with it."""
    from lrpfast.cli.screen import run_export

    run_export(folder, output)


@main.command(epilog=_STATUSES)
def info() -> None:
    """Print what is here, and of what is not, why: devices, backends, composites, optional packages."""
    from lrpfast.cli.info import run

    run()
