"""`lrpfast info`: what is here, and of what is not, why."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import click
import torch

import lrpfast
from lrpfast import backends, composites
from lrpfast.runtime.memory import keep_freed_memory

# What each optional package is for; the names are those of the module and of what pip installs.
_OPTIONAL = (
    ("torchvision", "torchvision", "models torchvision:NAME"),
    ("timm", "timm", "models timm:NAME"),
    ("safetensors", "safetensors", "checkpoints in .safetensors"),
    ("onnx", "onnx", "lrpfast compile --onnx"),
    ("onnxscript", "onnxscript", "lrpfast compile --onnx"),
    ("onnxruntime", "onnxruntime", "running an ONNX program"),
    ("sklearn", "scikit-learn", "lrpfast screen, and the demo, python -m lrpfast.demo"),
    ("scipy", "scipy", "lrpfast screen"),
    ("pyarrow", "pyarrow", "lrpfast screen"),
    ("jinja2", "jinja2", "lrpfast screen"),
    ("h5py", "h5py", "lrpfast export-virelay"),
    ("ray", "ray", "lrpfast screen --engine ray"),
)


def run() -> None:
    """Print it."""
    versions = f"lrpfast {lrpfast.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    click.echo(f"{versions}, {platform.platform()}")
    for title, lines in (
        ("devices", _devices()),
        ("backends", str(backends.report()).splitlines()),
        ("memory", [keep_freed_memory()]),
        ("composites", [", ".join(composites.names())]),
        ("optional packages", _packages()),
    ):
        click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  {line}")


def _devices() -> Iterator[str]:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    yield f"cpu: {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "cuda: not there: " + (
            "no GPU is visible to this process" if built else "this torch is built without CUDA"
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        yield f"cuda:{index}: {properties.name}, {capability}, {memory:.0f} GiB"


def _packages() -> Iterator[str]:
    for module, package, purpose in _OPTIONAL:
        try:
            importlib.import_module(module)
            yield f"{package} {metadata.version(package)}"
        except ModuleNotFoundError:
            yield f"{package}: not installed, for {purpose}: pip install {package}"
        except Exception as error:
            # It is there and broken: beside a torch of another version, importing torchvision raises a RuntimeError.
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            yield f"{package}: installed, but importing it fails: {reason}"
