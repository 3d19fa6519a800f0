"""Which calls are fused into one, and that what they compute does not change: float32 in compiled steps against float64.

In float64 nothing is fused: neither oneDNN nor the compiled operators take it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lrpfast
from lrpfast import graph
from lrpfast.graph import Constants
from lrpfast.ops import native, products
from lrpfast.ops.filters import Filters
from lrpfast.ops.products import Direct, Winograd
from lrpfast.runtime import convolutions


@functools.cache
def exported(
    network: Callable[..., nn.Module], shape: tuple[int, ...], *arguments: object, dtype: torch.dtype = torch.float32
) -> torch.export.ExportedProgram:
    """``network(*arguments)`` for samples of a shape: exported once for all tests, which takes longest."""
    model, x = network(*arguments).eval().to(dtype), torch.zeros(3, *shape, dtype=dtype)
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


class Net(nn.Module):
    """Layers `a`, `b`, `c` of four channels, a one-by-one `skip`, and a head; `run` says how they are joined."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in "abc":
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        self.skip = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x).mean((2, 3)))


def used_later(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    total = (m.b(h) + h).relu()
    return m.c(total).relu() + h  # h outlives the sum: it must not be written over


def two_convolutions(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    return m.c((m.b(h) + m.skip(h)).relu()).relu()


def two_convolutions_the_other_way_round(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    skipped = m.skip(h)
    return m.c((skipped + m.b(h)).relu()).relu()


def operand_used_in_between(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    skipped = m.skip(h)
    convolved = m.b(h)
    beside = skipped * 2.0  # after the convolution that could write its sum over `skipped`, and before the sum
    return m.c((convolved + skipped).relu()).relu() + beside


def without_relu(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(m.b(h) + h)


def summed_with_itself(m: Net, x: Tensor) -> Tensor:
    z = m.a(x)
    return m.b((z + z).relu())


def differences(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).relu()
    convolved = m.b(h)
    both = (convolved - m.skip(h)).relu()  # `convolved` dies here and may be written over; `h` below may not
    return m.c((h - both * 2).relu()).relu() + torch.sub(h, both, alpha=3)


def clamped(m: Net, x: Tensor) -> Tensor:
    return m.c(nn.functional.relu6(m.b(nn.functional.hardtanh(m.a(x), -0.5, 0.5)) * 3))


def pooled(m: Net, x: Tensor) -> Tensor:
    h = nn.functional.max_pool2d(m.a(x).relu(), 3, 2, 1)
    h = nn.functional.avg_pool2d(m.b(h).relu(), 2)
    return nn.functional.max_pool2d(m.c(h).relu(), 2, ceil_mode=True)


FUSED = {
    used_later: ["with its ReLU", "with its sum"],
    two_convolutions: ["with its ReLU", "with its sum"],
    two_convolutions_the_other_way_round: ["with its sum"],
    operand_used_in_between: ["with its ReLU", "with its sum"],
    without_relu: [],
    summed_with_itself: [],
    differences: ["with its ReLU"],
    clamped: ["with its clamp"],
    pooled: ["with its ReLU"],
}


# With guided_backprop no operand of the forward pass is kept for the way back, so more may be written over.
@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "gamma", "epsilon_alpha2_beta1", "guided_backprop"])
@pytest.mark.parametrize("run", FUSED, ids=lambda f: f.__name__)
def test_fused_steps_give_the_same(run: Callable[[Net, Tensor], Tensor], composite: str) -> None:
    x = torch.randn(3, 4, 11, 13, generator=torch.Generator().manual_seed(1))
    found = lrpfast.explain(exported(Net, (4, 11, 13), run), x, target=2, composite=composite, record=("*",))
    in_float64 = exported(Net, (4, 11, 13), run, dtype=torch.float64)
    exact = lrpfast.explain(in_float64, x.double(), target=2, composite=composite, record=("*",))
    assert found.layers.keys() == exact.layers.keys() != set()
    maps = [(found.relevance, exact.relevance), (found.output, exact.output)]
    maps += [(found.layers[name], exact.layers[name]) for name in exact.layers]
    for a, b in maps:
        assert torch.linalg.vector_norm(a.double() - b) <= 2e-5 * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("run", FUSED, ids=lambda f: f.__name__)
def test_what_is_fused(run: Callable[[Net, Tensor], Tensor]) -> None:
    x = torch.randn(3, 4, 11, 13)
    steps = lrpfast.Explainer(exported(Net, (4, 11, 13), run), x).profile(x, repeats=1)
    notes = [step.operation for step in steps]
    for note in FUSED[run]:
        assert any(note in operation for operation in notes), notes
    assert "ge" not in notes  # the mask of a choice by sign


def test_a_max_pool_keeps_one_byte_a_window():
    x = torch.randn(2, 4, 8, 8)
    explainer = lrpfast.Explainer(Net(pooled).eval(), x)
    explainer.profile(x, repeats=1)
    compiled = explainer._latest
    functions = {s.function for s in compiled.executor(compiled.default_seed, False, 8).steps}
    assert {native.max_pool, native.max_pool_dgrad, native.avg_pool_dgrad} <= functions


class Strided(nn.Module):
    """Strided layers side by side, each with a stem of its own, whose relevance is what the layer alone passes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        forms = [
            (kernel, stride, padding, dilation, groups)
            for kernel, stride, padding, dilation in (
                (1, 2, 0, 1), (1, 3, 0, 1), (3, 2, 0, 1), (3, 2, 1, 1), (3, 3, 1, 1), (3, 2, 1, 2), (3, 2, 2, 2),
            )
            for groups in (1, 2)
        ]  # fmt: skip
        self.stems = nn.ModuleList(nn.Conv2d(3, 4, 3, padding=1) for _ in forms)
        self.strided = nn.ModuleList(nn.Conv2d(4, 6, *form) for form in forms)
        self.head = nn.Linear(6 * len(forms), 3)

    def forward(self, x: Tensor) -> Tensor:
        both = zip(self.stems, self.strided, strict=True)
        return self.head(torch.cat([strided(stem(x).relu()).relu().mean((2, 3)) for stem, strided in both], 1))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(11, 13), (12, 12)])
def test_strided_transposes(size: tuple[int, int], batch: int) -> None:
    x = torch.randn(batch, 3, *size)
    how = {"composite": "epsilon_plus", "record": ("stems.*",)}
    explainer = lrpfast.Explainer(exported(Strided, (3, *size)), x, **how)
    operations = [step.operation for step in explainer.profile(x, repeats=1)]
    assert operations.count("conv_dgrad (as a transposed convolution)") == 14, operations
    found = explainer(x)
    exact = lrpfast.explain(exported(Strided, (3, *size), dtype=torch.float64), x.double(), **how)
    assert len(exact.layers) == 14
    pairs = [(found.relevance, exact.relevance), *((found.layers[name], exact.layers[name]) for name in exact.layers)]
    for a, b in pairs:
        assert torch.linalg.vector_norm(a.double() - b) <= 1e-5 * torch.linalg.vector_norm(b)


def test_profile_counts_what_a_step_has_to_do() -> None:
    """3 x 3 on 5 x 5 with padding 1 meets 13 of its 15 rows and columns of taps, and its transpose as many."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1), nn.Flatten(), nn.Linear(54, 3)
    )
    x = torch.randn(2, 4, 5, 5)
    steps = lrpfast.Explainer(model.eval(), x, composite="epsilon").profile(x, repeats=1)
    flops = {(step.module, step.operation): step.flops for step in steps}
    assert flops[("1", "relu (with its ReLU)")] == pytest.approx(2 * 2 * 13 * 13 * 4 * 8)
    assert flops[("0", "conv_dgrad (as a convolution)")] == pytest.approx(2 * 2 * 13 * 13 * 4 * 8)
    assert flops[("2", "convolution")] == pytest.approx(2 * 2 * 7 * 7 * 8 * 6)  # rows 0, 2, 4: 2 + 3 + 2 taps
    assert flops[("2", "conv_dgrad (as a transposed convolution)")] == pytest.approx(2 * 2 * 7 * 7 * 8 * 6)
    assert flops[("4", "linear")] == pytest.approx(2 * 2 * 54 * 3)
    read_and_written = {(step.module, step.operation): step.bytes for step in steps}
    assert read_and_written[("4", "linear")] == 4 * (2 * 54 + 54 * 3 + 3 + 2 * 3)


class Wide(nn.Module):
    """Layers wide enough for products of our own: `a`, `b`, `c` 3 x 3, `p`, `q`, `r` 1 x 1, `d`, `e` depthwise; `run` joins them."""

    def __init__(self, run: Callable[[Wide, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3)
        self.p, self.q, self.r = nn.Conv2d(32, 24, 1), nn.Conv2d(24, 32, 1, stride=2), nn.Conv2d(24, 40, 1, bias=False)
        self.d = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.e = nn.Conv2d(32, 32, (5, 3), stride=2, padding=(2, 1), groups=32, bias=False)
        self.head = nn.Linear(32, 5)
        self.c = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, self.stem(x).relu()).mean((2, 3)))


def three_by_three(m: Wide, h: Tensor) -> Tensor:
    return m.b(m.a(h).relu()).relu()


def residual(m: Wide, h: Tensor) -> Tensor:
    return m.b((m.a(h) + h).relu()).relu()


def strided(m: Wide, h: Tensor) -> Tensor:
    return m.b((m.c(h).relu() + h[:, :, ::2, ::2]).relu()).relu()


def strided_residual(m: Wide, h: Tensor) -> Tensor:
    return (m.c(m.a(h).relu()) + m.c(h)).relu()


def signed_input(m: Wide, h: Tensor) -> Tensor:
    return m.q(nn.functional.relu6(m.p(m.a(h)))).relu()  # `a` and `q` end in no ReLU before a 1 x 1 layer


def signed_twice(m: Wide, h: Tensor) -> Tensor:
    z = m.p(h)  # signed, and the input of two layers and a sum
    return m.q(z) + m.q(z.relu()) + m.r(z).relu()[:, :32, ::2, ::2]


def depthwise(m: Wide, h: Tensor) -> Tensor:
    return m.b(nn.functional.relu6(m.e(nn.functional.relu6(m.d(h)) + h)))


OWN = {
    three_by_three: [
        "relu (by Winograd, with its ReLU)",
        "ratio (in a convolution by Winograd)",
        "conv_dgrad (by Winograd)",
    ],
    residual: ["convolution (by Winograd)", "ratio (in a convolution by Winograd)"],
    strided: [
        "relu (by Winograd in phases, with its ReLU)",
        "ratio (in a convolution by Winograd in phases)",
        "conv_dgrad (by Winograd in phases)",
    ],
    strided_residual: ["convolution (by Winograd in phases)", "ratio (in a convolution by Winograd in phases)"],
    signed_input: ["ratio (in a convolution as a product)", "where (of two transposes, as a product)"],
    signed_twice: ["where (of two transposes, as a product)"],
    depthwise: [
        "hardtanh (channel by channel, with its clamp)",
        "ratio (in a convolution channel by channel)",
        "conv_dgrad (channel by channel)",
    ],
}


def box_or(composite: str) -> str | lrpfast.Composite:
    return lrpfast.composites.epsilon_gamma_box(low=-4, high=4) if composite == "epsilon_gamma_box" else composite


@functools.cache
def exact_and_torchs(
    run: Callable[[Wide, Tensor], Tensor], composite: str
) -> tuple[lrpfast.Explanation, lrpfast.Explanation]:
    """What `Wide` gives for class 2 in float64, and with torch's operators in float32."""
    x = torch.randn(3, 3, 11, 13, generator=torch.Generator().manual_seed(1))
    how = {"composite": box_or(composite), "record": ("*",)}
    exact = lrpfast.explain(exported(Wide, (3, 11, 13), run, dtype=torch.float64), x.double(), target=2, **how)
    single = exported(Wide, (3, 11, 13), run)
    return exact, lrpfast.Explainer(single, x, backend="torch", autotune=False, **how)(x, target=2)


@pytest.mark.parametrize(
    ("composite", "tuned"),
    [("epsilon_plus", False), ("epsilon_plus", True), ("epsilon_gamma_box", False), ("epsilon_alpha2_beta1", False)],
)
@pytest.mark.parametrize("run", OWN, ids=lambda f: f.__name__)
def test_products_of_our_own_give_the_same(
    run: Callable[[Wide, Tensor], Tensor], composite: str, tuned: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice as far from float64 as the reference operators are in float32."""
    monkeypatch.setenv("LRPFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(convolutions, "_WORTH_TUNING", 1000)
    x = torch.randn(3, 3, 11, 13, generator=torch.Generator().manual_seed(1))
    how = {"composite": box_or(composite), "record": ("*",), "autotune": tuned}
    explainer = lrpfast.Explainer(exported(Wide, (3, 11, 13), run), x, **how)
    exact, reference = exact_and_torchs(run, composite)

    def assert_as_good(found: Tensor, torchs: Tensor, exact: Tensor) -> None:
        own, own_of_torch = (torch.linalg.vector_norm(t.double() - exact) for t in (found, torchs))
        assert own <= 2 * own_of_torch + 2**-22 * torch.linalg.vector_norm(exact)

    for _ in range(2):  # nothing that a run writes may be what the next reads
        found = explainer(x, target=2)
        assert_as_good(found.relevance, reference.relevance, exact.relevance)
        for name in exact.layers:
            assert_as_good(found.layers[name], reference.layers[name], exact.layers[name])
    several = explainer(x, target=torch.tensor([[1, 2]] * 3)).relevance[:, 1]
    assert_as_good(several, reference.relevance, exact.relevance)


@pytest.mark.parametrize("run", OWN, ids=lambda f: f.__name__)
def test_which_products_are_our_own(run: Callable[[Wide, Tensor], Tensor]) -> None:
    x = torch.randn(3, 3, 11, 13)
    model = exported(Wide, (3, 11, 13), run)
    explainer = lrpfast.Explainer(model, x, composite="epsilon_plus", autotune=False)
    operations = [step.operation for step in explainer.profile(x, repeats=1)]
    for name in OWN[run]:
        assert name in operations, operations
    reference = lrpfast.Explainer(model, x, composite="epsilon_plus", autotune=False, backend="torch")
    assert not any("Winograd" in s.operation or "product" in s.operation for s in reference.profile(x, repeats=1))


def test_a_step_counts_the_multiplications_of_the_layer_within() -> None:
    x = torch.randn(2, 3, 10, 10)
    explainer = lrpfast.Explainer(Wide(three_by_three).eval(), x, composite="epsilon_plus", autotune=False)
    inner = 2 * 2 * 32 * 32 * (3 * 10 - 2) ** 2  # of `a`: each row and column meets its padding once at either end
    assert sum(s.flops == inner for s in explainer.profile(x, repeats=1)) == 3


def test_a_choice_of_two_transposes_counts_the_multiplications_of_one() -> None:
    x = torch.randn(2, 3, 10, 10)
    explainer = lrpfast.Explainer(Wide(signed_input).eval(), x, composite="epsilon_plus", autotune=False)
    (chosen,) = (s for s in explainer.profile(x, repeats=1) if "of two transposes" in s.operation)
    assert chosen.flops == 2 * 2 * 32 * 24 * 10**2  # of `p`


class Dense(nn.Module):
    """Three dense layers, the first and last of input that is not negative, the second of signed input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(130, 70), nn.Linear(70, 50), nn.Linear(50, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x.relu())).relu())


DENSE_RULES = [
    lrpfast.rules.ZPlus(), lrpfast.rules.Gamma(0.25), lrpfast.rules.AlphaBeta(2.0, 1.0), lrpfast.rules.Epsilon(1e-3),
    lrpfast.rules.WSquare(),
]  # fmt: skip


@pytest.mark.parametrize("rule", DENSE_RULES, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_layers_of_few_samples_give_the_same(rule: lrpfast.rules.Rule, batch: int) -> None:
    how = lrpfast.Composite([("linear", rule)])
    model, x = exported(Dense, (130,)), torch.randn(batch, 130, generator=torch.Generator().manual_seed(1))
    explainer = lrpfast.Explainer(model, x, composite=how, record=("*",))
    in_float64 = exported(Dense, (130,), dtype=torch.float64)
    exact = lrpfast.explain(in_float64, x.double(), target=2, composite=how, record=("*",))
    reference = lrpfast.Explainer(model, x, composite=how, record=("*",), backend="torch")(x, target=2)
    for several in (x, torch.cat([x] * 20)):  # more samples than the steps were made for
        found = explainer(several, target=2)
        pairs = [(found.relevance, reference.relevance, exact.relevance)]
        pairs += [(found.layers[name], reference.layers[name], exact.layers[name]) for name in exact.layers]
        for own, torchs, wanted in pairs:
            error, error_of_torch = (torch.linalg.vector_norm(t[:batch].double() - wanted) for t in (own, torchs))
            assert error <= 2 * error_of_torch + 2**-22 * torch.linalg.vector_norm(wanted)


def test_which_dense_steps_read_a_weight_once() -> None:
    explainer = lrpfast.Explainer(Dense().eval(), torch.randn(1, 130), composite="alpha1_beta0")
    operations = [step.operation for step in explainer.profile(torch.randn(1, 130), repeats=1)]
    # Of `a`: `b` has signed input, and of `c` the target's row is enough.
    assert operations.count("linear (with its modified weight's)") == 1, operations
    assert operations.count("linear (weight modified on the way)") == 2, operations
    assert operations.count("matmul (weight modified on the way)") == 3, operations
    (compiled,) = explainer._compiled.values()
    constants = compiled.joint(compiled.default_seed).program.constants
    assert all(constants._tensors[name] is None for name in constants if constants.scaled(name))
    many = lrpfast.Explainer(Dense().eval(), torch.randn(30, 130), composite="alpha1_beta0")
    assert not any("on the way" in step.operation for step in many.profile(torch.randn(30, 130), repeats=1))


def assert_as_good_as_torchs(found: Tensor, model: nn.Module, x: Tensor, how: str | lrpfast.Composite) -> None:
    """Relevance for class 2 at most twice as far from float64's as that of torch's operators in float32."""
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), target=2, composite=how).relevance
    reference = lrpfast.Explainer(model, x, composite=how, backend="torch")(x, target=2).relevance
    error, of_torch = (torch.linalg.vector_norm(t.double() - exact) for t in (found, reference))
    assert error <= 2 * of_torch + 2**-22 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("run", [three_by_three, residual, strided], ids=lambda f: f.__name__)
