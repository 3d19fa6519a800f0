"""Choosing how a product is computed: by timing, and never a way that is wrong, does not run, or gives NaN."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.errors import InputError
from lrpfast.ops import gpu
from lrpfast.runtime import Executor, products_gpu
from lrpfast.runtime.products_gpu import right_ones
from lrpfast.runtime.tune import Tuner
from tests.triton_kernels import DEVICE, kernels, needs_triton, poisoned_memory  # noqa: F401


def test_wrong_ways_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    torchs = exact.float()

    def fails() -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    ways = {
        "torch": lambda: torchs, "right": lambda: torchs.clone(), "wrong": lambda: torchs * (1 + 1e-4), "fails": fails,
        "unwritten": lambda: torch.full_like(torchs, float("nan")), "another shape": lambda: torchs[:3],
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        assert list(right_ones(ways, exact)) == ["torch", "right"]
    assert "'fails' does not run here and is not used: out of resource" in caplog.text
    assert "'wrong' is wrong here" in caplog.text and "'unwritten' is wrong here" in caplog.text


def test_half_precision_is_measured_by_torchs_own() -> None:
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    ways = {
        "torch": lambda: exact.bfloat16(), "as coarse": lambda: exact.bfloat16() * 1, "coarser": lambda: exact.bfloat16() * 1.02,
    }  # fmt: skip
    assert list(right_ones(ways, exact)) == ["torch", "as coarse"]


@needs_triton
def test_ways_are_timed_checked_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with interpreted kernels: torch's way is always there, one tiling computes nonsense and is never taken."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    ).eval()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    explainer = lrpfast.Explainer(model.to(DEVICE), x, "epsilon_plus", backend="triton", autotune=False)
    expected = explainer(x, 1).relevance
    convolution = kernels.convolution

    def faulty(*args, tiling=None, **kwargs):  # type: ignore[no-untyped-def]
        result = convolution(*args, tiling=tiling, **kwargs)
        return result * 1.01 if tiling is not None and tiling.rows == 128 else result

    monkeypatch.setattr(kernels, "convolution", faulty)
    timed: list[set[str]] = []

    def fake_time(calls):  # type: ignore[no-untyped-def]
        timed.append(set(calls))
        return {name: 1.0 if name == products_gpu.TORCH else 0.5 for name in calls}

    monkeypatch.setattr("lrpfast.runtime.tune._time", fake_time)
    monkeypatch.setattr("lrpfast.runtime.tune._time_on", lambda device, calls: fake_time(calls))
    compiled = explainer._latest
    assert compiled is not None
    tuner = Tuner(tmp_path)
    executor = Executor(compiled.joint(compiled.default_seed), "triton", False, 2, tuner)
    assert timed and all(
        products_gpu.TORCH in names and not any(n.startswith("128x") for n in names) for names in timed
    )
    chosen = {tuner.choices[key]["way"] for key in executor.tuned.values()}
    assert chosen and products_gpu.TORCH not in chosen and not any(way.startswith("128x") for way in chosen)
    assert any("torch" in line and "ms" in line for line in executor.choices)
    run = executor.start(x)
    next(run)
    found = run.send(torch.full((2,), 1, device=DEVICE))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    tuner.save()
    timed.clear()
    Executor(compiled.joint(compiled.default_seed), "triton", False, 2, Tuner(tmp_path))
    assert not timed


@needs_triton
def test_backends_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from lrpfast.explainer import _backend_on

    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert _backend_on(cuda, "auto") == "triton" and _backend_on(cpu, "auto") in ("native", "torch")
    assert _backend_on(cuda, "torch") == "torch"
    monkeypatch.setattr(gpu, "runs_on", lambda device_type: False)
    assert _backend_on(cuda, "auto") == "torch"
    with pytest.raises(InputError, match="backend 'triton' runs on CUDA devices, the inputs are on cpu"):
        _backend_on(cpu, "triton")
    with pytest.raises(InputError, match="backend must be 'auto', 'torch', 'native' or 'triton', got 'cuda'"):
        lrpfast.Explainer(nn.Linear(2, 2), backend="cuda")
