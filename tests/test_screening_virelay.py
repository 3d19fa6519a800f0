"""The export, loaded by the virelay package itself where it is installed, and as files where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

import lrpfast.screening
from lrpfast.errors import InputError
from lrpfast.screening import analysis, virelay
from lrpfast.screening.schema import ClassInfo
from tests.screening_planted import CELLS, SIDE, Planted, heatmaps, model, screening

SKIPPED = (4, 7)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    """A screening of which two samples could not be read, and its export."""
    root = tmp_path_factory.mktemp("virelay")
    source = Planted()
    folder = screening(root / "screen", source, skipped=SKIPPED)
    lrpfast.screening.analyse(folder)
    source.gone = set(SKIPPED)
    path = lrpfast.screening.export_virelay(folder, root / "project", source)
    return folder, path


@pytest.fixture(scope="module")
def project(exported):
    loader = pytest.importorskip("virelay.model", reason="virelay, whose loader this is a test of, is not installed")
    found = loader.Project(str(exported[1]))
    yield found
    found.close()


class TestLoader:
    def test_project(self, project):
        assert project.name == "Screening of tests:model"
        assert project.model == "tests:model"
        assert project.attribution_strategy == "true_label"
        assert project.get_analysis_methods() == ["SpRAy"]
        assert project.get_analysis_clustering_names("SpRAy") == ["eigengap", "most-suspicious-group"]
        assert project.get_analysis_embedding_names("SpRAy") == ["spectral"]
        names = {c.name: c.human_readable_name for c in project.get_analysis_categories("SpRAy")}
        assert names == {"class-00000": "left & first", "class-00001": "<b>right</b>"}

    @pytest.mark.parametrize("sample", [0, 1, 2, 63, 119])
    def test_sample_and_attribution_share_the_id_of_the_screening(self, project, sample):
        source = Planted()
        shown = project.get_sample(sample)
        assert shown.data.shape == (SIDE, SIDE, 3)
        np.testing.assert_array_equal(shown.data[..., 0], np.asarray(source.image(sample)))
        assert [label.index for label in shown.labels] == [source.label(sample)]
        found = project.get_attribution(sample)
        assert found.data.shape == (SIDE, SIDE, 3)
        expected = heatmaps(source)[sample]
        np.testing.assert_allclose(found.data[::2, ::2].sum(2), expected, atol=np.abs(expected).max() * 1e-3)
        logits = model(source.tensor(sample)[None])[0].numpy()
        np.testing.assert_allclose(found.prediction, logits, rtol=1e-6)

    def test_skipped_samples_have_no_attribution(self, project):
        for sample in SKIPPED:
            with pytest.raises(LookupError):
                project.get_attribution(sample)

    def test_analysis(self, project, exported):
        for label in (0, 1):
            found = project.get_analysis("SpRAy", f"class-{label:05d}", "eigengap", "spectral")
            expected = analysis.read_analysis(exported[0], label)
            index = [i for i in range(120) if i % 2 == label and i not in SKIPPED]
            assert found.attribution_indices.tolist() == index
            np.testing.assert_array_equal(found.clustering, expected.clusters)
            np.testing.assert_array_equal(found.embedding, expected.embedding)
            np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, atol=1e-6)

    def test_the_planted_group_is_a_clustering(self, project):
        found = project.get_analysis("SpRAy", "class-00001", "most-suspicious-group", "spectral")
        tagged = [i for i in range(120) if Planted().is_tagged(i) and i not in SKIPPED]
        assert found.attribution_indices[found.clustering == 1].tolist() == tagged

    def test_heatmaps_render(self, project):
        pixels = project.get_attribution(1).render_heatmap("blue-white-red")
        assert pixels.shape == (SIDE, SIDE, 3)
        assert pixels[3, 3].tolist() == [255, 0, 0]  # the tag


class TestFiles:
    def test_types_are_those_that_the_loader_reads(self, exported):
        folder = exported[1].parent
        with h5py.File(folder / "dataset.h5") as dataset, h5py.File(folder / "attributions.h5") as attributions:
            assert (dataset["data"].shape, dataset["data"].dtype) == ((120, 3, SIDE, SIDE), np.uint8)
            assert dataset["label"].dtype == attributions["label"].dtype == np.uint16
            assert attributions["attribution"].shape == (118, 3, SIDE, SIDE)
            assert attributions["prediction"].shape == (118, 2)
            assert attributions["index"].dtype == np.uint32
            assert sorted(attributions["index"]) == [i for i in range(120) if i not in SKIPPED]
        with h5py.File(folder / "analysis.h5") as file:
            for group in file.values():
                assert group["index"].dtype == np.uint32
                assert group["embedding/spectral"].dtype == np.float32
                assert group["embedding/spectral"].attrs["eigenvalue"].shape == group["embedding/spectral"].shape[1:]
                assert group["cluster/eigengap"].dtype.kind == "i"

    def test_project_and_label_map(self, exported):
        assert CELLS < SIDE  # maps are enlarged
        project = json.loads(exported[1].read_text())["project"]  # JSON is YAML
        assert project["dataset"] == {"name": "planted", "type": "hdf5", "path": "dataset.h5"}
        label_map = json.loads((exported[1].parent / "label-map.json").read_text())
        assert label_map[1] == {"index": 1, "word_net_id": "class-00001", "name": "<b>right</b>"}

    def test_only_top_logits_are_kept(self):
        import pyarrow as pa

        found = virelay._logits(pa.array([[3, 0, -1]]), pa.array([[5.0, 1.0, float("nan")]]), 4)
        assert found.tolist() == [[1.0, 1.0, 1.0, 5.0]]

    def test_ids(self):
        classes = (ClassInfo(0, "tench", "n01440764"), ClassInfo(12, "other"))
        assert virelay.word_net_ids(classes) == {0: "n01440764", 12: "class-00012"}

    def test_an_export_can_be_made_again(self, exported, tmp_path):
        folder, path = exported
        before = json.loads(path.read_text())
        assert json.loads(lrpfast.screening.export_virelay(folder, path.parent, Planted()).read_text()) == before

    def test_it_wants_an_analysis(self, tmp_path):
        folder = screening(tmp_path / "screen", Planted(count=4))
        with pytest.raises(InputError, match="analyse it"):
            lrpfast.screening.export_virelay(folder, tmp_path / "project", Planted(count=4))
        assert not (tmp_path / "project" / "project.yaml").exists()

    def test_images_that_are_all_gone(self, exported, tmp_path):
        source = Planted()
        source.gone = set(range(120))
        with pytest.raises(InputError, match="none of the images can be read"):
            lrpfast.screening.export_virelay(exported[0], tmp_path / "project", source)
