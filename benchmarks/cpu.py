"""How near explanations come to the limit of a CPU: `python -m benchmarks.cpu`.

Five sections, all by default:

    models      explanations in forward passes, beside zennit, `torch.compile` of the same program, and bfloat16; peak memory
    build       seconds until an explainer of a ResNet-50 can be called, with and without timing of kernels
    layers      for each kind of step: time, and the floor that its operations and bytes set at the rates measured here
    dense       a VGG-16's dense layers for one image, beside reading their weights as often as the mathematics needs
    precision   how far bfloat16 maps are from float32 ones, on a trained network and on a random one

    python -m benchmarks.cpu --sections models --rows vgg16
    python -m benchmarks.cpu --markdown                  the models' table as it stands in the README

The forward pass is the user's own model in eval mode, eager, channels last, without gradients; all variants of a row run
interleaved in this one process. Results go to benchmarks/results/cpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, peers
from benchmarks.timing import interleaved

RESULTS = Path(__file__).parent / "results" / "cpu.json"
SECTIONS = ("models", "build", "layers", "dense", "precision")


@dataclasses.dataclass(frozen=True)
class Row:
    """A workload; how many forward passes it may take, and how many times faster than zennit it must be."""

    model: str
    batch: int
    composite: str
    limit: float
    zennit: float | None = None

    @property
    def name(self) -> str:
        return f"{self.model}:{self.batch}:{self.composite}"


ROWS = (
    Row("resnet50", 8, "epsilon_plus_flat", 2.4, 4.8),
    Row("resnet50", 8, "epsilon_gamma_box", 3.0, 6.4),
    Row("resnet50", 1, "epsilon_plus_flat", 2.6),
    Row("resnet50", 1, "epsilon_gamma_box", 3.3),
    Row("vgg16", 4, "epsilon_plus_flat", 2.6, 3.0),
    Row("vgg16", 4, "epsilon_gamma_box", 2.8, 5.0),
    Row("densenet121", 8, "epsilon_plus_flat", 2.6),
    Row("mobilenet_v2", 8, "epsilon_plus_flat", 2.6),
)

Maker = Callable[[peers.Workload, Row], Callable[[], object]]
COLUMNS: dict[str, Maker] = {
    "forward": lambda work, row: peers.forward(work),
    "lrpfast": lambda work, row: peers.lrpfast(work, row.composite, backend="auto"),
    "bfloat16": lambda work, row: peers.lrpfast(work, row.composite, backend="auto", precision="bfloat16"),
    "zennit": lambda work, row: peers.zennit(work, row.composite),
    "compiled": lambda work, row: peers.compiled(work, row.composite),
}


# ---- models ----------------------------------------------------------------------------------------------------------


def measure(row: Row, columns: list[str], repeats: int, threads: int) -> dict[str, Any]:
    """Time the columns of one row, and the peak of its memory."""
    work = peers.workload(row.model, row.batch)
    wanted = [c for c in columns if c != "zennit" or row.zennit]
    timings = interleaved({c: COLUMNS[c](work, row) for c in wanted}, rounds=repeats)
    del work
    gc.collect()
    unit = timings["forward"].median
    # Peaks of one process and the next differ by some 5%: when freed memory is returned is not the same twice.
    gradient, own = (
        statistics.median(memory.peak(row.model, row.batch, threads, *what) for _ in range(3))
        for what in (("gradient",), ("lrpfast", row.composite, "auto"))
    )
    return {
        **dataclasses.asdict(row),
        "forward_ms": round(unit * 1000, 1),
        "ratio": {name: round(timing.median / unit, 3) for name, timing in timings.items()},
        "spread": {name: round(timing.spread, 3) for name, timing in timings.items()},
        "seconds": {name: [round(s, 5) for s in timing.seconds] for name, timing in timings.items()},
        "memory": round(own / gradient, 3),
    }


HEADER = (
    "model, batch, composite", "forward", "lrpfast (limit)", "bfloat16 / float32", "zennit / lrpfast (at least)",
    "torch.compile", "memory / gradient's",
)  # fmt: skip


def cells(result: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    ratio = result["ratio"]
    own = ratio["lrpfast"]
    zennit = f"{ratio['zennit'] / own:.1f} ({result['zennit']})" if "zennit" in ratio else "–"
    return (
        f"{result['model']}, {result['batch']}, `{result['composite']}`",
        f"{result['forward_ms']:.0f} ms",
        f"{own:.2f} ({result['limit']})",
        f"{ratio['bfloat16'] / own:.2f}" if "bfloat16" in ratio else "–",
        zennit,
        f"{ratio['compiled']:.2f}" if "compiled" in ratio else "–",
        f"{result['memory']:.2f}",
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, markdown: bool) -> str:
    """Aligned text, or a markdown table."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
        return "\n".join([lines[0], "| --- |" + " ---: |" * (len(header) - 1), *lines[1:]])
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


