"""Killed at any moment and started again: nothing lost, nothing twice, and the same as without."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrpfast.errors import ScreeningError
from lrpfast.screening import analyse, explain_dataset, open_source
from lrpfast.screening import manifest as manifests
from lrpfast.screening.analysis import read_analysis
from lrpfast.screening.store import Store
from tests.screening_data import PREPROCESSING, ROOT, a_recipe, assert_same, environment, pictures, rows


def screen(data: Path, folder: Path, **options):
    made = a_recipe()
    source = open_source(data, PREPROCESSING, made.model, folder)
    return explain_dataset(
        made, source, folder, **{"shard_size": 5, "batch_size": 4, "pool": 4, "workers": 0, **options}
    )


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What each shard's file is: it changes where one is written again."""
    found = (folder / "shards").glob("shard-*.parquet")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


class Server:
    """Runs that can be killed."""

    def __init__(self, data: Path, stages: str = "explain") -> None:
        words = [sys.executable, "-m", "tests.screening_server", str(data), stages]
        self._process = subprocess.Popen(
            words,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, kill_after: float | None = None) -> tuple[int, float]:
        """Run, killed after so many seconds; returns the status and what it took."""
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        began = time.perf_counter()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        return int(self._process.stdout.readline()), time.perf_counter() - began

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process.stderr.close()


