"""What computes the fused operators here, and of what does not, why.

Import never fails for want of a compiler, a GPU or a library; this module is where the reason can be read.
"""

from dataclasses import dataclass

import torch

from lrpfast.ops import native


@dataclass(frozen=True)
class Backend:
    """One way to compute the fused operators: whether it is used here, and on what or why not."""

    name: str
    available: bool
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


def backends() -> list[Backend]:
    """Every backend that this version knows, fastest first."""
    return [_cuda(), _native(), Backend("torch", True, "pure-torch reference operators, any device and dtype")]


def report() -> str:
    """One line a backend."""
    return "\n".join(str(backend) for backend in backends())


def _native() -> Backend:
    if native.extension is None:
        return Backend("native", False, f"not there: {native.why_unavailable}")
    info = native.extension.build_info()
    threads = native.why_single_thread or "threads shared with torch"
    detail = f"C++ operators for float32 and bfloat16 on the CPU, {native.extension.cpu_capability()}, {threads}"
    return Backend("native", True, f"{detail} ({info['compiler']})")


def _cuda() -> Backend:
    if native.extension is None:
        return Backend("cuda", False, f"not there: {native.why_unavailable}")
    info = native.extension.build_info()
    if not info["cuda_built"]:
        return Backend("cuda", False, info["cuda"])
    gpu = "" if torch.cuda.is_available() else "; torch sees no GPU"
    return Backend("cuda", False, f"{info['cuda']}; not used, no operator is routed to it in this version{gpu}")
