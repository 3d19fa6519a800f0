"""Compile the kernels for GPUs that need not be here, and read what came out: registers, spills, shared memory, instructions.

A variant is a kernel with the types of its arguments and the constants that it is specialised for. Pointers and sizes marked as
multiples of 16 are so for every network whose channels are; it is what lets the compiler read 16 bytes at a time.

    python -m benchmarks.gpu.aot [--capability 80 90] [--all] [NAME ...]    prints JSON, one object a variant and capability
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
_POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled.

    Attributes
    ----------
    module, kernel
        Where the kernel is, in `lrpfast.ops.triton`.
    pointers
        Name of an argument -> dtype; None: it is not given.
    constants
        Of the arguments that are constants, the values.
    odd
        Sizes that are not multiples of 16.
    matrix
        Whether it multiplies matrices, so that tensor-core instructions are asked for.
    usual
        Whether the default test suite compiles it.
    capabilities
        What it is used on.
    """

    name: str
    module: str
    kernel: str
    pointers: dict[str, str | None]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    odd: tuple[str, ...] = ()
    matrix: bool = False
    usual: bool = False
    capabilities: tuple[int, ...] = (80, 90)


def _elementwise() -> Iterator[Variant]:
    for dtype in ("float32", "bfloat16", "float16"):
        usual = dtype == "bfloat16"
        flat = {"BLOCK": 1024}
        rows = {"CARRIER_ROW": False, "DENOMINATOR_ROW": False, "ZERO_RULE": False, **flat}
        yield Variant(
            f"ratio {dtype}", "elementwise", "ratio_kernel",
            {"carrier": dtype, "message_a": dtype, "message_b": None, "denominator": dtype, "out": dtype}, rows, usual=dtype != "float16",
        )  # fmt: skip
        yield Variant(
            f"ratio_sum {dtype}", "elementwise", "ratio_kernel",
            {n: dtype for n in ("carrier", "message_a", "message_b", "denominator", "out")}, rows,
        )  # fmt: skip
        yield Variant(
            f"ratio with one row {dtype}", "elementwise", "ratio_kernel",
            {"carrier": dtype, "message_a": dtype, "message_b": None, "denominator": dtype, "out": dtype},
            {**rows, "DENOMINATOR_ROW": True},
        )  # fmt: skip
        yield Variant(
            f"gamma_pair {dtype}", "elementwise", "gamma_pair_kernel",
            {n: dtype for n in ("carrier", "message", "z", "z_plus", "upper", "lower")}, flat,
        )  # fmt: skip
        yield Variant(
            f"alpha_beta_pair {dtype}", "elementwise", "alpha_beta_pair_kernel",
            {"z_plus": None, **{n: dtype for n in ("carrier", "message", "z_minus", "first", "second")}},
            {"ZERO_RULE": False, **flat},
        )  # fmt: skip
        yield Variant(
            f"select_by_sign {dtype}", "elementwise", "select_by_sign_kernel",
            {n: dtype for n in ("x", "upper", "lower", "out")}, flat,
        )  # fmt: skip
        yield Variant(
            f"add_relu {dtype}",
            "elementwise",
            "add_relu_kernel",
            {n: dtype for n in ("a", "b", "out")},
            flat,
            usual=usual,
        )
        yield Variant(
            f"channel_sum {dtype}", "sums", "channel_sum_kernel", {n: dtype for n in ("carrier", "message", "out")},
            {"CHANNELS_LAST": True, "CARRIER_ROW": False, "PLACES": 16, "CHANNELS": 256, "groups": 1},
        )  # fmt: skip
        window = {
            "KERNEL_H": 3, "KERNEL_W": 3, "STRIDE_H": 2, "STRIDE_W": 2, "PAD_H": 1, "PAD_W": 1, "DILATION_H": 1, "DILATION_W": 1,
        }  # fmt: skip
        yield Variant(
            f"max_pool {dtype}", "pooling", "max_pool_kernel", {"x": dtype, "y": dtype, "winners": "uint8"},
            {**window, "PLACES": 16, "CHANNELS": 64}, odd=("height", "width", "out_height", "out_width"),
        )  # fmt: skip
        for kind, winners in (("max", "uint8"), ("avg", None)):
            yield Variant(
                f"{kind}_pool_dgrad {dtype}", "pooling", "pool_dgrad_kernel",
                {"message": dtype, "winners": winners, "out": dtype},
                {**window, "COUNT_PADDING": False, "PLACES": 16, "CHANNELS": 64},
                odd=("height", "width", "out_height", "out_width", "divisor"),
            )  # fmt: skip
        yield Variant(
            f"depthwise {dtype}", "matrix", "depthwise_kernel",
            {"x": dtype, "weight": dtype, "bias": dtype, "first": dtype, "second": dtype, "out": dtype},
            {**window, "EPILOGUE": "ratio", "ROWS": 16, "CHANNELS": 64}, odd=("height", "width", "out_height", "out_width"),
        )  # fmt: skip


