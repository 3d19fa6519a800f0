"""Pooling in C++ against torch: values, who won (ties, NaN, infinities), and the ways back, over window geometries.

Messages are small integers, so that every sum is exact in every order and results can be asked to be equal.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpfast.ops import native, transposes


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that was missed shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


Geometry = tuple[tuple[int, int], list[int], list[int], list[int], list[int], bool]


@st.composite
def geometries(draw: st.DrawFn, dilated: bool) -> Geometry:
    """Size, kernel, stride, padding, dilation, ceil mode, as torch accepts them."""
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    dilation = [draw(st.integers(1, 2 if dilated else 1)) for _ in range(2)]
    stride = [draw(st.integers(1, 4)) for _ in range(2)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    size = tuple(draw(st.integers(d * (k - 1) + 1, 13)) for k, d in zip(kernel, dilation, strict=True))
    return size, kernel, stride, padding, dilation, draw(st.booleans())


def integers(*shape: int, low: int = -3, seed: int = 0) -> Tensor:
    return torch.randint(low, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def as_indices(winners: Tensor, geometry: Geometry) -> Tensor:
    """Positions in the input's plane from numbers of taps."""
    (_, width), kernel, stride, padding, dilation, _ = geometry
    rows = torch.arange(winners.shape[2])[:, None] * stride[0] - padding[0]
    columns = torch.arange(winners.shape[3]) * stride[1] - padding[1]
    tap = winners.long()
    return (rows + tap // kernel[1] * dilation[0]) * width + columns + tap % kernel[1] * dilation[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(geometry=geometries(dilated=True), channels=st.sampled_from([1, 3, 17, 600]), batch=st.integers(0, 3))
@settings(max_examples=60)
def test_max_pool(dtype: torch.dtype, geometry: Geometry, channels: int, batch: int) -> None:
    size, *window = geometry
    x = integers(batch, channels, *size).to(dtype)  # few values: most windows have ties
    expected, indices = F.max_pool2d(x, *window, return_indices=True)
    found, winners = native.max_pool(x, *window)
    assert torch.equal(found, expected)
    assert winners.dtype is torch.uint8
    assert torch.equal(as_indices(winners, geometry), indices)
    q = integers(*expected.shape, seed=1).to(dtype)
    back = native.max_pool_dgrad(q, winners, list(size), *window)
    assert torch.equal(back, transposes.portable_max_pool_dgrad(q.float(), indices, list(size), *window).to(dtype))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_max_pool_of_special_values(special: float) -> None:
    x = integers(2, 5, 9, 9).where(integers(2, 5, 9, 9, seed=1) > 0, special)
    expected, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    found, winners = native.max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(as_indices(winners, ((9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False)), indices)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("divisor", [None, 5])
@given(geometry=geometries(dilated=False), batch=st.integers(0, 2))
@settings(max_examples=40)
def test_avg_pool_dgrad(include: bool, divisor: int | None, geometry: Geometry, batch: int) -> None:
    size, kernel, stride, padding, _, ceil = geometry
    x = torch.zeros(batch, 6, *size, dtype=torch.float64, requires_grad=True)
    pooled = F.avg_pool2d(x, kernel, stride, padding, ceil, include, divisor)
    t = integers(*pooled.shape)
    (expected,) = torch.autograd.grad(pooled, x, t.double())
    unused = torch.empty(0)
    found = native.avg_pool_dgrad(t, list(size), kernel, stride, padding, ceil, include, divisor, unused, unused)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_in_several_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = integers(5, 64, 57, 61)
        expected, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        found, winners = native.max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
        q = integers(*expected.shape, seed=1)
        back = native.max_pool_dgrad(q, winners, [57, 61], [3, 3], [2, 2], [1, 1], [1, 1], False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    expected_back = transposes.portable_max_pool_dgrad(q, indices, [57, 61], [3, 3], [2, 2], [1, 1], [1, 1], False)
    assert torch.equal(back, expected_back)


def test_other_layouts_are_read_as_what_they_are() -> None:
    base = integers(2, 6, 8, 10)
    for x in (base, base.transpose(2, 3), base[:, ::2], base[:, :, 1:, 1:], base.expand(2, 6, 8, 10)):
        expected = F.max_pool2d(x, 2)
        assert torch.equal(native.max_pool(x, [2, 2], [], [0, 0], [1, 1], False)[0], expected)


def test_a_window_that_lies_in_the_padding_altogether() -> None:
    """Its maximum is that of nothing, and what it is sent arrives nowhere."""
    x = torch.arange(1.0, 9.0).reshape(1, 2, 2, 2)
    geometry = ([2, 2], [1, 1], [1, 1], [3, 3])
    y, winners = native.max_pool(x, *geometry, False)
    sent = native.max_pool_dgrad(torch.ones_like(y), winners, [2, 2], *geometry, False)
    expected = torch.nn.functional.max_pool2d(x, 2, 1, 1, 3)
    assert expected.isneginf().any()
    assert torch.equal(y, expected)
    assert torch.equal(sent, torch.zeros_like(x))
