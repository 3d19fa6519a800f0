"""The user's model stays what it is, memory stays flat, and threads may share an explainer."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psutil
import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import errors
from lrpfast.changes import Watch


class Net(nn.Module):
    """In-place calls, a shared module, frozen and unfrozen parameters, a hook, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.drop, self.head = nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 5)
        self.register_buffer("scale", torch.ones(4, 1, 1))
        self.conv.weight.requires_grad_(False)
        self.hooked = 0
        self.relu.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.hooked += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.conv(x)))
        y = self.shared(x)
        y += x
        y = self.relu(self.shared(y) * self.scale)
        return self.head(self.drop(y.mean((2, 3))))


def state(model: nn.Module) -> dict:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": [(n, t.clone(), t.data_ptr(), t.stride(), t.dtype, t._version) for n, t in tensors],
        "grad": [(n, t.requires_grad, None if t.grad is None else t.grad.clone()) for n, t in tensors],
        "modules": [(n, type(m), m.training, m.forward.__func__) for n, m in model.named_modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_same(before: dict, after: dict) -> None:
    for (name, *old), (other, *new) in zip(before["values"], after["values"], strict=True):
        assert name == other and torch.equal(old[0], new[0]) and old[1:] == new[1:], name
    for (name, *old), (_, *new) in zip(before["grad"], after["grad"], strict=True):
        assert old[0] == new[0], name
        assert (old[1] is None and new[1] is None) or torch.equal(old[1], new[1]), name
    for part in ("modules", "hooks", "attributes"):
        assert before[part] == after[part]


@pytest.fixture
def model() -> Net:
    net = Net()
    net(torch.randn(4, 3, 8, 8))  # real statistics
    net.eval()
    net(torch.randn(2, 3, 8, 8)).sum().backward()  # gradients that must stay
    return net


@pytest.mark.parametrize("composite", ["epsilon_plus_flat", "epsilon_alpha2_beta1", "gamma", "guided_backprop"])
def test_after_success(model: Net, composite: str):
    before = state(model)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    explainer = lrpfast.Explainer(model, x, composite=composite, record=("relu",))
    result = explainer(x, target=torch.tensor([[0, 1], [2, 3]]))
    assert_same(before, state(model))
    assert x.grad is None and not result.relevance.requires_grad
    result.relevance.add_(1)  # what is returned is the caller's own
    result.output.mul_(0)
    assert torch.equal(explainer(x).output, model(x).detach()) or torch.allclose(
        explainer(x).output, model(x), rtol=1e-5
    )
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: lrpfast.explain(m, torch.randn(2, 3, 2, 2)), errors.CaptureError),
        (lambda m: lrpfast.explain(m, torch.full((2, 3, 8, 8), float("nan"))), errors.NumericsError),
        (lambda m: lrpfast.explain(m, torch.randn(2, 3, 8, 8), target=9), errors.TargetError),
        (lambda m: lrpfast.explain(m, torch.randn(2, 3, 8, 8), composite=lrpfast.Composite()), errors.RuleError),
        (
            lambda m: lrpfast.explain(nn.Sequential(m, Sorted()), torch.randn(2, 3, 8, 8)),
            errors.UnsupportedOperationError,
        ),
        (lambda m: lrpfast.explain(nn.Sequential(m, Branching()), torch.randn(2, 3, 8, 8)), errors.CaptureError),
        (lambda m: lrpfast.explain(m.train(), torch.randn(2, 3, 8, 8)), errors.CaptureError),
    ],
)
def test_after_an_error(model: Net, change, error: type):
    if error is errors.CaptureError:
        model.train(False)
    before = state(model)
    with pytest.raises(error):
        change(model)
    if model.training:  # the last case asked for it itself
        model.eval()
    assert_same(before, state(model))


