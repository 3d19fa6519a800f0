"""`python -m benchmarks.gpu`: everything that can be measured of the GPU kernels here, as tables and JSON.

    python -m benchmarks.gpu                              all sections that this machine can do
    python -m benchmarks.gpu --section model layers       some of them
    python -m benchmarks.gpu -o results.json

Sections: `check` compares every kernel with float64, on the GPU or in Triton's interpreter; `aot` compiles variants for sm_80 and sm_90 and
reads the machine code; `model` counts operations and bytes of each step and predicts its time; `ceilings`, `layers`, `models` and `latency`
measure, and need a GPU. Nothing is fetched from a network.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():  # before the kernels are imported: Triton then interprets them
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.gpu import device, floors, layers, models
from benchmarks.gpu.floors import H100, Gpu

ROOT = Path(__file__).parents[2]
PREDICTED = (
    ("resnet50", "epsilon_plus_flat"),
    ("resnet50", "epsilon_gamma_box"),
    ("vgg16", "epsilon_plus_flat"),
)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """The kernels' tests."""
    suites = ["test_ops_triton.py", "test_ops_triton_matrix.py", "test_lowering_gpu.py", "test_gpu_device.py"]
    paths = [str(ROOT / "tests" / name) for name in suites]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *paths], cwd=ROOT, capture_output=True, text=True)
    last = run.stdout.strip().splitlines()[-1:]
    where = "on the GPU" if not device.why_not() else "in Triton's interpreter"
    print(f"kernels against float64, {where}: {''.join(last)}")
    return {"where": where, "passed": run.returncode == 0, "summary": "".join(last)}


def aot(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the usual variants are compiled to."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.aot"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in run.stdout.splitlines()]
    print(
        "| kernel | sm | registers | spills | shared | wgmma | 16-byte loads |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for kernel in found:
        count = kernel["instructions"]
        print(
            f"| {kernel['name']} | {kernel['capability']} | {kernel['registers']} | {count['local']} | {kernel['shared']} | "
            f"{count['wgmma']} | {count['load16']} of {count['load']} |"
        )
    return found


def model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Floors and predictions at the data sheet's rates, which are assumptions."""
    results = []
    for network, composite in PREDICTED[: options.rows]:
        rows = layers.predicted(floors.steps(network, options.batch, composite, "bfloat16"), H100, "bfloat16")
        print(f"\n{network}, batch {options.batch}, {composite}, bfloat16, {H100.name}; microseconds\n")
        print(layers.table(rows, "a GPU"))
        results.append(
            {"model": network, "composite": composite, "batch": options.batch, **layers.summary(rows, options.batch)}
        )
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in results[-1].items()})
    return results


def ceilings(options: argparse.Namespace) -> dict[str, Any]:
    """Copy bandwidth and product rates."""
    found = _measured_gpu()
    result = {"gpu": found.name, "bandwidth": found.bandwidth, "flops": found.flops}
    print(result)
    return result


def measured_layers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every product of a ResNet-50's explanation beside torch's."""
    gpu = _measured_gpu()
    rows = layers.measured("resnet50", options.batch, "epsilon_plus_flat", "bfloat16", gpu)
    print(layers.table(rows, gpu.name))
    return [
        {
            "module": r.work.module, "operation": r.work.operation, "floor_us": r.floor, "predicted_us": r.predicted,
            "measured_us": r.measured, "torch_us": r.torch,
        }
        for r in rows
    ]  # fmt: skip


def measured_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images a second."""
    results = []
    for row in models.throughput(options.seconds, options.batch):
        print(row)
        results.append(row)
    return results


def measured_latency(options: argparse.Namespace) -> dict[str, Any]:
    result = models.latency()
    print(result)
    return result


_gpu: list[Gpu] = []


def _measured_gpu() -> Gpu:
    """The ceilings, measured once."""
    if not _gpu:
        _gpu.append(device.measured())
    return _gpu[0]


SECTIONS: dict[str, tuple[Callable[[argparse.Namespace], Any], bool]] = {  # what runs, and whether it needs a GPU
    "aot": (aot, False),
    "model": (model, False),
    "check": (check, False),
    "ceilings": (ceilings, True),
    "layers": (measured_layers, True),
    "models": (measured_models, True),
    "latency": (measured_latency, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=len(PREDICTED), help="of `model`, the first so many networks")
    parser.add_argument("--seconds", type=float, default=120, help="for the rounds of `models`")
    parser.add_argument("-o", "--output", type=Path, help="write JSON here")
    options = parser.parse_args()
    reason = device.why_not()
    results: dict[str, Any] = {"gpu": None if reason else torch.cuda.get_device_name(0), "torch": torch.__version__}
    for name in options.section:
        run, needs_gpu = SECTIONS[name]
        if needs_gpu and reason:
            print(f"\n== {name}: not measured, {reason}")
            continue
        begin = time.perf_counter()
        print(f"\n== {name}")
        results[name] = run(options)
        print(f"({time.perf_counter() - begin:.0f} s)")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
