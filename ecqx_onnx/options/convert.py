"""The options of `convert`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecqx_onnx.options import shared
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import option, required


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvertOptions:
    """What is converted, how its weights and activations are stored, and for which runtime."""

    model: Any = required(
        "A checkpoint of ours, a .pt2 program, a state dict (with --model), a pickled module, or"
        " (with --bits or --bits-per-weight) a float .onnx file."
    )
    out: str | Path = required(shared.OUT_ONNX)
    factory: str | None = option(None, shared.FACTORY)
    input_shape: InputShape | None = option(None, shared.INPUT_SHAPE)
    dynamic: Any = option(None, shared.DYNAMIC)
    bits: int | None = option(
        None,
        "Quantise a float model to so many bits, without training.",
        minimum=2,
        maximum=8,
    )
    bits_per_weight: float | None = option(
        None,
        "Quantise a float model without training on as many levels as so many coded bits for each"
        " weight ask for.",
        minimum=0.05,
        maximum=16.0,
    )
    entropy_weight: float = option(
        0.0, "With --bits: how dear coding is against distance; 0 is nearest level.", minimum=0.0
    )
    include: Sequence[str] = option(
        (), "With --bits: pattern of more parameter names to quantise; repeat for more."
    )
    exclude: Sequence[str] = option(
        (), "With --bits: pattern of parameter names that stay float; repeat for more."
    )
    storage: str = option("auto", shared.STORAGE_PREFERRED)
    prefer: str = option("auto", shared.PREFER)
    dequantize: str = option("auto", shared.DEQUANTIZE)
    target: str = option("onnxruntime", shared.TARGET)
    opset: int | None = option(
        None, "ONNX opset to write; by default the lowest that holds the weights."
    )
    activations: str = option(
        "float32",
        "float32, or int8: integer kernels. Often twice as fast on CPUs with 8 bit products, slower"
        " for some small networks; `ecqx-onnx validate` measures it.",
    )
    calibration: Any = option(
        None,
        "With --activations int8: data that their ranges come from, as for quantize. Not needed"
        " where the checkpoint was trained with --activations int8. With --bits or"
        " --bits-per-weight: unlabelled samples that weights are rounded by.",
    )
    calibration_method: str = option(
        "minmax",
        "How ranges come from the calibration data: minmax, percentile or entropy, as onnxruntime"
        " does them.",
    )
    calibration_samples: int = option(
        512, "Calibrate on so many of the training samples.", minimum=1
    )
    floats: str = option(
        "float32",
        "float32, or float16: steps per channel, biases, whatever stays float, rounded, in half the"
        " bytes.",
    )
    data: Any = option(
        None,
        "With --bits: data on which the result is compared with the float model; without it, random"
        " inputs.",
    )
    min_agreement: float | None = option(None, shared.MIN_AGREEMENT)
    max_error: float | None = option(None, shared.MAX_ERROR)
    max_drop: float | None = option(None, shared.MAX_DROP)
    strict: bool = option(True, shared.STRICT)
    trust_pickle: bool = option(False, shared.TRUST_PICKLE)
    force: bool = option(False, shared.FORCE)
