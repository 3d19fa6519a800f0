"""Who belongs to a group of maps: from a cluster, which is rarely pure, to those that have the same thing in common.

Two steps, both of the same form: the members say what sets them apart, and what sets them apart says who is a member. The first
takes a place, where the members look and the others do not. The second takes a linear discriminant of all
cells (`discriminant`), and goes from what is likely a group to what is surely one.

Clusters of maps are not the only start (`outstanding`, `halves`, `parts`). All groups of a class are done at once, [g, n]: a class
has some dozens, and one product of matrices is for all.
"""

from __future__ import annotations

import numpy as np
from sklearn.cluster import KMeans

from lrpfast.screening.discriminant import Discriminant
from lrpfast.screening.threads import one_thread

SMALLEST = 3  # members: of fewer no consensus can be told
_LARGEST = 0.95  # of the class; of what is left no spread can be told
_ROUNDS = 5  # two or three are enough where there is a group
_BLOCKS = 8
_FARTHEST = 100.0
_CUTS = (4.0, 3.0)  # standard deviations: the first finds small groups in large clusters, the second spread-out ones
_COMPONENTS, _EACH = 16, 8  # principal components that groups start from, and samples for each of them at least
_CLUSTERED, _PARTITIONS = 8, (2, 3, 4, 6, 8)  # those that classes are clustered along, and into how many parts
_SHARE = 0.35  # of the members' median score: less is no member, however many standard deviations it is
_SMALL, _SHARP = 0.1, 0.5  # groups of at most this part of the class are tried with this share as well


