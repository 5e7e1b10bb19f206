"""The options of `pack` and `unpack`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ecqx_onnx.options import shared
from ecqx_onnx.options.option import option, required

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class PackOptions:
    """How a foreign model's quantized weights are stored anew."""

    model: str | Path = required("Any .onnx file with quantised weights, whoever made it.")
    out: str | Path = required(shared.OUT_ONNX)
    storage: str = option("auto", shared.STORAGE_PREFERRED)
    prefer: str = option("auto", shared.PREFER)
    dequantize: str = option("auto", shared.DEQUANTIZE)
    target: str = option("onnxruntime", shared.TARGET)
    opset: int | None = option(None, shared.OPSET)
    inputs: Mapping[str, np.ndarray] | None = option(
        None,
        "An .npz with one array per model input, for the check. Without it, random ones are used.",
    )
    check: bool = option(True, "Run both models and write nothing if they differ.")
    rewrite: bool = option(
        True, "Allow to raise the opset and to fold BatchNormalization, which rounds."
    )
    force: bool = option(False, shared.FORCE)


@dataclass(frozen=True, kw_only=True, eq=False)
class UnpackOptions:
    """How a packed file is written with dense integers."""

    model: str | Path = required("An .onnx file that convert, compress or pack has written.")
    out: str | Path = required(shared.OUT_ONNX)
    floats: bool = option(False, "Write plain float32 weights instead of integers.")
    dequantize: str = option("auto", shared.DEQUANTIZE)
    target: str = option(
        "qdq", "Who must load the file; qdq stands for tools that want standard operators."
    )
    opset: int | None = option(None, shared.OPSET)
    force: bool = option(False, shared.FORCE)
