"""Explain many batches: the next one is copied to the GPU while this one is explained, and pooled maps alone come back.

On a GPU three things happen at once: a copy of the coming batch from pinned memory, the explanation, and the copy of the last batch's
pooled maps into pinned memory, each on a stream of its own, ordered by events. A map of 224 x 224 x 3 is 600 kB in float32; summed over
channels and pooled to 28 x 28 in float16 it is 1.5 kB. Elsewhere the same is done without streams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lrpfast.errors import InputError
from lrpfast.explainer import Explainer
from lrpfast.explanation import Explanation

_Target = Tensor | int | None


@dataclasses.dataclass(frozen=True)
class Pooled:
    """What comes back of a batch, on the CPU.

    Attributes
    ----------
    maps
        ``[N, size, size]`` in float16: the relevance summed over channels and averaged over the cells of a grid, each map divided by
        ``scale``.
    scale
        ``[N]`` in float32: the largest absolute value of each pooled map; 1 where a map is zero everywhere.
    target
        ``[N]``: what was explained.
    output
        What the model returned.
    """

    maps: Tensor
    scale: Tensor
    target: Tensor
    output: Tensor


def explain_batches(
    explainer: Explainer,
    batches: Iterable[tuple[Tensor, _Target]],
    device: str | torch.device = "cpu",
    size: int = 28,
    seed: str = "logit",
) -> Iterator[Pooled]:
    """Explain batches of images, in order.

    Parameters
    ----------
    explainer
        Of a model on `device`, with one input and a tensor as its output; `Explainer.warmup` it first where batches are alike.
    batches
        Images ``[N, C, H, W]`` and targets as `Explainer` takes them, one a sample; on the CPU.
    device
        Where the model is.
    size
        Cells of the grid along each side.

    Raises
    ------
    InputError
        `size` is less than 1, or the inputs are not images.
    """
    if size < 1:
        raise InputError(f"size must be at least 1, got {size}")
    mover = _Mover(torch.device(device))
    coming = iter(batches)
    ahead = mover.fetch(next(coming, None))
    waiting: _Returning | None = None
    while ahead is not None:
        images, target = mover.arrived(ahead)
        ahead = mover.fetch(next(coming, None))  # on its way while this one is explained
        if images.dim() != 4:
            raise InputError(f"explain_batches takes images [N, C, H, W], got {list(images.shape)}")
        pooled = _pooled(explainer(images, target, seed), size)
        returning = mover.give_back(pooled)
        if waiting is not None:
            yield waiting.done()
        waiting = returning
    if waiting is not None:
        yield waiting.done()


def _pooled(explanation: Explanation, size: int) -> Pooled:
    assert isinstance(explanation.relevance, Tensor)
    maps = adaptive_avg_pool2d(explanation.relevance.float().sum(1, keepdim=True), size)[:, 0]
    scale = maps.abs().amax((1, 2))
    scale = torch.where(scale > 0, scale, 1.0)
    return Pooled((maps / scale[:, None, None]).half(), scale, explanation.target, explanation.output)


@dataclasses.dataclass
class _Returning:
    """Results on their way to the CPU."""

    pooled: Pooled
    event: Any  # torch.cuda.Event, or None
    source: Pooled  # kept until the copy is done

    def done(self) -> Pooled:
        if self.event is not None:
            self.event.synchronize()
        return self.pooled


class _Mover:
    """Copies to and from a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._in: Any = torch.cuda.Stream(device) if self._cuda else None
        self._out: Any = torch.cuda.Stream(device) if self._cuda else None

    def fetch(self, batch: tuple[Tensor, _Target] | None) -> tuple[Tensor, _Target, Any] | None:
        """Begin to copy a batch to the device."""
        if batch is None:
            return None
        images, target = batch
        if not self._cuda:
            return images.to(self._device), target, None
        pinned = images if images.is_pinned() else images.pin_memory()
        with torch.cuda.stream(self._in):
            there = pinned.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return there, target, event

    def arrived(self, fetched: tuple[Tensor, _Target, Any]) -> tuple[Tensor, _Target]:
        """A batch for the current stream, which waits for it; the CPU does not."""
        images, target, event = fetched
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            images.record_stream(current)
        return images, target

    def give_back(self, pooled: Pooled) -> _Returning:
        """Begin to copy results to the CPU."""
        if not self._cuda:
            return _Returning(pooled, None, pooled)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            tensors = {f.name: _to_pinned(getattr(pooled, f.name)) for f in dataclasses.fields(pooled)}
            event = torch.cuda.Event()
            event.record()
        return _Returning(Pooled(**tensors), event, pooled)


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
