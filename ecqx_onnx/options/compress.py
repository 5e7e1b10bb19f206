"""The options of `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecqx_onnx.options import shared
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import option, required


@dataclass(frozen=True, kw_only=True, eq=False)
class CompressOptions:
    """How small or how good the file must be, what it is judged by, and how it is written."""

    model: Any = required("A float .onnx file, or a PyTorch model as convert takes it.")
    out: str | Path = required(shared.OUT_ONNX)
    data: Any = required(
        "Some hundred samples, with or without labels: .npz, a folder, FILE.py:FUNCTION."
    )
    factory: str | None = option(None, shared.FACTORY)
    input_shape: InputShape | None = option(None, shared.INPUT_SHAPE)
    dynamic: Any = option(None, shared.DYNAMIC)

    # Bounds of size.
    max_bytes: int | str | None = option(None, "Most bytes of the whole file: 70k, 1.5M, 64KiB.")
    bits_per_weight: float | None = option(None, "Most coded bits for each quantized weight.")

    # Bounds of quality.
    max_drop: float | None = option(None, "Most percentage points of accuracy lost; needs labels.")
    min_agreement: float | None = option(
        None, "Least percent of samples in the float model's class."
    )
    max_error: float | None = option(None, "Largest relative error of an output, a share: 0.05.")

    # What is compressed, and by which samples it is judged.
    output: str | None = option(None, "The output that holds class scores.")
    class_axis: int | None = option(None, "The axis of --output that the classes lie along.")
    include: Sequence[str] = option((), "Pattern of weights to compress; by default all.")
    exclude: Sequence[str] = option((), "Pattern of weights that stay float.")
    mean: Sequence[float] = option(
        (), "Mean that is subtracted from the input: one value, or one per channel, with commas."
    )
    std: Sequence[float] = option(
        (), "Deviation that the input is divided by: one value, or one per channel, with commas."
    )
    samples: int = option(1024, "Use at most so many samples.", minimum=1)
    seed: int = option(0, "Seed of the draw of samples.")
    threads: int = option(1, "Number of threads of onnxruntime.", minimum=1)

    # The file.
    floats: str = option("float32", "Type of what stays float: float32 or float16.")
    storage: str = option("auto", shared.STORAGE)
    dequantize: str = option("auto", shared.DEQUANTIZE)
    target: str = option("onnxruntime", shared.TARGET)
    opset: int | None = option(None, shared.OPSET)
    keep_best: bool = option(False, "Write the best file even if a bound is missed.")
    checkpoint: str | Path | None = option(
        None, "Write a model.pt as well (of PyTorch models): training goes on from it."
    )
    trust_pickle: bool = option(False, shared.TRUST_PICKLE)
    force: bool = option(False, shared.FORCE)
