"""Which maps of a class form a suspicious group, and where its members look.

A decision that rests on something beside the object has a face of its own in relevance: a small group of maps, alike, with the
relevance in one place, apart from the rest of their class. Each of the four is a number in 0..1 here, and the suspicion
is their product: a group that lacks one of them has an explanation without a Clever Hans. Suspicion chooses what is
tried on the model; what the trial finds decides (`trial`).

The partition that the eigengap chooses shows the class at its coarsest: the ways to draw an object differ more than a tag of a few
pixels, and a small group hides in a large cluster. So groups are taken from the partitions into 2, 3, ... clusters alike,
and brought to those that have something in common (`members`) before they are judged.

An artefact that is spread over the image, a tint or a kind of noise, is in no place of the map. It is in some of the channels that the
model's last layer reads, wherever they are: where their relevance is known (concept relevance, Achtibat et al. 2023), groups are
looked for in it as well, by the same means. A place is given to those, too, since a trial needs one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from lrpfast.screening.discriminant import Discriminant, precision
from lrpfast.screening.members import (
    SMALLEST,
    components,
    distinct,
    excess,
    halves,
    in_deviations,
    median_of,
    outstanding,
    parts,
    purify,
    region_share,
    regions,
    sharpen,
)

_HALF = 8.0
_SAME = 0.5  # groups that share so much of their members are one
_BY_CHANCE = 2  # members: a map or two that resemble another one are in every class, and make any three far from it
# By how much groups that chance makes of features lie nearer than those of maps: medians of classes without an artefact are 2.7 and 4.2
# (digits), 3.4 and 6.1 (shapes; benchmarks/SCREENING.md).
_FEATURES_NEARER = 1.6
_FALLING = 3  # power of the distance by which a class's groups count for the score of its maps


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
        How far the members are from the rest of the class, in standard deviations of the rest: the geometric mean of two
        distances of medians, of the amount of relevance in `region` (`by_features`: in the features that they have more of) and
        of `score`, times 1 to 2 by the `gap` in `score`, and times
        k / (k + 2) for k members; `by_features`, times 1.6, so that the two kinds of groups are on one scale, that of
        maps. What is rare in a class stands out in one of them and thins out towards the rest; an artefact
        adds relevance in its place, is unlike all else, and is there or not. A few maps can be found that are far from the
        rest by chance, many cannot.
    region
        bool [H, W]: see `consensus_region`.
    mean
        float32 [H, W]: the mean of the members' normalised maps.
    score
        float32 [n], of every map of the class: how clearly it belongs to the group, by a discriminant that has not seen it
        (`discriminant`), in standard deviations of the rest above its median.
    by_features
        Whether the discriminant is of the last features' relevance, and not of the maps.
    """

    members: np.ndarray
    smallness: float
    compactness: float
    concentration: float
    distance: float
    region: np.ndarray
    mean: np.ndarray
    score: np.ndarray
    by_features: bool = False

    @property
    def size(self) -> int:
        """How many members."""
        return int(self.members.sum())

    @property
    def separation(self) -> float:
        """`distance` brought to 0..1: a half at `_HALF` standard deviations."""
        return self.distance**2 / (self.distance**2 + _HALF**2)

    @property
    def suspicion(self) -> float:
        """The product of smallness, compactness, concentration and separation."""
        return self.smallness * self.compactness * self.concentration * self.separation


def suspicious_groups(
    points: np.ndarray,
    amounts: np.ndarray,
    evidence: np.ndarray,
    partitions: Iterable[np.ndarray],
    size: tuple[int, int],
    most: int = 5,
    features: np.ndarray | None = None,
) -> list[Group]:
    """Judge the groups that the clusters of several partitions of a class, and its features, lead to; the most suspicious first.

    Parameters
    ----------
    points
        [n, H*W] real, normalised maps.
    amounts
        [n, H*W] real, the same maps by `discriminant.amounts`.
    evidence
        [n, d] real: what the discriminant tells members by; for maps, `discriminant.blurred` of the amounts.
    partitions
        Each [n] integer: the cluster of each map, from 0.
    size
        (H, W).
    most
        How many are returned.
    features
        [n, c] float64, relevance of features by `discriminant.carrying`; None, or c = 0: not known.

    Returns
    -------
    list of Group
        The one farthest from the rest, then the most suspicious, of at least `SMALLEST` members and with a region; none that shares
        half of its members or more (Jaccard index) with one before it.
    """
    clusters = [partition == number for partition in partitions for number in range(int(partition.max(initial=-1)) + 1)]
    large = [members for members in clusters if members.sum() >= SMALLEST]
    if not large:
        return []
    points, amounts = (maps.astype(precision(len(points)), copy=False) for maps in (points, amounts))
    discriminant = Discriminant(evidence)
    starts = np.concatenate([sharpen(points, distinct(np.stack(large))), outstanding(amounts, size)])
    groups = describe_groups(points, amounts, discriminant, purify(discriminant, starts), size)
    if features is not None and features.size:
        groups += _groups_by_features(points, amounts, features, size)
    # What is spread over the image is not concentrated, and yet may be far away.
    farthest = max((group.distance for group in groups), default=0.0)
    groups.sort(key=lambda group: (group.distance < farthest, -group.suspicion, group.size))
    kept: list[Group] = []
    for group in groups:
        if len(kept) == most:
            break
        if group.region.any() and all(_jaccard(group.members, other.members) < _SAME for other in kept):
            kept.append(group)
    return kept


def _groups_by_features(
    points: np.ndarray, amounts: np.ndarray, features: np.ndarray, size: tuple[int, int]
) -> list[Group]:
    discriminant = Discriminant(features)
    coordinates = components(features)
    found = purify(discriminant, distinct(np.concatenate([halves(coordinates), parts(coordinates)])))
    return describe_groups(points, amounts, discriminant, found, size, features.astype(points.dtype, copy=False))


def describe_groups(
    points: np.ndarray,
    amounts: np.ndarray,
    discriminant: Discriminant,
    members: np.ndarray,
    size: tuple[int, int],
    features: np.ndarray | None = None,
) -> list[Group]:
    """Describe groups, `members` bool [g, n], of the maps `points` and `amounts`, [n, H*W] float64, told by `features` where they are
    given; see `Group`."""
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    units = np.divide(points, lengths, out=np.zeros_like(points), where=lengths > 0)
    chosen, counts = members.astype(points.dtype), members.sum(axis=1, keepdims=True)
    means, alike = chosen @ points / counts, np.linalg.norm(chosen @ units / counts, axis=1)
    places = regions(excess(amounts, members))
    within = amounts, places
    if features is not None:
        within = features, regions(excess(features, members))
    inside = in_deviations(region_share(*within), members)
    scores = in_deviations(discriminant.scores(members), members)
    near = np.sqrt(np.maximum(median_of(inside, members), 0) * np.maximum(median_of(scores, members), 0)).ravel()
    if features is not None:
        near *= _FEATURES_NEARER
    return [
        Group(
            members=own,
            smallness=1 - float(own.mean()),
            compactness=float(compactness),
            concentration=concentration(mean),
            distance=float(middles * (1 + gap(score, own)) * own.sum() / (own.sum() + _BY_CHANCE)),
            region=region.reshape(size),
            mean=mean.reshape(size).astype(np.float32),
            score=score.astype(np.float32),
            by_features=features is not None,
        )
        for own, compactness, mean, region, middles, score in zip(
            members, alike, means, places, near, scores, strict=True
        )
    ]


def class_score(groups: Sequence[Group]) -> np.ndarray:
    """How suspicious each map of a class is, by all its groups: what moves through an image is found as several, a place each.

    Parameters
    ----------
    groups
        Of the class, some.

    Returns
    -------
    numpy.ndarray
        [n] real: the largest of the groups' scores, each in parts of its own members' median and times the cube of its distance in
        parts of the farthest one's; 1 for a typical member of the farthest group. By the cube, a group half as far, which chance
        may have made, hardly counts.
    """
    farthest = max(group.distance for group in groups)
    each = [
        group.score
        / max(float(np.median(group.score[group.members])), 1e-12)
        * (group.distance / max(farthest, 1e-12)) ** _FALLING
        for group in groups
    ]
    return np.max(each, axis=0)


def gap(score: np.ndarray, members: np.ndarray) -> float:
    """How much emptier the middle between the others and the members is than where the members are: 0 to 1.

    The tail of a distribution, a group by nothing but a limit, thins out steadily and has none.

    Parameters
    ----------
    score
        [n] real, of every map: 0 in the median of the others, M in that of the members.
    members
        bool [n].

    Returns
    -------
    float
        1 - (m + 1) / (t + 1), m maps at 0.3 M to 0.7 M and t at 0.8 M to 1.2 M; 0 where there are more in the middle.
    """
    if members.all():
        return 0.0
    share = score / max(float(np.median(score[members])), 1e-12)
    middle, top = (int(((share > low) & (share < low + 0.4)).sum()) for low in (0.3, 0.8))
    return max(0.0, 1 - (middle + 1) / (top + 1))


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


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    either = int((one | other).sum())
    return int((one & other).sum()) / either if either else 1.0
