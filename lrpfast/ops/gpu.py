"""Whether the Triton kernels can be had, asked once and only when somebody needs them: importing Triton takes a second."""

import functools
import importlib
from types import ModuleType


@functools.cache
def load() -> tuple[ModuleType | None, str]:
    """`lrpfast.ops.triton`, or None and the reason why it is not there."""
    try:
        importlib.import_module("triton")
        from . import triton
    except Exception as error:  # a broken installation raises more than an ImportError
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return (
            None,
            "Triton is not installed: pip install lrpfast[gpu]" if missing else f"Triton does not load: {error}",
        )
    return triton, ""


def runs_on(device_type: str) -> bool:
    """Whether the kernels run on tensors of a device: on a GPU, and where Triton's interpreter is switched on, on a CPU."""
    kernels, _ = load()
    return kernels is not None and (device_type == "cuda" or (device_type == "cpu" and kernels.INTERPRETED))