def _products() -> Iterator[Variant]:
    from lrpfast.ops.triton.matrix import tilings

    three = {"KERNEL_H": 3, "KERNEL_W": 3, "PAD_H": 1, "PAD_W": 1}
    one = {"KERNEL_H": 1, "KERNEL_W": 1, "PAD_H": 0, "PAD_W": 0}
    same = {"STRIDE_H": 1, "STRIDE_W": 1, "DILATION_H": 1, "DILATION_W": 1, "LONG": False}
    odd = ("height", "width", "out_height", "out_width")
    operands = {
        "plain": (None, None), "relu": (None, None), "add_relu": (1, None), "ratio": (1, 1), "message_ratio": (1, 1),
        "relevance": (1, None),
    }  # fmt: skip
    for (dtype, size), capability in itertools.product(_SIZES.items(), (80, 90)):
        usual = capability == 90 and dtype == "bfloat16"
        for shape, windows in (("1x1", one), ("3x3", three)):
            common = {**same, **windows, "POINTWISE": shape == "1x1", "PRECISION": "tf32", "weight_in": 1}
            for epilogue, (first, second) in operands.items():
                for tiling in tilings(10**6, 256, 256, size, capability, epilogue):
                    yield Variant(
                        f"{shape} {epilogue} {dtype} {tiling}", "matrix", "matrix_kernel",
                        {**{n: dtype for n in ("x", "weight", "bias", "out")}, "first": dtype if first else None,
                         "second": dtype if second else None, "modified_bias": None, "modified_out": None},
                        {**common, "EPILOGUE": epilogue, "MODIFY": "as_is", **_cut(tiling)}, tiling.warps, tiling.stages,
                        odd, matrix=True, usual=usual and epilogue == "ratio" and tiling[:2] == (64, 128),
                        capabilities=(capability,),
                    )  # fmt: skip
            for tiling in tilings(10**6, 256, 256, size, capability, pair=True):
                given = {n: dtype for n in ("x", "weight", "bias", "out", "modified_bias", "modified_out")}
                yield Variant(
                    f"{shape} pair {dtype} {tiling}", "matrix", "matrix_kernel", {**given, "first": None, "second": None},
                    {**common, "EPILOGUE": "relu", "MODIFY": "positive", **_cut(tiling)}, tiling.warps, tiling.stages, odd,
                    matrix=True, usual=usual and shape == "1x1" and tiling[:2] == (64, 128), capabilities=(capability,),
                )  # fmt: skip


def _cut(tiling: Any) -> dict[str, int]:
    return {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "DEPTH": tiling.depth}


def _kept() -> Iterator[Variant]:
    from lrpfast.ops.triton.matrix import kept_tiling

    for (dtype, size), channels, capability in itertools.product(_SIZES.items(), (64, 128, 256), (80, 90)):
        if channels * size > 512:  # see largest_kept
            continue
        tiling = kept_tiling(channels, size, capability)
        yield Variant(
            f"ratio_dgrad {channels} {dtype} {tiling}", "matrix", "ratio_dgrad_kernel",
            {n: dtype for n in ("x", "weight", "bias", "carrier", "message", "out")},
            {"ZERO_RULE": False, "PRECISION": "tf32", "ROWS": tiling.rows, "COLUMNS": tiling.columns,
             "CHANNELS": tiling.depth},
            tiling.warps, tiling.stages, matrix=True, usual=dtype == "bfloat16" and channels == 256,
            capabilities=(capability,),
        )  # fmt: skip


def variants() -> list[Variant]:
    """Every variant, by family."""
    return [*_elementwise(), *_products(), *_kept()]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out: of SASS, how often each kind of instruction that tells something occurs."""

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    matrix: bool
    instructions: dict[str, int]


_TELLING = {
    "wgmma": r"\bHGMMA\b", "mma": r"\bHMMA\b", "local": r"\b(LDL|STL)\b", "load16": r"\bLDG\.E\.128|\bLDGSTS\.E\.BYPASS\.(LTC128B\.)?128",
    "store16": r"\bSTG\.E\.128", "load": r"\bLDG\b|\bLDGSTS\b", "store": r"\bSTG\b", "fma": r"\bFFMA\b",
}  # fmt: skip


def compiled(variant: Variant, capability: int) -> Compiled:
    """Compile a variant for a GPU of a compute capability (80, 90) and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = _source(variant, ASTSource)
    result = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _tool("cuobjdump", "--dump-sass", str(cubin))
    numbers = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in _TELLING.items()}
    return Compiled(
        variant.name, capability, numbers["REG"], numbers["STACK"], numbers["LOCAL"], result.metadata.shared,
        result.metadata.num_warps, variant.matrix, counts,
    )  # fmt: skip


def _source(variant: Variant, source: Any) -> Any:
    import importlib

    module = importlib.import_module(f"lrpfast.ops.triton.{variant.module}")
    epilogues = importlib.import_module("lrpfast.ops.triton.epilogues")
    kernel = getattr(module, variant.kernel)
    functions = {n: getattr(epilogues, variant.constants[n]) for n in ("EPILOGUE", "MODIFY") if n in variant.constants}
    constants = {**variant.constants, **functions}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or variant.pointers.get(name, "") is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
            continue
        floating = name in ("eps", "gamma", "alpha", "beta")
        signature[name] = (
            _POINTER[variant.pointers[name]] if name in variant.pointers else "fp32" if floating else "i32"
        )
        if not floating and name not in variant.odd:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return source(kernel, signature, constants, attributes)


def _tool(name: str, *arguments: str) -> str:
    """A tool of CUDA: the one that Triton ships."""
    return subprocess.run([_tool_path(name), *arguments], check=True, capture_output=True, text=True).stdout


@functools.cache
def _tool_path(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def main() -> None:
    """Compile what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of variants; without, the usual ones")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--all", action="store_true", help="every variant")
    parser.add_argument("--dtype", default="", help="those of one dtype alone")
    options = parser.parse_args()
    for variant in variants():
        wanted = any(n in variant.name for n in options.names) if options.names else variant.usual or options.all
        wanted = wanted and f" {options.dtype}" in variant.name
        for capability in set(options.capability) & set(variant.capabilities) if wanted else ():
            print(json.dumps(dataclasses.asdict(compiled(variant, capability))), flush=True)


if __name__ == "__main__":
    main()
