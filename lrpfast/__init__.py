"""lrpfast: exact and fast Layer-wise Relevance Propagation for any torch model.

Names are loaded when they are first used, so that what needs no torch (``lrpfast --help``) does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lrpfast._version import __version__

_LAZY = {
    "Explainer": "lrpfast.explainer",
    "explain": "lrpfast.explainer",
    "Explanation": "lrpfast.explanation",
    "Composite": "lrpfast.composites",
    "LayerInfo": "lrpfast.composites",
    "load": "lrpfast.export",
}
_MODULES = ("composites", "errors", "export", "pipeline", "rules", "viz")

__all__ = [
    "Composite",
    "Explainer",
    "Explanation",
    "LayerInfo",
    "__version__",
    "composites",
    "errors",
    "explain",
    "load",
    "rules",
]

if TYPE_CHECKING:
    from lrpfast import composites, errors, rules
    from lrpfast.composites import Composite, LayerInfo
    from lrpfast.explainer import Explainer, explain
    from lrpfast.explanation import Explanation
    from lrpfast.export import load as load


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"lrpfast.{name}")
    raise AttributeError(f"module 'lrpfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY, *_MODULES])
