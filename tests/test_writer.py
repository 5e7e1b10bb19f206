"""Plan -> file: exact bytes, whole or not at all, nothing of ours missing and nothing of the
exporter's left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph, Plan, build, make_plan, match, read_weights, write
from ecqx_onnx_converters.serialization.metadata import compute_levels_crc, from_text
from onnx import TensorProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import Codebook, QuantTensor
from tests.conversions import session
from tests.onnx_graphs import model_of, product, quantized

GOLDEN = Path(__file__).parent / "golden"


def plan_of(model, *tensors: QuantTensor, **options) -> Plan:
    graph = FloatGraph.from_model(model)
    return make_plan(graph, match(graph.weights, tensors), **options)


def small_plan(**options) -> Plan:
    weight = quantized("w", (6, 8))
    return plan_of(product("Gemm", weight, transB=1), weight, **options)


def mixed_plan(**options) -> Plan:
    """Every storage and every meaning: INT2 codebook -> INT4 -> sparse."""
    ternary = QuantTensor(
        "a", quantized("a", (8, 8), most=1).levels, Codebook(np.array([0, 0.5, -0.25], np.float32))
    )
    four, sparse = (
        quantized("b", (8, 8), step=np.linspace(0.1, 0.2, 8).reshape(1, 8)),
        quantized("c", (8, 64)),
    )
    sparse.levels[:, 2:] = 0
    sparse.levels[1:] = 0
    nodes = [
        helper.make_node("MatMul", [x, w], [y])
        for x, w, y in [("x", "a", "u"), ("u", "b", "v"), ("v", "c", "y")]
    ]
    weights = {part.name: part.dequantize() for part in (ternary, four, sparse)}
    inputs = {"x": (TensorProto.FLOAT, ["n", 8])}
    return plan_of(
        model_of(nodes, weights, inputs=inputs, output_shape=["n", 64]),
        ternary,
        four,
        sparse,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"target": "qdq"}, {"target": "onnxruntime-1.17"}])
def test_bytes_are_golden(options, tmp_path):
    """A change of these files is a change of the format: look at it, and say so in the
    CHANGELOG."""
    write(mixed_plan(**options), tmp_path / "out.onnx", metadata={"tool": "golden"})
    golden = GOLDEN / f"mixed-{options.get('target', 'onnxruntime')}.onnx"
    assert without_metadata(tmp_path / "out.onnx") == without_metadata(golden)


def without_metadata(path):
    """The file's other bytes, and what the metadata says: how it is deflated is up to zlib."""
    model = onnx.load(path)
    (entry,) = model.metadata_props
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True), from_text(entry.value)


def test_same_plan_same_bytes(tmp_path):
    for name in ("one", "two"):
        write(mixed_plan(), tmp_path / name, metadata={"recipe": {"bits": 4}})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_report_says_what_lies_in_the_file(tmp_path):
    report = write(mixed_plan(), tmp_path / "out.onnx")
    assert report.nbytes == (tmp_path / "out.onnx").stat().st_size
    assert [(row.name, row.storage, row.bits) for row in report.tensors] == [
        ("a", "dense INT2", 2),
        ("b", "dense INT4", 4),
        ("c", "sparse INT8", 3),
    ]
    assert report.opset == 25
    assert sum(row.nbytes for row in report.tensors) < report.nbytes
    assert report.tensors[2].zeros > 0.9


def test_functions_are_written_once(tmp_path):
    model = build(mixed_plan()).model
    assert [function.name for function in model.functions] == ["LookUp", "Dequantize"]
    assert [node.op_type for node in model.graph.node[:3]] == ["LookUp", "Dequantize", "Dequantize"]
    assert all(not node.name and not node.doc_string for node in model.graph.node)


def test_metadata_holds_recipe_and_tensors(tmp_path):
    write(small_plan(), tmp_path / "out.onnx", metadata={"tool": "0.1", "labels": ["ä", "b"]})
    (entry,) = onnx.load(tmp_path / "out.onnx").metadata_props
    content = from_text(entry.value)
    assert content["labels"] == ["ä", "b"]
    levels = small_plan().entries[0].weight.tensor.levels
    assert content["tensors"][0][:2] == ["w", compute_levels_crc(levels)]
    assert content["storage"] == "dense"


def test_an_existing_file_is_left_alone_without_force(tmp_path):
    (tmp_path / "out.onnx").write_bytes(b"mine")
    with pytest.raises(FileError, match="exists"):
        write(small_plan(), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == b"mine"
    write(small_plan(), tmp_path / "out.onnx", force=True)
    assert read_weights(tmp_path / "out.onnx")


def test_a_folder_that_is_absent_is_refused(tmp_path):
    with pytest.raises(FileError, match="does not exist; create it first"):
        write(small_plan(), tmp_path / "none" / "out.onnx")


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(failing, tmp_path, monkeypatch):
    (tmp_path / "out.onnx").write_bytes(b"mine")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        *(("pathlib.Path.write_bytes", full) if failing == "write_bytes" else ("os.replace", full))
    )
    with pytest.raises(FileError, match="No space left"):
        write(small_plan(), tmp_path / "out.onnx", force=True)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]
    assert (tmp_path / "out.onnx").read_bytes() == b"mine"


def test_an_invalid_graph_is_not_written(tmp_path):
    weight = quantized("w", (6, 8))
    model = product("Gemm", weight, transB=1)
    model.graph.node[0].input[0] = "nowhere"
    with pytest.raises(FileError, match="valid ONNX"):
        write(plan_of(model, weight), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_old_exporters_list_as_inputs_are_inputs_no_more(tmp_path):
    weight = quantized("w", (6, 8))
    model = product("Gemm", weight, transB=1, opset=9)
    model.ir_version = 3
    model.graph.node[0].input.append("b")
    model.graph.initializer.append(helper.make_tensor("b", TensorProto.FLOAT, [6], [0.0] * 6))
    for name, shape in (("w", [6, 8]), ("b", [6])):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    write(plan_of(model, weight), tmp_path / "out.onnx")
    assert [value.name for value in session(tmp_path / "out.onnx", 99).get_inputs()] == ["x"]
    np.testing.assert_array_equal(
        read_weights(tmp_path / "out.onnx")[0].weight.dequantize(), weight.dequantize()
    )


def test_external_data_lies_beside_the_model_and_loads(tmp_path):
    weight, x = (
        quantized("w", (64, 96)),
        np.random.default_rng(0).normal(size=(3, 96)).astype(np.float32),
    )
    plan = plan_of(product("Gemm", weight, transB=1), weight)
    report = write(plan, tmp_path / "out.onnx", external_data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.data"]
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    write(plan, tmp_path / "inside.onnx")
    given, expected = (
        session(tmp_path / name, 99).run(None, {"x": x})[0] for name in ("out.onnx", "inside.onnx")
    )
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(
        read_weights(tmp_path / "out.onnx")[0].weight.dequantize(), weight.dequantize()
    )


def test_replacing_a_model_takes_its_old_external_data_away(tmp_path):
    weight = quantized("w", (64, 96))
    plan = plan_of(product("Gemm", weight, transB=1), weight)
    write(plan, tmp_path / "out.onnx", external_data=True)
    write(plan, tmp_path / "out.onnx", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_a_file_of_someone_else_beside_a_new_model_stays(tmp_path):
    (tmp_path / "out.onnx.data").write_bytes(b"mine")
    weight = quantized("w", (64, 96))
    for _ in range(2):
        write(plan_of(product("Gemm", weight, transB=1), weight), tmp_path / "out.onnx", force=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == b"mine"


@pytest.mark.slow
def test_a_model_above_two_gigabytes_is_written_read_and_run(tmp_path):
    """Float weights of 2.4 GB stay float beside one quantised weight; nothing of it ever is one
    protobuf."""
    width, layers = 8192, 9  # 9 x 268 MB
    weight = quantized("q", (width, 16))
    names = [f"w{i}" for i in range(layers)]
    nodes = [
        helper.make_node("MatMul", [f"h{i}" if i else "x", name], [f"h{i + 1}"])
        for i, name in enumerate(names)
    ]
    nodes.append(helper.make_node("MatMul", [f"h{layers}", "q"], ["y"]))
    inputs = {"x": (TensorProto.FLOAT, ["n", width])}
    model = model_of(nodes, {}, inputs=inputs, output_shape=["n", 16])
    for name, shape in [*((name, [width, width]) for name in names), ("q", [width, 16])]:
        model.graph.initializer.append(
            TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        )
    big = np.zeros((width, width), np.float32)
    np.fill_diagonal(big, 2)
    graph = FloatGraph(model, dict.fromkeys(names, big) | {"q": weight.dequantize()})
    report = write(
        make_plan(graph, match({"q": graph.weights["q"]}, [weight])), tmp_path / "big.onnx"
    )
    assert report.nbytes > 1 << 31
    assert (tmp_path / "big.onnx").stat().st_size < 1 << 20
    assert read_weights(tmp_path / "big.onnx")[0].crc_ok
    x = np.eye(1, width, dtype=np.float32)
    given = session(tmp_path / "big.onnx", 0).run(None, {"x": x})[0]
    np.testing.assert_array_equal(given, 2**layers * (x @ weight.dequantize()))
    assert len(FloatGraph.load(tmp_path / "big.onnx").weights) == layers


def test_inner_names_are_short_and_outer_ones_stay(tmp_path):
    model = build(mixed_plan()).model
    inner = {name for node in model.graph.node for name in (*node.input, *node.output)} - {"x", "y"}
    assert max(map(len, inner)) == 1
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]


def test_attributes_that_state_a_default_are_left_out():
    weight = quantized("w", (2, 3, 3, 3))
    attributes = {
        "strides": [1, 1],
        "dilations": [1, 1],
        "pads": [0, 0, 0, 0],
        "group": 1,
        "auto_pad": "NOTSET",
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"], **attributes),
        helper.make_node("LeakyRelu", ["h"], ["y"], alpha=0.2),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["n", 3, 5, 5])}
    model = model_of(nodes, {"w": weight.dequantize()}, inputs=inputs, output_shape=["n", 2, 3, 3])
    made = build(plan_of(model, weight)).model.graph.node
    assert not made[1].attribute
    assert [attribute.name for attribute in made[2].attribute] == ["alpha"]
