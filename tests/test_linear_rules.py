"""Sums and pools: the Norm rule and max pooling (RULES.md section 3), in both message forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfast
from tests.oracles.agree import TOPS, Parallel
from tests.oracles.network import Net, distance, vjp

SHAPE = (2, 5, 7)
CONSTANT = torch.randn(2, 1, 1, dtype=torch.float64)


def conv(prefix: str, net: Net, h: int, name: str, out: int = 2) -> int:
    return net.layer(f"{prefix}{name}", nn.Conv2d(2, out, 3, padding=1), h)


def two_branches(add: Callable[..., Tensor]) -> Callable[[Net, int, str], int]:
    def build(net: Net, h: int, prefix: str) -> int:
        return net.op("sum", add, conv(prefix, net, h, "a"), net.relu(conv(prefix, net, h, "b")))

    return build


def out_of_one(add: Callable[..., Tensor]) -> Callable[[Net, int, str], int]:
    return lambda net, h, prefix: net.op("sum", add, conv(prefix, net, h, "a"))


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a += b
    return a


def residual(net: Net, h: int, prefix: str) -> int:
    first = net.relu(conv(prefix, net, h, "stem"))
    inner = conv(prefix, net, net.relu(conv(prefix, net, first, "a")), "b")
    return net.relu(net.add(inner, first))


def residual_twice(net: Net, h: int, prefix: str) -> int:
    return residual(net, residual(net, h, f"{prefix}x"), f"{prefix}y")


def three_way(net: Net, h: int, prefix: str) -> int:
    a, b, c = (conv(prefix, net, h, name) for name in "abc")
    return net.add(net.add(a, b), c)


def unequal(net: Net, h: int, prefix: str) -> int:
    """Two signals of which one is broadcast: its relevance is summed over where it went."""
    pooled = net.op("norm", lambda v: v.mean((2, 3), keepdim=True), conv(prefix, net, h, "a"))
    return net.add(conv(prefix, net, h, "b"), pooled)


SUMS: dict[str, Callable[[Net, int, str], int]] = {
    "a + b": two_branches(torch.add),
    "a - b": two_branches(torch.sub),
    "a += b": two_branches(in_place),
    "alpha": two_branches(lambda a, b: torch.add(a, b, alpha=2.0)),
    "stack and sum": two_branches(lambda a, b: torch.stack((a, b)).sum(0)),
    "x + x": lambda net, h, prefix: (lambda a: net.add(a, a))(conv(prefix, net, h, "a")),
    "x + x of the input": lambda net, h, prefix: net.add(h, h),
    "number": out_of_one(lambda v: v + 0.7),
    "number in front": out_of_one(lambda v: 1.5 - v),
    "constant a channel": out_of_one(lambda v: v + CONSTANT),
    "constant subtracted": out_of_one(lambda v: v - CONSTANT),
    "residual": residual,
    "two residual blocks": residual_twice,
    "three-way": three_way,
    "broadcast signal": unequal,
}


@pytest.mark.parametrize("name", SUMS)
def test_sum_shares_in_proportion(name: str):
    branches = Parallel()
    for top in TOPS:
        branches.add(name, SHAPE, SUMS[name], top)
    branches.check()


def test_exact_zeros_of_a_sum():
    """a - a is exactly zero: S(0) = +ε, and what a free seed puts there is shared by it."""
    x = torch.tensor([[1.0, -2.0, 0.0, 0.5], [0.0, 0.0, 3.0, -1.0]], dtype=torch.float64)
    branches = Parallel()
    for top in TOPS:
        branches.add("a + (-a)", x, lambda net, h, prefix: net.add(h, net.op("pass", torch.neg, h)), top)
        branches.add("relu zeros", x, lambda net, h, prefix: net.add(net.relu(h), net.relu(h)), top)
    branches.check()


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda v: F.avg_pool2d(v, 2),
    "avg-overlap": lambda v: F.avg_pool2d(v, 3, stride=2, padding=1),
    "avg-exclude-pad": lambda v: F.avg_pool2d(v, 3, stride=2, padding=1, count_include_pad=False),
    "avg-ceil": lambda v: F.avg_pool2d(v, 2, ceil_mode=True),
    "avg-ceil-pad": lambda v: F.avg_pool2d(
        v, (3, 2), stride=(2, 2), padding=(1, 0), ceil_mode=True, count_include_pad=False
    ),
    "avg-ceil-include-pad": lambda v: F.avg_pool2d(v, 3, stride=2, padding=1, ceil_mode=True),
    "avg-divisor": lambda v: F.avg_pool2d(v, 2, divisor_override=3),
    "avg-1d": lambda v: F.avg_pool1d(v.flatten(2), 3, stride=2, padding=1),
    "avg-3d": lambda v: F.avg_pool3d(v[:, None], 2, padding=1),
    "adaptive-one": lambda v: F.adaptive_avg_pool2d(v, 1),
    "adaptive-uneven": lambda v: F.adaptive_avg_pool2d(v, (2, 3)),
    "adaptive-larger": lambda v: F.adaptive_avg_pool2d(v, (7, 9)),
    "adaptive-1d": lambda v: F.adaptive_avg_pool1d(v.flatten(2), 4),
    "mean": lambda v: v.mean((2, 3)),
    "mean-keepdim": lambda v: v.mean((-2, -1), keepdim=True),
    "mean-channels": lambda v: v.mean(1),
    "sum-dims": lambda v: v.sum((2, 3)),
    "nearest": lambda v: F.interpolate(v, scale_factor=2, mode="nearest"),
    "nearest-down": lambda v: F.interpolate(v, size=(3, 4), mode="nearest"),
    "bilinear": lambda v: F.interpolate(v, size=(8, 9), mode="bilinear", align_corners=False),
    "bilinear-corners": lambda v: F.interpolate(v, size=(8, 5), mode="bilinear", align_corners=True),
    "bicubic": lambda v: F.interpolate(v, size=(7, 4), mode="bicubic", align_corners=False),
    "area": lambda v: F.interpolate(v, size=(3, 4), mode="area"),
    "nearest-exact": lambda v: F.interpolate(v, size=(8, 5), mode="nearest-exact"),
    "trilinear": lambda v: F.interpolate(v[:, None], size=(3, 4, 5), mode="trilinear"),
    "linear-1d": lambda v: F.interpolate(v.flatten(2), size=20, mode="linear"),
}


@pytest.mark.parametrize("name", POOLS)
def test_linear_pool_shares_in_proportion(name: str):
    def signed(net: Net, h: int, prefix: str) -> int:
        return net.op("norm", POOLS[name], conv(prefix, net, h, "a"))

    def behind_relu(net: Net, h: int, prefix: str) -> int:
        return net.op("norm", POOLS[name], net.relu(conv(prefix, net, h, "a")))

    branches = Parallel()
    branches.add(f"{name} signed", SHAPE, signed, TOPS[0])
    for top in TOPS:
        branches.add(f"{name} behind a relu", SHAPE, behind_relu, top)
    branches.check()


MAX_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda v: F.max_pool2d(v, 2),
    "max-overlap": lambda v: F.max_pool2d(v, 3, stride=2, padding=1),
    "max-stride-one": lambda v: F.max_pool2d(v, 3, stride=1, padding=1),
    "max-dilation": lambda v: F.max_pool2d(v, (2, 3), stride=1, dilation=(2, 2), padding=(1, 1)),
    "max-ceil": lambda v: F.max_pool2d(v, 2, ceil_mode=True),
    "max-1d": lambda v: F.max_pool1d(v.flatten(2), 3, stride=2, padding=1),
    "max-3d": lambda v: F.max_pool3d(v[:, None], 2),
    "adaptive": lambda v: F.adaptive_max_pool2d(v, (2, 3)),
    "adaptive-1d": lambda v: F.adaptive_max_pool1d(v.flatten(2), 4),
}


@pytest.mark.parametrize("name", MAX_POOLS)
def test_winner_takes_all(name: str):
    def signed(net: Net, h: int, prefix: str) -> int:
        return net.op("max_pool", MAX_POOLS[name], conv(prefix, net, h, "a"))

    def ties(net: Net, h: int, prefix: str) -> int:
        return net.op("max_pool", MAX_POOLS[name], net.relu(conv(prefix, net, net.relu(h), "a")))

    branches = Parallel()
    branches.add(f"{name} signed", SHAPE, signed, TOPS[1])
    for top in TOPS:
        branches.add(f"{name} with ties at zero", SHAPE, ties, top)
    branches.check()


def first_maximum(
    x: Tensor, r: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Max pooling's relevance by loops over windows: all to the greatest, of equal ones to the first in row order."""
    found = torch.zeros_like(x)
    for n, c, i, j in itertools.product(*map(range, r.shape)):
        best, winner = float("-inf"), None
        for di, dj in itertools.product(range(kernel[0]), range(kernel[1])):
            row, column = i * stride[0] - padding[0] + di * dilation[0], j * stride[1] - padding[1] + dj * dilation[1]
            inside = 0 <= row < x.shape[2] and 0 <= column < x.shape[3]
            if inside and (winner is None or float(x[n, c, row, column]) > best):
                best, winner = float(x[n, c, row, column]), (row, column)
        assert winner is not None
        found[n, c, winner[0], winner[1]] += r[n, c, i, j]
    return found


