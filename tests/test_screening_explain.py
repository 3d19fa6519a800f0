"""Explaining a dataset: the values in the shards, against the explainer called by hand."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import lrpfast
from lrpfast import composites
from lrpfast.errors import CaptureError, InputError, NumericsError, ScreeningError
from lrpfast.images import Preprocessing
from lrpfast.screening import explain_dataset, open_source, pooled, recipe, recipes, schema
from lrpfast.screening import manifest as manifests
from lrpfast.screening.engines import Work, _slots, local
from lrpfast.screening.pooled import PooledExplainer, Pooling, averaging
from lrpfast.screening.recipes import Runnable
from lrpfast.screening.schema import from_half, shard_schema, to_half
from lrpfast.screening.shards import Collector
from tests.screening_data import CLASSES, PREPROCESSING, SIZE, a_recipe, make, picture, pictures, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data"), 7)


def screen(data, folder, model=None, **options):
    made = a_recipe(model)
    source = open_source(data, PREPROCESSING, made.model)
    options = {"shard_size": 8, "batch_size": 4, "workers": 0, **options}
    return explain_dataset(made, source, folder, **options)


class Everywhere(torch.nn.Module):
    """Logits of each place of each image, in one dimension, averaged over an image: what the last layer reads is of no sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 3)

    def forward(self, x):
        places = self.inner(x).relu().permute(0, 2, 3, 1).reshape(-1, 4)
        return self.head(places).reshape(-1, SIZE * SIZE, 3).mean(1)


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.net = torch.nn.BatchNorm2d(3), make()

    def forward(self, x):
        return self.net(self.norm(x))


