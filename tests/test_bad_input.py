"""Bad input: each kind raises its own error, whose message names the thing, and yields no map."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import composites, errors, rules


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 5)
    ).eval()


X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


@pytest.fixture(scope="module")
def explainer() -> lrpfast.Explainer:
    return lrpfast.Explainer(small(), X)


def with_value(value: float) -> torch.Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        (X.double(), errors.InputError, ["float64", "float32"]),
        ((X * 255).to(torch.uint8), errors.InputError, ["uint8", "floating point"]),
        (X.to("meta"), errors.InputError, ["meta", "cpu"]),
        (X[0, 0, 0], errors.InputError, ["[8]", "batch"]),
        ([X, "cat"], errors.InputError, ["input 1", "str"]),
        ("cat.jpg", errors.InputError, ["str"]),
        ((X, X), errors.CaptureError, ["Sequential"]),
        (X[:, :, :5, :5], errors.CaptureError, ["[batch, 3, 5, 5]", "'5'"]),
        (with_value(float("nan")), errors.NumericsError, ["input", "NaN", "sample 1"]),
        (with_value(float("inf")), errors.NumericsError, ["input", "infinity", "sample 1"]),
    ],
)
def test_inputs(explainer: lrpfast.Explainer, inputs, error: type, words: list[str]):
    with pytest.raises(error) as caught:
        explainer(inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_an_output_that_overflows():
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    x = torch.ones(3, 6)
    x[1] = 3e38
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(errors.NumericsError, match="output holds infinity in sample 1"):
        lrpfast.explain(model, x)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (5, ["5", "out of range", "0 to 4"]),
        (-1, ["-1", "out of range"]),
        (torch.tensor([0, 7]), ["7", "out of range"]),
        (torch.tensor([[0, 1], [2, 5]]), ["5", "out of range"]),
        (torch.tensor([0, 1, 2]), ["[3]", "[2]"]),
        (torch.zeros(2, 1, 1, dtype=torch.int64), ["[2, 1, 1]"]),
        (torch.zeros(2, 0, dtype=torch.int64), ["[N, 0]"]),
        (torch.zeros(2, 4), ["[2, 4]", "[2, 5]"]),
        (torch.tensor([True, False]), ["bool"]),
        (True, ["bool"]),
        ("cat", ["str"]),
    ],
)
def test_targets(explainer: lrpfast.Explainer, target, words: list[str]):
    with pytest.raises(errors.TargetError) as caught:
        explainer(X, target=target)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_target_that_holds_nan(explainer: lrpfast.Explainer):
    with pytest.raises(errors.NumericsError, match="target holds NaN in sample 1"):
        explainer(X, target=torch.tensor([[1.0] * 5, [float("nan")] * 5]))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"composite": "epsilon_pluss"}, errors.CompositeError, ["epsilon_pluss", "did you mean 'epsilon_plus'"]),
        ({"composite": "epsilon_gamma_box"}, errors.CompositeError, ["epsilon_gamma_box", "low", "high"]),
        ({"composite": 3}, errors.CompositeError, ["got int"]),
        ({"precision": "float8"}, errors.InputError, ["float8", "bfloat16"]),
        ({"backend": "cudnn"}, errors.InputError, ["cudnn", "auto"]),
        ({"record": ("layer9",)}, errors.InputError, ["layer9"]),
        ({"record": (0,)}, errors.InputError, ["(0,)", "names"]),
        ({"record": 0}, errors.InputError, ["0", "names"]),
        ({"composite": lrpfast.Composite([("conv", rules.ZPlus())])}, errors.RuleError, ["'5'", "linear", "custom"]),
        (
            {"composite": lrpfast.Composite([("any", rules.Epsilon()), ("head.*", rules.Zero())])},
            errors.CompositeError,
            ["head.*", "modules"],
        ),
        (
            {"composite": lrpfast.Composite([("conv", rules.Pass()), ("linear", rules.Zero())])},
            errors.RuleError,
            ["'0'", "shapes"],
        ),
        ({"composite": composites.epsilon_gamma_box(low=1, high=-1)}, errors.RuleError, ["'0'", "low", "high"]),
        ({"composite": composites.epsilon_gamma_box(low=[0, 0], high=1)}, errors.CompositeError, ["'0'", "[2]", "3"]),
    ],
)
def test_arguments(arguments: dict, error: type, words: list[str]):
    with pytest.raises(error) as caught:
        lrpfast.Explainer(small(), X, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: rules.Epsilon(-1.0),
        lambda: rules.ZPlus(float("nan")),
        lambda: rules.AlphaBeta(2.0, 2.0),
        lambda: rules.AlphaBeta(0.5, -0.5),
        lambda: rules.Gamma(-0.1),
        lambda: rules.ZBox(0.0),
        lambda: rules.SmoothReLU(0.0),
    ],
)
def test_rules_out_of_range(make):
    with pytest.raises(errors.RuleError):
        make()


def test_pairs_of_a_composite():
    with pytest.raises(errors.CompositeError, match="class Epsilon"):
        lrpfast.Composite([("conv", rules.Epsilon)])
    with pytest.raises(errors.CompositeError, match="pairs"):
        lrpfast.Composite(["conv"])
    with pytest.raises(errors.CompositeError, match="not a rule"):
        lrpfast.Composite([("conv", "epsilon")])


class Within(nn.Module):
    """A model with one odd step between two layers."""

    def __init__(self, step) -> None:
        super().__init__()
        self.first, self.odd, self.last = nn.Linear(6, 6), Step(step), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.odd(self.first(x)))


class Step(nn.Module):
    def __init__(self, step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x)


@pytest.mark.parametrize(
    ("step", "name"),
    [
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: torch.fft.fft(x).real, "fft"),
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: (x * 10).long().float(), "_to_copy"),
        (lambda x: torch.sin(x), "sin"),
        (lambda x: 1 / (2 + x.abs()), "div"),
        (lambda x: torch.clamp(x, min=x.flip(1)), "clamp"),
        (lambda x: torch.clamp(x, max=x.flip(1)), "clamp"),
        (lambda x: torch.clamp_min(torch.zeros(6), x), "clamp_min"),
        (lambda x: nn.functional.prelu(x, x[0, :1]), "prelu"),
    ],
)
def test_operations_without_a_rule_are_named(step, name: str):
    with pytest.raises(errors.UnsupportedOperationError) as caught:
        lrpfast.Explainer(Within(step), torch.randn(2, 6))
    assert name in str(caught.value) or "to" in str(caught.value)
    assert "'odd'" in str(caught.value)


def test_unpooling_is_named():
    """Its indices are the second result of a max pool, which no rule needs."""

    def step(x: torch.Tensor) -> torch.Tensor:
        pooled, indices = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.max_unpool2d(pooled, indices, 2)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Step(step), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(errors.UnsupportedOperationError, match=r"'max_unpool2d' in the module '1'"):
        lrpfast.Explainer(model, X)


def test_an_output_that_no_relevance_can_leave():
    with pytest.raises(errors.UnsupportedOperationError, match="comparisons alone"):
        lrpfast.Explainer(Step(lambda x: (x > 0).float()), torch.randn(2, 6))


def test_control_flow_on_values_is_located():
    def step(x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(errors.CaptureError) as caught:
        lrpfast.Explainer(Within(step), torch.randn(2, 6))
    assert "'odd'" in str(caught.value)
    assert "torch.where" in str(caught.value)


def test_several_outputs():
    with pytest.raises(errors.CaptureError, match="returns 2 tensors"):
        lrpfast.Explainer(Step(lambda x: (x, x.relu())), torch.randn(2, 6))


def test_training_mode_with_batch_norm():
    model = small()
    model[1].train()
    with pytest.raises(errors.CaptureError, match=r"BatchNorm2d '1' is in training mode.*eval"):
        lrpfast.Explainer(model, X)


def test_training_mode_without_batch_norm_leaves_dropout_out():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    x = torch.randn(2, 6)
    trained = lrpfast.explain(model.train(), x, composite="epsilon")
    assert torch.equal(trained.relevance, lrpfast.explain(model.eval(), x, composite="epsilon").relevance)


def test_batch_statistics():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval()
    with pytest.raises(errors.CaptureError, match="statistics of the batch"):
        lrpfast.Explainer(model, torch.randn(2, 6))


def test_a_mean_over_the_batch():
    with pytest.raises(errors.CaptureError, match="mean over dimension 0"):
        lrpfast.Explainer(Step(lambda x: x - x.mean(0, keepdim=True)), torch.randn(4, 6))


def test_one_output_for_the_whole_batch():
    with pytest.raises(errors.CaptureError, match=r"'mean'.*one number for the whole batch"):
        lrpfast.Explainer(Step(lambda x: x.mean()), torch.randn(4, 6))


class Shifted(nn.Module):
    """A model with a layer that runs on a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shift = nn.Linear(6, 3), nn.Linear(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.shift(torch.ones(x.shape[0], 2))


def test_a_layer_that_does_not_depend_on_the_input_has_no_relevance_to_record():
    x = torch.randn(4, 6)
    with pytest.raises(errors.InputError, match=r"'sh\*' fits shift, whose values do not depend on the input"):
        lrpfast.Explainer(Shifted(), x, "epsilon", record="sh*")
    found = lrpfast.explain(Shifted(), x, composite="epsilon", record=("*", "@features")).layers
    assert {name: list(part.shape) for name, part in found.items()} == {"first": [4, 3], "@features": [4, 6]}


def test_nothing_to_record():
    assert lrpfast.explain(small(), X, record=None).layers == {}


def test_not_a_model():
    with pytest.raises(errors.InputError, match="function"):
        lrpfast.Explainer(lambda x: x, X)


def test_before_the_first_call():
    explainer = lrpfast.Explainer(small())
    with pytest.raises(errors.InputError, match="example_inputs"):
        explainer.plan()


def test_seed(explainer: lrpfast.Explainer):
    with pytest.raises(errors.InputError, match="softmax"):
        explainer(X, seed="softmax")


@pytest.mark.parametrize(
    ("decides", "words"),
    [
        (lambda n: n == 1, "Eq(batch, 1)"),
        (lambda n: n < 2, "batch < 2"),
        (lambda n: n < 5, "batch < 5"),
        (lambda n: n % 8, "Mod(batch, 8)"),
    ],
)
def test_branches_on_the_size_of_the_batch_are_located(decides, words: str):
    """Traced with one batch, the program of another way would explain the others."""

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if decides(x.shape[0]) else x

    model = nn.Sequential(nn.Linear(6, 4), Branching()).eval()
    with pytest.raises(errors.CaptureError, match=re.escape(words)) as raised:
        lrpfast.Explainer(model, torch.randn(2, 6))
    assert f"{__file__}, line" in str(raised.value)


def test_a_branch_that_every_size_of_batch_takes_is_none():
    class Checking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] < 1 or x.shape[1] != 4:
                raise ValueError("four features are needed")
            return x * 2

    model = nn.Sequential(nn.Linear(6, 4), Checking()).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(lrpfast.explain(model, x).output, model(x).detach())


