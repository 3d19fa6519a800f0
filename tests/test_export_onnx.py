"""Explanations in ONNX Runtime: the exported program gives the same maps, for any batch, without custom operators."""

import copy
import itertools
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.errors import InputError, OutputError, UnsupportedOperationError
from tests.networks import images, small_network, torchvision_network, with_statistics

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

COMPOSITES = ("epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat")


def export(model: nn.Module, inputs: torch.Tensor, composite: str, path: Path, **options: object) -> lrpfast.Explainer:
    bounds = {"low": -4.0, "high": 4.0} if lrpfast.composites.needs_range(composite) else {}
    explainer = lrpfast.Explainer(model, inputs, composite=lrpfast.composites.get(composite, **bounds), **options)
    explainer.export_onnx(path)
    return explainer


def session_of(path: Path) -> "onnxruntime.InferenceSession":
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def check(explainer: lrpfast.Explainer, path: Path, batches: list[torch.Tensor], classes: int) -> None:
    """ONNX Runtime's output and maps are those of the program, to 1e-4 of their size, for chosen classes and for the arg max."""
    session = session_of(path)
    program = explainer.program
    for inputs in batches:
        count = len(inputs)
        for target in (torch.arange(count) % classes, torch.full((count,), -1)):
            results = session.run(None, {"input": numpy.asarray(inputs), "target": numpy.asarray(target)})
            with torch.no_grad():
                expected = program(inputs, target)
            assert len(results) == len(expected)
            for result, reference in zip(results, expected, strict=True):
                actual = torch.from_numpy(result)
                assert actual.shape == reference.shape
                assert (actual - reference).norm() <= 1e-4 * reference.norm()
                assert reference.norm() > 0


def check_file(path: Path) -> None:
    """Opset 18 or newer, none but the standard's operators, and the batch the only free dimension."""
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    (opset,) = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    assert opset >= 18
    assert [value.name for value in model.graph.input] == ["input", "target"]
    assert [value.name for value in model.graph.output][:2] == ["output", "relevance"]
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param and not shape[0].HasField("dim_value")
    assert all(size.HasField("dim_value") for size in shape[1:])


class Branches(nn.Module):
    """Convolution and ReLU, then each branch on what they give and a ReLU, then a dense layer on all.

    An export takes seconds, so many layers share one: a branch that went wrong would put the map off by far more than the
    tolerance.
    """

    def __init__(self, branches: list[nn.Module], size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())
        self.branches = nn.ModuleList(branches)
        self.head = nn.Identity()
        with torch.no_grad():
            features = self(images(1, size, channels=channels)).shape[1]
        self.head = nn.Linear(features, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.cat([torch.relu(branch(x)).flatten(1) for branch in self.branches], 1))


