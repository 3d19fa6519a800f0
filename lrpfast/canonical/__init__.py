"""Canonicalise: rewrite a captured graph so that every later pass meets few forms.

Each handler takes one ATen operation and emits the canonical one; they lie by subject in `layers`, `pools`, `shapes` and `values`.
After this pass

- every convolution is ``aten.convolution`` (padding and all else as lists), every dense layer with constant weights is
  ``aten.linear``;
- batch norm is folded into the layer before it, or is one ``aten.batch_norm`` node;
- dropout, clone, contiguous and other identities are gone; ``view`` is ``reshape``;
- results of multi-output operations are slices, and max pooling returns its indices;
- values that no output needs are gone.
"""

from lrpfast.canonical import layers, pools, shapes, values  # noqa: F401 - they register their handlers
from lrpfast.canonical.layers import batch_norm_affine
from lrpfast.canonical.rewrite import canonicalise

__all__ = ["batch_norm_affine", "canonicalise"]
