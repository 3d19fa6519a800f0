"""What makes a group suspicious, its region, and the trial of a region on a model that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from lrpfast.screening import discriminant, findings, intervals, trial
from lrpfast.screening.analysis import Options, analyse_maps
from lrpfast.screening.discriminant import Discriminant, amounts, blurred, carrying
from lrpfast.screening.intervals import Estimate
from lrpfast.screening.members import (
    components,
    consensus_region,
    distinct,
    halves,
    in_deviations,
    outstanding,
    parts,
    purify,
    region_share,
    sharpen,
    standard_scores,
)
from lrpfast.screening.rank import Group, class_score, concentration, describe_groups, gap, suspicious_groups
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


def effect(low: float) -> trial.Effect:
    """An effect that moves at least `low`."""
    any_ = Estimate(0.5, 0.5, 0.5)
    return trial.Effect(any_, any_, any_, any_, any_, Estimate(low + 0.1, low, low + 0.2), 24, 192)


def finding(label: int, distance: float, low: float) -> findings.Finding:
    """A finding of a group at this distance that moves at least `low`."""
    group = Group(np.ones(3, bool), 0.5, 0.5, 0.5, distance, np.ones((2, 2), bool), np.zeros((2, 2)), np.zeros(3))
    return findings.Finding(label, 0, group, effect(low), np.arange(3), ["a", "b", "c"])


class TestRankedFindings:
    def test_verified_ones_by_distance_and_effect_the_others_by_distance(self):
        # Distance times the root of the effect is 27.4, 8.5, 6.9, 3.2 for the four that are verified.
        expected = [(86.6, 0.1), (13.4, 0.4), (23.0, 0.09), (13.0, 0.06), (50.0, 0.04), (12.9, 0.9), (3.0, -0.2)]
        found, limit = findings.ranked([finding(index, *one) for index, one in enumerate(reversed(expected))])
        assert [(one.group.distance, one.effect.moved.low) for one in found] == expected
        assert [one.flagged for one in found] == [True] * 4 + [False] * 3
        assert limit == 13.0  # of seven classes no median is taken

    def test_a_flag_begins_at_twice_the_distance_of_the_median_class(self):
        # The farthest of each class: 3, 4, 4, 4.2, 4.4, 5, 9, 9.3; in the middle 4.3. Nearer groups do not count.
        farthest = [9.3, 4.0, 4.2, 3.0, 9.0, 4.4, 5.0, 4.0]
        found = [finding(label, distance, 0.2) for label, far in enumerate(farthest) for distance in (1.0, far)]
        found, limit = findings.ranked([*found, finding(0, 8.7, 0.05)])
        assert limit == 8.6
        assert [(one.label, one.group.distance) for one in found if one.flagged] == [(0, 9.3), (4, 9.0)]
        assert found[2].group.distance == 8.7 and not found[2].flagged

    def test_where_no_class_has_a_group_that_is_far_a_flag_begins_at_eight(self):
        found, limit = findings.ranked(
            [finding(label, distance, 0.5) for label, distance in enumerate([0.0] * 8 + [7.9])]
        )
        assert limit == 8.0 and not any(one.flagged for one in found)

    def test_nothing_found(self):
        assert findings.ranked([]) == ([], 13.0)


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


def described(maps: np.ndarray, members: np.ndarray, size: tuple[int, int]) -> Group:
    """One group of maps that are normalised already."""
    (group,) = describe_groups(maps, maps, Discriminant(maps), members[None], size)
    return group


class TestDiscriminant:
    """The oracle is scikit-learn's ridge regression, fitted once for each map without it."""

    @pytest.mark.parametrize(("samples", "size"), [(40, 6), (15, 30)])
    def test_leave_one_out_against_a_fit_for_each_sample(self, samples, size):
        rng = np.random.default_rng(size)
        points = rng.normal(size=(samples, size)) * rng.uniform(0.2, 3, size)
        members = np.arange(samples) < samples // 4
        points[members, :2] += 2
        shrinkage = min(ledoit_wolf(points)[1], 0.9)
        penalty = samples * shrinkage / (1 - shrinkage) * points.var(axis=0).mean()
        expected = []
        for out in range(samples):
            others = np.arange(samples) != out
            # The penalty is that of the whole class: what is left out is the sample, not its share in the choice of the penalty.
            fitted = Ridge(penalty).fit(points[others], members[others].astype(float))
            expected.append(float((points[out] - points[others].mean(axis=0)) @ fitted.coef_))
        np.testing.assert_allclose(Discriminant(points).scores(members[None])[0], expected, rtol=1e-8, atol=1e-10)

    def test_a_group_at_random_does_not_stand_out(self):
        # By a discriminant that has seen them, members of any group score high: 60 points in 40 dimensions can be split at will.
        rng = np.random.default_rng(3)
        points, members = rng.normal(size=(60, 40)), np.arange(60) < 10
        score = Discriminant(points).scores(members[None])[0]
        assert abs(score[members].mean() - score[~members].mean()) < 0.5 * score.std()

    def test_it_discounts_what_varies_anyway(self):
        # The members differ in cell 1 by 1; cell 0 carries the same, and a noise that cell 2 shows.
        rng = np.random.default_rng(0)
        members = np.arange(300) < 30
        noise = rng.normal(0, 5, 300)
        points = np.stack([members + noise + rng.normal(0, 0.1, 300), noise], axis=1)
        score = Discriminant(points).scores(members[None])[0]
        assert score[members].min() > score[~members].max()
        assert points[members, 0].min() < np.median(points[~members, 0])

    @pytest.mark.parametrize("samples", [1, 2, 5])
    def test_points_that_are_all_the_same(self, samples):
        assert not Discriminant(np.ones((samples, 4))).scores(np.ones((1, samples), dtype=bool)).any()


