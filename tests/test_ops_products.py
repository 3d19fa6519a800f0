"""Convolutions of our own against float64: Winograd's filtering, 1 x 1 products, depthwise layers and those straight from their
weight, each with all that may follow in its call.

The rule for rounding: at most twice the error of torch's convolution in float32, in the norm of the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpfast.ops import native, products
from lrpfast.ops.filters import Filters
from lrpfast.ops.products import RELU, Depthwise, Direct, Pointwise, Winograd


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN, so that an element that was missed, or read before it was written, shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(*shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


def assert_as_exact(found: Tensor, direct: Tensor, exact: Tensor, magnitudes: Tensor) -> None:
    """`found` is at most twice as far from the exact values as torch's own float32 is, in norm.

    On few values torch's error may be near zero by luck. So what one sum may err by is free, the largest, were its terms
    rounded to 22 bits in one direction: `magnitudes` are the sums of the terms' magnitudes. On many values that is nothing.
    """
    assert found.shape == exact.shape and found.dtype is torch.float32
    own, torchs = (torch.linalg.vector_norm(t.double() - exact) for t in (found, direct))
    assert own <= 2 * torchs + 2**-22 * magnitudes.flatten().amax(0) if exact.numel() else own == 0


def magnitudes_of(x: Tensor, weight: Tensor, *how: object, **named: object) -> Tensor:
    return F.conv2d(x.double().abs(), weight.double().abs(), None, *how, **named)


winograd_sizes = st.tuples(
    st.integers(0, 3), st.sampled_from([16, 48]), st.sampled_from([32, 160]), st.integers(2, 13), st.integers(2, 13),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
).filter(lambda s: all(n + 2 * p >= 4 for n, p in zip(s[3:5], s[5], strict=True)))  # fmt: skip


winograd_forms = st.sampled_from(["stride 1", "stride 2", "transpose, 0 left over", "transpose, 1 left over"])


@dataclasses.dataclass
class Form:
    """A layer that Winograd's filtering is for, as torch computes it: filters ``[K, C, 3, 3]``, of a transpose with taps in reverse."""

    stride: int
    padding: tuple[int, int]
    left_over: int | None  # of a transpose

    @classmethod
    def of(cls, name: str, padding: tuple[int, int]) -> Form:
        return cls(1 if name == "stride 1" else 2, padding, int(name.split()[1]) if "left over" in name else None)

    def __call__(self, x: Tensor, weight: Tensor, shift: Tensor | None = None) -> Tensor:
        if self.left_over is None:
            return F.conv2d(x, weight, shift, self.stride, self.padding)
        turned = weight.transpose(0, 1).flip(2, 3)
        return F.conv_transpose2d(x, turned, shift, self.stride, self.padding, self.left_over)

    def result(self, size: tuple[int, int]) -> tuple[int, ...] | None:
        """The size of a transpose's result."""
        if self.left_over is None:
            return None
        return tuple(2 * n + 1 - 2 * p + self.left_over for n, p in zip(size, self.padding, strict=True))

    def fits(self, weight: Tensor, size: tuple[int, int]) -> bool:
        stride = [self.stride] * 2
        return Winograd.fits(weight.shape, self.result(size) or size, stride, self.padding, [1, 1], 1)


@given(sizes=winograd_sizes, form=winograd_forms, bias=st.booleans(), relu=st.booleans())
@settings(max_examples=100)
def test_winograd(sizes: tuple, form: str, bias: bool, relu: bool) -> None:
    batch, channels, filters, height, width, padding = sizes
    x, weight = images(batch, channels, height, width), draw(filters, channels, 3, 3, seed=1)
    own = Form.of(form, padding)
    assume(own.fits(weight, (height, width)))
    how = (padding, own.stride, own.result((height, width)))
    shift = draw(filters, seed=2) if bias else None
    exact = own(x.double(), weight.double(), None if shift is None else shift.double())
    direct = own(x, weight, shift)
    magnitudes = own(x.double().abs(), weight.double().abs())
    turned = weight.transpose(0, 1).flip(2, 3)  # the layer that this one is the transpose of
    laid_out = [Winograd.of(weight, *how)]
    for lies in (torch.contiguous_format, torch.channels_last):
        laid_out.append(Winograd(Filters(weight.contiguous(memory_format=lies)), *how))
        laid_out.append(Winograd(Filters(turned.contiguous(memory_format=lies), transposed=True), *how))
        # Factors that divide without rounding, a filter each: of the transpose's layer they are its channels'.
        factors, of_channels = (torch.tensor([0.5, -2.0, 4.0, -1.0])[torch.arange(n) % 4] for n in weight.shape[:2])
        folded = Filters.of((weight / factors[:, None, None, None]).contiguous(memory_format=lies), factors)
        back = Filters.of((turned / of_channels[:, None, None, None]).contiguous(memory_format=lies), of_channels)
        laid_out += [Winograd(f, *how) for f in (folded, dataclasses.replace(back, transposed=True))]
    for layer in laid_out:
        found = products.convolution(layer, x, shift, RELU if relu else None)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_as_exact(found, direct.relu() if relu else direct, exact.relu() if relu else exact, magnitudes)


