"""Activations, multiplications by constants, gates and products (RULES.md section 3), in both message forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.agree import TOPS, Parallel
from tests.oracles.network import Net

SHAPE = (2, 4, 5)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu-inplace": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu-inplace": lambda: nn.LeakyReLU(0.1, inplace=True),
    "elu": lambda: nn.ELU(1.5),
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "silu-inplace": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardswish-inplace": lambda: nn.Hardswish(inplace=True),
    "prelu": nn.PReLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_passes(name: str):
    """Signed input, a layer below, a layer above, and the zeros of the activation's input kept exact."""

    def build(net: Net, h: int, prefix: str) -> int:
        h = net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
        return net.module("pass", f"{prefix}act", ACTIVATIONS[name](), h)

    branches = Parallel()
    for top in TOPS:
        branches.add(name, SHAPE, build, top)
    x = torch.tensor([-3.0, -1.0, -1e-3, 0.0, 0.0, 1e-3, 0.5, 7.0], dtype=torch.float64).repeat(2, 1)

    def alone(net: Net, h: int, prefix: str) -> int:
        h = net.op("route", torch.clone, h)  # an in-place activation must not change the model's own input
        return net.module("pass", f"{prefix}act", ACTIVATIONS[name](), h)

    for top in TOPS:
        branches.add(f"{name} alone", x, alone, top)
    branches.check()


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "hardsigmoid"])
def test_activation_that_misses_the_origin_passes(name: str):
    def build(net: Net, h: int, prefix: str) -> int:
        h = net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
        return net.op("pass", getattr(F, name), h)

    branches = Parallel()
    for top in TOPS:
        branches.add(name, SHAPE, build, top)
    branches.check()


PARAMETER = nn.Parameter(torch.randn(2, 1, 1, dtype=torch.float64))
SIGNED = torch.randn(4, 5, dtype=torch.float64)

CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda v: v * 2.5,
    "number-first": lambda v: -0.5 * v,
    "negated": lambda v: -v,
    "divided": lambda v: v / 3.0,
    "tensor": lambda v: v * SIGNED,
    "tensor-first": lambda v: SIGNED * v,
    "divided by tensor": lambda v: v / (SIGNED.abs() + 1),
    "channel parameter": lambda v: v * PARAMETER,
    "in place": lambda v: v.clone().mul_(2.0),
    "torch.mul": lambda v: torch.mul(v, torch.tensor(0.25, dtype=torch.float64)),
    "zero": lambda v: v * torch.tensor([0.0, 2.0], dtype=torch.float64).view(2, 1, 1),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_multiplication_by_a_constant_passes(name: str):
    def build(net: Net, h: int, prefix: str) -> int:
        return net.op("pass", CONSTANTS[name], net.layer(f"{prefix}a", nn.Conv2d(2, 2, 3, padding=1), h))

    branches = Parallel()
    for top in TOPS:
        branches.add(name, SHAPE, build, top)
    branches.check()


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda v: torch.softmax(v, 1),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("gate_first", [False, True], ids=["signal-gate", "gate-signal"])
def test_gate_receives_nothing(name: str, gate_first: bool):
    """Squeeze and excitation, a gate of the signal's shape, and a gate from another input path."""

    def squeeze(net: Net, h: int, prefix: str) -> int:
        signal = net.relu(net.layer(f"{prefix}a", nn.Conv2d(2, 4, 3, padding=1), h))
        pooled = net.op("norm", lambda v: F.adaptive_avg_pool2d(v, 1), signal)
        hidden = net.relu(net.layer(f"{prefix}down", nn.Conv2d(4, 2, 1), pooled))
        gate = net.op("pass", GATES[name], net.layer(f"{prefix}up", nn.Conv2d(2, 4, 1), hidden))
        return product(net, signal, gate)

    def elementwise(net: Net, h: int, prefix: str) -> int:
        signal = net.layer(f"{prefix}a", nn.Conv2d(2, 4, 3, padding=1), h)
        gate = net.op("pass", GATES[name], net.layer(f"{prefix}b", nn.Conv2d(2, 4, 3, padding=1), h))
        return product(net, signal, gate)

    def product(net: Net, signal: int, gate: int) -> int:
        return net.op("gate", (lambda s, g: g * s) if gate_first else (lambda s, g: s * g), signal, gate)

    branches = Parallel()
    for top in TOPS:
        branches.add("squeeze and excitation", SHAPE, squeeze, top)
        branches.add("elementwise", SHAPE, elementwise, top)
    branches.check()


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {  # gates of a pre-activation [N, 4, 4, 5], for a signal of that shape
    "nearest": lambda v: F.interpolate(v[..., ::2, :1].sigmoid(), size=(4, 5)),
    "bilinear": lambda v: F.interpolate(v[..., :2, :2].sigmoid(), size=(4, 5), mode="bilinear"),
    "chunks joined": lambda v: torch.cat(v.sigmoid().chunk(2, 1), 1),
    "index": lambda v: v.sigmoid()[:, [0, 1, 2, 3]],
    "index_select": lambda v: v.sigmoid().index_select(1, torch.tensor([3, 0, 0, 2])),
    "flip": lambda v: v.sigmoid().flip(3),
    "roll": lambda v: torch.roll(F.hardsigmoid(v), 1, 2),
    "repeat": lambda v: v[:, :, :1].sigmoid().repeat(1, 1, 4, 1),
    "repeat_interleave": lambda v: v[:, :2].sigmoid().repeat_interleave(2, 1),
    "pad": lambda v: F.pad(v[..., 1:-1].sigmoid(), (1, 1)),
    "where": lambda v: torch.where(v > 0.5, v.sigmoid(), 0.0),
    "masked_fill": lambda v: v.sigmoid().masked_fill(v < -0.5, 0.0),
    "mean": lambda v: v.sigmoid().mean(1, keepdim=True),
    "max": lambda v: F.max_pool2d(v.sigmoid(), 3, 1, 1),
    "rest to 1": lambda v: 1 - v.sigmoid(),
    "two gates": lambda v: v.sigmoid() * v.mean(1, keepdim=True).sigmoid(),
    "relu6": lambda v: F.relu6(v + 3) / 6,
    "hardtanh": lambda v: (1 + F.hardtanh(v)) / 2,
    "clamp": lambda v: torch.clamp(v / 6 + 0.5, 0, 1),
    "clamp of a quotient": lambda v: ((v + 3.0) / 6.0).clamp(min=0.0, max=1.0),
    "times a constant": lambda v: 2.0 * v.sigmoid(),
    "times a constant, by hand": lambda v: F.relu6(v + 3),
}