def test_large_weights_that_are_transformed_at_each_call_give_the_same(
    run: Callable[[Wide, Tensor], Tensor], composite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(convolutions, "_ENOUGH_TILES", 0)
    x = torch.randn(3, 3, 11, 13, generator=torch.Generator().manual_seed(1))
    explainer = lrpfast.Explainer(exported(Wide, (3, 11, 13), run), x, composite=box_or(composite))
    found = explainer(x, target=2)
    (compiled,) = explainer._compiled.values()
    steps = compiled.executor(compiled.default_seed, False, 3).steps
    layers = [arg for step in steps for arg in step.args if isinstance(arg, Winograd)]
    assert all(isinstance(layer.weight, Filters) for layer in layers)
    assert {layer.weight.transposed for layer in layers} == {True, False}  # layers, and transposes
    exact, torchs = (explanation.relevance for explanation in exact_and_torchs(run, composite))
    error, of_torch = (torch.linalg.vector_norm(t.double() - exact) for t in (found.relevance, torchs))
    assert error <= 2 * of_torch + 2**-22 * torch.linalg.vector_norm(exact)


class Normed(nn.Module):
    """3 x 3 layers, the last of stride 2, with batch norms that are not their beginning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 64, 1), (64, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(64, 5)
        for norm in self.layers[1::3]:
            assert isinstance(norm, nn.BatchNorm2d)
            for tensor, low, high in ((norm.weight, 0.5, 2.0), (norm.bias, -1.0, 1.0), (norm.running_var, 0.3, 3.0)):
                nn.init.uniform_(tensor, low, high)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_by_winograd(composite: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No farther from float64 than torch's convolutions are in bfloat16. The kernels run without the instructions as well."""
    model, in_float64 = (exported(Normed, (3, 17, 15), dtype=dtype) for dtype in (torch.float32, torch.float64))
    x = torch.randn(batch, 3, 17, 15, generator=torch.Generator().manual_seed(1))
    exact = lrpfast.explain(in_float64, x.double(), target=2, composite=composite).relevance
    distances, operations = {}, {}
    for fast in (True, False):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda fast=fast: fast)
        how = {"composite": composite, "precision": "bfloat16", "autotune": False}
        explainer = lrpfast.Explainer(model, x, **how)
        found = explainer(x, target=2).relevance.double()
        distances[fast] = (torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)).item()
        operations[fast] = {step.operation for step in explainer.profile(x, repeats=1)}
    expected = {f"{name} (by Winograd{how}" for name, how in (
        ("relu", ", with its ReLU)"), ("relu", " in phases, with its ReLU)"), ("conv_dgrad", ")"), ("conv_dgrad", " in phases)"),
    )}  # fmt: skip
    if composite == "epsilon_plus":
        expected |= {"ratio (in a convolution by Winograd)", "ratio (in a convolution by Winograd in phases)"}
    assert expected <= operations[True], operations[True]
    assert not any("Winograd" in operation for operation in operations[False])
    assert distances[True] < 0.03
    assert distances[True] < 1.5 * distances[False]