class Cropped(nn.Module):
    """A layer on all but the last row and column."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[:, :, :-1, :-1])


def network(*layers: nn.Module, size: int | tuple[int, int], channels: int = 4) -> nn.Module:
    """A network of `Branches`."""
    torch.manual_seed(5)
    size = (size, size) if isinstance(size, int) else size
    model = Branches([copy.deepcopy(layer) for layer in layers], size, channels)
    return with_statistics(model, [images(8, size, channels=channels, seed=1)])


@pytest.mark.slow
@pytest.mark.parametrize("all_sizes", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    ("stride", "composite"),
    [
        pytest.param(stride, composite, marks=[] if stride == 1 + index else pytest.mark.exhaustive)
        for stride in (1, 2, 3)
        for index, composite in enumerate(COMPOSITES)
    ],
)
def test_convolutions(stride: int, composite: str, all_sizes: bool, tmp_path: Path) -> None:
    """Stride x dilation x groups, on features of an even and of an odd height and width: each dilation and each count of groups on both."""
    layers: list[nn.Module] = []
    for (row, dilation), (column, groups) in itertools.product(enumerate((1, 2)), enumerate((1, 2, 8))):
        outputs = 8 if groups == 8 else 6
        layer = nn.Conv2d(8, outputs, (3, 2), stride=stride, padding=1, dilation=dilation, groups=groups)
        both = [layer, Cropped(layer)]
        layers += both if all_sizes else [both[(row + column) % 2]]
    model = network(*layers, size=(12, 14))
    inputs = images(3, (12, 14), channels=4, seed=2)
    explainer = export(model, inputs, composite, tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 5)


# Between them and `COMPOSITES`, which other tests export, all operators that a composite makes of convolutions and dense layers.
_OWN_OPERATORS = ("overview", "excitation_backprop", "beta_smooth", "gamma")


@pytest.mark.slow
@pytest.mark.parametrize(
    "composite",
    [
        pytest.param(name, marks=[] if name in _OWN_OPERATORS else pytest.mark.exhaustive)
        for name in lrpfast.composites.names()
    ],
)
def test_composites(composite: str, tmp_path: Path) -> None:
    model = network(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), size=11)
    inputs = images(3, 11, channels=4, seed=2)
    explainer = export(model, inputs, composite, tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs], 5)


LAYERS: dict[str, list[nn.Module]] = {
    "pools_and_normalisations": [
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        nn.MaxPool2d(2, stride=1, dilation=2),
        nn.AdaptiveMaxPool2d(1),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, stride=2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, 5)),
        nn.AdaptiveAvgPool2d(16),
        nn.GroupNorm(2, 8),
        nn.BatchNorm2d(8),
        nn.InstanceNorm2d(8, affine=True),
    ],
    "transposed_convolutions_paddings_and_resampling": [
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4, dilation=2),
        nn.ConvTranspose2d(8, 3, 3, bias=False),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(8, 4, 3, padding="same", dilation=2),
        nn.ZeroPad2d(1),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.PixelShuffle(2),
    ],
    "activations": [
        nn.Sequential(nn.Conv2d(8, 3, 1), activation)
        for activation in (nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Tanh(), nn.ReLU6(), nn.ELU())
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
def test_other_layers(layers: str, tmp_path: Path) -> None:
    size = (11, 13)
    model = network(*LAYERS[layers], size=size)
    inputs = images(3, size, channels=4, seed=2)
    explainer = export(model, inputs, "epsilon_plus_flat", tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 5)


def test_uneven_adaptive_max_pool(tmp_path: Path) -> None:
    """Windows of several sizes have no operator in ONNX: the export may refuse, by name, but not write a wrong program."""
    model = network(nn.AdaptiveMaxPool2d(3), size=11)
    inputs = images(2, 11, channels=4, seed=2)
    try:
        explainer = export(model, inputs, "epsilon_plus_flat", tmp_path / "program.onnx")
    except UnsupportedOperationError as error:
        assert "adaptive_max_pool2d" in str(error)
        assert list(tmp_path.iterdir()) == []
    else:
        check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 5)


def test_recorded_layers_are_outputs(tmp_path: Path) -> None:
    model = network(nn.MaxPool2d(2), size=11)
    inputs = images(2, 11, channels=4, seed=2)
    explainer = export(model, inputs, "epsilon_plus_flat", tmp_path / "program.onnx", record=("branches.0",))
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs], 5)
    assert len(session_of(tmp_path / "program.onnx").get_outputs()) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "composite"),
    [
        pytest.param(n, c, marks=[] if (n, c) == ("small", "epsilon_plus_flat") else pytest.mark.exhaustive)
        for n in ("small", "resnet18", "vgg11_bn")
        for c in COMPOSITES
    ],
)
def test_networks(name: str, composite: str, tmp_path: Path) -> None:
    inputs = images(2, 64, seed=7)
    model = small_network(64) if name == "small" else torchvision_network(name)
    explainer = export(model, inputs, composite, tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 10 if name == "small" else 1000)


@pytest.mark.slow
def test_errors(tmp_path: Path) -> None:
    model = network(nn.Identity(), size=11)
    explainer = lrpfast.Explainer(model, images(1, 11, channels=4))
    with pytest.raises(InputError, match="18"):
        explainer.export_onnx(tmp_path / "program.onnx", opset=17)
    with pytest.raises(OutputError, match="missing"):
        explainer.export_onnx(tmp_path / "missing" / "program.onnx")
    with pytest.raises(InputError, match="example_inputs"):
        lrpfast.Explainer(model).export_onnx(tmp_path / "program.onnx")
    assert list(tmp_path.iterdir()) == []
