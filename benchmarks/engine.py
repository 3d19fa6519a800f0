"""How long an explanation takes, in forward passes: `python -m benchmarks.engine`.

Rows are models with a composite, columns are alternatives that explain the same batch: lrpfast with its pure-torch and
with its automatic backend, in float32 and in bfloat16, zennit, torch's plain input gradient, and the convolutions of the
cheapest exact schedule with nothing between them. The unit is the user's own model in eval mode, eager, channels last,
without gradients. All run in this one process, interleaved round by round; medians count. Peak memory is measured in
processes of their own.

    python -m benchmarks.engine                             the whole table, and benchmarks/results/engine.json
    python -m benchmarks.engine --rows vgg16 --repeats 15   the rows whose name contains vgg16
    python -m benchmarks.engine --quick                     3 rounds, no memory
    python -m benchmarks.engine --markdown                  print the table as it stands in the README
    python -m benchmarks.engine --markdown --from-json F    the same from the results of an earlier run
    python -m benchmarks.engine --profile resnet50:epsilon_plus_flat
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, peers
from benchmarks.timing import Timing, interleaved

RESULTS = Path(__file__).parent / "results" / "engine.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """A workload and how many forward passes it may take at most: zennit's own time as first measured, and our limits."""

    model: str
    batch: int
    composite: str
    zennit: float
    torch: float
    auto: float

    @property
    def name(self) -> str:
        return f"{self.model}:{self.composite}"


ROWS = (
    Row("resnet50", 8, "epsilon_plus_flat", 11.7, 3.2, 2.8),
    Row("resnet50", 8, "epsilon_gamma_box", 19.3, 4.2, 3.6),
    Row("resnet50", 8, "epsilon_alpha2_beta1_flat", 15.1, 4.5, 4.0),
    Row("vgg16", 4, "epsilon_plus_flat", 8.0, 3.1, 2.9),
    Row("vgg16", 4, "epsilon_gamma_box", 15.1, 3.3, 3.1),
)

# column -> how its call is made; a column that cannot be made here (a peer is not installed) is left out with the reason
Maker = Callable[[peers.Workload, Row], Callable[[], object]]
COLUMNS: dict[str, Maker] = {
    "forward": lambda work, row: peers.forward(work),
    "zennit": lambda work, row: peers.zennit(work, row.composite),
    "torch": lambda work, row: peers.lrpfast(work, row.composite, backend="torch"),
    "auto": lambda work, row: peers.lrpfast(work, row.composite, backend="auto"),
    "bfloat16": lambda work, row: peers.lrpfast(work, row.composite, backend="auto", precision="bfloat16"),
    "gradient": lambda work, row: peers.gradient(work),
    "convolutions": lambda work, row: peers.convolutions_alone(work, row.composite),
}


def measure(row: Row, columns: list[str], repeats: int) -> dict[str, Timing]:
    """Time the columns of one row."""
    work = peers.workload(row.model, row.batch)
    calls = {column: COLUMNS[column](work, row) for column in columns}
    timings = interleaved(calls, rounds=repeats)
    del calls, work
    gc.collect()
    return timings


def measure_memory(row: Row, threads: int) -> dict[str, int]:
    """Peak bytes of processes that explain the row's batch, and of one that takes its gradient."""
    return {
        "gradient": memory.peak(row.model, row.batch, threads, "gradient"),
        "torch": memory.peak(row.model, row.batch, threads, "lrpfast", row.composite, "torch"),
        "auto": memory.peak(row.model, row.batch, threads, "lrpfast", row.composite, "auto"),
    }


def record(row: Row, timings: dict[str, Timing], peaks: dict[str, int]) -> dict[str, Any]:
    """A row's results in the form that is written to disk."""
    unit = timings["forward"].median
    return {
        "model": row.model,
        "batch": row.batch,
        "composite": row.composite,
        "limits": {"zennit": row.zennit, "torch": row.torch, "auto": row.auto},
        "forward_ms": round(unit * 1000, 1),
        "ratio": {name: round(timing.median / unit, 3) for name, timing in timings.items()},
        "spread": {name: round(timing.spread, 3) for name, timing in timings.items()},
        "seconds": {name: [round(value, 5) for value in timing.seconds] for name, timing in timings.items()},
        "peak_bytes": peaks,
    }


