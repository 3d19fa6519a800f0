"""What computes the fused operators here, and of what does not, why.

Import never fails for want of a compiler, a GPU or a library; this module is where the reason can be read.
"""

from dataclasses import dataclass

import torch

from lrpfast.ops import gpu, native


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
    return [
        _triton(),
        _cuda(),
        _native(),
        Backend("torch", True, "pure-torch reference operators, any device and dtype"),
    ]


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


def _triton() -> Backend:
    kernels, reason = gpu.load()
    if kernels is None:
        return Backend("triton", False, f"not used: {reason}")
    import triton

    detail = f"Triton {triton.__version__}, kernels for float32, bfloat16 and float16"
    if kernels.INTERPRETED:
        return Backend(
            "triton", False, f"{detail}; TRITON_INTERPRET is set: they are interpreted, on the CPU, for tests alone"
        )
    missing = _why_no_gpu()
    return Backend("triton", not missing, f"{detail}; not used: {missing}" if missing else detail)


def _cuda() -> Backend:
    if native.extension is None:
        return Backend("cuda", False, f"not there: {native.why_unavailable}")
    info = native.extension.build_info()
    if not info["cuda_built"]:
        return Backend("cuda", False, info["cuda"])
    missing = _why_no_gpu() or ("" if gpu.load()[0] else "its kernels stand beside Triton's, which are not there")
    detail = f"{info['cuda']}; dense layers of one sample"
    return Backend("cuda", not missing, f"{detail}; not used: {missing}" if missing else detail)


def _why_no_gpu() -> str:
    """Why nothing runs on a GPU here; empty where it does."""
    if torch.cuda.is_available():
        return ""
    return "no GPU is visible to this process" if torch.version.cuda else "this torch is built without CUDA"
