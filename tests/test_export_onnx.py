"""Explanations in ONNX Runtime: the exported program gives the same maps, for any batch, without custom operators."""

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import lrpfast
from lrpfast.errors import InputError, OutputError
from tests.networks import images, torchvision_network, with_statistics

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

COMPOSITES = ("epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1_flat")


def export(model: nn.Module, inputs: torch.Tensor, composite: str, path: Path, **options: object) -> lrpfast.Explainer:
    bounds = {"low": -4.0, "high": 4.0} if lrpfast.composites.needs_range(composite) else {}
    explainer = lrpfast.Explainer(
        model, inputs, composite=lrpfast.composites.get(composite, **bounds), **options
    )
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


def network(*layers: nn.Module, size: int | tuple[int, int], channels: int = 4) -> nn.Module:
    """Convolution, ReLU, `layers`, ReLU, and a dense layer on what they leave."""
    torch.manual_seed(5)
    body = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), *layers, nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        features = body(images(1, size, channels=channels)).shape[1]
    return with_statistics(nn.Sequential(body, nn.Linear(features, 5)), [images(8, size, channels=channels, seed=1)])


CONVOLUTIONS = list(itertools.product((1, 2, 3), (1, 2), (1, 2, 8), ((11, 14), (12, 13))))


@pytest.mark.parametrize(("stride", "dilation", "groups", "size"), CONVOLUTIONS)
def test_convolutions(stride: int, dilation: int, groups: int, size: tuple[int, int], tmp_path: Path) -> None:
    # the composite alternates: together they use every rule at every stride, and one export takes a second
    composite = COMPOSITES[(stride + dilation + groups + size[0]) % 3]
    convolution = nn.Conv2d(8, 16, (3, 2), stride=stride, padding=1, dilation=dilation, groups=groups)
    model = network(convolution, size=size)
    inputs = images(3, size, channels=4, seed=2)
    explainer = export(model, inputs, composite, tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 5)


@pytest.mark.parametrize("composite", [name for name in lrpfast.composites.names()])
def test_composites(composite: str, tmp_path: Path) -> None:
    model = network(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), size=11)
    inputs = images(3, 11, channels=4, seed=2)
    explainer = export(model, inputs, composite, tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs], 5)


LAYERS: dict[str, nn.Module] = {
    "max_pool": nn.MaxPool2d(2),
    "max_pool_overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "max_pool_ceil": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "max_pool_dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "adaptive_max_pool": nn.AdaptiveMaxPool2d(3),
    "avg_pool": nn.AvgPool2d(2),
    "avg_pool_overlapping": nn.AvgPool2d(3, stride=2, padding=1),
    "avg_pool_without_padding": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "avg_pool_ceil": nn.AvgPool2d(2, stride=2, ceil_mode=True),
    "adaptive_avg_pool": nn.AdaptiveAvgPool2d(1),
    "adaptive_avg_pool_uneven": nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive_avg_pool_up": nn.AdaptiveAvgPool2d(16),
    "conv_transpose": nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose_grouped": nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4, dilation=2),
    "reflecting_padding": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "circular_padding": nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    "same_padding": nn.Conv2d(8, 8, 4, padding="same"),
    "upsample_nearest": nn.Upsample(scale_factor=2),
    "upsample_bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(0.1),
    "pixel_shuffle": nn.PixelShuffle(2),
    "group_norm": nn.GroupNorm(2, 8),
    "unfolded_batch_norm": nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_other_layers(layer: str, tmp_path: Path) -> None:
    size = (11, 13)
    model = network(LAYERS[layer], size=size)
    inputs = images(3, size, channels=4, seed=2)
    explainer = export(model, inputs, "epsilon_plus_flat", tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 5)


def test_recorded_layers_are_outputs(tmp_path: Path) -> None:
    model = network(nn.MaxPool2d(2), size=11)
    inputs = images(2, 11, channels=4, seed=2)
    explainer = export(model, inputs, "epsilon_plus_flat", tmp_path / "program.onnx", record=("0.2",))
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs], 5)
    assert len(session_of(tmp_path / "program.onnx").get_outputs()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn"])
def test_networks(name: str, composite: str, tmp_path: Path) -> None:
    inputs = images(2, 64, seed=7)
    explainer = export(torchvision_network(name), inputs, composite, tmp_path / "program.onnx")
    check_file(tmp_path / "program.onnx")
    check(explainer, tmp_path / "program.onnx", [inputs, inputs[:1]], 1000)


def test_errors(tmp_path: Path) -> None:
    model = network(size=11)
    explainer = lrpfast.Explainer(model, images(1, 11, channels=4))
    with pytest.raises(InputError, match="18"):
        explainer.export_onnx(tmp_path / "program.onnx", opset=17)
    with pytest.raises(OutputError, match="missing"):
        explainer.export_onnx(tmp_path / "missing" / "program.onnx")
    with pytest.raises(InputError, match="example_inputs"):
        lrpfast.Explainer(model).export_onnx(tmp_path / "program.onnx")
    assert list(tmp_path.iterdir()) == []
