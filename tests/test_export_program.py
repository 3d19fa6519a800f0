"""The joint program outside of the explainer: called as a graph, compiled, saved, and loaded where no model is known."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.errors import InputError, OutputError, ProgramError, TargetError
from tests.networks import images, torchvision_network, with_statistics

REPOSITORY = Path(__file__).parent.parent


class SmallNet(nn.Module):
    """A residual block, a grouped strided convolution, both pools, a gate and a dense layer on signed features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 16, 3, stride=2, groups=4)
        self.gate = nn.Conv2d(16, 16, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.body(x))
        x = nn.functional.silu(self.down(x))
        x = x * torch.sigmoid(self.gate(self.pool(x)))
        return self.head(self.pool(x).flatten(1))


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return with_statistics(SmallNet(), [images(8, 17, seed=1)])


INPUTS = images(3, 17, seed=2)
LOW, HIGH = -4.0, 4.0
COMPOSITES = (
    "epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "excitation_backprop", "guided_backprop",
    "overview",
)  # fmt: skip


@functools.cache
def exported() -> torch.export.ExportedProgram:
    return torch.export.export(small_net(), (INPUTS,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


@functools.cache
def explainer_of(composite: str, record: tuple[str, ...] = ()) -> lrpfast.Explainer:
    bounds = {"low": LOW, "high": HIGH} if lrpfast.composites.needs_range(composite) else {}
    rules = lrpfast.composites.get(composite, **bounds)
    return lrpfast.Explainer(exported(), INPUTS, composite=rules, record=record)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative L2 distance: single values next to zero say nothing."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def targets(count: int) -> torch.Tensor:
    return torch.arange(count) % 5


@pytest.mark.parametrize("composite", COMPOSITES)
def test_program_gives_the_explainers_result(composite: str) -> None:
    explainer = explainer_of(composite, record=("stem", "down"))
    explanation = explainer(INPUTS, target=targets(3))
    with torch.no_grad():
        output, relevance, *layers = explainer.program(INPUTS, targets(3))
    close(output, explanation.output)
    close(relevance, explanation.relevance)
    assert len(layers) == 2
    for layer, recorded in zip(layers, explanation.layers.values(), strict=True):
        close(layer, recorded)


def test_program_takes_the_arg_max_for_minus_one() -> None:
    explainer = explainer_of("epsilon_plus_flat")
    expected = explainer(INPUTS)
    with torch.no_grad():
        _, relevance = explainer.program(INPUTS, torch.full((3,), -1))
        mixed = torch.stack([expected.target[0], torch.tensor(-1), torch.tensor(-1)])
        _, same = explainer.program(INPUTS, mixed)
    close(relevance, expected.relevance)
    close(same, expected.relevance)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_program_takes_any_batch(batch: int) -> None:
    explainer = explainer_of("epsilon_gamma_box")
    inputs = images(batch, 17, seed=4)
    with torch.no_grad():
        output, relevance = explainer.program(inputs, targets(batch))
    explanation = explainer(inputs, target=targets(batch))
    close(output, explanation.output)
    close(relevance, explanation.relevance)


# Each is compiled as C++ for long, and `test_compile` of tests/test_ops_declared.py has all operators: one, the rest on request.
@pytest.mark.parametrize(
    "composite",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "epsilon_gamma_box" else pytest.mark.exhaustive)
        for name in ("epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat", "guided_backprop")
    ],
)
def test_program_compiles_as_one_graph(composite: str) -> None:
    torch.compiler.reset()
    program = explainer_of(composite).program
    compiled = torch.compile(program, fullgraph=True)
    with torch.no_grad():
        for batch in (3, 5, 2):  # the second size makes the batch dynamic
            inputs = images(batch, 17, seed=4)
            for result, expected in zip(compiled(inputs, targets(batch)), program(inputs, targets(batch)), strict=True):
                close(result, expected)