@given(sizes=winograd_sizes, form=winograd_forms, bias=st.booleans(), relu=st.booleans())
@settings(max_examples=40)
def test_winograd_in_bfloat16(sizes: tuple, form: str, bias: bool, relu: bool) -> None:
    """Of a weight in float32, as torch's own convolution in bfloat16 has it rounded. What is free on few values: 10 bits a term."""
    batch, channels, filters, height, width, padding = sizes
    x, weight = images(batch, channels, height, width).bfloat16(), draw(filters, channels, 3, 3, seed=1)
    of = Form.of(form, padding)
    assume(of.fits(weight, (height, width)))
    shift = draw(filters, seed=2).bfloat16() if bias else None
    exact = of(x.double(), weight.double(), None if shift is None else shift.double())
    direct = of(x, weight.bfloat16(), shift)
    if relu:
        exact, direct = exact.relu(), direct.relu()
    free = 2**-10 * of(x.double() ** 2, weight.double() ** 2).sum().sqrt()
    turned = weight.transpose(0, 1).flip(2, 3)  # the layer that this one is the transpose of
    for filters_of in (Filters(weight), Filters(turned, transposed=True), Filters(weight.double())):
        layer = Winograd.in_bfloat16(filters_of, padding, of.stride, of.result((height, width)))
        found = products.convolution(layer, x, shift, RELU if relu else None)
        assert found.shape == exact.shape and found.dtype is torch.bfloat16
        assert found.is_contiguous(memory_format=torch.channels_last)
        own, torchs = (torch.linalg.vector_norm(t.double() - exact) for t in (found, direct))
        assert own <= 2 * torchs + free


def integers(*shape: int, most: int, seed: int) -> Tensor:
    drawn = torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize(
    ("filters", "kernel", "form", "padding"),
    [(64, 3, form, p) for form in ("stride 1", "stride 2", "transpose, 1 left over") for p in (0, 1, 2)]
    + [(40, 1, "stride 1", 0), (72, 1, "stride 2", 0)],
)
def test_bfloat16_is_rounded_at_the_end_alone(
    capability: str, filters: int, kernel: int, form: str, padding: int
) -> None:
    """Integers that no step but the last can round: every bit, of all that may follow in the call, with any number of threads."""
    x, weight = integers(2, 48, 9, 12, most=2, seed=0), 4 * integers(filters, 48, kernel, kernel, most=2, seed=1)
    shift = integers(filters, most=9, seed=2)
    of = Form.of(form, (padding, padding))
    z = of(x.double(), weight.double(), shift.double()).float()
    before, carrier, a, b = (integers(*z.shape, most=100, seed=seed) for seed in (3, 4, 5, 6))
    narrow = weight.bfloat16()
    layer = (
        Winograd.in_bfloat16(Filters(weight), of.padding, of.stride, of.result((9, 12)))
        if kernel == 3
        else Pointwise.of(narrow, [of.stride] * 2)
    )
    x, shift_16, before_16, carrier_16, a_16, b_16 = (t.bfloat16() for t in (x, shift, before, carrier, a, b))
    stable = z + torch.where(z >= 0, 0.25, -0.25)
    threads = torch.get_num_threads()
    assert native.extension is not None
    try:
        assert native.extension.limit_cpu_capability(capability)
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(products.convolution(layer, x, shift_16), z.bfloat16())
            assert torch.equal(products.convolution(layer, x, shift_16, (-50.0, 70.0)), z.clamp(-50, 70).bfloat16())
            added = products.convolution_add_(before_16.clone(memory_format=torch.preserve_format), layer, x)
            assert torch.equal(added, (before + z - shift[:, None, None]).bfloat16())
            for by, other in ((None, None), (carrier_16, None), (None, b_16), (carrier_16, b_16)):
                total = a if other is None else a + b
                expected = total / stable if by is None else total * (carrier / stable)
                found = products.convolution_ratio(layer, x, shift_16, by, a_16, other, 0.25, None)
                assert torch.equal(found, expected.bfloat16())
    finally:
        torch.set_num_threads(threads)
        native.extension.limit_cpu_capability(None)


