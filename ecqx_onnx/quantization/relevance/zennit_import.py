"""Importing zennit beside a CPU-only torch.

zennit imports torchvision. PyPI's torchvision is built for CUDA and, beside a CPU-only torch, its
compiled operators do not load: its Python part then dies with "operator torchvision::nms does not
exist" while it registers shapes for them. Declaring the two schemas lets the import pass; nobody
here calls the operators. Where torchvision imports by itself nothing is changed.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # the declarations last as long as this object


def import_zennit() -> ModuleType:
    """Import zennit, also beside a torchvision whose compiled operators do not load.

    Returns:
        The package.
    """
    try:
        return importlib.import_module("zennit")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("torchvision", "zennit")
    ]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("zennit")