def kill_and_go_on(tmp_path: Path, kills: int, images: int) -> None:
    data = pictures(tmp_path / "data", images)
    (data / "cat" / "03.png").write_bytes(b"no image")
    screen(data, tmp_path / "whole")
    rng, seen = random.Random(kills), {}
    folder = tmp_path / "killed"
    with Server(data) as server:
        status, length = server.run(tmp_path / "other")
        assert status == 0
        killed = 0
        for _ in range(10 * kills):
            status, _ = server.run(folder, rng.uniform(0.01, 0.8 * length))
            now = identities(folder) if folder.exists() else {}
            assert {name: now[name] for name in seen} == seen  # nothing lost, nothing done twice
            seen = now
            killed += status == -signal.SIGKILL
            if killed == kills:
                break
            if status == 0:  # too late to kill: most of it has to be done again
                for name in rng.sample(sorted(seen), 4 * len(seen) // 5):
                    (folder / "shards" / name).unlink()
                    del seen[name]
        assert killed == kills
        assert server.run(folder)[0] == 0
    now = identities(tmp_path / "killed")
    assert {name: now[name] for name in seen} == seen and len(now) == 3 * images // 5
    assert not [path for path in (tmp_path / "killed").rglob(".lrpfast-*")]
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert sorted(rows(tmp_path / "killed")["sample"]) == [i for i in range(3 * images) if i != 3]


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    kill_and_go_on(tmp_path, 6, 20)


@pytest.mark.exhaustive
def test_killed_at_forty_moments(tmp_path):
    kill_and_go_on(tmp_path, 40, 90)


@pytest.mark.exhaustive
def test_killed_in_every_stage(tmp_path):
    data = pictures(tmp_path / "data", 20)
    rng, folder, kills, met = random.Random(5), tmp_path / "killed", 0, set()
    with Server(data, "all") as server:
        status, length = server.run(tmp_path / "whole")
        assert status == 0
        for _ in range(200):
            status, _ = server.run(folder, rng.uniform(0.01, length))
            kills += status == -signal.SIGKILL
            for stage, sign in SIGNS.items():
                if list(folder.glob(sign)):
                    met.add(stage)
            if status == 0 or rng.random() < 0.1:  # begin again, from some stage
                begin = rng.choice(["shards/*1.parquet", "analysis/class-*", "analysis/trial-*", "report.html"])
                for path in {*folder.glob(begin), *folder.glob("report.html")}:
                    path.unlink()
            if kills >= 30 and len(met) == len(SIGNS):
                break
        assert kills >= 30 and met == {*SIGNS}
        assert server.run(folder)[0] == 0
    assert_same(tmp_path / "whole", folder)
    assert (folder / "findings.csv").read_bytes() == (tmp_path / "whole" / "findings.csv").read_bytes()
    assert (folder / "findings.json").read_bytes() == (tmp_path / "whole" / "findings.json").read_bytes()
    assert (folder / "report.html").exists() and not list(folder.rglob(".lrpfast-*"))


# What each stage leaves behind.
SIGNS = {
    "explain": "shards/shard-*", "analyse": "analysis/class-*", "verify": "analysis/trial-*", "report": "report.html",
}  # fmt: skip


class TestGoingOn:
    @pytest.fixture
    def data(self, tmp_path):
        return pictures(tmp_path / "data", 5)

    def test_only_what_is_missing_is_done(self, data, tmp_path):
        screen(data, tmp_path / "out")
        before = identities(tmp_path / "out")
        whole = rows(tmp_path / "out")
        (tmp_path / "out" / "shards" / "shard-000001.parquet").unlink()
        summary = screen(data, tmp_path / "out")
        assert summary.earlier == 10
        after = identities(tmp_path / "out")
        assert [name for name in before if before[name] != after[name]] == ["shard-000001.parquet"]
        again = rows(tmp_path / "out")
        assert all((whole[name] == again[name]).all() for name in whole if name != "top5_logit")

    def test_a_finished_one_is_not_compiled_again(self, data, tmp_path):
        screen(data, tmp_path / "out")
        made = a_recipe()
        source = open_source(data, PREPROCESSING, made.model, tmp_path / "out")
        object.__setattr__(made, "build", lambda: pytest.fail("compiled"))
        assert explain_dataset(made, source, tmp_path / "out", shard_size=5, pool=4).earlier == 15

    def test_files_added_and_removed_meanwhile(self, data, tmp_path):
        screen(data, tmp_path / "out")
        whole = rows(tmp_path / "out")
        (tmp_path / "out" / "shards" / "shard-000001.parquet").unlink()
        pictures(data / "cat", 1)  # folders within cat: six new images of it
        (data / "dog" / "02.png").unlink()
        summary = screen(data, tmp_path / "out")
        assert [entry.sample for entry in summary.skipped] == [7]
        assert "02.png does not exist" in summary.skipped[0].reason
        again = rows(tmp_path / "out")
        assert [*again["sample"]] == [i for i in range(15) if i != 7]
        kept = [i for i in range(15) if i != 7]
        assert (again["relevance"] == whole["relevance"][kept]).all()

    def test_an_image_that_was_repaired_is_analysed(self, data, tmp_path):
        broken, folder = data / "dog" / "02.png", tmp_path / "out"
        content = broken.read_bytes()
        broken.write_bytes(b"no image")
        assert len(screen(data, folder).skipped) == 1
        analyse(folder, processes=1)
        broken.write_bytes(content)
        (folder / "shards" / "shard-000001.parquet").unlink()
        assert not screen(data, folder).skipped
        analyse(folder, processes=1)
        assert len(Store(folder)) == 15 and len(read_analysis(folder, 1).clusters) == 5

    @pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other", "foreign", "text"])
    def test_a_damaged_shard_is_explained_again(self, data, tmp_path, damage, capsys):
        screen(data, tmp_path / "out")
        whole = rows(tmp_path / "out")
        path = tmp_path / "out" / "shards" / "shard-000001.parquet"
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[content.find(whole["map"][5:10].tobytes()) + 33] ^= 1  # a bit of a map
        elif damage == "other":
            content = bytearray((tmp_path / "out" / "shards" / "shard-000002.parquet").read_bytes())
        elif damage == "foreign":  # the same samples, explained otherwise
            screen(data, tmp_path / "foreign", seed="one")
            content = bytearray((tmp_path / "foreign" / "shards" / "shard-000001.parquet").read_bytes())
        else:
            content = {"cut": content[:-100], "empty": bytearray(), "text": bytearray(b"hello")}[damage]
        path.write_bytes(content)
        assert screen(data, tmp_path / "out").earlier == 10
        assert "shard-000001.parquet is" in capsys.readouterr().err
        again = rows(tmp_path / "out")
        assert all((whole[name] == again[name]).all() for name in whole if name != "top5_logit")

    def test_what_a_killed_process_left_is_removed(self, data, tmp_path):
        screen(data, tmp_path / "out")
        for folder in (tmp_path / "out", tmp_path / "out" / "shards"):
            (folder / ".lrpfast-0123.parquet").touch()
        screen(data, tmp_path / "out")
        assert not list((tmp_path / "out").rglob(".lrpfast-*"))

    def test_killed_between_list_and_manifest_is_not_begun(self, data, tmp_path):
        screen(data, tmp_path / "out")
        (tmp_path / "out" / "manifest.json").unlink()
        pictures(data, 6)
        made = a_recipe()
        source = open_source(data, PREPROCESSING, made.model, tmp_path / "out")
        assert len(source) == 18
        assert explain_dataset(made, source, tmp_path / "out", shard_size=5, pool=4, workers=0).samples == 18

    @pytest.mark.parametrize("text", ["", "{}", '{"format": 2}', "[1]", '{"format": 1}'])
    def test_a_damaged_manifest_is_an_error(self, tmp_path, text):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ScreeningError, match=r"manifest\.json cannot be read|of format 1"):
            manifests.read(tmp_path)

    def test_a_changed_manifest_is_an_error(self, data, tmp_path):
        screen(data, tmp_path / "out")
        path = tmp_path / "out" / "manifest.json"
        path.write_text(path.read_text().replace('"shard_size": 5', '"shard_size": 4'))
        with pytest.raises(ScreeningError, match="was changed"):
            screen(data, tmp_path / "out", shard_size=4)
        with pytest.raises(ScreeningError, match="holds no screening"):
            manifests.read(tmp_path)
