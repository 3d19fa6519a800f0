"""Eigenpairs against numpy's dense solver, the choice of the number of clusters, and the clusters."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.sparse

from lrpfast.screening import spectral
from lrpfast.screening.graph import nearest_neighbours, neighbour_graph
from lrpfast.screening.spectral import Spectrum, by_size, cluster, cluster_count, laplacian_spectrum


def dense_laplacian(weights: np.ndarray) -> np.ndarray:
    """1 - D^(-1/2) W D^(-1/2); a node without an edge is a component of its own, with eigenvalue 0."""
    degrees = weights.sum(1)
    scale = np.where(degrees > 0, degrees, 1.0) ** -0.5
    laplacian = np.diag((degrees > 0).astype(float)) - scale[:, None] * weights * scale[None]
    return laplacian


def check(graph: scipy.sparse.csr_array, count: int) -> Spectrum:
    found = laplacian_spectrum(graph, count)
    laplacian = dense_laplacian(graph.toarray())
    expected = np.linalg.eigvalsh(laplacian)[:count]
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-7)
    vectors = found.eigenvectors
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(vectors.shape[1]), atol=1e-6)
    np.testing.assert_allclose(laplacian @ vectors, vectors * found.eigenvalues, atol=1e-5)
    return found


def blobs(sizes: list[int], distance: float = 8.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = distance * np.eye(len(sizes), 6)
    return np.concatenate([rng.normal(size=(n, 6)) + c for n, c in zip(sizes, centres, strict=True)])


class TestSpectrum:
    @hypothesis.given(st.integers(1, 40), st.floats(0.02, 0.5), st.integers(0, 2**31))
    def test_random_graphs_also_in_pieces(self, nodes, density, seed):
        rng = np.random.default_rng(seed)
        weights = np.triu(rng.random((nodes, nodes)) * (rng.random((nodes, nodes)) < density), 1)
        check(scipy.sparse.csr_array(weights + weights.T), min(8, nodes))

    @pytest.mark.parametrize("sizes", [[400], [300, 60, 40], [200, 200, 200]])
    def test_arpack_on_graphs_of_neighbours(self, sizes):
        assert sum(sizes) > spectral._DENSE
        found = check(neighbour_graph(nearest_neighbours(blobs(sizes, 3.0), 8)[0]), 10)
        assert found.eigenvalues[0] == 0

    def test_arpack_with_more_pieces_than_eigenpairs_wanted(self):
        points = np.repeat(np.arange(40.0)[:, None] * 100, 8, axis=0) + np.random.default_rng(0).random((320, 1))
        graph = neighbour_graph(nearest_neighbours(points, 3)[0])
        found = laplacian_spectrum(graph, 6)
        assert not found.eigenvalues.any()
        assert cluster_count(found.eigenvalues) == 6

    def test_arpack_misses_no_copy_of_zero(self):
        graph = neighbour_graph(nearest_neighbours(blobs([150, 150, 150, 150], 100.0), 5)[0])
        assert (check(graph, 8).eigenvalues < 1e-9).sum() == 4

    def test_it_is_the_same_every_time(self):
        graph = neighbour_graph(nearest_neighbours(blobs([300, 100], 3.0), 8)[0])
        first, second = laplacian_spectrum(graph), laplacian_spectrum(graph)
        np.testing.assert_array_equal(first.eigenvectors, second.eigenvectors)

    def test_signs_are_fixed(self):
        vectors = laplacian_spectrum(neighbour_graph(nearest_neighbours(blobs([50]), 5)[0])).eigenvectors
        assert (vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])] > 0).all()

    @pytest.mark.parametrize("nodes", [0, 1, 2])
    def test_tiny_graphs(self, nodes):
        found = laplacian_spectrum(neighbour_graph(np.zeros((nodes, 0), dtype=np.int32)))
        assert found.eigenvalues.tolist() == [0.0] * nodes
        assert found.eigenvectors.shape == (nodes, nodes)


class TestClusterCount:
    @pytest.mark.parametrize(
        ("eigenvalues", "count"),
        [
            ([0.0, 0.2, 0.25, 0.3], 1),
            ([0.0, 0.01, 0.2, 0.25], 2),
            ([0.0, 0.0, 0.0, 0.4, 0.5], 3),
            ([0.0, 0.1, 0.2, 0.3], 1),
            ([0.0, 0.0, 0.0], 3),
            ([0.0, 0.5], 1),
            ([0.0], 1),
            ([], 1),
        ],
    )
    def test_the_largest_gap(self, eigenvalues, count):
        # Equal gaps but for rounding: the first.
        assert cluster_count(np.round(np.array(eigenvalues), 12)) == count

    @pytest.mark.parametrize("sizes", [[120], [80, 40], [200, 12], [100, 60, 30]])
    def test_of_blobs(self, sizes):
        graph = neighbour_graph(nearest_neighbours(blobs(sizes), 6)[0])
        assert cluster_count(laplacian_spectrum(graph).eigenvalues) == len(sizes)


class TestCluster:
    def test_blobs_are_found_the_largest_first(self):
        sizes = [30, 100, 12]
        spectrum = laplacian_spectrum(neighbour_graph(nearest_neighbours(blobs(sizes), 6)[0]))
        labels = cluster(spectrum, 3)
        assert labels.tolist() == [1] * 30 + [0] * 100 + [2] * 12

    def test_one_cluster(self):
        spectrum = laplacian_spectrum(neighbour_graph(nearest_neighbours(blobs([20]), 3)[0]))
        assert not cluster(spectrum, 1).any()

    def test_more_clusters_than_distinct_rows(self):
        spectrum = Spectrum(np.zeros(3), np.eye(3)[[0, 0, 1, 1]])
        assert cluster(spectrum, 3).tolist() == [0, 0, 1, 1]

    def test_rows_are_compared_by_direction(self):
        # A node of small degree has a short row; k-means on the rows as they are would put the two short ones together.
        spectrum = Spectrum(np.zeros(2), np.array([[1.0, 0.0], [0.01, 0.0], [0.0, 0.01], [0.0, 1.0]]))
        assert cluster(spectrum, 2).tolist() == [0, 0, 1, 1]

    def test_by_size(self):
        assert by_size(np.array([7, 3, 3, 9, 9])).tolist() == [2, 0, 0, 1, 1]
        assert by_size(np.array([], dtype=int)).tolist() == []
