"""PyTorch model -> quantised weights and activations -> our file -> onnxruntime on integer kernels:
the whole way, for tests.

The models are scaled so that every layer maps inputs that differ by e to outputs that differ by at
most e (a sum of two: 2e); rounding an activation moves it by half a step, so that all roundings
together move an output by at most half the steps' sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from ecqx_onnx_converters.passes.activations import (
    IntegerGraph,
    UInt8,
    quantize_activations,
    replace_pooling,
)
from ecqx_onnx_converters.passes.integer_nodes import find_integer_nodes

from ecqx_onnx.runtime.calibration import calibrate_ranges
from ecqx_onnx.runtime.sessions import count_executed_operators
from ecqx_onnx.tensors import QuantTensor
from tests.conversions import float_graph, quantize_model, run


@dataclass(frozen=True, eq=False)
class IntegerConversion:
    path: Path
    integer: IntegerGraph
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
    graph = replace_pooling(float_graph(model, [x]))
    matching = match(graph.weights, tensors)
    placed = {weight.name: weight.dequantize() for weight in matching.found}
    whole = FloatGraph(graph.proto, {**graph.weights, **placed})
    ranges = calibrate_ranges(
        whole, find_integer_nodes(graph, matching.found).ranges, [x.numpy()], method=method
    )
    integer = quantize_activations(graph, matching.found, ranges)
    path = folder / "out.onnx"
    matching = replace(matching, found=integer.found)
    write(make_plan(integer.graph, matching, integer=integer.weights, **options), path, force=True)
    assert all(stored.crc_ok for stored in read_weights(path))
    return IntegerConversion(
        path, integer, dict(ranges), count_executed_operators(path, (x.numpy(),))
    )
