"""The ways in which people write one network: the map depends on what is computed, not on how the code spells it.

Each model below is written in a style of its own; beside it stands the same network as data, over the same modules, for the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrpfast
from lrpfast import errors
from lrpfast.canonical import canonicalise
from lrpfast.capture import capture
from lrpfast.graph import is_tensor, value
from tests.oracles.agree import as_tuple, make_seed, to_composite
from tests.oracles.network import Net, distance, explain
from tests.oracles.specs import EPSILON, FLAT, GAMMA, ZPLUS, Spec

RULES: dict[str, Spec] = {"conv": GAMMA, "linear": EPSILON}


def assert_same_map(model: nn.Module, net: Net, *inputs: Tensor, rules: dict[str, Spec] = RULES) -> None:
    model, net = model.double().eval(), net.double().eval()
    inputs = tuple(x.double() for x in inputs)
    seed = make_seed(net, inputs)
    expected = explain(net, rules, inputs, seed)
    explainer = lrpfast.Explainer(model, inputs, composite=to_composite(net, rules))
    given = tuple(x.clone() for x in inputs)
    found = explainer(given if len(given) > 1 else given[0], target=seed)
    for a, b in zip(as_tuple(found.relevance), expected.relevance, strict=True):
        assert distance(a, b) <= 1e-9
    for a, b in zip(given, inputs, strict=True):
        assert torch.equal(a, b), "the caller's input was written to"


def parts(*names: str) -> dict[str, nn.Module]:
    """Convolutions of two channels that keep the size, and a dense layer `head` over 2 x 5 x 5."""
    modules: dict[str, nn.Module] = {name: nn.Conv2d(2, 2, 3, padding=1) for name in names}
    return modules | {"head": nn.Linear(50, 3)}


class Model(nn.Module):
    """A model whose forward is a function of its modules and inputs."""

    def __init__(self, modules: dict[str, nn.Module], run: Callable[..., object]) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def finish(net: Net, h: int, modules: dict[str, nn.Module]) -> Net:
    net.layer("head", modules["head"], net.op("route", lambda v: v.flatten(1), h))
    return net


X = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chain(modules: dict[str, nn.Module], relus: Sequence[str]) -> Net:
    net = Net()
    h = net.input()
    for name in relus:
        h = net.relu(net.layer(name, modules[name], h))
    return finish(net, h, modules)


def shared_relu(m: Model, x: Tensor) -> Tensor:
    return m.head(m.act(m.b(m.act(m.a(x)))).flatten(1))


def functional_relu(m: Model, x: Tensor) -> Tensor:
    return m.head(torch.flatten(F.relu(m.b(F.relu(m.a(x)))), 1))


def functional_in_place(m: Model, x: Tensor) -> Tensor:
    x = m.a(x)
    F.relu(x, inplace=True)
    x = m.b(x).relu_()
    return m.head(x.view(x.size(0), -1))


def clamped(m: Model, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x).clamp(min=0)).clamp_min(0).reshape(x.shape[0], -1))


def as_maximum(m: Model, x: Tensor) -> Tensor:
    x = F.threshold(m.a(x), 0, 0)
    return m.head(torch.relu(m.b(x)).flatten(start_dim=1))


def functional_layers(m: Model, x: Tensor) -> Tensor:
    x = F.conv2d(x, m.a.weight, m.a.bias, padding=1).relu()
    x = F.conv2d(x, m.b.weight, m.b.bias, padding=1).relu()
    return F.linear(x.flatten(1), m.head.weight, m.head.bias)


def padded_before(m: Model, x: Tensor) -> Tensor:
    x = F.conv2d(F.pad(x, (1, 1, 1, 1)), m.a.weight, m.a.bias).relu()
    return m.head(m.b(x).relu().flatten(1))


def in_a_loop(m: Model, x: Tensor) -> Tensor:
    for layer in (m.a, m.b):
        x = layer(x)
        x = x * 1
        x = x.relu()
    return m.head(x.flatten(1))


def views_and_copies(m: Model, x: Tensor) -> Tensor:
    x = m.a(x.clone().contiguous(memory_format=torch.channels_last)).relu()
    x = m.b(x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)).relu()
    return m.head(x[None].squeeze(0).contiguous().flatten(1))


STYLES = [
    shared_relu, functional_relu, functional_in_place, clamped, as_maximum, functional_layers, padded_before, in_a_loop,
    views_and_copies,
]  # fmt: skip


@pytest.mark.parametrize("run", STYLES, ids=lambda f: f.__name__)
def test_styles_of_a_chain(run: Callable[..., Tensor]):
    modules = parts("a", "b")
    net = chain(modules, "ab")
    assert_same_map(Model(modules | {"act": nn.ReLU(inplace=True)}, run), net, X)


def residual_net(modules: dict[str, nn.Module]) -> Net:
    net = Net()
    first = net.relu(net.layer("a", modules["a"], net.input()))
    return finish(net, net.relu(net.add(net.layer("b", modules["b"], first), first)), modules)


def added(m: Model, x: Tensor) -> Tensor:
    x = m.a(x).relu()
    return m.head((m.b(x) + x).relu().flatten(1))


def added_in_place(m: Model, x: Tensor) -> Tensor:
    x = F.relu(m.a(x), inplace=True)
    out = m.b(x)
    out += x
    return m.head(F.relu(out, inplace=True).flatten(1))


def added_by_method(m: Model, x: Tensor) -> Tensor:
    x = m.a(x).relu_()
    return m.head(m.b(x).add_(x).relu_().flatten(1))


def added_by_torch(m: Model, x: Tensor) -> Tensor:
    x = m.a(x).relu_()
    return m.head(torch.add(input=m.b(x), other=x).relu().flatten(1))


@pytest.mark.parametrize("run", [added, added_in_place, added_by_method, added_by_torch], ids=lambda f: f.__name__)
def test_styles_of_a_residual_sum(run: Callable[..., Tensor]):
    modules = parts("a", "b")
    assert_same_map(Model(modules, run), residual_net(modules), X)


@pytest.mark.parametrize("spelling", ["@", "matmul", "mm"])
def test_a_matrix_product_with_a_parameter_is_a_dense_layer(spelling: str):
    modules = {"a": nn.Linear(6, 5), "head": nn.Linear(5, 3, bias=False)}
    run = {
        "@": lambda m, x: m.a(x).relu() @ m.head.weight.T,
        "matmul": lambda m, x: torch.matmul(m.a(x).relu(), m.head.weight.t()),
        "mm": lambda m, x: torch.mm(m.a(x).relu(), m.head.weight.transpose(0, 1)),
    }
    net = Net()
    net.layer("head", modules["head"], net.relu(net.layer("a", modules["a"], net.input())))
    assert_same_map(Model(modules, run[spelling]), net, torch.randn(4, 6, dtype=torch.float64), rules={"linear": ZPLUS})


def assert_same_as(
    found: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    modules: dict[str, nn.Module],
    x: Tensor = X,
    target: int | None = 0,
):
    """Two spellings over the same modules: one map, and the output that the model itself returns."""
    expected = lrpfast.explain(Model(modules, plain).double().eval(), x, target=target, composite=COMPOSITE)
    model = Model(modules, found).double().eval()
    explanation = lrpfast.explain(model, x, target=target, composite=COMPOSITE)
    with torch.no_grad():
        assert distance(explanation.output, model(x).reshape(explanation.output.shape)) <= 1e-12
    assert explanation.output.shape == expected.output.shape
    assert distance(explanation.relevance, expected.relevance) <= 1e-12


COMPOSITE = to_composite(Net(), RULES)

SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda v: v.squeeze(),
    "some": lambda v: v.squeeze((0, 2, 3)),
    "one by one": lambda v: v.squeeze(-1).squeeze(-1).squeeze(1).squeeze(0),
    "in place": lambda v: v.squeeze_(),
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spelling", SQUEEZES)
def test_squeezing_keeps_the_batch(spelling: str, batch: int):
    modules = {"a": nn.Conv2d(2, 4, 3), "head": nn.Linear(4, 3)}
    squeeze = SQUEEZES[spelling]

    def found(m: Model, x: Tensor) -> Tensor:
        return m.head(squeeze(F.adaptive_avg_pool2d(m.a(x).relu(), 1)))

    def plain(m: Model, x: Tensor) -> Tensor:
        return m.head(F.adaptive_avg_pool2d(m.a(x).relu(), 1).flatten(1))

    assert_same_as(found, plain, modules, X[:batch])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_squeezed_output_keeps_the_batch(batch: int):
    modules = {"a": nn.Conv2d(2, 4, 3)}

    def found(m: Model, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(m.a(x), 1).squeeze()

    def plain(m: Model, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)

    assert_same_as(found, plain, modules, X[:batch])


def as_tokens(y: Tensor) -> Tensor:
    return y.reshape(-1, 2, 3)


BY_A_VECTOR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "@": (lambda y, v: y @ v, lambda y, v: (y @ v[:, None])[:, 0]),
    "mv": (torch.mv, lambda y, v: (y @ v[:, None])[:, 0]),
    "the vector first": (lambda y, v: v @ y.t(), lambda y, v: (y @ v[:, None])[:, 0]),
    "tokens": (lambda y, v: (as_tokens(y) @ v[:3]).sum(1), lambda y, v: (as_tokens(y) @ v[:3, None]).sum((1, 2))),
    "the vector before tokens": (
        lambda y, v: (v[:2] @ as_tokens(y)).sum(1), lambda y, v: (as_tokens(y).transpose(1, 2) @ v[:2, None]).sum((1, 2)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", BY_A_VECTOR)
@pytest.mark.parametrize("last", [True, False])
def test_a_product_with_a_vector_is_a_dense_layer_of_one_output(spelling: str, last: bool):
    modules = {"a": nn.Linear(4, 6), "v": nn.Linear(6, 1, bias=False), "head": nn.Linear(1, 3)}

    def model(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def run(m: Model, x: Tensor) -> Tensor:
            y = product(m.a(x).relu(), m.v.weight[0])
            return y if last else m.head(y[:, None])

        return run

    found, plain = BY_A_VECTOR[spelling]
    assert_same_as(model(found), model(plain), modules, torch.randn(3, 4, dtype=torch.float64))


def test_a_product_with_a_vector_of_the_input_is_refused():
    modules = {"a": nn.Linear(4, 6)}
    model = Model(modules, lambda m, x: m.a(x).relu() @ x.sum((0, 1)).expand(6)).eval()
    with pytest.raises(
        errors.UnsupportedOperationError, match=r"'matmul' in the model's own forward.*vector.*sum\(-1\)"
    ):
        lrpfast.explain(model, torch.randn(3, 4))


def mean_of_channels(y: Tensor) -> Tensor:
    return y.mean((2, 3), keepdim=True)


def crossed(y: Tensor) -> Tensor:
    """Other values side by side than in `y`, rank and number of values alike."""
    return y.permute(0, 2, 3, 1).contiguous()


SHAPED_LIKE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "view_as": (lambda y: y.flatten(1).view_as(y), lambda y: y.flatten(1).view(-1, 2, 5, 5)),
    "view_as of another rank": (lambda y: y.view_as(y.flatten(1)), lambda y: y.flatten(1)),
    "view_as of the same rank": (lambda y: crossed(y).view_as(y), lambda y: crossed(y).view(-1, 2, 5, 5)),
    "reshape_as": (lambda y: crossed(y).reshape_as(y), lambda y: crossed(y).reshape(-1, 2, 5, 5)),
    "expand_as": (lambda y: mean_of_channels(y).expand_as(y), lambda y: mean_of_channels(y).expand(-1, -1, 5, 5)),
    "a gate's expand_as": (
        lambda y: y * torch.sigmoid(mean_of_channels(y)).expand_as(y), lambda y: y * torch.sigmoid(mean_of_channels(y)),
    ),
    "expand_as within a sum": (lambda y: mean_of_channels(y).expand_as(y) + y, lambda y: mean_of_channels(y) + y),
}  # fmt: skip


def between(spelling: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A model with a spelling between its layers. What is flipped depends on the shape that it gives."""
    return lambda m, x: m.head(spelling(m.a(x).relu()).flip(1).flatten(1))


