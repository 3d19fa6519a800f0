"""The neighbourhood graph of a class: which maps are alike.

Spectral relevance analysis (SpRAy, Lapuschkin et al. 2019, "Unmasking Clever Hans predictors") sees a class as a graph
whose nodes are maps and whose edges join each map to its nearest ones. Everything after it reads that graph alone, so it
is exact: an approximate search gives another graph at every run, and loses first what is small, which is what we look for.

The squared distances of a block of rows to all maps are one matrix product in float64. In float32 the expansion
|a - b|² = |a|² + |b|² - 2ab loses the distances of near duplicates to cancellation; float64 keeps them, maps are stored as
float16, and the product is still not what takes the time. The nearest of a row are then found without sorting: the
distance as float32 and the column are packed into one integer, distance first, so that a partition of integers orders by
distance and, where distances are equal, by column. A result therefore does not hang on the block, the threads or on how
a partition treats ties.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from lrpfast.errors import InputError, NumericsError

_BLOCK_BYTES = 64 * 2**20  # of float64 distances; their float32 and packed forms take 1.5 times as much again


def normalise_maps(maps: np.ndarray) -> np.ndarray:
    """Divide each map by the sum of its magnitudes.

    The signed sum, which is the class score that the map explains, is no scale: it comes near zero for samples that the
    model doubts, and the map explodes. A map that is zero everywhere stays zero; it is alike to other zero maps.

    Parameters
    ----------
    maps
        [n, ...] real; relevance, a map a row.

    Returns
    -------
    numpy.ndarray
        [n, d] float32, a row flattened.

    Raises
    ------
    NumericsError
        NaN or infinity in a map.
    """
    rows = maps.reshape(len(maps), int(np.prod(maps.shape[1:])))
    sums = np.abs(rows).sum(axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():
        raise NumericsError(f"map {int(np.flatnonzero(~np.isfinite(sums))[0])} holds NaN or infinity")
    sums[sums == 0] = 1.0
    return (rows / sums[:, None]).astype(np.float32)


def neighbour_count(samples: int) -> int:
    """How many neighbours a map has by default: about log₂ n, at least 3 and less than `samples`.

    A graph of random points becomes connected at about ln n neighbours (von Luxburg 2007, "A tutorial on spectral
    clustering", §8); more would tie a cluster of a few maps to its surroundings.
    """
    return max(min(max(3, round(float(np.log2(max(samples, 1))))), samples - 1), 0)


def nearest_neighbours(points: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest other points of each point, exactly.

    Parameters
    ----------
    points
        [n, d] real and finite.
    count
        Neighbours a point; at most n - 1.

    Returns
    -------
    (numpy.ndarray, numpy.ndarray)
        [n, count] int32, the neighbours from near to far, equal distances (as float32) by ascending index; and [n, count]
        float32, their Euclidean distances. A point is never its own neighbour, its duplicates are.

    Raises
    ------
    InputError
        `count` is out of range.
    """
    samples = len(points)
    if not 0 <= count <= max(samples - 1, 0):
        raise InputError(f"{count} neighbours of {samples} points: there are {max(samples - 1, 0)} others")
    index = np.empty((samples, count), dtype=np.int32)
    distance = np.empty((samples, count), dtype=np.float32)
    if count == 0:
        return index, distance
    values = points.astype(np.float64)
    squares = np.einsum("ij,ij->i", values, values)
    columns = np.arange(samples, dtype=np.int64)
    rows_a_block = max(1, _BLOCK_BYTES // (8 * samples))
    for start in range(0, samples, rows_a_block):
        stop = min(start + rows_a_block, samples)
        squared = values[start:stop] @ values.T
        squared *= -2.0
        squared += squares
        squared += squares[start:stop, None]
        # Below the rounding of the expansion two points are the same; a negative zero would not order as an integer.
        squared[squared < 1e-13 * (squares + squares[start:stop, None])] = 0.0
        squared[np.arange(stop - start), columns[start:stop]] = np.inf
        # The bits of a float that is not negative order as integers do.
        keys = squared.astype(np.float32).view(np.int32).astype(np.int64)
        keys <<= 32
        keys |= columns
        keys.partition(count - 1, axis=1)
        nearest = np.sort(keys[:, :count], axis=1)
        index[start:stop] = nearest & 0xFFFFFFFF
        distance[start:stop] = np.sqrt((nearest >> 32).astype(np.int32).view(np.float32))
    return index, distance


def neighbour_graph(index: np.ndarray) -> scipy.sparse.csr_array:
    """Join each point to its neighbours: the mean of the directed graph and its transpose.

    An edge weighs 1 where both ends chose each other and ½ where one did, so that a map in the middle of a class, which
    many rare ones choose for want of anything nearer, does not tie them together as strongly as they tie each other.

    Parameters
    ----------
    index
        [n, k] integer, the neighbours of each point.

    Returns
    -------
    scipy.sparse.csr_array
        [n, n] float64, symmetric, zero diagonal.
    """
    samples, count = index.shape
    starts = np.arange(0, samples * count + 1, count) if count else np.zeros(samples + 1, dtype=np.int64)
    directed = scipy.sparse.csr_array(
        (np.full(samples * count, 0.5), index.ravel().astype(np.int32), starts), shape=(samples, samples)
    )
    return (directed + directed.T).tocsr()