HEADER = (
    "model, batch, composite",
    "forward",
    "zennit",
    "torch backend (limit)",
    "auto backend (limit)",
    "auto, bfloat16",
    "input gradient",
    "convolutions alone",
    "memory / gradient's",
)


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ratio, limits, peaks = result["ratio"], result["limits"], result["peak_bytes"]

    def shown(column: str, limit: str = "") -> str:
        return f"{ratio[column]:.2f}{limit}" if column in ratio else "–"

    shares = [peaks[name] / peaks["gradient"] for name in ("torch", "auto") if name in peaks]
    return (
        f"{result['model']}, {result['batch']}, `{result['composite']}`",
        f"{result['forward_ms']:.0f} ms",
        shown("zennit"),
        shown("torch", f" ({limits['torch']})"),
        shown("auto", f" ({limits['auto']})"),
        shown("bfloat16"),
        shown("gradient"),
        shown("convolutions"),
        ", ".join(f"{share:.2f}" for share in shares) or "–",
    )


def table(results: list[dict[str, Any]], *, markdown: bool) -> str:
    """The results as aligned text, or as a markdown table."""
    rows = [HEADER, *(cells(result) for result in results)]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "| --- |" + " ---: |" * (len(HEADER) - 1), *lines[1:]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def note(report: dict[str, Any]) -> str:
    """What must be known to read the table."""
    spreads = [value for result in report["rows"] for value in result["spread"].values()]
    return (
        f"Measured on {machine.line(report['machine'])}. Times are multiples of the forward pass (medians of {report['repeats']} "
        f"interleaved rounds; the quartiles lie {max(spreads):.0%} of the median apart at most); memory is the peak of a process "
        "with the torch and with the automatic backend over that of one that takes torch's input gradient."
    )


def profile(row: Row, backend: str = "auto") -> str:
    """Where one explanation spends its time: by operation, and the single steps that take longest."""
    import lrpfast

    work = peers.workload(row.model, row.batch)
    explainer = lrpfast.Explainer(work.model, work.inputs, composite=peers.composite(row.composite), backend=backend)
    steps = explainer.profile(work.inputs, repeats=7)
    total = sum(step.seconds for step in steps)
    kinds: dict[str, list[float]] = {}
    for step in steps:
        kinds.setdefault(step.operation, []).append(step.seconds)

    def line(name: str, seconds: float, calls: int) -> str:
        return f"{seconds * 1000:10.2f} ms {seconds / total:7.1%} {calls:6d}  {name}"

    by_kind = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    longest = sorted(steps, key=lambda step: -step.seconds)[:25]
    return "\n".join(
        [
            f"{row.name}, batch {row.batch}, backend {backend}: {total * 1000:.1f} ms in {len(steps)} steps",
            "      time    share  steps  operation",
            *(line(name, sum(seconds), len(seconds)) for name, seconds in by_kind),
            "",
            "the longest steps",
            *(line(f"{step.operation} of {step.module or 'the model'}", step.seconds, 1) for step in longest),
        ]
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(row.name for row in ROWS)
    parser.add_argument(
        "--rows", nargs="+", metavar="PART", help=f"rows whose name contains one of these; there are {names}"
    )
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), help="columns beside forward; default: all")
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="3 rounds and no memory")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument(
        "--json",
        type=Path,
        help=f"where results are written (default: of the whole table, {RESULTS.name}; of a part, nowhere)",
    )
    parser.add_argument("--from-json", type=Path, help="print the table of an earlier run; measure nothing")
    parser.add_argument(
        "--profile", metavar="ROW", help="print where one row's explanation spends its time, and nothing else"
    )
    parser.add_argument("--backend", default="auto", help="the backend of --profile (default auto)")
    chosen = parser.parse_args(argv)
    chosen.matching = [row for row in ROWS if any(part in row.name for part in chosen.rows or [""])]
    if not chosen.matching:
        parser.error(f"no row is called like {chosen.rows}; there are {names}")
    if chosen.profile and chosen.profile not in [row.name for row in ROWS]:
        parser.error(f"no row is called {chosen.profile}; there are {names}")
    if chosen.repeats < 1:
        parser.error("--repeats must be at least 1")
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    chosen = _arguments(argv)
    if chosen.from_json:
        report = json.loads(chosen.from_json.read_text())
    else:
        torch.set_num_threads(chosen.threads)
        if chosen.profile:
            print(profile(next(row for row in ROWS if row.name == chosen.profile), chosen.backend))
            return
        repeats = 3 if chosen.quick else chosen.repeats
        columns = ["forward", *(c for c in chosen.columns or COLUMNS if c != "forward")]
        report = {"machine": machine.describe(chosen.threads), "repeats": repeats, "rows": []}
        for row in chosen.matching:
            print(f"measuring {row.name}", file=sys.stderr, flush=True)
            peaks = {} if chosen.quick or chosen.no_memory else measure_memory(row, chosen.threads)
            report["rows"].append(record(row, measure(row, columns, repeats), peaks))
        whole = not (chosen.quick or chosen.no_memory or chosen.rows or chosen.columns)
        if target := chosen.json or (RESULTS if whole else None):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["rows"], markdown=chosen.markdown))
    print()
    print(note(report))


if __name__ == "__main__":
    main()
