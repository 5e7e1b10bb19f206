"""A quantized model with all that belongs to it, and the file model.pt that holds it.

Names are imported when first used: without torch, `checkpoint.insight` can be read all the same.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint as Checkpoint
    from ecqx_onnx.checkpoint.checkpoint import build as build
    from ecqx_onnx.checkpoint.checkpoint import is_checkpoint as is_checkpoint
    from ecqx_onnx.checkpoint.checkpoint import load as load
    from ecqx_onnx.checkpoint.checkpoint import save as save
    from ecqx_onnx.inputs.torch_file import is_program as is_program

_HOMES = {
    "Checkpoint": "ecqx_onnx.checkpoint.checkpoint",
    "build": "ecqx_onnx.checkpoint.checkpoint",
    "is_checkpoint": "ecqx_onnx.checkpoint.checkpoint",
    "load": "ecqx_onnx.checkpoint.checkpoint",
    "save": "ecqx_onnx.checkpoint.checkpoint",
    "is_program": "ecqx_onnx.inputs.torch_file",
}
__all__ = ["Checkpoint", "build", "is_checkpoint", "is_program", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecqx_onnx.checkpoint' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
