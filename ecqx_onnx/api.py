"""The Python verbs in one place: each is imported from its own file when it is first used.

Nothing here loads torch or onnx before a verb is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecqx_onnx.sources.to_checkpoint import as_checkpoint as as_checkpoint
    from ecqx_onnx.verbs.accuracy import accuracy as accuracy
    from ecqx_onnx.verbs.accuracy import confuse as confuse
    from ecqx_onnx.verbs.convert import convert as convert
    from ecqx_onnx.verbs.deploy import deploy as deploy
    from ecqx_onnx.verbs.quantize import quantize as quantize
    from ecqx_onnx.verbs.quantize import training_progress as training_progress
    from ecqx_onnx.verbs.quantize import with_history as with_history
    from ecqx_onnx.verbs.reports import Quantized as Quantized
    from ecqx_onnx.verbs.save import save as save
    from ecqx_onnx.verbs.validate import is_onnx as is_onnx
    from ecqx_onnx.verbs.validate import validate as validate
    from ecqx_onnx.verbs.validate import validate_on as validate_on

_HOMES = {
    "save": "ecqx_onnx.verbs.save",
    "convert": "ecqx_onnx.verbs.convert",
    "validate": "ecqx_onnx.verbs.validate",
    "validate_on": "ecqx_onnx.verbs.validate",
    "deploy": "ecqx_onnx.verbs.deploy",
    "quantize": "ecqx_onnx.verbs.quantize",
    "as_checkpoint": "ecqx_onnx.sources.to_checkpoint",
    "is_onnx": "ecqx_onnx.verbs.validate",
    "accuracy": "ecqx_onnx.verbs.accuracy",
    "with_history": "ecqx_onnx.verbs.quantize",
    "training_progress": "ecqx_onnx.verbs.quantize",
    "Quantized": "ecqx_onnx.verbs.reports",
    "confuse": "ecqx_onnx.verbs.accuracy",
}
__all__ = [  # noqa: RUF022
    "save",
    "convert",
    "validate",
    "validate_on",
    "deploy",
    "quantize",
    "as_checkpoint",
    "is_onnx",
    "accuracy",
    "with_history",
    "training_progress",
    "Quantized",
    "confuse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecqx_onnx.api' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
