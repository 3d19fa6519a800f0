"""What the fused operators compute: every backend against float64, over layouts, dtypes, sizes and special values.

The bound is the project's: an error of at most twice that of torch's own operators in the same dtype. Results are
written into memory full of NaN, so that an element that was missed shows.
"""

import math

import pytest
import torch
from torch import Tensor

from lrpfast.ops import decompositions, native, reference

EPS = 1e-6
SHAPES = [(3, 7), (3, 7, 5), (2, 16, 5, 7), (2, 3, 4, 5, 3), (5, 1, 9, 9), (1, 33, 3, 3), (4, 1000)]
LARGE = (2, 64, 57, 59)  # worth several threads


def _keep(t: Tensor) -> Tensor:
    return t


def _channels_last(t: Tensor) -> Tensor:
    """Channels innermost, for any number of dimensions."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _backwards(t: Tensor) -> Tensor:
    """Dense, and the batch innermost: no row is a block of memory."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def _misaligned(t: Tensor) -> Tensor:
    """One element off its storage's start: aligned to the element alone."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype)
    return storage[1:].view(t.shape).copy_(t)


def _holes(t: Tensor) -> Tensor:
    """Not dense: every other element of a larger tensor."""
    return torch.stack([t, t], dim=-1)[..., 0]


DENSE = {f.__name__: f for f in (_keep, _channels_last, _backwards, _misaligned)}
LAYOUTS = {**DENSE, "_holes": _holes}
BACKENDS = {"reference": reference, "native": native}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    if request.param == "native":
        assert native.extension is not None, native.why_unavailable
    return BACKENDS[request.param]


@pytest.fixture
def native_alone(monkeypatch: pytest.MonkeyPatch):
    """The C++ backend, with nothing to fall back on."""
    assert native.extension is not None, native.why_unavailable
    monkeypatch.setattr(native, "reference", None)
    return native


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout=_keep) -> tuple[Tensor, Tensor, Tensor]:
    """Carrier, message, denominator. Some carriers are 0, as behind a ReLU; denominators are of both signs."""
    return (
        layout(draw(shape, 1, dtype).relu()),
        layout(draw(shape, 2, dtype)),
        layout(draw(shape, 3, dtype)),
    )


def exact_ratio(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """The definition, in float64."""
    z = denominator.double()
    stable = torch.where(z >= 0, z + eps, z - eps)
    ones = torch.ones((), dtype=torch.float64)
    result = (ones if carrier is None else carrier.double()) * message.double() / stable
    return result if eps != 0 else torch.where(z == 0, 0.0, result)


def torch_ratio(carrier: Tensor | None, message: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """Torch's own operators in the operands' own dtype."""
    stable = torch.where(denominator >= 0, denominator + eps, denominator - eps)
    product = message if carrier is None else carrier * message
    result = product / stable
    return (result if eps != 0 else torch.where(denominator == 0, 0, result)).to(message.dtype)


def assert_as_exact_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    scale = exact.abs().clamp_min(1e-30)

    def errors(t: Tensor) -> tuple[float, float]:
        off = ((t.double() - exact).abs() / scale).flatten()
        return (off.max().item(), off.square().mean().sqrt().item()) if off.numel() else (0.0, 0.0)

    assert not ours.isnan().any()
    for mine, peer in zip(errors(ours), errors(torchs), strict=True):
        assert mine <= 2 * peer + 1e-12, (mine, peer)


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, math.nan)


# ---- ratio and ratio_sum ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ratio_is_as_exact_as_torch(backend, shape, layout, dtype, eps):
    carrier, message, denominator = operands(shape, dtype, LAYOUTS[layout])
    out = backend.ratio(carrier, message, denominator, eps, out=poisoned(message))
    exact = exact_ratio(carrier, message, denominator, eps)
    assert out.dtype == dtype
    assert_as_exact_as_torch(out, torch_ratio(carrier, message, denominator, eps), exact)
    assert torch.equal(backend.ratio(carrier, message, denominator, eps), out)


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("carrier_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("denominator_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("message_dtype", [torch.float32, torch.bfloat16])
def test_ratio_mixes_dtypes_and_rounds_once(native_alone, message_dtype, denominator_dtype, carrier_dtype, eps):
    shape = (2, 16, 5, 7)
    carrier = None if carrier_dtype is None else draw(shape, 1, carrier_dtype)
    message, denominator = draw(shape, 2, message_dtype), draw(shape, 3, denominator_dtype)
    in_float32 = [t if t is None else t.float() for t in (carrier, message, denominator)]
    expected = reference.ratio(*in_float32, eps).to(message_dtype)
    assert torch.equal(native_alone.ratio(carrier, message, denominator, eps, out=poisoned(message)), expected)
    assert torch.equal(reference.ratio(carrier, message, denominator, eps), expected)
    assert torch.equal(decompositions.ratio(carrier, message, denominator, eps), expected)
    assert_as_exact_as_torch(
        expected,
        torch_ratio(*in_float32, eps).to(message_dtype),
        exact_ratio(carrier, message, denominator, eps),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
def test_dense_layouts_run_in_cpp(native_alone, shape, layout, dtype):
    carrier, message, denominator = operands(shape, dtype, DENSE[layout])
    expected = reference.ratio(carrier, message, denominator, EPS)
    assert torch.equal(native_alone.ratio(carrier, message, denominator, EPS, out=poisoned(message)), expected)
    both = native_alone.ratio_sum(carrier, message, denominator, message, EPS, out=poisoned(message))
    assert torch.equal(both, reference.ratio_sum(carrier, message, denominator, message, EPS))


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", ["carrier", "denominator", "both"])
def test_one_row_serves_the_batch(backend, rows, layout, eps):
    carrier, message, denominator = (LAYOUTS[layout](t) for t in operands((3, 5, 6, 7), torch.float32))
    if rows != "denominator":
        carrier = LAYOUTS[layout](carrier[:1])
    if rows != "carrier":
        denominator = LAYOUTS[layout](denominator[:1])
    out = backend.ratio(carrier, message, denominator, eps, out=poisoned(message))
    exact = exact_ratio(carrier, message, denominator, eps)
    assert_as_exact_as_torch(out, torch_ratio(carrier, message, denominator, eps), exact)
    in_place = message.clone()
    assert torch.equal(backend.ratio(carrier, in_place, denominator, eps, out=in_place), out)


def test_one_row_runs_in_cpp(native_alone):
    carrier, message, denominator = operands((3, 64, 41, 43), torch.float32, _channels_last)
    row = _channels_last(denominator[1:2])
    expected = reference.ratio(carrier, message, row.expand_as(message), EPS)
    assert torch.equal(native_alone.ratio(carrier, message, row, EPS), expected)


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_and_carrier_as_denominator(backend, dtype, eps):
    _, message, z = operands(LARGE, dtype, _channels_last)
    z[:, ::3] = 0
    expected = backend.ratio(z.clone(), message, z, eps)
    out = message.clone()
    assert backend.ratio(z, out, z, eps, out=out) is out
    assert torch.equal(out, expected)
    out = z.clone()
    assert torch.equal(backend.ratio(out, message, out, eps, out=out), expected)
    for which in (0, 1):
        pair = [message.clone(), z.clone()]
        expected = backend.ratio_sum(z, *pair, z, eps)
        assert torch.equal(backend.ratio_sum(z, *pair, z, eps, out=pair[which]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratio_sum_is_the_ratio_of_the_sum(backend, dtype):
    carrier, message, denominator = operands((2, 16, 5, 7), dtype)
    other = draw((2, 16, 5, 7), 4, dtype)
    out = backend.ratio_sum(carrier, message, other, denominator, EPS, out=poisoned(message))
    exact = exact_ratio(carrier, message.double() + other.double(), denominator, EPS)
    kept = (message.double() + other.double()).abs() > 0.01  # elsewhere the sum of the two, exact in float64, cancels
    torchs = torch_ratio(carrier, message + other, denominator, EPS)
    assert_as_exact_as_torch(out[kept], torchs[kept], exact[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("carrier", ["carrier", None])
def test_special_values_of_the_denominator(backend, carrier, dtype):
    inf, nan, tiny = math.inf, math.nan, 1e-40  # tiny is subnormal in both dtypes
    z = torch.tensor([0.0, -0.0, inf, -inf, nan, tiny, -tiny, 1.0, -1.0], dtype=dtype)
    ones = torch.ones_like(z)
    weight = 2 * ones if carrier else None
    factor = 2.0 if carrier else 1.0
    eps = 0.5
    expected = factor * torch.tensor([2.0, 2.0, 0.0, 0.0, nan, 2.0, -2.0, 1 / 1.5, -1 / 1.5]).to(dtype)
    out = backend.ratio(weight, ones, z, eps, out=torch.full_like(z, 7.0))
    torch.testing.assert_close(out, expected, rtol=0.008 if dtype == torch.bfloat16 else 1e-6, atol=0, equal_nan=True)
    for formula in (reference, decompositions):
        torch.testing.assert_close(formula.ratio(weight, ones, z, eps), out, rtol=0, atol=0, equal_nan=True)


def test_zero_rule_drops_exact_zeros_alone(backend):
    z = torch.tensor([0.0, -0.0, 0.0, 0.0, 1e-30, 2.0])
    message = torch.tensor([1.0, 1.0, math.inf, math.nan, 1e-30, 4.0])
    assert backend.ratio(None, message, z, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 2.0]
    assert backend.ratio(z, message, z, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, message[4].item(), 4.0]
    assert backend.ratio_sum(None, message, message, z, 0.0).tolist() == [0.0, 0.0, 0.0, 0.0, 2.0, 4.0]


def test_small_and_large_magnitudes_survive(backend):
    """carrier * message would underflow or overflow where carrier / S does neither."""
    z = torch.tensor([1e-30, 1e30, -1e30])
    message = torch.tensor([1e-20, 1e20, 1e20])
    torch.testing.assert_close(backend.ratio(z, message, z, 0.0), message, rtol=1e-6, atol=0)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan(native_alone):
    bits = torch.arange(2**16, dtype=torch.int32)
    high = (bits << 16).view(torch.float32)  # every bfloat16
    quarter = (bits << 16 | 0x4000).view(torch.float32)
    half = (bits << 16 | 0x8000).view(torch.float32)  # ties
    more = (bits << 16 | 0x8001).view(torch.float32)
    one = torch.ones(2**16)
    for carrier in (high, quarter, half, more):
        out = native_alone.ratio(carrier, one.bfloat16(), one, 0.0)
        expected = carrier.to(torch.bfloat16)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(0.0).view(torch.int16), expected.nan_to_num(0.0).view(torch.int16))
    wide = native_alone.ratio(None, one, high.to(torch.bfloat16), 0.0)
    torch.testing.assert_close(wide, reference.ratio(None, one, high, 0.0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (0, 8), (1, 8), (1, 3, 1, 1), (1, 1)])
def test_empty_and_single(backend, shape):
    carrier, message, denominator = operands(shape, torch.float32)
    out = backend.ratio(carrier, message, denominator, EPS)
    torch.testing.assert_close(out.double(), exact_ratio(carrier, message, denominator, EPS), rtol=1e-6, atol=1e-9)
    row = denominator[:1] if shape[0] else torch.ones(1, *shape[1:])
    assert backend.ratio(carrier, message, row, EPS).shape == shape
    assert backend.channel_sum(carrier, message, 1).shape == (shape[0], 1, *shape[2:])


def test_no_channels(backend):
    assert backend.channel_sum(None, torch.empty(2, 0, 3, 3), 1).tolist() == torch.zeros(2, 1, 3, 3).tolist()


def test_mixed_layouts_and_views_fall_back(backend):
    carrier, message, denominator = operands((3, 4, 5, 6), torch.float32)
    expected = backend.ratio(carrier, message, denominator, EPS)
    mixed = backend.ratio(_channels_last(carrier), message, _backwards(denominator), EPS, out=poisoned(message))
    assert torch.equal(mixed, expected)
    out = poisoned(_channels_last(message))
    assert torch.equal(backend.ratio(carrier, message, denominator, EPS, out=out), expected)
    row = denominator[:1]
    expanded = backend.ratio(carrier, message, row.expand_as(message), EPS)
    assert torch.equal(expanded, backend.ratio(carrier, message, row, EPS))
    negated = torch._neg_view(carrier)  # its memory holds the opposite of its values
    assert torch.equal(backend.ratio(negated, message, denominator, EPS), -expected)


# ---- gamma_pair and alpha_beta_pair ----------------------------------------------------------------------------------

PAIRS = ["gamma", "alpha_beta", "alpha_beta without z_plus"]


def pair_operands(kind: str, shape: tuple[int, ...], dtype: torch.dtype, layout=_keep) -> tuple:
    """Arguments up to eps: carrier, message, the two denominators' parts, the rule's parameters."""
    message, z_plus, z_minus = draw(shape, 2, dtype), draw(shape, 3, dtype).abs(), -draw(shape, 4, dtype).abs()
    z = z_plus + z_minus
    for zeros in (z, z_plus, z_minus):
        zeros[:, ::3] = 0
    carrier, message, z, z_plus, z_minus = (layout(t) for t in (z.relu(), message, z, z_plus, z_minus))
    if kind == "gamma":
        return carrier, message, z, z_plus, 0.25
    return carrier, message, None if kind == PAIRS[2] else z_plus, z_minus, 2.0, 1.0


def pair_of(formulas, kind: str):
    return formulas.gamma_pair if kind == "gamma" else formulas.alpha_beta_pair


def plain_pair(kind: str, arguments: tuple, eps: float, ratio) -> tuple[Tensor, Tensor]:
    """The definitions of RULES.md §2 in terms of a ratio."""
    if kind == "gamma":
        carrier, message, z, z_plus, gamma = arguments
        upper = ratio(carrier, message, z + gamma * z_plus, eps)
        lower = ratio(carrier, message, (1 + gamma) * z - gamma * z_plus, eps)
        return torch.where(z > 0, upper, 0), torch.where(z < 0, lower, 0)
    carrier, message, z_plus, z_minus, alpha, beta = arguments
    z_plus = carrier - z_minus if z_plus is None else z_plus
    return alpha * ratio(carrier, message, z_plus, eps), -beta * ratio(carrier, message, z_minus, eps)


def exact_pair(kind: str, arguments: tuple, eps: float) -> tuple[Tensor, Tensor]:
    return plain_pair(kind, tuple(a.double() if isinstance(a, Tensor) else a for a in arguments), eps, exact_ratio)


@pytest.mark.parametrize("eps", [EPS, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 7), (2, 16, 5, 7), (2, 3, 4, 5, 3)])
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_as_exact_as_torch(backend, kind, shape, layout, dtype, eps):
    arguments = pair_operands(kind, shape, dtype, LAYOUTS[layout])
    out = (poisoned(arguments[1]), poisoned(arguments[1]))
    assert pair_of(backend, kind)(*arguments, eps, out=out) is out
    torchs = plain_pair(kind, arguments, eps, torch_ratio)
    for ours, peer, exact in zip(out, torchs, exact_pair(kind, arguments, eps), strict=True):
        assert ours.dtype == dtype
        assert_as_exact_as_torch(ours, peer, exact)
    fresh = pair_of(backend, kind)(*arguments, eps)
    assert all(torch.equal(a, b) for a, b in zip(fresh, out, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_run_in_cpp_also_in_place(native_alone, kind, layout, dtype):
    """With float32 denominators and a carrier of another dtype than the message's; over two of the operands."""
    carrier, message, first, second, *parameters = pair_operands(kind, LARGE, torch.float32, DENSE[layout])
    message = message.to(dtype)
    for own_carrier in (carrier, carrier.bfloat16(), None):
        if own_carrier is None and first is None:
            continue
        arguments = (own_carrier, message, first, second, *parameters)
        out = pair_of(native_alone, kind)(*arguments, EPS)
        for ours, exact in zip(out, exact_pair(kind, arguments, EPS), strict=True):
            tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=0)
        own, own_second = message.clone(), second.clone()
        over = (own, own_second if dtype == torch.float32 else poisoned(message))
        pair_of(native_alone, kind)(own_carrier, own, first, own_second, *parameters, EPS, out=over)
        assert all(torch.equal(a, b) for a, b in zip(over, out, strict=True))


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_an_empty_batch(backend, kind):
    arguments = pair_operands(kind, (0, 3, 4, 5), torch.float32)
    assert all(t.shape == (0, 3, 4, 5) for t in pair_of(backend, kind)(*arguments, EPS))