# What a process does that has neither the models nor this package's tests: torch alone, then lrpfast.load.
READER = """
import sys
import torch
folder = sys.argv[1]
batches = torch.load(folder + "/batches.pt")
results = {name: {} for name in batches}
for name, saved in batches.items():
    program = torch.export.load(f"{folder}/{name}.pt2").module()
    results[name]["torch"] = [program(inputs, target)[1] for inputs, target in saved]
assert "lrpfast" not in sys.modules
import lrpfast
for name, saved in batches.items():
    loaded = lrpfast.load(f"{folder}/{name}.pt2")
    results[name]["lrpfast"] = [loaded(inputs, target=target).relevance for inputs, target in saved]
    results[name]["metadata"] = loaded.metadata
assert not any(name.split(".")[0] in ("tests", "torchvision") for name in sys.modules)
torch.save(results, folder + "/results.pt")
"""

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def explained_elsewhere(saved: dict[str, tuple[lrpfast.Explainer, Batches]], folder: Path) -> dict[str, dict]:
    """What one other process makes of the programs saved, by name: relevance for each batch and its targets, metadata."""
    for name, (explainer, _) in saved.items():
        explainer.save(folder / f"{name}.pt2", extra={"classes": ["a", "b"], "size": 17})
    torch.save({name: batches for name, (_, batches) in saved.items()}, folder / "batches.pt")
    (folder / "reader.py").write_text(READER)
    command = [sys.executable, str(folder / "reader.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def family(network: str) -> tuple[lrpfast.Explainer, Batches]:
    inputs = images(2, 64, seed=7)
    batches = [(inputs, torch.arange(2)), (images(1, 64, seed=8), torch.arange(1))]
    return lrpfast.Explainer(torchvision_network(network), inputs), batches


def assert_same_elsewhere(explainer: lrpfast.Explainer, batches: Batches, found: dict, tolerance: float) -> None:
    for index, (inputs, target) in enumerate(batches):
        expected = explainer(inputs, target=target).relevance
        close(found["torch"][index], expected, tolerance)
        close(found["lrpfast"][index], expected, tolerance)


@pytest.mark.slow
def test_saved_programs_explain_in_a_process_without_the_model(tmp_path: Path) -> None:
    batches = [(images(batch, 17, seed=batch), targets(batch)) for batch in (3, 1, 4)]
    composites = ("epsilon_plus_flat", "epsilon_gamma_box", "excitation_backprop")
    saved = {name: (explainer_of(name), batches) for name in composites}
    results = explained_elsewhere({**saved, "resnet18": (resnet18 := family("resnet18"))}, tmp_path)
    assert_same_elsewhere(*resnet18, results["resnet18"], 1e-3)
    for composite in composites:
        assert_same_elsewhere(*saved[composite], results[composite], 1e-5)
        metadata = results[composite]["metadata"]
        assert metadata["composite"] == composite
        assert metadata["extra"] == {"classes": ["a", "b"], "size": 17}
        assert metadata["input_shapes"] == [[3, 17, 17]]
        assert metadata["dtype"] == "float32"
        assert metadata["seed"] == "logit"
        assert metadata["lrpfast"] == lrpfast.__version__


@pytest.mark.exhaustive
def test_saved_families_explain_in_a_process_without_the_model(tmp_path: Path) -> None:
    saved = {network: family(network) for network in ("mobilenet_v3_small", "convnext_tiny")}
    results = explained_elsewhere(saved, tmp_path)
    for network, (explainer, batches) in saved.items():
        assert_same_elsewhere(explainer, batches, results[network], 1e-3)


def test_loaded_program_is_called_like_an_explainer(tmp_path: Path) -> None:
    explainer = explainer_of("epsilon_plus_flat", record=("stem",))
    explainer.save(tmp_path / "program.pt2")
    loaded = lrpfast.load(tmp_path / "program.pt2")
    several = torch.tensor([[0, 1], [2, 3], [4, 0]])
    for target in (None, 2, targets(3), several):
        here, there = explainer(INPUTS, target=target), loaded(INPUTS, target=target)
        close(there.output, here.output)
        close(there.relevance, here.relevance)
        torch.testing.assert_close(there.target, here.target)
        torch.testing.assert_close(there.conservation(), here.conservation(), rtol=1e-4, atol=0)
        assert list(there.layers) == list(here.layers) == ["stem"]
        close(there.layers["stem"], here.layers["stem"])
    with pytest.raises(InputError, match=r"\[3, 17, 17\]"):
        loaded(images(1, 19))
    with pytest.raises(TargetError):
        loaded(INPUTS, target=5)


def test_saving_nowhere_and_loading_what_is_no_program(tmp_path: Path) -> None:
    explainer = explainer_of("epsilon_plus_flat")
    with pytest.raises(OutputError, match="missing"):
        explainer.save(tmp_path / "missing" / "program.pt2")
    with pytest.raises(ProgramError, match=r"absent\.pt2"):
        lrpfast.load(tmp_path / "absent.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"not an archive")
    with pytest.raises(ProgramError, match=r"broken\.pt2"):
        lrpfast.load(tmp_path / "broken.pt2")
    foreign = torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),))
    torch.export.save(foreign, tmp_path / "foreign.pt2")
    with pytest.raises(ProgramError, match=r"foreign\.pt2"):
        lrpfast.load(tmp_path / "foreign.pt2")
    with pytest.raises(InputError, match="extra"):
        explainer.save(tmp_path / "program.pt2", extra={"not": {json}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pt2", "foreign.pt2"]


def test_constants_named_as_what_every_module_has(tmp_path: Path) -> None:
    """A buffer that is converted in the forward pass is a constant named after the operation."""

    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("scale", torch.full((4, 1, 1), 2.0, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.scale.to(x.dtype)
            return ((self.conv(x) + scale).relu() * scale).mean((2, 3))

    model, x = Converting().eval(), torch.randn(2, 3, 8, 8)
    explainer = lrpfast.Explainer(model, x)
    expected = explainer(x, target=1)
    output, relevance = explainer.program(x, torch.tensor([1, 1]))
    explainer.save(tmp_path / "program.pt2")
    saved = lrpfast.load(tmp_path / "program.pt2")(x, target=1)
    for found in (relevance, saved.relevance):
        torch.testing.assert_close(found, expected.relevance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output, model(x).detach())
