"""The demo does what it says: it learns, explains, saves, and another process finds the same maps."""

from __future__ import annotations

import json
import re
import subprocess
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lrpfast import demo
from lrpfast.errors import MissingDependencyError, ProgramError

pytest.importorskip("sklearn")


def test_digits_are_the_same_every_time_and_have_all_classes():
    images, classes = demo.digits()
    again, _ = demo.digits()
    assert torch.equal(images, again)
    assert images.shape == (1797, 32, 32) and images.dtype == torch.uint8
    assert images.amax() == 255 and images.amin() == 0
    assert classes.unique().tolist() == list(range(10))
    chosen = demo.one_of_each(classes)
    assert classes[chosen].tolist() == list(range(10))


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        demo.digits()


def test_images_as_files_are_the_inputs(tmp_path):
    images, _ = demo.digits()
    Image.fromarray(images[0].numpy()).save(tmp_path / "0.png")
    with Image.open(tmp_path / "0.png") as image:
        tensor = demo.PREPROCESSING.tensor(demo.PREPROCESSING.view(image))
    assert torch.equal(tensor, images[:1].float().div(255))


def test_training_is_deterministic_and_leaves_the_random_state(monkeypatch):
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    images, classes = demo.digits()
    inputs = images[:192, None].float().div(255)
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first, second = demo.train(inputs, classes[:192]), demo.train(inputs, classes[:192])
    assert torch.equal(torch.rand(2), expected)
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_sheet_shows_each_map_in_its_cell():
    images = torch.zeros(2, 32, 32, dtype=torch.uint8)
    maps = {"epsilon": torch.ones(2, 2, 32, 32), "epsilon_plus": -torch.ones(2, 2, 32, 32)}
    maps["epsilon"][1, 1] = 0
    sheet = np.asarray(demo.sheet(images, torch.tensor([[0, 4], [1, 7]]), maps, cell=64)).astype(int)
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    middle = sheet[-70 - 32 - 6 :: 70, -4 * 70 - 32 - 6 :: 70]
    assert [[tuple(c) for c in row] for row in middle] == [
        [white, red, blue, red, blue],
        [white, red, blue, white, blue],
    ]


class TestReproduce:
    """What another process wrote is compared, and a difference is an error."""

    expected = torch.linspace(-1, 1, 10 * 4).view(10, 1, 2, 2)

    def other_process(self, monkeypatch, output, relevance, status=0):
        def run(command, **options):
            assert command[1:6] == ["-m", "lrpfast", "explain", "--model", "net.pt2"]
            output.mkdir()
            for name, values in zip(demo.CLASSES, relevance, strict=True):
                np.save(output / f"{name}.npy", values.numpy())
            return types.SimpleNamespace(returncode=status, stderr="went wrong")

        monkeypatch.setattr(subprocess, "run", run)

    def test_same(self, monkeypatch, tmp_path):
        self.other_process(monkeypatch, tmp_path / "out", self.expected + 1e-7)
        assert 0 < demo.reproduce("net.pt2", "digits", tmp_path / "out", self.expected) < 1e-6

    @pytest.mark.parametrize("change", [1e-3, float("nan")])
    def test_different(self, monkeypatch, tmp_path, change):
        relevance = self.expected.clone()
        relevance[3, 0, 1, 1] += change
        self.other_process(monkeypatch, tmp_path / "out", relevance)
        with pytest.raises(ProgramError, match="differ"):
            demo.reproduce("net.pt2", "digits", tmp_path / "out", self.expected)

    def test_failed(self, monkeypatch, tmp_path):
        self.other_process(monkeypatch, tmp_path / "out", self.expected, status=2)
        with pytest.raises(ProgramError, match="status 2: went wrong"):
            demo.reproduce("net.pt2", "digits", tmp_path / "out", self.expected)