@pytest.mark.parametrize("tiles", [False, True])
def test_bfloat16_is_left_to_amx(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(native.extension, "cpu_capability", lambda: "avx512_bf16")
    assert products.multiplies_bfloat16() == (not tiles)
    monkeypatch.setattr(native.extension, "cpu_capability", lambda: "avx512")
    assert not products.multiplies_bfloat16()


@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_alpha2_beta1"])
def test_signed_layers_in_bfloat16_take_two_products(composite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products by sign are in float32 alone, wherever pairs of bfloat16 are multiplied."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 1), nn.ReLU(), nn.Conv2d(24, 8, 1), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 3, 9, 9)
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), target=1, composite=composite).relevance
    found = lrpfast.Explainer(model, x, composite=composite, precision="bfloat16", autotune=False)(x, target=1)
    assert torch.linalg.vector_norm(found.relevance.double() - exact) < 0.05 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("laid_out", [False, True])
def test_bfloat16_rounds_a_folded_weight_once(laid_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: laid_out)
    model, x = Normed().eval(), torch.randn(2, 3, 9, 9)
    explainer = lrpfast.Explainer(model, x, composite="epsilon_plus", precision="bfloat16", autotune=False)
    explainer(x, target=1)
    (compiled,) = explainer._compiled.values()
    convolution, norm = model.layers[3], model.layers[4]
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    exact = convolution.weight.detach().double() * factor.detach()[:, None, None, None]
    if laid_out:
        steps = compiled.executor(compiled.default_seed, False, 2).steps
        layers = (arg for step in steps for arg in step.args if isinstance(arg, Winograd))
        exact = Winograd.of(exact, [1, 1]).weight.double()
        weights = [w.weight.transpose(3, 4).flatten(2, 3).double() for w in layers]
    else:
        constants = (node for node in compiled.program.graph.nodes if node.op == "get_attr")
        weights = [compiled.program.constants[node.target].double() for node in constants]
    nearest = min(torch.linalg.vector_norm(w - exact) for w in weights if w.shape == exact.shape)
    assert nearest < 1.01 * torch.linalg.vector_norm(exact.bfloat16() - exact)