def outstanding(amounts: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Groups to start from where clusters have none: the maps that have far more relevance in a part of the image than others.

    What is spread over the image moves no map away from its neighbours, and a few maps make no cluster.

    Parameters
    ----------
    amounts
        [n, H*W] real, by `discriminant.amounts`.
    size
        (H, W); the parts are the blocks of a grid of at most 8 x 8.

    Returns
    -------
    numpy.ndarray
        bool [g, n], a block each: those at least `_CUTS[0]` standard deviations above the median; blocks with too few are left out.
    """
    height, width = size
    rows, columns = (np.unique(np.arange(_BLOCKS) * side // _BLOCKS) for side in size)
    blocks = np.add.reduceat(np.add.reduceat(amounts.reshape(-1, height, width), rows, axis=1), columns, axis=2)
    each = np.ascontiguousarray(blocks.reshape(len(amounts), -1).T)
    return _proper(standard_scores(each, np.zeros(each.shape, dtype=bool)) > _CUTS[0])


def components(points: np.ndarray) -> np.ndarray:
    """Coordinates along the largest principal components, in standard deviations.

    Parameters
    ----------
    points
        [n, d] float64.

    Returns
    -------
    numpy.ndarray
        float64 [c, n], the largest component last: as many as n can tell, at most `_COMPONENTS`.
    """
    centred = points - points.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    told = min(_COMPONENTS, len(points) // _EACH, int((values > values[-1:] * 1e-12).sum()))
    along = vectors[:, -told:].T @ centred.T if told else np.zeros((0, len(points)))
    return along / np.sqrt(np.maximum(values[len(values) - told :, None] / len(points), 1e-300))


def halves(coordinates: np.ndarray) -> np.ndarray:
    """Groups to start from where nothing is known of places: those that lie to one side of the class along a principal component.

    Parameters
    ----------
    coordinates
        [c, n], by `components`.

    Returns
    -------
    numpy.ndarray
        bool [g, n]: at least a standard deviation to either side.
    """
    return _proper(np.concatenate([coordinates > 1, coordinates < -1]))


def parts(coordinates: np.ndarray) -> np.ndarray:
    """More groups to start from: clusters of the class along its largest principal components together, by k-means.

    What is in a third of the class lies along several components at once, and no half of one is like it.

    Parameters
    ----------
    coordinates
        [c, n], by `components`.

    Returns
    -------
    numpy.ndarray
        bool [g, n], the clusters of several partitions.
    """
    rows = coordinates[-_CLUSTERED:].T
    # Those of equal samples are equal up to rounding; k-means warns of fewer distinct points than clusters.
    different = len(np.unique(np.round(rows, 9), axis=0)) if rows.size else 0
    found = [np.zeros((0, len(rows)), dtype=bool)]
    with one_thread():
        for count in (k for k in _PARTITIONS if k <= different):
            labels = KMeans(count, n_init=2, random_state=0).fit_predict(rows)
            found.append(labels == np.arange(count)[:, None])
    return _proper(np.concatenate(found))


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
        share = region_share(points, regions(excess(points, members[moving])))
        own = members[moving]
        sharper = share > (median_of(share, own) + median_of(share, ~own)) / 2
        counts = sharper.sum(axis=1)
        changed = (counts >= SMALLEST) & (counts < len(points)) & (sharper != own).any(axis=1)
        moving = moving[changed]
        members[moving] = sharper[changed]
        if not len(moving):
            break
    return members


def purify(discriminant: Discriminant, members: np.ndarray) -> np.ndarray:
    """Let members and discriminant agree: who scores far above the others is a member, and the discriminant follows from the
    members; repeated until nothing changes, at each of `_CUTS`, and more sharply from small groups.

    The cut is a number of standard deviations above the median of those who are no members, not halfway between the two medians: a
    group that is mostly wrong, a tag's cluster with all that resembles it, is emptied of what does not stand out. Where members
    stand out by far more, the cut rises with them: relevance has long tails, and what lies in a tail would dilute a small group until
    the discriminant is another one. Of the smallest groups one false member is enough for that; they are tried with a cut that rises
    faster as well, which would leave of a spread-out one nothing but its core.

    Parameters
    ----------
    discriminant
        Of the class.
    members
        bool [g, n], groups to start from.

    Returns
    -------
    numpy.ndarray
        bool [g', n], each group once; those that lose all but a few members, or gain all others, are left out.
    """
    small = members[members.sum(axis=1) <= _SMALL * members.shape[1]]
    found = [_agree(discriminant, members, cut, _SHARE) for cut in _CUTS]
    return distinct(np.concatenate([*found, _agree(discriminant, small, _CUTS[0], _SHARP)]))


def _agree(discriminant: Discriminant, members: np.ndarray, least: float, share: float) -> np.ndarray:
    """Groups that have nobody below the cut and everybody above it; those that never settle as they are after some rounds."""
    found, moving = [], _proper(members)
    for _ in range(_ROUNDS):
        scores = standard_scores(discriminant.scores(moving), moving)
        after = scores > np.maximum(least, share * median_of(scores, moving))
        same = (after == moving).all(axis=1)
        found.append(moving[same])
        moving = _proper(after[~same])
    return np.concatenate([*found, moving])


def standard_scores(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores [g, n] in standard deviations above the median of those that are no `members`, bool [g, n], of whom there are some; from
    the median absolute deviation, which the few members that are missing do not widen."""
    above = scores - median_of(scores, ~members)
    spread = 1.4826 * median_of(np.abs(above), ~members)
    return above / np.maximum(spread, 1e-9)


def in_deviations(scores: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Scores [g, n] above the median of those that are no `members`, bool [g, n], in their standard deviations, which is what a rare
    kind of map widens; 0 where there are none, at most `_FARTHEST`, which a rest without any spread would exceed."""
    rest = ~members
    if not rest.any():
        return np.zeros(scores.shape)
    count = np.maximum(rest.sum(axis=1, keepdims=True), 1)
    mean = (scores * rest).sum(axis=1, keepdims=True) / count
    spread = np.sqrt((((scores - mean) * rest) ** 2).sum(axis=1, keepdims=True) / count)
    out = (scores - median_of(scores, rest)) / np.maximum(spread, 1e-6)
    return np.where(rest.any(axis=1, keepdims=True), np.clip(out, -_FARTHEST, _FARTHEST), 0.0)


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


def excess(points: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[g, H*W]: the mean of each group's maps minus that of all others."""
    counts = members.sum(axis=1, keepdims=True)
    own = members.astype(points.dtype) @ points
    rest = points.sum(axis=0) - own
    rest[(counts == len(points)).ravel()] = 0
    return own / counts - rest / np.maximum(len(points) - counts, 1)


def regions(excess: np.ndarray) -> np.ndarray:
    return np.array([consensus_region(row) for row in excess], dtype=bool).reshape(excess.shape)


def distinct(members: np.ndarray) -> np.ndarray:
    """Each row once; `numpy.unique` takes longer for it than all the rest."""
    first = {row.tobytes(): number for number, row in reversed(list(enumerate(members)))}
    return members[sorted(first.values())]


def _proper(members: np.ndarray) -> np.ndarray:
    """Those groups that have members enough and others enough, each once."""
    counts = members.sum(axis=1)
    return distinct(members[(counts >= SMALLEST) & (counts <= _LARGEST * members.shape[1])])


def median_of(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """[g, 1]: the median of the chosen of each row [g, n]; infinity in a row with none. As float32, which sorts in half the time."""
    ordered = np.sort(np.where(chosen, values, np.inf).astype(np.float32), axis=1)
    last = np.maximum(chosen.sum(axis=1, keepdims=True) - 1, 0)
    return (np.take_along_axis(ordered, last // 2, 1) + np.take_along_axis(ordered, (last + 1) // 2, 1)) / 2
