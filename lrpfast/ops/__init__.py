"""The fused operators of the joint program: `torch.ops.lrpfast.*`.

Importing this package declares them. `schema` holds each operator's signature and fake; `reference` computes each in
pure torch, `native` in C++; `decompositions` says the same in expressions that can be traced. All speak the same terms,
so that a caller who wants no dispatcher (the executor binds its steps once) calls `reference.ratio` or `native.ratio`
in place of `torch.ops.lrpfast.ratio`.
"""

from . import native, reference, schema
from .decompositions import DECOMPOSITIONS

__all__ = ["DECOMPOSITIONS", "native", "reference", "schema"]
