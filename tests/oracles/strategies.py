"""Random small networks, composites and inputs for property tests.

The structure is drawn by hypothesis, so that a failure shrinks to a small network; the numbers come from a seed. Every drawn
network is valid: a block that would leave no pixel or misses a divisor is replaced by a simpler one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from .network import Net
from .specs import ALPHA1_BETA0, ALPHA2_BETA1, EPSILON, FLAT, GAMMA, GRADIENT, WSQUARE, ZBOX, ZERO, ZPLUS, Spec

RULES = (
    EPSILON,
    ZPLUS,
    GAMMA,
    ALPHA2_BETA1,
    FLAT,
    ZERO,
    WSQUARE,
    ALPHA1_BETA0,
    ZBOX,
    GRADIENT,
    Spec("Epsilon", {"epsilon": 0.1}),
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "leaky_relu": lambda v: F.leaky_relu(v, 0.1),
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
}


@dataclass
class Drawn:
    """A network with rules and inputs; printed by hypothesis where a test fails."""

    net: Net
    rules: dict[str, Spec]
    x: Tensor
    story: list[str]

    def __repr__(self) -> str:
        rules = ", ".join(f"{name}: {rule}" for name, rule in self.rules.items())
        return f"input {tuple(self.x.shape)}; " + "; ".join(self.story) + f"; rules {rules}"


class Grower:
    """Grows a Net block by block; keeps the current node and its shape."""

    def __init__(self, draw: Callable, shape: tuple[int, ...]) -> None:
        self.draw, self.dims, self.shape = draw, len(shape) - 1, shape
        self.net = Net()
        self.at = self.net.input()
        self.story: list[str] = []
        self.count = 0

    def choose(self, *options: object) -> object:
        return self.draw(st.sampled_from(options))

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def extent(self, kernel: int, stride: int, padding: int, dilation: int) -> tuple[int, ...]:
        return tuple((s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in self.shape[1:])

    def activation(self, node: int) -> int:
        name = str(self.choose("relu", "relu", "relu", "none", *ACTIVATIONS))
        self.story.append(name)
        if name == "none":
            return node
        return self.net.relu(node) if name == "relu" else self.net.op("pass", ACTIVATIONS[name], node)

    def batch_norm(self, channels: int) -> nn.Module:
        norm = (nn.BatchNorm1d if self.dims == 1 else nn.BatchNorm2d)(channels)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.4, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        return norm.double().eval()

    def conv_layer(self, node: int, out: int, **options: object) -> int:
        cls = nn.Conv1d if self.dims == 1 else nn.Conv2d
        norm = self.batch_norm(out) if self.choose(False, True) else None
        layer = cls(self.shape[0], out, bias=bool(self.choose(True, False)), **options)
        name = self.name("conv")
        self.story.append(f"{name} {layer}{' + batch norm' if norm else ''}")
        return self.net.layer(name, layer, node, norm)

    def conv(self) -> None:
        groups = int(self.choose(*[g for g in (1, 2, 3) if self.shape[0] % g == 0]))
        kernel, stride, dilation, padding = (int(self.choose(*o)) for o in ((1, 2, 3), (1, 2), (1, 2), (0, 1, 2)))
        if min(self.extent(kernel, stride, padding, dilation)) < 1:
            kernel, stride, dilation, padding = 1, 1, 1, 0
        out = groups * int(self.choose(1, 2, 3))
        options = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
        node = self.conv_layer(self.at, out, **options)
        self.shape = (out, *self.extent(kernel, stride, padding, dilation))
        self.at = self.activation(node)

    def transposed(self) -> None:
        if max(self.shape[1:]) > 6:
            return self.conv()
        cls = nn.ConvTranspose1d if self.dims == 1 else nn.ConvTranspose2d
        out, stride, kernel = int(self.choose(1, 2, 3)), int(self.choose(1, 2)), int(self.choose(2, 3))
        extra = int(self.choose(0, 1)) if stride == 2 else 0
        layer = cls(self.shape[0], out, kernel, stride=stride, padding=1, output_padding=extra)
        size = tuple((s - 1) * stride - 2 + kernel + extra for s in self.shape[1:])
        if min(size) < 1:
            return self.conv()
        norm = self.batch_norm(out) if self.choose(False, True) else None
        name = self.name("up")
        self.story.append(f"{name} {layer}{' + batch norm' if norm else ''}")
        self.at = self.activation(self.net.layer(name, layer, self.at, norm))
        self.shape = (out, *size)
        return None

    def pool(self) -> None:
        kernel, stride, padding = int(self.choose(2, 3)), int(self.choose(1, 2)), int(self.choose(0, 1))
        if min(self.extent(kernel, stride, padding, 1)) < 1:
            return
        kind = str(self.choose("max_pool", "avg_pool"))
        function = getattr(F, f"{kind}{self.dims}d")
        self.story.append(f"{kind} {kernel} {stride} {padding}")
        self.at = self.net.op(
            "max_pool" if kind == "max_pool" else "norm", lambda v: function(v, kernel, stride, padding), self.at
        )
        self.shape = (self.shape[0], *self.extent(kernel, stride, padding, 1))

    def residual(self) -> None:
        self.story.append("residual(")
        start, channels = self.at, self.shape[0]
        node = self.activation(self.conv_layer(start, channels, kernel_size=3, padding=1))
        node = self.conv_layer(node, channels, kernel_size=3, padding=1)
        self.at = self.activation(self.net.add(node, start))
        self.story.append(")")

    def inception(self) -> None:
        self.story.append("cat(")
        a = self.activation(self.conv_layer(self.at, 1, kernel_size=1))
        b = self.activation(self.conv_layer(self.at, 2, kernel_size=3, padding=1))
        parts = [a, b, self.at] if self.choose(True, False) else [a, b]
        self.at = self.net.op("route", lambda *v: torch.cat(v, 1), *parts)
        self.shape = (3 + (self.shape[0] if len(parts) == 3 else 0), *self.shape[1:])
        self.story.append(")")

    def gate(self) -> None:
        axes = tuple(range(2, 2 + self.dims))
        pooled = self.net.op("norm", lambda v: v.mean(axes, keepdim=True), self.at)
        name = self.name("gate")
        layer = (nn.Conv1d if self.dims == 1 else nn.Conv2d)(self.shape[0], self.shape[0], 1)
        gate = self.net.op("pass", torch.sigmoid, self.net.layer(name, layer, pooled))
        self.story.append("squeeze and excitation")
        self.at = self.net.op("gate", lambda s, g: s * g, self.at, gate)

    def norm(self) -> None:
        name = self.name("norm")
        if self.net.nodes[self.at].kind in ("layer", "input") or self.choose(True, False):
            module = nn.GroupNorm(1, self.shape[0])
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            self.at = self.net.module("normaliser", name, module, self.at)
        else:  # after anything but a layer a batch norm stands free
            self.at = self.net.module("batch_norm", name, self.batch_norm(self.shape[0]), self.at)
        self.story.append(type(self.net.layers[name]).__name__)

    def route(self) -> None:
        channels = self.shape[0]
        routes: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
            "flip": (lambda v: v.flip(2), self.shape),
            "roll": (lambda v: torch.roll(v, 1, 2), self.shape),
            "pad": (lambda v: F.pad(v, (1, 0)), (*self.shape[:-1], self.shape[-1] + 1)),
            "half": (lambda v: v[:, : max(1, channels // 2)], (max(1, channels // 2), *self.shape[1:])),
            "swap": (lambda v: torch.cat(v.chunk(2, 1)[::-1], 1), self.shape),
        }
        name = str(self.choose(*routes))
        function, self.shape = routes[name]
        self.story.append(name)
        self.at = self.net.op("route", function, self.at)

    def scale(self) -> None:
        self.story.append("* -1.5")
        self.at = self.net.op("pass", lambda v: v * -1.5, self.at)

    def up(self) -> None:
        if max(self.shape[1:]) > 5:
            return
        self.story.append("interpolate")
        self.at = self.net.op("norm", lambda v: F.interpolate(v, scale_factor=2), self.at)
        self.shape = (self.shape[0], *(2 * s for s in self.shape[1:]))

    def head(self) -> None:
        self.at = self.net.op("route", lambda v: v.flatten(1), self.at)
        features = 1
        for size in self.shape:
            features *= size
        if self.choose(True, False):
            self.story.append("hidden dense layer")
            self.at = self.activation(self.net.layer("hidden", nn.Linear(features, 6), self.at))
            features = 6
        self.at = self.net.layer("head", nn.Linear(features, 4), self.at)


BLOCKS = ("conv", "conv", "residual", "pool", "inception", "transposed", "gate", "norm", "route", "scale", "up")


@st.composite
def networks(draw: Callable) -> Drawn:
    """Draw a network of up to five blocks and a head of four classes, a rule for each of its layers, and a batch of 1 to 4."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from((1, 2)))
    size = tuple(draw(st.integers(4, 7)) for _ in range(dims))
    shape = (draw(st.integers(1, 3)), *size)
    grower = Grower(draw, shape)
    for block in draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)):
        getattr(grower, block)()
    grower.head()
    net = grower.net.double().eval()
    rules = {node.name: draw(st.sampled_from(RULES)) for node in net.nodes if node.kind == "layer"}
    x = torch.randn(draw(st.integers(1, 4)), *shape, dtype=torch.float64).clamp(-2.5, 2.5)
    return Drawn(net, rules, x, grower.story)
