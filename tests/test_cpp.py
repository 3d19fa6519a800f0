"""The kernels under sanitizers, in a program of their own: memory that is not theirs, and threads that meet."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="CMake is not installed")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels(sanitizer: str, tmp_path: Path) -> None:
    options = ["-DLRPFAST_TESTS=ON", f"-DLRPFAST_SANITIZE={sanitizer}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "kernel_tests"], check=True, capture_output=True)
    done = subprocess.run(
        [tmp_path / "kernel_tests"],
        capture_output=True,
        text=True,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr
