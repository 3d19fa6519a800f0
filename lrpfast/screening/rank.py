"""Which maps of a class form a suspicious group, and where its members look.

A decision that rests on something beside the object has a face of its own in relevance: a small group of maps, alike, with the
relevance in one place, apart from the rest of their class. Each of the four is a number in 0..1 here, and the suspicion
is their product: a group that lacks one of them has an explanation without a Clever Hans. Suspicion chooses what is
tried on the model; what the trial finds decides (`trial`).

The partition that the eigengap chooses shows the class at its coarsest: the ways to draw an object differ more than a tag of a few
pixels, and a small group hides in a large cluster. So groups are taken from the partitions into 2, 3, ... clusters alike,
and each is sharpened before it is judged: where its members look tells who belongs to it, and who belongs to it tells where they look.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

SMALLEST = 3  # members: of fewer no consensus can be told
_ROUNDS = 5  # of sharpening; two or three are enough as a rule
_HALF = 5.0
_SAME = 0.5  # groups that share so much of their members are one


@dataclasses.dataclass(frozen=True)
class Group:
    """Some maps of a class and what they have in common.

    Parameters
    ----------
    members
        bool [n].
    smallness
        1 - the group's share of the class.
    compactness
        Length of the mean of the members' maps, each scaled to length 1: 1 where all are the same.
    concentration
        1 - 2 a, a the smallest part of the area that holds half of the positive relevance of the mean map: 0 where it is
        even, towards 1 where it is in one place, the same one in all members.
    distance
        How far the members are from the rest of the class where they look: the median of their `score` above that of the rest, in
        standard deviations of the rest.
    region
        bool [H, W]: see `consensus_region`.
    mean
        float32 [H, W]: the mean of the members' normalised maps.
    score
        float32 [n], of every map of the class: the share of its relevance that lies in `region`.
    """

    members: np.ndarray
    smallness: float
    compactness: float
    concentration: float
    distance: float
    region: np.ndarray
    mean: np.ndarray
    score: np.ndarray

    @property
    def size(self) -> int:
        """How many members."""
        return int(self.members.sum())

    @property
    def separation(self) -> float:
        """`distance` brought to 0..1: a half at `_HALF` standard deviations."""
        return self.distance / (self.distance + _HALF)

    @property
    def suspicion(self) -> float:
        """The product of smallness, compactness, concentration and separation."""
        return self.smallness * self.compactness * self.concentration * self.separation


def suspicious_groups(
    points: np.ndarray,
    partitions: Iterable[np.ndarray],
    size: tuple[int, int],
    most: int = 5,
) -> list[Group]:
    """Judge the clusters of several partitions of a class, sharpened; the most suspicious first.

    Parameters
    ----------
    points
        [n, H*W] float32, normalised maps.
    partitions
        Each [n] integer: the cluster of each map, from 0.
    size
        (H, W).
    most
        How many are returned.

    Returns
    -------
    list of Group
        Of at least `SMALLEST` members and with a region; none that shares half of its members or more (Jaccard index) with one
        before it.
    """
    clusters = [partition == number for partition in partitions for number in range(int(partition.max(initial=-1)) + 1)]
    large = [members for members in clusters if members.sum() >= SMALLEST]
    if not large:
        return []
    exact = points.astype(np.float64)
    sharper = sharpen(exact, np.unique(np.stack(large), axis=0))
    groups = describe_groups(exact, np.unique(sharper, axis=0), size)
    kept: list[Group] = []
    for group in sorted(groups, key=lambda group: (-group.suspicion, group.size)):
        if len(kept) == most:
            break
        if group.region.any() and all(_jaccard(group.members, other.members) < _SAME for other in kept):
            kept.append(group)
    return kept


def sharpen(points: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Let members and region agree: a map belongs to a group if its share in the group's region is nearer to the members'
    than to the others' (median), and the region follows from the members; repeated until nothing changes.

    Parameters
    ----------
    points
        [n, H*W] float64, normalised maps.
    members
        bool [g, n], each group by itself.

    Returns
    -------
    numpy.ndarray
        bool [g, n]; as given, where a group is all of the class, or nothing sets it apart.
    """
    members = members.copy()
    moving = np.flatnonzero(~members.all(axis=1))
    for _ in range(_ROUNDS):
        share = region_share(points, _regions(_excess(points, members[moving])))
        changed = []
        for group, score in zip(moving, share, strict=True):
            own = members[group]
            halfway = (np.median(score[own]) + np.median(score[~own])) / 2
            sharper = score > halfway
            if SMALLEST <= sharper.sum() < len(sharper) and (sharper != own).any():
                members[group] = sharper
                changed.append(group)
        if not changed:
            break
        moving = np.array(changed)
    return members


def describe_groups(points: np.ndarray, members: np.ndarray, size: tuple[int, int]) -> list[Group]:
    """Describe groups, `members` bool [g, n], of the normalised maps `points` [n, H*W] float64; see `Group`."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    units = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
    chosen, counts = members.astype(np.float64), members.sum(axis=1, keepdims=True)
    means, alike = chosen @ points / counts, np.linalg.norm(chosen @ units / counts, axis=1)
    regions = _regions(_excess(points, members))
    scores = region_share(points, regions)
    return [
        Group(
            members=own,
            smallness=1 - float(own.mean()),
            compactness=float(compactness),
            concentration=concentration(mean),
            distance=_distance(score, own),
            region=region.reshape(size),
            mean=mean.reshape(size).astype(np.float32),
            score=score.astype(np.float32),
        )
        for own, compactness, mean, region, score in zip(members, alike, means, regions, scores, strict=True)
    ]


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


def consensus_region(excess: np.ndarray) -> np.ndarray:
    """Where a group's relevance lies and that of the rest of its class does not.

    The cells where the mean map of the members exceeds that of the rest by at least half of the largest excess (the
    width at half maximum).

    Parameters
    ----------
    excess
        Any shape, the mean normalised map of the members minus that of all others of the class (minus 0 where there are none).

    Returns
    -------
    numpy.ndarray
        bool, as large; empty where there is no excess.
    """
    largest = float(excess.max(initial=0.0))
    return (excess >= largest / 2) if largest > 0 else np.zeros(excess.shape, dtype=bool)


def region_share(points: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """The share of each normalised map [n, H*W] that lies in regions bool [g, H*W], signed: [g, n] in -1..1."""
    return regions.astype(points.dtype) @ points.T


def _excess(points: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[g, H*W]: the mean of each group's maps minus that of all others."""
    counts = members.sum(axis=1, keepdims=True)
    own = members.astype(points.dtype) @ points
    rest = points.sum(axis=0) - own
    rest[(counts == len(points)).ravel()] = 0
    return own / counts - rest / np.maximum(len(points) - counts, 1)


def _regions(excess: np.ndarray) -> np.ndarray:
    return np.array([consensus_region(row) for row in excess], dtype=bool).reshape(excess.shape)


def _distance(score: np.ndarray, members: np.ndarray) -> float:
    """See `Group.distance`; 0 without a rest, at most 100, which a rest without any spread would exceed."""
    if members.all():
        return 0.0
    rest = score[~members].astype(np.float64)
    above = float(np.median(score[members]) - np.median(rest))
    spread = max(float(rest.std()), 1e-6)
    return min(max(above / spread, 0.0), 100.0)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0
