"""The executable rendering of a joint program: every step bound to its kernel, buffers reused and freed at their last use."""

from lrpfast.runtime.executor import Executor

__all__ = ["Executor"]
