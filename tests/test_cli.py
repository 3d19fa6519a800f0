"""The command: what it writes, prints and returns, and that bad input is one clear line and a status."""

from __future__ import annotations

import contextlib
import importlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import lrpfast
from lrpfast import composites, viz
from lrpfast.cli import main
from lrpfast.cli.names import unique_stems
from lrpfast.images import Preprocessing, read
from tests.without_torch import statuses

ROOT = Path(__file__).parent.parent
SIZE = 16
FACTORY = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 5),
    )

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))

class Sine(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x.flatten(1)).abs()[:, :4]

class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make()
    def forward(self, x):
        return {"logits": self.model(x)}

class Overflows(nn.Module):
    # A white image is too much for it.
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 3)
        nn.init.constant_(self.linear.weight, 1e37)
    def forward(self, x):
        return self.linear(x.flatten(1))
"""


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        path, **({"quality": 95} if path.suffix == ".jpg" else {})
    )
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a person stands in, with a model of theirs."""
    (tmp_path / "cli_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield tmp_path
    sys.modules.pop("cli_factories", None)


def call(*arguments, status: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr + result.stdout
    return result


def explain(*arguments, model="cli_factories:make", status: int = 0):
    return call("explain", "--model", model, "--size", SIZE, *arguments, "-o", "out", status=status)


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*") if path.is_file())


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def model_and_input(path: Path, preprocessing: Preprocessing | None = None):
    from lrpfast import models

    preprocessing = preprocessing or Preprocessing(size=(SIZE, SIZE), resize=(SIZE, SIZE))
    image = read(path, preprocessing.channels)
    name = "make" if preprocessing.channels == 3 else "grey"
    sys.path.insert(0, os.getcwd())
    return models.load(f"cli_factories:{name}").model, preprocessing.tensor(preprocessing.view(image))[None]


class TestExplain:
    def test_writes_map_overlay_and_array_of_the_engine(self, folder):
        image = picture(folder / "cat.png")
        result = explain(image)
        assert written(folder) == ["cat-map.png", "cat-overlay.png", "cat.npy"]
        model, tensor = model_and_input(image)
        expected = lrpfast.explain(model, tensor)
        array = np.load("out/cat.npy")
        assert array.dtype == np.float32 and array.shape == (3, SIZE, SIZE)
        np.testing.assert_allclose(array, expected.relevance[0].numpy(), rtol=1e-4, atol=1e-6)
        size = (14 * SIZE, 14 * SIZE)  # small maps are enlarged by whole pixels
        assert (pixels("out/cat-map.png") == np.asarray(viz.render(array.sum(0), size=size))).all()
        view = (
            Preprocessing(size=(SIZE, SIZE), resize=(SIZE, SIZE))
            .view(read(image))
            .resize(size, Image.Resampling.NEAREST)
        )
        assert (pixels("out/cat-overlay.png") == np.asarray(viz.overlay(view, array.sum(0)))).all()

        logits = model(tensor)[0].detach()
        top = int(logits.argmax())
        lines = result.stdout.splitlines()
        assert lines[0] == str(image)
        probabilities = logits.softmax(0).sort(descending=True)
        for line, probability, index in zip(
            lines[1:4], probabilities.values[:3], probabilities.indices[:3], strict=True
        ):
            assert line.split() == [f"{float(probability):.2%}", "class", str(int(index))]
        conservation = float(expected.conservation()[0])
        assert lines[4].split(", ") == [
            f"  explained: class {top}",
            f"logit {float(logits[top]):.4g}",
            f"conservation {conservation:.4f}",
        ]
        assert lines[5] == "  written: out/cat{-map.png,-overlay.png,.npy}"
        assert result.stderr == ""

    def test_batches_do_not_show(self, folder):
        for index in range(5):
            picture(folder / "in" / f"{index}.jpg", seed=index)
        one_by_one = explain("in", "--batch-size", 1)
        single = {name: np.load(folder / "out" / name) for name in written(folder) if name.endswith(".npy")}
        assert len(single) == 5
        two_by_two = explain("in", "--batch-size", 2)
        assert [line.split(",")[0] for line in two_by_two.stdout.splitlines()] == [
            line.split(",")[0] for line in one_by_one.stdout.splitlines()
        ]
        for name, array in single.items():
            np.testing.assert_allclose(np.load(folder / "out" / name), array, rtol=1e-4, atol=1e-6)

    def test_target_by_index_by_name_and_several(self, folder):
        image = picture(folder / "cat.png")
        (folder / "names.txt").write_text("\ufeffcat\ndog\nox\nbee\nyak\n\n", encoding="utf-8")
        model, tensor = model_and_input(image)
        expected = lrpfast.explain(model, tensor, target=torch.tensor([[3, 0]])).relevance[0].numpy()
        result = explain(image, "--target", "Bee", "--classes", "names.txt")
        assert "explained: bee (3), logit" in result.stdout
        np.testing.assert_allclose(np.load("out/cat.npy"), expected[0], rtol=1e-4, atol=1e-6)
        explain(image, "--target", "0")
        np.testing.assert_allclose(np.load("out/cat.npy"), expected[1], rtol=1e-4, atol=1e-6)
        explain(image, "--target", "3", "--target", "cat", "--target", "3", "--classes", "names.txt")
        assert np.load("out/cat.npy").shape == (2, 3, SIZE, SIZE)
        np.testing.assert_allclose(np.load("out/cat.npy"), expected, rtol=1e-4, atol=1e-6)
        assert {"cat-map-3.png", "cat-map-0.png", "cat-overlay-3.png", "cat-overlay-0.png"} <= set(written(folder))

    def test_seed_composite_and_precision_change_the_result_as_in_the_engine(self, folder):
        image = picture(folder / "cat.png")
        model, tensor = model_and_input(image)
        one = lrpfast.explain(model, tensor, seed="one", composite="epsilon").relevance[0].numpy()
        explain(image, "--seed", "one", "--composite", "epsilon")
        np.testing.assert_allclose(np.load("out/cat.npy"), one, rtol=1e-4, atol=1e-6)
        explain(image, "--precision", "bfloat16", "--composite", "epsilon_plus")
        coarse = np.load("out/cat.npy")
        fine = lrpfast.explain(model, tensor, composite="epsilon_plus").relevance[0].numpy()
        assert not np.allclose(coarse, fine, rtol=1e-4, atol=1e-6)
        assert np.linalg.norm(coarse - fine) < 0.1 * np.linalg.norm(fine)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ((), ("epsilon_plus_flat", None, "auto", ())),
            (
                ("--composite", "gamma", "--precision", "float16", "--backend", "torch"),
                ("gamma", "float16", "torch", ()),
            ),
        ],
    )
    def test_options_reach_the_engine(self, folder, monkeypatch, options, expected):
        engine, given = lrpfast.Explainer, []

        def spy(model, example, *, composite, precision, backend, record):
            given.append((composite.name, precision, backend, record))
            return engine(model, example, composite=composite, precision=precision, backend=backend)

        monkeypatch.setattr(lrpfast, "Explainer", spy)
        call("plan", "--model", "cli_factories:make", "--size", SIZE, *options)
        assert given == [expected]

    def test_box_gets_the_range_of_the_normalised_pixels(self, folder):
        image = picture(folder / "cat.png")
        preprocessing = Preprocessing(size=(SIZE, SIZE), resize=(SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        model, tensor = model_and_input(image, preprocessing)
        low, high = (-2.5, -0.4 / 0.3, -0.75), (2.5, 2.0, 1.75)
        composite = composites.get("epsilon_gamma_box", low=torch.tensor(low), high=torch.tensor(high))
        expected = lrpfast.explain(model, tensor, composite=composite).relevance[0].numpy()
        explain(image, "--composite", "epsilon_gamma_box", "--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4")
        np.testing.assert_allclose(np.load("out/cat.npy"), expected, rtol=1e-3, atol=1e-5)

    def test_grey_and_unnormalised(self, folder):
        image = picture(folder / "cat.png")
        for options in (("--mean", "0", "--std", "1"), ("--mean", "0.2", "--std", "0.3")):
            preprocessing = Preprocessing(
                (SIZE, SIZE), (SIZE, SIZE), mean=(float(options[1]),), std=(float(options[3]),)
            )
            model, tensor = model_and_input(image, preprocessing)
            explain(image, *options, model="cli_factories:grey")
            expected = lrpfast.explain(model, tensor).relevance[0].numpy()
            assert expected.shape == (1, SIZE, SIZE)
            np.testing.assert_allclose(np.load("out/cat.npy"), expected, rtol=1e-4, atol=1e-6)
        model, tensor = model_and_input(
            image, Preprocessing((SIZE, SIZE), (SIZE, SIZE), mean=(0.0,) * 3, std=(1.0,) * 3)
        )
        explain(image, "--no-normalise")
        np.testing.assert_allclose(
            np.load("out/cat.npy"), lrpfast.explain(model, tensor).relevance[0], rtol=1e-4, atol=1e-6
        )

    def test_checkpoint(self, folder):
        image = picture(folder / "cat.png")
        model, tensor = model_and_input(image)
        torch.manual_seed(3)
        state = {
            key: torch.rand_like(value) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, "net.pt")
        explain(image, "--checkpoint", "net.pt")
        model.load_state_dict(state)
        np.testing.assert_allclose(
            np.load("out/cat.npy"), lrpfast.explain(model, tensor).relevance[0], rtol=1e-4, atol=1e-5
        )

    def test_same_names_do_not_collide(self, folder):
        for index, name in enumerate(["a/cat.jpg", "b/cat.jpg", "b/dog.jpg"]):
            picture(folder / name, seed=index)
        result = explain("a", "b")
        assert {name for name in written(folder) if name.endswith(".npy")} == {"a-cat.npy", "b-cat.npy", "dog.npy"}
        assert "out/a-cat{-map.png,-overlay.png,.npy}" in result.stdout
        assert not np.array_equal(np.load("out/a-cat.npy"), np.load("out/b-cat.npy"))

    def test_results_within_the_input_are_not_explained_next_time(self, folder):
        picture(folder / "cat.png")
        for _ in range(2):
            explain(".")
            assert written(folder) == ["cat-map.png", "cat-overlay.png", "cat.npy"]
        result = call("explain", "--model", "cli_factories:make", "out", "-o", "out", status=2)
        assert "out is searched for images" in result.stderr

    def test_a_tensor_within_the_output_is_enough(self, folder):
        result = explain(picture(folder / "cat.png"), model="cli_factories:Wrapped")
        assert re.search(r"^ *\d+\.\d\d%  class \d$", result.stdout, re.MULTILINE)

    def test_unreadable_images_are_named_and_the_others_done(self, folder):
        picture(folder / "in" / "good.png")
        picture(folder / "in" / "zebra.png", seed=1)
        (folder / "in" / "broken.png").write_bytes((folder / "in" / "good.png").read_bytes()[:100])
        (folder / "in" / "text.jpg").write_text("no image")
        result = explain("in", "absent.png", status=1)
        for name in ("in/broken.png", "in/text.jpg", "absent.png"):
            assert len(re.findall(rf"^lrpfast: {re.escape(name)}[: ]", result.stderr, re.MULTILINE)) == 1
        assert "3 of 5 images failed" in result.stderr
        assert [name for name in written(folder) if name.endswith(".npy")] == ["good.npy", "zebra.npy"]
        assert "broken" not in result.stdout

    def test_an_image_that_the_model_cannot_take_does_not_spoil_its_batch(self, folder):
        for name, colour in (("a", "black"), ("b", "white"), ("c", "black")):
            Image.new("RGB", (SIZE, SIZE), colour).save(f"{name}.png")
        result = explain("a.png", "b.png", "c.png", "--no-normalise", model="cli_factories:Overflows", status=1)
        assert re.search(r"^lrpfast: b\.png: .*infinity", result.stderr, re.MULTILINE) and "1 of 3" in result.stderr
        assert [name for name in written(folder) if name.endswith(".npy")] == ["a.npy", "c.npy"]

    def test_a_full_disk_stops_and_leaves_whole_files(self, folder, monkeypatch):
        for index in range(3):
            picture(folder / "in" / f"{index}.png", seed=index)
        replace, calls = os.replace, []

        def full(source, target):
            calls.append(target)
            if len(calls) > 4:
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", full)
        result = explain("in", status=2)
        assert re.search(r"error: out/1-overlay\.png cannot be written: No space left", result.stderr)
        assert written(folder) == ["0-map.png", "0-overlay.png", "0.npy", "1-map.png"]
        for name in written(folder):
            np.load(folder / "out" / name) if name.endswith(".npy") else pixels(folder / "out" / name)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--target", "9"), r"target 9 is out of range: the model has 5"),
            (("--target", "cat"), "'cat'.*not known"),
            (("--composite", "epsilon_plsu"), "epsilon_plsu.*epsilon_plus"),
            (("--device", "cuda:77"), "device 'cuda:77' cannot be used"),
            (("--device", "tpux"), "device 'tpux' cannot be used"),
            (("--device", "meta"), "device 'meta' cannot be used"),
            (("--classes", "absent.txt"), r"absent\.txt cannot be read"),
            (("--classes", "three.txt"), "there are 3 names of classes, and cli_factories:make has 5 outputs"),
            (("--classes", "gap.txt"), r"gap\.txt, line 2 is empty; the names of the classes stand one a line"),
            (("--classes", "empty.txt"), r"the class names empty\.txt are none: the file is empty"),
            (("--checkpoint", "absent.pt"), r"no checkpoint absent\.pt"),
            (("--checkpoint", "other.pt"), r"other\.pt does not fit.*unexpected: other"),
            (("--mean", "0.5"), "mean.*std"),
            (("--mean", "0.5", "--no-normalise"), "--no-normalise"),
            (("--weights", "DEFAULT"), "torchvision and timm"),
            (("--size", "8"), "."),
        ],
    )
    def test_errors_come_before_anything_is_written(self, folder, arguments, message):
        image = picture(folder / "cat.png")
        torch.save({"other": torch.zeros(1)}, "other.pt")
        (folder / "three.txt").write_text("cat\ndog\nox\n")
        (folder / "gap.txt").write_text("cat\n\ndog\nox\nbee\n")
        (folder / "empty.txt").write_text("\n")
        result = explain(image, *arguments, status=2)
        assert re.search(f"^lrpfast: error: .*{message}", result.stderr, re.MULTILINE), result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
        assert not list((folder / "out").glob("*")) if (folder / "out").exists() else True

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("cli_factories:absent", "no 'absent'"),
            ("cli_factories:Sine", "no rule"),
            ("absent.pt2", r"no program absent\.pt2"),
            ("text.pt2", r"text\.pt2"),
            ("resnet50", "names no model"),
        ],
    )
    def test_bad_models(self, folder, model, message):
        (folder / "text.pt2").write_text("no program")
        result = explain(picture(folder / "cat.png"), model=model, status=2)
        assert re.search(f"^lrpfast: error: .*{message}", result.stderr, re.MULTILINE), result.stderr
        assert not (folder / "out").exists()

    def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(self, folder):
        image = picture(folder / "cat.png")
        (folder / "file").touch()
        for output in ("file", "file/below", "/proc/lrpfast/out"):
            result = call("explain", "--model", "absent_module:make", image, "-o", output, status=2)
            assert re.search("^lrpfast: error: the output folder .*" + output, result.stderr), result.stderr

    def test_no_images(self, folder):
        (folder / "empty").mkdir()
        result = explain("empty", status=2)
        assert "no images in empty" in result.stderr

    def test_usage_errors(self, folder):
        image = picture(folder / "cat.png")
        for arguments in (
            (),
            (image, "--size", "0"),
            (image, "--size", "8x"),
            (image, "--mean", "1,2"),
            (image, "--percentile", "0"),
            (image, "--batch-size", "0"),
            (image, "--seed", "two"),
            (image, "--precision", "int8"),
        ):
            result = explain(*arguments, status=2)
            assert "Usage: " in result.stderr
        assert not (folder / "out").exists()

    def test_colormaps_of_the_command_are_those_of_viz(self):
        option = next(option for option in main.commands["explain"].params if option.name == "colormap")
        assert list(option.type.choices) == list(viz.COLORMAPS)

    def test_names_that_are_not_text(self, folder):
        name = os.fsdecode(b"caf\xe9.png")
        try:
            Image.new("RGB", (20, 20)).save(name)
        except OSError:
            pytest.skip("this file system has names of text alone")
        result = explain(name)
        assert result.stdout.startswith("caf\ufffd.png")
        assert written(folder) == ["caf-map.png", "caf-overlay.png", "caf.npy"]