class TestAmounts:
    def test_maps_keep_their_proportion(self):
        maps = np.array([[[1.0, -1.0]], [[2.0, 2.0]], [[8.0, 0.0]]])
        np.testing.assert_allclose(amounts(maps), maps / 4)

    def test_a_map_that_explodes_is_brought_down(self):
        maps = np.array([[[1.0, -1.0]], [[1.0, 1.0]], [[3e9, -1e9]]])
        np.testing.assert_allclose(amounts(maps)[2], [[2.25, -0.75]])

    def test_zero_maps(self):
        assert not amounts(np.zeros((3, 2, 2))).any()
        np.testing.assert_allclose(amounts(np.stack([np.zeros((1, 2))] * 3 + [np.ones((1, 2))]))[3], [[0.5, 0.5]])

    def test_blur_of_a_map_keeps_a_constant_and_brings_neighbours_together(self):
        np.testing.assert_allclose(blurred(np.full((1, 16, 16), 3.0)), 3.0)
        spots = np.zeros((3, 16, 16))
        spots[0, 8, 8] = spots[1, 8, 9] = spots[2, 8, 14] = 1
        near, far = (blurred(spots)[0] @ blurred(spots)[other] for other in (1, 2))
        assert near > 0.7 * blurred(spots)[0] @ blurred(spots)[0]
        assert far < 0.01 * near

    def test_large_maps_are_sampled(self):
        assert blurred(np.zeros((2, 28, 28))).shape == (2, 14 * 14)
        assert blurred(np.zeros((2, 16, 5))).shape == (2, 16 * 5)


