"""What makes a group suspicious, its region, and the trial of a region on a model that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lrpfast.screening import intervals, trial
from lrpfast.screening.analysis import Options, analyse_maps
from lrpfast.screening.intervals import Estimate
from lrpfast.screening.rank import (
    concentration,
    consensus_region,
    describe_groups,
    region_share,
    sharpen,
    suspicious_groups,
)
from lrpfast.screening.trial import cover, elsewhere, try_region


def planted(samples: int = 100, tagged: int = 8, side: int = 8, seed: int = 0) -> np.ndarray:
    """Maps [n, side, side] of objects in the middle; the first `tagged` look at the corner instead."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(0, 0.02, (samples, side, side))
    for index in range(samples):
        row, column = rng.integers(2, side - 4, 2)
        maps[index, row : row + 3, column : column + 3] += 1
    maps[:tagged, :2, :2] += 6
    return maps


class TestConcentration:
    def test_even_relevance_has_none(self):
        assert concentration(np.ones(10)) == pytest.approx(0.0, abs=1e-12)

    def test_all_in_one_of_n_cells(self):
        # Half of the relevance needs half of one cell of ten.
        assert concentration(np.eye(10)[3]) == pytest.approx(1 - 2 * 0.5 / 10)

    def test_worked_case(self):
        # 6 of 10 in the first cell: half of it, 5, takes 5/6 of a cell of four. The negative cell counts for nothing.
        assert concentration(np.array([6.0, 3.0, 1.0, -9.0])) == pytest.approx(1 - 2 * (5 / 6) / 4)

    def test_no_positive_relevance(self):
        assert concentration(np.array([-1.0, 0.0])) == 0.0


class TestRegion:
    def test_cells_of_at_least_half_the_largest_excess(self):
        excess = np.array([[4.0, 2.0], [1.9, -5.0]])
        assert consensus_region(excess).tolist() == [[True, True], [False, False]]

    @pytest.mark.parametrize("excess", [np.zeros((2, 2)), -np.ones((2, 2))])
    def test_without_excess_there_is_none(self, excess):
        assert not consensus_region(excess).any()

    def test_share(self):
        points = np.array([[0.5, -0.25, 0.25, 0.0]])
        assert region_share(points, np.array([[True, True, False, False]])).tolist() == [[0.25]]


class TestGroups:
    def test_facts_of_a_group(self):
        points = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.25, 0.25]], dtype=float)
        (group,) = describe_groups(points, np.array([[True, True, False, False]]), (2, 2))
        assert group.size == 2
        assert group.smallness == 0.5
        assert group.compactness == pytest.approx(1.0)
        assert group.concentration == pytest.approx(1 - 2 * 0.5 / 4)
        assert group.region.tolist() == [[True, False], [False, False]]
        assert group.score.tolist() == [1, 1, 0, 0]
        assert group.distance == 100.0  # the rest has no spread
        assert group.separation == pytest.approx(100 / 105)
        assert group.suspicion == pytest.approx(0.5 * 1.0 * 0.75 * 100 / 105)

    def test_distance_is_in_standard_deviations_of_the_rest(self):
        points = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
        (group,) = describe_groups(points, np.array([[True, True, False, False, False]]), (1, 2))
        assert group.distance == pytest.approx((0.9 - 0.3) / np.std([0.1, 0.3, 0.5]), rel=1e-5)

    def test_a_group_of_all_has_no_suspicion(self):
        points = np.random.default_rng(0).random((5, 4))
        (group,) = describe_groups(points, np.ones((1, 5), dtype=bool), (2, 2))
        assert group.suspicion == 0

    def test_sharpening_throws_out_who_looks_elsewhere(self):
        analysis = planted().reshape(100, -1)
        points = analysis / np.abs(analysis).sum(1, keepdims=True)
        impure = np.arange(100) < 11  # three that have no tag
        impure[0] = False  # and one tagged map is missing
        assert np.flatnonzero(sharpen(points, impure[None])[0]).tolist() == list(range(8))

    def test_a_planted_group_is_the_most_suspicious_and_its_region_is_the_tag(self):
        found = analyse_maps(planted(), Options())
        first = found.groups[0]
        assert np.flatnonzero(first.members).tolist() == list(range(8))
        assert np.argwhere(first.region).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        assert first.distance > 6
        assert all(first.suspicion >= other.suspicion for other in found.groups)

    def test_groups_that_share_half_of_their_members_are_one(self):
        points = np.random.default_rng(0).random((20, 4)).astype(np.float32)
        partition = (np.arange(20) >= 6).astype(int)
        groups = suspicious_groups(points, [partition, partition], (2, 2))
        for number, group in enumerate(groups):
            for other in groups[:number]:
                both, either = (group.members & other.members).sum(), (group.members | other.members).sum()
                assert both < either / 2

    @pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 9])
    def test_small_classes(self, samples):
        found = analyse_maps(planted(samples, 0))
        assert found.clusters.shape == (samples,)
        assert found.embedding.shape[0] == samples
        assert all(group.size >= 3 for group in found.groups)

    @pytest.mark.parametrize("maps", [np.zeros((40, 4, 4)), np.ones((40, 4, 4)), np.repeat(planted(2, 1), 20, 0)])
    def test_constant_and_duplicate_maps(self, maps):
        found = analyse_maps(maps)
        assert np.isfinite(found.eigenvalues).all()
        assert found.clusters.shape == (40,)
        for group in found.groups:
            assert np.isfinite(group.suspicion)