class TestStems:
    def stems(self, *names: str) -> list[str]:
        return list(unique_stems([Path("/top") / name for name in names]).values())

    def test_as_little_as_tells_them_apart(self):
        assert self.stems("a/cat.jpg", "b/dog.jpg") == ["cat", "dog"]
        assert self.stems("a/cat.jpg", "a/cat.png") == ["cat-jpg", "cat-png"]
        assert self.stems("a/cat.jpg", "b/cat.jpg", "b/dog.jpg") == ["a-cat", "b-cat", "dog"]
        assert self.stems("x/a/cat.jpg", "y/a/cat.jpg") == ["x-a-cat", "y-a-cat"]
        assert self.stems("a/cat.jpg", "a/cat.png", "b/cat.jpg") == ["a-cat-jpg", "a-cat-png", "b-cat-jpg"]

    def test_case_does_not_count(self):
        stems = self.stems("a/Cat.jpg", "b/cat.jpg")
        assert stems == ["a-Cat", "b-cat"]

    def test_names_that_look_like_made_ones(self):
        for names in (
            ("a/cat.jpg", "b/cat.jpg", "c/a-cat.jpg"),
            ("a-b/c.jpg", "a/b-c.jpg"),
            ("a-b/c/x.jpg", "a/b-c/x.jpg"),
        ):
            stems = self.stems(*names)
            assert len({stem.casefold() for stem in stems}) == len(names), stems

    def test_long_names_leave_room_for_the_endings(self):
        stems = self.stems("a/" + "x" * 250 + ".jpg", "b/" + "x" * 250 + ".jpg")
        assert len(set(stems)) == 2 and max(len(stem.encode()) for stem in stems) <= 210


