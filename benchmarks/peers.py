"""The things that are timed: each is built once, outside of the timing, and is then a call without arguments.

All explain the same inputs for the same targets, threads and memory format. zennit is used as its documentation shows, with the
composite and the canonizer registered once before the timing, which is the best that its users can do.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The range of the pictures after the normalisation that torchvision's models expect
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
LOW, HIGH = (0 - MEAN) / DEVIATION, (1 - MEAN) / DEVIATION


@dataclasses.dataclass(frozen=True)
class Workload:
    """A user's model in eval mode and what is to be explained."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor


def workload(name: str, batch: int, size: int = 224) -> Workload:
    """A torchvision network with measured batch-norm statistics and pictures, channels last, the predicted classes as targets."""
    from tests.networks import images, torchvision_network

    model = torchvision_network(name, size=size).to(memory_format=torch.channels_last)
    inputs = images(batch, size, seed=7)
    low, high = LOW.view(1, 3, 1, 1), HIGH.view(1, 3, 1, 1)
    inputs = inputs.clamp(low, high).to(memory_format=torch.channels_last)
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    return Workload(model, inputs, targets)


def composite(name: str) -> Any:
    """lrpfast's composite of that name, with the range of the data where it needs one."""
    from lrpfast import composites

    options = {"low": LOW, "high": HIGH} if composites.needs_range(name) else {}
    return composites.get(name, **options)


def forward(work: Workload) -> Callable[[], object]:
    """The user's own model: the unit of every ratio."""

    def call() -> Tensor:
        with torch.no_grad():
            return work.model(work.inputs)

    return call


def gradient(work: Workload) -> Callable[[], object]:
    """torch's own gradient of the targets' logits with respect to the input."""

    def call() -> Tensor:
        x = work.inputs.detach().requires_grad_()
        logits = work.model(x).gather(1, work.targets[:, None])
        return torch.autograd.grad(logits.sum(), x)[0]

    return call


def zennit(work: Workload, name: str) -> Callable[[], object]:
    """zennit's Gradient attributor with its own composite."""
    from zennit.attribution import Gradient

    from tests.oracles.zennit_oracle import zennit_composite, zennit_seed

    model = copy.deepcopy(work.model)
    attributor = Gradient(
        model=model, composite=zennit_composite(name, model, LOW.view(1, 3, 1, 1), HIGH.view(1, 3, 1, 1))
    )
    attributor.__enter__()  # registered for good: the copy lives as long as the timing

    def call() -> object:
        return attributor(work.inputs, lambda output: zennit_seed(output, work.targets).detach())

    return call


def lrpfast(work: Workload, name: str, *, backend: str, precision: str | None = None) -> Callable[[], object]:
    """An explainer, built for the inputs."""
    import lrpfast as package

    explainer = package.Explainer(
        work.model, work.inputs, composite=composite(name), backend=backend, precision=precision
    )

    def call() -> object:
        return explainer(work.inputs, target=work.targets)

    return call


def compiled(work: Workload, name: str) -> Callable[[], object]:
    """`torch.compile` of the same program, compiled before the timing."""
    import lrpfast as package

    explainer = package.Explainer(work.model, work.inputs, composite=composite(name), backend="torch")
    program = torch.compile(explainer.program, fullgraph=True)

    def call() -> object:
        with torch.no_grad():
            return program(work.inputs, work.targets)

    return call


# Convolutions a layer in the cheapest exact schedule of each composite: (forward, input gradient) where the output is used
# by a ReLU alone, and where it is signed. The first layer is counted like the others: it is a small part.
SCHEDULES = {
    "epsilon_plus_flat": ((2, 1), (2, 1)),
    "epsilon_gamma_box": ((2, 1), (2, 2)),
    "epsilon_alpha2_beta1_flat": ((3, 2), (3, 2)),
}


def convolutions_alone(work: Workload, name: str) -> Callable[[], object]:
    """The convolutions and dense layers of the schedule with nothing between them: what no elementwise kernel can undercut.

    The elementwise steps, the pools and the layout of what they hand on are left out, so this is a bound for an implementation that
    calls torch's convolutions one by one.
    """
    rectified, signed = SCHEDULES[name]
    calls: list[Callable[[], object]] = []
    for module, x, output, only_relu in _layers(work):
        forwards, backwards = rectified if only_relu else signed
        if isinstance(module, nn.Linear):
            calls.append(lambda x=x, m=module: torch.addmm(m.bias, x, m.weight.t()))
            if output.shape[1] != 1000:  # the logit layer gathers rows
                calls.append(lambda s=output, m=module: s @ m.weight)
            continue
        calls += [lambda x=x, m=module: m._conv_forward(x, m.weight, m.bias)] * forwards
        calls += [lambda x=x, s=output, m=module: _input_gradient(s, x, m)] * backwards

    def call() -> None:
        with torch.no_grad():
            for step in calls:
                step()

    return call


def _input_gradient(s: Tensor, x: Tensor, module: Any) -> Tensor:
    return torch.ops.aten.convolution_backward(
        s, x, module.weight, None, module.stride, module.padding, module.dilation, False, [0, 0], module.groups,
        [True, False, False],
    )[0]  # fmt: skip


def _layers(work: Workload) -> list[tuple[Any, Tensor, Tensor, bool]]:
    """Dense and convolution modules in order, with input, output, and whether only a ReLU reads the (normalised) output."""
    graph = torch.fx.symbolic_trace(work.model)
    modules = dict(graph.named_modules())
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(
                lambda m, args, output, path=path: values.__setitem__(path, (args[0].clone(), output.clone()))
            )
    with torch.no_grad():
        graph(work.inputs)
    found = []
    for node in graph.graph.nodes:
        if node.op != "call_module" or node.target not in values:
            continue
        last = node
        users = list(last.users)
        if len(users) == 1 and isinstance(modules.get(str(users[0].target)), nn.BatchNorm2d):
            last = users[0]
        users = list(last.users)
        only_relu = len(users) == 1 and isinstance(modules.get(str(users[0].target)), nn.ReLU)
        found.append((modules[node.target], *values[node.target], only_relu))
        modules[node.target]._forward_hooks.clear()
    return found
