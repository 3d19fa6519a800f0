"""Which kind of operation a node is: what the matches of a composite speak of.

A new operation gets its kind here, its propagation in `lrpfast.relevance`.
"""

from torch import fx

from lrpfast.graph import operation_name

ACTIVATIONS = frozenset({
    "relu", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "hardtanh", "tanh",
    "sigmoid", "hardsigmoid", "softplus", "softsign", "log_sigmoid", "softshrink", "hardshrink", "tanhshrink", "rrelu",
    "rrelu_with_noise", "clamp", "clamp_min", "clamp_max", "erf", "arctan", "atan", "threshold",
})  # fmt: skip
NORMS = frozenset({"layer_norm", "group_norm", "instance_norm", "rms_norm"})
AVERAGES = frozenset({
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "sum",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
})  # fmt: skip
MAX_POOLS = frozenset({
    "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
})  # fmt: skip
ROUTING = frozenset({
    "reshape", "permute", "slice", "select", "cat", "expand", "squeeze", "unsqueeze", "flip", "roll", "repeat",
    "index_select", "index", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
    "replication_pad1d", "replication_pad2d", "replication_pad3d", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "getitem", "where", "masked_fill",
})  # fmt: skip


def kinds_of(node: fx.Node) -> tuple[str, ...]:
    """Kinds of a node, the general one first; empty for routing, which has no rule to choose.

    What has no kind of its own (softmax, a product of matrices) is "other": a composite matches it by "any" or by its module.
    """
    name = operation_name(node)
    if name == "convolution":
        return ("conv", "conv_transpose") if node.args[6] else ("conv",)
    if name == "relu":
        return ("activation", "relu")
    for kind, names in (
        ("linear", {"linear"}), ("batch_norm", {"batch_norm"}), ("activation", ACTIVATIONS), ("norm", NORMS),
        ("sum", {"add", "sub"}), ("avg_pool", AVERAGES), ("max_pool", MAX_POOLS), ("mul", {"mul", "div"}),
    ):  # fmt: skip
        if name in names:
            return (kind,)
    return () if name in ROUTING else ("other",)
