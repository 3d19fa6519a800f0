"""Sources: what samples there are, what class each is of, and that each is read as the model wants it."""

from __future__ import annotations

import io
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lrpfast.errors import InputError, ScreeningError
from lrpfast.images import Preprocessing, read
from lrpfast.screening import manifest as manifests
from lrpfast.screening.listing import Model, find_archives
from lrpfast.screening.manifest import Manifest
from lrpfast.screening.schema import ClassInfo, Record
from lrpfast.screening.sources import open_source, reopen, save_listing
from tests.screening_data import CLASSES, PREPROCESSING, picture, pictures

DATASETS = """
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

class Tensors(Dataset):
    def __len__(self):
        return 5
    def __getitem__(self, index):
        if index == 3:
            raise OSError("the disk is on fire")
        return torch.full((1, 2, 3), index / 4.0), index % 2

class Named(Dataset):
    classes = ["yes", "no"]
    targets = [1, 0]
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return Image.new("RGB", (20, 20), (255 * index, 0, 0)), "not looked at"

class Bytes(Tensors):
    def __getitem__(self, index):
        return torch.zeros(3, 4, 4, dtype=torch.uint8), 0

class Stream(IterableDataset):
    def __iter__(self):
        return iter([])

def empty():
    return []

def broken():
    raise KeyError("no such split")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "some_datasets.py").write_text(DATASETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    __import__("sys").modules.pop("some_datasets", None)


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


class TestFolder:
    def test_samples_in_the_order_of_names_each_of_the_class_of_its_folder(self, tmp_path):
        pictures(tmp_path, 3)
        picture(tmp_path / "dog" / "deep" / "er" / "x.JPG", 7)
        (tmp_path / "dog" / "notes.txt").touch()
        picture(tmp_path / "dog" / ".hidden.png", 8)
        source = open_source(tmp_path, PREPROCESSING)
        assert source.classes == tuple(ClassInfo(i, name) for i, name in enumerate(CLASSES))
        names = [os.path.relpath(source.record(i).path, tmp_path) for i in range(len(source))]
        expected = [f"{name}/{index:02d}.png" for name in CLASSES for index in range(3)]
        assert names == [*expected[:6], "dog/deep/er/x.JPG", *expected[6:]]
        assert [source.record(i).label for i in range(len(source))] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]

    def test_a_sample_is_what_the_preprocessing_makes_of_its_file(self, tmp_path):
        pictures(tmp_path, 1)
        source = pickle.loads(pickle.dumps(open_source(tmp_path, PREPROCESSING)))
        view = PREPROCESSING.view(read(tmp_path / "dog" / "00.png"))
        record, tensor = source.sample(1)
        assert record == Record(str(tmp_path / "dog" / "00.png"), 1)
        assert torch.equal(tensor, PREPROCESSING.tensor(view)) and torch.equal(source.tensor(1), tensor)
        assert np.array_equal(np.asarray(source.image(1)), np.asarray(view))

    def test_folders_are_matched_with_the_models_classes_by_name(self, tmp_path):
        pictures(tmp_path, 1)
        source = open_source(tmp_path, PREPROCESSING, Model(("Ox", "bee", "DOG", "cat"), 4))
        assert [source.record(i).label for i in range(3)] == [3, 2, 0]
        assert [entry.name for entry in source.classes] == ["Ox", "bee", "DOG", "cat"]

    def test_folders_without_images_still_count_as_classes(self, tmp_path):
        pictures(tmp_path, 1)
        (tmp_path / "bee").mkdir()
        source = open_source(tmp_path, PREPROCESSING, Model((), 4))
        assert [source.record(i).label for i in range(3)] == [1, 2, 3]

    def test_wordnet_ids_are_kept(self, tmp_path):
        picture(tmp_path / "n01440764" / "a.png", 0)
        picture(tmp_path / "n01443537" / "a.png", 1)
        source = open_source(tmp_path, PREPROCESSING, Model(("tench", "goldfish"), 2))
        assert source.classes == (ClassInfo(0, "tench", "n01440764"), ClassInfo(1, "goldfish", "n01443537"))

    def test_a_part_of_imagenet_is_matched_by_wordnet_ids(self, tmp_path):
        pytest.importorskip("tests.torchvision_shim")
        pytest.importorskip("timm")
        picture(tmp_path / "n02102040" / "a.png", 0)
        picture(tmp_path / "n03888257" / "a.png", 1)
        source = open_source(tmp_path, PREPROCESSING, Model(tuple(map(str, range(1000))), 1000))
        assert [source.record(i).label for i in range(2)] == [217, 701]  # English springer, parachute

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Model((), 5), r"has 3 classes \(cat, dog, ox\) and the model has 5 outputs.*--classes"),
            (Model(("cat", "dog", "bee"), 3), "none of the model's, or several: ox"),
            (Model(("cat", "dog", "ox", "ox"), 4), "none of the model's, or several: ox"),
        ],
    )
    def test_classes_that_do_not_fit(self, tmp_path, model, message):
        pictures(tmp_path, 1)
        with pytest.raises(InputError, match=message):
            open_source(tmp_path, PREPROCESSING, model)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="holds no folders"):
            open_source(tmp_path, PREPROCESSING)
        (tmp_path / "cat").mkdir()
        with pytest.raises(InputError, match="no images in the folders"):
            open_source(tmp_path, PREPROCESSING)
        with pytest.raises(InputError, match="there are no data .*absent; they are a folder"):
            open_source(tmp_path / "absent", PREPROCESSING)

    def test_a_vanished_file_and_vanished_data(self, tmp_path):
        pictures(tmp_path / "data", 1)
        source = open_source(tmp_path / "data", PREPROCESSING)
        (tmp_path / "data" / "cat" / "00.png").unlink()
        with pytest.raises(InputError, match="00.png does not exist"):
            source.tensor(0)
        source.check()
        (tmp_path / "data").rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match="not there any more"):
            source.check()

    def test_names_that_are_not_text(self, tmp_path):
        name = os.fsdecode(b"caf\xe9.png")
        try:
            picture(tmp_path / "cat" / name, 0)
        except OSError:
            pytest.skip("this file system has names of text alone")
        assert open_source(tmp_path, PREPROCESSING).tensor(0).shape == (3, 16, 16)


class TestCsv:
    @pytest.mark.parametrize(
        "text",
        [
            "pics/a.png,2\npics/b.png,0\n",
            "path,label\npics/a.png,2\n\npics/b.png,0\n",
            "\ufefflabel,split,path\n2,x,pics/a.png\n0,y,pics/b.png\n",
            "pics/a.png,ox\npics/b.png,cat\n",
            "pics/a.png,2.0\npics/b.png,0.0\n",
        ],
    )
    def test_path_and_label(self, tmp_path, text):
        for index, name in enumerate("ab"):
            picture(tmp_path / "pics" / f"{name}.png", index)
        (tmp_path / "list.csv").write_text(text)
        source = open_source(tmp_path / "list.csv", PREPROCESSING, Model(CLASSES, 3))
        assert [source.record(i) for i in range(2)] == [
            Record(str(tmp_path / "pics" / "a.png"), 2),
            Record(str(tmp_path / "pics" / "b.png"), 0),
        ]
        assert source.tensor(1).shape == (3, 16, 16) and len(source.classes) == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.png,0\nb.png\n", "line 2: a path and a label"),
            ("a.png,3\n", "label 3, and the model's classes are 0 to 2"),
            ("a.png,bee\nb.png,cat\n", "none of the model's, or several: bee"),
            ("", "lists no images"),
            ("filename,label\na.png,0\n", "line 1: the header is 'filename,label'; it must be path,label"),
            (
                "file,kind\na.png,0\nb.png,1\n",
                "line 1 has the name 'kind', line 2 the index 0; where line 1 is a header, it must be path,label",
            ),
            ("a.png,0\n\nb.png,ox\n", "line 3 has the name 'ox', line 1 the index 0"),
        ],
    )
    def test_errors(self, tmp_path, text, message):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            open_source(tmp_path / "list.csv", PREPROCESSING, Model(CLASSES, 3))

    @pytest.mark.parametrize("written", ["{}", "{}.0"])
    def test_indices_are_numbers_and_negative_ones_no_label(self, tmp_path, written):
        labels = [*range(12), -1, -7]
        lines = [f"{label}.png,{written.format(label)}" for label in labels]
        (tmp_path / "list.csv").write_text("\n".join(lines))
        for model in (Model((), 12), Model()):
            source = open_source(tmp_path / "list.csv", PREPROCESSING, model)
            assert [source.record(i).label for i in range(14)] == [*range(12), -1, -1]
            assert [entry.index for entry in source.classes] == [*range(12)]

    def test_names_of_the_model_may_be_numbers(self, tmp_path):
        (tmp_path / "list.csv").write_text("a.png,two\nb.png,1\n")
        source = open_source(tmp_path / "list.csv", PREPROCESSING, Model(("1", "two"), 2))
        assert [source.record(i).label for i in range(2)] == [1, 0]

    def test_absent(self, tmp_path):
        with pytest.raises(InputError, match=r"absent\.csv cannot be read"):
            open_source(tmp_path / "absent.csv", PREPROCESSING)


class TestArchives:
    def members(self, count, first=0):
        found = []
        for index in range(first, first + count):
            found += [(f"sub/{index:03d}.png", png(index)), (f"sub/{index:03d}.cls", b"%d\n" % (index % 3))]
        return found

    def test_samples_are_groups_of_members(self, tmp_path):
        tar(tmp_path / "a-00.tar", self.members(3))
        tar(tmp_path / "a-01.tar", [("x.json", b'{"label": 2, "z": 0}'), ("x.PNG", png(9)), ("x.seg.png", png(8))])
        source = open_source(str(tmp_path / "a-{00..01}.tar"), PREPROCESSING, Model(CLASSES, 3))
        assert [source.record(i).label for i in range(len(source))] == [0, 1, 2, 2]
        assert source.record(1).path == f"{tmp_path}/a-00.tar::sub/001.png"
        for index, seed in enumerate((0, 1, 2, 9)):
            expected = PREPROCESSING.tensor(PREPROCESSING.view(Image.open(io.BytesIO(png(seed)))))
            assert torch.equal(pickle.loads(pickle.dumps(source)).tensor(index), expected)
        assert len(open_source(tmp_path, PREPROCESSING, Model(CLASSES, 3))) == 4  # a folder of archives
        assert len(open_source(str(tmp_path / "a-0[0].tar"), PREPROCESSING, Model(CLASSES, 3))) == 3

    def test_hidden_members_are_no_samples_and_endings_have_any_case(self, tmp_path):
        members = [("sub/A.PNG", png(0)), ("sub/A.CLS", b"2"), ("sub/a.png", png(1)), ("sub/a.cls", b"1")]
        hidden = [("sub/._A.PNG", b"\0\5\x16\7"), ("sub/._A.CLS", b"\0\5\x16\7"), (".x.png", png(3))]
        source = open_source(tar(tmp_path / "a.tar", hidden + members), PREPROCESSING, Model(CLASSES, 3))
        found = [(os.path.basename(record.path), record.label) for record in map(source.record, range(len(source)))]
        assert found == [("A.PNG", 2), ("a.png", 1)]

    def test_labels_that_are_none_or_of_two_kinds(self, tmp_path):
        labels = {"a": b'{"label": 2.0}', "b": b'{"label": null}', "c": b'{"cls": -1}'}
        members = [part for n, label in labels.items() for part in ((f"{n}.png", png(0)), (f"{n}.json", label))]
        source = open_source(tar(tmp_path / "a.tar", members), PREPROCESSING, Model(CLASSES, 3))
        assert [source.record(i).label for i in range(3)] == [2, -1, -1]
        tar(tmp_path / "b.tar", [*members, ("d.png", png(0)), ("d.cls", b"ox")])
        with pytest.raises(InputError, match=r"b\.tar::d\.png has the name 'ox', .*b\.tar::a\.png the index 2\.0$"):
            open_source(tmp_path / "b.tar", PREPROCESSING, Model(CLASSES, 3))

    def test_names(self, tmp_path):
        for name in ("a1", "a2", "b1"):
            (tmp_path / f"{name}.tar").touch()
        (tmp_path / "c.tar.gz").touch()
        found = [os.path.basename(path) for path in find_archives(str(tmp_path / "{a,b}{1..2}.tar"))]
        assert found == ["a1.tar", "a2.tar", "b1.tar", "b2.tar"]
        with pytest.raises(InputError, match=r"c\.tar\.gz is no \.tar file"):
            find_archives(str(tmp_path / "c.*"))
        with pytest.raises(InputError, match="no archive"):
            find_archives(str(tmp_path / "d*.tar"))

    @pytest.mark.parametrize("damage", ["header", "cut", "cut in a header", "garbage"])
    def test_a_damaged_archive_loses_what_is_damaged_and_says_so(self, tmp_path, damage):
        path = tar(tmp_path / "a.tar", self.members(5))
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as archive:
            places = {info.name: info for info in archive.getmembers()}
        third = places["sub/002.png"]
        if damage == "header":
            content[third.offset : third.offset + 512] = random.Random(0).randbytes(512)
        elif damage == "cut":
            del content[third.offset_data + 100 :]
        elif damage == "cut in a header":
            del content[third.offset + 100 :]
        else:
            content[third.offset_data : third.offset_data + third.size] = random.Random(0).randbytes(third.size)
        path.write_bytes(content)
        source = open_source(path, PREPROCESSING, Model(CLASSES, 3))
        readable, reasons = [], []
        for index in range(len(source)):
            try:
                source.tensor(index)
                readable.append(os.path.basename(source.record(index).path))
            except InputError as error:
                reasons.append(str(error))
        whole = ["000.png", "001.png"] if damage.startswith("cut") else ["000.png", "001.png", "003.png", "004.png"]
        assert readable == whole
        assert len(reasons) == 1 and str(path) in reasons[0], reasons

    def test_errors(self, tmp_path):
        tar(tmp_path / "a.tar", [("x.png", png(0))])
        with pytest.raises(InputError, match=r"no sample in the archives of .*a\.tar has a label"):
            open_source(tmp_path / "a.tar", PREPROCESSING)
        tar(tmp_path / "b.tar", [("x.cls", b"0")])
        with pytest.raises(InputError, match="no images in the archives"):
            open_source(tmp_path / "b.tar", PREPROCESSING)
        with pytest.raises(InputError, match=r"no archive .*absent\.tar"):
            open_source(tmp_path / "absent.tar", PREPROCESSING)


class TestDataset:
    def test_tensors_are_taken_as_they_are(self, here):
        source = open_source("some_datasets:Tensors", Preprocessing(mean=(0.25,), std=(0.5,)), Model((), 2))
        assert len(source) == 5 and [entry.name for entry in source.classes] == ["class 0", "class 1"]
        record, tensor = source.sample(2)
        assert record == Record("some_datasets:Tensors[2]", 0) and torch.equal(tensor, torch.full((1, 2, 3), 0.5))
        assert np.asarray(source.image(1)).tolist() == [[round(255 * (0.25 * 0.5 + 0.25))] * 3] * 2
        with pytest.raises(InputError, match=r"Tensors\[3\]: OSError: the disk is on fire"):
            source.tensor(3)

    def test_images_are_preprocessed_and_names_and_targets_used(self, here):
        source = pickle.loads(pickle.dumps(open_source("some_datasets:Named", PREPROCESSING, Model((), 2))))
        assert [entry.name for entry in source.classes] == ["yes", "no"]
        assert [source.record(i).label for i in range(2)] == [1, 0]
        record, tensor = source.sample(1)
        red = torch.tensor([PREPROCESSING.high[0], *PREPROCESSING.low[1:]])
        assert record.label == 0 and torch.allclose(tensor[:, 0, 0], red)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("some_datasets:Stream", "no map-style"),
            ("some_datasets:empty", "is empty"),
            ("some_datasets:broken", "KeyError: 'no such split'"),
            ("some_datasets:absent", "no attribute 'absent'"),
            ("absent_module:make", "No module named 'absent_module'"),
        ],
    )
    def test_errors(self, here, spec, message):
        with pytest.raises(InputError, match=message):
            open_source(spec, PREPROCESSING)

    def test_what_is_no_picture(self, here):
        with pytest.raises(InputError, match=r"Bytes\[0\] is torch.uint8 \[3, 4, 4\]; a PIL image or"):
            open_source("some_datasets:Bytes", PREPROCESSING).tensor(0)


class TestListing:
    def screening(self, folder, source):
        manifest = Manifest(
            {"data": source.spec}, {"preprocessing": PREPROCESSING.to_dict()}, source.classes, 8, 8, len(source), 4,
            source.digest(),
        )  # fmt: skip
        (folder / "shards").mkdir(parents=True)
        save_listing(source, folder)
        manifests.begin(folder, manifest)

    def test_samples_keep_their_numbers_whatever_is_added_or_removed(self, tmp_path):
        pictures(tmp_path / "data", 3)
        source = open_source(tmp_path / "data", PREPROCESSING)
        self.screening(tmp_path / "out", source)
        picture(tmp_path / "data" / "ape" / "0.png", 0)
        (tmp_path / "data" / "cat" / "01.png").unlink()
        again = reopen(tmp_path / "out")
        assert again.classes == source.classes and len(again) == 9
        assert [again.record(i) for i in range(9)] == [source.record(i) for i in range(9)]
        assert len(open_source(tmp_path / "data", PREPROCESSING)) == 9 + 1 - 1  # not with the screening's list

    def test_a_changed_list_is_noticed(self, tmp_path):
        source = open_source(pictures(tmp_path / "data", 2), PREPROCESSING)
        self.screening(tmp_path / "out", source)
        save_listing(open_source(pictures(tmp_path / "other", 3), PREPROCESSING), tmp_path / "out")
        with pytest.raises(ScreeningError, match="not the list that the screening was begun with"):
            reopen(tmp_path / "out")

    def test_digest_tells_paths_and_labels_apart(self, tmp_path):
        digests = set()
        for text in ("a,0\nb,1\n", "a,1\nb,0\n", "b,0\na,1\n", "a,0\nc,1\n", "a,0\n"):
            (tmp_path / "list.csv").write_text(text)
            digests.add(open_source(tmp_path / "list.csv", PREPROCESSING).digest())
        assert len(digests) == 5
