"""What only a GPU can show: the CUDA kernels' numbers, graphs against eager runs, streams, and that no kernel depends on its batch."""

from __future__ import annotations

import threading

import pytest
import torch

import lrpfast
from lrpfast.ops import cuda, reference
from tests.test_lowering_gpu import Bottleneck
from tests.triton_kernels import DTYPES, draw, error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to this process")
needs_cuda_build = pytest.mark.skipif(not cuda.available, reason="the extension was built without CUDA")


@needs_cuda_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 8), (37, 64), (300, 4096), (1000, 2048), (513, 25088)])
def test_dense_layers_of_one_sample(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    outputs, inputs = sizes
    x, weight = draw((1, inputs), 1, dtype).abs(), draw((outputs, inputs), 2, dtype)
    bias, y, q = draw((outputs,), 3, dtype).abs(), draw((1, outputs), 4, dtype).relu(), draw((1, outputs), 5, dtype)
    assert cuda.takes_dense(x, weight)
    z, z_plus = cuda.dense_pair(x, weight, bias, bias)
    for found, own in ((z, weight), (z_plus, weight.clamp(min=0))):
        exact = x.double() @ own.double().t() + bias
        assert error(found, exact) <= 2 * error(torch.nn.functional.linear(x, own, bias), exact) + 1e-7
    positive = weight.abs()
    for carrier in (y, None):
        exact_s = reference.ratio(
            None if carrier is None else carrier.double(), q.double(), x.double() @ positive.double().t() + bias, 1e-6
        )
        exact = exact_s @ positive.double()
        peer = reference.ratio(carrier, q, torch.nn.functional.linear(x, positive, bias), 1e-6) @ positive
        found = cuda.dense_ratio_dgrad(x, positive, bias, carrier, q, 1e-6)
        assert error(found, exact) <= 2 * error(peer, exact) + 1e-7
        assert all(torch.equal(found, cuda.dense_ratio_dgrad(x, positive, bias, carrier, q, 1e-6)) for _ in range(5))


@needs_cuda_build
def test_dense_zeros_are_dropped_by_rule_zero() -> None:
    x, weight, q = torch.zeros(1, 8, device="cuda"), torch.ones(3, 8, device="cuda"), torch.ones(1, 3, device="cuda")
    assert not cuda.dense_ratio_dgrad(x, weight, None, None, q, 0.0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_declared_operators_run_in_triton(dtype: torch.dtype) -> None:
    y, q, z = draw((2, 8, 5, 7), 1, dtype).relu(), draw((2, 8, 5, 7), 2, dtype), draw((2, 8, 5, 7), 3, dtype)
    ops = torch.ops.lrpfast
    assert torch.equal(ops.ratio(y, q, z, 1e-6), reference.ratio(y, q, z, 1e-6))
    for operator, arguments in (
        (ops.ratio, (y, q, z, 1e-6)), (ops.ratio_sum, (y, q, z, z, 1e-6)), (ops.gamma_pair, (y, q, z, y, 0.25, 1e-6)),
        (ops.alpha_beta_pair, (y, q, None, z, 2.0, 1.0, 1e-6)), (ops.channel_sum, (y, q, 2)),
    ):  # fmt: skip
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("batch", [1, 3, 4, 9])
def test_replayed_maps_are_those_of_a_call(batch: int) -> None:
    x = draw((batch, 3, 32, 32), 0)
    model = Bottleneck(64).eval().cuda()
    eager, warm = (lrpfast.Explainer(model, x, "epsilon_plus_flat", autotune=False) for _ in range(2))
    warm.warmup([1, 4])
    for target in (None, 2):
        found, expected = warm(x, target), eager(x, target)
        assert torch.equal(found.relevance, expected.relevance) and torch.equal(found.output, expected.output)
        alone = torch.cat([eager(x[i : i + 1], target).relevance for i in range(batch)])
        assert error(found.relevance, alone.double()) < 1e-5


def test_threads_and_streams_share_a_recorded_program() -> None:
    model = Bottleneck(64).eval().cuda()
    inputs = [draw((2, 3, 32, 32), seed) for seed in range(4)]
    explainer = lrpfast.Explainer(model, inputs[0], "epsilon_plus_flat", autotune=False)
    expected = [explainer(x, 1).relevance for x in inputs]
    explainer.warmup([2])
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            for _ in range(20):
                if not torch.equal(explainer(inputs[index], 1).relevance, expected[index]):
                    wrong.append(index)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
