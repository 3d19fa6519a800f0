"""How clearly a group of maps differs from the rest of its class: a linear discriminant.

The share of relevance within a region finds a tag that stands still. Where an artefact moves a little or is spread over the image,
each cell of it says little, and the object's relevance in the same cells hides it. A linear discriminant
weighs all cells together and discounts what varies within the class anyway (Fisher 1936; shrunk as in Friedman 1989,
"Regularized discriminant analysis", by as much as Ledoit and Wolf 2004 estimate).

Here it is ridge regression of membership on the maps, which has the same direction and gives, from one factorisation
that all groups share, the score of each map under the discriminant that was fitted without it (leave-one-out, Allen 1974).
Scored by a discriminant that has seen it, any group looks apart from the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from scipy.ndimage import gaussian_filter1d
from sklearn.covariance import ledoit_wolf_shrinkage

_SIDE = 14  # cells; a blurred map is sampled at no more than twice as many
_BLUR = 1 / 16  # of the side, standard deviation: how far an artefact may move and still be the same
_LOUDEST = 3.0  # times the median map
_MOST_SHRUNK = 0.9
_MOST_FEATURES = 256
_MANY = 1024  # samples


def amounts(maps: np.ndarray) -> np.ndarray:
    """Divide all maps of a class by one number, so that a map with more relevance than others keeps more.

    The share of relevance in a place says where a map looks; the amount, in parts of the class score, what that place adds
    to the decision. An artefact comes on top of the object: it changes the amount more clearly than the shares.

    Parameters
    ----------
    maps
        [n, ...] real and finite.

    Returns
    -------
    numpy.ndarray
        float64, of the same shape: divided by the median over the maps of the sum of magnitudes. A map of more than `_LOUDEST` times
        that (a denominator near zero somewhere) is brought down to it, since it would outweigh all others.
    """
    return maps / _scales(maps).reshape(-1, *[1] * (maps.ndim - 1))


def precision(samples: int) -> type[np.floating[Any]]:
    """What groups of a class are computed in: float32 for a class that takes long, where it takes half the time."""
    return np.float64 if samples < _MANY else np.float32


def carrying(features: np.ndarray) -> np.ndarray:
    """Reduce the relevance of a class's features, [n, C] real and finite, to `amounts` of those that carry its decisions:
    [n, at most 256] float64, the features whose relevance varies most. An artefact in use adds relevance to some of them."""
    scale = _scales(features)[:, None]
    # Some at a time: a large class has a gigabyte of features in double precision.
    parts = range(0, features.shape[1], _MOST_FEATURES)
    varied = [(features[:, part : part + _MOST_FEATURES] / scale).var(axis=0) for part in parts]
    most = np.argsort(-np.concatenate([*varied, []]), kind="stable")[:_MOST_FEATURES]
    return features[:, np.sort(most)] / scale


def blurred(maps: np.ndarray) -> np.ndarray:
    """Blur maps [n, H, W] and flatten them, [n, d] float64: an artefact that moves a little then stays within its cells.

    Maps of more than `_SIDE` cells a side are sampled more coarsely, which the blur allows.
    """
    rows, columns = (_blur_matrix(side) for side in maps.shape[1:])
    return (rows @ maps @ columns.T).reshape(len(maps), -1)


class Discriminant:
    """Ridge regression of membership on the points of a class, [n, d] real; groups are columns of its right-hand side."""

    def __init__(self, points: np.ndarray) -> None:
        samples, size = points.shape
        centred = points - points.mean(axis=0)
        variance = float(np.einsum("ij,ij->", centred, centred)) / max(samples * size, 1)
        if not variance > 0:  # all points are the same: there is nothing to tell them by
            self._rows, self._leverage = np.zeros((samples, 1)), np.zeros(samples)
            return
        shrinkage = min(float(ledoit_wolf_shrinkage(centred, assume_centered=True)), _MOST_SHRUNK)
        covariance = centred.T @ centred * ((1 - shrinkage) / samples)
        covariance[np.diag_indices(size)] += max(shrinkage, 1e-6) * variance
        factor = scipy.linalg.cholesky(covariance, lower=True)
        # The hat matrix of the regression without its intercept is rows @ rows.T.
        rows = scipy.linalg.solve_triangular(factor, centred.T, lower=True).T * np.sqrt((1 - shrinkage) / samples)
        self._leverage = np.einsum("ij,ij->i", rows, rows)
        self._rows = rows.astype(precision(samples))

    def scores(self, members: np.ndarray) -> np.ndarray:
        """How far each point lies towards a group: (x - x̄)·w, with w and x̄ of all points but this one.

        Parameters
        ----------
        members
            bool [g, n].

        Returns
        -------
        numpy.ndarray
            float64 [g, n], 0 at the mean of the class.
        """
        samples = members.shape[1]
        if samples < 2:
            return np.zeros(members.shape)
        target = members.astype(self._rows.dtype)
        share = members.mean(axis=1, keepdims=True)
        fitted = share + ((target - share.astype(target.dtype)) @ self._rows) @ self._rows.T
        leverage = self._leverage + 1 / samples
        without = (fitted - leverage * target) / (1 - leverage)
        # Less the intercept, the share of members among the others, which alone would tell who was left out.
        return without - (samples * share - target) / (samples - 1)


def _scales(maps: np.ndarray) -> np.ndarray:
    """What `amounts` divides each map by: [n] float64, 1 where no map has any relevance."""
    sums = np.abs(maps).sum(axis=tuple(range(1, maps.ndim)), dtype=np.float64)
    if not sums.any():
        return np.ones(len(maps))
    return np.maximum(np.median(sums[sums > 0]), sums / _LOUDEST)


def _blur_matrix(side: int) -> np.ndarray:
    kernel = gaussian_filter1d(np.eye(side), max(side * _BLUR, 1e-3), axis=0, mode="nearest")
    return kernel[:: max(1, side // _SIDE)]
