"""Makes a float model small without training: any number of bytes or of lost points, one command.

    weights -> moments -> sensitivity -> allocation -> rounding -> encoding, and search around them.

Each part is a value that can be printed and tested alone. Nothing here imports torch where the
model is an .onnx file.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecqx_onnx.compression.result import CompressResult
    from ecqx_onnx.compression.verb import compress

_HOMES = {"compress": "verb", "CompressResult": "result"}
__all__ = ["CompressResult", "compress"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecqx_onnx.compression' has no attribute {name!r}")
    return getattr(import_module(f"ecqx_onnx.compression.{_HOMES[name]}"), name)
