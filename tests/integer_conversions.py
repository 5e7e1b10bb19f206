"""PyTorch model -> quantised weights and activations -> our file -> onnxruntime on integer kernels:
the whole way, for tests.

The models are scaled so that every layer maps inputs that differ by e to outputs that differ by at
most e (a sum of two: 2e); rounding an activation moves it by half a step, so that all roundings
together move an output by at most half the steps' sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ecqx_onnx_converters import make_plan, match, read_weights, write
from ecqx_onnx_converters.passes.activations import (
    IntegerKernels,
    UInt8,
    quantize_activations,
    replace_pooling,
)
from ecqx_onnx_converters.passes.integer_nodes import find_integer_nodes
from ecqx_onnx_converters.passes.work import Work

from ecqx_onnx.checkpoint.float_model import restore_float_weights
from ecqx_onnx.runtime.calibration import calibrate_ranges
from ecqx_onnx.runtime.sessions import count_executed_operators
from ecqx_onnx.tensors import QuantTensor
from tests.conversions import float_graph, quantize_model, run


@dataclass(frozen=True, eq=False)
class IntegerConversion:
    path: Path
    integer: IntegerKernels
    ranges: dict[str, tuple[float, float]]
    executed: Counter[str]

    def outputs(self, x: torch.Tensor, level: int) -> np.ndarray:
        return run(self.path, [x], level)

    @property
    def tolerance(self) -> float:
        """Half of all steps together, without gain; and a bias' rounding, which is far below a
        step."""
        return 0.5 * sum(float(UInt8.of(*pair).scale) for pair in self.ranges.values()) * 1.01


def contract(model: torch.nn.Module) -> torch.nn.Module:
    """Scales each weight so that the absolute weights of every output add up to at most one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter /= parameter.abs().flatten(1).sum(1).max()
    return model.eval()


def convert_to_integers(
    model: torch.nn.Module,
    x: torch.Tensor,
    folder: Path,
    *,
    tensors: Sequence[QuantTensor] | None = None,
    method: str = "minmax",
    **options: Any,
) -> IntegerConversion:
    """x: one batch, both example and calibration data. tensors: by default every weight on 4
    bits."""
    tensors = quantize_model(model) if tensors is None else tensors
    graph = float_graph(model, [x])
    work = replace_pooling(Work(graph, match(graph.weights, tensors)))
    values = find_integer_nodes(work.graph, work.matching.found).ranges
    whole = restore_float_weights(work)
    ranges = calibrate_ranges(whole, values, [x.numpy()], method=method)
    work = quantize_activations(work, ranges)
    integer = work.find_notes(IntegerKernels)[0]
    path = folder / "out.onnx"
    plan = make_plan(work.graph, work.matching, integer=integer.weights, **options)
    write(plan, path, force=True)
    assert all(stored.crc_ok for stored in read_weights(path))
    return IntegerConversion(
        path, integer, dict(ranges), count_executed_operators(path, (x.numpy(),))
    )
