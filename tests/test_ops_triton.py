"""Elementwise steps, sums and pools in Triton against float64, and against the reference bit for bit where no sum is reordered."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpfast.ops import reference, transposes
from tests.test_ops_pooling import Geometry, as_indices, geometries, integers
from tests.test_ops_values import (
    EPS,
    LAYOUTS,
    PAIRS,
    exact_pair,
    exact_ratio,
    pair_of,
    pair_operands,
    plain_pair,
    torch_ratio,
)
from tests.triton_kernels import DEVICE, DTYPES, draw, kernels, needs_triton, poisoned_memory  # noqa: F401
from tests.triton_kernels import assert_as_exact_as_torch as close

pytestmark = needs_triton
SHAPES = [(3, 7), (3, 7, 5), (2, 16, 5, 7), (2, 3, 4, 5, 3), (1, 33, 3, 3), (4, 500), (0, 3, 4, 5), (1, 1)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch):
    """The Triton operators with nothing to fall back on."""
    from lrpfast.ops.triton import elementwise, sums

    for module in (elementwise, sums):
        monkeypatch.setattr(module, "reference", None)
    return kernels


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    arrange = LAYOUTS[layout]
    return arrange(draw(shape, 1, dtype).relu()), arrange(draw(shape, 2, dtype)), arrange(draw(shape, 3, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_is_the_references(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    carrier, message, denominator = operands(shape, dtype, layout)
    other = LAYOUTS[layout](draw(shape, 4, dtype))
    if layout == "_holes":  # operands that are not dense are the reference's
        assert not kernels.elementwise._alike(carrier, message) or message.numel() < 2
    for eps in (EPS, 0.0):
        for own in (carrier, None):
            found = kernels.ratio(own, message, denominator, eps)
            assert found.dtype == dtype
            assert torch.equal(found, reference.ratio(own, message, denominator, eps))
            assert torch.equal(
                kernels.ratio_sum(own, message, other, denominator, eps),
                reference.ratio_sum(own, message, other, denominator, eps),
            )
        close(
            kernels.ratio(carrier, message, denominator, eps),
            torch_ratio(carrier, message, denominator, eps),
            exact_ratio(carrier.cpu(), message.cpu(), denominator.cpu(), eps).to(DEVICE),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["_keep", "_channels_last", "_misaligned"])
def test_dense_layouts_run_in_triton(alone, layout: str, dtype: torch.dtype) -> None:
    carrier, message, z = operands((2, 16, 5, 7), dtype, layout)
    assert torch.equal(alone.ratio(carrier, message, z, EPS), reference.ratio(carrier, message, z, EPS))
    alone.ratio_sum(carrier, message, z, z, EPS)
    alone.gamma_pair(carrier, message, z, carrier, 0.25, EPS)
    alone.alpha_beta_pair(carrier, message, None, z, 2.0, 1.0, EPS)
    if layout != "_misaligned":
        alone.channel_sum(carrier, message, 2)


@pytest.mark.parametrize("carrier_dtype", [None, *DTYPES])
@pytest.mark.parametrize("denominator_dtype", DTYPES)
def test_ratio_mixes_dtypes_and_rounds_once(
    alone, denominator_dtype: torch.dtype, carrier_dtype: torch.dtype | None
) -> None:
    shape = (2, 16, 5, 7)
    carrier = None if carrier_dtype is None else draw(shape, 1, carrier_dtype)
    message, denominator = draw(shape, 2, torch.bfloat16), draw(shape, 3, denominator_dtype)
    in_float32 = [t if t is None else t.float() for t in (carrier, message, denominator)]
    assert torch.equal(alone.ratio(carrier, message, denominator, EPS), reference.ratio(*in_float32, EPS).bfloat16())


@pytest.mark.parametrize("rows", ["carrier", "denominator", "both"])
@pytest.mark.parametrize("layout", ["_keep", "_channels_last"])
def test_one_row_serves_the_batch(alone, layout: str, rows: str) -> None:
    carrier, message, denominator = operands((3, 5, 6, 7), torch.float32, layout)
    carrier = LAYOUTS[layout](carrier[:1]) if rows != "denominator" else carrier
    denominator = LAYOUTS[layout](denominator[:1]) if rows != "carrier" else denominator
    expected = reference.ratio(carrier, message, denominator, EPS)
    assert torch.equal(alone.ratio(carrier, message, denominator, EPS), expected)
    assert torch.equal(alone.ratio(carrier, message, denominator, EPS, out=message), expected)
    assert alone.channel_sum(carrier, message, 1).shape == (3, 1, 6, 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_may_be_written_over_operands(dtype: torch.dtype) -> None:
    carrier, message, z = operands((2, 8, 5, 7), dtype, "_channels_last")
    expected = kernels.ratio(z, message, z, EPS)
    for place in (0, 1):
        own = [z.clone(memory_format=torch.preserve_format), message.clone(memory_format=torch.preserve_format)]
        assert kernels.ratio(own[0], own[1], own[0], EPS, out=own[place]) is own[place]
        assert torch.equal(own[place], expected)
    pair = kernels.gamma_pair(carrier, message, z, carrier, 0.25, EPS)
    over = (message.clone(memory_format=torch.preserve_format), z.clone(memory_format=torch.preserve_format))
    kernels.gamma_pair(carrier, over[0], over[1], carrier, 0.25, EPS, out=over)
    assert all(torch.equal(a, b) for a, b in zip(over, pair, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carrier", [True, False])
def test_special_values_of_the_denominator(alone, carrier: bool, dtype: torch.dtype) -> None:
    inf, nan, tiny = math.inf, math.nan, 1e-40  # tiny is subnormal, or 0
    z = torch.tensor([0.0, -0.0, inf, -inf, nan, tiny, -tiny, 1.0, -1.0], dtype=dtype, device=DEVICE)
    ones = torch.ones_like(z)
    for eps in (0.5, 0.0):
        weight = 2 * ones if carrier else None
        found = alone.ratio(weight, ones, z, eps)
        torch.testing.assert_close(found, reference.ratio(weight, ones, z, eps), rtol=0, atol=0, equal_nan=True)


def test_zero_rule_drops_exact_zeros_alone(alone) -> None:
    z = torch.tensor([0.0, -0.0, 0.0, 0.0, 1e-30, 2.0], device=DEVICE)
    message = torch.tensor([1.0, 1.0, math.inf, math.nan, 1e-30, 4.0], device=DEVICE)
    assert alone.ratio(None, message, z, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    assert alone.ratio_sum(None, message, message, z, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, 2.0, 4.0]


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["_keep", "_channels_last", "_holes"])
@pytest.mark.parametrize("shape", [(30, 7), (2, 16, 5, 7), (0, 3, 4, 5)])
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, eps: float) -> None:
    arguments = tuple(
        a.to(DEVICE) if isinstance(a, Tensor) else a for a in pair_operands(kind, shape, dtype, LAYOUTS[layout])
    )
    for carrier in (arguments[0], None):  # with the first, a ReLU's output, nothing is where z is negative
        own = (carrier, *arguments[1:])
        if carrier is None and own[2] is None:
            continue
        found = pair_of(kernels, kind)(*own, eps)
        exact = exact_pair(kind, tuple(a.cpu() if isinstance(a, Tensor) else a for a in own), eps)
        for ours, peer, truth in zip(found, plain_pair(kind, own, eps, torch_ratio), exact, strict=True):
            assert ours.dtype == dtype
            close(ours, peer, truth.to(DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (2, 16, 5, 7), (0, 3)])
def test_steps_of_one_pass(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exact, with zeros, NaN and infinities."""
    x, a, b = draw(shape, 1, dtype), draw(shape, 2, dtype), draw(shape, 3, dtype)
    if x.numel():
        for place, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
            x.flatten()[place], a.flatten()[-1 - place] = value, value
    chosen = torch.where(x >= 0, a, b)
    torch.testing.assert_close(kernels.select_by_sign(x, a, b), chosen, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(kernels.add_relu(a, b), (a + b).relu(), rtol=0, atol=0, equal_nan=True)
    assert kernels.select_by_sign(x, a, b, a) is a
    torch.testing.assert_close(a, chosen, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["_keep", "_channels_last", "_holes"])
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 5, 7), (2, 12, 3, 4, 5), (0, 12, 3), (1, 300, 3, 3)])
def test_channel_sum(shape: tuple[int, ...], groups: int, layout: str, dtype: torch.dtype) -> None:
    carrier, message, _ = operands(shape, dtype, layout)
    for own in (carrier, None):
        found = kernels.channel_sum(own, message, groups)
        assert found.is_contiguous() and found.dtype == dtype
        terms = message if own is None else own * message
        exact = message.double() if own is None else own.double() * message.double()
        split = (shape[0], groups, shape[1] // groups, *shape[2:])
        close(found, terms.reshape(split).sum(2), exact.reshape(split).sum(2))


def test_float64_is_the_references() -> None:
    carrier, message, z = (draw((3, 5), seed, torch.float64) for seed in range(3))
    assert torch.equal(kernels.ratio(carrier, message, z, EPS), reference.ratio(carrier, message, z, EPS))
    assert kernels.channel_sum(carrier, message, 1).dtype is torch.float64


# ---- Pools -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(
    dtype=st.sampled_from(DTYPES), geometry=geometries(dilated=True), channels=st.sampled_from([1, 3, 17, 130]),
    batch=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=24)
