"""Convolutions and dense layers in Triton with the step that follows them, against float64, over sizes, strides, groups, dtypes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrpfast.ops import reference
from lrpfast.ops.transposes import flipped_weight, portable_conv_dgrad
from tests.triton_kernels import DEVICE, DTYPES, draw, error, kernels, needs_triton, poisoned_memory  # noqa: F401
from tests.triton_kernels import assert_as_exact_as_torch as close

pytestmark = needs_triton
EPS = 1e-2


class Layer(NamedTuple):
    """Sizes and windows of a convolution."""

    batch: int
    channels: int
    outs: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def windows(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


LAYERS = {
    "one by one": Layer(2, 5, 7, (5, 6)),
    "many channels": Layer(1, 70, 65, (4, 3)),
    "strided one by one": Layer(2, 40, 12, (5, 7), stride=(2, 2)),
    "three by three": Layer(2, 6, 8, (7, 5), (3, 3), padding=(1, 1)),
    "uneven": Layer(1, 3, 5, (11, 9), (3, 2), (2, 1), (1, 0), (1, 2)),
    "groups": Layer(2, 12, 18, (6, 5), (3, 3), padding=(1, 1), groups=3),
    "depthwise": Layer(2, 20, 20, (9, 7), (3, 3), (2, 2), (1, 1), groups=20),
    "depthwise, dilated": Layer(1, 70, 70, (9, 7), (3, 3), (1, 1), (2, 2), (2, 2), groups=70),
    "no sample": Layer(0, 6, 8, (7, 5), (3, 3)),
    "one pixel": Layer(1, 33, 1, (1, 1)),
}


def operands(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Input, which is not negative, weight and bias."""
    x = draw((layer.batch, layer.channels, *layer.size), 1, dtype).relu()
    weight = draw((layer.outs, layer.channels // layer.groups, *layer.kernel), 2, dtype)
    return x, weight, draw((layer.outs,), 3, dtype)


def steps(name: str, z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """What each epilogue is to do, in the operands' dtype."""
    if name == "relu":
        return z.relu()
    if name == "add_relu":
        return (z + first).relu()
    if name == "ratio":
        return reference.ratio(first, second, z, EPS)
    if name == "zero_ratio":
        return reference.ratio(first, second, z, 0.0)
    if name == "message_ratio":
        return reference.ratio(first, z, second, EPS)
    return z * first if name == "relevance" else z


EPILOGUES = {
    "plain": 0, "relu": 0, "add_relu": 1, "ratio": 2, "zero_ratio": 2, "message_ratio": 2, "relevance": 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("layer", "epilogue"),
    [(layer, "plain") for layer in LAYERS]
    + [(layer, name) for layer in ("many channels", "uneven", "depthwise") for name in EPILOGUES if name != "plain"],
)
def test_convolution(layer: str, epilogue: str, dtype: torch.dtype) -> None:
    own = LAYERS[layer]
    x, weight, bias = operands(own, dtype)
    exact_z = F.conv2d(x.double(), weight.double(), bias.double(), *own.windows)
    peer_z = F.conv2d(x, weight, bias, *own.windows)
    shape = tuple(exact_z.shape)
    first, second = draw(shape, 4, dtype).relu(), draw(shape, 5, dtype)
    if epilogue in ("ratio", "zero_ratio"):  # a denominator near 0 tells of the product's rounding and of nothing else
        first = torch.where(exact_z.abs() > 0.5, first, 0).to(dtype)
    if epilogue == "message_ratio":
        second += second.sign()
    given = (first, second)[: EPILOGUES[epilogue]]
    found = kernels.convolution(x, weight, bias, *own.windows, epilogue, *given, eps=EPS)
    assert found.dtype == dtype and found.shape == shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    close(found, steps(epilogue, peer_z, first, second), steps(epilogue, exact_z, first.double(), second.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modify", ["positive", "favoured"])
@pytest.mark.parametrize("layer", [name for name in LAYERS if "depthwise" not in name])
def test_both_products_from_one_load(layer: str, modify: str, dtype: torch.dtype) -> None:
    own = LAYERS[layer]
    x, weight, bias = operands(own, dtype)

    def changed(t: Tensor) -> Tensor:
        return t.clamp(min=0) if modify == "positive" else t + 0.25 * t.clamp(min=0)

    found = kernels.convolution_pair(
        x, weight, bias, changed(bias), *own.windows, modify=modify, gamma=0.25, epilogue="relu"
    )
    for ours, w, b, relu in ((found[0], weight, bias, True), (found[1], changed(weight), changed(bias), False)):
        peer = F.conv2d(x, w, b, *own.windows)
        exact = F.conv2d(x.double(), w.double(), b.double(), *own.windows)
        close(ours, peer.relu() if relu else peer, exact.relu() if relu else exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("carrier", [True, False])
@pytest.mark.parametrize("layer", ["one by one", "one pixel", "no sample", "wide", "dense"])
def test_ratio_and_transpose_in_one_kernel(layer: str, carrier: bool, dtype: torch.dtype) -> None:
    sizes = {"wide": Layer(1, 120, 70, (3, 5)), "dense": Layer(3, 40, 33, (1, 1)), "no sample": Layer(0, 6, 8, (7, 5))}
    own = sizes.get(layer) or LAYERS[layer]
    x, weight, bias = operands(own, dtype)
    weight, bias = weight.clamp(min=0) + 0.01, bias.clamp(min=0)
    q = draw((own.batch, own.outs, *own.size), 5, dtype)
    y = q.relu() if carrier else None
    exact_z = F.conv2d(x.double(), weight.double(), bias.double())
    exact_s = reference.ratio(None if y is None else y.double(), q.double(), exact_z, EPS)
    exact = F.conv_transpose2d(exact_s, weight.double())
    peer = F.conv_transpose2d(reference.ratio(y, q, F.conv2d(x, weight, bias), EPS), weight)
    if layer == "dense":
        x, y, q, weight = (None if t is None else t.flatten(1) for t in (x, y, q, weight))
        exact, peer = exact.flatten(1), peer.flatten(1)
    close(kernels.ratio_dgrad(x, weight, bias, y, q, EPS), peer, exact)


def test_ratio_and_transpose_drop_zeros_of_rule_zero() -> None:
    x = torch.zeros((2, 3, 2, 2), device=DEVICE)
    x[0] = 1
    weight, message = torch.ones((5, 3, 1, 1), device=DEVICE), torch.ones((2, 5, 2, 2), device=DEVICE)
    found = kernels.ratio_dgrad(x, weight, None, None, message, 0.0)
    torch.testing.assert_close(found[0], torch.full_like(found[0], 5 / 3))
    assert not found[1].any()


def test_ratio_and_transpose_refuse_many_channels() -> None:
    with pytest.raises(ValueError, match="300 input channels are more than the 128"):
        kernels.ratio_dgrad(draw((2, 300), 0), draw((4, 300), 1), None, None, draw((2, 4), 2), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(3, 50, 33), (1, 129, 7), (0, 5, 4), (70, 8, 65)])
def test_dense_layers(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, channels, outs = sizes
    x, weight, bias = draw((batch, channels), 1, dtype), draw((outs, channels), 2, dtype), draw((outs,), 3, dtype)
    found = kernels.convolution(x, weight, bias)
    close(found, F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    s = draw((batch, outs), 4, dtype)
    close(kernels.dense_dgrad(s, weight), s @ weight, s.double() @ weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["one by one", "three by three", "groups", "depthwise, dilated"])
def test_transposes_of_stride_one_are_convolutions_with_flipped_weights(layer: str, dtype: torch.dtype) -> None:
    own = LAYERS[layer]
    _, weight, _ = operands(own, dtype)
    shape = tuple(F.conv2d(*operands(own, dtype), *own.windows).shape)
    s = draw(shape, 6, dtype)
    arguments = (list(own.size), list(own.stride), list(own.padding), list(own.dilation), own.groups)
    inverse = [d * (k - 1) - p for d, k, p in zip(own.dilation, own.kernel, own.padding, strict=True)]
    found = kernels.convolution(
        s, flipped_weight(weight, own.groups), None, own.stride, inverse, own.dilation, own.groups
    )
    close(
        found, portable_conv_dgrad(s, weight, *arguments), portable_conv_dgrad(s.double(), weight.double(), *arguments)
    )


@pytest.mark.slow
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40)), size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), groups=st.integers(1, 3), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(max_examples=25)
def test_any_geometry(
    sizes: tuple[int, int, int], size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], groups: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    own = Layer(sizes[0], sizes[1] * groups, sizes[2] * groups, size, kernel, stride, padding, (1, 1), groups)
    x, weight, bias = operands(own, dtype)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *own.windows)
    close(kernels.convolution(x, weight, bias, *own.windows), F.conv2d(x, weight, bias, *own.windows), exact)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, weight, bias = operands(Layer(5, 20, 9, (6, 5), (3, 3), padding=(1, 1)), torch.float32)
    together = kernels.convolution(x, weight, bias, (1, 1), (1, 1))
    alone = [kernels.convolution(x[i : i + 1], weight, bias, (1, 1), (1, 1)) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_views_are_read_as_they_are() -> None:
    """Inputs that are not channels-last, expanded messages, transposed and strided weights."""
    x, weight, bias = operands(Layer(2, 12, 16, (6, 5)), torch.float32)
    wide = torch.cat([x, x], 1)[:, :12]
    message = draw((2, 16, 1, 1), 4).expand(2, 16, 6, 5)
    expected = kernels.convolution(x, weight, bias, epilogue="add_relu", first=message.contiguous())
    assert torch.equal(kernels.convolution(wide, weight, bias, epilogue="add_relu", first=message), expected)
    every_other = torch.stack([weight, weight], -1).flatten(3)[..., ::2]
    assert torch.equal(kernels.convolution(x, every_other, bias, epilogue="add_relu", first=message), expected)
    assert (
        error(kernels.convolution(expected, weight.transpose(0, 1), None), F.conv_transpose2d(expected, weight)) < 1e-6
    )


@pytest.mark.parametrize("capability", [80, 90])
def test_tilings_fit_the_gpu(capability: int) -> None:
    """Each worth timing holds its tiles in flight in shared memory, is as deep as the tensor cores want, and none comes twice."""
    from lrpfast.ops.triton import matrix

    for rows, outs, channels, size in ((25088, 256, 64, 2), (25088, 64, 3, 2), (8, 1000, 2048, 4), (3136, 512, 512, 4)):
        for epilogue, pair in (("plain", False), ("ratio", False), ("message_ratio", False), ("relu", True)):
            found = matrix.tilings(rows, outs, channels, size, capability, epilogue, pair)
            assert found and len(set(found)) == len(found)
            for tiling in found:
                in_flight = tiling.stages * (tiling.rows + tiling.columns) * tiling.depth * size
                assert in_flight <= (227 if capability == 90 else 163) * 1024
                assert tiling.depth >= 16 and tiling.rows >= 64
                assert tiling.rows <= 64 or rows > 64
    assert matrix.kept_tiling(256, 2, capability).depth == 256