class Sorted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(1).values


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def double_counted(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def double_data(weight: torch.Tensor) -> None:
    weight.data.mul_(2.0)


def double_array(weight: torch.Tensor) -> None:
    weight.detach().numpy()[...] *= 2


@pytest.mark.parametrize("double", [double_counted, double_data, double_array])
def test_changed_weights_are_noticed(model: Net, double: Callable[[torch.Tensor], None]):
    x = torch.randn(2, 3, 8, 8)
    explainer = lrpfast.Explainer(model, x, composite="epsilon")
    first = explainer(x).relevance
    double(model.head.weight)
    changed = explainer(x).relevance
    assert not torch.allclose(first, changed)
    assert torch.equal(changed, lrpfast.explain(model, x, composite="epsilon").relevance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "arranged",
    [
        lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last), lambda t: t.mT, lambda t: t[:1, :1],
        lambda t: torch.cat([t, t])[3:],
    ],
)  # fmt: skip
def test_values_are_looked_at_wherever_they_lie(dtype: torch.dtype, arranged: Callable[[torch.Tensor], torch.Tensor]):
    net = nn.Module()
    net.weight = nn.Parameter(arranged(torch.randn(7, 5, 3, 3).to(dtype)))
    net.other, net.count = nn.Parameter(torch.randn(3)), nn.Parameter(torch.arange(3), requires_grad=False)
    watch = Watch(net)
    before = watch.state()
    assert watch.state() == before
    net.weight.data.add_(1)
    after = watch.state()
    assert after != before and after[:-1] == before[:-1]
    net.weight.data = net.weight.data.clone()
    assert watch.state()[0] != after[0]
    assert watch.state() == watch.state()


def test_the_models_dtype_is_that_of_its_parameters():
    """Not of a buffer that stands before them in the order of modules, and is of another dtype for good reason."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).to(torch.bfloat16)
    net.register_buffer("table", torch.ones(3))
    found = lrpfast.explain(net, torch.randn(2, 3, 2, 2, dtype=torch.bfloat16), target=1, composite="epsilon")
    assert found.relevance.dtype is torch.bfloat16


@pytest.mark.slow
def test_memory_stays_flat():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 15 * 15, 10)
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    explainer = lrpfast.Explainer(net, x)
    process = psutil.Process()

    def used() -> int:
        gc.collect()
        return process.memory_info().rss

    for _ in range(100):
        explainer(x)
    before = used()
    for _ in range(1000):
        explainer(x)
    # One call makes about 2 MB of values: a leak of one buffer a call would come to more than 50 MB.
    assert used() - before < 16 * 2**20


def test_threads_share_an_explainer(model: Net):
    inputs = [torch.randn(n, 3, 8, 8) for n in (1, 2, 3, 4)]
    explainer = lrpfast.Explainer(model, inputs[0])
    expected = [explainer(x).relevance for x in inputs]
    failures: list[str] = []

    def work(offset: int) -> None:
        for step in range(40):
            index = (step + offset) % len(inputs)
            if not torch.equal(explainer(inputs[index]).relevance, expected[index]):
                failures.append(f"thread {offset}, step {step}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def in_threads(*calls: Callable[[], None]) -> list[BaseException]:
    """What was raised by calls made at once."""
    raised: list[BaseException] = []
    together = threading.Barrier(len(calls))

    def run(call: Callable[[], None]) -> None:
        together.wait()
        try:
            call()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.slow
def test_explainers_are_made_saved_and_called_in_threads(model: Net, tmp_path):
    """torch.export keeps what it is at in places that all threads share."""
    own = lrpfast.Explainer(model, torch.randn(1, 3, 8, 8))
    sizes = (7, 8, 9, 10)
    expected = [lrpfast.explain(model, torch.ones(2, 3, n, n), target=1).relevance for n in sizes]
    found: dict[object, torch.Tensor] = {}

    def make(n: int) -> None:
        found[n] = lrpfast.Explainer(model)(torch.ones(2, 3, n, n), target=1).relevance

    def shared(n: int) -> None:
        found[n, "shared"] = own(torch.ones(2, 3, n, n), target=1).relevance
        own.save(tmp_path / f"{n}.pt2")

    assert in_threads(*(lambda n=n: make(n) for n in sizes), *(lambda n=n: shared(n) for n in sizes)) == []
    for n, relevance in zip(sizes, expected, strict=True):
        assert torch.equal(found[n], relevance) and torch.equal(found[n, "shared"], relevance)


def default_dtype(dtype: torch.dtype) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def changed() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: torch.inference_mode(),
        default_dtype(torch.float64),
        default_dtype(torch.bfloat16),
    ],
    ids=["autocast", "default device", "inference mode", "float64", "bfloat16"],
)
def test_surroundings_change_no_map(surroundings, tmp_path):
    """Winograd's filtering, products, strided and dense layers, each with memory that kernels write to."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1),
        nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 32, 3, 2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 20),
        nn.ReLU(), nn.Linear(20, 5),
    ).eval()  # fmt: skip
    x = torch.randn(20, 3, 12, 12)
    before = lrpfast.Explainer(model, x, composite="epsilon_plus")
    expected = before(x)
    before.save(tmp_path / "program.pt2")
    saved = lrpfast.load(tmp_path / "program.pt2")
    with surroundings():
        maps = [before(x), lrpfast.Explainer(model, x, composite="epsilon_plus")(x), saved(x)]
    for found in maps:
        assert found.relevance.dtype == torch.float32 and found.relevance.device.type == "cpu"
        torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.relevance, expected.relevance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(1, nn.Tanh()),
        lambda m: setattr(m[1], "negative_slope", 0.9),
        lambda m: setattr(m[2], "kernel_size", 3),
        lambda m: m[0].register_forward_hook(lambda module, inputs, output: output * 3),
    ],
    ids=["module", "slope", "size", "hook"],
)
def test_what_decides_a_forward_pass_is_watched(change):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    x = torch.randn(2, 3, 9, 9)
    explainer = lrpfast.Explainer(model, x)
    before = explainer(x).output
    change(model)
    after = explainer(x).output
    torch.testing.assert_close(after, model(x).detach())
    assert not torch.allclose(before, after, rtol=1e-3)