@pytest.mark.parametrize("spelling", SHAPED_LIKE)
def test_shapes_taken_from_another_value(spelling: str):
    found, plain = SHAPED_LIKE[spelling]
    assert_same_as(between(found), between(plain), parts("a"))


OF_THE_DEFAULT_DTYPE: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda y: y * (y > 0.1).float(),
    "to a dtype": lambda y: y * (y > 0.1).to(torch.float32),
    "to another's": lambda y: y * (y > 0.1).to(y),
    "type_as": lambda y: y * (y > 0.1).type_as(y),
    "mask times number": lambda y: y * ((y > 0.1) * 0.5 + 0.25),
    "mean of a mask": lambda y: y * (y > 0.1).float().mean((2, 3), keepdim=True),
    "quotient of integers": lambda y: y * ((y > 0.1).sum(1, keepdim=True) / 2),
    "where of numbers": lambda y: torch.where(y > 0.1, 1.0, 0.0) * y,
    "zeros": lambda y: torch.cat([y[:, 1:], torch.zeros(y.shape[0], 1, 5, 5)], 1),
    "full": lambda y: y + torch.full((y.shape[0], 2, 5, 5), 0.5),
    "softmax": lambda y: y * F.softmax(y, dim=-1, dtype=torch.float32),
}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("spelling", OF_THE_DEFAULT_DTYPE)
def test_values_of_the_default_dtype_are_in_the_program_s_precision(spelling: str, precision: str):
    torch.manual_seed(0)
    model, x = Model(parts("a"), between(OF_THE_DEFAULT_DTYPE[spelling])).eval(), X.float()
    full = lrpfast.explain(model, x, target=0, composite=COMPOSITE)
    found = lrpfast.explain(model, x, target=0, composite=COMPOSITE, precision=precision)
    limit = 0.06 if precision == "bfloat16" else 0.01
    assert distance(found.relevance, full.relevance) <= limit
    assert distance(found.output, model(x)) <= limit


