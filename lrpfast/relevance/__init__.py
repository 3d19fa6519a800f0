"""The transformation: from a canonical program and its rules to the joint program.

`transform` walks the graph backwards once. Every operation has one propagator, which takes the relevance message at the
operation's output and sends messages to its inputs:

- `affine`: convolutions and dense layers, one function a rule of RULES §2;
- `elementwise`: activations, sums, products;
- `pooling`: average and max pooling, interpolation, means;
- `normalisation`: batch norm that could not be folded, layer, group, instance and RMS norm;
- `routing`: what only moves values;
- `attention`: softmax and products of two activations;
- `gradient`: the vector-Jacobian product of any operation.

`walk` holds what they share: messages, the ratio, the sums where messages meet.
"""

from lrpfast.relevance.transform import Joint, Seed, default_seed, transform

__all__ = ["Joint", "Seed", "default_seed", "transform"]
