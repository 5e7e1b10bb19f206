"""What storing parameters as float16 changes in a model's outputs.

A file with rounded parameters is not PyTorch's model any more, and no bound on float32 arithmetic
covers the difference. So the same parameters are rounded in the float model, w32 -> w16, and both
run on the same inputs. What is compared with PyTorch is

    file - (w16 - w32)  =  w32 + (file - w16)

where file and w16 are two float32 implementations of one network, and w32 is one of PyTorch's:
three times the bound for one, and nothing for the rounded parameters. A fault of the file is seen
about as sharply as in one of float32 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ecqx_onnx.runtime.sessions import open_session, run

if TYPE_CHECKING:
    from ecqx_onnx.inputs.onnx_file import OnnxFile

RUNS = 3  # float32 implementations in that sum
Shift = Callable[[Sequence[np.ndarray]], tuple[np.ndarray, ...]]
"""Inputs -> for each output, what rounded parameters add to it."""


def measure_float16_shift(
    file: OnnxFile, float_model: Callable[..., bytes | None] | None
) -> Shift | None:
    """Prepare to measure what rounded parameters change.

    Args:
        file: The file that was converted.
        float_model: Called with floats="float32" and floats="float16" it makes w32 and w16, as
            serialized ONNX models; None where there is no float model.

    Returns:
        A function from inputs to the change of each output; None for a file of float32 parameters,
        and where there is no float model to round.
    """
    if file.metadata.get("floats") != "float16" or float_model is None:
        return None
    models = [float_model(floats=floats) for floats in ("float32", "float16")]
    sessions = [open_session(model) for model in models if model is not None]
    if len(sessions) < 2:
        return None

    def shift(inputs: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        plain, rounded = (run(session, inputs) for session in sessions)
        return tuple(
            after - before if np.issubdtype(after.dtype, np.floating) else np.zeros_like(after)
            for before, after in zip(plain, rounded, strict=True)
        )

    return shift
