"""The compiled kernels (csrc/module.cpp). Addresses are integers; dtype codes are those of csrc/ops.h."""

from collections.abc import Sequence
from typing import TypedDict

_Pair = Sequence[int]
_Epilogue = tuple[
    int, bool, bool, float, float, int, int, int, float
]  # bias, add, clamp, low, high, carrier, message_a, message_b, eps
_Filters = tuple[
    int, int, int, _Pair, int, int, int, bool, tuple[float, float]
]  # given, filter_stride, channel_stride, tap_strides, filters, channels, factors, factor_of_channel, scales

class BuildInfo(TypedDict):
    compiler: str
    version: str
    cuda: str
    cuda_built: bool

def ratio(
    carrier: int,
    carrier_dtype: int,
    carrier_broadcast: bool,
    message_a: int,
    message_b: int,
    message_dtype: int,
    denominator: int,
    denominator_dtype: int,
    denominator_broadcast: bool,
    result: int,
    rows: int,
    row_size: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def cuda_ratio(
    carrier: int,
    carrier_dtype: int,
    carrier_broadcast: bool,
    message_a: int,
    message_b: int,
    message_dtype: int,
    denominator: int,
    denominator_dtype: int,
    denominator_broadcast: bool,
    result: int,
    rows: int,
    row_size: int,
    eps: float,
    stream: int,
    /,
) -> str | None: ...
def channel_sum(
    carrier: int,
    carrier_dtype: int,
    carrier_broadcast: bool,
    message: int,
    message_dtype: int,
    result: int,
    rows: int,
    channels: int,
    groups: int,
    positions: int,
    channels_last: bool,
    threads: int,
    /,
) -> None: ...
def pair(
    carrier: int,
    carrier_dtype: int,
    message: int,
    message_dtype: int,
    first: int,
    first_dtype: int,
    second: int,
    second_dtype: int,
    upper: int,
    lower: int,
    size: int,
    gamma_rule: bool,
    gamma_or_alpha: float,
    beta: float,
    eps: float,
    threads: int,
    /,
) -> None: ...
def select_by_sign(
    x: int, x_dtype: int, upper: int, lower: int, dtype: int, result: int, size: int, threads: int, /
) -> None: ...
def add_relu(a: int, b: int, dtype: int, result: int, size: int, threads: int, /) -> None: ...
def dense(
    x: int,
    weight: int,
    bias: int,
    scaled_bias: int,
    result: int,
    scaled_result: int,
    batch: int,
    outputs: int,
    inputs: int,
    scales: tuple[float, float],
    threads: int,
    /,
) -> None: ...
def dense_dgrad(
    s: int,
    weight: int,
    result: int,
    batch: int,
    outputs: int,
    inputs: int,
    scaled: bool,
    scales: tuple[float, float],
    threads: int,
    /,
) -> None: ...
def max_pool(
    input: int,
    dtype: int,
    result: int,
    winners: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    channels: int,
    threads: int,
    /,
) -> None: ...
def pool_dgrad(
    message: int,
    dtype: int,
    winners: int,
    result: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    channels: int,
    divisor: int,
    count_padding: bool,
    threads: int,
    /,
) -> None: ...
def winograd(
    input: int,
    weight: int,
    given: _Filters | None,
    result: int,
    workspace: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    padding: _Pair,
    channels: int,
    filters: int,
    block: int,
    chunk: int,
    form: int,
    then: _Epilogue,
    threads: int,
    /,
) -> None: ...

winograd_bfloat16 = winograd

def winograd_filters(weight: _Filters, result: int, strided: bool, threads: int, /) -> None: ...
def convolution(
    input: int,
    weight: _Filters,
    result: int,
    workspace: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    transposed: bool,
    block: int,
    depth: int,
    then: _Epilogue,
    threads: int,
    /,
) -> None: ...
def depthwise(
    input: int,
    weight: int,
    result: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    kernel: _Pair,
    stride: _Pair,
    padding: _Pair,
    dilation: _Pair,
    channels: int,
    transposed: bool,
    then: _Epilogue,
    threads: int,
    /,
) -> None: ...
def pointwise(
    input: int,
    weight: int,
    by_sign: bool,
    sign: int,
    result: int,
    workspace: int,
    images: int,
    size: _Pair,
    out_size: _Pair,
    stride: _Pair,
    channels: int,
    filters: int,
    block: int,
    then: _Epilogue,
    threads: int,
    /,
) -> None: ...

pointwise_bfloat16 = pointwise

def build_info() -> BuildInfo: ...
def cpu_capability() -> str: ...
def limit_cpu_capability(limit: str | None) -> bool: ...
def bind_openmp(parallel: int, thread_num: int, num_threads: int, /) -> None: ...
def openmp_bound() -> bool: ...
