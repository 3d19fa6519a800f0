"""Preprocessing is bit for bit that of torchvision and timm; reading and finding images leaves nothing to guess."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from lrpfast import images
from lrpfast.errors import InputError
from lrpfast.images import Preprocessing

SIZES = [(300, 200), (100, 333), (224, 224), (8, 8), (7, 5), (501, 500), (225, 31)]


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def torchvision():
    return importlib.import_module("tests.torchvision_shim")


class TestPreprocessing:
    @pytest.mark.parametrize("size", SIZES)
    def test_equals_torchvision(self, torchvision, size):
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms._presets import ImageClassification

        for crop, resize, how in itertools.product((224, 32, 299), (232, 256, 32), ("bilinear", "bicubic")):
            theirs = ImageClassification(crop_size=crop, resize_size=resize, interpolation=InterpolationMode(how))
            ours = Preprocessing(size=(crop, crop), resize=(resize, resize), interpolation=how)
            image = noise(*size)
            assert torch.equal(ours.tensor(ours.view(image)), theirs(image)), (crop, resize, how)

    @pytest.mark.parametrize("size", SIZES)
    def test_equals_timm(self, torchvision, size):
        timm = pytest.importorskip("timm.data.transforms_factory")
        image = noise(*size)
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
        for mode, crop, part in itertools.product(
            ("center", "squash", "border"), ((224, 224), (96, 160), (33, 47)), (0.875, 1.0, 0.95)
        ):
            theirs = timm.transforms_imagenet_eval(
                crop, crop_pct=part, crop_mode=mode, interpolation="bicubic", mean=mean, std=std
            )
            resize = tuple(math.floor(side / part) for side in crop)
            ours = Preprocessing(size=crop, resize=resize, mode=mode, interpolation="bicubic", mean=mean, std=std)
            assert torch.equal(ours.tensor(ours.view(image)), theirs(image)), (mode, crop, part)

    def test_view_is_the_picture_and_tensor_its_values(self):
        image = Image.new("RGB", (4, 4), (255, 0, 51))
        same = Preprocessing(size=(4, 4), resize=(4, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 0.1))
        assert (np.asarray(same.view(image)) == (255, 0, 51)).all()
        tensor = same.tensor(same.view(image))
        assert tensor.shape == (3, 4, 4) and tensor.dtype == torch.float32
        torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -0.5, 2.0]))

    def test_grey(self):
        grey = Preprocessing(size=(6, 5), resize=(8, 8), mean=(0.5,), std=(0.25,))
        assert grey.channels == 1
        view = grey.view(noise(20, 10))
        assert view.mode == "L" and view.size == (5, 6)
        tensor = grey.tensor(view)
        assert tensor.shape == (1, 6, 5)
        torch.testing.assert_close(tensor[0], (torch.tensor(np.array(view)) / 255.0 - 0.5) / 0.25)

    def test_a_thread_of_an_image_is_refused_rather_than_blown_up(self):
        with pytest.raises(InputError, match="10 x 20000 pixels would have to be enlarged to 256 x 512000"):
            Preprocessing().view(Image.new("RGB", (20000, 10)))

    def test_low_and_high_are_the_inputs_of_black_and_white(self):
        preprocessing = Preprocessing()
        for colour, bound in (("black", preprocessing.low), ("white", preprocessing.high)):
            tensor = preprocessing.tensor(preprocessing.view(Image.new("RGB", (300, 300), colour)))
            torch.testing.assert_close(tensor[:, 5, 7], torch.tensor(bound))
        assert preprocessing.low == pytest.approx((-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225))

    def test_survives_json(self):
        original = Preprocessing(
            size=(3, 4), resize=(5, 6), mode="border", interpolation="bicubic", mean=(0.1,), std=(0.2,)
        )
        assert Preprocessing.from_dict(json.loads(json.dumps(original.to_dict()))) == original
        with pytest.raises(InputError, match="not a preprocessing"):
            Preprocessing.from_dict({"sizes": [3, 4]})

    @pytest.mark.parametrize(
        "fields",
        [
            {"mean": (0.5,)},
            {"mean": (0.5, 0.5), "std": (1.0, 1.0)},
            {"std": (0.2, 0.0, 0.2)},
            {"std": (0.2, float("nan"), 0.2)},
            {"size": (0, 4)},
            {"mode": "fit"},
            {"interpolation": "nearest-exact"},
        ],
    )
    def test_nonsense_is_refused(self, fields):
        with pytest.raises(InputError):
            Preprocessing(**fields)


class TestRead:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "ppm"])
    def test_formats(self, tmp_path, suffix):
        image = noise(9, 7)
        image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
        assert (np.asarray(images.read(tmp_path / f"a.{suffix}")) == np.asarray(image)).all()

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_modes(self, tmp_path, mode, channels):
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        Image.new("RGB", (3, 2), "white").convert(mode).save(path)
        image = images.read(path, channels)
        assert image.mode == ("RGB" if channels == 3 else "L") and image.size == (3, 2)
        assert (np.asarray(image) == 255).all()

    def test_transparent_palette_reads_without_a_warning(self, tmp_path, recwarn):
        image = Image.new("P", (2, 1))
        image.putpalette([255, 0, 0, 0, 0, 255])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "a.png", transparency=b"\x00\xff")
        assert np.asarray(images.read(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
        assert not recwarn.list

    def test_sixteen_bits_keep_their_brightness(self, tmp_path):
        Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
        assert np.asarray(images.read(tmp_path / "a.png", 1)).tolist() == [[0, 100, 255]]

    def test_exif_orientation_is_applied(self, tmp_path):
        image = Image.new("RGB", (16, 8), "black")
        image.paste("white", (0, 0, 8, 8))
        exif = Image.Exif()
        exif[0x0112] = 6  # taken with the camera turned: show it a quarter turn clockwise
        image.save(tmp_path / "a.png", exif=exif)
        upright = images.read(tmp_path / "a.png", 1)
        assert upright.size == (8, 16)
        assert np.asarray(upright)[:8].min() == 255 and np.asarray(upright)[8:].max() == 0

    def test_what_cannot_be_read_is_named(self, tmp_path):
        whole = tmp_path / "whole.png"
        noise(64, 64).save(whole)
        cases = {
            "absent.png": None,
            "text.jpg": b"no image",
            "empty.png": b"",
            "cut.png": whole.read_bytes()[: whole.stat().st_size // 2],
        }
        for name, content in cases.items():
            if content is not None:
                (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=name.replace(".", r"\.")):
                images.read(tmp_path / name)
        with pytest.raises(InputError, match=tmp_path.name):
            images.read(tmp_path)
        Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "float.tiff")
        with pytest.raises(InputError, match=r"float\.tiff.*32 bits"):
            images.read(tmp_path / "float.tiff")


class TestFind:
    def test_folders_are_searched_in_order_and_files_taken_as_they_are(self, tmp_path):
        for name in (
            "b/2.JPG",
            "b/1.png",
            "a.webp",
            "b/c/3.bmp",
            "notes.txt",
            ".hidden.png",
            ".git/x.png",
            "out/a-map.png",
        ):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        found = images.find(
            [tmp_path / "b" / "1.png", tmp_path, tmp_path / "notes.txt", "absent.png"], tmp_path / "out"
        )
        relative = [os.path.relpath(path, tmp_path) if path.is_absolute() else str(path) for path in found]
        assert relative == ["b/1.png", "a.webp", "b/2.JPG", "b/c/3.bmp", "notes.txt", "absent.png"]

    def test_link_loops_end(self, tmp_path):
        (tmp_path / "a.png").touch()
        (tmp_path / "loop").symlink_to(tmp_path)
        assert images.find([tmp_path]) == [tmp_path / "a.png"]
