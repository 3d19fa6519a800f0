"""How suspicious a cluster of maps is, and where its members look.

A decision that rests on something beside the object has a face of its own in relevance: a small group of maps, alike, with the
relevance in one place, apart from the rest of their class. Each of the four is a number in 0..1 here, and the suspicion
is their product: a cluster that lacks one of them has an explanation without a Clever Hans. Suspicion chooses what is
tried on the model; what the trial finds decides (`verification`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse

SMALLEST = 3  # members: of fewer no consensus can be told


@dataclasses.dataclass(frozen=True)
class ClusterFacts:
    """What the maps of a cluster have in common.

    Parameters
    ----------
    cluster
        Its number within the class.
    size
        Members.
    share
        Of the class.
    smallness
        1 - share.
    compactness
        Length of the mean of the members' maps, each scaled to length 1: 1 where all are the same.
    concentration
        1 - 2 a, a the smallest part of the area that holds half of the positive relevance of the mean map: 0 where it is
        even, towards 1 where it is in one place, the same one in all members.
    separation
        The part of the edges' weight at the members that stays within the cluster, 1 - conductance.
    region
        bool [H, W]: see `consensus_region`.
    mean
        float32 [H, W]: the mean of the members' normalised maps.
    """

    cluster: int
    size: int
    share: float
    smallness: float
    compactness: float
    concentration: float
    separation: float
    region: np.ndarray
    mean: np.ndarray

    @property
    def suspicion(self) -> float:
        """The product of smallness, compactness, concentration and separation; 0 below `SMALLEST` members."""
        if self.size < SMALLEST:
            return 0.0
        return self.smallness * self.compactness * self.concentration * self.separation


def describe_clusters(
    points: np.ndarray, clusters: np.ndarray, graph: scipy.sparse.csr_array, size: tuple[int, int]
) -> list[ClusterFacts]:
    """Describe each cluster of a class.

    Parameters
    ----------
    points
        [n, H*W] float32, normalised maps.
    clusters
        [n] integer, the cluster of each, from 0 and without gaps.
    graph
        [n, n], their neighbourhood graph.
    size
        (H, W).

    Returns
    -------
    list of ClusterFacts
        By number of the cluster.
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", points, points, dtype=np.float64))
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0).astype(np.float32)
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    total = points.sum(axis=0, dtype=np.float64)
    facts = []
    for number in range(int(clusters.max(initial=-1)) + 1):
        members = clusters == number
        count = int(members.sum())
        own = points[members].sum(axis=0, dtype=np.float64)
        rest = total - own
        others = len(points) - count
        mean, mean_rest = own / count, rest / others if others else np.zeros_like(rest)
        volume = float(degrees[members].sum())
        kept = float(graph[np.flatnonzero(members)][:, np.flatnonzero(members)].sum())
        facts.append(
            ClusterFacts(
                cluster=number,
                size=count,
                share=count / len(points),
                smallness=1 - count / len(points),
                compactness=float(np.linalg.norm(inverse[members] @ points[members]) / count),
                concentration=concentration(mean),
                separation=kept / volume if volume else 1.0,
                region=consensus_region((mean - mean_rest).reshape(size)),
                mean=mean.reshape(size).astype(np.float32),
            )
        )
    return facts


def concentration(mean: np.ndarray) -> float:
    """1 - 2 a, a the smallest part of the cells that holds half of the positive relevance; 0 where there is none."""
    positive = np.sort(np.maximum(mean.ravel(), 0.0))[::-1].astype(np.float64)
    total = positive.sum()
    if not total > 0:
        return 0.0
    reached = np.cumsum(positive)
    needed = int(np.searchsorted(reached, total / 2 * (1 - 1e-12)))
    before = reached[needed - 1] if needed else 0.0
    cells = needed + (total / 2 - before) / positive[needed]  # the last cell in part, so that an even map gives 0
    return float(max(0.0, 1 - 2 * cells / len(positive)))


def consensus_region(difference: np.ndarray) -> np.ndarray:
    """Where a cluster's relevance lies and that of the rest of its class does not.

    The cells where the mean map of the members exceeds that of the rest by at least half of the largest excess (the
    width at half maximum).

    Parameters
    ----------
    difference
        [H, W], the mean normalised map of the members minus that of all others of the class (minus 0 where there are none).

    Returns
    -------
    numpy.ndarray
        bool [H, W]; empty where there is no excess.
    """
    largest = float(difference.max(initial=0.0))
    return (difference >= largest / 2) if largest > 0 else np.zeros(difference.shape, dtype=bool)


def region_share(points: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The share of each normalised map [n, H*W] that lies in a region [H, W], signed: float32 [n] in -1..1."""
    return points[:, region.ravel()].sum(axis=1)
