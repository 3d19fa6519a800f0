"""Two coordinates a map, for the picture alone: nothing is decided by them.

t-SNE of the spectral embedding (van der Maaten and Hinton 2008), from scikit-learn. Of a large class a part is drawn: all that is
suspicious, and others at random, because a picture of more points is a blot and takes minutes.
"""

from __future__ import annotations

import numpy as np

POINTS = 800


def chosen_points(groups: np.ndarray, most: int = POINTS, seed: int = 0) -> np.ndarray:
    """Which of n samples are drawn: members of `groups`, bool [g, n], first, the rest at random; int64, ascending."""
    samples = groups.shape[1]
    if samples <= most:
        return np.arange(samples)
    rng = np.random.default_rng(seed)
    suspicious = rng.permutation(np.flatnonzero(groups.any(axis=0)))[: most // 2]
    rest = rng.permutation(np.setdiff1d(np.arange(samples), suspicious))
    return np.sort(np.concatenate([suspicious, rest[: most - len(suspicious)]]))


def picture(embedding: np.ndarray, seed: int = 0) -> np.ndarray:
    """Lay points [n, d] out in the plane: float32 [n, 2] in 0..1. Fewer than 8 points get their first two coordinates."""
    from sklearn.manifold import TSNE

    count = len(embedding)
    if count < 8 or np.ptp(embedding, axis=0).max(initial=0.0) < 1e-9:
        places = np.zeros((count, 2))
        places[:, : embedding.shape[1]] = embedding[:, :2]
    else:
        perplexity = min(30.0, (count - 1) / 3)
        # The first eigenvectors are near constant but for their sign; noise of 1e-6 keeps equal rows from having no distance.
        noise = np.random.default_rng(seed).normal(0, 1e-6, embedding.shape)
        spread = embedding / np.maximum(embedding.std(axis=0), 1e-12) + noise
        places = TSNE(perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(spread)
    low, extent = places.min(axis=0), np.ptp(places, axis=0)
    return ((places - low) / np.where(extent > 0, extent, 1.0)).astype(np.float32)