@pytest.mark.parametrize("fast", [True, False])
def test_large_weights_in_bfloat16_for_one_image(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads large weights from the model knows float32 alone."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: fast)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 720, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(720, 4),
    ).eval()  # fmt: skip
    for layer in (model[2], model[4]):
        assert 2 * layer.weight.numel() >= convolutions._LARGE_FOR_ONE
    x = torch.randn(1, 3, 9, 9)
    exact = lrpfast.explain(copy.deepcopy(model).double(), x.double(), target=1, composite="epsilon_plus").relevance
    how = {"composite": "epsilon_plus", "precision": "bfloat16", "autotune": False}
    explainer = lrpfast.Explainer(model, x, **how)
    found = explainer(x, target=1).relevance.double()
    assert torch.linalg.vector_norm(found - exact) < 0.03 * torch.linalg.vector_norm(exact)
    kinds = {"by Winograd", "as a product"}  # of the 3 x 3 layer, and of the 1 x 1 layer
    operations = {step.operation for step in explainer.profile(x, repeats=1)}
    assert {k for k in kinds if f"ratio (in a convolution {k})" in operations} == (kinds if fast else set())


@pytest.mark.parametrize(("precision", "batch"), [(None, 1), (None, 2), ("bfloat16", 1), ("bfloat16", 2)])
def test_two_batch_norms_in_a_row_count_both(precision: str | None, batch: int) -> None:
    model = Normed().eval()
    model.layers[7] = nn.Sequential(model.layers[7], Normed().eval().layers[4])
    for norm in (model.layers[7][0], model.layers[7][1]):
        norm.weight.data.mul_(1.5)
    x = torch.randn(batch, 3, 17, 15, generator=torch.Generator().manual_seed(1))
    found = lrpfast.explain(model, x, target=2, composite="epsilon_plus", precision=precision).output
    expected = model(x).detach()
    error = torch.linalg.vector_norm(found.float() - expected) / torch.linalg.vector_norm(expected)
    assert error < (1e-5 if precision is None else 0.02)


