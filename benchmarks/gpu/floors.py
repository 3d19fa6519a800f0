"""What each step of an explanation has to do on a GPU, and what that takes at least.

The steps are those that the engine lowers a program to for a GPU. Where there is none, Triton's interpreter stands in for it: programs are
lowered and never run, so that the counts are the same on every machine. Operations are those of matrix products (no tap counts that falls
on padding), bytes are what a step reads and writes once each.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from benchmarks import peers


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rates that floors are computed with: operations a second by dtype, bytes a second, multiprocessors.

    Those below are data-sheet values, assumed and not measured.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    multiprocessors: int
    shared: int
    capability: int


H100 = Gpu(
    "H100 SXM (data sheet)", {"bfloat16": 989e12, "float16": 989e12, "float32": 494e12}, 3.35e12, 132, 227 * 1024, 90
)


@dataclasses.dataclass(frozen=True)
class Work:
    """A step: `flops` and `bytes` for the whole batch; of a product its rows, outputs, and the mean depth of its sums."""

    module: str
    operation: str
    flops: float
    bytes: int
    product: tuple[int, int, int] | None = None  # rows, outputs, depth of the sum

    def floor(self, gpu: Gpu, dtype: str) -> float:
        """Seconds that the step takes at least at a GPU's rates."""
        return max(self.flops / gpu.flops[dtype], self.bytes / gpu.bandwidth)


def steps(network: str, batch: int, composite: str, precision: str, size: int = 224) -> list[Work]:
    """The steps of an explanation of a torchvision network, in order, views left out."""
    import lrpfast
    from lrpfast.runtime import Executor

    work = peers.workload(network, 1, size)
    options = {"precision": None if precision == "float32" else precision}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, inputs = work.model.to(device), work.inputs.to(device)
    explainer = lrpfast.Explainer(model, None, peers.composite(composite), backend="triton", autotune=False, **options)
    compiled = explainer._compile((inputs,))
    executor = Executor(compiled.joint(compiled.default_seed), "triton", False, batch)
    return [found for step in executor.steps if (found := work_of(step, batch)) is not None]


def work_of(step: Any, batch: int) -> Work | None:
    from lrpfast.graph import is_tensor, operation_name, value
    from lrpfast.plan import step_time
    from lrpfast.runtime.lower import VIEWS

    if operation_name(step.node) in VIEWS or not isinstance(step.node.meta["val"], (torch.Tensor, tuple, list)):
        return None
    counted = step_time(step, 0.0, batch)
    product = None
    if len(step.computes) == 1 and is_tensor(step.computes[0]):
        node = step.computes[0]
        shape = [n if isinstance(n, int) else batch for n in value(node).shape]
        places = 1
        for n in shape[2:]:
            places *= n
        rows = shape[0] * places
        product = (rows, shape[1], max(1, round(counted.flops / (2 * rows * shape[1]))))
    return Work(counted.module, counted.operation, counted.flops, counted.bytes, product)
