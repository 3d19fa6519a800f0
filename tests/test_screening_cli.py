"""The commands of a screening: what they write and print, and that what is wrong is one clear line and a status."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import lrpfast
from lrpfast.cli import main
from lrpfast.screening import engines
from lrpfast.screening.progress import duration
from tests.screening_data import CLASSES, MODULE, SIZE, command, environment, make, picture, pictures, rows, start
from tests.without_torch import statuses


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a person stands in, with a network and images of theirs."""
    (tmp_path / "nets.py").write_text(MODULE)
    pictures(tmp_path / "data", 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield tmp_path
    sys.modules.pop("nets", None)


def call(*arguments, status: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.stderr + result.stdout
    return result


def screen(*arguments, data="data", status: int = 0, stages=("explain",)):
    chosen = [word for stage in stages for word in ("--stage", stage)]
    base = ("screen", "--model", "nets:make", "--size", SIZE, "--data", data, "-o", "out", "--workers", 0)
    return call(*base, *chosen, *arguments, status=status)


class TestScreen:
    def test_explains_and_says_what_it_did(self, folder):
        picture(folder / "data" / "cat" / "bad.png", 0).write_bytes(b"no image")
        result = screen("--shard-size", 5, "--pool", 4)
        lines = result.stdout.splitlines()
        assert re.fullmatch(r"explained: 12 of 13 images \(13 now, [\d.,]+ images/s\)", lines[0])
        assert lines[1] == "skipped: 1, listed in out/skipped.jsonl"
        assert re.fullmatch(r"prediction = label: \d+\.\d%", lines[2])
        assert "13 images in data" in result.stderr and "bad.png is not an image that can be read" in result.stderr
        assert len(rows(folder / "out")["sample"]) == 12
        again = screen("--shard-size", 5, "--pool", 4)
        assert again.stdout.startswith("explained: 12 of 13 images (all by earlier runs)\n")

    def test_options_reach_the_maps(self, folder):
        from PIL import Image

        from lrpfast import models
        from lrpfast.images import Preprocessing

        options = ("--mean", "0.5,0.4,0.3", "--std", "0.2,0.3,0.4", "--composite", "epsilon_gamma_box")
        screen(*options, "--target", "prediction", "--seed", "one", "--pool", 4)
        preprocessing = Preprocessing((SIZE, SIZE), (SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
        with Image.open("data/cat/00.png") as image:
            inputs = preprocessing.tensor(preprocessing.view(image))[None]
        composite = lrpfast.composites.epsilon_gamma_box(low=preprocessing.low, high=preprocessing.high)
        expected = lrpfast.explain(models.load("nets:make").model, inputs, composite=composite, seed="one").heatmap()
        expected = torch.nn.functional.avg_pool2d(expected[:, None], 4).flatten().numpy()
        found = rows(folder / "out")["relevance"][0]
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())

    def test_buffers_of_another_dtype_than_the_parameters(self, folder):
        (folder / "nets.py").write_text(
            f"import torch\n{MODULE}\n"
            "class Scaled(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.scale, self.net = nn.Module(), make()\n"
            "        self.scale.register_buffer('by', torch.tensor(1.0, dtype=torch.float64))\n"
            "    def forward(self, x):\n"
            "        return self.net(x * self.scale.by)\n"
        )
        base = ("screen", "--model", "nets:Scaled", "--size", SIZE, "--data", "data", "-o", "out", "--workers", 0)
        call(*base, "--stage", "explain", "--stage", "analyse", "--stage", "verify")
        assert np.abs(rows(folder / "out")["relevance"]).max(1).all()

    def test_a_saved_explanation_is_screened_with_as_its_model_is(self, folder):
        call("compile", "--model", "nets:make", "--size", SIZE, "-o", "net.pt2")
        screen("--pool", 4)
        one = rows(folder / "out")
        base = ("screen", "--model", "net.pt2", "--data", "data", "-o", "other", "--workers", 0, "--stage", "explain")
        call(*base, "--pool", 4)
        other = rows(folder / "other")
        largest = np.abs(one["relevance"]).max()
        np.testing.assert_allclose(other["relevance"], one["relevance"], rtol=5e-3, atol=2e-3 * largest)
        np.testing.assert_array_equal(other["top5_class"], one["top5_class"])
        assert one["features"].shape == (12, 4) and other["features"].shape == (12, 0)

    def test_a_saved_explanation_may_tell_of_features(self, folder):
        from lrpfast import models

        record = ("0", "@features", "3")
        explainer = lrpfast.Explainer(make(), torch.rand(2, 3, SIZE, SIZE), record=record)
        recorded = (part for name in record for part in ("--record", name))
        call("compile", "--model", "nets:make", "--size", SIZE, "-o", "net.pt2", *recorded)
        call("screen", "--model", "net.pt2", "--data", "data", "-o", "out", "--workers", 0, "--stage", "explain")
        found = rows(folder / "out")
        assert found["features"].shape == (12, 4)
        source = lrpfast.screening.open_source("data", models.load("net.pt2").preprocessing)
        inputs = torch.stack([source.tensor(index) for index in range(12)])
        expected = explainer(inputs, target=torch.arange(12) // 4).layers["@features"].detach().numpy()
        told = found["features"] * found["features_scale"][:, None]
        np.testing.assert_allclose(told, expected, rtol=5e-3, atol=1e-3 * np.abs(expected).max())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--data", "absent"), "there are no data absent; they are a folder of class folders"),
            (("--data", "empty"), "holds no folders"),
            (("--data", "data/cat"), "holds no folders"),
            (("--classes", "names.txt"), "none of the model's, or several: ox"),
            (("--composite", "epsilon_plsu"), "epsilon_plsu.*epsilon_plus"),
            (
                ("--classes", "five.txt"),
                "there are 5 names of classes, and nets:make has 3 outputs; give --classes a file",
            ),
            (("--device", "cuda:77"), "device 'cuda:77' cannot be used"),
            (("--size", "20"), r"Sequential cannot be captured for inputs \[batch, 3, 20, 20\]: .*mat1 and mat2"),
            (("--mean", "0.5", "--std", "0.5"), r"cannot be captured for inputs \[batch, 1, 16, 16\]: .*1 channels"),
            (("-o", "nets.py/out"), "cannot be used"),
            (("-o", "data/out"), "lies in the data"),
            (("--stage", "report"), "out holds no screening"),
        ],
    )
    def test_errors_come_before_anything_is_written(self, folder, arguments, message):
        (folder / "empty").mkdir()
        (folder / "names.txt").write_text("cat\ndog\nbee\n")
        (folder / "five.txt").write_text("cat\ndog\nox\nbee\nyak\n")
        stages = () if "--stage" in arguments else ("explain",)
        result = screen(*arguments, status=2, stages=stages)
        assert re.search(f"^lrpfast: error: .*{message}", result.stderr, re.MULTILINE), result.stderr
        assert result.stdout == "" and not list(folder.glob("out/shards"))

    def test_other_settings_are_refused(self, folder):
        screen("--pool", 4)
        result = screen("--pool", 5, status=2)
        assert "out holds a screening with other settings" in result.stderr and "map.height is 4 there" in result.stderr

    @pytest.mark.parametrize("stage", ["analyse", "verify", "report"])
    def test_later_stages_refuse_other_settings_before_they_write(self, folder, stage):
        screen("--pool", 4)
        others = folder / "a folder whose name is as long as those that people give" / "others"
        pictures(others, 5)
        (folder / "reversed.txt").write_text("ox\ndog\ncat\n")
        before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.name != ".lock"}
        cases = {
            ("--checkpoint", "other.pt"): "the model has other weights",
            ("--data", others): 'settings, .*data is ".*/data" there and ".*/others" now.*the data are others',
            ("--classes", "reversed.txt"): "the classes are others",
            ("--target", "prediction"): 'target is "label" there and "prediction" now',
        }
        torch.save({name: value + 1 for name, value in make().state_dict().items()}, folder / "other.pt")
        for options, message in cases.items():
            result = screen("--pool", 4, *options, status=2, stages=(stage,))
            assert re.search(f"out holds a screening with other.*{message}", result.stderr), result.stderr
        assert before == {path: path.stat().st_mtime_ns for path in before}
        assert {*before} == {path for path in (folder / "out").rglob("*") if path.name != ".lock"}

    def test_later_stages_want_all_shards(self, folder):
        screen("--shard-size", 5)
        (folder / "out" / "shards" / "shard-000001.parquet").unlink()
        result = screen("--shard-size", 5, stages=("analyse",), status=2)
        assert "out has 2 of 3 shards; run the stage explain to the end first" in result.stderr

    def test_a_model_that_knows_none_of_the_classes_is_warned_of(self, folder):
        pictures(folder / "more", 40)
        screen("-o", "first", data="more")
        found = rows(folder / "first")
        for name, count, shift in (("right", 120, 0), ("wrong", 120, 1), ("few", 99, 1)):
            for label in CLASSES:
                (folder / name / label).mkdir(parents=True)
            for path, prediction in [*zip(found["path"], found["prediction"], strict=True)][:count]:
                shutil.copy(path, folder / name / CLASSES[(prediction + shift) % 3] / path.replace("/", "-"))
            result = screen("-o", f"of-{name}", data=name)
            share = "100.0%" if name == "right" else "0.0%"
            assert f"prediction = label: {share}\n" in result.stdout
            assert ("the model hardly ever predicts the label" in result.stderr) is (name == "wrong")

    def test_of_data_without_labels_nothing_is_said_of_them(self, folder):
        pictures(folder / "more", 40)
        paths = sorted((folder / "more").rglob("*.png"))
        (folder / "list.csv").write_text("".join(f"{path},-1\n" for path in paths))
        result = screen("--target", "prediction", data="list.csv")
        assert result.stdout.startswith("explained: 120 of 120 images")
        assert "label" not in result.stdout + result.stderr

    def test_usage_errors(self, folder):
        for arguments in (("--pool", 0), ("--target", "x"), ("--engine", "cloud"), ("--stage", "x"), ("--workers", -1)):
            assert "Usage: " in screen(*arguments, status=2).stderr

    def test_report_and_export_want_a_screening(self, folder):
        for words in (("report", "absent"), ("export-virelay", "absent", "-o", "project")):
            assert "absent holds no screening" in call(*words, status=2).stderr
            assert not (folder / "absent").exists() and not (folder / "project").exists()


class TestProcess:
    def test_two_at_once(self, folder):
        hold = (
            "import sys\nfrom lrpfast.screening import manifest\n"
            "with manifest.locked('out'):\n    print(1, flush=True)\n    sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", hold], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder:
            holder.stdout.readline()
            result = screen(status=2)
            holder.kill()
        assert f"out is in use by process {holder.pid}" in result.stderr

    @pytest.mark.slow
    def test_interrupted(self, folder):
        pictures(folder / "data", 60)
        with start(folder, command("data", "out", "--shard-size", 5, "--workers", 1)) as process:
            while not list(folder.glob("out/shards/shard-*")):
                time.sleep(0.02)
                assert process.poll() is None, process.stderr.read()
            process.send_signal(2)
            out, err = process.communicate(timeout=30)
        if process.returncode != 0:  # it may have been done
            assert process.returncode == 130 and "Traceback" not in err, err
            assert "interrupted; every file written so far is complete" in err
        assert not list(folder.glob("out/shards/.lrpfast-*"))
        screen("--shard-size", 5)
        assert len(rows(folder / "out")["sample"]) == 180

    @pytest.mark.slow
    def test_interrupted_while_it_takes_a_batch(self, folder):
        """The decoding process meets the end of the connection by which it hands a tensor over."""
        cut = (
            "from multiprocessing import connection\n"
            "def interrupted(*args):\n"
            "    raise KeyboardInterrupt\n"
            "connection.answer_challenge = interrupted\n"
            "from lrpfast.cli import main\nmain(prog_name='lrpfast')"
        )
        _, _, _, *words = command("data", "out", "--shard-size", 5, "--workers", 1)
        done = subprocess.run(
            [sys.executable, "-c", cut, *words],
            cwd=folder, env=environment(), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 130 and "lrpfast: interrupted" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr

    def test_decoding_processes_tell_of_other_errors(self, monkeypatch):
        told = []
        monkeypatch.setattr(sys, "excepthook", lambda kind, error, where: told.append(error))
        engines._silent_when_cut_off(0)
        errors = [EOFError(), BrokenPipeError(), ValueError("a bug"), MemoryError()]
        for error in errors:
            sys.excepthook(type(error), error, None)
        assert told == errors[2:]

    @pytest.mark.slow
    def test_on_a_terminal_there_is_a_bar(self, folder):
        pictures(folder / "data", 30)
        (folder / "data" / "cat" / "00.png").write_bytes(b"no image")
        ours, theirs = pty.openpty()
        setting = {**environment(), "TERM": "xterm", "COLUMNS": "120"}
        words = command("data", "out", "--shard-size", 30)
        with subprocess.Popen(words, cwd=folder, env=setting, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # how the end of a terminal is told
                while part := os.read(ours, 65536):
                    shown += part
        os.close(ours)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
        assert process.returncode == 0, text
        assert re.search(r"explaining .*90/90 .*images/s, decoding \d+% of the time, 0 s left", text)
        assert "skipped: " in text and "prediction = label" in text

    def test_help_does_not_import_torch(self, folder):
        commands = [["screen", "--help"], ["report", "--help"], ["export-virelay", "--help"], ["screen"]]
        assert statuses(commands, folder) == [0, 0, 0, 2]


def test_times_as_a_person_says_them():
    seconds = (0.4, 89, 90, 3000, 5400, 7500, 3 * 86400 + 4 * 3600)
    assert [duration(s) for s in seconds] == ["0 s", "89 s", "2 min", "50 min", "1 h 30 min", "2 h 5 min", "3 d 4 h"]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    from lrpfast.screening.progress import Explained

    with Explained(200, 50, every=0.0) as bar:
        bar.begin()
        bar.advance(50, 0.0)
        bar.advance(50, None)
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"explained 100 of 200 \(50%\): [\d,.e+]+ images/s, decoding 0% of the time, 0 s left", lines[0]
    )
    assert re.fullmatch(r"explained 150 of 200 \(75%\): [\d,.e+]+ images/s, 0 s left", lines[1])


@pytest.mark.slow
def test_the_whole_command(folder):
    for module in ("verification", "report"):
        importlib.import_module(f"lrpfast.screening.{module}")
    (folder / "data").rename(folder / "few")
    pictures(folder / "data", 15)
    result = screen("--pool", 8, stages=())
    assert result.stdout.endswith("report: out/report.html\n")
    assert {"findings.json", "findings.csv", "report.html"} <= {path.name for path in (folder / "out").iterdir()}
    json.loads((folder / "out" / "findings.json").read_text())
    (folder / "out" / "report.html").unlink()
    call("report", "out")
    with_pictures = (folder / "out" / "report.html").read_text()
    (folder / "data").rename(folder / "gone")
    again = call("report", "out")
    assert "the report is written without pictures of the images" in again.stderr
    assert again.stdout == "report: out/report.html\n"
    without = (folder / "out" / "report.html").read_text()
    note = "The images are not shown: "
    assert note in without and note not in with_pictures
    # Maps, which are PNG, are there still; what is made of an image, overlays in JPEG among it, is not.
    assert "data:image/jpeg" in with_pictures and "data:image/jpeg" not in without and "data:image/png" in without