def test_a_large_weight_that_is_cast_is_not_read_as_it_was() -> None:
    """For one image large weights are read where the model has them: not where they are of another dtype there."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 25, 4)
    )
    x = torch.randn(1, 3, 9, 9)
    assert model[2].weight.nbytes >= convolutions._LARGE_FOR_ONE
    single = lrpfast.Explainer(model, x, composite="epsilon_plus")(x, target=1).relevance
    cast = lrpfast.Explainer(model.double(), x.double(), composite="epsilon_plus", precision="float32")
    torch.testing.assert_close(cast(x.double(), target=1).relevance.float(), single, rtol=1e-4, atol=1e-6)


class Folded(nn.Module):
    """A residual block with batch norms, some with negative factors, its stride in a 3 x 3 layer and in a 1 x 1 one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, 2, 1, bias=False)
        self.second, self.skip = nn.Conv2d(32, 48, 1, bias=False), nn.Conv2d(32, 48, 1, 2, bias=False)
        self.wide = nn.Conv2d(48, 8, 5, padding=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (32, 32, 48, 48))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.stem(x)).relu()
        inner = self.norms[2](self.second(self.norms[1](self.first(h)).relu()))
        h = (inner + self.norms[3](self.skip(h))).relu()
        return self.head(self.wide(h).relu().mean((2, 3)))


