"""Whole explanations on a GPU: images a second and latency, beside the model's own forward pass, torch.compile and zennit.

Inputs are on the device, channels-last, 224 x 224. Variants are interleaved, times are medians, each call is waited for.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import peers

ROWS = (
    ("resnet50", "epsilon_plus_flat"),
    ("resnet50", "epsilon_gamma_box"),
    ("vgg16", "epsilon_plus_flat"),
)


def throughput(seconds: float, batch: int = 64) -> Iterator[dict[str, Any]]:
    """Images a second of every variant, one object a row; each row gets a share of `seconds`."""
    for network, composite in ROWS:
        variants = _variants(network, composite, batch)
        times = _interleaved(variants, seconds / len(ROWS))
        rates = {name: batch / statistics.median(taken) for name, taken in times.items()}
        yield {
            "model": network,
            "composite": composite,
            "batch": batch,
            "images_per_second": rates,
            "rounds": _rounds(times),
        }


def latency(calls: int = 300) -> dict[str, Any]:
    """Milliseconds of an explanation of one image by a ResNet-50, from input on the device to map on the device."""
    work = _on_gpu(peers.workload("resnet50", 1))
    explainer = _explainer(work, "epsilon_plus_flat", "bfloat16")
    explainer.warmup([1])
    taken = []
    for _ in range(calls + 20):
        begin = time.perf_counter()
        explainer(work.inputs, work.targets)
        torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begin))
    kept = sorted(taken[20:])
    return {"model": "resnet50", "batch": 1, "p50_ms": kept[len(kept) // 2], "p99_ms": kept[int(0.99 * len(kept))]}


def _variants(network: str, composite: str, batch: int) -> dict[str, Callable[[], object]]:
    work = _on_gpu(peers.workload(network, batch))
    half = peers.Workload(copy.deepcopy(work.model).bfloat16(), work.inputs.bfloat16(), work.targets)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    variants: dict[str, Callable[[], object]] = {
        "forward, TF32": peers.forward(work),
        "forward, bfloat16": peers.forward(half),
        "zennit, TF32": peers.zennit(work, composite),
    }
    for precision in ("float32", "bfloat16"):
        explainer = _explainer(work, composite, precision)
        explainer.warmup([batch])
        variants[f"lrpfast, {precision}"] = lambda e=explainer: e(work.inputs, work.targets)
        compiled = torch.compile(explainer.program)
        prepared = work.inputs.bfloat16() if precision == "bfloat16" else work.inputs
        variants[f"torch.compile, {precision}"] = lambda c=compiled, x=prepared: _without_gradient(c, x, work.targets)
    return variants


def _without_gradient(program: Callable[..., Any], *arguments: Any) -> Any:
    with torch.no_grad():
        return program(*arguments)


def _explainer(work: peers.Workload, composite: str, precision: str) -> Any:
    import lrpfast

    return lrpfast.Explainer(work.model, work.inputs, peers.composite(composite), precision=precision)


def _on_gpu(work: peers.Workload) -> peers.Workload:
    return peers.Workload(work.model.cuda(), work.inputs.cuda(), work.targets.cuda())


def _interleaved(variants: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call; every variant once a round, after two rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    end = None
    for turn in range(102):
        if turn == 2:
            end = time.perf_counter() + seconds
        for name, call in variants.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(time.perf_counter() - begin)
        if end is not None and time.perf_counter() > end and turn >= 4:
            break
    return times


def _rounds(times: dict[str, list[float]]) -> int:
    return min(len(taken) for taken in times.values())