def test_winograd_takes_what_it_fits_alone() -> None:
    good = ((64, 32, 3, 3), (7, 7), [1, 1], [1, 1], [1, 1], 1)
    assert Winograd.fits(*good) and Winograd.fits(*good[:2], [2, 2], *good[3:])
    for at, wrong in [
        (0, (48, 32, 3, 3)), (0, (64, 24, 3, 3)), (0, (64, 32, 5, 5)), (0, (64, 32, 3, 1)), (1, (1, 7)), (2, [2, 1]),
        (2, [3, 3]), (3, [1, 3]), (4, [1, 2]), (5, 2),
    ]:  # fmt: skip
        assert not Winograd.fits(*(wrong if i == at else value for i, value in enumerate(good)))


@pytest.mark.parametrize(
    ("stride", "twice_g"),
    [(1, ([2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2])), (2, ([2, 0, 0], [2, 0, 2], [0, 0, 2], [0, 2, 0]))],
)
def test_the_transformed_weight_is_that_of_the_definition(stride: int, twice_g: tuple[list[int], ...]) -> None:
    """G g Gᵀ in rational arithmetic, for integer filters: exact in float32 too."""
    g_matrix = [[Fraction(n, 2) for n in row] for row in twice_g]
    weight = torch.randint(-8, 9, (64, 16, 3, 3), generator=torch.Generator().manual_seed(0)).float()
    laid_out = Winograd.of(weight, [1, 1], stride).weight
    for filters, channel in ((0, 0), (33, 5), (63, 15)):
        g = [[Fraction(int(v)) for v in row] for row in weight[filters, channel]]
        for i in range(4):
            for j in range(4):
                sums = (g_matrix[i][a] * g[a][b] * g_matrix[j][b] for a in range(3) for b in range(3))
                assert laid_out[4 * i + j, filters // 32, channel, filters % 32] == float(sum(sums))


@pytest.mark.parametrize("form", ["stride 1", "stride 2"])
def test_winograd_rounds_no_worse_on_the_sums_of_real_layers(form: str) -> None:
    """Positive parts, as denominators have them: 4608 terms of one sign. Every value, not the norm alone."""
    x, weight = images(2, 512, 14, 14).relu(), draw(128, 512, 3, 3, seed=1).relu()
    of = Form.of(form, (1, 1))
    exact = of(x.double(), weight.double())
    direct = of(x, weight)
    found = products.convolution(Winograd.of(weight, of.padding, of.stride), x, None)
    worst = [((t.double() - exact).abs() / exact).max() for t in (found, direct)]
    assert worst[0] <= 2 * worst[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["stride 1", "stride 2", "transpose, 0 left over", "transpose, 1 left over"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_window_of_zeros_gives_zero_beside_large_values(form: str, padding: int, dtype: torch.dtype) -> None:
    """At every place of the zeros, and so of the tiles."""
    weight, of = draw(32, 16, 3, 3, seed=1), Form.of(form, (padding, padding))
    how = (of.padding, of.stride, of.result((12, 12)))
    layer = Winograd.in_bfloat16(Filters(weight), *how) if dtype is torch.bfloat16 else Winograd.of(weight, *how)
    seen = 0
    for at in range(8):
        x = (images(1, 16, 12, 12) * 1e6).to(dtype)
        x[..., at : at + 5, 3:8] = 0
        without = of((x != 0).double(), torch.ones_like(weight).double()) == 0  # windows that hold nothing but zeros
        assert torch.equal(products.convolution(layer, x, None) == 0, without)
        seen += int(without.sum())
    assert seen >= 8 * 32


@pytest.mark.parametrize("form", ["stride 2", "transpose, 0 left over", "transpose, 1 left over"])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_nan_reaches_the_windows_of_strided_layers_that_hold_it_and_no_others(form: str, padding: int) -> None:
    weight, of = draw(32, 16, 3, 3, seed=1), Form.of(form, (padding, padding))
    layer = Winograd.of(weight, of.padding, of.stride, of.result((9, 9)))
    for at in range(9):
        x = images(2, 16, 9, 9)
        x[1, 3, at, 5] = float("nan")
        expected = of(x.isnan().double(), torch.ones_like(weight).double()) > 0
        assert torch.equal(products.convolution(layer, x, None).isnan(), expected)


def test_nan_reaches_the_windows_that_hold_it_and_no_others() -> None:
    x = images(2, 16, 9, 9)
    x[1, 3, 4, 5] = float("nan")
    for layer, reach in (
        (Winograd.of(draw(32, 16, 3, 3, seed=1), [1, 1]), 1),
        (Winograd.in_bfloat16(Filters(draw(32, 16, 3, 3, seed=1)), [1, 1]), 1),
        (Pointwise.of(draw(5, 16, 1, 1), [1, 1]), 0),
        (Pointwise.of(draw(5, 16, 1, 1).bfloat16(), [1, 1]), 0),
        (Pointwise.of_two(draw(5, 16, 1, 1), draw(5, 16, 1, 1, seed=1), [1, 1]), 0),
        (Depthwise.of(draw(16, 1, 3, 3), [1, 1], [1, 1], [1, 1]), 1),
    ):
        expected = torch.zeros(2, 9, 9, dtype=torch.bool)
        expected[1, 4 - reach : 5 + reach, 5 - reach : 6 + reach] = True
        for clamp in (None, RELU, (0.0, 6.0)):
            narrow = layer.weight.dtype is torch.bfloat16
            found = products.convolution(layer, x.bfloat16() if narrow else x, None, clamp).isnan()
            one_channel = isinstance(layer, Depthwise)
            assert torch.equal(found[:, 3] if one_channel else found.all(1), expected)
            assert torch.equal(found.any(1), expected)


pointwise_sizes = st.tuples(
    st.integers(0, 3), st.sampled_from([1, 3, 16, 70, 512]), st.sampled_from([1, 8, 24, 32, 72, 100]), st.integers(1, 9),
    st.integers(1, 9), st.tuples(st.integers(1, 3), st.integers(1, 3)),
)  # fmt: skip


@given(sizes=pointwise_sizes, bias=st.booleans(), relu=st.booleans(), by_sign=st.booleans())
@settings(max_examples=80)
def test_pointwise(sizes: tuple, bias: bool, relu: bool, by_sign: bool) -> None:
    batch, channels, filters, height, width, stride = sizes
    x, weight = images(batch, channels, height, width), draw(filters, channels, 1, 1, seed=1)
    other = draw(filters, channels, 1, 1, seed=3)
    shift = draw(filters, seed=2) if bias else None

    def layer(dtype: torch.dtype) -> Tensor:
        wide, own_shift = x.to(dtype), None if shift is None else shift.to(dtype)
        if not by_sign:
            total = F.conv2d(wide, weight.to(dtype), own_shift, stride)
        else:
            total = F.conv2d(wide.clamp(min=0), weight.to(dtype), own_shift, stride)
            total = total + F.conv2d(wide.clamp(max=0), other.to(dtype), None, stride)
        return total.relu() if relu else total

    laid_out = Pointwise.of_two(weight, other, stride) if by_sign else Pointwise.of(weight, stride)
    magnitudes = magnitudes_of(x, weight.abs().maximum(other.abs()), stride)
    assert_as_exact(
        products.convolution(laid_out, x, shift, RELU if relu else None),
        layer(torch.float32),
        layer(torch.float64),
        magnitudes,
    )


@given(sizes=pointwise_sizes, bias=st.booleans(), relu=st.booleans())
@settings(max_examples=25)
def test_pointwise_in_bfloat16(sizes: tuple, bias: bool, relu: bool) -> None:
    """Each value is off by the rounding of the result, and little more."""
    batch, channels, filters, height, width, stride = sizes
    channels += channels % 2  # pairs
    x, weight = images(batch, channels, height, width).bfloat16(), draw(filters, channels, 1, 1, seed=1).bfloat16()
    shift = draw(filters, seed=2).bfloat16() if bias else None
    exact = F.conv2d(x.double(), weight.double(), None if shift is None else shift.double(), stride)
    magnitudes = F.conv2d(x.double().abs(), weight.double().abs(), None, stride)
    if relu:
        exact = exact.relu()
    assert Pointwise.fits(weight.shape, [0, 0], 1, torch.bfloat16)
    found = products.convolution(Pointwise.of(weight, stride), x, shift, RELU if relu else None)
    assert found.shape == exact.shape and found.dtype is torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-20 * magnitudes).all()


def test_pointwise_takes_what_it_fits_alone() -> None:
    good = ((24, 6, 1, 1), [0, 0], 1, torch.bfloat16)
    assert Pointwise.fits(*good) and Pointwise.fits((24, 7, 1, 1), [0, 0], 1, torch.float32)
    for at, wrong in [(0, (24, 7, 1, 1)), (0, (24, 6, 1, 3)), (0, (24, 6, 1)), (1, [0, 1]), (2, 2)]:
        assert not Pointwise.fits(*(wrong if i == at else value for i, value in enumerate(good)))


Windows = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation


def forward(x: Tensor, weight: Tensor, shift: Tensor | None, how: Windows, groups: int, clamp: tuple | None) -> Tensor:
    """torch's layer in the dtype of `x`."""
    total = F.conv2d(x, weight.to(x.dtype), None if shift is None else shift.to(x.dtype), *how, groups)
    return total if clamp is None else total.clamp(*clamp)


def transpose(s: Tensor, like: Tensor, weight: Tensor, how: Windows, groups: int) -> Tensor:
    """The layer's transpose, by autograd."""
    probe = torch.zeros(like.shape, dtype=s.dtype, requires_grad=True)
    return torch.autograd.grad((F.conv2d(probe, weight.to(s.dtype), None, *how, groups) * s).sum(), probe)[0]


def assert_both_ways(
    layer: products.Product, back: products.Product, x: Tensor, weight: Tensor, shift: Tensor | None, how: Windows,
    groups: int, clamp: tuple | None,
) -> None:  # fmt: skip
    """A layer and its transpose against float64."""
    exact = forward(x.double(), weight, shift, how, groups, clamp)
    magnitudes = magnitudes_of(x, weight, *how, groups)
    found = products.convolution(layer, x, shift, clamp)
    assert_as_exact(found, forward(x, weight, shift, how, groups, clamp), exact, magnitudes)
    s = images(*exact.shape, seed=3)
    of_s, of_double = (transpose(t, x, weight, how, groups) for t in (s, s.double()))
    of_magnitudes = transpose(s.double().abs(), x, weight.double().abs(), how, groups)
    assert_as_exact(products.convolution(back, s, None), of_s, of_double, of_magnitudes)


windows = st.tuples(
    st.integers(1, 8), st.integers(1, 3), st.integers(0, 4), st.integers(1, 2)
)  # kernel, stride, padding, dilation


@given(
    batch=st.integers(0, 2), channels=st.sampled_from([2, 7, 16, 33, 48]), size=st.tuples(st.integers(1, 29), st.integers(1, 29)),
    rows=windows, columns=windows, bias=st.booleans(), clamp=st.sampled_from([None, RELU, (-0.5, 0.75)]),
)  # fmt: skip
@settings(max_examples=60)
def test_depthwise_and_its_transpose(
    batch: int, channels: int, size: tuple[int, int], rows: tuple, columns: tuple, bias: bool, clamp: tuple | None
) -> None:
    kernel, stride, padding, dilation = zip(rows, columns, strict=True)
    spans = [n + 2 * p - d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)]
    assume(all(span >= 1 for span in spans))
    weight = draw(channels, 1, *kernel, seed=1)
    assert Depthwise.fits(weight.shape, channels)
    shift = draw(channels, seed=2) if bias else None
    layer, back = (Depthwise.of(weight, stride, padding, dilation, to) for to in (None, size))
    how = (stride, padding, dilation)
    assert_both_ways(layer, back, images(batch, channels, *size), weight, shift, how, channels, clamp)


def test_depthwise_takes_what_it_fits_alone() -> None:
    assert Depthwise.fits((24, 1, 8, 8), 24)
    for shape, groups in (
        ((24, 1, 9, 3), 24),
        ((24, 1, 3, 9), 24),
        ((48, 1, 3, 3), 24),
        ((24, 2, 3, 3), 12),
        ((1, 1, 3, 3), 1),
    ):
        assert not Depthwise.fits(shape, groups)


directs = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2))