@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1"])
@pytest.mark.parametrize("few", [True, False])
def test_one_image_is_explained_straight_from_large_weights(
    few: bool, composite: str, lies: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolutions, "_LARGE_FOR_ONE", 0)
    monkeypatch.setattr(convolutions, "_TILES_FOR_ONE", 40 if few else 0)  # for Winograd's filtering
    how = lrpfast.composites.epsilon_gamma_box(low=-4, high=4) if composite == "epsilon_gamma_box" else composite
    model = Folded().eval().to(memory_format=lies)
    x = torch.randn(1, 3, 15, 17, generator=torch.Generator().manual_seed(1))
    explainer = lrpfast.Explainer(model, x, composite=how)
    found = explainer(x, target=2)
    (compiled,) = explainer._compiled.values()
    steps = compiled.executor(compiled.default_seed, False, 1).steps
    layers = [arg for step in steps for arg in step.args if isinstance(arg, Direct | Winograd)]
    assert {(type(layer), layer.weight.transposed) for layer in layers} >= {
        (kind, back) for kind in ((Direct,) if few else (Direct, Winograd)) for back in (True, False)
    }
    own = {p.data_ptr() for p in model.parameters()}
    assert all(layer.weight.weight.data_ptr() in own for layer in layers)  # nothing is derived but on the way
    assert_as_good_as_torchs(found.relevance, model, x, how)
    with torch.no_grad():
        model.first.weight *= -1  # the next call must not take the old one, nor half of it
    again, fresh = explainer(x, target=2), lrpfast.explain(model, x, target=2, composite=how)
    assert torch.equal(again.relevance, fresh.relevance) and not torch.equal(again.relevance, found.relevance)


