"""Importing what imports torchvision beside a CPU-only torch.

PyPI's torchvision is built for CUDA and, beside a CPU-only torch, its compiled operators do not
load: its Python part then dies with "operator torchvision::nms does not exist" while it registers
shapes for them. Declaring the two schemas lets the import pass; its models, data sets and
transforms work then, and only what calls these operators (detection) does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MISSING = "torchvision::nms does not exist"
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_declared: list[object] = []  # the declarations last as long as these objects


def import_beside_torchvision(load: Callable[[], T]) -> T:
    """Import something, once more where torchvision's operators were missing.

    Args:
        load: imports or runs what may import torchvision; called a second time at need.

    Returns:
        What it returns.

    Raises:
        Exception: whatever `load` raises for another reason.
    """
    try:
        return load()
    except Exception as error:  # what is imported may be anybody's code
        if MISSING not in str(error) or _declared:
            raise
    _forget(("torchvision", "zennit"))
    _declare_operators()
    return load()


def _forget(packages: tuple[str, ...]) -> None:
    """Half of a package is loaded after its import failed."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in OPERATORS:
        library.define(f"{operator}{SCHEMA}")
    _declared.append(library)
