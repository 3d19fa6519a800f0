"""Every step of an explanation on a GPU: its floor, what the static model predicts, and what it takes, beside torch's own kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarks import peers
from benchmarks.gpu import floors, predict
from benchmarks.gpu.floors import Gpu, Work


@dataclasses.dataclass(frozen=True)
class Row:
    """A step and its times in microseconds; `torch` is that of torch's product and one elementwise kernel."""

    work: Work
    floor: float
    predicted: float
    measured: float | None = None
    torch: float | None = None


def predicted(works: Iterable[Work], gpu: Gpu, dtype: str) -> list[Row]:
    """Floors and predictions."""
    return [Row(w, 1e6 * w.floor(gpu, dtype), 1e6 * predict.seconds(w, gpu, dtype)) for w in works]


def measured(network: str, batch: int, composite: str, precision: str, gpu: Gpu) -> list[Row]:
    """The products of an explanation with the times that the engine chose their kernels by, as events on the GPU gave them."""
    import lrpfast
    from lrpfast.runtime import Executor
    from lrpfast.runtime.tune import Tuner

    work = peers.workload(network, batch)
    model, inputs = work.model.cuda(), work.inputs.cuda()
    explainer = lrpfast.Explainer(
        model, None, peers.composite(composite), precision=precision, backend="triton", autotune=False
    )
    compiled = explainer._compile((inputs,))
    tuner = Tuner(device=inputs.device)
    executor = Executor(compiled.joint(compiled.default_seed), "triton", False, batch, tuner)
    tuner.save()
    rows = []
    for step in executor.steps:
        counted = floors.work_of(step, batch)
        key = executor.tuned.get(step.node)
        if counted is None or key is None:
            continue
        entry = tuner.choices[key]
        times = {name: 1e6 * s for name, s in entry["seconds"].items()}
        (row,) = predicted([counted], gpu, precision)
        rows.append(dataclasses.replace(row, measured=times[entry["way"]], torch=times.get("torch")))
    return rows


def table(rows: list[Row], device: str) -> str:
    """Markdown: equal steps of a stage in one line, times in microseconds."""
    lines = [
        f"| layer | step | GFLOP | MB | floor | predicted | measured on {device} | torch |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        work = row.work
        times = [f"{t:.1f}" if t is not None else "not measured" for t in (row.measured, row.torch)]
        lines.append(
            f"| {work.module} | {work.operation} | {work.flops / 1e9:.2f} | {work.bytes / 1e6:.1f} | {row.floor:.1f} | "
            f"{row.predicted:.1f} | {times[0]} | {times[1]} |"
        )
    totals = [sum(getattr(r, name) for r in rows) for name in ("floor", "predicted")]
    known = [r.measured for r in rows if r.measured is not None]
    measured_total = f"{sum(known):.0f}" if len(known) == len(rows) and rows else "not measured"
    flops, size = sum(r.work.flops for r in rows), sum(r.work.bytes for r in rows)
    lines.append(
        f"| all | {len(rows)} kernels | {flops / 1e9:.0f} | {size / 1e6:.0f} | {totals[0]:.0f} | {totals[1]:.0f} | "
        f"{measured_total} | |"
    )
    return "\n".join(lines)


def summary(rows: list[Row], batch: int) -> dict[str, Any]:
    """Totals, and the images a second that they stand for."""
    floor, forecast = (sum(getattr(r, name) for r in rows) for name in ("floor", "predicted"))
    return {
        "kernels": len(rows),
        "gflop": sum(r.work.flops for r in rows) / 1e9,
        "gigabytes": sum(r.work.bytes for r in rows) / 1e9,
        "floor_ms": floor / 1e3,
        "predicted_ms": forecast / 1e3,
        "floor_images_per_second": 1e6 * batch / floor,
        "predicted_images_per_second": 1e6 * batch / forecast,
    }