def test_max_pool(dtype: torch.dtype, geometry: Geometry, channels: int, batch: int) -> None:
    size, *window = geometry
    x = integers(batch, channels, *size).to(dtype).to(DEVICE)  # few values: most windows have ties
    expected, indices = F.max_pool2d(x, *window, return_indices=True)
    found, winners = kernels.max_pool(x, *window)
    assert torch.equal(found, expected)
    assert torch.equal(as_indices(winners.cpu(), geometry), indices.cpu())
    q = integers(*expected.shape, seed=1).to(dtype).to(DEVICE)
    back = kernels.max_pool_dgrad(q, winners, list(size), *window)
    assert torch.equal(back, transposes.portable_max_pool_dgrad(q.float(), indices, list(size), *window).to(dtype))


def test_max_pool_of_special_values() -> None:
    x = draw((2, 5, 9, 9), 0)
    x[0, :, ::2, 1], x[1, 0], x[1, 1, 3, 3] = math.nan, -math.inf, math.inf
    expected, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
    found, winners = kernels.max_pool(x, [3, 3], [2, 2], [1, 1], [1, 1], False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    geometry = ((9, 9), [3, 3], [2, 2], [1, 1], [1, 1], False)
    assert torch.equal(as_indices(winners.cpu(), geometry), indices.cpu())


@given(
    dtype=st.sampled_from(DTYPES), geometry=geometries(dilated=False), channels=st.sampled_from([1, 3, 70]),
    include=st.booleans(), divisor=st.sampled_from([None, 3]),
)  # fmt: skip
@settings(max_examples=24)
def test_avg_pool_dgrad(
    dtype: torch.dtype, geometry: Geometry, channels: int, include: bool, divisor: int | None
) -> None:
    size, kernel, stride, padding, _, ceil = geometry
    x = torch.ones((2, channels, *size), dtype=torch.float64, requires_grad=True)
    y = F.avg_pool2d(x, kernel, stride, padding, ceil, include, divisor)
    t = draw(tuple(y.shape), 1, dtype)
    (exact,) = torch.autograd.grad(y, x, t.double().cpu())
    arguments = (t, list(size), kernel, stride, padding, ceil, include, divisor, None, None)
    close(kernels.avg_pool_dgrad(*arguments), transposes.fast_avg_pool_dgrad(*arguments), exact.to(DEVICE))
