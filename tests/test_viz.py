"""What a picture of relevance promises: white zero, red for, blue against, one symmetric scale, whole files."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from PIL import Image

from lrpfast import viz
from lrpfast.errors import InputError, OutputError

WHITE, RED, BLUE, GREY = (255, 255, 255), (255, 0, 0), (0, 0, 255), (128, 128, 128)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def explanation(heatmap, target):
    return types.SimpleNamespace(heatmap=lambda: heatmap, target=target)


class TestRender:
    @pytest.mark.parametrize("colormap", viz.COLORMAPS)
    def test_zero_is_exactly_white_and_signs_have_their_colours(self, colormap):
        colours = pixels(viz.render(np.array([[-1.0, -0.5, 0.0, 0.5, 1.0]]), colormap=colormap))[0]
        assert tuple(colours[2]) == WHITE
        for negative in colours[:2]:
            assert negative[2] > negative[0] + 50
        for positive in colours[3:]:
            assert positive[0] > positive[2] + 50

    def test_values(self):
        colours = pixels(viz.render(np.array([[-4.0, -2.0, 0.0, 1.0, 4.0]])))[0]
        assert [tuple(c) for c in colours] == [BLUE, (128, 128, 255), WHITE, (255, 191, 191), RED]

    def test_scale_is_symmetric_whatever_the_other_sign_reaches(self):
        # +1 is a hundredth of -100: nearly white, not full red.
        colours = pixels(viz.render(np.array([[-100.0, 1.0]])))[0]
        assert tuple(colours[0]) == BLUE
        assert tuple(colours[1]) == (255, 252, 252)

    @pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e300])
    def test_colours_do_not_depend_on_the_unit(self, scale):
        values = np.array([[-1.0, 0.25], [0.0, 0.5]])
        assert (pixels(viz.render(values * scale)) == pixels(viz.render(values))).all()

    def test_percentile_clips_the_strongest(self):
        values = np.zeros((10, 10))
        values.flat[:] = np.arange(100) / 100.0
        values[0, 0] = 50.0  # an outlier, which bleaches the map without clipping
        assert pixels(viz.render(values))[9, 9, 1] > 245
        clipped = pixels(viz.render(values, percentile=98))
        assert tuple(clipped[9, 9]) == RED and tuple(clipped[0, 0]) == RED
        assert tuple(clipped[0, 1]) != WHITE

    def test_percentile_of_a_sparse_map_falls_back_to_the_largest(self):
        values = np.zeros((20, 20))
        values[3, 4], values[5, 6] = 2.0, -1.0
        colours = pixels(viz.render(values, percentile=90))
        assert tuple(colours[3, 4]) == RED and tuple(colours[5, 6]) == (128, 128, 255) and tuple(colours[0, 0]) == WHITE

    def test_all_zero_is_all_white(self):
        assert (pixels(viz.render(np.zeros((3, 4)))) == 255).all()
        assert (pixels(viz.render(np.zeros((3, 4)), percentile=99)) == 255).all()

    @pytest.mark.parametrize(("value", "colour"), [(3.0, RED), (-0.1, BLUE)])
    def test_constant(self, value, colour):
        assert (pixels(viz.render(np.full((2, 3), value))) == colour).all()

    def test_what_is_not_finite_is_grey_and_leaves_the_scale_alone(self):
        colours = pixels(viz.render(np.array([[np.nan, np.inf, -np.inf, 0.5, -1.0, 0.0]])))[0]
        assert [tuple(c) for c in colours] == [GREY, GREY, GREY, (255, 128, 128), BLUE, WHITE]
        assert (pixels(viz.render(np.full((2, 2), np.nan), percentile=50)) == GREY).all()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_tensors(self, dtype):
        heatmap = torch.tensor([[-1.0, 0.0], [0.5, 1.0]], dtype=dtype, requires_grad=True)
        assert (pixels(viz.render(heatmap)) == pixels(viz.render(heatmap.detach().double().numpy()))).all()

    def test_enlarging_interpolates_nothing(self):
        image = viz.render(np.array([[-1.0, 1.0], [0.0, 0.5]]), size=(6, 8))
        assert image.size == (8, 6)
        blocks = pixels(image).reshape(2, 3, 2, 4, 3)
        assert (blocks == blocks[:, :1, :, :1]).all()
        assert len(np.unique(pixels(image).reshape(-1, 3), axis=0)) == 4

    @pytest.mark.parametrize("shape", [(3,), (1, 3, 4), (0, 4)])
    def test_other_shapes_are_refused(self, shape):
        with pytest.raises(InputError, match=r"shape \["):
            viz.render(np.zeros(shape))

    def test_bad_options_are_refused(self):
        values = np.zeros((2, 2))
        with pytest.raises(InputError, match="jet.*bwr"):
            viz.render(values, colormap="jet")
        for percentile in (0, -1, 100.5, float("nan")):
            with pytest.raises(InputError, match="percentile"):
                viz.render(values, percentile=percentile)
        with pytest.raises(InputError, match="complex"):
            viz.render(values.astype(complex))


class TestOverlay:
    def test_where_relevance_is_zero_the_image_shows_in_grey(self):
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
        result = pixels(viz.overlay(photo, np.zeros((4, 6))))
        assert (result == result[..., :1]).all()
        luminance = np.asarray(photo.convert("L"))
        assert (np.argsort(result[..., 0], axis=None) == np.argsort(luminance, axis=None)).all()
        assert result.min() >= 110

    def test_relevance_shows_its_colour_more_the_stronger_it_is(self):
        photo = Image.new("RGB", (4, 1), (90, 90, 90))
        result = pixels(viz.overlay(photo, np.array([[-1.0, 0.0, 0.2, 1.0]])))[0]
        assert result[0, 2] - result[0, 0] > 150
        assert result[3, 0] - result[3, 2] > 150
        assert 0 < result[2, 0] - result[2, 2] < result[3, 0] - result[3, 2]

    def test_a_coarse_map_covers_a_fine_image_in_blocks(self):
        result = pixels(viz.overlay(Image.new("L", (8, 4), 200), np.array([[1.0, -1.0]])))
        assert result.shape == (4, 8, 3)
        assert (result[:, :4] == result[0, 0]).all() and (result[:, 4:] == result[0, 7]).all()

    def test_all_zero_and_nan(self):
        photo = Image.new("RGB", (2, 2), "black")
        assert (pixels(viz.overlay(photo, np.zeros((2, 2)))) == 110).all()
        assert (np.ptp(pixels(viz.overlay(photo, np.full((2, 2), np.nan))), axis=-1) == 0).all()


class TestContactSheet:
    def test_cells_lie_in_rows_and_columns(self):
        red, blue = Image.new("RGB", (10, 10), "red"), Image.new("RGB", (10, 10), "blue")
        sheet = pixels(viz.contact_sheet([[red, blue], [None, red]], cell=20, gap=4))
        assert sheet.shape == (4 + 2 * 24, 4 + 2 * 24, 3)
        middle = sheet[14::24, 14::24]
        assert [[tuple(c) for c in row] for row in middle] == [[RED, BLUE], [WHITE, RED]]
        assert (sheet[4:24, 4:24] == RED).all(axis=-1).all()  # enlarged by two

    def test_labels_make_room_for_themselves(self):
        picture = Image.new("RGB", (8, 8), "white")
        bare = viz.contact_sheet([[picture] * 2], cell=64)
        labelled = viz.contact_sheet(
            [[picture] * 2], cell=64, row_labels=["a long row label"], column_labels=["one\ntwo", "x"], title="title"
        )
        assert labelled.width > bare.width + 60 and labelled.height > bare.height + 30
        dark = (pixels(labelled) < 100).all(axis=-1)
        edge = 64 + 2 * 6
        assert dark[-edge:, : labelled.width - 2 * 70].any()  # the row's label, left of its row
        assert dark[: labelled.height - edge].any()
        assert not dark[[0, -1]].any() and not dark[:, [0, -1]].any()  # nothing is cut off

    def test_large_pictures_are_made_small(self):
        sheet = viz.contact_sheet([[Image.new("RGB", (100, 50), "red")]], cell=20, gap=5)
        assert sheet.size == (30, 30)
        assert (pixels(sheet)[10:20, 5:25] == RED).all()

    def test_nothing_is_refused(self):
        with pytest.raises(InputError):
            viz.contact_sheet([])


class TestSave:
    def test_writes_what_was_given_and_nothing_else(self, tmp_path):
        image = viz.render(np.array([[-1.0, 0.0, 1.0]]))
        viz.save(image, tmp_path / "map.png")
        assert (pixels(Image.open(tmp_path / "map.png")) == pixels(image)).all()
        viz.save_array(np.arange(3.0, dtype=np.float32), tmp_path / "map.npy")
        loaded = np.load(tmp_path / "map.npy")
        assert loaded.dtype == np.float32 and loaded.tolist() == [0.0, 1.0, 2.0]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["map.npy", "map.png"]

    def test_a_failure_leaves_the_old_file_whole(self, tmp_path, monkeypatch):
        path = tmp_path / "map.png"
        viz.save(Image.new("RGB", (2, 2), "red"), path)
        before = path.read_bytes()

        def full_disk(self, file, *args, **kwargs):
            file.write_bytes(b"half a pict")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(OutputError, match=r"map\.png.*No space left"):
            viz.save(Image.new("RGB", (2, 2), "blue"), path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["map.png"]

    def test_an_interruption_leaves_nothing_half_written(self, tmp_path, monkeypatch):
        def interrupted(self, file, *args, **kwargs):
            file.write_bytes(b"half a pict")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            viz.save(Image.new("RGB", (2, 2)), tmp_path / "map.png")
        assert list(tmp_path.iterdir()) == []

    def test_bad_paths_are_refused(self, tmp_path):
        image = Image.new("RGB", (2, 2))
        with pytest.raises(OutputError, match=r"\.png"):
            viz.save(image, tmp_path / "map")
        with pytest.raises(OutputError, match=r"\.png"):
            viz.save(image, tmp_path / "map.xyz")
        with pytest.raises(OutputError, match="nowhere"):
            viz.save(image, tmp_path / "nowhere" / "map.png")


class TestSaveExplanation:
    def test_one_map_is_a_pixel_a_relevance(self, tmp_path):
        heatmap = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
        viz.save_explanation(explanation(heatmap, torch.tensor([3])), tmp_path / "map.png")
        assert (pixels(Image.open(tmp_path / "map.png")) == pixels(viz.render(heatmap[0]))).all()

    def test_several_samples_are_one_sheet_each_with_its_own_scale(self, tmp_path):
        heatmap = torch.ones(4, 8, 8) * torch.tensor([1.0, -5.0, 0.0, 100.0]).view(4, 1, 1)
        viz.save_explanation(explanation(heatmap, torch.arange(4)), tmp_path / "map.png")
        sheet = pixels(Image.open(tmp_path / "map.png"))
        middle = sheet[6 + 32 :: 70, 6 + 32 :: 70]
        assert [[tuple(c) for c in row] for row in middle] == [[RED, BLUE], [WHITE, RED]]

    @pytest.mark.parametrize("target", [[[2, 7], [2, 7]], [[2, 7], [1, 0]]])
    def test_several_targets_are_columns(self, tmp_path, target):
        heatmap = torch.ones(2, 2, 4, 4) * torch.tensor([[1.0, -1.0], [0.0, 2.0]]).view(2, 2, 1, 1)
        viz.save_explanation(explanation(heatmap, torch.tensor(target)), tmp_path / "map.png")
        sheet = pixels(Image.open(tmp_path / "map.png"))
        top = sheet.shape[0] - 2 * 70
        middle = sheet[top + 32 :: 70, 6 + 32 :: 70]
        assert [[tuple(c) for c in row] for row in middle] == [[RED, BLUE], [WHITE, RED]]
        assert (top > 6) == (target[0] == target[1])  # labels where they hold for the whole column

    @pytest.mark.parametrize("shape", [(2, 5), (0, 3, 3), (1, 1, 1, 3, 3)])
    def test_what_is_no_picture_is_refused(self, tmp_path, shape):
        with pytest.raises(InputError, match="relevance as an array"):
            viz.save_explanation(explanation(torch.zeros(shape), torch.zeros(shape[0])), tmp_path / "map.png")
        assert list(tmp_path.iterdir()) == []
