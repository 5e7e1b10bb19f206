"""Small .onnx files as other tools write them, and what must hold once they went through here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.verbs.pack import unpack
from ecqx_onnx.verbs.reports import PackReport

FLOAT = TensorProto.FLOAT
Value = tuple[str, int, Sequence[int | str] | None]  # name, TensorProto type, shape


def draw_levels(shape: Sequence[int], *, seed: int = 0) -> np.ndarray:
    """int8, mostly zero, at most 3: what packing makes small."""
    generator = np.random.default_rng(seed)
    levels = generator.integers(-3, 4, shape)
    return np.where(generator.random(shape) < 0.6, 0, levels).astype(np.int8)


def draw_grid(shape: Sequence[int], *, step: float = 0.0625, seed: int = 0) -> np.ndarray:
    """float32 on a grid of a few values."""
    return draw_levels(shape, seed=seed).astype(np.float32) * np.float32(step)


def make_model(
    nodes: Sequence[NodeProto],
    tensors: Mapping[str, np.ndarray],
    *,
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    opset: int | None = 21,
    domains: Mapping[str, int] | None = None,
    ir_version: int = 10,
) -> ModelProto:
    """Whatever is given, as it stands: nothing is checked."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    imports = [helper.make_opsetid(name, version) for name, version in (domains or {}).items()]
    if opset is not None:
        imports.append(helper.make_opsetid("", opset))
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def save(model: ModelProto, path: Path) -> Path:
    """Write it without any check."""
    path.write_bytes(model.SerializeToString())
    return path


def run_file(
    path: Path, feeds: Mapping[str, np.ndarray], *, optimized: bool = False
) -> list[np.ndarray]:
    """What onnxruntime computes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def assert_same_outputs(one: Path, other: Path, feeds: Mapping[str, np.ndarray]) -> None:
    """Bit for bit as written; with optimizations within rounding (other kernels, other sums)."""
    exact = run_file(one, feeds)
    for a, b in zip(exact, run_file(other, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(exact, run_file(other, feeds, optimized=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def assert_packed(report: PackReport, original: Path, feeds: Mapping[str, np.ndarray]) -> None:
    """Smaller, the same outputs; and unpacked, too."""
    assert report.written is not None, report.reason
    assert report.nbytes < original.stat().st_size
    assert_same_outputs(original, report.path, feeds)
    plain = report.path.with_suffix(".floats.onnx")
    unpack(report.path, plain, floats=True)
    for a, b in zip(run_file(original, feeds), run_file(plain, feeds), strict=True):
        np.testing.assert_array_equal(a, b)
    dense = report.path.with_suffix(".dense.onnx")
    unpack(report.path, dense)
    for a, b in zip(run_file(original, feeds), run_file(dense, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def holds(path: Path, values: np.ndarray) -> bool:
    """Whether an initializer has these values, whatever it is called."""
    for tensor in onnx.load(path).graph.initializer:
        found = numpy_helper.to_array(tensor)
        if found.dtype == values.dtype and np.array_equal(found, values):
            return True
    return False
