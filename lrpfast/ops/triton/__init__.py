"""Every fused operator in Triton, for float32, bfloat16 and float16 on an NVIDIA GPU.

One file a kernel family, always in the same order: kernels, launchers, operators. The operators have the names, arguments and
results of `lrpfast.ops.native`, so that the executor can bind either. What a kernel cannot take (float64, a layout in which
operands number their elements differently) the reference computes.

With ``TRITON_INTERPRET=1`` in the environment the kernels run on the CPU, slowly, which is how they are tested where there
is no GPU.
"""

from .elementwise import (
    add_relu,
    alpha_beta_pair,
    gamma_pair,
    ratio,
    ratio_sum,
    select_by_sign,
)
from .language import INTERPRETED, takes
from .matrix import convolution, convolution_pair, dense_dgrad, largest_kept, ratio_dgrad
from .pooling import avg_pool_dgrad, max_pool, max_pool_dgrad
from .sums import channel_sum

__all__ = [
    "INTERPRETED", "add_relu", "alpha_beta_pair", "avg_pool_dgrad", "channel_sum", "convolution", "convolution_pair",
    "dense_dgrad", "gamma_pair", "largest_kept", "max_pool", "max_pool_dgrad", "ratio", "ratio_dgrad", "ratio_sum",
    "select_by_sign", "takes",
]  # fmt: skip