class TestCompile:
    def test_a_program_explains_as_its_model_does(self, folder):
        image = picture(folder / "cat.png")
        (folder / "names.txt").write_text("cat\ndog\nox\nbee\nyak\n")
        options = ("--size", SIZE, "--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", "--classes", "names.txt")
        result = call(
            "compile",
            "--model",
            "cli_factories:make",
            *options,
            "--composite",
            "epsilon_gamma_box",
            "-o",
            "new/net.pt2",
        )
        assert re.fullmatch(r"new/net\.pt2 \(\d+\.\d MiB\)\n", result.stdout)
        explain(image, *options[2:], "--composite", "epsilon_gamma_box")
        expected = np.load("out/cat.npy")
        result = call("explain", "--model", "new/net.pt2", image, "-o", "out", "--target", "ox")
        assert "explained: ox (2)" in result.stdout
        call("explain", "--model", "new/net.pt2", image, "-o", "out")
        np.testing.assert_allclose(np.load("out/cat.npy"), expected, rtol=1e-4, atol=1e-6)
        result = call("explain", "--model", "new/net.pt2", image, "-o", "out", "--composite", "epsilon", status=2)
        assert "--composite" in result.stderr

    def test_an_exported_model_is_explained_as_its_module_is(self, folder):
        image = picture(folder / "cat.png")
        model, tensor = model_and_input(image)
        exported = torch.export.export(
            model, (tensor.expand(2, -1, -1, -1),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        torch.export.save(exported, "net.pt2")
        expected = lrpfast.explain(model, tensor, composite="epsilon").relevance[0]
        explain(image, "--composite", "epsilon", model="net.pt2")
        np.testing.assert_allclose(np.load("out/cat.npy"), expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.slow
    def test_onnx(self, folder):
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        image = picture(folder / "cat.png")
        call("compile", "--model", "cli_factories:make", "--size", SIZE, "--onnx", "net.onnx")
        model, tensor = model_and_input(image)
        session = runtime.InferenceSession("net.onnx")
        feeds = {session.get_inputs()[0].name: tensor.numpy(), "target": np.array([2], dtype=np.int64)}
        found = session.run(["relevance"], feeds)[0]
        np.testing.assert_allclose(found, lrpfast.explain(model, tensor, target=2).relevance, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "nothing to write"),
            (("-o", "net.onnx"), r"net\.onnx does not end in \.pt2"),
            (("--onnx", "net.pt2"), r"net\.pt2 does not end in \.onnx"),
            (("-o", "cli_factories.py/net.pt2"), "cannot be used"),
        ],
    )
    def test_errors(self, folder, arguments, message):
        result = call("compile", "--model", "absent_module:make", *arguments, status=2)
        assert re.search(f"^lrpfast: error: .*{message}", result.stderr)


class TestPlanAndInfo:
    def test_modules_of_the_current_folder_are_found(self, folder):
        assert str(folder) not in sys.path and "" not in sys.path
        call("plan", "--model", "cli_factories:make", "--size", SIZE)

    def test_plan_names_layers_and_rules(self, folder):
        result = call("plan", "--model", "cli_factories:make", "--size", SIZE)
        assert "epsilon_plus_flat" in result.stdout
        for word in ("Flat", "ZPlus", "Epsilon"):
            assert word in result.stdout
        assert "names no model" in call("plan", "--model", "x", status=2).stderr

    def test_info(self):
        text = call("info").stdout
        assert text.startswith(f"lrpfast {lrpfast.__version__}, torch {torch.__version__}")
        for title in ("devices", "backends", "composites", "optional packages"):
            assert f"\n{title}\n  " in text
        assert "epsilon_gamma_box" in text and re.search(r"cuda: not there: |cuda:0: ", text)

    def test_info_says_why_a_package_is_not_there(self, monkeypatch):
        from lrpfast.cli import info

        def importing(name):
            if name == "timm":
                raise ModuleNotFoundError("No module named 'timm'", name="timm")
            raise RuntimeError("operator torchvision::nms does not exist\nmore")

        monkeypatch.setattr(info.importlib, "import_module", importing)
        text = call("info").stdout
        assert "timm: not installed, for models timm:NAME: pip install timm" in text
        assert (
            "torchvision: installed, but importing it fails: RuntimeError: operator torchvision::nms does not exist\n"
            in text
        )


class TestProcess:
    """The command as a process: exit statuses, streams, speed of what needs no torch."""

    def run(self, *arguments, **options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        command = [sys.executable, "-m", "lrpfast", *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.run(command, text=True, env=environment, **streams)

    @pytest.mark.slow
    def test_explain(self, folder):
        picture(folder / "cat.png")
        (folder / "bad.png").touch()
        done = self.run(
            "explain", "--model", "cli_factories:make", "--size", SIZE, "cat.png", "bad.png", "-o", "out", cwd=folder
        )
        assert done.returncode == 1, done.stderr
        assert done.stdout.startswith("cat.png\n") and "\x1b" not in done.stdout + done.stderr
        assert "bad.png" in done.stderr and "explaining" not in done.stderr
        assert written(folder) == ["cat-map.png", "cat-overlay.png", "cat.npy"]

    @pytest.mark.slow
    def test_on_a_terminal_results_stand_above_a_progress_bar(self, folder):
        for index in range(3):
            picture(folder / f"{index}.png", seed=index)
        command = [
            sys.executable,
            "-m",
            "lrpfast",
            "explain",
            "--model",
            "cli_factories:make",
            "--size",
            str(SIZE),
            "-o",
            "out",
        ]
        ours, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
        with subprocess.Popen([*command, "."], cwd=folder, env=environment, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # how the end of a terminal is told
                while part := os.read(ours, 65536):
                    shown += part
        os.close(ours)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
        assert process.returncode == 0, text
        assert "compiling cli_factories:make" in text and "3/3" in text
        for index in range(3):
            assert re.search(rf"[\r\n]{index}\.png\r\n  .*%  class \d\r\n", text)

    def test_error(self, folder):
        done = self.run("plan", "--model", "absent_module:make", cwd=folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("lrpfast: error: absent_module:make: ")

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
    def test_stdout_on_a_full_disk(self):
        with open("/dev/full", "w") as full:
            done = self.run("info", stdout=full)
        assert (done.returncode, done.stderr) == (
            2,
            "lrpfast: error: the output cannot be written: No space left on device\n",
        )

    def test_help_and_usage_errors_do_not_import_torch(self, folder):
        commands = [["--help"], ["explain", "--help"], ["--version"], ["explain"]]
        assert statuses(commands, folder) == [0, 0, 0, 2]

    @pytest.mark.slow
    def test_interrupted(self, folder):
        (folder / "cli_interrupts.py").write_text("def make():\n    raise KeyboardInterrupt\n")
        picture(folder / "cat.png")
        done = self.run("explain", "--model", "cli_interrupts:make", "cat.png", "-o", "out", cwd=folder)
        assert done.returncode == 130
        assert "interrupted" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.large
def test_torchvision_model(folder):
    importlib.import_module("tests.torchvision_shim")
    for index in range(2):
        picture(folder / "in" / f"{index}.jpg", seed=index, size=(240, 300))
    result = call("explain", "--model", "torchvision:resnet18", "in", "-o", "out", "--target", "281")
    assert "random weights" in result.stderr
    assert np.load("out/0.npy").shape == (3, 224, 224) and np.isfinite(np.load("out/0.npy")).all()
    assert pixels("out/1-map.png").shape == (224, 224, 3)
    assert result.stdout.count("explained: class 281") == 2
