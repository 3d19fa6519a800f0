"""A spec becomes a model in eval mode with its preprocessing and class names, or an error that names what is wrong."""

from __future__ import annotations

import importlib
import sys
import urllib.error

import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import models
from lrpfast.errors import MissingDependencyError, ModelError, ProgramError
from lrpfast.images import Preprocessing


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the current folder, as a person has one."""
    (tmp_path / "mynet_under_test.py").write_text(
        """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.dropout = nn.Dropout()
    def forward(self, x):
        return self.dropout(self.conv(x)).flatten(1)

def make():
    return Net().train()

def fails():
    raise ZeroDivisionError("no channels")

def returns_text():
    return "net"

ready = Net()
number = 3
class Zoo:
    net = Net
"""
    )
    (tmp_path / "broken_under_test.py").write_text("import absent_package_xyz")
    (tmp_path / "raising_under_test.py").write_text("raise ValueError('at import')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "mynet_under_test"
    for name in ("mynet_under_test", "broken_under_test", "raising_under_test"):
        sys.modules.pop(name, None)


@pytest.fixture
def torchvision():
    importlib.import_module("tests.torchvision_shim")
    return importlib.import_module("torchvision")


class TestFactory:
    @pytest.mark.parametrize("name", ["make", "Net", "ready", "Zoo.net"])
    def test_functions_classes_modules_and_attributes(self, module, name):
        loaded = models.load(f"{module}:{name}")
        assert type(loaded.model).__name__ == "Net"
        assert not any(part.training for part in loaded.model.modules())
        assert loaded.preprocessing == Preprocessing() and loaded.categories == () and loaded.notes == ()

    def test_random_weights_are_the_same_each_time_and_leave_the_callers_random_numbers(self, module):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        first = models.load(f"{module}:make")
        assert torch.equal(torch.rand(3), expected)
        second = models.load(f"{module}:make")
        assert torch.equal(first.model.conv.weight, second.model.conv.weight)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("resnet50", r"'resnet50' names no model.*torchvision:NAME.*\.pt2"),
            (":make", "names no model"),
            ("torchvision:", "names no model"),
            ("absent_module_xyz:make", "absent_module_xyz.*no such module"),
            ("mynet_under_test:mkae", "no 'mkae'; did you mean make"),
            ("mynet_under_test:Zoo.nett", "no 'Zoo.nett'; did you mean net"),
            ("mynet_under_test:fails", "cannot be built: ZeroDivisionError: no channels"),
            ("mynet_under_test:returns_text", "returned a str"),
            ("mynet_under_test:number", "is a int; a torch.nn.Module or a callable"),
            ("broken_under_test:make", "absent_package_xyz"),
            ("raising_under_test:make", "ValueError: at import"),
        ],
    )
    def test_errors_say_what_is_wrong(self, module, spec, message):
        with pytest.raises(ModelError, match=message):
            models.load(spec)

    def test_weights_are_for_libraries(self, module):
        with pytest.raises(ModelError, match="torchvision and timm"):
            models.load(f"{module}:make", weights="DEFAULT")
        with pytest.raises(ModelError, match="torchvision and timm"):
            models.load(f"{module}:make", num_classes=3)


class TestCheckpoint:
    @pytest.fixture
    def state(self):
        torch.manual_seed(1)
        return {
            key: torch.rand_like(value) if value.is_floating_point() else value
            for key, value in small().state_dict().items()
        }

    @pytest.mark.parametrize("nested", [None, "state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
    def test_common_forms(self, tmp_path, state, nested, prefix):
        content = {prefix + key: value for key, value in state.items()}
        torch.save(content if nested is None else {nested: content, "epoch": 3}, tmp_path / "net.pt")
        model = small()
        models.load_checkpoint(model, tmp_path / "net.pt")
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_safetensors(self, tmp_path, state):
        pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "net.safetensors")
        model = small()
        models.load_checkpoint(model, tmp_path / "net.safetensors")
        assert torch.equal(model[0].weight, state["0.weight"])

    def test_safetensors_absent(self, tmp_path, monkeypatch):
        (tmp_path / "net.safetensors").touch()
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(MissingDependencyError, match="pip install safetensors"):
            models.load_checkpoint(small(), tmp_path / "net.safetensors")

    def test_counters_of_batch_norm_may_be_missing(self, tmp_path, state):
        del state["1.num_batches_tracked"]
        torch.save(state, tmp_path / "net.pt")
        model = small()
        models.load_checkpoint(model, tmp_path / "net.pt")
        assert torch.equal(model[4].bias, state["4.bias"])

    def test_a_misfit_names_every_kind_of_key_and_loads_nothing(self, tmp_path, state):
        state["4.weight"], state["extra.bias"] = torch.zeros(7, 144), torch.zeros(1)
        del state["0.bias"]
        torch.save(state, tmp_path / "net.pt")
        model = small()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ModelError) as caught:
            models.load_checkpoint(model, tmp_path / "net.pt")
        message = str(caught.value)
        for part in (
            "net.pt",
            "missing: 0.bias",
            "unexpected: extra.bias",
            "4.weight ([7, 144] in the file, [5, 144] in the model)",
        ):
            assert part in message
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_a_long_list_of_keys_is_cut(self, tmp_path):
        torch.save({f"key{i}": torch.zeros(1) for i in range(30)}, tmp_path / "net.pt")
        with pytest.raises(ModelError, match="unexpected: key0, key1, key2, key3, key4 and 25 more"):
            models.load_checkpoint(small(), tmp_path / "net.pt")

    def test_another_number_of_classes_is_hinted_at(self, tmp_path, state):
        state["4.weight"], state["4.bias"] = torch.zeros(7, 144), torch.zeros(7)
        torch.save(state, tmp_path / "net.pt")
        with pytest.raises(ModelError, match="another number of classes"):
            models.load_checkpoint(small(), tmp_path / "net.pt")

    def test_a_pickled_model_is_refused_and_its_code_not_run(self, tmp_path):
        torch.save(small(), tmp_path / "net.pt")
        with pytest.raises(ModelError, match=r"net\.pt cannot be read.*state_dict\(\) alone"):
            models.load_checkpoint(small(), tmp_path / "net.pt")

    @pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, {}, [1, 2], {"state_dict": {"a": 1}}])
    def test_what_is_no_state_dict_is_refused(self, tmp_path, content):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(ModelError, match=r"net\.pt holds no state dict"):
            models.load_checkpoint(small(), tmp_path / "net.pt")

    def test_damaged_and_absent(self, tmp_path):
        with pytest.raises(ModelError, match=r"no checkpoint .*absent\.pt"):
            models.load_checkpoint(small(), tmp_path / "absent.pt")
        (tmp_path / "net.pt").write_bytes(b"PK\x03\x04 damaged")
        with pytest.raises(ModelError, match=r"net\.pt cannot be read"):
            models.load_checkpoint(small(), tmp_path / "net.pt")

    def test_through_load(self, module, tmp_path):
        model = models.load(f"{module}:make").model
        state = {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}
        torch.save(state, tmp_path / "net.pt")
        loaded = models.load(f"{module}:make", checkpoint=tmp_path / "net.pt")
        assert (loaded.model.conv.weight == 0.5).all() and not loaded.model.training
        with pytest.raises(ModelError, match="both"):
            models.load("torchvision:resnet18", weights="DEFAULT", checkpoint=tmp_path / "net.pt")


class TestTorchvision:
    def test_random_weights_are_said(self, torchvision):
        loaded = models.load("torchvision:squeezenet1_1")
        assert isinstance(loaded.model, torchvision.models.SqueezeNet) and not loaded.model.training
        assert len(loaded.notes) == 1 and "random weights" in loaded.notes[0]
        assert loaded.preprocessing == Preprocessing() and loaded.categories == ()

    def test_number_of_classes_and_checkpoint(self, torchvision, tmp_path):
        torch.save(torchvision.models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "net.pt")
        loaded = models.load("torchvision:squeezenet1_1", checkpoint=tmp_path / "net.pt", num_classes=7)
        assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7) and loaded.notes == ()
        with pytest.raises(ModelError, match=r"classifier\.1\.weight.*\[7.*\[1000.*number of classes"):
            models.load("torchvision:squeezenet1_1", checkpoint=tmp_path / "net.pt")

    def test_weights_bring_their_preprocessing_and_names(self, torchvision, monkeypatch):
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        state = {key: torch.full_like(value, 2) for key, value in torchvision.models.resnet18().state_dict().items()}
        monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *args, **kwargs: state)
        for name in ("DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"):
            loaded = models.load("torchvision:resnet18", weights=name)
            assert (loaded.model.fc.weight == 2).all() and loaded.notes == ()
            assert len(loaded.categories) == 1000 and loaded.categories[281] == "tabby"
            assert loaded.preprocessing.resize == (256, 256) and loaded.preprocessing.size == (224, 224)
        assert loaded.class_index("Tabby") == loaded.class_index("281") == 281

    @pytest.mark.parametrize(
        ("name", "size", "resize", "interpolation"),
        [("inception_v3", 299, 342, "bilinear"), ("efficientnet_b1", 240, 256, "bicubic")],
    )
    def test_each_architecture_has_its_size(self, torchvision, monkeypatch, name, size, resize, interpolation):
        monkeypatch.setattr(torchvision.models, "get_model", lambda *args, **kwargs: nn.Identity())
        preprocessing = models.load(f"torchvision:{name}").preprocessing
        assert preprocessing == Preprocessing(size=(size, size), resize=(resize, resize), interpolation=interpolation)

    def test_unknown_names(self, torchvision):
        with pytest.raises(ModelError, match="no classification model 'resnet51'; did you mean resnet50"):
            models.load("torchvision:resnet51")
        with pytest.raises(ModelError, match="no classification model 'fcn_resnet50'"):
            models.load("torchvision:fcn_resnet50")
        with pytest.raises(ModelError, match="no weights 'BEST'; there are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
            models.load("torchvision:resnet50", weights="BEST")

    def test_a_failed_download_says_what_to_do(self, torchvision, monkeypatch):
        def offline(*args, **kwargs):
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
        monkeypatch.setattr("os.path.exists", lambda path: False)  # no file from an earlier download
        with pytest.raises(ModelError, match="weights DEFAULT: URLError.*not known.*as a checkpoint"):
            models.load("torchvision:squeezenet1_1", weights="DEFAULT")

    def test_absent(self, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_Absent("torchvision"), *sys.meta_path])
        with pytest.raises(MissingDependencyError, match="pip install torchvision"):
            models.load("torchvision:resnet18")

    def test_present_and_broken(self, monkeypatch):
        def broken(name):
            raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setattr(models.importlib, "import_module", broken)
        with pytest.raises(ModelError, match=f"nms does not exist.*match torch {torch.__version__.replace('+', '.')}"):
            models.load("torchvision:resnet18")


class TestTimm:
    @pytest.fixture(autouse=True)
    def _timm(self, torchvision):
        self.timm = pytest.importorskip("timm")

    def test_random_weights(self):
        loaded = models.load("timm:mobilenetv3_small_050", num_classes=6)
        assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 6) and not loaded.model.training
        assert "random weights" in loaded.notes[0]
        config = self.timm.data.resolve_data_config(model=loaded.model)
        assert (
            loaded.preprocessing.mean == config["mean"]
            and loaded.preprocessing.interpolation == config["interpolation"]
        )

    @pytest.mark.parametrize(
        ("spec", "weights", "built"),
        [
            ("resnet18", "DEFAULT", "resnet18"),
            ("resnet18", "a1_in1k", "resnet18.a1_in1k"),
            ("resnet18.a3_in1k", "DEFAULT", "resnet18.a3_in1k"),
        ],
    )
    def test_weights_bring_their_preprocessing_and_names(self, monkeypatch, spec, weights, built):
        create, asked = self.timm.create_model, []

        def without_download(name, pretrained):
            asked.append((name, pretrained))
            return create(name, pretrained=False)

        monkeypatch.setattr(self.timm, "create_model", without_download)
        loaded = models.load(f"timm:{spec}", weights=weights)
        assert asked == [(built, True)] and loaded.notes == ()
        assert len(loaded.categories) == 1000 and "tabby" in loaded.categories[281]
        if built.endswith("a3_in1k"):
            assert loaded.preprocessing.size == (160, 160) and loaded.preprocessing.resize == (168, 168)

    def test_unknown_names(self):
        with pytest.raises(ModelError, match="no model 'resnet19'; did you mean resnet1"):
            models.load("timm:resnet19")
        with pytest.raises(ModelError, match="no weights 'best'; there are .*a1_in1k"):
            models.load("timm:resnet18", weights="best")

    def test_a_failed_download_says_what_to_do(self, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("huggingface.co cannot be reached")

        monkeypatch.setattr(self.timm, "create_model", offline)
        with pytest.raises(ModelError, match="OSError: huggingface.co cannot be reached.*as a checkpoint"):
            models.load("timm:resnet18", weights="DEFAULT")

    def test_absent(self, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "meta_path", [_Absent("timm"), *sys.meta_path])
        with pytest.raises(MissingDependencyError, match="pip install timm"):
            models.load("timm:resnet18")


class TestProgram:
    @pytest.fixture
    def path(self, tmp_path):
        return str(tmp_path / "net.pt2")

    def save(self, path, channels=3, extra=None, size=(6, 7)):
        model = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4 * 5, 3)).eval()
        lrpfast.Explainer(model, torch.zeros(1, channels, *size)).save(path, extra=extra)
        return model

    def test_brings_its_preprocessing_and_names(self, path):
        preprocessing = Preprocessing(size=(6, 7), resize=(9, 9), mean=(0.0,), std=(1.0,))
        described = models.Loaded("x", preprocessing=preprocessing, categories=("a", "b", "c")).describe()
        self.save(path, 1, described)
        loaded = models.load(path)
        assert isinstance(loaded.program, lrpfast.export.SavedProgram) and loaded.model is None and loaded.notes == ()
        assert loaded.preprocessing == preprocessing and loaded.categories == ("a", "b", "c")

    def test_without_them_says_what_is_assumed(self, path):
        self.save(path)
        loaded = models.load(path)
        assert loaded.preprocessing == Preprocessing(size=(6, 7), resize=(7, 8)) and "ImageNet" in loaded.notes[0]
        self.save(path, 1)
        loaded = models.load(path)
        assert loaded.preprocessing == Preprocessing(size=(6, 7), resize=(7, 8), mean=(0.0,), std=(1.0,))
        assert "values in 0..1" in loaded.notes[0]

    def test_inputs_that_are_no_images_are_refused(self, path):
        self.save(path, 2)
        with pytest.raises(ModelError, match=r"takes \[2, 6, 7\] a sample; images give"):
            models.load(path)

    def test_an_exported_model_is_a_model(self, path):
        model = self.save(path)
        example = torch.rand(2, 3, 6, 7)
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), path)
        loaded = models.load(path)
        assert isinstance(loaded.model, torch.export.ExportedProgram) and loaded.program is None
        assert loaded.preprocessing.size == (6, 7) and "ImageNet" in loaded.notes[0]

    def test_neither(self, path):
        with open(path, "wb") as file:
            file.write(b"nothing")
        with pytest.raises(ProgramError, match=r"net\.pt2"):
            models.load(path)

    def test_absent_or_with_weights(self, tmp_path):
        with pytest.raises(ModelError, match=r"no program .*absent\.pt2"):
            models.load(str(tmp_path / "absent.pt2"))
        for option in ({"weights": "DEFAULT"}, {"checkpoint": "a.pt"}, {"num_classes": 3}):
            with pytest.raises(ModelError, match="weights within"):
                models.load("net.pt2", **option)


class Scaled(nn.Module):
    """Its first tensor is a buffer of another dtype, as the state dict lists them: those of each module together."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Module()
        self.scale.register_buffer("by", torch.full((1,), 2.0, dtype=torch.float64))
        self.net = small()

    def forward(self, x):
        return self.net(x * self.scale.by.to(x.dtype))


