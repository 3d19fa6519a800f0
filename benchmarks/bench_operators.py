"""The fused operators beside their references and beside a copy: `python -m pytest benchmarks/bench_operators.py`.

Each operator reads and writes every element once, so what memory allows bounds it. The yardstick is `copy`, torch's own
copy of one tensor of that size (one read, one write): `ratio` touches four tensors where a copy touches two, so twice a
copy's time is what an operator that does nothing but move its operands would take. Each operator is also run in small,
where the call itself is what costs.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrpfast.ops import native, reference

torch.set_num_threads(min(2, torch.get_num_threads()))

SHAPES = {"large": (8, 256, 56, 56), "small": (1, 256, 14, 14)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMPLEMENTATIONS = {"reference": reference} | ({"native": native} if native.extension is not None else {})


def operands(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    """Channels-last tensors; the first is a ReLU's output, half of it zero, as carriers are."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for _ in range(count)]
    made[0] = made[0].relu_()
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in made]


def calls(module: object, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The operators with operands as the engine gives them; results are written where the engine writes them."""
    carrier, message, denominator, other = operands(shape, dtype, 4)
    z = denominator.float() if dtype is not torch.float32 else denominator
    out, pair = torch.empty_like(message), (torch.empty_like(message), torch.empty_like(message))
    return {
        "ratio": lambda: module.ratio(carrier, message, z, 1e-6, out=out),
        "ratio_sum": lambda: module.ratio_sum(carrier, message, other, z, 1e-6, out=out),
        "gamma_pair": lambda: module.gamma_pair(carrier, message, z, z.abs(), 0.25, 1e-6, out=pair),
        "alpha_beta_pair": lambda: module.alpha_beta_pair(carrier, message, z, z, 2.0, 1.0, 1e-6, out=pair),
        "channel_sum": lambda: module.channel_sum(carrier, message, 1),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("implementation", ["copy", *IMPLEMENTATIONS])
@pytest.mark.parametrize("operator", ["ratio", "ratio_sum", "gamma_pair", "alpha_beta_pair", "channel_sum"])
def test_operator(benchmark: Callable, operator: str, implementation: str, size: str, dtype: str) -> None:
    benchmark.group = f"{operator} {size} {dtype}"
    if implementation == "copy":
        source, target = operands(SHAPES[size], DTYPES[dtype], 2)
        benchmark(target.copy_, source)
    else:
        benchmark(calls(IMPLEMENTATIONS[implementation], SHAPES[size], DTYPES[dtype])[operator])
