"""Make torchvision importable beside a CPU build of torch.

torchvision's wheels link a GPU build of torch; beside a CPU build their compiled operators do not load, and the import fails
while it registers fakes for two of them. Declaring those two is enough for the models, which use no compiled operator.
Import this module for its effect, before torchvision or anything that imports it (zennit does).
"""

import importlib

import torch


def _declare() -> torch.library.Library | None:
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library


_LIBRARY = _declare()  # kept: the declarations go when the Library object goes
