"""zennit as an oracle: the relevance that zennit assigns, called the way its users call it, with its weak spots evened out.

Three things about zennit 0.5.1 are settled on a private copy of the model, so that what is compared is the mathematics:

* its merged batch norm keeps `eps` and so still divides by sqrt(1 + eps); with `exact=True` the copy's `eps` moves into the
  running variance first, which leaves the model's function as it was and makes the merged batch norm the identity;
* its hooks remember one input a module, which in-place or shared ReLUs overwrite: the copy has a ReLU a call;
* it relies on the order in which modules were registered, which is the order of execution in the networks used here.

zennit is imported inside the functions: it is a dependency of the tests and the benchmarks alone.
"""

import copy
from typing import Any

import torch
from torch import nn

from tests import torchvision_shim  # noqa: F401  (zennit imports torchvision)
from tests.networks import rectified

COMPOSITES = (
    "epsilon_plus",
    "epsilon_plus_flat",
    "epsilon_gamma_box",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "excitation_backprop",
    "deconvnet",
    "guided_backprop",
    "beta_smooth",
)


def zennit_composite(name: str, model: nn.Module, low: Any = None, high: Any = None) -> Any:
    """zennit's composite of that name, with the canonizer that zennit has for `model`."""
    from torchvision.models.resnet import BasicBlock, Bottleneck
    from zennit.composites import COMPOSITES as registered
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    has_blocks = any(isinstance(module, (BasicBlock, Bottleneck)) for module in model.modules())
    canonizer = ResNetCanonizer() if has_blocks else VGGCanonizer()
    options = {"low": low, "high": high} if name == "epsilon_gamma_box" else {}
    return registered[name](canonizers=[canonizer], **options)


def zennit_seed(output: torch.Tensor, targets: torch.Tensor, seed: str = "logit") -> torch.Tensor:
    """The relevance at the output [N, C]: the target's logit or one at the target, zero elsewhere."""
    chosen = nn.functional.one_hot(targets, output.shape[1]).to(output)
    return chosen * output if seed == "logit" else chosen


def zennit_model(model: nn.Module, *, exact: bool = True) -> nn.Module:
    """A private copy of `model` that zennit explains faithfully; with `exact`, its merged batch norms are the identity."""
    model = rectified(copy.deepcopy(model)).eval()
    if exact:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var += module.eps
                module.eps = 0.0
    return model


def zennit_attribute(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    composite_name: str,
    low: Any = None,
    high: Any = None,
    *,
    seed: str = "logit",
) -> torch.Tensor:
    """As `zennit_relevance`, on a model that `zennit_model` made; it is the same afterwards."""
    from zennit.attribution import Gradient

    composite = zennit_composite(composite_name, model, low, high)
    with Gradient(model=model, composite=composite) as attributor:
        _, relevance = attributor(inputs.clone(), lambda output: zennit_seed(output, targets, seed).detach())
    return relevance.detach()


def zennit_relevance(
    model: nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    composite_name: str,
    low: Any = None,
    high: Any = None,
    *,
    seed: str = "logit",
    exact: bool = True,
) -> torch.Tensor:
    """Relevance of `inputs` [N, ...] for the classes `targets` [N], in the dtype of `model` and `inputs`.

    `low` and `high` bound the data (numbers or tensors that broadcast against one sample, batch dimension included) and are read by
    `epsilon_gamma_box` alone. `model` is copied, never touched.
    """
    return zennit_attribute(zennit_model(model, exact=exact), inputs, targets, composite_name, low, high, seed=seed)