def test_several_images_have_their_weights_laid_out() -> None:
    explainer = lrpfast.Explainer(Folded().eval(), torch.randn(2, 3, 15, 17))
    (compiled,) = explainer._compiled.values()
    steps = compiled.executor(compiled.default_seed, False, 2).steps
    assert not any(isinstance(arg, Direct) for step in steps for arg in step.args)


def test_the_latest_derived_constants_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_HELD_BYTES", 2 * 400)
    constants, made = Constants(), []

    def derive(name: str, number: int) -> None:
        def make() -> Tensor:
            made.append(name)
            return torch.full((100,), float(number))

        constants.derive(name, make(), make)

    constants["given"] = torch.zeros(100)
    for number, name in enumerate("abc"):
        derive(name, number)
    held = constants["b"]
    assert constants["b"] is held and constants["c"][0] == 2 and made == ["a", "b", "c"]
    assert constants["a"][0] == 0 and made == ["a", "b", "c", "a"]  # again, and `b`, asked for longest ago, goes
    assert constants["b"] is not held and torch.equal(constants["b"], held) and made[-1] == "b"
    assert constants.name_of(constants["b"]) == "b" and constants.name_of(held) is None
    assert constants.name_of(constants["given"]) == "given"
    constants.let_go()
    assert constants["given"] is constants["given"] and len(made) == 5
    make = constants.maker("a")
    assert make() is constants["a"] and len(made) == 6
    del constants["a"]  # no step takes it, another constant is made of it
    assert make()[0] == 0 and len(made) == 7