class TestBlack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_has_the_dtype_that_an_explainer_takes(self, dtype):
        model = Scaled().eval()
        model.net.to(dtype)
        found = models.black(
            model, Preprocessing(size=(8, 8), resize=(8, 8), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0))
        )
        assert (found.shape, found.dtype) == ((1, 3, 8, 8), dtype) and found.is_contiguous()
        assert found[0].flatten(1).unique(dim=1).tolist() == [[-1.0], [-0.5], [0.0]]
        assert lrpfast.Explainer(model, found)(found).relevance.dtype == dtype

    def test_without_parameters(self):
        model = nn.Sequential(nn.Flatten())
        assert models.like(model).dtype == torch.float32
        model.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        model.register_buffer("mean", torch.zeros(1, dtype=torch.float64), persistent=False)
        assert models.like(model) is model.mean

    def test_an_exported_model(self):
        exported = torch.export.export(small().eval().double(), (torch.rand(2, 3, 8, 8, dtype=torch.float64),))
        assert models.like(exported).dtype == torch.float64


class TestClassIndex:
    loaded = models.Loaded("x", categories=("cat", "Dog", "crane", "crane"))

    def test_index_and_name(self):
        assert [self.loaded.class_index(name) for name in ("3", "cat", "CAT", "dog")] == [3, 0, 0, 1]

    @pytest.mark.parametrize(
        ("name", "message"),
        [("crane", r"several.*\[2, 3\]"), ("cta", "no class is called 'cta'; did you mean cat"), ("-1", "no class")],
    )
    def test_errors(self, name, message):
        with pytest.raises(ModelError, match=message):
            self.loaded.class_index(name)

    def test_names_unknown(self):
        with pytest.raises(ModelError, match="not known here"):
            models.Loaded("x").class_index("cat")


class _Absent:
    """A finder that finds a package absent."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self._package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=self._package)
        return None
