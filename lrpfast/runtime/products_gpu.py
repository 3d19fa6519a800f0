"""Products: convolutions, dense layers and their transposes in the one form that the GPU's kernels take, and the ways to compute one.

A product with the step that follows it can be computed by torch (cuDNN, cuBLAS) and one elementwise kernel, or by one kernel of our own
in some tiling. Which is fastest is measured where there is a tuner; a way whose result is not as exact as torch's own is never taken.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from lrpfast.graph import Constants, is_tensor, operation_name, rank, static_sizes, value
from lrpfast.ops import cuda
from lrpfast.ops.transposes import TRANSPOSES, fits_plain_convolution, flipped_weight
from lrpfast.runtime.step import Step
from lrpfast.runtime.tune import Tuner

aten = torch.ops.aten
_log = logging.getLogger(__name__)

TORCH = "torch"  # the name of torch's own way


@dataclasses.dataclass(frozen=True)
class Product:
    """What a node computes: ``x`` times a weight, plus a bias.

    Attributes
    ----------
    windows
        Stride, padding, dilation, groups.
    arrangement
        How the weight is to lie: "given"; "transposed", its two channel dimensions exchanged; "flipped", its taps as well.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    windows: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]
    arrangement: str = "given"

    @property
    def is_pointwise(self) -> bool:
        taps = math.prod(int(n) for n in value(self.weight).shape[2:])
        return taps == 1 and self.windows == ((1, 1), (0, 0), (1, 1), 1)

    @property
    def sizes(self) -> tuple[int, int]:
        """Input and output channels."""
        return int(value(self.x).shape[1]), int(value(self.node).shape[1])


_DENSE = ((1, 1), (0, 0), (1, 1), 1)


def product_of(node: fx.Node, kernels: ModuleType) -> Product | None:
    """The product that a node is; None where it is none, or none that the kernels take."""
    name = operation_name(node) if node.op == "call_function" else ""
    if name not in ("convolution", "linear", "conv_dgrad", "matmul") or not is_tensor(node):
        return None
    x, weight = node.args[:2]
    if weight.op != "get_attr" or not kernels.takes(value(x)) or value(x).dtype != value(weight).dtype:
        return None
    if name in ("linear", "matmul"):
        if rank(node) != 2 or rank(weight) != 2:
            return None
        bias = node.args[2] if name == "linear" and len(node.args) > 2 else None
        return Product(node, x, weight, bias, _DENSE, "given" if name == "linear" else "transposed")
    if rank(node) != 4:
        return None
    if name == "convolution":
        _, _, bias, stride, padding, dilation, transposed, _, groups = node.args
        windows = (tuple(stride), tuple(padding), tuple(dilation), groups)
        return None if transposed else Product(node, x, weight, bias, windows)
    _, _, _, stride, padding, dilation, groups = node.args
    if not fits_plain_convolution(value(weight).shape, stride, padding, dilation, groups):
        return None
    kernel = [int(n) for n in value(weight).shape[2:]]
    inverse = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
    return Product(node, x, weight, None, ((1, 1), inverse, tuple(dilation), groups), "flipped")


@dataclasses.dataclass(frozen=True)
class Fused:
    """A product and the step that follows it; `anchor` is the node whose value comes out."""

    product: Product
    epilogue: str
    anchor: fx.Node
    first: fx.Node | None = None
    second: fx.Node | None = None
    eps: float = 0.0