def test_a_weight_said_by_what_it_is_made_of() -> None:
    constants, weight, factors = Constants(), torch.randn(40, 3, 1, 1), torch.rand(40, dtype=torch.float64)
    constants["weight"] = weight
    constants.derive("folded", weight.clone(), lambda: weight)
    constants.fold("folded", Filters.of(weight, factors))
    constants.derive("plus", weight.clone(), lambda: weight)
    constants.scale("plus", "folded", (1.0, 0.0))
    constants.derive("other", weight.clone(), lambda: weight)
    given, folded, plus = (constants.filters(name) for name in ("weight", "folded", "plus"))
    assert all(f.weight is weight for f in (given, folded, plus))
    assert given.factors is None and given.scales == folded.scales == (1.0, 1.0) and plus.scales == (1.0, 0.0)
    assert plus.factors.shape == (2, 64) and plus.factors.dtype == torch.float32  # whole panels
    torch.testing.assert_close(plus.factors[:, :40].double().sum(0), factors, rtol=2**-47, atol=0.0)
    beyond = Filters.of(weight[:2], torch.tensor([math.inf, -1e300], dtype=torch.float64)).factors
    assert beyond[:, :2].tolist() == [[math.inf, -math.inf], [0.0, 0.0]]
    assert constants.filters("other") is None
    del constants["folded"]
    assert constants.filters("folded") is None


def test_a_scaled_constant_is_no_more_than_itself_once_its_source_is_gone() -> None:
    constants = Constants()
    constants["weight"], constants["weight_plus"] = torch.ones(2), torch.ones(2)
    constants.scale("weight_plus", "weight", (1.0, 0.0))
    assert constants.scaled("weight_plus") == ("weight", (1.0, 0.0))
    assert constants.scaled("weight") is None
    del constants["weight"]
    assert constants.scaled("weight_plus") is None
    constants["weight"] = torch.zeros(2)
    del constants["weight_plus"]
    constants["weight_plus"] = torch.zeros(2)  # another tensor of that name
    assert constants.scaled("weight_plus") is None


def shifted_sum(y: Tensor) -> Tensor:
    return y[:, :, 1:] + y[:, :, :-1]


def shifted_difference(y: Tensor) -> Tensor:
    return y[:, :, 1:] - y[:, :, :-1]


def by_its_transpose(y: Tensor) -> Tensor:
    return y * y.transpose(2, 3)


def and_its_transpose(y: Tensor) -> Tensor:
    return y + y.transpose(2, 3)


def evens_by_odds(y: Tensor) -> Tensor:
    return y[:, ::2] * y[:, 1::2]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("meet", [shifted_sum, shifted_difference, by_its_transpose, and_its_transpose, evens_by_odds])
def test_views_of_one_memory_that_meet_in_a_step(meet: Callable[[Tensor], Tensor], backend: str) -> None:
    """Written over one of them, a step would read places of the other after it wrote them. Without ReLU guided backpropagation is
    the gradient."""

    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.head = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(meet(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    model, x = Meeting(), torch.randn(2, 3, 6, 6)
    model(x)
    model.eval()
    found = lrpfast.explain(model, x, target=1, composite="guided_backprop", seed="one", backend=backend)
    given = x.clone().requires_grad_()
    output = model(given)
    (gradient,) = torch.autograd.grad(output[:, 1].sum(), given)
    torch.testing.assert_close(found.output, output.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.relevance, gradient, rtol=1e-5, atol=1e-6)
