"""What a measurement was made on: processor, threads, versions. Numbers without it cannot be compared with anything."""

import importlib.metadata
import os
import platform
from pathlib import Path

import lrpfast


def describe(threads: int) -> dict[str, object]:
    """Processor, cores, threads used, load before the start, versions of what takes part."""
    versions = {"lrpfast": lrpfast.__version__}
    for name in ("torch", "torchvision", "zennit"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    vector = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(vector) or 'no vector extensions listed'})"


def line(machine: dict[str, object]) -> str:
    """One line of text."""
    versions = machine["versions"]
    assert isinstance(versions, dict)
    return (
        f"{machine['processor']}, {machine['threads']} threads of {machine['cores']} cores; Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )
