"""Which nodes of a program may be computed in one call, on graphs written by hand: what the rules do not make today, but may."""

from __future__ import annotations

import pytest
import torch
from torch import fx

import lrpfast  # noqa: F401  declares the operators
from lrpfast.runtime.fusion import Either, Group, SignedPart, find_groups
from lrpfast.runtime.lower import Liveness

aten, ops = torch.ops.aten, torch.ops.lrpfast
IMAGES = torch.empty(2, 4, 5, 5)


class Graph:
    """A graph of images that are all of one size, and what fusion asks of the lowering."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x, self.message = self.given("x"), self.given("message")
        self.weight, self.other = self.given("weight", "get_attr"), self.given("other", "get_attr")

    def given(self, name: str, op: str = "placeholder") -> fx.Node:
        node = self.graph.create_node(op, name, name=name)
        node.meta["val"] = IMAGES if op == "placeholder" else torch.empty(4, 4, 1, 1)
        return node

    def call(self, function: object, *args: object) -> fx.Node:
        node = self.graph.call_function(function, args)
        node.meta["val"] = IMAGES
        return node

    def conv(self, x: fx.Node, weight: fx.Node, bias: object = None) -> fx.Node:
        return self.call(aten.convolution.default, x, weight, bias, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    def dgrad(self, s: fx.Node, weight: fx.Node) -> fx.Node:
        return self.call(ops.conv_dgrad.default, s, weight, [5, 5], [1, 1], [0, 0], [1, 1], 1)

    def ratio(self, z: fx.Node) -> fx.Node:
        return self.call(ops.ratio.default, None, self.message, z, 1e-6)

    def parts(self) -> tuple[fx.Node, fx.Node]:
        return self.call(aten.clamp_min.default, self.x, 0), self.call(aten.clamp_max.default, self.x, 0)

    def find(self, *results: fx.Node) -> list[Group | Either]:
        self.kept = set(results)
        self.liveness = Liveness(list(self.graph.nodes), results)
        return find_groups(list(self.graph.nodes), self)

    def only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and node not in self.kept else None

    def readable(self, node: fx.Node, at: fx.Node, instead_of: set[fx.Node]) -> bool:
        return self.liveness.lives_until(node, at) or self.liveness.last_user(node) in instead_of


@pytest.fixture
def g() -> Graph:
    return Graph()


def test_a_convolution_and_its_ratio(g: Graph) -> None:
    z = g.conv(g.x, g.weight)
    s = g.ratio(z)
    assert g.find(s) == [Group(s, z, frozenset({z}))]


@pytest.mark.parametrize("how", ["a result", "used again", "a carrier too"])
def test_a_denominator_that_is_needed_elsewhere_is_kept(g: Graph, how: str) -> None:
    z = g.conv(g.x, g.weight)
    s = g.call(ops.ratio.default, z if how == "a carrier too" else None, g.message, z, 1e-6)
    more = [z] if how == "a result" else [g.call(aten.neg.default, z)] if how == "used again" else []
    assert g.find(s, *more) == []


def test_an_input_that_is_written_over_before_the_ratio(g: Graph) -> None:
    """`h` ends with a step between the two, which may put its result there; then the convolution runs where it stands."""
    h = g.call(aten.neg.default, g.x)
    z = g.conv(h, g.weight)
    last = g.call(aten.relu.default, h)
    s = g.ratio(z)
    assert g.find(s, last) == []


def test_a_signed_part_and_its_ratio(g: Graph) -> None:
    positive, negative = g.parts()
    first, second = g.conv(positive, g.weight, g.other), g.conv(negative, g.other)
    z = g.call(aten.add.Tensor, first, second)
    s = g.ratio(z)
    assert g.find(s) == [Group(s, SignedPart(g.x, first, g.other), frozenset({positive, negative, first, second, z}))]


def test_a_signed_part_alone_leaves_what_others_use(g: Graph) -> None:
    positive, negative = g.parts()
    first, second = g.conv(positive, g.weight), g.conv(negative, g.other)
    z = g.call(aten.add.Tensor, first, second)
    again = g.call(aten.neg.default, positive)
    assert g.find(z, again) == [Group(z, SignedPart(g.x, first, g.other), frozenset({negative, first, second}))]


@pytest.mark.parametrize("how", ["shared term", "other input", "no clamp at 0", "second bias", "kept term"])
def test_what_is_no_signed_part(g: Graph, how: str) -> None:
    positive, negative = g.parts()
    if how == "other input":
        negative = g.call(aten.clamp_max.default, g.message, 0)
    if how == "no clamp at 0":
        positive = g.call(aten.clamp_min.default, g.x, 1)
    first = g.conv(positive, g.weight)
    second = g.conv(negative, g.other, g.weight if how == "second bias" else None)
    z = g.call(aten.add.Tensor, first, second)
    results = [z, g.call(aten.neg.default, first)] if how == "shared term" else [z]
    assert g.find(*results, *([second] if how == "kept term" else [])) == []


def test_either_of_two_transposes(g: Graph) -> None:
    condition = g.call(aten.ge.Scalar, g.x, 0)
    upper, lower = g.dgrad(g.message, g.weight), g.dgrad(g.message, g.other)
    choice = g.call(aten.where.self, condition, upper, lower)
    assert g.find(choice) == [Either(choice, g.x, upper, lower, frozenset({condition, upper, lower}))]


@pytest.mark.parametrize("how", ["other messages", "kept", "not the sign", "written over"])
def test_what_is_no_choice_of_transposes(g: Graph, how: str) -> None:
    x = g.call(aten.neg.default, g.x)
    condition = g.call(aten.ge.Scalar, x, 1 if how == "not the sign" else 0)
    more = [g.call(aten.relu.default, x)] if how == "written over" else []
    upper = g.dgrad(g.message, g.weight)
    lower = g.dgrad(g.x if how == "other messages" else g.message, g.other)
    choice = g.call(aten.where.self, condition, upper, lower)
    assert g.find(choice, *more, *([upper] if how == "kept" else [])) == []
