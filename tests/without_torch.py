"""Commands in a process where an import of torch ends the command."""

import json
import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_RUN = """
import contextlib, json, runpy, sys

statuses = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["lrpfast", *words]
    with contextlib.redirect_stdout(sys.stderr):
        try:
            runpy.run_module("lrpfast", run_name="__main__")
        except SystemExit as end:
            statuses.append(end.code)
print(json.dumps(statuses))
"""


def statuses(commands: list[list[str]], folder: Path) -> list[int | str]:
    """The exit status of each command of ``python -m lrpfast``, run in `folder` one after the other; a word where it wants torch."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    command = [sys.executable, "-c", _RUN, json.dumps(commands)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
