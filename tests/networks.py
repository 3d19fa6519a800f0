"""Networks with the statistics of trained ones, for tests that have nothing to download.

A freshly initialised network hides mistakes: its batch norms are the identity, its biases are zero, so a rule that drops a
bias or folds a batch norm wrongly still gives the right map. `torchvision_network` therefore draws the affine parameters and
the biases at random and then *measures* the batch-norm statistics on images, as training would have done.

Everything is seeded and leaves the global random state alone, so that a test's numbers do not depend on the tests before it.
"""

import copy
import functools

import torch
from torch import nn

from tests import torchvision_shim  # noqa: F401  (makes torchvision importable)

# The smallest comfortable input of each family: the deepest feature map keeps more than one pixel where that is cheap.
FAMILIES: dict[str, int] = {
    "alexnet": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "resnet18": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "squeezenet1_1": 64,
    "shufflenet_v2_x1_0": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "mnasnet1_0": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
}

# torchvision's own initialisation of these two draws truncated normals through scipy and takes seconds
_QUICK_INITIALISATION = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}


def images(
    count: int, size: int | tuple[int, int], *, channels: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Random pictures of zero mean and unit deviation: coarse blobs and fine grain, [count, channels, height, width]."""
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, generator=generator, dtype=torch.float64)
    grain = torch.randn(count, channels, height, width, generator=generator, dtype=torch.float64)
    blobs = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    picture = blobs + 0.5 * grain
    return ((picture - picture.mean()) / picture.std()).to(dtype)


def value_range(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel bounds [1, channels, 1, 1] that hold every value of `batch`, with room to spare."""
    axes = (0, 2, 3)
    return batch.amin(axes, keepdim=True) - 0.25, batch.amax(axes, keepdim=True) + 0.25


def with_statistics(model: nn.Module, passes: list[torch.Tensor], *, seed: int = 0) -> nn.Module:
    """Give `model` the statistics of a trained network, measured on the batches `passes`; return it in eval mode.

    Dense and convolution layers are scaled so that their outputs have unit deviation and get random biases, batch norms get random
    affine parameters and measured running statistics. Only the batch norms are in training mode meanwhile, so dropout and
    auxiliary heads stay out of it; `momentum` is None while measuring (a plain average over the passes) and then what it was.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    def scale(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        factor = 1 / output.std().clamp(min=1e-6)
        module.weight.mul_(factor)
        if module.bias is None:
            return output * factor
        old = module.bias.clone()
        module.bias.copy_(0.1 * draw(old))
        axes = (-1, *([1] * (output.ndim - 2))) if isinstance(module, nn.modules.conv._ConvNd) else (-1,)
        return (output - old.view(axes)) * factor + module.bias.view(axes)

    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    linear = (nn.Linear, nn.modules.conv._ConvNd)
    with torch.no_grad():
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.weight.copy_(1 + 0.2 * draw(norm.weight))
            norm.bias.copy_(0.1 * draw(norm.bias))
            norm.train()
        handles = [module.register_forward_hook(scale) for module in model.modules() if isinstance(module, linear)]
        model(passes[0])
        for handle in handles:
            handle.remove()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        for batch in passes:
            model(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


@functools.lru_cache(maxsize=2)  # the largest take half a gigabyte
def _network(name: str, size: int) -> nn.Module:
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20240917)
        model = torchvision.models.get_model(name, weights=None, **_QUICK_INITIALISATION.get(name, {}))
        return with_statistics(model, [images(16, size, seed=seed) for seed in (101, 102, 103)])


def torchvision_network(name: str, *, size: int | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A torchvision classifier in eval mode with random weights and measured batch-norm statistics. The caller owns it."""
    return copy.deepcopy(_network(name, FAMILIES.get(name, 64) if size is None else size)).to(dtype)


class SmallNet(nn.Module):
    """ResNet's layers, then AlexNet's: a strided stem, residual blocks of both kinds, pools, biases, dropout, dense layers."""

    def __init__(self) -> None:
        from torchvision.models.resnet import BasicBlock, Bottleneck

        super().__init__()
        projection = nn.Sequential(nn.Conv2d(12, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.Sequential(BasicBlock(12, 12), BasicBlock(12, 16, 2, projection), Bottleneck(16, 4))
        self.features = nn.Sequential(
            nn.Conv2d(16, 20, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(20, 16, 3, padding=1), nn.ReLU()
        )
        self.pool = nn.AdaptiveAvgPool2d(2)  # 3 x 3 by windows that overlap
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(self.blocks(self.stem(x)))).flatten(1))


def small_network(size: int) -> nn.Module:
    """A `SmallNet` in eval mode with random weights and measured batch-norm statistics, for images of `size` pixels a side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return with_statistics(SmallNet(), [images(16, size, seed=seed) for seed in (101, 102, 103)])


def rectified(model: nn.Module) -> nn.Module:
    """Replace each shared or in-place ReLU of a ResNet block by one module a call, in place; return `model`.

    Tools that attach to modules remember one input a module, so a ReLU that is called three times in a block, or that overwrites
    its input, is remembered wrongly. The function computed is the same.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, _Turns(_calls(module)))
    return model


def _calls(module: nn.Module) -> int:
    """How often a torchvision module calls its `relu` in one forward pass."""
    return {"BasicBlock": 2, "Bottleneck": 3}.get(type(module).__name__, 1)


class _Turns(nn.Module):
    """`count` ReLUs that take turns."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(count))
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        relu = self.relus[self.turn % len(self.relus)]
        self.turn += 1
        return relu(x)


def bias_free(model: nn.Module) -> nn.Module:
    """Take every additive constant out of `model`, in place: biases, batch-norm shifts and running means; return it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("bias"):
                parameter.zero_()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
    return model
