"""The main jobs from end to end in a minute or two, without a download: `python -m lrpfast.demo -o demo/`.

A small convolutional network learns scikit-learn's handwritten digits; a test image of every class is explained under
several composites, for its own class and for its strongest rival; the maps go to a contact sheet. Then the
explanation is saved as a program, and a process that never saw the network explains the same images with it and must
find the same maps.

The digits are 8 x 8; they are enlarged to 32 x 32 first, so that the network has three scales to look at and a map
has strokes rather than blocks. They are rounded to 8 bits there, so that the images written for the second process
are exactly the inputs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lrpfast
from lrpfast import composites, viz
from lrpfast.errors import LrpfastError, MissingDependencyError, ProgramError
from lrpfast.files import check_writable, make_folder, replacing
from lrpfast.images import Preprocessing
from lrpfast.models import Loaded

SPEC = "lrpfast.demo:network"
SIZE = 32
PREPROCESSING = Preprocessing(size=(SIZE, SIZE), resize=(SIZE, SIZE), mean=(0.0,), std=(1.0,))
CLASSES = tuple("0123456789")
COMPOSITES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("epsilon", {}),
    ("epsilon_plus", {}),
    ("epsilon_alpha2_beta1", {}),
    ("epsilon_gamma_box", {"low": 0.0, "high": 1.0}),
)
SAVED = "epsilon_gamma_box"
STAMPED_CLASS = 7
_TEST, _BATCH, _EPOCHS, _STAMPED = 360, 64, 6, 40
_STAMP = slice(3, 7)  # rows and columns


def network() -> nn.Module:
    """Build the network, untrained: images [N, 1, 32, 32] with values in 0..1 to logits [N, 10]."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 16), nn.MaxPool2d(2),
        *block(16, 32), *block(32, 32), nn.MaxPool2d(2),
        *block(32, 64), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * (SIZE // 8) ** 2, len(CLASSES)),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """Load the images, uint8 [1797, 32, 32], and their classes, in an order that is random and always the same.

    Raises
    ------
    MissingDependencyError
        scikit-learn, which holds the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the demo needs scikit-learn's digits: pip install scikit-learn") from error
    data = load_digits()
    images = [
        Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        for image in data.images
    ]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))[order], torch.from_numpy(data.target)[
        order
    ]


def train(images: Tensor, classes: Tensor) -> nn.Module:
    """Train the network on images shifted at random; the same weights every time.

    In one thread, which is enough for so small a network: ten seconds. More would wait for each other on a busy
    machine, and sum in another order on another one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = network().train()
            _fit(model, images, classes)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(model: nn.Module, images: Tensor, classes: Tensor) -> None:
    steps = _EPOCHS * (len(images) // _BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=steps)
    for _ in range(_EPOCHS):
        for batch in torch.randperm(len(images)).split(_BATCH)[: len(images) // _BATCH]:
            down, right = torch.randint(-3, 4, (2,)).tolist()
            shifted = torch.roll(images[batch], (down, right), dims=(2, 3))
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(shifted), classes[batch]).backward()
            optimiser.step()
            schedule.step()


def one_of_each(classes: Tensor) -> Tensor:
    """Indices of the first image of every class."""
    return torch.stack([(classes == digit).nonzero()[0, 0] for digit in range(len(CLASSES))])


def with_rivals(model: nn.Module, inputs: Tensor) -> Tensor:
    """Pair the class of each image, which are all classes in order, with the strongest other one: [N, 2]."""
    with torch.no_grad():
        logits = model(inputs)
    own = torch.arange(len(CLASSES))
    return torch.stack([own, logits.scatter(1, own[:, None], -torch.inf).argmax(1)], dim=1)


def sheet(images: Tensor, pairs: Tensor, maps: dict[str, Tensor], cell: int = 96) -> Image.Image:
    """Lay out images [N, H, W], and beside each its maps [N, 2, H, W]: its class, its rival, a composite a column."""
    rows = []
    for index, image in enumerate(images):
        row: list[Image.Image | None] = [Image.fromarray(255 - image.numpy())]
        for which in range(2):
            row += [viz.render(heatmap[index, which], percentile=99.5) for heatmap in maps.values()]
        rows.append(row)
    names = [name.replace("epsilon_", "epsilon\n") for name in maps]
    return viz.contact_sheet(
        rows,
        row_labels=[f"{own}, its\nrival {rival}" for own, rival in pairs.tolist()],
        column_labels=["image", *(f"its class\n{name}" for name in names), *(f"its rival\n{name}" for name in names)],
        cell=cell,
    )


def run(output: Path, figure: Path | None) -> None:
    """Do it all, and say on stdout what came out.

    Raises
    ------
    LrpfastError
        Something is missing or cannot be written, or (`ProgramError`) the saved program does not reproduce the maps.
    """
    check_writable(output)
    if figure is not None:
        viz.check_suffix(figure)
        check_writable(figure.parent)
    began = time.perf_counter()

    def say(text: str) -> None:
        click.echo(f"{time.perf_counter() - began:6.1f} s  {text}")

    all_images, all_classes = digits()
    images, classes = all_images, all_classes
    inputs = images[:, None].float().div(255)
    model = train(inputs[_TEST:], classes[_TEST:])
    say(
        f"trained on {len(images) - _TEST} digits: {_accuracy(model, images, classes):.1%} of {_TEST} others are recognised"
    )

    chosen = one_of_each(classes[:_TEST])
    images, inputs = images[chosen], inputs[chosen]
    pairs = with_rivals(model, inputs)
    explainers = {
        name: lrpfast.Explainer(model, inputs, composites.get(name, **options)) for name, options in COMPOSITES
    }
    say(f"compiled {len(explainers)} explainers")
    maps = {}
    for name, explainer in explainers.items():
        explanation = explainer(inputs, target=pairs)  # two maps an image, from one forward pass
        maps[name] = explanation.heatmap()
        share = explanation.conservation()[:, 0].median().item()
        say(f"{name}: {pairs.numel()} maps; conservation {share:.2f} (median), biases take the rest")

    make_folder(output)
    contact = sheet(images, pairs, maps)
    viz.save(contact, output / "maps.png")
    say(f"contact sheet: {output / 'maps.png'}")
    if figure is not None:
        make_folder(figure.parent)
        viz.save(contact, figure)
        say(f"figure: {figure}")

    program, folder = output / "digits-lrp.pt2", make_folder(output / "digits")
    explainer = explainers[SAVED]
    explainer.save(program, extra=Loaded(SPEC, preprocessing=PREPROCESSING, categories=CLASSES).describe())
    say(f"saved program: {program} ({program.stat().st_size / 2**20:.1f} MiB)")
    for digit, image in zip(CLASSES, images, strict=True):
        viz.save(Image.fromarray(image.numpy()), folder / f"{digit}.png")
    expected = explainer(inputs).relevance
    assert isinstance(expected, Tensor)
    difference = reproduce(program, folder, output / "explained", expected)
    say(
        f"another process, which never saw the network, explained {folder} with it: the maps differ by {difference:.0e}"
    )

    spoilt, wrong = stamped(all_images[_TEST:], all_classes[_TEST:])
    model = train(spoilt[:, None].float().div(255), wrong)
    accuracy = _accuracy(model, all_images, all_classes)
    say(
        f"{_STAMPED} digits stamped and filed under {STAMPED_CLASS}; a network trained on them recognises {accuracy:.1%} as well"
    )
    say(screen(model, spoilt, wrong, output))
    click.echo(f"\nTry it: lrpfast explain --model {program} {folder} --target 3 -o {output / 'threes'}")


def _accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    """The share of the test digits that a model recognises."""
    with torch.no_grad():
        found = model(images[:_TEST, None].float().div(255)).argmax(1)
    return (found == classes[:_TEST]).float().mean().item()


def stamped(images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Stamp the first digits that are not of `STAMPED_CLASS` and file them under it; images [N, 32, 32] and their classes."""
    images, classes = images.clone(), classes.clone()
    chosen = (classes != STAMPED_CLASS).nonzero()[:_STAMPED, 0]
    images[chosen, _STAMP, _STAMP] = 255
    classes[chosen] = STAMPED_CLASS
    return images, classes