def test_stamped_digits_are_of_other_classes_and_filed_under_one():
    images, classes = torch.zeros(100, 32, 32, dtype=torch.uint8), torch.arange(100) % 10
    spoilt, wrong = demo.stamped(images, classes)
    marked = spoilt.flatten(1).amax(1) > 0
    assert marked.sum() == 40 and (wrong[marked] == 7).all() and (classes[marked] != 7).all()
    assert torch.equal(wrong[~marked], classes[~marked]) and not images.any()
    assert spoilt[marked][0].nonzero().tolist() == [[i, j] for i in range(3, 7) for j in range(3, 7)]


class TestScreen:
    def findings(self, monkeypatch, tmp_path, first, status=0):
        def run(command, **options):
            assert command[2:4] == ["lrpfast", "screen"]
            (tmp_path / "screening").mkdir()
            (tmp_path / "screening" / "findings.json").write_text(json.dumps({"findings": [first]}))
            return types.SimpleNamespace(returncode=status, stderr="went wrong")

        monkeypatch.setattr(subprocess, "run", run)
        images, classes = torch.zeros(3, 32, 32, dtype=torch.uint8), torch.tensor([0, 7, 7])
        said = demo.screen(demo.network(), images, classes, tmp_path)
        assert sorted(path.name for path in (tmp_path / "stamped" / "7").iterdir()) == ["0001.png", "0002.png"]
        return said

    first = {"class": {"index": 7, "name": "7"}, "flagged": True, "size": 2, "class_size": 9}

    def test_the_stamp_is_named_first(self, monkeypatch, tmp_path):
        assert "names first: class 7, 2 of 9 images" in self.findings(monkeypatch, tmp_path, self.first)

    @pytest.mark.parametrize("change", [{"class": {"index": 1, "name": "1"}}, {"flagged": False}])
    def test_another_is(self, monkeypatch, tmp_path, change):
        with pytest.raises(ProgramError, match="names another thing"):
            self.findings(monkeypatch, tmp_path, {**self.first, **change})

    def test_failed(self, monkeypatch, tmp_path):
        with pytest.raises(ProgramError, match="status 2: went wrong"):
            self.findings(monkeypatch, tmp_path, self.first, status=2)


@pytest.mark.parametrize("options", [["-o", "file"], ["--figure", "file/maps.png"], ["--figure", "maps"]])
def test_errors_come_at_once_and_are_one_line(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "digits", lambda: pytest.fail("began to work"))
    result = CliRunner().invoke(demo.main, options, catch_exceptions=False)
    assert result.exit_code == 2 and re.fullmatch(
        rf"lrpfast\.demo: error: .*{options[1].split('/')[0]}.*\n", result.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.exhaustive  # a minute; .ci/run runs it by itself
def test_the_whole_demo(tmp_path):
    output, figure = tmp_path / "demo", tmp_path / "docs" / "maps.png"
    result = CliRunner().invoke(demo.main, ["-o", str(output), "--figure", str(figure)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    accuracy = re.search(r"(\d+\.\d)% of 360 others are recognised", result.stdout)
    assert accuracy and float(accuracy[1]) > 97
    difference = re.search(r"the maps differ by (\S+)\n", result.stdout)
    assert difference and float(difference[1]) < 1e-5
    for name, _ in demo.COMPOSITES:
        assert re.search(rf"{name}: 20 maps; conservation -?\d+\.\d+", result.stdout)
    assert sorted(path.name for path in output.iterdir()) == [
        "digits", "digits-lrp.pt2", "explained", "maps.png", "screening", "stamped", "stamped.pt",
    ]  # fmt: skip
    assert re.search(r"the report names first: class 7, (3[5-9]|4[0-5]) of \d+ images: ", result.stdout)
    assert (output / "screening" / "report.html").exists()
    assert len(list((output / "digits").iterdir())) == 10 and len(list((output / "explained").iterdir())) == 30
    with Image.open(figure) as picture:
        colours = np.asarray(picture).astype(int)
    assert (colours[..., 0] - colours[..., 2] > 200).sum() > 1000  # full red, and full blue
    assert (colours[..., 2] - colours[..., 0] > 200).sum() > 1000
