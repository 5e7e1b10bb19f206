"""Real graphs from the field: their weights put on a grid, converted, read back; onnxruntime says
the same before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx.verbs.pack import pack, unpack
from tests.conversions import session

FOLDER = Path(__file__).parents[1].parent / "shared" / "data" / "onnx"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"{FOLDER} with graphs from the field is missing"
)
GRAPHS = (
    "dtln_1",
    "mnist_cntk",
    "silero_vad_op18_ifless",
    "ultraface_slim320_simplified",
    "yunet_s_dynamic",
)
SHAPES = {"input": [1, 512], "state": [2, 1, 128], "sr": []}  # of silero, whose own are free
RECURRENT = (
    "dtln_1",
    "silero_vad_op18_ifless",
)  # whose kernels sum in another order once a weight is no initializer
FLOAT32 = 1e-5  # relative


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
        shape = [
            length if isinstance(length, int) else 64 if axis > 1 else 1
            for axis, length in enumerate(value.shape)
        ]
        if graph.startswith("silero"):
            shape = SHAPES[value.name]
        made[value.name] = (
            np.array(16000)
            if value.type == "tensor(int64)"
            else generator.random(shape, dtype=np.float32)
        )
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
            np.testing.assert_allclose(
                result, expected, rtol=0, atol=FLOAT32 * max(1.0, np.abs(expected).max())
            )


# What `pack` makes of each graph as it is: "packed", or "copied" and the reason.
OUTCOMES = {
    "dtln_1": ("copied", "on more than 256 values"),
    "mnist_cntk": ("copied", "on more than 256 values"),
    "qonnx_TFC_2W2A": ("packed", ""),
    "silero_vad_op18_ifless": ("copied", "on more than 256 values"),
    "ultraface_slim320_simplified": ("copied", "on more than 256 values"),
    "yunet_s_dynamic": ("copied", "on more than 256 values"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_graph_from_the_field_is_packed_or_copied_with_the_reason(name, tmp_path):
    outcome, why = OUTCOMES[name]
    report = pack(FOLDER / f"{name}.onnx", tmp_path / "out.onnx")
    assert ("copied" if report.written is None else "packed", why in report.reason) == (
        outcome,
        True,
    )
    if outcome == "copied":
        assert (tmp_path / "out.onnx").read_bytes() == (FOLDER / f"{name}.onnx").read_bytes()


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_from_the_field_whose_weights_lie_on_a_grid_is_packed_and_unpacked(name, tmp_path):
    graph, tensors = on_a_grid(FloatGraph.load(FOLDER / f"{name}.onnx"))
    (tmp_path / "grid.onnx").write_bytes(graph.to_model().SerializeToString())
    inputs = feeds(session(tmp_path / "grid.onnx", 0), name)
    report = pack(tmp_path / "grid.onnx", tmp_path / "packed.onnx", inputs=inputs)
    assert report.written is not None
    assert [check.passed for check in report.equivalence.checks] == [True, True]
    if name not in RECURRENT:
        assert "bit for bit" in report.equivalence.checks[0].sentence
    large = {tensor.name for tensor in tensors if tensor.size >= 256}
    assert large <= {row.name for row in report.written.tensors}
    assert report.nbytes < 0.6 * report.original_bytes
    for options in ({}, {"floats": True}):
        unpack(tmp_path / "packed.onnx", tmp_path / "dense.onnx", force=True, **options)
        loaded = session(tmp_path / "dense.onnx", 0)
        given = {value.name: inputs[value.name] for value in loaded.get_inputs()}
        before = session(tmp_path / "packed.onnx", 0)
        for found, expected in zip(loaded.run(None, given), before.run(None, given), strict=True):
            np.testing.assert_allclose(
                found, expected, rtol=0, atol=FLOAT32 * max(1.0, np.abs(expected).max())
            )


def test_a_qonnx_graph_runs_on_stock_onnxruntime_once_packed(tmp_path):
    """Against the graph's own operators, Quant being QONNX's definition in numpy."""
    pack(FOLDER / "qonnx_TFC_2W2A.onnx", tmp_path / "out.onnx")
    proto = onnx.load(FOLDER / "qonnx_TFC_2W2A.onnx")
    proto.opset_import.append(onnx.helper.make_opsetid("onnx.brevitas", 1))
    evaluator = ReferenceEvaluator(proto, new_ops=[Quant, BatchNormalization])
    loaded = session(tmp_path / "out.onnx", 99)
    classes = []
    for _ in range(16):
        x = np.random.default_rng(len(classes)).random((1, 1, 28, 28), dtype=np.float32)
        expected = evaluator.run(None, {"0": x})[0]
        found = loaded.run(None, {loaded.get_inputs()[0].name: x})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())
        classes.append(int(found.argmax()))


class Quant(OpRun):
    op_domain = "onnx.brevitas"

    def _run(self, x, scale, zero, bits, narrow=None, rounding_mode=None, signed=None):
        lowest = -(2.0 ** (bits - 1)) + narrow if signed else np.float32(0)
        highest = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
        return (
            ((np.rint(np.clip(x / scale + zero, lowest, highest)) - zero) * scale).astype(
                np.float32
            ),
        )


class BatchNormalization(OpRun):
    """onnx's own, for opset 9, mixes in the statistics of the batch, as in training."""

    op_domain = ""

    def _run(
        self, x, weight, bias, mean, variance, epsilon=None, momentum=None, training_mode=None
    ):
        return ((x - mean) / np.sqrt(variance + np.float32(epsilon)) * weight + bias,)


def test_a_graph_that_no_stock_runtime_takes_is_refused_with_the_reason(tmp_path):
    graph, tensors = on_a_grid(FloatGraph.load(FOLDER / "qonnx_TFC_2W2A.onnx"))
    with pytest.raises(FileError, match=r"onnx\.brevitas"):
        write(make_plan(graph, match(graph.weights, tensors)), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
