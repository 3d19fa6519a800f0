"""Ask the model whether a cluster's region decides: cover it in the members, paste it into images of other classes.

Relevance says where a model looks; only changing the image says what follows from it. Each number has its control, because
any change to an image disturbs the model a little:

- covering the region is compared with covering the same shape at random other places of the same image;
- pasting it from members is compared with pasting the same place from the rest of the class. A region where the object itself stands
  moves predictions just as well from any image of the class; an artefact does so from the members alone.

What is covered and pasted is the region with a margin of one cell: relevance gathers within a tag, on what the model makes of it, and
the tag's edge is part of it.

All on tensors; nothing here knows of files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lrpfast.screening import intervals
from lrpfast.screening.intervals import Estimate

_PLACES = 4  # random places a member
_BATCH = 64

Predict = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Effect:
    """What the model did.

    Parameters
    ----------
    score_fall
        How far the class's log-odds, log p/(1-p) in nats, fall when the region is covered; mean over members.
    random_fall
        The same for the region's shape at random other places.
    occlusion
        `score_fall` - `random_fall`, paired by member.
    pasted
        Share of other classes' images whose prediction moves to the class when a member's region is pasted.
    control
        The same, pasted from the rest of the class (of other classes, where the cluster is all of it).
    moved
        `pasted` - `control`: the verified effect.
    members, recipients
        How many images were covered, and how many pasted into.
    """

    score_fall: Estimate
    random_fall: Estimate
    occlusion: Estimate
    pasted: Estimate
    control: Estimate
    moved: Estimate
    members: int
    recipients: int


def try_region(
    predict: Predict, region: np.ndarray, label: int, members: Tensor, rest: Tensor, recipients: Tensor, seed: int = 0
) -> Effect:
    """Cover and paste a region.

    Parameters
    ----------
    predict
        Inputs [N, C, H, W] to logits [N, classes].
    region
        bool [h, w], any resolution; each cell stands for a block of pixels. A margin of one cell is added.
    label
        The class.
    members, rest, recipients
        Inputs [n, C, H, W]: of the cluster, of the rest of its class, and of other classes that are not predicted as `label`.
    seed
        Of the random places and of the bootstrap.
    """
    mask = _enlarged(ndimage.binary_dilation(region, np.ones((3, 3))), members.shape[-2], members.shape[-1])
    rng = np.random.default_rng(seed)
    before = _scores(predict, members, label)
    fall = before - _scores(predict, cover(members, mask), label)
    places = [torch.from_numpy(elsewhere(mask.numpy(), rng)) for _ in range(_PLACES)]
    random_fall = sum((before - _scores(predict, cover(members, place), label)) for place in places) / _PLACES
    foreign = rest if len(rest) else recipients.roll(1, 0)
    pasted = _moved(predict, recipients, members, mask, label)
    control = _moved(predict, recipients, foreign, mask, label)
    return Effect(
        score_fall=intervals.mean(fall, seed),
        random_fall=intervals.mean(random_fall, seed),
        occlusion=intervals.mean(fall - random_fall, seed),
        pasted=pasted,
        control=control,
        moved=intervals.difference(pasted, control),
        members=len(members),
        recipients=len(recipients),
    )


def cover(images: Tensor, mask: Tensor) -> Tensor:
    """Fill a region, bool [H, W], of each image [N, C, H, W] with the mean colour of the rest of that image."""
    outside = (~mask).to(images.dtype)
    count = outside.sum().clamp(min=1)
    colour = (images * outside).sum((2, 3), keepdim=True) / count
    return torch.where(mask, colour, images)


def elsewhere(mask: np.ndarray, rng: np.random.Generator, tries: int = 32) -> np.ndarray:
    """The same shape at another place, wrapped around at the edges: of `tries` random shifts the first that overlaps by
    less than a tenth, else the one that overlaps least."""
    height, width = mask.shape
    best, least = mask, mask.sum() + 1
    for _ in range(tries):
        moved = np.roll(mask, (int(rng.integers(height)), int(rng.integers(width))), (0, 1))
        overlap = int((moved & mask).sum())
        if overlap < least:
            best, least = moved, overlap
        if overlap * 10 < mask.sum():
            break
    return best


def _enlarged(region: np.ndarray, height: int, width: int) -> Tensor:
    rows = np.arange(height) * region.shape[0] // height
    columns = np.arange(width) * region.shape[1] // width
    return torch.from_numpy(region[rows[:, None], columns[None, :]])


def _moved(predict: Predict, recipients: Tensor, donors: Tensor, mask: Tensor, label: int) -> Estimate:
    if not len(recipients) or not len(donors):
        return intervals.rate(0, 0)
    chosen = donors[torch.arange(len(recipients)) % len(donors)]
    logits = _logits(predict, torch.where(mask, chosen, recipients))
    return intervals.rate(int((logits.argmax(1) == label).sum()), len(recipients))


def _scores(predict: Predict, images: Tensor, label: int) -> np.ndarray:
    """log p/(1-p) of the class, [N] float64; from logits, so that it does not saturate."""
    logits = _logits(predict, images).double()
    if logits.shape[1] == 1:
        return logits[:, 0].numpy()  # one output is log-odds itself
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return (logits[:, label] - others.logsumexp(1)).numpy()


def _logits(predict: Predict, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([predict(part).detach().float().cpu() for part in images.split(_BATCH)])