# ---- build -----------------------------------------------------------------------------------------------------------


def build(repeats: int = 3) -> dict[str, float]:
    """Seconds to make an explainer of a ResNet-50: without timing kernels, timing all, and with the choices on disk."""
    import os

    import lrpfast

    work = peers.workload("resnet50", 8)
    before = os.environ.get("LRPFAST_CACHE_DIR")

    def make(autotune: bool) -> float:
        begin = time.perf_counter()
        lrpfast.Explainer(work.model, work.inputs, autotune=autotune)
        return time.perf_counter() - begin

    seconds: dict[str, list[float]] = {"without timing": [], "timing all": [], "choices on disk": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LRPFAST_CACHE_DIR"] = folder
            seconds["without timing"].append(make(False))
            seconds["timing all"].append(make(True))
            seconds["choices on disk"].append(make(True))
    os.environ.pop("LRPFAST_CACHE_DIR")
    if before is not None:
        os.environ["LRPFAST_CACHE_DIR"] = before
    return {name: round(statistics.median(values), 2) for name, values in seconds.items()}


# ---- layers ----------------------------------------------------------------------------------------------------------


def rates() -> dict[str, float]:
    """What this machine does at best: multiplications and additions a second in oneDNN's best convolution (3 x 3, 512 channels, no
    padding), bytes a second in a copy."""
    memory_format = torch.channels_last
    x = torch.randn(8, 512, 16, 16).to(memory_format=memory_format)
    weight = torch.randn(512, 512, 3, 3).to(memory_format=memory_format)
    pack = torch.ops.mkldnn._reorder_convolution_weight
    packed = pack(weight, [0, 0], [1, 1], [1, 1], 1, list(x.shape))
    arguments = (x, packed, None, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    source, target = torch.ones(2**26), torch.ones(2**26)
    with torch.no_grad():
        timings = interleaved(
            {
                "convolution": lambda: torch.ops.mkldnn._convolution_pointwise(*arguments),
                "copy": lambda: target.copy_(source),
            },
            rounds=15,
        )
    flops = 2 * 8 * 14 * 14 * 512 * 512 * 9 / timings["convolution"].median
    return {"flops": flops, "bytes": 2 * 4 * 2**26 / timings["copy"].median}


def layers(row: Row, best: dict[str, float]) -> list[dict[str, Any]]:
    """Time and floor of each kind of step: the larger of what its operations and its bytes take at the best rates. (A layer by the
    sign of its input is counted once, though its product is twice as deep.)"""
    import lrpfast

    work = peers.workload(row.model, row.batch)
    explainer = lrpfast.Explainer(work.model, work.inputs, composite=peers.composite(row.composite))
    kinds: dict[str, dict[str, Any]] = {}
    for step in explainer.profile(work.inputs, repeats=9):
        kind = kinds.setdefault(step.operation, {"steps": 0, "ms": 0.0, "floor_ms": 0.0})
        kind["steps"] += 1
        kind["ms"] += step.seconds * 1000
        is_view = step.seconds < 2e-5
        # Winograd's filtering needs 16 multiplications where the direct form needs 36, with stride 2 ("in phases") 25; its transforms
        # are not counted.
        by = 1 if "Winograd" not in step.operation else 25 / 36 if "in phases" in step.operation else 4 / 9
        flops = step.flops * by
        floor = max(flops / best["flops"], 0 if is_view else step.bytes / best["bytes"])
        kind["floor_ms"] += floor * 1000
    ordered = sorted(kinds.items(), key=lambda item: -item[1]["ms"])
    return [{"operation": name, **{k: round(v, 2) for k, v in kind.items()}} for name, kind in ordered]


# ---- dense layers ---------------------------------------------------------------------------------------------------


def dense(repeats: int = 25) -> dict[str, Any]:
    """Time of a VGG-16's dense layers for one image, in times that reading their weights takes: each once forwards, and all but the
    logit layer's (of which the target's row is enough) once backwards; behind ReLUs, of these the rows of what these let through. What
    memory gives differs from minute to minute on a shared machine, so the layers' steps and three ways to read as much memory are timed
    in turns; the fastest of the three counts."""
    from lrpfast.ops import native
    from lrpfast.runtime.memory import keep_freed_memory

    keep_freed_memory()  # as in any process that explains
    sizes = ((25088, 4096), (4096, 4096), (4096, 1000))
    layers = [(torch.rand(1, i), torch.randn(o, i), torch.randn(o), torch.randn(1, o)) for i, o in sizes]
    passed = [torch.rand_like(s) < 0.5 for *_, s in layers[:-1]]
    forwards, backwards = (sum(w.numel() for _, w, *_ in part) for part in (layers, layers[:-1]))
    rows = sum(int(of.sum()) * w.shape[1] for of, (_, w, *_) in zip(passed, layers[:-1], strict=True))
    source = torch.ones((forwards + backwards) // 2 * 2)
    halves = source.chunk(2)
    plus = (1.0, 0.0)

    def epsilon(messages: list[torch.Tensor]) -> None:
        for x, weight, bias, _ in layers:
            native.dense(x, weight, bias)
        for (_, weight, *_), s in zip(layers[:-1], messages, strict=True):
            native.dense_dgrad(s, weight)

    def z_plus(messages: list[torch.Tensor]) -> None:
        for x, weight, bias, _ in layers:
            native.dense_pair(x, weight, bias, bias, plus)
        for (_, weight, *_), s in zip(layers[:-1], messages, strict=True):
            native.dense_dgrad(s, weight, plus)

    def by_torch() -> None:
        for x, weight, bias, _ in layers:
            torch.nn.functional.linear(x, weight, bias)
        for _, weight, _, s in layers[:-1]:
            torch.matmul(s, weight)

    reading = {"sum": source.sum, "maximum": source.max, "dot": lambda: torch.dot(*halves)}
    everywhere = [s for *_, s in layers[:-1]]
    some = [s * of for s, of in zip(everywhere, passed, strict=True)]
    computing = {
        "epsilon": lambda: epsilon(everywhere),
        "z plus": lambda: z_plus(everywhere),
        "epsilon, behind ReLUs": lambda: epsilon(some),
        "z plus, behind ReLUs": lambda: z_plus(some),
        "epsilon, by torch": by_torch,
    }
    with torch.no_grad():
        timings = interleaved({**reading, **computing}, rounds=repeats)
    needed = min(timings[name].median for name in reading)
    found: dict[str, Any] = {"bytes_a_second": 4 * source.numel() / needed, "needed_ms": round(needed * 1000, 2)}
    for name in computing:
        seconds, of = timings[name].median, (forwards + rows) / (forwards + backwards) if "ReLU" in name else 1.0
        found[name] = {"ms": round(seconds * 1000, 2), "ratio": round(seconds / (of * needed), 3)}
    return found


# ---- precision -------------------------------------------------------------------------------------------------------


def precision() -> list[dict[str, Any]]:
    """Distance of bfloat16 maps from float32 ones: relative L2 and rank correlation, means over images."""
    import lrpfast
    from lrpfast import composites, demo

    pictures, classes = demo.digits()
    images = pictures[:, None].float() / 255
    trained = demo.train(images[32:], classes[32:])
    random = peers.workload("resnet18", 8)
    cases: dict[str, tuple[Any, torch.Tensor, Any, Any]] = {
        "trained on digits": (trained, images[:32], 0.0, 1.0),
        "random ResNet-18": (random.model, random.inputs, peers.LOW, peers.HIGH),
    }
    found = []
    for network, (model, inputs, low, high) in cases.items():
        for name in composites.names():
            options = {"low": low, "high": high} if composites.needs_range(name) else {}
            composite = composites.get(name, **options)
            exact = lrpfast.explain(model, inputs, composite=composite)
            narrow = lrpfast.explain(model, inputs, target=exact.target, composite=composite, precision="bfloat16")
            a, b = exact.relevance.flatten(1).double(), narrow.relevance.flatten(1).double()
            distance = ((a - b).norm(dim=1) / a.norm(dim=1)).mean().item()
            ranks = [torch.corrcoef(torch.stack([_ranks(p), _ranks(q)]))[0, 1] for p, q in zip(a, b, strict=True)]
            found.append(
                {
                    "network": network,
                    "composite": name,
                    "relative_l2": round(distance, 4),
                    "rank_correlation": round(torch.stack(ranks).mean().item(), 4),
                }
            )
    return found


def _ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


# ---- the command -----------------------------------------------------------------------------------------------------


def show(report: dict[str, Any], *, markdown: bool) -> str:
    """All that a report holds, as text."""
    parts = []
    if "models" in report:
        spread = max(s for result in report["models"] for s in result["spread"].values())
        parts.append(table(HEADER, [cells(r) for r in report["models"]], markdown=markdown))
        parts.append(
            f"Measured on {machine.line(report['machine'])}; medians of {report['repeats']} interleaved rounds, quartiles at most "
            f"{spread:.0%} of the median apart."
        )
    if markdown:
        return "\n\n".join(parts)
    if "build" in report:
        parts.append("seconds to build: " + ", ".join(f"{k} {v}" for k, v in report["build"].items()))
    for name, kinds in report.get("layers", {}).items():
        rows = [tuple(str(v) for v in kind.values()) for kind in kinds]
        total = (f"all of {name}", "", *(f"{sum(k[c] for k in kinds):.1f}" for c in ("ms", "floor_ms")))
        parts.append(table(("operation", "steps", "ms", "floor ms"), [*rows, total], markdown=False))
    if "rates" in report:
        best = report["rates"]
        parts.append(
            f"best rates: {best['flops'] / 1e9:.0f} GFLOP/s in a convolution, {best['bytes'] / 1e9:.1f} GB/s in a copy"
        )
    if "dense" in report:
        of = {name: value for name, value in report["dense"].items() if isinstance(value, dict)}
        rows = [(name, str(value["ms"]), str(value["ratio"])) for name, value in of.items()]
        parts.append(
            table(("dense layers of a vgg16, one image", "ms", "of reading the weights"), rows, markdown=False)
        )
        parts.append(
            f"reading them: {report['dense']['needed_ms']} ms at {report['dense']['bytes_a_second'] / 1e9:.1f} GB/s"
        )
    if "precision" in report:
        rows = [tuple(str(v) for v in case.values()) for case in report["precision"]]
        parts.append(table(("network", "composite", "relative L2", "rank correlation"), rows, markdown=False))
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", nargs="+", metavar="PART", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--columns", nargs="+", choices=list(COLUMNS), default=list(COLUMNS))
    parser.add_argument("--repeats", type=int, default=9, help="counted rounds (default 9)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument(
        "--json", type=Path, help=f"where results go (default: of a whole run, {RESULTS.name}; of a part, nowhere)"
    )
    parser.add_argument("--from-json", type=Path, help="print an earlier run; measure nothing")
    chosen = parser.parse_args(argv)
    if chosen.from_json:
        print(show(json.loads(chosen.from_json.read_text()), markdown=chosen.markdown))
        return
    rows = [row for row in ROWS if any(part in row.name for part in chosen.rows)]
    if not rows:
        parser.error(f"no row is called like {chosen.rows}; there are {', '.join(row.name for row in ROWS)}")
    torch.set_num_threads(chosen.threads)
    columns = ["forward", "lrpfast", *(c for c in chosen.columns if c not in ("forward", "lrpfast"))]
    report: dict[str, Any] = {"machine": machine.describe(chosen.threads), "repeats": chosen.repeats}
    for section in chosen.sections:
        print(f"measuring {section}", file=sys.stderr, flush=True)
        if section == "models":
            report["models"] = [measure(row, columns, chosen.repeats, chosen.threads) for row in rows]
        elif section == "build":
            report["build"] = build()
        elif section == "layers":
            report["rates"] = rates()
            report["layers"] = {row.name: layers(row, report["rates"]) for row in rows}
        elif section == "dense":
            report["dense"] = dense()
        else:
            report["precision"] = precision()
    whole = set(chosen.sections) == set(SECTIONS) and len(rows) == len(ROWS) and set(columns) >= set(COLUMNS)
    if target := chosen.json or (RESULTS if whole else None):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1) + "\n")
    print(show(report, markdown=chosen.markdown))


if __name__ == "__main__":
    main()
