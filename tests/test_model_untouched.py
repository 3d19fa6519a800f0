"""The user's model stays what it is, memory stays flat, and threads may share an explainer."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

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
