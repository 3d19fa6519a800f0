"""What a GPU's ceilings are, measured: the rate of a large copy and of a large matrix product."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu.floors import H100, Gpu


def why_not() -> str:
    """Why nothing can be measured here; empty where a GPU is there."""
    if torch.cuda.is_available():
        return ""
    return "this torch is built without CUDA" if torch.version.cuda is None else "no GPU is visible to this process"


def measured() -> Gpu:
    """The GPU with its measured ceilings, by the same definitions as the assumed ones."""
    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds(lambda: target.copy_(source))
    rates = {}
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / seconds(lambda a=a, b=b: a @ b)
    major, minor = torch.cuda.get_device_capability(0)
    return dataclasses.replace(
        H100, name=properties.name, flops=rates, bandwidth=bandwidth, multiprocessors=properties.multi_processor_count,
        capability=10 * major + minor,
    )  # fmt: skip


def seconds(call: Callable[[], object], rounds: int = 21) -> float:
    """Median time of a call on the GPU, by events, after three that are not counted."""
    taken = []
    for turn in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken)