def test_a_counter_is_no_change(model: Net):
    x = torch.randn(2, 3, 8, 8)
    explainer = lrpfast.Explainer(model, x)
    program = explainer._latest
    model(x)
    assert model.hooked > 0
    explainer(x)
    assert explainer._latest is program


class Remembering(nn.Module):
    """Sets an attribute, and puts something into a container that another module has, too."""

    def __init__(self, shared: list) -> None:
        super().__init__()
        self.shared, self.last = shared, None
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = x
        self.shared.append(x.shape[1])
        return self.conv(x)


def test_attributes_are_what_they_were():
    shared = ["before"]
    model = nn.Sequential(Remembering(shared), Remembering(shared), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    lrpfast.explain(model, torch.randn(2, 3, 8, 8))
    assert model[0].shared is shared and model[1].shared is shared
    assert shared == ["before"] and model[0].last is None


def test_a_program_is_the_callers_to_change(model: Net):
    x = torch.randn(2, 3, 8, 8)
    explainer = lrpfast.Explainer(model, x)
    before = explainer(x).relevance
    program = explainer.program
    (output,) = [n for n in program.graph.nodes if n.op == "output"]
    output.args = (output.args[0][:1],)
    program.recompile()
    assert len(program(x, torch.tensor([1, 1]))) == 1
    assert len(explainer.program(x, torch.tensor([1, 1]))) == 2
    torch.testing.assert_close(explainer(x, target=[1, 1]).relevance, lrpfast.explain(model, x, [1, 1]).relevance)
    assert torch.equal(explainer(x).relevance, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_an_explainer_is_copied_as_its_model_and_options(model: Net, copied):
    x = torch.randn(2, 3, 8, 8)
    options = {"composite": "epsilon_gamma_box", "precision": "float32", "backend": "torch", "record": ("shared",)}
    options["composite"] = lrpfast.composites.get("epsilon_gamma_box", low=-4.0, high=4.0)
    model.relu._forward_hooks.clear()  # a bound method of the model, of which a copy would be another's
    explainer = lrpfast.Explainer(model, x, **options)
    other = copied(explainer)
    assert other._model is not model
    expected, found = explainer(x), other(x)
    assert torch.equal(found.relevance, expected.relevance)
    assert torch.equal(found.layers["shared"], expected.layers["shared"])