@pytest.mark.parametrize(
    "window",
    [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1)), ((2, 3), (1, 2), (1, 1), (2, 1))],
    ids=["plain", "overlapping", "dilated"],
)
def test_ties_go_to_the_first_index(window: tuple[tuple[int, int], ...]):
    kernel, stride, padding, dilation = window
    pool = nn.MaxPool2d(kernel, stride, padding, dilation)
    x = torch.randint(-1, 2, (2, 2, 6, 7)).double()  # nearly every window has a tie
    r = torch.randn_like(pool(x))
    expected = first_maximum(x, r, kernel, stride, padding, dilation)
    found = lrpfast.Explainer(nn.Sequential(pool), x, composite=lrpfast.Composite())(x, target=r)
    assert distance(found.relevance, expected) <= 1e-12
    # the network oracle takes torch's own gradient for this, so the loops above check that too
    assert distance(vjp(pool, [x], r)[0], expected) <= 1e-12


def test_signed_padding_of_a_max_pool_is_never_the_winner():
    pool, x = nn.MaxPool2d(3, 2, 1), -1 - torch.rand(1, 1, 4, 4, dtype=torch.float64)
    r = torch.randn_like(pool(x))
    found = lrpfast.Explainer(nn.Sequential(pool), x, composite=lrpfast.Composite())(x, target=r)
    assert torch.allclose(found.relevance.sum(), r.sum(), rtol=1e-12)
    assert distance(found.relevance, first_maximum(x, r, (3, 3), (2, 2), (1, 1), (1, 1))) <= 1e-12
