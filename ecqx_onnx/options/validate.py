"""The options of `validate`, on this machine and on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx.options import shared
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import option, required

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class ValidateOptions:
    """What a file is compared with, and on what."""

    onnx_file: str | Path = required("The .onnx file to check.")
    against: Any = option(
        None,
        "What the file was made from: the checkpoint (or state dict, .pt2) that was converted, or"
        " the .onnx that was packed, or the float .onnx that was compressed. Without it and without"
        " --data: is the file whole?",
    )
    data: Any = option(None, shared.DATA)
    inputs: Mapping[str, np.ndarray] | None = option(
        None,
        "Against an .onnx file: an .npz with one array per model input, instead of --data.",
    )
    factory: str | None = option(None, shared.FACTORY)
    input_shape: InputShape | None = option(None, shared.INPUT_SHAPE)
    samples: int | None = option(None, shared.SAMPLES, minimum=1)
    batch_size: int = option(64, "Number of samples that run at once.", minimum=1)
    device: Sequence[str] | None = option(
        None,
        "Run the file there: local, node, web, arm64, ssh://user@host[:port] or folder:PATH;"
        " several give one table.",
    )
    time_limit: float = option(
        1800.0, "With --device: seconds until its runner is stopped.", minimum=1.0
    )
    min_agreement: float | None = option(None, shared.MIN_AGREEMENT)
    max_error: float | None = option(None, shared.MAX_ERROR)
    max_drop: float | None = option(None, shared.MAX_DROP)
    bisect: bool = option(
        False, "Find the first tensor inside that differs, and say why it may: about log2 n runs."
    )
    strict: bool = option(True, shared.STRICT)
    latency_runs: int = option(
        50, "Pairs of latency measurements; 0 leaves latency out.", minimum=0
    )
    trust_pickle: bool = option(False, shared.TRUST_PICKLE)
