"""Importing zennit, which imports torchvision, also beside a CPU-only torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from ecqx_onnx.inputs.torchvision_import import import_beside_torchvision


def import_zennit() -> ModuleType:
    """Import zennit, also beside a torchvision whose compiled operators do not load.

    Returns:
        The package.
    """
    return import_beside_torchvision(lambda: importlib.import_module("zennit"))