def pooled_rows(y: Tensor) -> Tensor:
    return F.max_pool2d(y, (1, 5))


Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
OTHER_NAMES: dict[str, Pair] = {
    "tile": (lambda y: y[:, :, :1].tile(1, 1, 5, 1), lambda y: y[:, :, :1].repeat(1, 1, 5, 1)),
    "tile of the last": (lambda y: y[..., :1].tile(5), lambda y: y[..., :1].repeat(1, 1, 1, 5)),
    "broadcast_to": (
        lambda y: torch.broadcast_to(mean_of_channels(y), y.shape), lambda y: mean_of_channels(y).expand(-1, -1, 5, 5),
    ),
    "broadcast_tensors": (
        lambda y: torch.broadcast_tensors(mean_of_channels(y), y)[0], lambda y: mean_of_channels(y).expand(-1, -1, 5, 5),
    ),
    "swapdims": (lambda y: y.swapdims(2, -1), lambda y: y.transpose(2, -1)),
    "mT": (lambda y: y.mT, lambda y: y.transpose(2, 3)),
    "mH": (lambda y: y.mH, lambda y: y.transpose(2, 3)),
    "hstack": (lambda y: torch.hstack([y[:, 1:], y[:, :1]]), lambda y: torch.cat([y[:, 1:], y[:, :1]], 1)),
    "dstack": (lambda y: torch.dstack([y[:, :, 2:], y[:, :, :2]]), lambda y: torch.cat([y[:, :, 2:], y[:, :, :2]], 2)),
    "dstack of matrices": (
        lambda y: torch.dstack([y[:, 0].flatten(1), y[:, 1].flatten(1)]), lambda y: y.flatten(2).transpose(1, 2),
    ),
    "subtract": (
        lambda y: torch.subtract(y, mean_of_channels(y), alpha=0.5),
        lambda y: torch.sub(y, mean_of_channels(y), alpha=0.5),
    ),
    "multiply": (lambda y: torch.multiply(y, 0.5), lambda y: y * 0.5),
    "divide": (lambda y: torch.divide(y, y.sum(1, keepdim=True) + 1), lambda y: y / (y.sum(1, keepdim=True) + 1)),
    "true_divide": (lambda y: torch.true_divide(y, 3), lambda y: y / 3),
    "glu": (
        lambda y: F.glu(y - 0.2, 1).repeat(1, 2, 1, 1),
        lambda y: ((y - 0.2)[:, :1] * torch.sigmoid((y - 0.2)[:, 1:])).repeat(1, 2, 1, 1),
    ),
    "amax": (
        lambda y: (y - 1).amax((2, 3), keepdim=True) + y, lambda y: F.adaptive_max_pool2d(y - 1, 1) + y,
    ),
    "amax of a dimension": (lambda y: y.amax(-1).repeat(1, 1, 5), lambda y: pooled_rows(y).flatten(2).repeat(1, 1, 5)),
    "max of a dimension": (
        lambda y: y.max(1, keepdim=True).values + y,
        lambda y: F.max_pool2d(y.flatten(2)[:, None], (2, 1)).reshape(-1, 1, 5, 5) + y,
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", OTHER_NAMES)
def test_other_names_of_operations(spelling: str):
    found, plain = OTHER_NAMES[spelling]
    assert_same_as(between(found), between(plain), parts("a"))


NEW_VALUES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "zeros_like": (lambda y: torch.zeros_like(y), 0.0),
    "ones_like": (lambda y: torch.ones_like(y), 1.0),
    "full_like": (lambda y: torch.full_like(y, 0.5), 0.5),
    "new_zeros": (lambda y: y.new_zeros(y.shape), 0.0),
    "new_ones": (lambda y: y.new_ones(y.shape), 1.0),
    "new_full": (lambda y: y.new_full(y.shape, 0.5), 0.5),
}


@pytest.mark.parametrize("spelling", NEW_VALUES)
def test_new_values_carry_nothing_of_what_they_are_shaped_like(spelling: str):
    make, number = NEW_VALUES[spelling]

    def found(y: Tensor) -> Tensor:
        return torch.cat([torch.where(y > 0.1, y, make(y)) + make(y), make(y)], 1)[:, 1:3]

    def plain(y: Tensor) -> Tensor:
        return F.pad(torch.where(y > 0.1, y, number) + number, (0, 0, 0, 0, 0, 2), value=number)[:, 1:3]

    assert_same_as(between(found), between(plain), parts("a"))


MASK = torch.tensor([True, False, True, True, True])
PLACES = [0, 2, 3, 4]
MASKED: dict[str, Pair] = {
    "last": (lambda y: y[..., MASK], lambda y: y[..., PLACES]),
    "before others": (lambda y: y[:, :, MASK].mean(3), lambda y: y[:, :, PLACES].mean(3)),
    "of two dimensions": (
        lambda y: y[:, :, torch.diag(MASK)], lambda y: y[:, :, torch.tensor(PLACES), torch.tensor(PLACES)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", [0, None])
@pytest.mark.parametrize("spelling", MASKED)
def test_a_constant_mask_is_the_places_that_it_chooses(spelling: str, target: int | None):
    def model(choose: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda m, x: choose(m.a(x).relu()).flatten(1)

    found, plain = MASKED[spelling]
    assert_same_as(model(found), model(plain), parts("a"), target=target)


@pytest.mark.parametrize(
    "spelling",
    [lambda y: F.pad(y, (1, 1, 1, 1), mode="circular")[:, :, 1:-1, 1:-1], lambda y: y.repeat_interleave(2, 1)[:, ::2]],
    ids=["circular padding", "repeat_interleave"],
)
def test_what_canonicalising_adds_lies_where_the_model_does(spelling: Callable[[Tensor], Tensor]):
    """The meta device stands for a GPU: it refuses tensors of the CPU alike."""
    model = Model(parts("a"), between(spelling)).double().to("meta").eval()
    program = canonicalise(capture(model, (X.to("meta"),)).program)
    assert {tensor.device.type for tensor in program.constants.values()} == {"meta"}
    assert {value(n).device.type for n in program.graph.nodes if is_tensor(n)} == {"meta"}


def test_one_convolution_used_twice():
    modules = parts("a")
    net = Net()
    h = net.relu(net.layer("a", modules["a"], net.input()))
    net = finish(net, net.relu(net.layer("a", modules["a"], h)), modules)
    assert_same_map(Model(modules, lambda m, x: m.head(m.a(m.a(x).relu()).relu().flatten(1))), net, X)


def test_one_convolution_over_two_inputs():
    modules = parts("a")
    net = Net()
    first, second = (net.relu(net.layer("a", modules["a"], net.input())) for _ in range(2))
    net = finish(net, net.add(first, second), modules)
    model = Model(modules, lambda m, x, y: m.head((m.a(x).relu() + m.a(y).relu()).flatten(1)))
    assert_same_map(model, net, X, torch.randn_like(X))


@pytest.mark.parametrize("rule", [EPSILON, ZPLUS, GAMMA, FLAT], ids=str)
def test_convolutions_over_one_value(rule: Spec):
    """Several layers read one value, behind a ReLU and not: whatever is stacked must come apart again."""
    modules = parts("a", "b", "c", "d")
    net = Net()
    x = net.input()
    a, b = net.relu(net.layer("a", modules["a"], x)), net.layer("b", modules["b"], x)
    c, d = net.layer("c", modules["c"], a), net.relu(net.layer("d", modules["d"], a))
    net = finish(net, net.add(net.add(c, d), b), modules)

    def run(m: Model, x: Tensor) -> Tensor:
        a, b = m.a(x).relu(), m.b(x)
        return m.head((m.c(a) + m.d(a).relu() + b).flatten(1))

    assert_same_map(Model(modules, run), net, X, rules=RULES | {"conv": rule})


@pytest.mark.parametrize("rule", [ZPLUS, GAMMA, Spec("AlphaBeta")], ids=str)
def test_output_of_a_layer_used_by_a_relu_and_by_something_else(rule: Spec):
    """Where z < 0 relevance comes from the second user: 'used only by a ReLU' must not be taken for granted."""
    modules = parts("a", "b")
    net = Net()
    z = net.layer("b", modules["b"], net.relu(net.layer("a", modules["a"], net.input())))
    net = finish(net, net.add(net.relu(z), net.op("pass", lambda v: v * 0.5, z)), modules)

    def run(m: Model, x: Tensor) -> Tensor:
        z = m.b(m.a(x).relu())
        return m.head((z.relu() + z * 0.5).flatten(1))

    assert_same_map(Model(modules, run), net, X, rules=RULES | {"conv": rule})


def test_chunks_that_all_go_somewhere():
    modules = {"a": nn.Conv2d(2, 6, 1), "b": nn.Conv2d(2, 2, 3, padding=1), "head": nn.Linear(100, 3)}

    def run(m: Model, x: Tensor) -> Tensor:
        u, v, w = m.a(x).chunk(3, dim=1)
        return m.head(torch.cat([m.b(u.relu()) + v, torch.sigmoid(w) * v], 1).flatten(1))

    net = Net()
    a = net.layer("a", modules["a"], net.input())
    u, v, w = (net.op("route", lambda t, k=k: t[:, 2 * k : 2 * k + 2], a) for k in range(3))
    total = net.add(net.layer("b", modules["b"], net.relu(u)), v)
    gated = net.op("gate", torch.mul, v, net.op("pass", torch.sigmoid, w))
    assert_same_map(
        Model(modules, run), finish(net, net.op("route", lambda *t: torch.cat(t, 1), total, gated), modules), X
    )


def test_part_of_a_value_goes_unused():
    """The unused part of a split, and a branch that is computed and dropped, receive nothing."""
    modules = parts("a", "b")

    def run(m: Model, x: Tensor) -> Tensor:
        first, _ = x.split([1, 1], 1)
        m.b(x).mean()
        return m.head(m.a(torch.cat([first, first], 1)).relu().flatten(1))

    net = Net()
    first = net.op("route", lambda v: torch.cat([v[:, :1], v[:, :1]], 1), net.input())
    assert_same_map(Model(modules, run), finish(net, net.relu(net.layer("a", modules["a"], first)), modules), X)


def test_joins_that_continue_one_another():
    """As in a DenseNet: each layer reads all values before it. One join grows, and one slice a value leads back."""
    modules: dict[str, nn.Module] = {f"l{i}": nn.Conv2d(2 + 2 * i, 2, 3, padding=1) for i in range(4)}
    modules["head"] = nn.Linear(250, 3)

    def run(m: Model, x: Tensor) -> Tensor:
        features = [x]
        for i in range(4):
            features.append(getattr(m, f"l{i}")(torch.cat(features, 1).relu()))
        return m.head(torch.cat([*features[:2], *features[2:]], 1).flatten(1))

    net = Net()
    features = [net.input()]
    for i in range(4):
        joined = net.op("route", lambda *t: torch.cat(t, 1), *features)
        features.append(net.layer(f"l{i}", modules[f"l{i}"], net.relu(joined)))
    net = finish(net, net.op("route", lambda *t: torch.cat(t, 1), *features), modules)
    model = Model(modules, run)
    assert_same_map(model, net, X)
    program = lrpfast.Explainer(model, X).program
    assert sum("slice" in str(n.target) for n in program.graph.nodes) == 8  # two a join; with all joins apart, 14


def test_an_input_that_only_gates():
    modules = parts("a")
    net = Net()
    x, y = net.input(), net.input()
    h = net.op("gate", torch.mul, net.relu(net.layer("a", modules["a"], x)), net.op("pass", torch.sigmoid, y))
    model = Model(modules, lambda m, x, y: m.head((m.a(x).relu() * torch.sigmoid(y)).flatten(1)))
    assert_same_map(model, finish(net, h, modules), X, torch.randn_like(X))


def test_inputs_of_two_kinds():
    """An image and a vector, joined before the head."""
    modules = {"a": nn.Conv2d(2, 2, 3, padding=1), "b": nn.Linear(4, 6), "head": nn.Linear(56, 3)}
    net = Net()
    image, vector = net.input(), net.input()
    image = net.op("route", lambda v: v.flatten(1), net.relu(net.layer("a", modules["a"], image)))
    vector = net.relu(net.layer("b", modules["b"], vector))
    net.layer("head", modules["head"], net.op("route", lambda a, b: torch.cat((a, b), 1), image, vector))
    model = Model(modules, lambda m, x, y: m.head(torch.cat([m.a(x).relu().flatten(1), m.b(y).relu()], 1)))
    assert_same_map(model, net, X, torch.randn(3, 4, dtype=torch.float64))


PACKINGS = {
    "dict": lambda y: {"logits": y},
    "tuple": lambda y: (y,),
    "list with a constant": lambda y: [y, None],
    "nested": lambda y: {"out": (y, "name")},
}


@pytest.mark.parametrize("name", PACKINGS)
def test_output_in_a_container(name: str):
    modules = parts("a")
    pack = PACKINGS[name]
    plain = Model(modules, lambda m, x: m.head(m.a(x).relu().flatten(1))).double().eval()
    packed = Model(modules, lambda m, x: pack(m.head(m.a(x).relu().flatten(1)))).double().eval()
    expected = lrpfast.explain(plain, X, target=1)
    found = lrpfast.explain(packed, X, target=1)
    assert torch.equal(found.relevance, expected.relevance)
    leaves, spec = torch.utils._pytree.tree_flatten(found.output)
    expected_leaves, expected_spec = torch.utils._pytree.tree_flatten(pack(expected.output))
    assert spec == expected_spec
    for a, b in zip(leaves, expected_leaves, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_an_exported_program_is_explained_like_its_module():
    modules = parts("a", "b")
    model = Model(modules, functional_relu).double().eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (X,), dynamic_shapes=(({0: batch},),))
    composite = to_composite(Net(), RULES)
    found = lrpfast.Explainer(exported, X, composite=composite)(X, target=2)
    assert torch.equal(found.relevance, lrpfast.Explainer(model, X, composite=composite)(X, target=2).relevance)


def test_grad_modes_and_frozen_parameters_do_not_matter():
    """Parameters that need no gradient, an outer no_grad or inference mode, and a deep copy give the same map."""
    model = Model(parts("a", "b"), functional_relu).double().eval()
    expected = lrpfast.explain(model, X, target=0).relevance
    frozen = copy.deepcopy(model).requires_grad_(False)
    assert torch.equal(lrpfast.explain(frozen, X, target=0).relevance, expected)
    with torch.no_grad():
        assert torch.equal(lrpfast.explain(model, X, target=0).relevance, expected)
    with torch.inference_mode():
        assert torch.equal(lrpfast.explain(model, X, target=0).relevance, expected)
    asking = X.clone().requires_grad_()
    found = lrpfast.explain(model, asking, target=0).relevance
    assert torch.equal(found, expected) and not found.requires_grad and asking.grad is None


@pytest.mark.slow
def test_other_sizes_of_the_input():
    """A network that takes any size gives each its own map; so does a return to the first size."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = model.double().eval()
    explainer = lrpfast.Explainer(model, composite="epsilon_plus")
    torch.manual_seed(2)
    inputs = [
        torch.randn(n, 2, *size, dtype=torch.float64)
        for n, size in ((1, (5, 5)), (2, (6, 4)), (3, (9, 3)), (1, (5, 5)))
    ]
    for x in inputs * 2:
        alone = lrpfast.explain(model, x, composite="epsilon_plus")
        assert torch.equal(explainer(x).relevance, alone.relevance)


def test_recorded_layers_match_the_oracle():
    """What is recorded under a module's name is R at the value that leaves it, batch norm folded or not, twice used or not."""
    net = Net()
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.running_mean)
    h = net.relu(net.layer("a", nn.Conv2d(2, 4, 3), net.input(), norm))
    inner = net.relu(net.layer("b", nn.Conv2d(4, 4, 3, padding=1), h))
    h = net.add(net.layer("c", nn.Conv2d(4, 4, 3, padding=1), inner), h)
    h = net.module("pass", "act", nn.GELU(), h)
    net.layer("head", nn.Linear(36, 3), net.op("route", lambda v: v.flatten(1), h))
    net.double().eval()
    seed = make_seed(net, [X])
    rules = {"conv": ZPLUS, "linear": EPSILON, "a": FLAT}
    expected = explain(net, rules, [X], seed)
    names = ("a_bn", "b", "c", "act", "head")
    explainer = lrpfast.Explainer(net, X, composite=to_composite(net, rules), record=[f"layers.{n}" for n in names])
    found = explainer(X, target=seed)
    assert sorted(found.layers) == sorted(f"layers.{n}" for n in names)
    for name in names:
        oracle = expected.nodes["a" if name == "a_bn" else name]
        assert distance(found.layers[f"layers.{name}"], oracle) <= 1e-9, name
    assert distance(found.relevance, expected.relevance[0]) <= 1e-9


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_last_features_match_the_oracle(backend):
    """R of each channel that the last layer reads: at the pool before it is flattened, summed over positions."""
    net = Net()
    h = net.relu(net.layer("a", nn.Conv2d(2, 4, 3), net.input()))
    h = net.relu(net.layer("b", nn.Conv2d(4, 5, 3, padding=1), h))
    h = net.op("route", lambda v: v.flatten(1), h)
    net.layer("head", nn.Linear(5 * 9, 3), h)
    net.double().eval()
    seed = make_seed(net, [X])
    rules = {"conv": ZPLUS, "linear": EPSILON, "a": FLAT}
    expected = explain(net, rules, [X], seed)
    explainer = lrpfast.Explainer(net, X, to_composite(net, rules), backend=backend, record=["@features", "layers.b"])
    found = explainer(X, target=seed).layers
    assert found["@features"].shape == (len(X), 5)
    # At the value that leaves `b`: the ReLU behind it passes relevance on as it is.
    assert distance(found["@features"], expected.nodes["b"].sum((2, 3))) <= 1e-9


class Tokens(nn.Module):
    """Logits of each token, averaged."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(self.embed(x).relu()).mean(1)


@pytest.mark.parametrize(
    ("model", "shape", "inner", "places"),
    [
        (Tokens(), (3, 5, 4), "embed", 1),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 2, 6, 6),
         "0", (2, 3)),
    ],
    ids=["tokens", "convolution"],
)  # fmt: skip
def test_last_features_are_those_of_the_layer_before(model, shape, inner, places):
    """A ReLU is between, which passes relevance on as it is; the last layer reads tokens, or is a convolution."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = lrpfast.Explainer(model.double().eval(), x, "epsilon", record=["@features", inner])(x, target=1).layers
    assert found["@features"].shape == (shape[0], 6 if inner == "embed" else 4)
    assert distance(found["@features"], found[inner].sum(places)) <= 1e-12


class Merged(Tokens):
    """The same, with all tokens of all samples in one dimension."""

    def forward(self, x):
        each = self.head(self.embed(x).relu().reshape(-1, 6))
        return each.reshape(-1, 5, 3).mean(1)


class Apart(nn.Module):
    """Tokens of all samples in one dimension, then those of a sample side by side."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 6), nn.Linear(30, 3)

    def forward(self, x):
        return self.head(self.embed(x.reshape(-1, 4)).relu().reshape(-1, 30))


def test_features_are_never_those_of_several_samples():
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = lrpfast.Explainer(Apart().double().eval(), x, "epsilon", record=["@features", "embed"])(x, target=1).layers
    assert distance(found["@features"], found["embed"].reshape(3, 30)) <= 1e-12


def test_features_that_are_of_no_sample_are_refused():
    with pytest.raises(
        errors.InputError, match="@features.*by sample; the operation 'linear' in the module 'head' reads"
    ):
        lrpfast.Explainer(Merged().eval(), torch.randn(3, 5, 4), "epsilon", record=["@features"])


def test_a_model_without_a_last_layer_has_no_features():
    with pytest.raises(errors.InputError, match="@features.*the model has none"):
        lrpfast.Explainer(nn.Sequential(nn.ReLU(), nn.Flatten()), torch.rand(2, 1, 3, 3), record=["@features"])
