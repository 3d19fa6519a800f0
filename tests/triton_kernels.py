"""What the tests of the Triton kernels share: the kernels, on a GPU or in Triton's interpreter, and a device to put operands on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lrpfast.ops import gpu

kernels, why_not = gpu.load()
needs_triton = pytest.mark.skipif(kernels is None, reason=f"no Triton kernels: {why_not}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that was missed shows; NumPy, which interprets, does not warn of infinities."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def error(found: Tensor, exact: Tensor) -> float:
    """Of the result as a whole: sums cancel. NaN is never small."""
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_exact_as_torch(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """The project's rule: an error of at most twice that of torch's own operators in the same dtype."""
    assert found.shape == exact.shape
    assert error(found, exact) <= 2 * error(torchs, exact) + 1e-12, (error(found, exact), error(torchs, exact))
