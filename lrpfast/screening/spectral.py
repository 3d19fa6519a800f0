"""Spectral clustering of a neighbourhood graph: eigenpairs, how many clusters, which map is in which.

The symmetric normalised Laplacian is L = 1 - D^(-1/2) W D^(-1/2). Its smallest eigenvalues say how nearly the graph falls
apart, its eigenvectors how (von Luxburg 2007, "A tutorial on spectral clustering"; Ng, Jordan and Weiss 2001).

ARPACK finds the largest eigenvalues of W' = D^(-1/2) W D^(-1/2) = 1 - L far faster than the smallest of L by factorisation,
whose fill-in explodes on such graphs. Its weak spot are eigenvalues that occur several times, of which it may miss some,
and in a graph with c components zero occurs c times. But these are known beforehand: the eigenvectors of zero are D^(1/2)
on each component. They are written down exactly, and ARPACK sees the operator without them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from sklearn.cluster import KMeans

from lrpfast.screening.threads import one_thread

EIGENPAIRS = 12
_DENSE = 256  # up to so many nodes LAPACK is as fast as ARPACK, and cannot fail to converge


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The smallest eigenpairs of a graph's Laplacian.

    Parameters
    ----------
    eigenvalues
        [m] float64, ascending, in [0, 2].
    eigenvectors
        [n, m] float64, orthonormal columns.
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray


def laplacian_spectrum(graph: scipy.sparse.csr_array, count: int = EIGENPAIRS) -> Spectrum:
    """Compute the smallest eigenpairs of the symmetric normalised Laplacian.

    Parameters
    ----------
    graph
        [n, n] symmetric, weights ≥ 0. A node without an edge is a component of its own.
    count
        Eigenpairs wanted; of a graph with fewer nodes, all.

    Returns
    -------
    Spectrum
        `min(count, n)` eigenpairs. Signs of the eigenvectors are fixed: the largest magnitude is positive.
    """
    nodes = graph.shape[0]
    count = min(count, nodes)
    if count == 0:
        return Spectrum(np.zeros(0), np.zeros((nodes, 0)))
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    known = _null_space(graph, degrees)
    if known.shape[1] >= count:
        return Spectrum(np.zeros(count), _with_fixed_signs(known[:, :count]))
    scale = np.zeros(nodes)
    np.divide(1.0, np.sqrt(degrees), out=scale, where=degrees > 0)
    similarity = (graph.multiply(scale[:, None])).multiply(scale[None, :]).tocsr()
    wanted = count - known.shape[1]
    found, vectors = _dense(similarity, known, wanted) if nodes <= _DENSE else _arpack(similarity, known, wanted)
    order = np.argsort(found)[::-1]
    eigenvalues = np.clip(np.concatenate([np.zeros(known.shape[1]), 1.0 - found[order]]), 0.0, 2.0)
    return Spectrum(eigenvalues, _with_fixed_signs(np.concatenate([known, vectors[:, order]], axis=1)))


def cluster_count(eigenvalues: np.ndarray) -> int:
    """Choose the number of clusters: where the gap between successive eigenvalues is largest (the eigengap).

    With k clusters that hang together by little, the first k eigenvalues are near 0 and the next is not (von Luxburg 2007,
    §8). One cluster needs no rule of its own: the first eigenvalue is always 0, so in a class of one piece the largest gap
    is the first, from 0 to λ₂, the graph's algebraic connectivity. Of equal gaps the first is taken.

    Parameters
    ----------
    eigenvalues
        [m] ascending, the smallest of the Laplacian.

    Returns
    -------
    int
        1 to m - 1; 1 where m < 3. A graph in m pieces or more, whose eigenvalues known here are all 0, has m.
    """
    if len(eigenvalues) < 3:
        return 1
    gaps = np.diff(eigenvalues)
    if not gaps.max() > 1e-9:
        return len(eigenvalues)
    return int(np.argmax(gaps)) + 1


def cluster(spectrum: Spectrum, count: int, seed: int = 0, starts: int = 10) -> np.ndarray:
    """Assign each node to a cluster: k-means on the row-normalised eigenvectors (Ng, Jordan and Weiss 2001).

    Parameters
    ----------
    spectrum
        At least `count` eigenpairs.
    count
        Number of clusters.
    seed, starts
        Of the starts of k-means, and how many there are: the best result is taken.

    Returns
    -------
    numpy.ndarray
        [n] int32, clusters numbered from 0 by falling size (equal sizes by their first node). Fewer than `count` may
        be used, where rows coincide.
    """
    nodes = len(spectrum.eigenvectors)
    if count <= 1 or nodes <= 1:
        return np.zeros(nodes, dtype=np.int32)
    rows = spectrum.eigenvectors[:, :count].copy()
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    np.divide(rows, lengths, out=rows, where=lengths > 1e-12)
    # Rows of disconnected pieces coincide up to rounding; k-means warns of fewer distinct points than clusters.
    distinct = len(np.unique(np.round(rows, 9), axis=0))
    with one_thread():
        labels = KMeans(min(count, distinct), n_init=starts, random_state=seed).fit_predict(rows)
    return by_size(labels)


def by_size(labels: np.ndarray) -> np.ndarray:
    """Renumber clusters by falling size, equal sizes by their first node; int32."""
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return rank[inverse]


def _null_space(graph: scipy.sparse.csr_array, degrees: np.ndarray) -> np.ndarray:
    """[n, c]: the eigenvectors of eigenvalue 0, one a connected component, D^(1/2) on it; larger components first."""
    count, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    component = by_size(component)
    vectors = np.zeros((len(degrees), count))
    vectors[np.arange(len(degrees)), component] = np.sqrt(degrees)
    lonely = degrees == 0
    vectors[lonely, component[lonely]] = 1.0
    return vectors / np.linalg.norm(vectors, axis=0)


def _dense(similarity: scipy.sparse.csr_array, known: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    nodes = similarity.shape[0]
    # The known eigenvectors go from 1 to below everything else, which is at least -1.
    matrix = similarity.toarray() - 3.0 * (known @ known.T)
    return scipy.linalg.eigh(matrix, subset_by_index=(nodes - wanted, nodes - 1))


def _arpack(similarity: scipy.sparse.csr_array, known: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    nodes = similarity.shape[0]

    def apply(vector: np.ndarray) -> np.ndarray:
        vector = vector.ravel()
        return similarity @ vector - 3.0 * (known @ (known.T @ vector))

    operator = scipy.sparse.linalg.LinearOperator((nodes, nodes), matvec=apply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(nodes)
    subspace = min(nodes, max(4 * wanted, 40))
    try:
        return scipy.sparse.linalg.eigsh(
            operator, k=wanted, which="LA", v0=start, ncv=subspace, tol=1e-8, maxiter=50 * nodes
        )
    except scipy.sparse.linalg.ArpackNoConvergence:
        return _dense(similarity, known, wanted)


def _with_fixed_signs(vectors: np.ndarray) -> np.ndarray:
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return vectors * np.where(largest < 0, -1.0, 1.0)