class Scaled(torch.nn.Module):
    """The first tensor of its state is a buffer of another dtype than its parameters."""

    def __init__(self):
        super().__init__()
        self.scale, self.body = torch.nn.Module(), make()
        self.scale.register_buffer("by", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        return self.body(x * self.scale.by)  # a scalar: the dtype is that of x


class TestValues:
    @pytest.mark.slow
    def test_images_come_in_the_dtype_of_the_parameters(self, data, tmp_path):
        assert a_recipe(Scaled().eval()).build().dtype == torch.float32
        screen(data, tmp_path / "scaled", Scaled().eval())
        screen(data, tmp_path / "plain")
        np.testing.assert_allclose(
            rows(tmp_path / "scaled")["relevance"], rows(tmp_path / "plain")["relevance"], rtol=1e-3
        )

    def test_a_model_whose_last_features_are_of_no_sample_is_screened_without(self, data, tmp_path):
        screen(data, tmp_path, Everywhere().eval())
        found = rows(tmp_path)
        assert found["features"].shape == (21, 0) and np.abs(found["relevance"]).max(1).all()

    @pytest.mark.parametrize("target", ["label", "prediction"])
    @pytest.mark.parametrize("seed", ["logit", "one"])
    def test_rows_are_what_the_explainer_gives(self, data, tmp_path, target, seed):
        summary = screen(data, tmp_path, target=target, seed=seed, pool=4)
        found = rows(tmp_path)
        model, source = make(), open_source(data, PREPROCESSING)
        inputs = torch.stack([source.tensor(index) for index in range(21)])
        labels = torch.arange(3).repeat_interleave(7)
        expected = lrpfast.explain(model, inputs, target=labels if target == "label" else None, seed=seed)
        logits = model(inputs).detach()
        np.testing.assert_array_equal(found["sample"], range(21))
        np.testing.assert_array_equal(found["label"], labels)
        np.testing.assert_array_equal(found["target"], labels if target == "label" else logits.argmax(1))
        np.testing.assert_array_equal(found["prediction"], logits.argmax(1))
        assert list(found["path"]) == [source.record(index).path for index in range(21)]
        top = logits.sort(dim=1, descending=True)
        np.testing.assert_array_equal(found["top5_class"], np.pad(top.indices, ((0, 0), (0, 2)), constant_values=-1))
        np.testing.assert_allclose(found["top5_logit"][:, :3], top.values, rtol=1e-5, atol=1e-6)
        assert np.isnan(found["top5_logit"][:, 3:]).all()
        chosen = logits.gather(1, torch.as_tensor(found["target"]).long()[:, None])[:, 0]
        np.testing.assert_allclose(found["target_logit"], chosen, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["conservation"], expected.conservation(), rtol=1e-4)
        # By hand: the sum over channels, then over windows of 4 x 4, by their area.
        heat = expected.relevance.double().sum(1).view(21, 4, 4, 4, 4).sum((2, 4)) / 16
        largest = heat.abs().amax((1, 2)).numpy()[:, None]
        assert (np.abs(found["relevance"] - heat.flatten(1).numpy()) <= 1e-3 * largest).all()
        # By hand: activation times weight, at the dense layer; the 64 positions of each channel together.
        weight = model[-1].weight[torch.as_tensor(found["target"]).long()]
        inner = (model[:-1](inputs) * weight).detach().double()
        if seed == "one":
            inner = inner / chosen[:, None]
        inner = inner.view(21, 4, 64).sum(2).numpy()
        told = from_half(found["features"], found["features_scale"])
        assert (np.abs(told - inner) <= 1e-3 * np.abs(inner).max(1, keepdims=True)).all()
        right = float((logits.argmax(1) == labels).float().mean())
        assert (summary.samples, summary.skipped, summary.earlier) == (21, (), 0)
        assert summary.agreement == pytest.approx(right)

    def test_shards_have_the_schema(self, data, tmp_path):
        screen(data, tmp_path, pool=5)
        files = sorted((tmp_path / "shards").iterdir())
        assert [file.name for file in files] == [f"shard-{index:06d}.parquet" for index in range(3)]
        for index, file in enumerate(files):
            table = pq.read_table(file, page_checksum_verification=True)
            assert table.schema.equals(shard_schema(5, 5))
            assert table["sample"].to_pylist() == [*range(8 * index, min(8 * index + 8, 21))]
            info = schema.ShardInfo.from_metadata(table.schema.metadata)
            assert (info.shard, info.start, info.stop) == (index, 8 * index, min(8 * index + 8, 21))
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".lock", "manifest.json", "samples.parquet", "shards", "skipped.jsonl",
        ]  # fmt: skip

    def test_manifest_says_what_it_is_of(self, data, tmp_path):
        screen(data, tmp_path, pool=5, target="prediction")
        said = json.loads((tmp_path / "manifest.json").read_text())
        assert said["format"] == 2 and said["samples"] == 21 and said["shard_size"] == 8
        assert said["map"] == {"height": 5, "width": 5}
        assert said["classes"] == [{"index": i, "name": name, "word_net_id": None} for i, name in enumerate(CLASSES)]
        assert said["settings"]["data"] == str(data) and said["settings"]["target"] == "prediction"
        assert said["settings"]["composite"].startswith("epsilon_plus_flat ")
        assert Preprocessing.from_dict(said["model"]["preprocessing"]) == PREPROCESSING

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [1, 2])
    def test_processes_that_decode_change_nothing(self, data, tmp_path, workers):
        screen(data, tmp_path / "none")
        screen(data, tmp_path / "some", workers=workers)
        one, other = rows(tmp_path / "none"), rows(tmp_path / "some")
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])

    def test_an_input_smaller_than_the_pool_keeps_its_size(self, data, tmp_path):
        screen(data, tmp_path)
        manifest = manifests.read(tmp_path)
        assert (manifest.height, manifest.width) == (SIZE, SIZE)
        assert rows(tmp_path)["relevance"].shape == (21, SIZE * SIZE)

    def test_a_dataset_of_tensors(self, tmp_path, monkeypatch):
        (tmp_path / "my_tensors.py").write_text(
            "import torch\nfrom torch.utils.data import TensorDataset\n"
            "def make():\n    g = torch.Generator().manual_seed(0)\n"
            "    return TensorDataset(torch.randn(10, 3, 16, 16, generator=g), torch.arange(10) % 3)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        screen("my_tensors:make", tmp_path / "out")
        inputs = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = lrpfast.explain(make(), inputs, target=torch.arange(10) % 3).heatmap().flatten(1)
        found = rows(tmp_path / "out")
        assert (
            np.abs(found["relevance"] - expected.numpy()) <= 1e-3 * expected.abs().amax(1, keepdim=True).numpy()
        ).all()
        assert found["path"][3] == "my_tensors:make[3]"


class TestPooling:
    @hypothesis.given(st.integers(1, 70), st.integers(1, 70))
    def test_averages_over_cells_of_equal_length(self, side, cells):
        cells = min(side, cells)
        found = averaging(side, cells)
        # Each value written out `cells` times: a cell is then `side` neighbours.
        identity = torch.eye(side, dtype=torch.float64).repeat_interleave(cells, dim=1)
        expected = identity.view(side, cells, side).mean(2).T
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    def test_where_the_side_is_a_multiple_it_is_average_pooling(self):
        maps = torch.randn(2, 24, 12, dtype=torch.float64)
        found = averaging(24, 4) @ maps @ averaging(12, 3).T
        torch.testing.assert_close(found, nn.functional.avg_pool2d(maps, (6, 4)))


class TestHalf:
    @hypothesis.given(st.integers(0, 10**6), st.floats(-35, 35))
    def test_scaled_maps_are_the_relevance_to_a_half(self, seed, magnitude):
        maps = (np.random.default_rng(seed).standard_normal((3, 4, 5)) * 10.0**magnitude).astype(np.float32)
        half, scale = to_half(maps)
        assert half.dtype == np.float16 and scale.dtype == np.float32 and np.isfinite(half).all()
        largest = np.abs(maps).max((1, 2), keepdims=True)
        back = from_half(half, scale)
        assert (np.abs(back - maps) <= 2.0**-11 * np.abs(maps) + 2.0**-38 * largest + 1e-44).all()

    def test_the_small_beside_the_large(self):
        half, scale = to_half(np.array([[[1.0, 2.0**-30]]]))
        assert from_half(half, scale).tolist() == [[[1.0, 2.0**-30]]]

    def test_zeros(self):
        half, scale = to_half(np.zeros((2, 3, 3)))
        assert not half.any() and scale.tolist() == [1.0, 1.0]


class Failing(nn.Module):
    """Overflows where the first pixel is bright."""

    def __init__(self):
        super().__init__()
        self.body = make()

    def forward(self, x):
        return self.body(x) * (1 + 1e38 * x[:, :1, 0, 0] * (x[:, :1, 0, 0] > 2))


class TestSkipped:
    def test_what_cannot_be_explained_is_listed_and_the_rest_is_there(self, tmp_path):
        pictures(tmp_path / "data", 5)
        whole = (tmp_path / "data" / "cat" / "01.png").read_bytes()
        (tmp_path / "data" / "cat" / "01.png").write_bytes(whole[:400])
        (tmp_path / "data" / "dog" / "02.png").write_bytes(b"")
        screen(tmp_path / "data", tmp_path / "full", shard_size=100)
        summary = screen(tmp_path / "data", tmp_path / "out", shard_size=6)
        lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
        assert [line["sample"] for line in lines] == [1, 7] and [line["label"] for line in lines] == [0, 1]
        assert lines[0]["path"].endswith("cat/01.png") and "cannot be read as an image" in lines[0]["reason"]
        assert "is not an image" in lines[1]["reason"]
        assert [entry.sample for entry in summary.skipped] == [1, 7]
        assert sorted(rows(tmp_path / "out")["sample"]) == [i for i in range(15) if i not in (1, 7)]

    def test_values_that_are_not_finite_cost_only_their_own_image(self, tmp_path):
        inputs = torch.zeros(6, 3, SIZE, SIZE)
        inputs[3, 0, 0, 0] = 3e5
        explain = PooledExplainer(lambda: Runnable(_refusing, torch.device("cpu"), torch.float32), POOLING)
        found = explain(batch(inputs))
        assert [bool(reason) for reason in found["reason"]] == [False, False, False, True, False, False]
        assert found["reason"][3] == "p3: the output holds inf"
        assert (found["target"] == [0, 1, 2, -1, 1, 2]).all()

    def test_a_batch_too_large_for_the_device_is_halved(self):
        sizes = []

        def small(inputs, **options):
            sizes.append(len(inputs))
            if len(inputs) > 2:
                raise torch.OutOfMemoryError("no")
            return _refusing(inputs, **options)

        explain = PooledExplainer(lambda: Runnable(small, torch.device("cpu"), torch.float32), POOLING)
        inputs = torch.rand(6, 3, SIZE, SIZE)
        found = explain(batch(inputs))
        assert sizes == [6, 3, 1, 2, 3, 1, 2]
        whole = PooledExplainer(lambda: Runnable(_refusing, torch.device("cpu"), torch.float32), POOLING)(batch(inputs))
        np.testing.assert_allclose(found["target_logit"], whole["target_logit"], rtol=1e-5)
        np.testing.assert_allclose(found["map"] * found["scale"][:, None, None],
                                   whole["map"] * whole["scale"][:, None, None], rtol=1e-3, atol=1e-6)  # fmt: skip

    def test_no_memory_for_one(self):
        def none(inputs, **options):
            raise torch.OutOfMemoryError("no")

        explain = PooledExplainer(lambda: Runnable(none, torch.device("cpu"), torch.float32), POOLING)
        with pytest.raises(ScreeningError, match="no memory for a single image"):
            explain(batch(torch.zeros(3, 3, SIZE, SIZE)))

    def test_without_a_label_there_is_no_class_to_explain(self):
        explain = PooledExplainer(lambda: Runnable(_refusing, torch.device("cpu"), torch.float32), POOLING)
        given = batch(torch.zeros(3, 3, SIZE, SIZE))
        given["label"][1] = -1
        assert explain(given)["reason"] == ["", "p1 has no label", ""]

    @pytest.mark.parametrize("label", [7, 3, 2**31, 2**64 - 1])
    def test_a_label_of_no_class_of_the_model(self, tmp_path, monkeypatch, label):
        (tmp_path / "mislabelled.py").write_text(
            f"import torch\ndef make():\n    return [(torch.zeros(3, 16, 16), {label} if i == 2 else i % 3) for i in range(6)]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "mislabelled", raising=False)
        summary = screen("mislabelled:make", tmp_path / "out")
        (skipped,) = summary.skipped
        assert skipped.sample == 2 and re.fullmatch(
            rf"mislabelled:make\[2\](: target {label} is out of range: the model has 3 outputs, 0 to 2"
            rf"| has the label {label}, which is no index of a class)",
            skipped.reason,
        )
        assert list(rows(tmp_path / "out")["sample"]) == [0, 1, 3, 4, 5]

    def test_where_the_prediction_is_explained_labels_need_not_be_classes(self, tmp_path, monkeypatch):
        (tmp_path / "labelled.py").write_text(
            "import torch\ndef make():\n    return [(torch.zeros(3, 16, 16), 7) for i in range(3)]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert screen("labelled:make", tmp_path / "out", target="prediction").skipped == ()
        assert list(rows(tmp_path / "out")["label"]) == [7, 7, 7]

    def test_all_unreadable_is_an_error(self, tmp_path):
        for name in CLASSES:
            (tmp_path / "data" / name).mkdir(parents=True)
            (tmp_path / "data" / name / "0.png").touch()
        with pytest.raises(InputError, match=r"none of the 3 samples can be explained; the first: .*0\.png is not"):
            screen(tmp_path / "data", tmp_path / "out")

    def test_data_that_vanish_as_a_whole_stop_the_run_and_leave_nothing_wrong(self, tmp_path):
        pictures(tmp_path / "data", 4)
        made = a_recipe()
        source = open_source(tmp_path / "data", PREPROCESSING, made.model)
        (tmp_path / "data").rename(tmp_path / "away")
        with pytest.raises(InputError, match="not there any more"):
            explain_dataset(made, source, tmp_path / "out", shard_size=4, workers=0)
        assert not list((tmp_path / "out" / "shards").iterdir())
        (tmp_path / "away").rename(tmp_path / "data")
        assert explain_dataset(made, source, tmp_path / "out", shard_size=4, workers=0).skipped == ()

    def test_samples_of_another_shape(self, tmp_path, monkeypatch):
        (tmp_path / "ragged.py").write_text(
            "import torch\ndef make():\n    return [(torch.zeros(3, 16, 16 + (i == 2)), 0) for i in range(4)]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        summary = screen("ragged:make", tmp_path / "out")
        assert [entry.reason for entry in summary.skipped] == [
            "ragged:make[2] has the shape [3, 16, 17], the others [3, 16, 16]"
        ]


POOLING = Pooling("label", "logit", 4, 4)
_MODEL = make()


def _refusing(inputs, **options):
    if inputs.amax() > 1e5:
        raise NumericsError("the output holds inf")
    return lrpfast.explain(_MODEL, inputs, **options)


def batch(inputs):
    count = len(inputs)
    return {
        "sample": np.arange(count), "path": [f"p{i}" for i in range(count)], "label": np.arange(count) % 3,
        "image": inputs, "reason": [""] * count,
    }  # fmt: skip


def is_early(layer):
    return layer.index < 3


def is_late(layer):
    return not is_early(layer)


class Early:
    def __call__(self, layer):
        return self.is_early(layer)

    def is_early(self, layer):
        return is_early(layer)


class TestSettings:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "prediction"}, 'target is "label" there and "prediction" now'),
            ({"seed": "one"}, 'seed is "logit" there and "one" now'),
            ({"pool": 4}, "map.height is 8 there and 4 now; map.width"),
            ({"shard_size": 7}, "shard_size is 8 there and 7 now"),
            ({"composite": "epsilon"}, 'composite is "epsilon_plus_flat .*" there and "epsilon .*" now'),
            ({"precision": "bfloat16"}, 'precision is null there and "bfloat16" now'),
            ({"weights": 1}, "with other settings, and the two must not mix: the model has other weights. Give"),
            ({"data": 1}, "the data are others"),
            ({"categories": ("cat", "dog", "yak")}, "none of the model's"),
            ({"categories": ("Cat", "dog", "ox")}, "the classes are others"),
        ],
    )
    def test_other_settings_are_refused_and_named(self, tmp_path, options, message):
        pictures(tmp_path / "data", 1)
        screen(tmp_path / "data", tmp_path / "out", pool=8)
        before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*[a-z]") if path.suffix}
        model = make()
        if "weights" in options:
            with torch.no_grad():
                model[0].bias[0] += 1e-6
        if "data" in options:
            picture(tmp_path / "data" / "cat" / "99.png", 99)
        chosen = {key: options[key] for key in ("composite", "precision", "categories") if key in options}
        run = {key: options[key] for key in ("target", "seed", "pool", "shard_size") if key in options}
        made = a_recipe(model, **chosen)
        with pytest.raises((ScreeningError, InputError), match=message):
            source = open_source(tmp_path / "data", PREPROCESSING, made.model)
            explain_dataset(made, source, tmp_path / "out", **{"pool": 8, "shard_size": 8, "workers": 0, **run})
        assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*[a-z]") if path.suffix}

    def test_batch_size_and_workers_may_change(self, data, tmp_path):
        screen(data, tmp_path)
        assert screen(data, tmp_path, batch_size=3, workers=1).earlier == 21

    def test_the_fingerprint_of_a_rule_is_its_numbers(self):
        def said(gamma):
            return recipes.describe(lrpfast.Composite([("conv", lrpfast.rules.Gamma(gamma))]))

        assert said(0.25) == said(0.25) != said(0.5)
        assert recipes.describe(composites.get("epsilon_plus")) != recipes.describe(composites.get("epsilon_plus_flat"))

    def test_the_fingerprint_of_a_rule_is_all_of_its_values(self):
        def said(low, high=3.0, **pairs):
            box = lrpfast.rules.ZBox(low, high)
            return recipes.describe(lrpfast.Composite(**(pairs or {"first": [("conv", box)]}), name="deep_taylor"))

        low = [-2.117903930131004, -2.035714285714286, -1.804444444444444]
        bounds = torch.zeros(3, 224, 224)
        changed = bounds.clone()
        changed[1, 100, 100] = -1
        distinct = [
            said(low), said([*low[:2], -99.0]), said(low[0]), said(low[0] - 1e-9), said(bounds), said(changed), said(bounds.double()),
            said(changed.numpy() - 1), said(np.float32(-2.0)),
        ]  # fmt: skip
        assert len({*distinct}) == len(distinct)
        assert said(low) == said(tuple(low)) and said(bounds) == said(bounds.clone()) == said(bounds.numpy())
        assert said(-2) == said(-2.0)

    def test_the_fingerprint_tells_first_layers_from_all(self):
        pairs = [("conv", lrpfast.rules.Flat()), ("conv", lrpfast.rules.ZPlus())]
        one = lrpfast.Composite(pairs[1:], first=pairs[:1])
        assert recipes.describe(one) != recipes.describe(lrpfast.Composite(pairs))

    def test_a_callable_is_known_by_its_name(self):
        def local(layer):
            return True

        def said(match):
            return recipes.describe(lrpfast.Composite([(match, lrpfast.rules.Epsilon())]))

        assert len({said(each) for each in (is_early, is_late, "is_early", composites._upper_half)}) == 4
        for match in (local, lambda layer: False, functools.partial(is_early), Early(), Early().is_early):
            with pytest.raises(InputError, match="which has no name that another process could import"):
                said(match)

    def test_a_value_without_a_digest_is_refused(self):
        with pytest.raises(InputError, match=r"ZBox\.high of the composite is a range, of which there is no digest"):
            recipes.describe(lrpfast.Composite([("conv", lrpfast.rules.ZBox(0, range(3)))]))

    def test_folders_of_plain_composites_can_be_gone_on_with(self):
        """What manifests have held since the first version."""
        known = [
            "epsilon_plus 23ae900f", "epsilon_plus_flat e8476785", "epsilon_alpha2_beta1 4fcdcde9", "epsilon_alpha2_beta1_flat 5fe884d2",
            "excitation_backprop 922e309d", "deconvnet 340dc049", "guided_backprop 70606b85", "beta_smooth 2c6f17a4",
            "lrp_zero 4028d13f", "epsilon 2924cb56", "gamma 227a5c70", "alpha1_beta0 318065d4",
            "w_square d3480dea",
        ]  # fmt: skip
        assert known == [
            recipes.describe(composites.get(n)) for n in composites.names() if not composites.needs_range(n)
        ]

    def test_digest_tells_weights_apart(self):
        one, other = make(), make()
        assert recipes.digest(one.state_dict()) == recipes.digest(other.state_dict())
        with torch.no_grad():
            other[4].bias[2] = torch.nextafter(other[4].bias[2], torch.tensor(1.0))
        assert recipes.digest(one.state_dict()) != recipes.digest(other.state_dict())
        assert recipes.digest(one.bfloat16().state_dict()) != recipes.digest(make().state_dict())

    @pytest.mark.parametrize(
        "options", [{"target": "both"}, {"pool": 0}, {"batch_size": 0}, {"shard_size": 0}, {"engine": "cloud"}]
    )
    def test_bad_arguments(self, data, tmp_path, options):
        with pytest.raises((InputError, ScreeningError)):
            screen(data, tmp_path / "out", **options)

    def test_a_model_without_logits(self):
        with pytest.raises(InputError, match=r"returns \[1, 4, 14, 14\] for one image"):
            recipe(nn.Conv2d(3, 4, 3).eval(), PREPROCESSING)

    def test_a_composite_with_a_range_gets_the_images(self):
        made = recipe(make(), PREPROCESSING, composite="epsilon_gamma_box")
        assert made.build().explain.composite.name == "epsilon_gamma_box"