@pytest.mark.slow
def test_gate_is_one_however_it_is_written():
    """What moves its values, or averages them, or takes them from 1, makes no signal of a gate (RULES.md section 3)."""
    branches = Parallel()
    for k, (name, gate) in enumerate(WRITTEN.items()):

        def build(net: Net, h: int, prefix: str, gate: Callable[[Tensor], Tensor] = gate) -> int:
            signal, inner = (net.layer(f"{prefix}{part}", nn.Conv2d(2, 4, 3, padding=1), h) for part in "ab")
            return net.op("gate", lambda s, v: s * gate(v), signal, inner)

        branches.add(name, SHAPE, build, TOPS[k % 2])
    branches.check()


def gated_part(join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Net, int], int]:
    return lambda net, h: net.op("route", join, h, net.op("pass", torch.sigmoid, h))


SIGNALS: dict[str, Callable[[Net, int], int]] = {
    "relu6": lambda net, h: net.op("pass", F.relu6, h),
    "clamp": lambda net, h: net.op("pass", lambda v: v.clamp(0, 1), h),
    "tanh": lambda net, h: net.op("pass", torch.tanh, h),
    "joined with a gate": gated_part(lambda v, g: torch.cat((v[:, :2], g[:, 2:]), 1)),
    "chosen or a gate": gated_part(lambda v, g: torch.where(v > 0.1, v, g)),
}


def test_signal_that_resembles_a_gate_takes_its_half():
    branches = Parallel()
    for name, signal in SIGNALS.items():

        def build(net: Net, h: int, prefix: str, signal: Callable[[Net, int], int] = signal) -> int:
            a, b = (net.layer(f"{prefix}{part}", nn.Conv2d(2, 4, 3, padding=1), h) for part in "ab")
            return net.op("product", torch.mul, a, signal(net, b))

        for top in TOPS:
            branches.add(name, SHAPE, build, top)
    branches.check()


def test_quotient_of_two_signals_holds_the_divisor_constant():
    """As in a norm: `x / n(x)` gets the ε rule of `x / constant`, R_x = y R / S(y). torch writes softsign in this way."""

    def divided(net: Net, h: int, prefix: str) -> int:
        h = net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
        length = net.op("route", lambda v: v.square().sum(1, keepdim=True).sqrt() + 0.1, h)
        return net.op("quotient", torch.div, h, length)

    branches = Parallel()
    for top in TOPS:
        branches.add("divided by its length", SHAPE, divided, top)
    branches.check()


def test_silu_written_as_a_product_passes():
    branches = Parallel()
    for top in TOPS:
        branches.add(
            "x * sigmoid(x)",
            SHAPE,
            lambda net, h, p: net.op("gate", lambda s, g: s * g, h, net.op("pass", torch.sigmoid, h)),
            top,
        )
    branches.check()


def test_product_of_two_signals_gives_half_to_each():
    def two_layers(net: Net, h: int, prefix: str) -> int:
        a = net.layer(f"{prefix}a", nn.Conv2d(2, 3, 3, padding=1), h)
        b = net.relu(net.layer(f"{prefix}b", nn.Conv2d(2, 3, 3), h))
        b = net.op("route", lambda v: F.pad(v, (1, 1, 1, 1)), b)
        return net.op("product", torch.mul, a, b)

    def square(net: Net, h: int, prefix: str) -> int:
        return net.op("product", torch.mul, h, h)

    def broadcast(net: Net, h: int, prefix: str) -> int:
        pooled = net.op("norm", lambda v: v.mean((2, 3), keepdim=True), h)
        return net.op("product", torch.mul, net.layer(f"{prefix}a", nn.Conv2d(2, 2, 1), h), pooled)

    branches = Parallel()
    for top in TOPS:
        branches.add("two layers", SHAPE, two_layers, top)
        branches.add("x * x", SHAPE, square, top)
        branches.add("broadcast", SHAPE, broadcast, top)
    branches.check()


def test_matrix_product_of_two_activations_gives_half_to_each():
    def bilinear(net: Net, h: int, prefix: str) -> int:
        a = net.op("route", lambda v: v.flatten(2), net.layer(f"{prefix}a", nn.Conv2d(2, 3, 1), h))
        b = net.op(
            "route", lambda v: v.flatten(2).transpose(1, 2), net.relu(net.layer(f"{prefix}b", nn.Conv2d(2, 3, 1), h))
        )
        return net.op("matmul", torch.matmul, a, b)

    branches = Parallel()
    for top in TOPS:
        branches.add("bilinear pooling", SHAPE, bilinear, top)
    branches.check()