@given(
    batch=st.integers(0, 2), channels=st.sampled_from([3, 16, 70, 300]), filters=st.sampled_from([1, 32, 40, 70]),
    size=st.tuples(st.integers(1, 17), st.integers(1, 17)), rows=directs, columns=directs, bias=st.booleans(),
    clamp=st.sampled_from([None, RELU, (-0.5, 0.75)]), folded=st.booleans(), scales=st.sampled_from([(1.0, 1.0), (1.0, 0.0), (1.25, 1.0)]),
    lies=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)  # fmt: skip
@settings(max_examples=60)
def test_direct_and_its_transpose(
    batch: int, channels: int, filters: int, size: tuple[int, int], rows: tuple, columns: tuple, bias: bool,
    clamp: tuple | None, folded: bool, scales: tuple[float, float], lies: torch.memory_format,
) -> None:  # fmt: skip
    kernel, stride, padding, dilation = zip(rows, columns, strict=True)
    spans = [n + 2 * p - d * (k - 1) for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)]
    assume(all(span >= 1 for span in spans))
    given = draw(filters, channels, *kernel, seed=1).contiguous(memory_format=lies)
    factors = draw(filters, seed=4).double() if folded else torch.ones(filters, dtype=torch.float64)
    product = given.double() * factors[:, None, None, None]
    weight = product * torch.where(product > 0, *scales)
    made = Filters.of(given, factors) if folded else Filters(given)
    made = dataclasses.replace(made, scales=scales)
    assert Direct.fits(given.shape, 1)
    shift = draw(filters, seed=2) if bias else None
    how = (stride, padding, dilation)
    layer, back = Direct(made, *how), Direct(dataclasses.replace(made, transposed=True), *how, size)
    assert_both_ways(layer, back, images(batch, channels, *size), weight, shift, how, 1, clamp)


