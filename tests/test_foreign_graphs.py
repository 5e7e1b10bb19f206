"""Real graphs from the field: their weights put on a grid, converted, read back; onnxruntime says the same before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import QuantTensor, Scale
from tests.conversions import session

FOLDER = Path(__file__).parents[1].parent / "shared" / "data" / "onnx"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} with graphs from the field is missing")
GRAPHS = ("dtln_1", "mnist_cntk", "silero_vad_op18_ifless", "ultraface_slim320_simplified", "yunet_s_dynamic")
SHAPES = {"input": [1, 512], "state": [2, 1, 128], "sr": []}  # of silero, whose own are free
FLOAT32 = 1e-5  # relative; unoptimised kernels sum in another order when a weight isn't an initializer


def on_a_grid(graph: FloatGraph) -> tuple[FloatGraph, list[QuantTensor]]:
    """Every weight rounded to 4 bit."""
    weights, tensors = dict(graph.weights), []
    for name, values in graph.weights.items():
        if values.dtype == np.float32 and values.ndim >= 2 and values.size:
            step = np.float32(max(np.abs(values).max() / 7, 1e-6))
            tensors.append(QuantTensor(name, np.rint(values / step).astype(np.int8), Scale(step)))
            weights[name] = tensors[-1].dequantize()
    return FloatGraph(graph.proto, weights), tensors


def feeds(loaded: onnxruntime.InferenceSession, graph: str) -> dict[str, np.ndarray]:
    generator, made = np.random.default_rng(0), {}
    for value in loaded.get_inputs():
        shape = [length if isinstance(length, int) else 64 if axis > 1 else 1 for axis, length in enumerate(value.shape)]
        if graph.startswith("silero"):
            shape = SHAPES[value.name]
        made[value.name] = np.array(16000) if value.type == "tensor(int64)" else generator.random(shape, dtype=np.float32)
    return made


@pytest.mark.parametrize("form", ["folded", "standard"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_from_the_field_says_the_same(name, form, tmp_path):
    graph, tensors = on_a_grid(FloatGraph.load(FOLDER / f"{name}.onnx"))
    matching = match(graph.weights, tensors)
    report = write(make_plan(graph, matching, dequantize=form), tmp_path / "out.onnx")
    assert len(report.tensors) == len(tensors)
    stored = read_weights(tmp_path / "out.onnx")
    for weight, found in zip(stored, matching.found, strict=True):
        assert weight.crc_ok
        np.testing.assert_array_equal(weight.weight.dequantize(), found.dequantize())
    twin = graph.to_model().SerializeToString()
    for level in (0, 99):
        before, after = session(twin, level), session(tmp_path / "out.onnx", level)
        given = feeds(before, name)
        wanted = {value.name for value in after.get_inputs()}  # weights are inputs no more
        results = after.run(None, {key: value for key, value in given.items() if key in wanted})
        for expected, result in zip(before.run(None, given), results, strict=True):
            np.testing.assert_allclose(result, expected, rtol=0, atol=FLOAT32 * max(1.0, np.abs(expected).max()))


def test_a_graph_that_no_stock_runtime_takes_is_refused_with_the_reason(tmp_path):
    graph, tensors = on_a_grid(FloatGraph.load(FOLDER / "qonnx_TFC_2W2A.onnx"))
    with pytest.raises(FileError, match=r"onnx\.brevitas"):
        write(make_plan(graph, match(graph.weights, tensors)), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
