"""`validate --bisect` names the first tensor that differs, in log2 n looks, and a likely cause."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import ecqx_onnx
from ecqx_onnx.cli import app
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.validation.bisection import bisect_file, search
from ecqx_onnx.validation.bisection.taps import OnnxSide, Tap, align

ROOT = Path(__file__).parents[1]
KEYWORDS = ROOT / "models/kws_dscnn_fsdd_4bit.pt"
LAYERS = 12


@pytest.fixture(scope="module")
def keywords(tmp_path_factory):
    """A network of nine convolutions, BatchNorm folded, as a file."""
    path = tmp_path_factory.mktemp("bisection") / "kws.onnx"
    ecqx_onnx.convert(KEYWORDS, path)
    return path


def write_chain(path, *, broken=None, scale=1.5):
    """MatMul and Relu in turn; one weight is another in the broken file."""
    generator = np.random.default_rng(0)
    nodes, values = [], []
    name = "x"
    for layer in range(LAYERS):
        weight = generator.normal(size=(16, 16)).astype(np.float32) / 3
        if layer == broken:
            weight = weight * np.float32(scale)
        values.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"product{layer}"]))
        nodes.append(helper.make_node("Relu", [f"product{layer}"], [f"relu{layer}"]))
        name = f"relu{layer}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16])]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, values)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return read_onnx(path)


def draw_inputs():
    return [np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)]


@pytest.mark.parametrize("broken", range(LAYERS))
def test_the_first_changed_layer_is_found_in_log2_looks(tmp_path, broken):
    whole = write_chain(tmp_path / "whole.onnx")
    file = write_chain(tmp_path / "broken.onnx", broken=broken)
    found, levels = bisect_file(file, draw_inputs(), reference=whole)
    assert found.first.name == f"product{broken}"
    assert found.first.operator == "MatMul"
    assert found.first.position == 2 * broken
    assert len(found.probes) <= 1 + math.ceil(math.log2(found.tensors))
    assert f"product{broken}" in found.cause
    assert levels.first is None


def test_halving_finds_what_looking_at_every_tensor_finds(tmp_path):
    whole = write_chain(tmp_path / "whole.onnx")
    file = write_chain(tmp_path / "broken.onnx", broken=5, scale=1.001)
    sides = (OnnxSide(file, "disabled"), OnnxSide(whole, "disabled"))
    pairs = align(sides[0].taps, sides[1].taps)
    snrs = [search._measure(pair, sides, draw_inputs()) for pair in pairs]
    slow = next(place for place, snr in enumerate(snrs) if snr < search.ROUNDING)
    found, _ = bisect_file(file, draw_inputs(), reference=whole)
    assert found.first.position == slow
    assert found.first.snr == pytest.approx(snrs[slow])


def test_the_snr_is_the_energys_ratio_in_decibels(tmp_path):
    whole = write_chain(tmp_path / "whole.onnx")
    file = write_chain(tmp_path / "broken.onnx", broken=0, scale=1.1)
    found, _ = bisect_file(file, draw_inputs(), reference=whole)
    assert found.first.snr == pytest.approx(20.0, abs=0.01)  # an error of a tenth


def test_equal_files_have_no_first_tensor(tmp_path):
    file = write_chain(tmp_path / "whole.onnx")
    for found in bisect_file(file, draw_inputs(), reference=file):
        assert found.first is None
        assert "no tensor leaves its bound" in found.cause


def test_a_folded_batch_norm_is_compared_behind_the_norm():
    def make_taps(*operators):
        return [Tap(name, str(place), f"{name}{place}") for place, name in enumerate(operators)]

    folded = make_taps("Conv", "Relu", "Conv", "Relu", "Gemm")
    names = ("Conv", "BatchNormalization", "Relu", "Conv", "BatchNormalization", "Relu", "Gemm")
    pairs = align(folded, make_taps(*names))
    assert [other.key for _, other in pairs] == ["1", "2", "4", "5", "6"]
    kept = align(make_taps(*names), make_taps(*names))
    assert [other.key for _, other in kept] == [str(place) for place in range(7)]


def test_pytorch_and_the_file_agree_in_every_tensor_that_is_compared(keywords):
    from ecqx_onnx.verbs.reference import load_reference

    module = load_reference(KEYWORDS).module
    file = read_onnx(keywords)
    inputs = [np.random.default_rng(0).normal(size=(2, 1, 49, 40)).astype(np.float32)]
    from ecqx_onnx.validation.bisection.torch_side import TorchSide

    sides = (OnnxSide(file, "disabled"), TorchSide(module))
    pairs = align(sides[0].taps, sides[1].taps)
    assert len(pairs) > 18
    for pair in pairs[::5]:
        assert search._measure(pair, sides, inputs) > search.ROUNDING, pair


def test_the_command_names_the_layer_whose_bias_was_changed(keywords, tmp_path):
    model = onnx.load(keywords)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    bias = convolutions[4].input[2]
    tensor = next(t for t in model.graph.initializer if t.name == bias)
    values = numpy_helper.to_array(tensor) + np.float32(0.5)
    tensor.CopyFrom(numpy_helper.from_array(values, bias))
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    arguments = ["validate", str(path), "--against", str(KEYWORDS), "--bisect"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 1
    first, levels = json.loads(done.stdout)["bisections"]
    assert "blocks.1.4.weight" in first["first"]  # its BatchNorm, which is folded in the file
    assert "PyTorch" in first["between"]
    assert levels["first"] is None
    text = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments).output
    assert "blocks.1.4.weight" in text
    assert "SNR" in text
    assert "likely cause" in text


def test_half_precision_is_named_as_the_cause(tmp_path):
    whole = write_chain(tmp_path / "whole.onnx")
    file = write_chain(tmp_path / "broken.onnx", broken=3)
    extra = numpy_helper.from_array(np.ones(2, np.float16), "half")
    file.proto.graph.initializer.append(extra)
    onnx.save(file.proto, tmp_path / "half.onnx")
    half = read_onnx(tmp_path / "half.onnx")
    found, _ = bisect_file(half, draw_inputs(), reference=whole)
    assert found.bound == search.FLOAT16
    assert "float16" in found.cause


def test_causes_of_the_runtimes_rewrites_are_read_from_what_it_executes(tmp_path, monkeypatch):
    file = write_chain(tmp_path / "whole.onnx")
    for executed, word in (
        ({"MatMulNBits": 1}, "MatMulNBits"),
        ({"FusedGemm": 2}, "fused operator"),
        ({"DynamicQuantizeMatMul": 1}, "quantizes by itself"),
        ({"MatMul": 1}, "rewrite"),
    ):
        monkeypatch.setattr(search, "count_executed_operators", lambda *_, e=executed: e)
        causes = search._list_optimization_causes(file, draw_inputs(), False)
        assert word in causes[0]


def test_a_matmul_that_the_runtime_rounds_by_itself_is_found(tmp_path):
    """DequantizeLinear in blocks before MatMul becomes MatMulNBits, with int8 activations."""
    generator = np.random.default_rng(0)
    levels = generator.integers(-7, 8, (64, 32)).astype(np.int8)
    packed = helper.make_tensor("levels", TensorProto.INT4, (64, 32), levels.flatten().tolist())
    scale = numpy_helper.from_array(np.full((2, 32), 0.1, np.float32), "scale")
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node(
            "DequantizeLinear", ["levels", "scale"], ["weight"], axis=0, block_size=32
        ),
        helper.make_node("MatMul", ["positive", "weight"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])]
    graph = helper.make_graph(nodes, "blocks", inputs, outputs, [packed, scale])
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "b.onnx")
    x = [generator.normal(size=(4, 64)).astype(np.float32)]
    (found,) = bisect_file(read_onnx(tmp_path / "b.onnx"), x)
    if found.first is None:
        pytest.skip("this onnxruntime computes it in float32 on this processor")
    assert found.first.operator == "MatMul"
    assert "MatMulNBits" in found.cause


def test_bisect_and_device_do_not_go_together(keywords):
    arguments = ["validate", str(keywords), "--bisect", "--device", "local"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "--bisect" in done.stderr


def test_a_file_alone_is_bisected_between_levels(keywords):
    done = CliRunner().invoke(app, ["validate", str(keywords), "--bisect", "--json"])
    assert done.exit_code == 0
    (levels,) = json.loads(done.stdout)["bisections"]
    assert levels["between"] == "all optimisations against none"
