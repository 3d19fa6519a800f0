"""Replay: whole explanations recorded for a few sizes of batch, so that nothing but kernels runs between input and map.

At batch 1 a GPU finishes a kernel faster than Python starts the next one. Recorded once as a CUDA graph, all kernels of an
explanation start with one call, on memory that was set aside: no allocation, no synchronisation, no Python in between. A batch between
two recorded sizes is padded to the next by repeating its last sample, which no other sample's map depends on.

What is recorded is one function of static inputs; how it is recorded is the `Recorder`'s business, so that padding, choosing and
locking are the same on every device, and are tested where there is no GPU.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Program = Callable[..., Tensors]  # (*inputs, target) -> (output, *relevances): tensors, each with the batch first


class Recorder(Protocol):
    """Records a function that takes nothing and always works on the same memory."""

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        """A call that runs the function again, and where its results then lie."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()  # kernels are compiled, workspaces made: none of it may happen while recording
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU while this one records.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function()
        return graph.replay, results


class _Recorded:
    """A program recorded for one size of batch."""

    def __init__(self, recorder: Recorder, program: Program, examples: Tensors, target: Tensor) -> None:
        self.inputs = tuple(torch.empty_like(x).copy_(x) for x in examples)
        self.target = target.clone()
        self._replay, self._results = recorder.record(lambda: program(*self.inputs, self.target))

    def run(self, inputs: Tensors, target: Tensor) -> Tensors:
        """The results for a batch of at most this size, in memory of their own."""
        count = target.shape[0]
        for own, given in zip((*self.inputs, self.target), (*inputs, target), strict=True):
            own[:count].copy_(given, non_blocking=True)
            if count < own.shape[0]:
                own[count:].copy_(given[-1:].expand_as(own[count:]), non_blocking=True)
        self._replay()
        return tuple(result[:count].clone() for result in self._results)


class Replay:
    """A program recorded for several sizes of batch.

    One call runs at a time: all sizes share their memory, and inputs and results of one call lie in it until they are copied out. Calls on
    several streams are ordered by events.

    Parameters
    ----------
    recorder
        Records.
    program
        What is recorded.
    examples
        Inputs of any batch but 0, which give shapes, dtypes and layouts.
    sizes
        Batches to record for.
    """

    def __init__(self, recorder: Recorder, program: Program, examples: Tensors, sizes: Sequence[int]) -> None:
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None
        self.sizes = sorted(set(sizes))
        self._recorded = {}
        for size in reversed(self.sizes):  # the largest first: the others find room in what it took
            inputs = tuple(_of_batch(x, size) for x in examples)
            target = torch.full((size,), -1, dtype=torch.int64, device=inputs[0].device)
            self._recorded[size] = _Recorded(recorder, program, inputs, target)

    def size_for(self, batch: int) -> int | None:
        """The smallest recorded size that holds a batch; None where none does, or the batch is empty."""
        place = bisect.bisect_left(self.sizes, batch)
        return self.sizes[place] if batch > 0 and place < len(self.sizes) else None

    def __call__(self, inputs: Tensors, target: Tensor) -> Tensors:
        """Output and relevances of a batch that `size_for` has a size for.

        `target` is int64 ``[N]``, -1 for the arg max. Results lie on the inputs' device, in memory of their own.
        """
        size = self.size_for(target.shape[0])
        assert size is not None, f"no size is recorded for a batch of {target.shape[0]}"
        with self._lock:
            self._wait(inputs[0].device)
            results = self._recorded[size].run(inputs, target)
            self._mark(inputs[0].device)
        return results

    def _wait(self, device: torch.device) -> None:
        """Let this call's stream wait for the previous call's, which may be another."""
        if self._done is not None:
            torch.cuda.current_stream(device).wait_event(self._done)

    def _mark(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(device))


def _of_batch(x: Tensor, size: int) -> Tensor:
    """An input of another batch, in its layout: its samples, repeated."""
    index = torch.arange(size, device=x.device) % x.shape[0]
    image = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x[index].contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)