def test_direct_takes_what_it_fits_alone() -> None:
    assert Direct.fits((24, 7, 8, 8), 1)
    for shape, groups in (((24, 7, 9, 8), 1), ((24, 7, 3, 3), 2), ((24, 7, 3), 1)):
        assert not Direct.fits(shape, groups)


def layers_of(kind: str) -> tuple[products.Product, Callable[..., Tensor], Tensor]:
    """A layer of our own for images of 32 channels, 7 x 9, torch's, and the weight that both take."""
    if kind == "winograd":
        weight = draw(64, 32, 3, 3, seed=1)
        return Winograd.of(weight, [1, 1]), functools.partial(F.conv2d, padding=1), weight
    if kind == "strided winograd":
        weight = draw(64, 32, 3, 3, seed=1)
        return Winograd.of(weight, [1, 1], 2), functools.partial(F.conv2d, stride=2, padding=1), weight
    if kind == "winograd, transposed":
        weight = draw(32, 64, 3, 3, seed=1)
        of = functools.partial(F.conv_transpose2d, stride=2, padding=1)
        return Winograd(Filters(weight, transposed=True), (1, 1), 2, (13, 17)), of, weight
    if kind == "depthwise":
        weight = draw(32, 1, 3, 3, seed=1)
        of = functools.partial(F.conv2d, padding=1, groups=32)
        return Depthwise.of(weight, [1, 1], [1, 1], [1, 1]), of, weight
    if kind == "direct":
        weight = draw(40, 32, 3, 3, seed=1)
        return Direct(Filters(weight), (1, 1), (1, 1), (1, 1)), functools.partial(F.conv2d, padding=1), weight
    weight = draw(40, 32, 1, 1, seed=1)  # 40: a panel and a half vector
    return Pointwise.of(weight, [1, 1]), F.conv2d, weight


