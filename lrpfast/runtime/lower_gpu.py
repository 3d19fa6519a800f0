"""Lower for a GPU: what stands between two products goes into the epilogue of the first.

On top of `Lowering`, whose elementwise steps run in Triton here, products absorb the step that follows:

- a layer with the ReLU, or with the residual sum and its ReLU, that alone uses it;
- a layer whose output is a denominator with the ratio: the denominator never reaches memory;
- a transpose with the next layer's ratio, whose message it is;
- a 1 x 1 layer of few inputs with its ratio and its transpose: a tile of its input stays on chip;
- a layer together with the same layer for its modified weight, where reading the input twice costs more than keeping the second result.

A layer that is absorbed runs later than the program says: it may, if its operands still hold their values then.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import fx

from lrpfast.graph import Program, is_tensor, operation_name, same_sizes, value
from lrpfast.ops.transposes import TRANSPOSES
from lrpfast.runtime.convolutions import Convolutions
from lrpfast.runtime.lower import Lowering, is_plain_sum
from lrpfast.runtime.products_gpu import Fused, Product, Products, product_of, static_channels
from lrpfast.runtime.step import Step

aten = torch.ops.aten
ops = torch.ops.lrpfast


class GpuLowering(Lowering):
    """Lowers the nodes of one program for a GPU."""

    def __init__(
        self,
        program: Program,
        nodes: list[fx.Node],
        keep: set[fx.Node],
        kernels: ModuleType,
        convolutions: Convolutions,
        products: Products,
    ) -> None:
        super().__init__(program, nodes, keep, kernels, convolutions)
        self.products = products

    # --- what absorbs what ---

    def _product(self, node: fx.Node) -> Product | None:
        return product_of(node, self.kernels) if isinstance(node, fx.Node) else None

    def _absorbed(self, node: fx.Node) -> Fused | None:
        """The step in which a product is computed, where that is a later one."""
        product, user = self._product(node), self.only_user(node)
        if product is None or user is None or self._chain_of(node) is not None:
            return None
        fused = self._with_ratio(product, user) or self._with_sum(product, user)
        return fused if fused is not None and self._still_holds(product.x, node, fused.anchor) else None

    def _with_ratio(self, product: Product, user: fx.Node) -> Fused | None:
        if user.target is not ops.ratio.default:
            return None
        carrier, message, denominator, eps = user.args
        node = product.node
        others = [t for t in (carrier, message, denominator) if t is not None and t is not node]
        if [carrier, message, denominator].count(node) != 1 or carrier is node or not self._alike(others, node):
            return None
        if denominator is node:
            return Fused(product, "ratio" if eps else "zero_ratio", user, carrier, message, eps)
        absorbs_more = self._product(denominator) is not None and self.only_user(denominator) is user
        if absorbs_more or not eps or product.arrangement == "given":
            return None
        return Fused(product, "message_ratio", user, carrier, denominator, eps)

    def _with_sum(self, product: Product, user: fx.Node) -> Fused | None:
        relu = self.only_user(user)
        if not is_plain_sum(user) or relu is None or relu.target is not aten.relu.default:
            return None
        a, b = user.args[:2]
        other = b if a is product.node else a
        if other is product.node or not self._alike([other], product.node):
            return None
        position = self.liveness.position
        if (
            self._product(other) is not None
            and self.only_user(other) is user
            and position[other] > position[product.node]
        ):
            return None  # the later of two products absorbs the sum
        return Fused(product, "add_relu", relu, other)

    def _alike(self, others: list[fx.Node], node: fx.Node) -> bool:
        """Whether operands have a result's shape, and a dtype that the kernels take."""
        return all(
            is_tensor(t) and same_sizes(value(t).shape, value(node).shape) and self.kernels.takes(value(t))
            for t in others
        )

    def _chain_of(self, node: fx.Node) -> tuple[Fused, Product] | None:
        """A 1 x 1 layer, the ratio by its output, and the transpose of that: given any of the three, if they are one step."""
        name = operation_name(node) if node.op == "call_function" else ""
        ratio = self.only_user(node) if name in ("convolution", "linear") else node
        if name in ("conv_dgrad", "matmul"):
            ratio = node.args[0]
        if not isinstance(ratio, fx.Node) or ratio.target is not ops.ratio.default:
            return None
        carrier, message, denominator, eps = ratio.args
        end, layer = self.only_user(ratio), self._product(denominator)
        back = None if end is None else self._product(end)
        if layer is None or back is None or end is None or back.arrangement == "given" or back.x is not ratio:
            return None
        others = [t for t in (carrier, message) if t is not None]
        fits = (
            layer.arrangement == "given"
            and layer.is_pointwise
            and back.is_pointwise
            and layer.weight is back.weight
            and (self._may_be_kept(layer) or self.products.is_single(layer))
            and self.only_user(denominator) is ratio
            and denominator not in others
            and self._alike(others, denominator)
            and self._still_holds(layer.x, denominator, end)
            and all(self._still_holds(t, ratio, end) for t in others)
        )
        return (Fused(layer, "ratio", ratio, carrier, message, eps), back) if fits else None

    def _may_be_kept(self, layer: Product) -> bool:
        """Whether a tile of a layer's input may stay on chip, all channels of it."""
        return static_channels(layer.x) <= self.kernels.largest_kept(value(layer.x).dtype)

    # --- steps ---

    def _lower_convolution(self, node: fx.Node) -> Step | None:
        product = self._product(node)
        return None if product is None else self._lower_product(product)

    def _lower_linear(self, node: fx.Node) -> Step | None:
        product = self._product(node)
        return None if product is None else self._lower_product(product)

    def _lower_matmul(self, node: fx.Node) -> Step | None:
        return self._lower_linear(node)

    def _lower_conv_dgrad(self, node: fx.Node) -> Step | None:
        product = self._product(node)
        if product is not None:
            return self._lower_product(product)
        return Step(node, TRANSPOSES["conv_dgrad"][1], tuple(node.args), note="torch's backward")

    def _accumulated(self, node: fx.Node, left: fx.Node, right: fx.Node) -> Step | None:
        """Nothing: adding to what is there is oneDNN's."""
        return None

    def _lower_product(self, product: Product) -> Step | None:
        node = product.node
        chain = self._chain_of(node)
        if chain is not None and chain[1].node is node:
            return self.products.kept_step(*chain)
        if chain is not None or self._absorbed(node) is not None:
            self._postponed.add(node)
            return None
        relu = self.only_user(node)
        if relu is not None and relu.target is aten.relu.default:
            self._computed.add(relu)
            fused = Fused(product, "relu", relu)
        else:
            fused = Fused(product, "plain", node)
        return self._with_modified(fused) or self.products.step(fused)

    def _with_modified(self, fused: Fused) -> Step | None:
        """Together with the same layer for its modified weight."""
        product = fused.product
        ins, outs = product.sizes
        if product.arrangement != "given" or product.windows[3] > 1 or self._may_be_kept(product) or ins <= 2 * outs:
            return None  # keeping a result costs writing and reading it, and spares reading the input once
        for user in product.x.users:
            other = self._product(user)
            same = other is not None and user is not product.node and other.windows == product.windows
            if not same or other is None or other.arrangement != "given" or user in self._computed:
                continue
            modification = self.products.modification(product.weight, other.weight)
            biases = (product.bias is None) == (other.bias is None)
            if modification is not None and biases:
                self._computed.add(user)
                return self.products.pair_step(fused, other, modification)
        return None

    def _lower_ratio(self, node: fx.Node) -> Step | None:
        if self._chain_of(node) is not None:
            self._postponed.add(node)
            return None
        for operand in node.args[1:3]:
            fused = self._absorbed(operand) if operand in self._postponed else None
            if fused is not None and fused.anchor is node:
                return self.products.step(fused)
        return super()._lower_ratio(node)

    def _lower_add(self, node: fx.Node) -> Step | None:
        for operand in node.args[:2]:
            fused = self._absorbed(operand) if operand in self._postponed else None
            if fused is not None:
                self._computed.add(fused.anchor)
                return self.products.step(fused)
        return super()._lower_add(node)