def test_a_size_that_is_returned_is_that_of_the_batch():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
            return self.layer(x), x.shape[0], 2 * x.shape[0] + 1

    explainer = lrpfast.Explainer(Sized().eval())
    for batch in (3, 1):
        assert explainer(torch.randn(batch, 6)).output[1:] == (batch, 2 * batch + 1)


def test_profile_checks_what_it_is_given(explainer: lrpfast.Explainer):
    with pytest.raises(errors.InputError, match="float64"):
        explainer.profile(torch.randn(2, 3, 8, 8).double())
    with pytest.raises(errors.InputError, match="repeats"):
        explainer.profile(torch.randn(2, 3, 8, 8), repeats=0)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_var", "5.weight"])
def test_a_parameter_that_holds_nan(name: str):
    """A convolution with its ReLU in one call would make zero of it, and a map."""
    model = small()
    model.state_dict()[name].flatten()[0] = float("nan")
    with pytest.raises(errors.NumericsError, match=f"'{re.escape(name)}' of the model holds NaN"):
        lrpfast.explain(model, X)


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus"])
def test_an_infinite_weight_behind_a_relu(composite: str):
    """It makes zero of the neuron's output, and NaN of the relevance, whose product with it is 0 * inf."""
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model[0].weight.data[3] = -torch.inf
    x = torch.rand(1, 16)
    assert model(x).isfinite().all()
    with pytest.raises(errors.NumericsError, match="relevance.* NaN"):
        lrpfast.explain(model, x, composite=composite)


