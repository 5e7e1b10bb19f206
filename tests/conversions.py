"""PyTorch model -> quantised weights -> ONNX graph -> our file -> onnxruntime: the whole way, for
the converters' tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from ecqx_onnx_converters import (
    FloatGraph,
    Matching,
    StoredWeight,
    WriteReport,
    make_plan,
    match,
    read_weights,
    write,
)

from ecqx_onnx.checkpoint.export import export
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale

# Both sums of float32 products scatter around the true value by about 2^-24 of the terms, and no
# sum here has more than 256.
FLOAT32_SUMS = 256 * 2.0**-24


@dataclass(frozen=True, eq=False)
class Conversion:
    path: Path
    report: WriteReport
    matching: Matching
    stored: tuple[StoredWeight, ...]

    def outputs(self, inputs: Sequence[torch.Tensor], level: int) -> np.ndarray:
        return run(self.path, inputs, level)


def quantize_model(
    model: torch.nn.Module,
    *,
    bits: int = 4,
    per_channel: bool = False,
    codebook: bool = False,
    seed: int = 0,
) -> tuple[QuantTensor, ...]:
    """Puts every weight of two or more dimensions on levels, in place. per_channel: along dimension
    0."""
    tensors = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        weight = parameter.detach().numpy()
        most = 2 ** (bits - 1) - 1
        if codebook:
            values = np.array([0.0, 0.3, -0.17], np.float32)
            tensor = QuantTensor(
                name,
                np.random.default_rng(seed).integers(-1, 2, weight.shape).astype(np.int8),
                Codebook(values),
            )
        else:
            axes = tuple(range(1, weight.ndim)) if per_channel else None
            extreme = np.abs(weight).max(axis=axes, keepdims=per_channel)
            step = np.maximum(extreme / most, np.float32(1e-3)).astype(np.float32)
            levels = np.clip(np.rint(weight / step), -most, most).astype(np.int8)
            tensor = QuantTensor(name, levels, Scale(np.asarray(step)))
        tensors.append(tensor)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(tensor.dequantize()))
    return tuple(tensors)


def float_graph(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> FloatGraph:
    return export(model, tuple(inputs)).graph


def convert(
    graph: FloatGraph, tensors: Sequence[QuantTensor], folder: Path, **options: Any
) -> Conversion:
    matching = match(graph.weights, tensors)
    path = folder / "out.onnx"
    report = write(make_plan(graph, matching, **options), path, force=True)
    return Conversion(path, report, matching, read_weights(path))


def session(model: Path | bytes, level: int, **settings: str) -> onnxruntime.InferenceSession:
    """level: 0 (no optimisation) or 99 (all)."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in settings.items():
        setattr(options, key, value)
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
    )


def run(model: Path | bytes, inputs: Sequence[torch.Tensor], level: int) -> np.ndarray:
    loaded = session(model, level)
    names = [value.name for value in loaded.get_inputs()]
    return loaded.run(None, dict(zip(names, [value.numpy() for value in inputs], strict=True)))[0]


def assert_says_the_same(
    conversion: Conversion, model: torch.nn.Module, inputs: Sequence[torch.Tensor]
) -> None:
    """onnxruntime gives PyTorch's outputs up to FLOAT32_SUMS, optimised or not; every weight reads
    back as matched."""
    with torch.no_grad():
        expected = model(*inputs).numpy()
    for level in (0, 99):
        difference = np.abs(conversion.outputs(inputs, level) - expected).max()
        assert difference <= FLOAT32_SUMS * max(1.0, np.abs(expected).max()), (
            f"level {level}: {difference}"
        )
    by_name = {stored.weight.name: stored for stored in conversion.stored}
    for weight in conversion.matching.found:
        stored = by_name[weight.name]
        assert stored.crc_ok
        np.testing.assert_array_equal(stored.weight.dequantize(), weight.dequantize())