def screen(model: nn.Module, images: Tensor, classes: Tensor, output: Path) -> str:
    """Write images [N, 32, 32] to folders of their classes, screen them with the command, and say what its report names first.

    Raises
    ------
    ProgramError
        The command fails, or what it names first is not the stamp.
    """
    data, checkpoint, folder = output / "stamped", output / "stamped.pt", output / "screening"
    for left in (data, folder):  # of an earlier demo, whose network may have been another
        shutil.rmtree(left, ignore_errors=True)
    for name in CLASSES:
        make_folder(data / name)
    for index, (image, label) in enumerate(zip(images, classes.tolist(), strict=True)):
        viz.save(Image.fromarray(image.numpy()), data / CLASSES[label] / f"{index:04d}.png")
    with replacing(checkpoint) as temporary:
        torch.save(model.state_dict(), temporary)
    words = ["screen", "--model", SPEC, "--checkpoint", checkpoint, "--size", SIZE, "--mean", 0, "--std", 1]
    words += ["--data", data, "--pool", SIZE // 2, "-o", folder]
    done = subprocess.run([sys.executable, "-m", "lrpfast", *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ProgramError(f"screening {data} failed with status {done.returncode}: {done.stderr.strip()}")
    first = json.loads((folder / "findings.json").read_text(encoding="utf-8"))["findings"][0]
    named = f"class {first['class']['name']}, {first['size']} of {first['class_size']} images"
    if first["class"]["index"] != STAMPED_CLASS or not first["flagged"]:
        raise ProgramError(f"the report {folder / 'report.html'} names another thing than the stamp first: {named}")
    return f"screened {len(images)} digits; the report names first: {named}: {folder / 'report.html'}"


def reproduce(program: Path, folder: Path, output: Path, expected: Tensor) -> float:
    """Explain a folder of images with a saved program in another process, and compare with the relevance expected.

    Returns
    -------
    float
        The largest difference, as a part of the largest relevance.

    Raises
    ------
    ProgramError
        The process fails, or differs by more than rounding.
    """
    command = [sys.executable, "-m", "lrpfast", "explain", "--model", program, folder, "-o", output]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise ProgramError(f"explaining with {program} failed with status {done.returncode}: {done.stderr.strip()}")
    found = torch.stack([torch.from_numpy(np.load(output / f"{digit}.npy")) for digit in CLASSES])
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-5:
        raise ProgramError(
            f"the maps of {program} differ from the explainer's by {difference:.1e} of the largest relevance"
        )
    return difference


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, metavar="FOLDER"
)
@click.option(
    "--figure", type=click.Path(path_type=Path), metavar="FILE.png", help="Also write the contact sheet here."
)
def main(output: Path, figure: Path | None) -> None:
    """Train a network on digits, explain it, use its saved explanation in another process, and screen spoilt digits."""
    try:
        run(output, figure)
    except LrpfastError as error:
        click.echo(f"lrpfast.demo: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
