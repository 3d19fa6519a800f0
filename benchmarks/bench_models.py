"""Small networks end to end: `python -m pytest benchmarks/bench_models.py`. Here the calls cost, not the arithmetic.

Beside the explanation stand the model's own forward pass and torch's input gradient; the large networks, zennit and memory are the
business of `python -m benchmarks.engine`.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks import peers

torch.set_num_threads(min(2, torch.get_num_threads()))

WORKLOADS = {"resnet18, 1 x 64": ("resnet18", 1, 64), "mobilenet_v3_small, 1 x 64": ("mobilenet_v3_small", 1, 64)}
CALLS: dict[str, Callable[[peers.Workload], Callable[[], object]]] = {
    "forward": peers.forward,
    "gradient": peers.gradient,
    "torch backend": lambda work: peers.lrpfast(work, "epsilon_plus_flat", backend="torch"),
    "auto backend": lambda work: peers.lrpfast(work, "epsilon_plus_flat", backend="auto"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_model(benchmark: Callable, workload: str, call: str) -> None:
    benchmark.group = workload
    benchmark(CALLS[call](peers.workload(*WORKLOADS[workload])))
