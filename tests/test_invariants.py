"""The invariants of RULES §7, and what follows from the definitions, on whole networks in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import rules
from lrpfast.rules import AlphaBeta, Epsilon, Flat, Gamma, Pass, Rule, WSquare, ZBox, Zero, ZPlus

DOUBLE = torch.float64


def network(bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 7, bias=bias),
    ).to(DOUBLE).eval()  # fmt: skip


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 14, 14, dtype=DOUBLE)


def everywhere(rule: Rule, **options) -> lrpfast.Composite:
    return lrpfast.Composite([("conv", rule), ("linear", rule)], **options)


def relevance(model: nn.Module, x: torch.Tensor, composite, **call) -> torch.Tensor:
    return lrpfast.Explainer(model, x, composite=composite)(x, **call).relevance


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("rule", [Zero(), Epsilon(0.0), ZPlus(0.0), AlphaBeta(2.0, 1.0, 0.0), Gamma(0.25, 0.0)])
def test_conservation_without_biases_and_stabilisers(rule: Rule):
    model, x = network(bias=False), images()
    explanation = lrpfast.Explainer(model, x, composite=everywhere(rule))(x)
    assert torch.allclose(explanation.conservation(), torch.ones(3, dtype=DOUBLE), rtol=0, atol=1e-9)


@pytest.mark.parametrize("first", [Flat(0.0), WSquare(0.0), ZBox(-9.0, 9.0, 0.0)])
def test_conservation_of_the_rules_for_the_first_layer(first: Rule):
    model, x = network(bias=False), images()
    composite = everywhere(Zero(), first=[("conv", first)])
    explanation = lrpfast.Explainer(model, x, composite=composite)(x, target=4, seed="one")
    assert torch.allclose(explanation.conservation(), torch.ones(3, dtype=DOUBLE), rtol=0, atol=1e-9)


def test_what_biases_absorb_is_reported():
    model = nn.Sequential(nn.Linear(2, 1)).to(DOUBLE)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        model[0].bias.fill_(1.0)
    x = torch.tensor([[1.0, 1.0]], dtype=DOUBLE)
    explanation = lrpfast.Explainer(model, x, composite="lrp_zero")(x)
    assert explanation.conservation().tolist() == pytest.approx([0.75], abs=1e-12)  # (1 + 2) of 4


def test_zero_is_gradient_times_input():
    model, x = network(bias=False), images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    assert distance(relevance(model, x, "lrp_zero", target=2), gradient * x.detach()) < 1e-9


@pytest.mark.parametrize("bias", [True, False])
def test_gamma_of_zero_is_epsilon(bias: bool):
    model, x = network(bias), images()
    assert distance(relevance(model, x, everywhere(Gamma(0.0))), relevance(model, x, everywhere(Epsilon(1e-6)))) < 1e-9


def test_gamma_tends_to_zplus():
    model, x = network(bias=True), images().abs()
    with torch.no_grad():
        model[-1].bias.add_(9.0)  # positive logits: where z < 0, Gamma tends to the negative contributions instead
    limit = relevance(model, x, everywhere(ZPlus()))
    maps = [distance(relevance(model, x, everywhere(Gamma(g))), limit) for g in (1e2, 1e4, 1e6)]
    assert maps[0] > 10 * maps[1] > 100 * maps[2]
    assert maps[2] < 1e-4


@pytest.mark.parametrize("bias", [True, False])
def test_alpha1_beta0_is_zplus(bias: bool):
    model, x = network(bias), images()
    assert distance(relevance(model, x, "alpha1_beta0"), relevance(model, x, everywhere(ZPlus()))) < 1e-12


@pytest.mark.parametrize(
    ("rule", "bias", "seed", "expected"),
    [
        (Epsilon(1e-6), None, 1.0, (1e6, -1e6)),
        (AlphaBeta(1.0, 0.0), -1.0, -1.0, (-1.0, 0.0)),
        (AlphaBeta(2.0, 1.0), -1.0, -1.0, (-2.0, 0.5)),
    ],
)
def test_worked_cases(rule: Rule, bias: float | None, seed: float, expected: tuple[float, float]):
    model = nn.Sequential(nn.Linear(2, 1, bias=bias is not None)).to(DOUBLE)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
        if bias is not None:
            model[0].bias.fill_(bias)
    x = torch.ones(1, 2, dtype=DOUBLE)
    result = relevance(model, x, everywhere(rule), target=torch.tensor([[seed]], dtype=DOUBLE))
    assert result[0].tolist() == pytest.approx(expected, rel=3e-6, abs=1e-12)


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_alpha2_beta1", "gamma", "excitation_backprop"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_map_depends_on_neither_its_batch_nor_its_layout(composite: str, backend: str):
    model = network(bias=True).float()
    x = images(6).float()
    explainer = lrpfast.Explainer(model, x[:2], composite=composite, backend=backend)
    together = explainer(x).relevance
    for index in range(6):
        alone = explainer(x[index : index + 1]).relevance[0]
        assert distance(alone, together[index]) < 1e-5
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x])[1],
        x.expand(6, 3, 14, 14),
    ):
        assert distance(explainer(other).relevance, together) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_empty_batch(backend: str):
    model = network(bias=True).float()
    explainer = lrpfast.Explainer(model, images().float(), backend=backend)
    explanation = explainer(images(3).float()[:0])
    assert explanation.relevance.shape == (0, 3, 14, 14)
    assert explanation.target.shape == (0,)


def test_seeds_and_targets():
    model, x = network(bias=True), images()
    explainer = lrpfast.Explainer(model, x, composite="epsilon")
    output = model(x).detach()
    target = torch.tensor([1, 6, 3])
    logits = output.gather(1, target[:, None])
    one_hot = torch.zeros_like(output).scatter(1, target[:, None], 1.0)
    by_logit, by_one = explainer(x, target), explainer(x, target, seed="one")
    assert distance(by_logit.relevance, explainer(x, one_hot * output).relevance) < 1e-9
    assert distance(by_one.relevance, explainer(x, one_hot).relevance) < 1e-9
    assert torch.allclose(by_logit.output_relevance, logits[:, 0], rtol=1e-12)
    assert torch.equal(by_one.output_relevance, torch.ones(3, dtype=DOUBLE))
    assert torch.equal(explainer(x).target, output.argmax(1))
    columns = torch.tensor([[1, 0], [6, 6], [3, 2]])
    several = explainer(x, columns)
    assert several.relevance.shape == (3, 2, 3, 14, 14)
    assert several.heatmap().shape == (3, 2, 14, 14)
    for k in range(2):
        assert distance(several.relevance[:, k], explainer(x, columns[:, k]).relevance) < 1e-12
    assert torch.equal(several.conservation()[:, 0], explainer(x, target).conservation())


def test_recorded_layers_hold_the_relevance_that_passes_them():
    model, x = network(bias=False), images()
    explainer = lrpfast.Explainer(model, x, composite=everywhere(Zero()), record=("*",))
    explanation = explainer(x, target=2)
    assert sorted(explanation.layers) == ["0", "1", "2", "3", "4", "5", "6"]
    value = x
    for index, module in enumerate(model):
        value = module(value).detach()
        tail = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model[index + 1 :](tail)[:, 2].sum(), tail)
        assert distance(explanation.layers[str(index)], gradient * value) < 1e-9, index


def test_precision():
    model, x = network(bias=True).float(), images().float()
    full = lrpfast.Explainer(model, x)(x, target=1)
    half = lrpfast.Explainer(model, x, precision="bfloat16")(x, target=1)
    assert half.relevance.dtype is half.output.dtype is torch.float32
    assert 1e-6 < distance(half.relevance, full.relevance) < 0.05
    double = lrpfast.Explainer(model.double(), x.double())(x.double(), target=1)
    assert distance(full.relevance.double(), double.relevance) < 1e-5


@pytest.mark.slow
def test_the_order_of_entries_and_of_first_layers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early, self.side = nn.Conv2d(4, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.early(x).relu() + self.side(x).relu()
            return self.head(self.late(y).relu().mean((2, 3)))

    explainer = lrpfast.Explainer(
        Net().eval(),
        torch.randn(1, 3, 9, 9),
        composite=lrpfast.Composite(
            [("lat*", Gamma(1.0)), (lambda layer: layer.kind == "conv", ZPlus()), ("any", Epsilon())],
            first=[("conv", Flat())],
        ),
    )
    chosen = {row.layer: row.rule for row in explainer.plan().rows if row.operation in ("convolution", "linear")}
    assert chosen == {"early": "Flat()", "side": "Flat()", "late": "Gamma(gamma=1)", "head": "Epsilon()"}


def test_pass_keeps_the_relevance():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).to(DOUBLE)
    x = images()
    seed = torch.randn_like(x)
    assert torch.equal(relevance(model, x, everywhere(Pass()), target=seed), seed)
    assert rules.Pass() == Pass()
