"""Neighbours against scikit-learn's brute force in float64; and what distances are taken of."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from lrpfast.errors import InputError, NumericsError
from lrpfast.screening import graph
from lrpfast.screening.graph import nearest_neighbours, neighbour_count, neighbour_graph, normalise_maps


def brute(points: np.ndarray, count: int) -> np.ndarray:
    """Distances to the `count` nearest others, by scikit-learn."""
    found = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(points.astype(np.float64))
    return found.kneighbors()[0]


class TestNormaliseMaps:
    def test_a_map_is_divided_by_the_sum_of_its_magnitudes(self):
        maps = np.array([[[1.0, -3.0], [0.0, 4.0]], [[-2.0, 0.0], [0.0, 0.0]]])
        np.testing.assert_array_equal(normalise_maps(maps), [[0.125, -0.375, 0, 0.5], [-1, 0, 0, 0]])

    def test_a_map_whose_signed_sum_is_zero_does_not_explode(self):
        assert np.abs(normalise_maps(np.array([[[1e-20, -1e-20]]]))).max() == 0.5

    def test_zero_and_constant_maps(self):
        maps = np.stack([np.zeros((2, 2)), np.full((2, 2), 1e30)])
        np.testing.assert_array_equal(normalise_maps(maps), [[0] * 4, [0.25] * 4])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_refused(self, value):
        maps = np.zeros((3, 2, 2))
        maps[2, 0, 1] = value
        with pytest.raises(NumericsError, match="map 2 holds NaN or infinity"):
            normalise_maps(maps)


class TestNearestNeighbours:
    @hypothesis.given(st.data())
    def test_distances_are_those_of_brute_force_and_belong_to_the_indices(self, data):
        samples, width = data.draw(st.integers(2, 60)), data.draw(st.integers(1, 30))
        count = data.draw(st.integers(1, samples - 1))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        points = rng.normal(size=(samples, width)).astype(np.float32)
        if data.draw(st.booleans()):
            points = points[rng.integers(0, samples, samples)]  # with duplicates
        index, distance = nearest_neighbours(points, count)
        np.testing.assert_allclose(distance, brute(points, count), rtol=1e-6, atol=1e-6)
        own = np.linalg.norm(points[:, None].astype(np.float64) - points[index], axis=2)
        np.testing.assert_allclose(distance, own, rtol=1e-6, atol=1e-6)
        assert not (index == np.arange(samples)[:, None]).any()
        assert all(len(set(row)) == count for row in index.tolist())

    def test_near_duplicates_are_told_apart_where_float32_could_not(self):
        # |a|² = 1e6; squared distances of 1e-4 lie below float32's rounding of it.
        points = np.full((4, 100), 100.0)
        points[1, 0] += 0.01
        points[2, 0] += 0.02
        points[3, 0] += 0.05
        index, distance = nearest_neighbours(points, 3)
        assert index[0].tolist() == [1, 2, 3]
        np.testing.assert_allclose(distance[0], [0.01, 0.02, 0.05], rtol=1e-3)

    def test_duplicates_are_neighbours_of_each_other_by_index(self):
        points = np.ones((5, 3), dtype=np.float32)
        index, distance = nearest_neighbours(points, 2)
        assert index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]
        assert not distance.any()

    def test_ties_go_to_the_lower_index(self):
        points = np.array([[0.0], [1.0], [-1.0], [1.0]])
        assert nearest_neighbours(points, 3)[0][0].tolist() == [1, 2, 3]

    def test_blocks_do_not_matter(self, monkeypatch):
        points = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
        whole = nearest_neighbours(points, 5)
        monkeypatch.setattr(graph, "_BLOCK_BYTES", 7 * 8 * 50)
        for one, other in zip(whole, nearest_neighbours(points, 5), strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize("samples", [0, 1])
    def test_classes_of_none_and_one(self, samples):
        index, distance = nearest_neighbours(np.zeros((samples, 3)), 0)
        assert index.shape == distance.shape == (samples, 0)

    def test_too_many_neighbours(self):
        with pytest.raises(InputError, match="3 neighbours of 3 points: there are 2 others"):
            nearest_neighbours(np.zeros((3, 1)), 3)


@pytest.mark.parametrize(("samples", "count"), [(0, 0), (1, 0), (2, 1), (3, 2), (8, 3), (1300, 10), (50_000, 16)])
def test_neighbour_count(samples, count):
    assert neighbour_count(samples) == count


def test_the_graph_weighs_mutual_edges_twice():
    index = np.array([[1], [0], [1]])
    np.testing.assert_array_equal(neighbour_graph(index).toarray(), [[0, 1, 0], [1, 0, 0.5], [0, 0.5, 0]])


def test_the_graph_of_no_neighbours_has_no_edges():
    assert neighbour_graph(np.zeros((3, 0), dtype=np.int32)).nnz == 0
