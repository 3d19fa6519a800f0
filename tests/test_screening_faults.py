"""What goes wrong around a screening: a full disk, two runs at once, a process that dies; a clear message, and nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading

import pytest

from lrpfast.errors import OutputError, ScreeningError
from lrpfast.screening import manifest as manifests
from lrpfast.screening import shards
from tests.screening_data import ROOT, assert_same, command, environment, pictures, start
from tests.test_screening_resume import screen


@pytest.fixture
def data(tmp_path):
    return pictures(tmp_path / "data", 10)


class TestDiskFull:
    def test_the_shards_before_it_stay_and_the_run_can_go_on(self, data, tmp_path, monkeypatch):
        write, calls = shards.pq.write_table, []

        def full(table, file, **options):
            calls.append(file)
            if len(calls) == 4:  # the first is the list of samples
                file.write(b"PAR1 and some of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            write(table, file, **options)

        monkeypatch.setattr(shards.pq, "write_table", full)
        with pytest.raises(OutputError, match=r"shard-000002\.parquet cannot be written: No space left on device"):
            screen(data, tmp_path / "out")
        monkeypatch.undo()
        there = sorted(path.name for path in (tmp_path / "out" / "shards").iterdir())
        assert there == ["shard-000000.parquet", "shard-000001.parquet"]
        assert screen(data, tmp_path / "out").earlier == 10
        screen(data, tmp_path / "whole")
        assert_same(tmp_path / "whole", tmp_path / "out")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
    def test_on_a_disk_that_is_full(self, data, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(disk)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted: {done.stderr.decode()}")
        try:
            with pytest.raises(OutputError, match=r"shard-\d+\.parquet cannot be written: No space left on device"):
                screen(data, disk / "out", pool=16)
            there = sorted((disk / "out" / "shards").iterdir())
            assert there and all(path.name.startswith("shard-") for path in there)
            with pytest.raises(OutputError, match="No space left on device"):
                screen(data, disk / "out", pool=16)
            assert sorted((disk / "out" / "shards").iterdir()) == there
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            assert screen(data, disk / "out", pool=16).earlier == 5 * len(there)
            screen(data, tmp_path / "whole", pool=16)
            assert_same(tmp_path / "whole", disk / "out")
        finally:
            subprocess.run(["umount", str(disk)], check=True)


HOLD = """
import sys, time
from lrpfast.screening import manifest
with manifest.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestTwoAtOnce:
    def test_the_second_is_refused_and_told_who_is_there(self, data, tmp_path):
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "out")],
            cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as holder:  # fmt: skip
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ScreeningError, match=rf"out is in use by process {holder.pid} on .*; wait until"):
                screen(data, tmp_path / "out")
            holder.kill()
        screen(data, tmp_path / "out")  # the lock went with its process

    def test_two_threads(self, tmp_path):
        errors: list[Exception] = []

        def other():
            try:
                with manifests.locked(tmp_path / "out"):
                    pass
            except ScreeningError as error:
                errors.append(error)

        with manifests.locked(tmp_path / "out"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            with manifests.locked(tmp_path / "out"):  # but once more in the same
                pass
            assert len(errors) == 1 and "another thread" in str(errors[0])
            subprocess_sees = subprocess.run(
                [sys.executable, "-c", HOLD, str(tmp_path / "out")],
                cwd=ROOT, env=environment(), input="", capture_output=True, text=True,
            )  # fmt: skip
            assert f"in use by process {os.getpid()}" in subprocess_sees.stderr
        other()
        assert len(errors) == 1

    def test_a_folder_that_cannot_be_made(self, data, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot be made"):
            screen(data, tmp_path / "file" / "out")


class TestProcesses:
    @pytest.mark.slow
    def test_a_decoding_process_that_dies_is_told_and_the_run_can_go_on(self, tmp_path, monkeypatch):
        (tmp_path / "deadly.py").write_text(
            "import os, torch\nfrom torch.utils.data import get_worker_info\n"
            "class Data:\n"
            "    def __len__(self):\n        return 20\n"
            "    def __getitem__(self, index):\n"
            "        if index == 12 and get_worker_info() is not None:\n            os.kill(os.getpid(), 9)\n"
            "        return torch.full((3, 16, 16), index / 20.0), index % 3\n"
        )
        # torch tells of it from a signal's handler, at any place of the main thread: not in the process of the tests.
        with start(tmp_path, command("deadly:Data", "out", "--shard-size", 5, "--pool", 4, "--workers", 1)) as process:
            _, err = process.communicate(timeout=60)
        assert process.returncode != 0 and "DataLoader worker" in err, err
        assert all(path.read_bytes().endswith(b"PAR1") for path in (tmp_path / "out").glob("shards/*"))
        shutil.rmtree(tmp_path / "out")  # the command's model is not this one
        monkeypatch.syspath_prepend(tmp_path)
        summary = screen("deadly:Data", tmp_path / "out", workers=0)
        assert summary.samples == 20 and not summary.skipped
        screen("deadly:Data", tmp_path / "whole", workers=0)
        assert_same(tmp_path / "whole", tmp_path / "out")

    def test_the_lock_is_not_inherited_by_children(self, tmp_path):
        # What decodes lives on for some seconds when the process is killed.
        script = (
            "import os, sys, time\nfrom lrpfast.screening import manifest\n"
            "with manifest.locked(sys.argv[1]):\n"
            "    if os.fork() == 0:\n        os.close(1)\n        time.sleep(30)\n        os._exit(0)\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "out")], cwd=ROOT, env=environment(), stdout=subprocess.PIPE
        )
        assert done.returncode == -9
        with manifests.locked(tmp_path / "out"):
            pass
