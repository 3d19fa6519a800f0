"""Triton is an extra: without it, or with a broken one, everything that needs no GPU works, and what is missing is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch, lrpfast
from lrpfast import backends
from lrpfast.ops import gpu
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)).eval()
print(lrpfast.explain(model, torch.ones(1, 4)).relevance.shape == (1, 4))
print(gpu.load()[0] is None, gpu.runs_on("cuda"), gpu.runs_on("cpu"))
try:
    lrpfast.Explainer(model, backend="triton")
except lrpfast.errors.InputError as error:
    print(error)
print(backends.report().splitlines()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "Triton is not installed: pip install lrpfast[gpu]"),
        ("raise ImportError('libtriton.so: not found')", "Triton does not load: libtriton.so: not found"),
    ],
)
def test_import_and_explain(module: str | None, reason: str, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['triton'] = None\n" if module is None else ""
    if module is not None:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text(module)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    run = subprocess.run(
        [sys.executable, "-c", hide + SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:2] == ["True", "True False False"]
    assert lines[2].startswith(f"backend 'triton' is not available: {reason}")
    assert lines[3].startswith(f"triton: not used: {reason}")


def test_importing_lrpfast_does_not_import_triton() -> None:
    script = "import sys, torch; there = 'triton' in sys.modules; import lrpfast.explainer; print(there or 'triton' not in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "True", run.stderr
