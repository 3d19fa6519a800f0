"""A batch that is run in parts, and weights that are let go and made again: neither changes what comes out."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.assign import assign
from lrpfast.canonical import canonicalise, layers
from lrpfast.capture import capture
from lrpfast.errors import InputError, NumericsError
from lrpfast.relevance import transform
from lrpfast.runtime import executor


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 6 * 6, 5),
    ).eval()  # fmt: skip


X = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TARGETS = {
    "arg max": None,
    "one class": 3,
    "a class a sample": torch.arange(7) % 5,
    "classes a sample": torch.stack([torch.arange(7) % 5, torch.full((7,), 2)], 1),
    "relevance": torch.randn(7, 5, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture
def parts_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_bytes_a_sample", lambda *_: executor._PART_BYTES // 3)


@pytest.mark.parametrize("name", TARGETS)
def test_parts_make_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, target = model().double(), TARGETS[name]
    target = target.double() if name == "relevance" else target
    whole = lrpfast.Explainer(network, X.double(), record=("4",))(X.double(), target=target)
    monkeypatch.setattr(executor, "_bytes_a_sample", lambda *_: executor._PART_BYTES // 3)
    explainer = lrpfast.Explainer(network, X.double(), record=("4",))
    compiled = explainer._latest
    assert compiled.executor(compiled.default_seed, False, 7).chunks(7) == [(0, 3), (3, 6), (6, 7)]
    found = explainer(X.double(), target=target)
    for a, b in (
        (found.relevance, whole.relevance),
        (found.output, whole.output),
        (found.layers["4"], whole.layers["4"]),
        (found.output_relevance, whole.output_relevance),
        (found.target, whole.target),
    ):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class Mixed(nn.Module):
    def __init__(self, mix) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(6, 6), nn.Linear(6, 3), mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mix(self.first(x)).relu())


@pytest.mark.parametrize(
    ("mix", "meet"),
    [
        (lambda h: h * h.softmax(0), True),
        (lambda h: h + h.flip(0), True),
        (lambda h: h / h.abs().max(), True),
        (lambda h: h - h.mean(1, keepdim=True), False),
        (lambda h: h * h.softmax(1), False),
        (lambda h: (h @ h.t()).softmax(1) @ h, True),
        (lambda h: h.t().softmax(1).t(), True),
        (lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)], True),
        (lambda h: h[:, torch.tensor([3, 2, 1, 0, 4, 5])], False),
        (lambda h: h.reshape(6, -1).t(), True),  # in another order
        (lambda h: h.t().contiguous().reshape(3, 2, -1).flatten(0, 1).t(), False),
        (lambda h: h.t().reshape(-1, 1).reshape(6, -1).t(), False),
        (lambda h: h.t().softmax(0).t(), False),
    ],
)
@pytest.mark.usefixtures("parts_of_three")
def test_a_batch_whose_samples_meet_is_explained_as_a_whole(mix, meet: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 6)
    explainer = lrpfast.Explainer(Mixed(mix).eval(), x)
    compiled = explainer._latest
    assert (len(compiled.executor(compiled.default_seed, False, 8).chunks(7)) == 1) is meet
    torch.testing.assert_close(explainer(x).output, explainer._model(x))


def test_parts_are_of_one_size() -> None:
    explainer = lrpfast.Explainer(model(), X)
    compiled = explainer._latest
    run = compiled.executor(compiled.default_seed, False, 8)
    run._part = 8
    assert run.chunks(0) == [(0, 0)]
    assert run.chunks(8) == [(0, 8)]
    assert run.chunks(9) == [(0, 5), (5, 9)]
    assert [end - begin for begin, end in run.chunks(100)] == [8] * 12 + [4]
    run._part = None  # on a GPU
    assert run.chunks(1000) == [(0, 1000)]


@pytest.mark.usefixtures("parts_of_three")
def test_errors_name_the_sample_of_the_batch() -> None:
    network = model()
    with torch.no_grad():
        network[0].weight.fill_(10)
    explainer = lrpfast.Explainer(network, X)
    x = X.clone()
    x[5] = 3e38  # finite, and overflows in the network
    with pytest.raises(NumericsError, match="sample 5 of the batch"):
        explainer(x)


def test_estimate_of_what_lives() -> None:
    """Of this network three values of the first layer's size live at once at most: its output, z⁺, and s."""
    explainer = lrpfast.Explainer(model(), X)
    compiled = explainer._latest
    run = compiled.executor(compiled.default_seed, False, 8)
    largest = 8 * 16 * 16 * 4  # bytes a sample
    assert 4 * largest < executor._PART_BYTES // run._part < 6 * largest


def test_derived_weights_are_let_go_and_made_again(tmp_path: Path) -> None:
    network = model()
    explainer = lrpfast.Explainer(network, X)
    compiled = explainer._latest
    program = compiled.joint(compiled.default_seed).program
    folded = [name for name in program.constants if name.endswith("_folded")]
    plus = [name for name in program.constants if name.endswith("_plus")]
    assert folded and plus
    assert all(program.constants._tensors[name] is None for name in (*folded, *plus))
    before = explainer(X)
    made = program.constants[folded[0]]
    expected = (
        network[0].weight * (network[1].weight / (network[1].running_var + network[1].eps).sqrt())[:, None, None, None]
    )
    torch.testing.assert_close(made, expected)
    reference = weakref.ref(made)
    explainer.save(tmp_path / "program.pt2")
    assert torch.allclose(lrpfast.load(tmp_path / "program.pt2")(X).relevance, before.relevance, rtol=1e-4, atol=1e-6)
    compiled.executor(compiled.default_seed, True, 8)  # another executor: what it derives is let go with the rest
    del made
    gc.collect()
    assert reference() is None


def test_derived_weights_are_made_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the program is built, which needs their shape alone; and they are what was said of them."""
    made: list[torch.Tensor] = []
    scale = layers._scale_outputs
    monkeypatch.setattr(layers, "_scale_outputs", lambda *args: made.append(scale(*args)) or made[-1])
    network = model().to(memory_format=torch.channels_last)
    program = canonicalise(capture(network, (X,)).program)
    joint = transform(program, assign(program, lrpfast.composites.get("epsilon_plus"))).program
    assert not made
    for made_of, least in ((program, 1), (joint, 2)):
        derived = [n for n in made_of.graph.nodes if n.op == "get_attr" and made_of.constants.is_derived(n.target)]
        assert len(derived) >= least  # the folded weight; its positive part
        for node in derived:
            real, fake = made_of.constants[node.target], node.meta["val"]
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def test_a_changed_model_is_not_saved_under_its_old_program(tmp_path: Path) -> None:
    network = model()
    explainer = lrpfast.Explainer(network, X)
    with torch.no_grad():
        network[4].weight.mul_(2)
    with pytest.raises(InputError, match="changed since"):
        explainer.save(tmp_path / "program.pt2")
    assert not (tmp_path / "program.pt2").exists()
    explainer(X)
    explainer.save(tmp_path / "program.pt2")