class Products:
    """Makes the steps of one program's products.

    Parameters
    ----------
    constants
        The program's.
    kernels
        `lrpfast.ops.triton`.
    batch
        The batch that ways are timed for; any other runs as well.
    tuner
        Where given, ways are chosen by timing.

    Attributes
    ----------
    tuned
        The steps that were chosen by timing, and under which key of the tuner.
    """

    def __init__(self, constants: Constants, kernels: ModuleType, batch: int, tuner: Tuner | None) -> None:
        self._constants = constants
        self._kernels = kernels
        self._batch = batch
        self._tuner = tuner
        self._prepared: dict[tuple[str, str], Tensor] = {}
        self.tuned: dict[fx.Node, str] = {}

    # --- weights ---

    def weight(self, product: Product) -> Tensor:
        """A product's weight as our kernels read it; made once."""
        key = (product.weight.target, product.arrangement)
        if key not in self._prepared:
            with torch.no_grad():
                given = self._constants[product.weight.target]
                self._prepared[key] = _arranged(given, product.arrangement, product.windows[3])
        return self._prepared[key]

    def modification(self, weight: fx.Node, other: fx.Node) -> tuple[str, float] | None:
        """How `other` is made of `weight`, as our kernels can on chip, with its parameter."""
        scaled = self._constants.scaled(other.target) if weight.op == other.op == "get_attr" else None
        if scaled is None or scaled[0] != weight.target:
            return None
        positive, rest = scaled[1]
        if (positive, rest) == (1.0, 0.0):
            return "positive", 0.0
        return ("favoured", positive - 1) if rest == 1.0 else None

    # --- steps ---

    def step(self, fused: Fused) -> Step:
        """The step that computes a product and what follows, in the way that is fastest here."""
        ways = self._ways(fused)
        key = self._key(fused.anchor, [fused.product.node, fused.first, fused.second], fused.epilogue)
        operands = [fused.product.x, fused.first, fused.second]
        return self._fastest(key, ways, operands, self._usual(fused, ways))

    def kept_step(self, layer: Fused, transpose: Product) -> Step:
        """``Wᵀs`` with the ratio of `layer` as ``s``: in one kernel, or in two."""
        kernels, product = self._kernels, layer.product
        weight, bias = self.weight(dataclasses.replace(product, arrangement="given")), product.bias
        both = (weight, self.weight(transpose))
        node = transpose.node
        operands = (product.x, bias, layer.first, layer.second)
        computes = (product.node, node)
        args = (*both, *operands, layer.eps)
        ways = {
            TORCH: Step(node, _in_two(_torch_pair), args, note="torch, in three", computes=computes),
            "two kernels": Step(node, _in_two(kernels.convolution), args, note="in two kernels", computes=computes),
            "one kernel": Step(
                node, kernels.ratio_dgrad, (product.x, weight, bias, layer.first, layer.second, layer.eps),
                note="with its layer and ratio", computes=computes,
            ),
        }  # fmt: skip
        if static_channels(product.x) > kernels.largest_kept(value(product.x).dtype):
            del ways["one kernel"]
        if self.is_single(product):
            run = _one_read(ways["two kernels"].function, both[1])
            ways["one read"] = Step(
                node, run, (product.x, weight, bias, layer.first, layer.second, layer.eps), note="in one read", computes=computes
            )  # fmt: skip
        key = self._key(node, [product.node, layer.first, layer.second], "ratio_dgrad")
        return self._fastest(
            key, ways, [product.x, layer.first, layer.second], "one kernel" if "one kernel" in ways else TORCH
        )

    def is_single(self, product: Product) -> bool:
        """Whether a product is a dense layer of one sample that the CUDA kernels take."""
        weight = self._constants[product.weight.target]
        return self._batch == 1 and weight.dim() == 2 and cuda.takes_dense(weight[:1], weight)

    def pair_step(self, fused: Fused, other: Product, modification: tuple[str, float]) -> Step:
        """A layer and the same layer with its modified weight, from one load of both factors."""
        modify, gamma = modification
        product = fused.product
        return Step(
            fused.anchor, self._kernels.convolution_pair,
            (product.x, self.weight(product), product.bias, other.bias, *product.windows, modify, gamma, fused.epilogue),
            note="with its modified weight's", also=(other.node,), computes=(product.node, other.node),
        )  # fmt: skip

    def _ways(self, fused: Fused) -> dict[str, Step]:
        product, kernels = fused.product, self._kernels
        shown = _SHOWN[fused.epilogue]
        function, args = self._torchs(product)
        rest = (fused.first, fused.second, fused.eps)
        ways = {
            TORCH: Step(
                fused.anchor,
                _separately(function, fused.epilogue, kernels),
                (*rest, *args),
                note=shown,
                computes=(product.node,),
            ),
        }
        own = (product.x, self.weight(product), product.bias, *product.windows, fused.epilogue, *rest)
        for tiling in self._tilings(fused):
            name = "depthwise" if tiling is None else str(tiling)
            note = f"{shown}, {name}" if shown else name
            ways[name] = Step(
                fused.anchor,
                functools.partial(kernels.convolution, tiling=tiling),
                own,
                note=note,
                computes=(product.node,),
            )
        return ways

    def _tilings(self, fused: Fused) -> list[Any]:
        from lrpfast.ops.triton import matrix

        weight, groups = self.weight(fused.product), fused.product.windows[3]
        if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
            return [None]
        rows = self._batch * math.prod(int(n) for n in value(fused.product.node).shape[2:])
        sizes = (rows, weight.shape[0] // groups, weight.shape[1], weight.element_size())
        return matrix.tilings(*sizes, matrix.capability_of(weight), fused.epilogue)

    def _torchs(self, product: Product) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """How torch computes a product: function and arguments."""
        node = product.node
        name = operation_name(node)
        if name == "convolution":
            weight = self.weight(product) if product.windows[3] == 1 else product.weight
            return aten.convolution.default, (product.x, weight, *node.args[2:])
        if name == "linear":
            return torch.nn.functional.linear, (product.x, product.weight, product.bias)
        if name == "matmul":
            return torch.matmul, tuple(node.args)
        return TRANSPOSES["conv_dgrad"][1], tuple(node.args)

    def _usual(self, fused: Fused, ways: dict[str, Step]) -> str:
        """What is taken where nothing is timed: our kernels where they save a pass over memory, torch's for all else."""
        saves = fused.epilogue not in ("plain", "relu") and fused.product.is_pointwise
        own = next(name for name in ways if name != TORCH)
        return own if saves or self._kernels.INTERPRETED else TORCH

    # --- choosing ---

    def _key(self, node: fx.Node, described: list[fx.Node | None], epilogue: str) -> str:
        """What is computed: operation, dtypes, sizes, windows and the step that follows."""
        parts = []
        for given in described[:1]:
            assert given is not None
            tensors = [a for a in given.args if is_tensor(a)]
            parts += [f"{value(t).dtype} {self._real_size(t)}" for t in tensors]
            parts += [str(a) for a in given.args if not isinstance(a, fx.Node)]
        parts += ["-" if d is None else str(value(d).dtype) for d in described[1:]]
        return f"{operation_name(node)} {epilogue} {', '.join(parts)}"

    def _real_size(self, node: fx.Node) -> list[int]:
        return [n if isinstance(n, int) else self._batch for n in value(node).shape]

    def _fastest(self, key: str, ways: dict[str, Step], operands: list[fx.Node | None], usual: str) -> Step:
        if self._tuner is None:
            return ways[usual]
        chosen = self._tuner.choose(key, lambda: self._calls(ways, operands))
        step = ways.get(chosen, ways[TORCH])
        self.tuned[step.node] = key
        return step

    def _calls(self, ways: dict[str, Step], operands: list[fx.Node | None]) -> dict[str, Callable[[], Tensor]]:
        """The ways on random values, those whose result is right. Values are not negative, so that no denominator is near 0."""
        generator = torch.Generator("cpu").manual_seed(0)  # its own: the user's random numbers stay theirs
        drawn: dict[fx.Node, Tensor] = {}
        for node in operands:
            if node is not None and node not in drawn:
                values = (
                    torch.rand(self._real_size(node), generator=generator, dtype=torch.float32, device="cpu") + 0.25
                )
                drawn[node] = _channels_last(values.to(value(node).device, value(node).dtype))

        def real(node: fx.Node) -> Tensor:
            return self._constants[node.target] if node.op == "get_attr" else drawn[node]

        def call(step: Step, dtype: torch.dtype | None = None) -> Tensor:
            def convert(arg: Any) -> Any:
                tensor = real(arg) if isinstance(arg, fx.Node) else arg
                return tensor.to(dtype) if dtype is not None and isinstance(tensor, Tensor) else tensor

            with torch.no_grad():
                return step.function(*(convert(a) for a in step.args))

        calls = {name: functools.partial(call, step) for name, step in ways.items()}
        return right_ones(calls, call(ways[TORCH], torch.float64))


def right_ones(calls: Mapping[str, Callable[[], Tensor]], exact: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Those of some ways, the first of which is torch's own, whose error is at most twice that of the first.

    A kernel that does not compile, or needs more than the GPU has, is left out as well.
    """
    first, *others = calls
    allowed = 2 * _error(calls[first](), exact) + 1e-6
    kept = {first: calls[first]}
    for name in others:
        try:
            error = _error(calls[name](), exact)
        except Exception as problem:  # of the compiler, the driver, the launcher: whatever it is, this way is not taken
            _log.warning("the kernel %r does not run here and is not used: %s", name, problem)
            continue
        if error <= allowed:
            kept[name] = calls[name]
        else:
            _log.warning("the kernel %r is wrong here (error %.2g, allowed %.2g) and is not used", name, error, allowed)
    return kept


def _error(found: Tensor, exact: Tensor) -> float:
    """Of the result as a whole, relative; NaN where it holds NaN, which no bound allows."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


_SHOWN = {
    "plain": "", "relu": "with its ReLU", "add_relu": "with its sum", "ratio": "with its ratio",
    "zero_ratio": "with its ratio", "message_ratio": "with the next ratio",
}  # fmt: skip


def _separately(function: Callable[..., Tensor], epilogue: str, kernels: ModuleType) -> Callable[..., Tensor]:
    """torch's product, then the step that follows in one elementwise kernel, written over the product."""
    finish: dict[str, Callable[..., Tensor]] = {
        "plain": lambda z, first, second, eps: z,
        "relu": lambda z, first, second, eps: z.relu_(),
        "add_relu": lambda z, first, second, eps: z.add_(first).relu_(),
        "ratio": lambda z, first, second, eps: kernels.ratio(first, _like(second, z), z, eps, z),
        "message_ratio": lambda z, first, second, eps: kernels.ratio(first, z, second, eps, z),
    }
    finish["zero_ratio"] = finish["ratio"]
    after = finish[epilogue]

    def run(first: Tensor | None, second: Tensor | None, eps: float, *args: Any) -> Tensor:
        return after(function(*args), first, second, eps)

    return run


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A message in the layout of a result; it may be an expanded view."""
    return tensor if tensor.stride() == other.stride() else torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)


def _in_two(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A layer with its ratio, and the transpose after it."""

    def run(
        weight: Tensor, transposed: Tensor, x: Tensor, bias: Tensor | None, carrier: Tensor | None, message: Tensor, eps: float
    ) -> Tensor:  # fmt: skip
        epilogue = "ratio" if eps else "zero_ratio"
        s = convolve(x, weight, bias, *_DENSE, epilogue, carrier, message, eps)
        return convolve(s, transposed, None, *_DENSE, "plain")

    return run


def _one_read(otherwise: Callable[..., Tensor], transposed: Tensor) -> Callable[..., Tensor]:
    """The CUDA kernel for one sample; programs made for one sample take other batches as well."""

    def run(
        x: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor | None, message: Tensor, eps: float
    ) -> Tensor:  # fmt: skip
        if x.shape[0] == 1:
            return cuda.dense_ratio_dgrad(x, weight, bias, carrier, message, eps)
        return otherwise(weight, transposed, x, bias, carrier, message, eps)

    return run


def _torch_pair(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int, epilogue: str,
    carrier: Tensor | None = None, message: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """`convolution` of the kernels, of a 1 x 1 layer, by torch and the elementwise kernel."""
    from lrpfast.ops import triton

    z = torch.nn.functional.linear(x, weight, bias) if x.dim() == 2 else torch.nn.functional.conv2d(x, weight, bias)
    return z if message is None else triton.ratio(carrier, _like(message, z), z, eps, z)


def _arranged(weight: Tensor, arrangement: str, groups: int) -> Tensor:
    """A weight as the kernels read it: one filter a channel with the channels innermost, others with their inputs innermost."""
    if weight.dim() == 2:
        return weight if arrangement == "given" else weight.t()
    arranged = flipped_weight(weight, groups) if arrangement == "flipped" else weight
    if groups == arranged.shape[0] and arranged.shape[1] == 1:
        return arranged.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    return _channels_last(arranged)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.contiguous()


def static_channels(node: fx.Node) -> int:
    """Channels of a value."""
    (count,) = static_sizes(node, [1])
    return count
