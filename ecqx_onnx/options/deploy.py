"""The options of `deploy`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecqx_onnx.options import shared
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import option, required


@dataclass(frozen=True, kw_only=True, eq=False)
class DeployOptions:
    """Which folder is written for which platform, and what it is checked with."""

    onnx_file: str | Path = required("The .onnx file to deploy.")
    folder: str | Path = required("The folder to write.")
    to: str = required("The platform: web, android, ios or linux.")
    against: Any = option(
        None,
        "The PyTorch side, for a validation and a tolerance that is derived from it; or the float"
        " .onnx that was compressed.",
    )
    data: Any = option(
        None, "Labelled data for golden inputs and the expected accuracy: as for quantize."
    )
    factory: str | None = option(None, shared.FACTORY)
    input_shape: InputShape | None = option(None, shared.INPUT_SHAPE)
    labels: Sequence[str] = option(
        (), "The classes' names with commas, instead of those in the file."
    )
    title: str = option("", "The model's name on page and README, instead of the file's.")
    webgpu: bool = option(
        False,
        "For the web: add onnxruntime's WebGPU build (27 MB), used where it is faster and passes.",
    )
    card: str = option(
        "",
        "The float model's name, such as owner/resnet20: writes MODEL_CARD.md, which has it as its"
        " base.",
    )
    samples: int | None = option(None, shared.SAMPLES, minimum=1)
    strict: bool = option(True, shared.STRICT)
    trust_pickle: bool = option(False, shared.TRUST_PICKLE)
    force: bool = option(False, "Replace the folder if it exists.")
