"""From shards to findings: what is sorted, what is kept when it stops, and that the planted group is found."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import lrpfast.screening
from lrpfast.errors import InputError, NumericsError, ScreeningError
from lrpfast.screening import analysis, findings, manifest, schema, store, verification
from lrpfast.screening.analysis import class_path, read_analysis
from lrpfast.screening.store import Store
from tests import screening_planted
from tests.screening_planted import CELLS, Planted, features, heatmaps, is_tinted, model, screening


@pytest.fixture(scope="module")
def source() -> Planted:
    return Planted()


@pytest.fixture(scope="module")
def shards(tmp_path_factory, source) -> Path:
    return screening(tmp_path_factory.mktemp("planted"), source)


@pytest.fixture(scope="module")
def done(tmp_path_factory, shards, source) -> Path:
    """Analysed and verified."""
    folder = tmp_path_factory.mktemp("done") / "screen"
    shutil.copytree(shards, folder)
    lrpfast.screening.analyse(folder)
    lrpfast.screening.verify(folder, source, model)
    return folder


@pytest.fixture
def folder(shards, tmp_path) -> Path:
    shutil.copytree(shards, tmp_path / "screen")
    return tmp_path / "screen"


def make_again(folder: Path, shard: int, other: Path) -> None:
    """Replace a shard by that of another run of the same screening."""
    shutil.copyfile(manifest.shard_path(other, shard), manifest.shard_path(folder, shard))


def metadata_without_digest(info: schema.ShardInfo) -> dict[bytes, bytes]:
    fields = dataclasses.asdict(info)
    del fields["digest"]
    return {b"lrpfast": json.dumps(fields).encode()}


class TestStore:
    def test_classes_hold_their_samples_in_order_though_shards_mix_them(self, folder, source):
        found = Store(folder)
        assert len(found) == 120
        assert found.labels() == [0, 1]
        expected = heatmaps(source)
        for label in (0, 1):
            own = found.class_samples(label)
            assert own.sample.tolist() == list(range(label, 120, 2))
            assert own.path == [source.record(index).path for index in range(label, 120, 2)]
            assert own.maps.shape == (60, CELLS, CELLS)
            np.testing.assert_allclose(own.maps, expected[label::2], atol=np.abs(expected).max() * 1e-3)
            assert (own.labels == label).all()
            np.testing.assert_allclose(found.features(label), features(120)[label::2], rtol=1e-3, atol=1e-3)

    def test_a_shard_with_other_features_is_told(self, folder, tmp_path, monkeypatch, source):
        monkeypatch.setattr(screening_planted, "features", lambda count: np.ones((count, 5), dtype=np.float32))
        other = screening(tmp_path / "other", source)
        shutil.copy(manifest.shard_path(other, 3), manifest.shard_path(folder, 3))
        with pytest.raises(ScreeningError, match="shard-000003.parquet is damaged: not every sample has 6 values"):
            Store(folder)

    def test_without_features(self, tmp_path, monkeypatch, source):
        monkeypatch.setattr(screening_planted, "features", lambda count: np.ones((count, 0), dtype=np.float32))
        found = Store(screening(tmp_path, source))
        assert found.features(1).shape == (60, 0)
        assert Store(tmp_path).maps(1).shape == (60, CELLS, CELLS)

    def test_skipped_samples_leave_no_row(self, tmp_path, source):
        found = Store(screening(tmp_path, source, skipped=(3, 40)))
        assert len(found) == 118
        assert 3 not in found.class_samples(1).sample
        np.testing.assert_allclose(found.maps(0)[20], heatmaps(source)[42], atol=0.05)

    def test_the_sorted_files_are_taken_again_and_made_again_where_damaged(self, folder):
        before = Store(folder).maps(1)
        maps, inner = folder / "analysis" / "maps.f16", folder / "analysis" / "features.f16"
        stamp = maps.stat().st_mtime_ns
        Store(folder)
        assert maps.stat().st_mtime_ns == stamp
        maps.write_bytes(maps.read_bytes()[:100])
        np.testing.assert_array_equal(Store(folder).maps(1), before)
        whole = inner.read_bytes()
        inner.write_bytes(whole[:-2])
        Store(folder)
        assert inner.read_bytes() == whole

    def test_small_batches_write_the_same(self, folder, monkeypatch):
        before = Store(folder).maps(0)
        shutil.rmtree(folder / "analysis")
        monkeypatch.setattr(store, "_BATCH", 7)
        np.testing.assert_array_equal(Store(folder).maps(0), before)

    def test_a_shard_that_was_made_again_is_sorted_again(self, tmp_path, source):
        folder = screening(tmp_path / "screen", source, skipped=(3,))
        assert len(Store(folder)) == 119
        make_again(folder, 0, screening(tmp_path / "repaired", source))
        found = Store(folder)
        assert len(found) == 120 and 3 in found.class_samples(1).sample
        np.testing.assert_array_equal(found.maps(1), Store(tmp_path / "repaired").maps(1))

    def test_missing_shards_are_told_also_where_they_were_sorted(self, folder):
        Store(folder)
        manifest.shard_path(folder, 2).unlink()
        with pytest.raises(ScreeningError, match=r"shard-000002.parquet: start the screening again"):
            Store(folder)

    def test_shards_are_known_by_what_they_hold(self, folder, tmp_path, monkeypatch, source):
        shutil.copytree(folder, tmp_path / "moved", copy_function=shutil.copyfile)  # with other times of its files
        make_again(tmp_path / "moved", 1, screening(tmp_path / "same", source))
        assert Store(tmp_path / "moved").identity == Store(folder).identity

        def exchanged(source):
            maps = heatmaps(source)
            maps[30, [5, 6]] = maps[30, [6, 5]]  # no number of samples, no least and no greatest value is another
            return maps

        monkeypatch.setattr(screening_planted, "heatmaps", exchanged)
        make_again(folder, 1, screening(tmp_path / "other", source))
        assert Store(tmp_path / "moved").identity != Store(folder).identity
        np.testing.assert_array_equal(Store(folder).maps(0), Store(tmp_path / "other").maps(0))

    def test_missing_shards_are_told(self, folder):
        manifest.shard_path(folder, 2).unlink()
        with pytest.raises(ScreeningError, match=r"1 of 5 shards .* shard-000002.parquet: start the screening again"):
            Store(folder)

    def test_a_damaged_shard_is_told(self, folder):
        path = manifest.shard_path(folder, 1)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with pytest.raises(ScreeningError, match="shard-000001.parquet is damaged"):
            Store(folder)

    def test_a_shard_of_another_screening_is_refused(self, folder, tmp_path):
        other = screening(tmp_path / "other", Planted(count=50))
        shutil.copy(manifest.shard_path(other, 0), manifest.shard_path(folder, 0))
        with pytest.raises(ScreeningError, match="belongs to another screening"):
            Store(folder)

    @pytest.mark.parametrize("content", [b"", b"PAR1", b"\xff" * 100])
    def test_what_is_no_shard_is_told(self, folder, content):
        manifest.shard_path(folder, 1).write_bytes(content)
        with pytest.raises(ScreeningError, match="shard-000001.parquet is damaged"):
            Store(folder)

    def test_an_unknown_class(self, folder):
        with pytest.raises(InputError, match="no sample was explained for class 7; there are 0, 1"):
            Store(folder).class_samples(7)


class TestAnalyse:
    def test_results_are_read_as_they_were_written(self, done, source):
        for label in (0, 1):
            expected = analysis.analyse_maps(Store(done).maps(label), features=Store(done).features(label))
            found = read_analysis(done, label)
            np.testing.assert_array_equal(found.clusters, expected.clusters)
            np.testing.assert_array_equal(found.embedding, expected.embedding)
            assert len(found.groups) == len(expected.groups)
            for one, other in zip(found.groups, expected.groups, strict=True):
                np.testing.assert_array_equal(one.members, other.members)
                assert one.suspicion == other.suspicion
                assert one.by_features is other.by_features

    def test_classes_that_are_done_are_kept_and_others_made(self, folder):
        calls: list[tuple[int, int]] = []
        lrpfast.screening.analyse(folder)
        first = class_path(folder, 0).stat().st_mtime_ns
        class_path(folder, 1).write_bytes(b"half a file")
        lrpfast.screening.analyse(folder, progress=lambda *n: calls.append(n))
        assert class_path(folder, 0).stat().st_mtime_ns == first
        assert calls == [(1, 2), (2, 2)]
        read_analysis(folder, 1)

    @pytest.mark.slow
    def test_what_was_made_again_is_analysed_and_verified_again(self, tmp_path, source):
        folder, whole = screening(tmp_path / "screen", source, skipped=(3,)), screening(tmp_path / "whole", source)
        for one in (folder, whole):
            lrpfast.screening.analyse(one)
            lrpfast.screening.verify(one, source, model)
        make_again(folder, 0, whole)
        for stale in (
            lambda: lrpfast.screening.verify(folder, source, model),
            lambda: lrpfast.screening.export_virelay(folder, tmp_path / "virelay", source),
        ):
            with pytest.raises(InputError, match="class 0 of .* was analysed before shards were made again; analyse"):
                stale()
        with pytest.raises(ScreeningError, match="findings of .* made again since; start the screening again"):
            lrpfast.screening.write_report(folder, source)
        lrpfast.screening.analyse(folder)
        lrpfast.screening.verify(folder, source, model)
        assert findings.read(folder) == findings.read(whole)
        assert len(read_analysis(folder, 1).clusters) == 60
        lrpfast.screening.write_report(folder, source)

    @pytest.mark.slow
    def test_a_folder_of_an_earlier_version_is_read_and_analysed_again(self, tmp_path, monkeypatch, source):
        folder = tmp_path / "screen"
        with monkeypatch.context() as earlier:
            earlier.setattr(schema.ShardInfo, "to_metadata", metadata_without_digest)
            earlier.setattr(analysis, "_mark", lambda store, options: f'[4, "{store.manifest.fingerprint}", {{}}]')
            screening(folder, source)
            lrpfast.screening.analyse(folder)
            lrpfast.screening.verify(folder, source, model)
        table = folder / "analysis" / "samples.parquet"
        marks = {"fingerprint": manifest.read(folder).fingerprint, "features": "6"}
        pq.write_table(pq.read_table(table).replace_schema_metadata(marks), table)
        known = findings.read(folder)
        del known["shards"]
        (folder / "findings.json").write_text(json.dumps(known))
        lrpfast.screening.write_report(folder, source)
        make_again(folder, 0, screening(tmp_path / "less", source, skipped=(3,)))
        with pytest.raises(InputError, match="class 1 of .* analysed before shards were made again"):
            lrpfast.screening.write_report(folder, source)
        calls: list[tuple[int, int]] = []
        lrpfast.screening.analyse(folder, progress=lambda *n: calls.append(n))
        assert calls == [(0, 2), (1, 2), (2, 2)]
        lrpfast.screening.verify(folder, source, model)
        lrpfast.screening.write_report(folder, source)
        assert findings.read(folder)["shards"] == Store(folder).identity

    def test_other_options_analyse_again(self, folder):
        lrpfast.screening.analyse(folder)
        first = class_path(folder, 0).stat().st_mtime_ns
        lrpfast.screening.analyse(folder, neighbours=3)
        assert class_path(folder, 0).stat().st_mtime_ns != first

    @pytest.mark.slow
    def test_processes_find_the_same(self, folder, done, monkeypatch):
        # Two classes are too few to start processes for; make them enough.
        monkeypatch.setattr(analysis, "_enough", lambda count, processes: True)
        lrpfast.screening.analyse(folder, processes=2)
        for label in (0, 1):
            np.testing.assert_array_equal(read_analysis(folder, label).clusters, read_analysis(done, label).clusters)

    @pytest.mark.slow
    def test_what_no_map_shows_is_told_by_features(self, done):
        # It lies farther than any group of maps, so it comes first.
        group, *others = read_analysis(done, 0).groups
        assert group.by_features and not any(other.by_features and other.distance > 8 for other in others)
        sample = Store(done).columns(0)["sample"].to_numpy()
        assert sorted(sample[group.members]) == [index for index in range(120) if is_tinted(index)]
        without = analysis.analyse_maps(Store(done).maps(0)).groups
        assert not any(set(sample[found.members]) == set(sample[group.members]) for found in without)

    def test_features_that_are_not_finite(self, done):
        with pytest.raises(NumericsError, match="the relevance of features holds NaN"):
            analysis.analyse_maps(Store(done).maps(0), features=np.full((60, 2), np.nan))

    def test_a_map_that_is_not_finite_names_its_class(self, folder, monkeypatch):
        monkeypatch.setattr(Store, "maps", lambda self, label: np.full((3, 2, 2), np.nan))
        with pytest.raises(NumericsError, match="class 0: map 0 holds NaN"):
            lrpfast.screening.analyse(folder)

    @pytest.mark.parametrize("options", [{"neighbours": 0}, {"eigenpairs": 1}])
    def test_bad_options(self, folder, options):
        with pytest.raises(InputError, match="must be at least"):
            lrpfast.screening.analyse(folder, **options)

    def test_an_analysis_that_is_not_there(self, folder):
        with pytest.raises(InputError, match="class 1 of .* has no analysis"):
            read_analysis(folder, 1)


class TestVerify:
    def test_the_planted_group_comes_first_and_is_flagged_alone(self, done, source):
        content = findings.read(done)
        first = content["findings"][0]
        assert first["class"]["index"] == 1
        assert sorted(first["samples"]) == [index for index in range(120) if source.is_tagged(index)]
        assert [entry["flagged"] for entry in content["findings"]] == [True] + [False] * (len(content["findings"]) - 1)
        assert first["effect"]["moved"]["low"] > 0.9
        # The tag, pixels 2 to 5 of 32, is cells 1 and 2 of 16.
        assert first["region"]["cells"] == [[1, 1], [1, 2], [2, 1], [2, 2]]
        assert first["examples"][0]["path"] == source.record(first["examples"][0]["sample"]).path

    def test_the_table_is_the_findings(self, done):
        entries = findings.read(done)["findings"]
        with open(done / "findings.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["rank"]) for row in rows] == [entry["rank"] for entry in entries]
        assert float(rows[0]["moved_low"]) == entries[0]["effect"]["moved"]["low"]
        assert rows[0]["class_name"] == "<b>right</b>"
        assert [int(row["group"]) for row in rows] == [entry["group"] for entry in entries]
        assert [row["told_by"] for row in rows] == [entry["told_by"] for entry in entries]
        told = {(entry["class"]["index"], entry["size"]): entry["told_by"] for entry in entries}
        assert told[1, 8] == "maps" and told[0, 10] == "features"

    def test_it_goes_on_where_it_was(self, done, tmp_path, source):
        folder = tmp_path / "screen"
        shutil.copytree(done, folder)
        verification.trial_path(folder, 1).write_text("{")
        for name in ("findings.json", "findings.csv"):
            (folder / name).unlink()
        asked: list[int] = []

        def counting(images):
            asked.append(len(images))
            return model(images)

        lrpfast.screening.verify(folder, source, counting)
        assert asked  # class 1 was tried again, and class 0 was not
        before = sum(asked)
        lrpfast.screening.verify(folder, source, counting)
        assert sum(asked) == before
        assert findings.read(folder) == findings.read(done)
        assert (folder / "findings.csv").read_bytes() == (done / "findings.csv").read_bytes()

    def test_images_that_vanished_are_replaced_by_others(self, done, tmp_path):
        folder = tmp_path / "screen"
        shutil.copytree(done, folder)
        verification.trial_path(folder, 1).unlink()
        source = Planted()
        source.gone = {1, 3, 0, 2}  # two tagged ones, two of the other class
        first = lrpfast.screening.verify(folder, source, model)[0]
        assert (first.label, first.effect.members) == (1, 6)
        assert first.flagged

    def test_all_images_gone(self, done, tmp_path):
        folder = tmp_path / "screen"
        shutil.copytree(done, folder)
        for label in (0, 1):
            verification.trial_path(folder, label).unlink()
        source = Planted()
        source.gone = set(range(120))
        assert lrpfast.screening.verify(folder, source, model) == []
        assert findings.read(folder)["findings"] == []

    def test_it_wants_an_analysis(self, folder, source):
        with pytest.raises(InputError, match="analyse it"):
            lrpfast.screening.verify(folder, source, model)

    def test_open_ended_intervals_are_valid_json(self):
        text = json.dumps(findings.effect_to_dict(_one_member()), allow_nan=False)
        assert findings.effect_from_dict(json.loads(text)) == _one_member()


def _one_member():
    import torch

    from lrpfast.screening.trial import try_region

    region = np.ones((2, 2), dtype=bool)
    region[0] = False
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return try_region(model_of_two, region, 1, images[:1], images[:2], images[2:])


def model_of_two(images):
    return images.flatten(1)[:, :2]