class TestIntervals:
    def test_wilson_against_its_definition(self):
        # The limits are the rates p at which the observed one is 1.96 standard errors of p away (Wilson 1927).
        found = intervals.rate(7, 40)
        z = norm.ppf(0.975)
        for limit in (found.low, found.high):
            assert abs(7 / 40 - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / 40))
        assert found.low < 7 / 40 < found.high

    def test_none_and_all(self):
        z = norm.ppf(0.975) ** 2
        assert intervals.rate(0, 20).low == 0
        assert intervals.rate(0, 20).high == pytest.approx(z / (20 + z))
        assert intervals.rate(20, 20).high == 1
        assert intervals.rate(0, 0) == Estimate(0.0, 0.0, 1.0)

    def test_newcombe_worked_case(self):
        # Newcombe 1998, table II: 56/70 - 48/80, method 10: 0.0524 to 0.3339.
        found = intervals.difference(intervals.rate(56, 70), intervals.rate(48, 80))
        assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)

    def test_bootstrap_has_the_width_of_the_standard_error(self):
        values = np.random.default_rng(0).normal(3, 2, 400)
        found = intervals.mean(values)
        assert found.value == pytest.approx(values.mean())
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)

    def test_a_mean_of_one_has_no_interval(self):
        assert intervals.mean(np.array([2.0])) == Estimate(2.0, -math.inf, math.inf)


class TestTrial:
    """A model of two classes, on images 16 x 16: class 1 is the brightness of the upper left corner."""

    region = np.zeros((8, 8), dtype=bool)
    region[:2, :2] = True

    @staticmethod
    def predict(images: torch.Tensor) -> torch.Tensor:
        corner = images[:, 0, :4, :4].mean((1, 2))
        return torch.stack([torch.full_like(corner, 2.0), 10 * corner], dim=1)

    @staticmethod
    def images(count: int, corner: float) -> torch.Tensor:
        out = torch.zeros(count, 1, 16, 16)
        out[:, :, :4, :4] = corner
        return out

    def test_a_region_that_decides(self):
        found = try_region(
            self.predict, self.region, 1, self.images(10, 1.0), self.images(10, 0.0), self.images(50, 0.1)
        )
        assert (found.members, found.recipients) == (10, 50)
        assert found.pasted.value == 1.0
        assert found.control.value == 0.0
        assert found.moved.low > 0.8
        # Covered with the mean of the rest, which is 0: the logit falls from 10 to 0.
        assert found.score_fall.value == pytest.approx(10, abs=1e-5)
        assert found.random_fall.value < 2

    def test_a_region_that_the_rest_of_the_class_has_as_well_is_no_effect(self):
        found = try_region(
            self.predict, self.region, 1, self.images(10, 1.0), self.images(10, 1.0), self.images(50, 0.1)
        )
        assert found.pasted.value == found.control.value == 1.0
        assert found.moved.value == 0
        assert found.moved.low < 0

    def test_a_region_that_the_model_does_not_look_at(self):
        region = np.roll(self.region, 4, (0, 1))
        found = try_region(self.predict, region, 1, self.images(10, 1.0), self.images(10, 0.0), self.images(50, 0.1))
        assert found.moved.value == 0
        assert found.score_fall.value == pytest.approx(0)

    def test_without_a_rest_the_control_comes_from_other_classes(self):
        found = try_region(self.predict, self.region, 1, self.images(5, 1.0), self.images(0, 0.0), self.images(20, 0.1))
        assert found.control.value == 0

    def test_the_score_does_not_saturate(self):
        logits = torch.tensor([[200.0, 0.0, 0.0]])
        assert trial._scores(lambda images: logits, torch.zeros(1, 1, 1, 1), 0)[0] == pytest.approx(200 - math.log(2))

    def test_one_output(self):
        assert trial._scores(lambda images: torch.tensor([[3.0]]), torch.zeros(1, 1, 1, 1), 0)[0] == 3.0

    def test_cover_takes_the_mean_of_the_rest_of_the_image(self):
        images = torch.tensor([[[[9.0, 1.0], [2.0, 3.0]]]])
        covered = cover(images, torch.tensor([[True, False], [False, False]]))
        assert covered.tolist() == [[[[2.0, 1.0], [2.0, 3.0]]]]
        assert images[0, 0, 0, 0] == 9.0

    def test_elsewhere_keeps_the_shape_and_leaves_the_place(self):
        mask = np.zeros((16, 16), dtype=bool)
        mask[:4, :4] = True
        rng = np.random.default_rng(0)
        for _ in range(20):
            moved = elsewhere(mask, rng)
            assert moved.sum() == 16
            assert (moved & mask).sum() * 10 < 16

    def test_elsewhere_of_nearly_everything_overlaps_least(self):
        mask = np.ones((4, 4), dtype=bool)
        mask[0, 0] = False
        assert elsewhere(mask, np.random.default_rng(0)).sum() == 15
