"""A static model of a step's time: what the kernels' tiles make of the floor. A prediction, to be confronted with a measurement.

A product's tiles are computed in waves, as many at a time as the multiprocessors hold; the last wave is as long as the others
however few tiles are in it, and a tile that is not full takes as long as one that is. All else is bound by memory. What cannot be
derived is assumed: a matrix kernel sustains 70% of the tensor cores' rate, memory gives 85% of its bandwidth (both what the project asks of
its kernels), and a kernel takes 2 µs to begin and end in a CUDA graph.
"""

from __future__ import annotations

import math

from benchmarks.gpu.floors import Gpu, Work

MATRIX_SHARE, MEMORY_SHARE, START = 0.70, 0.85, 2e-6
_REGISTERS = 64 * 1024
_REGISTERS_A_THREAD = 200  # of a matrix kernel's thread, about what the compiler reports


def seconds(work: Work, gpu: Gpu, dtype: str) -> float:
    """Predicted time of a step."""
    memory = work.bytes / (gpu.bandwidth * MEMORY_SHARE)
    if not work.flops:
        return START + memory
    full = work.flops / (gpu.flops[dtype] * MATRIX_SHARE)
    return START + max(memory, full / _filled(work, gpu, dtype))


def _filled(work: Work, gpu: Gpu, dtype: str) -> float:
    """The share of the tiles' and waves' multiplications that are asked for."""
    if work.product is None:
        return 1.0
    from lrpfast.ops.triton.matrix import tilings

    rows, outs, depth = work.product
    size = 4 if dtype == "float32" else 2
    best = 0.0
    for tiling in tilings(rows, outs, depth, size, gpu.capability):
        shared = tiling.stages * (tiling.rows + tiling.columns) * tiling.depth * size
        blocks = max(1, min(gpu.shared // shared, _REGISTERS // (tiling.warps * 32 * _REGISTERS_A_THREAD)))
        tiles = math.ceil(rows / tiling.rows) * math.ceil(outs / tiling.columns)
        slots = gpu.multiprocessors * blocks
        waves = tiles / (math.ceil(tiles / slots) * slots)
        within = rows * outs / (tiles * tiling.rows * tiling.columns)
        best = max(best, waves * within)
    return best