class TestCollector:
    def manifest(self, samples, shard_size):
        return manifests.Manifest({}, {}, (), 1, 1, samples, shard_size, "")

    @hypothesis.given(st.integers(1, 40), st.integers(1, 12), st.randoms(use_true_random=False))
    def test_any_order_and_repetition_give_each_sample_once(self, samples, shard_size, rng):
        parts = [[*range(start, min(start + 5, samples))] for start in range(0, samples, 5)]
        parts += [part for part in parts if rng.random() < 0.5]
        rng.shuffle(parts)
        collector = Collector(self.manifest(samples, shard_size))
        made: dict[int, list[int]] = {}
        for part in parts:
            columns = {"sample": np.array(part), "path": [str(p) for p in part]}
            for shard, found in collector.add(columns):
                if shard in made:  # complete a second time: written again, the same
                    assert sorted(found["sample"]) == made[shard]
                made[shard] = sorted(found["sample"].tolist())
                assert [str(s) for s in found["sample"]] == found["path"]
        plan = self.manifest(samples, shard_size)
        assert made == {shard: [*plan.positions(shard)] for shard in range(plan.shards)}


class TestEngines:
    def test_what_waits_is_told(self, data):
        made = a_recipe()
        source = open_source(data, PREPROCESSING, made.model)
        work = Work(
            source, (3, SIZE, SIZE), made.build, Pooling("label", "logit", 4, 4), [range(0, 5), range(9, 12)], 4, 0
        )
        ready, *parts = local(work)
        assert not ready.rows and [part.rows["sample"].tolist() for part in parts] == [[0, 1, 2, 3], [4], [9, 10, 11]]
        assert all(part.waited > 0 for part in parts)

    @pytest.mark.parametrize("cpus", [1, 2, 4, 16, 96])
    def test_replicas_leave_room_for_decoding(self, cpus):
        count, slot, share = _slots({"CPU": float(cpus)}, None)
        assert count == max(1, cpus - max(1, cpus // 8)) and count * slot["num_cpus"] + share <= cpus
        count, slot, share = _slots({"CPU": float(cpus), "GPU": 1.0}, None)
        assert (count, slot["num_gpus"]) == (1, 1.0) or cpus == 1

    def test_a_model_in_training_mode_is_refused_and_left_as_it_is(self):
        model = Normed().train()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(
            CaptureError, match=r"the BatchNorm2d 'norm' is in training mode.*Call model\.eval\(\) first"
        ):
            a_recipe(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        a_recipe(model.eval())

    def test_recipes_travel(self):
        made = pickle.loads(pickle.dumps(a_recipe()))
        inputs = torch.rand(1, 3, SIZE, SIZE)
        expected = lrpfast.explain(make(), inputs).relevance
        torch.testing.assert_close(made.build().explain(inputs).relevance, expected)


def test_importing_lrpfast_imports_none_of_it():
    words = (
        "import sys, lrpfast, lrpfast.cli; assert not {'pyarrow', 'scipy', 'ray', 'lrpfast.screening'} & {*sys.modules}"
    )
    assert os.system(f'{__import__("sys").executable} -c "{words}"') == 0


def test_a_missing_package_names_its_extra(monkeypatch):
    from lrpfast import screening
    from lrpfast.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pyarrow is not installed.*pip install 'lrpfast\[screen\]'"):
        screening.require()
    for module in [name for name in sys.modules if name.startswith("lrpfast.screening.")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingDependencyError, match=r"lrpfast\[screen\]"):
        screening.open_source  # noqa: B018


def test_decode_reports_what_a_source_raises():
    class Odd:
        def sample(self, index):
            raise ZeroDivisionError

        def record(self, index):
            raise ZeroDivisionError

    found = pooled.decode(Odd(), [4], (3, 2, 2))
    assert found["path"] == ["sample 4"] and found["label"] == [-1] and found["reason"] == ["ZeroDivisionError: "]