KINDS = ["winograd", "strided winograd", "winograd, transposed", "pointwise", "depthwise", "direct"]


@pytest.mark.parametrize("kind", KINDS)
def test_added(kind: str) -> None:
    layer, of, weight = layers_of(kind)
    x = images(3, 32, 7, 9)
    before = images(*of(x, weight).shape, seed=4)
    out = before.clone()
    assert products.convolution_add_(out, layer, x) is out
    direct, exact = before + of(x, weight), before.double() + of(x.double(), weight.double())
    assert_as_exact(out, direct, exact, of(x.double().abs(), weight.double().abs()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("place", ["new", "over the message", "contiguous message"])
def test_a_ratio_in_the_call(kind: str, carried: bool, two: bool, bias: bool, place: str) -> None:
    """As `ratio` of the stored convolution, to the last digits: the one division is the same."""
    layer, of, weight = layers_of(kind)
    x, eps = images(3, 32, 7, 9), 0.25
    shape = of(x, weight).shape
    shift = draw(shape[1], seed=2) if bias else None
    carrier = images(*shape, seed=5) if carried else None
    a, b = images(*shape, seed=6), images(*shape, seed=7) if two else None
    if place == "contiguous message":
        a = a.contiguous()
    z = products.convolution(layer, x, shift)
    total = a if b is None else a + b
    stable = z.double() + torch.where(z >= 0, eps, -eps)
    expected = total.double() / stable if carrier is None else carrier.double() * total.double() / stable
    out = a if place == "over the message" else None
    found = products.convolution_ratio(layer, x, shift, carrier, a, b, eps, out)
    assert (found is a) == (place == "over the message")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ratio_without_stabiliser_drops_what_an_exact_zero_divides(kind: str) -> None:
    layer, of, weight = layers_of(kind)
    x = torch.zeros(1, 32, 7, 9).contiguous(memory_format=torch.channels_last)
    x[..., 0, 0] = 1
    reached = of(x, torch.ones_like(weight)) > 0
    message = torch.ones(reached.shape).contiguous(memory_format=torch.channels_last)
    found = products.convolution_ratio(layer, x, None, None, message, None, 0.0, None)
    z = products.convolution(layer, x, None)
    assert torch.equal(z != 0, reached) and 0 < reached.sum() < reached.numel() / 2
    assert torch.equal(found, torch.where(z == 0, 0.0, 1 / z))


def test_one_row_of_a_carrier_serves_the_batch() -> None:
    layer, _, weight = layers_of("pointwise")
    x, message = images(3, 32, 4, 4), images(3, 40, 4, 4, seed=1)
    carrier = images(1, 40, 4, 4, seed=2)
    expected = carrier * message / (F.conv2d(x, weight).abs() + 1) * F.conv2d(x, weight).sign()
    found = products.convolution_ratio(layer, x, None, carrier, message, None, 1.0, None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(filters=st.sampled_from([1, 16, 17, 24, 32, 70]), channels=st.sampled_from([2, 96]), batch=st.integers(0, 3))
@settings(max_examples=30)
def test_either_of_two(filters: int, channels: int, batch: int) -> None:
    upper, lower = draw(filters, channels, 1, 1, seed=1), draw(filters, channels, 1, 1, seed=2)
    x, sign = images(batch, channels, 5, 3), images(batch, filters, 5, 3, seed=3)
    if batch:
        sign[0, :, 0] = torch.tensor([0.0, -0.0, float("nan")])  # both zeros count as positive, a NaN does not
    found = products.either_convolution(Pointwise.of_two(upper, lower, (1, 1)), x, sign)
    choice = sign >= 0
    exact = torch.where(choice, F.conv2d(x.double(), upper.double()), F.conv2d(x.double(), lower.double()))
    direct = torch.where(choice, F.conv2d(x, upper), F.conv2d(x, lower))
    assert_as_exact(found, direct, exact, magnitudes_of(x, upper.abs().maximum(lower.abs())))


@pytest.mark.parametrize("kind", KINDS)
def test_however_the_input_lies_in_memory(kind: str) -> None:
    layer, of, weight = layers_of(kind)
    wide = draw(3, 40, 9, 12, seed=3)
    flat = torch.empty(3 * 32 * 63 + 1)[1:].view(3, 7, 9, 32).permute(0, 3, 1, 2)  # four bytes off every boundary
    for x in (wide[:, 4:36, 1:8, 2:11], wide[:, 4:36, 1:8, 2:11].contiguous(), flat.copy_(wide[:, :32, :7, :9])):
        expected = of(x, weight)
        torch.testing.assert_close(products.convolution(layer, x, None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_set_and_number_of_threads(kind: str) -> None:
    layer, of, weight = layers_of(kind)
    x = images(2, 32, 7, 9)
    exact, magnitudes = of(x.double(), weight.double()), of(x.double().abs(), weight.double().abs())
    extension = native.extension
    assert extension is not None
    threads = torch.get_num_threads()
    try:
        for name in ("default", "avx2", "avx512", "avx512_bf16"):
            assert extension.limit_cpu_capability(name)
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(products.convolution(layer, x, None))
            assert all(torch.equal(results[0], r) for r in results[1:])
            assert_as_exact(results[0], of(x, weight), exact, magnitudes)
    finally:
        torch.set_num_threads(threads)
        extension.limit_cpu_capability(None)
