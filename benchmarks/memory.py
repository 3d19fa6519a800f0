"""Peak memory of one process that explains one batch, against one that takes torch's own input gradient of it.

    python -m benchmarks.memory MODEL BATCH THREADS gradient
    python -m benchmarks.memory MODEL BATCH THREADS lrpfast COMPOSITE BACKEND

Each run is a process of its own and prints its peak resident memory in bytes: everything counts, the imports, the
weights, and for lrpfast the capture and the prepared weights too. The values play no role, so the networks have fresh
random weights.

The kernel's `ru_maxrss` of a process started by a large one begins at the peak of its *parent* (exec keeps the maximum),
so the peak is read from `VmHWM`, which belongs to the process image; `ru_maxrss` serves where there is no /proc.
"""

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path


def peak(model: str, batch: int, threads: int, *what: str) -> int:
    """Peak memory in bytes of a fresh process that does `what`: ("gradient",) or ("lrpfast", composite, backend)."""
    command = [sys.executable, "-m", "benchmarks.memory", model, str(batch), str(threads), *what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def _peak_of_this_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _main(arguments: list[str]) -> None:
    import torch

    from tests import torchvision_shim  # noqa: F401  (makes torchvision importable)

    name, batch, threads, what = arguments[0], int(arguments[1]), int(arguments[2]), arguments[3]
    torch.set_num_threads(threads)
    models = importlib.import_module("torchvision.models")
    model = models.get_model(name, weights=None).eval().to(memory_format=torch.channels_last)
    inputs = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    targets = torch.arange(batch)
    if what == "gradient":
        for _ in range(2):
            x = inputs.clone().requires_grad_()
            logits = model(x).gather(1, targets[:, None])
            torch.autograd.grad(logits.sum(), x)
            del logits
    else:
        import lrpfast
        from benchmarks.peers import composite

        explainer = lrpfast.Explainer(model, inputs, composite=composite(arguments[4]), backend=arguments[5])
        for _ in range(2):
            explainer(inputs, target=targets)
    print(json.dumps({"peak_bytes": _peak_of_this_process()}))


if __name__ == "__main__":
    _main(sys.argv[1:])