def test_a_model_without_values():
    """As torch.device("meta") makes models, whose weights are to be loaded afterwards."""
    model = small()
    model[5].to("meta")
    with pytest.raises(errors.ModelError, match=r"'5\.weight' of the model has no values.*'meta'"):
        lrpfast.explain(model, X)
    with pytest.raises(errors.ModelError, match=r"'0\.weight' of the model has no values.*'meta'"):
        lrpfast.explain(model.to("meta"), X.to("meta"))


def test_a_parameter_that_comes_to_hold_nan():
    explainer = lrpfast.Explainer(small(), X)
    with torch.no_grad():
        explainer._model[0].bias[1] = float("nan")
    with pytest.raises(errors.NumericsError, match=r"'0\.bias' of the model holds NaN"):
        explainer(X)


@pytest.mark.parametrize(
    "last",
    [
        nn.RReLU().train(),
        Step(lambda h: h + torch.randn(h.shape[0], 4)),
        Step(lambda h: h * torch.empty_like(h).bernoulli_(0.5)),
        Step(torch.rand_like),
    ],
    ids=["rrelu", "randn", "bernoulli_", "rand_like"],
)
def test_random_numbers_in_forward(last: nn.Module):
    model = nn.Sequential(nn.Linear(6, 4), last)
    with pytest.raises(errors.CaptureError, match="is random"):
        lrpfast.explain(model, torch.randn(3, 6))


def test_a_random_slope_is_its_mean_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 4), nn.RReLU()).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(lrpfast.explain(model, x).output, model(x).detach())


def test_a_sparse_input(explainer: lrpfast.Explainer):
    with pytest.raises(errors.InputError, match="the input is sparse"):
        explainer(X.to_sparse())