class TestGroups:
    def test_facts_of_a_group(self):
        points = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0.5, 0.25, 0.25]], dtype=float)
        group = described(points, np.array([True, True, False, False]), (2, 2))
        assert group.size == 2
        assert group.smallness == 0.5
        assert group.compactness == pytest.approx(1.0)
        assert group.concentration == pytest.approx(1 - 2 * 0.5 / 4)
        assert group.region.tolist() == [[True, False], [False, False]]
        assert group.score[:2].min() > group.score[2:].max()
        assert group.separation == pytest.approx(group.distance**2 / (group.distance**2 + 64))
        assert group.suspicion == pytest.approx(0.5 * 1.0 * 0.75 * group.separation)

    def test_distance_is_the_geometric_mean_of_amount_and_score_in_standard_deviations_of_the_rest(self):
        points = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
        members = np.array([True, True, False, False, False])
        group = described(points, members, (1, 2))
        raw = Discriminant(points).scores(members[None])[0]
        np.testing.assert_allclose(group.score, (raw - np.median(raw[2:])) / raw[2:].std(), rtol=1e-5, atol=1e-6)
        in_region = (0.9 - 0.3) / np.std([0.1, 0.3, 0.5])
        assert gap(group.score, members) == pytest.approx(1 - 2 / 3)  # one map halfway, two where the members are
        few = 2 / (2 + 2)  # two members
        assert group.distance == pytest.approx(
            4 / 3 * few * math.sqrt(in_region * np.median(group.score[:2])), rel=1e-5
        )

    def test_distances_by_features_are_brought_to_the_scale_of_maps(self):
        points = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.5, 0.5]])
        members = np.array([[True, True, False, False, False]])
        (by_maps,) = describe_groups(points, points, Discriminant(points), members, (1, 2))
        (by_features,) = describe_groups(points, points, Discriminant(points), members, (1, 2), features=points)
        assert by_features.distance == pytest.approx(1.6 * by_maps.distance)
        np.testing.assert_array_equal(by_features.score, by_maps.score)

    @pytest.mark.parametrize(
        ("others", "expected"),
        [([0.0, 0.1, -0.1, 0.0, 0.1], 1 - 1 / 4), ([0.0, 0.5, -0.5, 0.4, 0.0], 1 - 3 / 4), ([0.0, 0.0, 0.6, 0.5, -0.4, -0.5, 0.4], 0.0)],
    )  # fmt: skip
    def test_gap(self, others, expected):
        score = np.array([1.0, 1.1, 0.9, *others])
        assert gap(score, np.arange(len(score)) < 3) == pytest.approx(expected)

    def test_a_tail_has_no_gap(self):
        score = np.random.default_rng(0).exponential(size=1000)
        assert gap(score - np.median(score), score > 4) == 0

    def test_many_members_are_farther_than_few_at_the_same_place(self):
        # The distances would be 100 in both, where the rest has no spread; three may be so by chance, thirty not.
        points = np.zeros((200, 2))
        few, many = np.arange(200) < 3, np.arange(200) < 30
        near, far = (described(np.where(own[:, None], [1.0, 0.0], points), own, (1, 2)) for own in (few, many))
        assert near.distance / far.distance == pytest.approx((3 / 5 * (2 - 1 / 4)) / (30 / 32 * (2 - 1 / 31)))

    def test_class_score(self):
        # Ten maps: the second group is half as far as the first, so what is typical of it counts an eighth.
        def group(distance: float, score: list[float], size: int) -> Group:
            members = np.arange(10) < size if size > 0 else np.arange(10) >= 10 + size
            empty = np.zeros((1, 1))
            return Group(members, 0.5, 0.5, 0.5, distance, empty > 0, empty, np.array(score, dtype=np.float32))

        one = group(20.0, [8.0, 10.0, 12.0, 1.0, 0, 0, 0, 0, 0, 0], 3)
        other = group(10.0, [0, 0, 0, 0, 0, -1.0, 2.0, 4.0, 8.0, 4.0], -3)
        expected = [0.8, 1.0, 1.2, 0.1, 0, 0, 2 / 32, 1 / 8, 2 / 8, 1 / 8]
        np.testing.assert_allclose(class_score([one, other]), expected, atol=1e-7)
        np.testing.assert_array_equal(class_score([other, one]), class_score([one, other]))
        np.testing.assert_allclose(class_score([other])[6:], [0.5, 1.0, 2.0, 1.0])

    def test_a_tag_at_two_places_makes_two_groups_and_the_class_score_has_both(self):
        rng = np.random.default_rng(2)
        maps = planted(300, 12, side=16, seed=1)
        maps[12:20, 12:14, 12:14] += 5
        groups = analyse_maps(maps + rng.normal(0, 0.02, maps.shape)).groups
        tagged = np.arange(300) < 20
        assert groups[0].members.sum() == 12
        assert roc_auc_score(tagged, groups[0].score) < 0.95
        assert roc_auc_score(tagged, class_score(groups)) == 1.0

    def test_deviations_without_a_rest_or_without_spread(self):
        scores, members = np.array([[1.0, 2, 3], [5, 1, 1]]), np.array([[True, True, True], [True, False, False]])
        assert in_deviations(scores, members).tolist() == [[0, 0, 0], [100, 0, 0]]

    def test_a_group_of_all_has_no_suspicion(self):
        points = np.random.default_rng(0).random((5, 4))
        assert described(points, np.ones(5, dtype=bool), (2, 2)).suspicion == 0

    def test_standard_scores(self):
        # Of the rest, 1 2 3 4 100, the median is 3 and the median deviation 1: a sample far out widens nothing.
        scores = np.array([[1.0, 2, 3, 4, 100, 8]])
        found = standard_scores(scores, np.arange(6)[None] == 5)
        np.testing.assert_allclose(found, (scores - 3) / 1.4826)

    def test_purifying_empties_an_impure_group_of_what_does_not_stand_out(self):
        rng = np.random.default_rng(0)
        points = rng.normal(size=(200, 10))
        points[:12] += 3
        impure = np.arange(200) < 60
        assert any((found == (np.arange(200) < 12)).all() for found in purify(Discriminant(points), impure[None]))

    def test_purifying_leaves_the_tail_of_a_class_out(self):
        rng = np.random.default_rng(0)
        points = rng.normal(0, 0.1, (200, 6))
        points[:, 0] = rng.exponential(1, 200)  # some lie six and more standard deviations above the median
        points[:10, 0] += 30
        assert (points[10:, 0] > 5).any()
        found = purify(Discriminant(points), points[None, :, 0] > 4)
        assert [np.flatnonzero(members).tolist() for members in found] == [[*range(10)]]

    def test_purifying_takes_one_false_member_from_a_small_group(self):
        rng = np.random.default_rng(0)
        points = rng.normal(0, 0.1, (200, 6))
        points[:, 0] = rng.exponential(1, 200)
        points[:4, 0], points[4, 0] = 30, 13  # above a third of the members' score, below half of it
        found = purify(Discriminant(points), (np.arange(200) < 5)[None])
        assert [0, 1, 2, 3] in [np.flatnonzero(members).tolist() for members in found]

    def test_large_groups_are_not_tried_more_sharply(self):
        # A third of the members are fainter: in a group of a twentieth they are lost once, in one of a fifth never.
        rng = np.random.default_rng(0)
        points = rng.normal(0, 0.1, (200, 6))
        for size, cores in ((9, [[*range(6)]]), (42, [])):
            own = points.copy()
            own[:size, 0] = 30
            own[size * 2 // 3 : size, 0] = 13
            found = [np.flatnonzero(one).tolist() for one in purify(Discriminant(own), (np.arange(200) < size)[None])]
            assert [*range(size)] in found
            assert [one for one in found if len(one) < size] == cores

    def test_purifying_leaves_no_group_where_nothing_is_apart(self):
        points = np.random.default_rng(0).random((300, 10))  # bounded: no one is four deviations out
        assert len(purify(Discriminant(points), np.random.default_rng(1).random((5, 300)) < 0.3)) == 0

    def test_what_is_spread_over_the_image_and_makes_no_cluster_is_found(self):
        # Neighbours are those with the object at the same place; 12 maps of 300 are brighter towards the corners.
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:16, :16]
        centre = rng.normal(8, 3, (2, 300, 1, 1))
        maps = 3 * np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / 9) + rng.normal(0, 0.3, (300, 16, 16))
        maps[:12] += 0.8 * ((y - 7.5) ** 2 + (x - 7.5) ** 2) / 112
        assert np.flatnonzero(analyse_maps(maps).groups[0].members).tolist() == list(range(12))

    def test_halves_along_principal_components(self):
        # Spread along two axes of four; of the others there is nothing.
        rng = np.random.default_rng(0)
        points = np.zeros((40, 4))
        points[:, 1], points[:, 3] = rng.uniform(-5, 5, 40), rng.uniform(-1, 1, 40)
        centred = points - points.mean(axis=0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        along = centred @ axes[:2].T
        expected = [side * along[:, axis] > along[:, axis].std() for axis in (0, 1) for side in (1, -1)]
        assert {row.tobytes() for row in halves(components(points))} == {row.tobytes() for row in expected}

    @pytest.mark.parametrize(("samples", "told"), [(7, 0), (40, 5), (400, 16)])
    def test_few_samples_tell_few_components(self, samples, told):
        # Both sides of a component have members: these points are spread evenly.
        points = np.random.default_rng(1).uniform(-1, 1, (samples, 30))
        assert len(halves(components(points))) == 2 * told
        assert halves(components(np.ones((samples, 3)))).shape == (0, samples)

    def test_parts_are_the_clusters_along_several_components(self):
        # Four clumps of 15 at the corners of a square, whose sides no component separates one by one.
        corners = np.array([[0.0, 0.0, 0.0], [8.0, 0.0, 0.0], [0.0, 8.0, 0.0], [8.0, 8.0, 0.0]])
        clumps = np.repeat(np.arange(4), 15)
        points = corners[clumps] + np.random.default_rng(3).normal(0, 0.2, (60, 3))
        found = {row.tobytes() for row in parts(components(points))}
        assert {(clumps == corner).tobytes() for corner in range(4)} <= found

    def test_each_of_six_kinds_of_features_is_found(self):
        # From halves of components alone, four are.
        rng = np.random.default_rng(5)
        kinds = np.arange(120) % 6
        features = rng.normal(0, 3, (6, 12))[kinds] + rng.normal(0, 0.5, (120, 12))
        maps = np.abs(rng.normal(size=(120, 16)))
        found = suspicious_groups(maps, maps, maps, [np.zeros(120, int)], (4, 4), most=100, features=features)
        told = {group.members.tobytes() for group in found if group.by_features}
        assert told >= {(kinds == kind).tobytes() for kind in range(6)}

    @pytest.mark.parametrize("samples", [1, 7, 40])
    def test_points_that_are_all_the_same_have_no_parts(self, samples):
        assert parts(components(np.ones((samples, 3)))).shape == (0, samples)

    @pytest.mark.filterwarnings("error")
    def test_samples_that_are_there_many_times_have_parts(self):
        # Three kinds of samples, and equal ones differ by rounding: into no more than three parts.
        kinds = np.repeat(np.arange(3), 20)
        features = np.random.default_rng(5).normal(size=(3, 256))[kinds]
        coordinates = components(features) * (1 + 1e-13 * np.arange(60))
        found = {row.tobytes() for row in parts(coordinates)}
        assert found >= {(kinds == kind).tobytes() for kind in range(3)}
        assert len(found) <= 2 + 3

    def test_features_that_carry(self):
        features = np.random.default_rng(0).uniform(0, 1, (50, 400)) * np.arange(400)
        found = carrying(features)
        most = np.sort(np.argsort(features.var(axis=0))[-256:])
        np.testing.assert_allclose(found, amounts(features)[:, most])

    def test_single_precision_finds_the_same(self, monkeypatch):
        maps = planted(samples=300, tagged=20)
        inner = np.random.default_rng(1).uniform(0, 1, (300, 10))
        inner[50:80, 3] += 3
        double = analyse_maps(maps, features=inner).groups
        monkeypatch.setattr(discriminant, "_MANY", 1)
        single = analyse_maps(maps, features=inner).groups
        assert single[0].score.dtype == np.float32 and len(single) == len(double)
        for one, other in zip(single, double, strict=True):
            np.testing.assert_array_equal(one.members, other.members)
            assert one.distance == pytest.approx(other.distance, rel=1e-4)

    def test_outstanding_in_a_block(self):
        amounts = np.random.default_rng(0).random((50, 16 * 16))
        assert len(outstanding(amounts, (16, 16))) == 0
        amounts[[3, 5, 8], 17] = amounts[[1, 2], 255] = 40  # two are too few
        assert [np.flatnonzero(row).tolist() for row in outstanding(amounts, (16, 16))] == [[3, 5, 8]]

    def test_distinct_keeps_the_first_of_each(self):
        rows = np.array([[1, 0], [0, 1], [1, 0], [1, 1]], dtype=bool)
        assert distinct(rows).tolist() == [[True, False], [False, True], [True, True]]

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

    def test_a_tag_that_moves_is_told_from_the_rest(self):
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:16, :16]
        centre, width = rng.normal(8, 2, (2, 300, 1, 1)), rng.uniform(1.5, 3, (300, 1, 1))
        maps = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / width**2) * rng.uniform(0.5, 2, (300, 1, 1))
        maps += rng.normal(0, 0.1, maps.shape)
        for index in range(24):
            column = int(rng.integers(5, 9))
            maps[index, :2, column : column + 3] += 1
        tagged = np.arange(300) < 24
        first = analyse_maps(maps).groups[0]
        assert first.members[:24].all()
        assert roc_auc_score(tagged, first.score) > 0.99

    def test_a_map_that_explodes_hides_no_group(self):
        maps = planted()
        maps[50] *= 1e12
        assert np.flatnonzero(analyse_maps(maps).groups[0].members).tolist() == list(range(8))

    def test_groups_that_share_half_of_their_members_are_one(self):
        points = np.random.default_rng(0).random((20, 4)).astype(np.float32)
        partition = (np.arange(20) >= 6).astype(int)
        groups = suspicious_groups(points, points, points, [partition, partition], (2, 2))
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
