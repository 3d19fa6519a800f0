"""Screens in a process of its own as often as it is told, so that a test can kill it without waiting for torch to be imported.

`python -m tests.screening_server DATA STAGES`: for each line on stdin, a folder, a child explains DATA into it, and where STAGES is "all",
analyses, verifies and reports; its process id is printed when it starts, and its status when it ends.
"""

from __future__ import annotations

import os
import sys

import torch

from lrpfast.errors import LrpfastError
from lrpfast.screening import analyse, explain_dataset, open_source, verify, write_report
from tests.screening_data import PREPROCESSING, a_recipe, make


def run(data: str, folder: str, stages: str) -> int:
    made = a_recipe()
    try:
        source = open_source(data, PREPROCESSING, made.model, folder)
        explain_dataset(made, source, folder, shard_size=5, batch_size=4, pool=4, workers=1)
        if stages == "all":
            model = make()
            analyse(folder, processes=1)
            verify(folder, source, lambda x: model(x).detach())
            write_report(folder, source)
    except LrpfastError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    return 0


def main(data: str, stages: str) -> None:
    torch.set_num_threads(1)  # a forked child could not use the threads of its parent
    for folder in sys.stdin:
        child = os.fork()
        if child == 0:
            os.setsid()
            os._exit(run(data, folder.strip(), stages))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