# ---- channel_sum -----------------------------------------------------------------------------------------------------


def exact_channel_sum(carrier: Tensor | None, message: Tensor, groups: int) -> Tensor:
    terms = message.double() if carrier is None else carrier.double() * message.double()
    return terms.unflatten(1, (groups, message.shape[1] // groups)).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (2, 12, 5, 7), (2, 12, 3, 4, 5), (0, 12, 3), None])
def test_channel_sum_is_as_exact_as_torch(backend, shape, groups, layout, dtype):
    carrier, message, _ = operands(shape or (2, 12, 5, 7), dtype, LAYOUTS[layout])
    if shape is None:
        shape, carrier = message.shape, None
    result_shape = (shape[0], groups, *shape[2:])
    out = backend.channel_sum(carrier, message, groups, out=torch.full(result_shape, math.nan, dtype=dtype))
    terms = message if carrier is None else carrier * message
    torchs = terms.reshape(shape[0], groups, shape[1] // groups, *shape[2:]).sum(2)
    exact = exact_channel_sum(carrier, message, groups)
    assert out.dtype == dtype
    assert not out.isnan().any()
    # Sums cancel, so errors are measured against the size of the result as a whole.
    assert (out.double() - exact).norm() <= 2 * (torchs.double() - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [_keep, _channels_last, _misaligned])
@pytest.mark.parametrize("shape", [(3, 12), (2, 12, 5, 7), (2, 12, 3, 4, 5), (3, 1, 5, 7), (1, 1536, 31, 33)])
def test_channel_sum_runs_in_cpp(native_alone, shape, layout, dtype):
    carrier, message, _ = operands(shape, dtype, layout)
    for groups in {1, shape[1]}:
        for row in (carrier, layout(carrier[:1])):
            out = native_alone.channel_sum(row, message, groups)
            exact = exact_channel_sum(row, message, groups)
            error = (out.double() - exact).norm() / exact.norm()
            assert error < (4e-3 if dtype == torch.bfloat16 else 1e-7)
            assert out.is_contiguous()


# ---- Threads and instruction sets ------------------------------------------------------------------------------------


def test_every_instruction_set_gives_the_same(native_alone):
    """Bit for bit where there is no sum; to rounding in `channel_sum`."""
    full = native_alone.extension.cpu_capability()
    carrier, message, denominator = operands(LARGE, torch.float32, _channels_last)
    results = {}
    try:
        for name in ("default", "avx2", "avx512", "avx512_bf16"):
            assert native_alone.extension.limit_cpu_capability(name)
            for dtype in (torch.float32, torch.bfloat16):
                c, m = carrier.to(dtype), message.to(dtype)
                results.setdefault(dtype, []).append(
                    (
                        native_alone.ratio(c, m, denominator, EPS),
                        *native_alone.gamma_pair(c, m, denominator, carrier, 0.25, EPS),
                        *native_alone.alpha_beta_pair(c, m, None, denominator, 2.0, 1.0, EPS),
                        native_alone.channel_sum(c, m, 2),
                    )
                )
        assert not native_alone.extension.limit_cpu_capability("mmx")
    finally:
        assert native_alone.extension.limit_cpu_capability(None)
    assert native_alone.extension.cpu_capability() == full
    for runs in results.values():
        for *elementwise, total in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(elementwise, runs[0], strict=False))
            torch.testing.assert_close(total, runs[0][-1], rtol=1e-6, atol=1e-6)


def test_any_number_of_threads_gives_the_same(native_alone):
    carrier, message, denominator = operands(LARGE, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out = native_alone.ratio(carrier, message, denominator, EPS, out=poisoned(message))
            results.append((out, native_alone.channel_sum(carrier, message, 2)))
    finally:
        torch.set_num_threads(before)
    for ratio, total in results[1:]:
        assert torch.equal(ratio, results[0][0])
        assert torch.equal(total, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE, (0, 3)])
def test_steps_of_one_pass(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """A choice by sign and a sum with its ReLU are exact: what torch gives in two passes, with zeros, NaN and infinities."""
    x, a, b = (LAYOUTS[layout](t) for t in operands(shape, dtype))  # x >= 0, often 0
    x = LAYOUTS[layout](torch.where(a > 1, -x, x))
    if x.numel() > 4:
        for value, place in ((math.nan, 0), (math.inf, 1), (-math.inf, 2), (-0.0, 3)):
            a[tuple(0 if d else place % shape[0] for d in range(len(shape)))] = value
    expected = torch.where(x >= 0, a, b)
    torch.testing.assert_close(native.select_by_sign(x, a, b), expected, rtol=0, atol=0, equal_nan=True)
    total = (a + b).relu()
    torch.testing.assert_close(native.add_relu(a, b), total, rtol=0, atol=0, equal_nan=True)
    over_a, over_b = a.clone(), b.clone()
    for found in (native.select_by_sign(x, over_a, b, over_a), native.select_by_sign(x, a, over_b, over_b)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(over_b.nan_to_num(), expected.nan_to_num())
