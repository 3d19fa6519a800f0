"""Screening of a whole dataset for decisions that rest on the wrong thing: from images to a ranked, verified report.

On top of the public API alone; nothing else of lrpfast imports this package. Its stages know each other only through the folder of
the screening: `explain_dataset` fills it with shards of maps, `analyse` clusters the maps of each class, `verify` tries the clusters
on the model, `write_report` and `export_virelay` show what was found. Each can be killed at any moment and called again.

The functions are loaded when they are first used, and with them packages that only a screening needs. A submodule must not be called
like a function here: once imported, it would stand in the function's place.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrpfast.errors import MissingDependencyError

if TYPE_CHECKING:
    from lrpfast.screening.analysis import analyse
    from lrpfast.screening.explain import explain_dataset
    from lrpfast.screening.recipes import recipe
    from lrpfast.screening.report import write_report
    from lrpfast.screening.sources import open_source, reopen
    from lrpfast.screening.verification import verify
    from lrpfast.screening.virelay import export_virelay

_LAZY = {
    "analyse": "analysis",
    "explain_dataset": "explain",
    "export_virelay": "virelay",
    "open_source": "sources",
    "recipe": "recipes",
    "reopen": "sources",
    "verify": "verification",
    "write_report": "report",
}
# The extra that brings each package, by the name of its module.
_EXTRAS = {
    "pyarrow": "screen",
    "scipy": "screen",
    "sklearn": "screen",
    "jinja2": "screen",
    "h5py": "screen",
    "ray": "ray",
    "pandas": "ray",
}

__all__ = ["analyse", "explain_dataset", "export_virelay", "open_source", "recipe", "reopen", "verify", "write_report"]


def missing(error: ModuleNotFoundError) -> Exception:
    """Say which extra brings the module that an import did not find; an unknown one is passed on as it is."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return error
    return MissingDependencyError(
        f"{package} is not installed; it comes with pip install 'lrpfast[{_EXTRAS[package]}]'"
    )


def require() -> None:
    """Find out that what a screening needs is installed. Raises `MissingDependencyError`."""
    for package in ("pyarrow", "scipy", "sklearn", "jinja2", "h5py"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise missing(error) from error


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lrpfast.screening' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"lrpfast.screening.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing(error) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
