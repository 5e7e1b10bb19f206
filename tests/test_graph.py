"""ONNX models in: structure and data apart, exporter metadata gone, lies refused."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from ecqx_onnx_converters.graph.opsets import refuse_opset
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError
from tests.conversions import session
from tests.onnx_graphs import model_of, product, quantized

FLOAT = TensorProto.FLOAT


def branches() -> ModelProto:
    """y = x @ W or x @ V, both matrices called `w` and lying inside the branches: one as
    initializer, one as Constant."""

    def branch(values: np.ndarray, *, constant: bool):
        tensor = numpy_helper.from_array(values, "w")
        nodes = [helper.make_node("Constant", [], ["w"], value=tensor)] if constant else []
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["z"]))
        output = [helper.make_tensor_value_info("z", FLOAT, ["n", 3])]
        return helper.make_graph(nodes, "branch", [], output, [] if constant else [tensor])

    one, other = np.full((4, 3), 2, np.float32), np.full((4, 3), -3, np.float32)
    node = helper.make_node(
        "If",
        ["c"],
        ["y"],
        then_branch=branch(one, constant=False),
        else_branch=branch(other, constant=True),
    )
    inputs = {"x": (FLOAT, ["n", 4]), "c": (TensorProto.BOOL, [])}
    return model_of([node], {}, inputs=inputs, output_shape=["n", 3])


def body(operator: str) -> ModelProto:
    """Three times h = h @ W + h, W lying inside the body of a Loop, or of a Scan over three unused
    slices."""
    tensor = numpy_helper.from_array(quantized("w", (4, 4), step=0.0625).dequantize(), "w")
    steps = [
        helper.make_node("MatMul", ["h", "w"], ["p"]),
        helper.make_node("Add", ["p", "h"], ["g"]),
    ]
    value = partial(helper.make_tensor_value_info, elem_type=FLOAT, shape=["n", 4])
    flag = partial(helper.make_tensor_value_info, elem_type=TensorProto.BOOL, shape=[])
    three, true = (
        numpy_helper.from_array(np.array(3), "three"),
        numpy_helper.from_array(np.array(True), "true"),
    )
    if operator == "Loop":
        steps.append(helper.make_node("Identity", ["more"], ["again"]))
        count = helper.make_tensor_value_info("i", TensorProto.INT64, [])
        inner = helper.make_graph(
            steps, "body", [count, flag("more"), value("h")], [flag("again"), value("g")], [tensor]
        )
        node, constants = (
            helper.make_node("Loop", ["three", "true", "x"], ["y"], body=inner),
            [three, true],
        )
    else:
        unused = helper.make_tensor_value_info("u", FLOAT, [])
        inner = helper.make_graph(steps, "body", [value("h"), unused], [value("g")], [tensor])
        node = helper.make_node("Scan", ["x", "slices"], ["y"], body=inner, num_scan_inputs=1)
        constants = [numpy_helper.from_array(np.zeros(3, np.float32), "slices")]
    model = model_of([node], {}, inputs={"x": (FLOAT, ["n", 4])}, output_shape=["n", 4])
    model.graph.initializer.extend(constants)
    return model


@pytest.mark.parametrize("form", ["folded", "standard"])
@pytest.mark.parametrize("operator", ["Loop", "Scan"])
def test_a_weight_inside_a_repeated_body_is_converted(operator, form, tmp_path):
    model, weight = body(operator), quantized("w", (4, 4), step=0.0625)
    graph = FloatGraph.from_model(model)
    write(make_plan(graph, match(graph.weights, [weight]), dequantize=form), tmp_path / "out.onnx")
    np.testing.assert_array_equal(
        read_weights(tmp_path / "out.onnx")[0].weight.tensor.levels, weight.levels
    )
    x = (
        np.random.default_rng(0).integers(-3, 4, (2, 4)).astype(np.float32)
    )  # sums of few bits: float32 is exact
    expected = x
    for _ in range(3):
        expected = expected @ weight.dequantize() + expected
    for level in (0, 99):
        np.testing.assert_array_equal(
            session(tmp_path / "out.onnx", level).run(None, {"x": x})[0], expected
        )


def test_structure_and_data_are_apart_and_come_together_again():
    weight = quantized("w", (3, 4))
    model = product("Gemm", weight, transB=1)
    graph = FloatGraph.from_model(model)
    assert not graph.proto.graph.initializer[0].raw_data
    np.testing.assert_array_equal(graph.weights["w"], weight.dequantize())
    assert graph.to_model() == model
    assert model.graph.initializer[0].raw_data  # the caller's model is left as it was


def test_weights_of_branches_move_into_the_main_graph():
    model = branches()
    graph = FloatGraph.from_model(model)
    assert sorted(values[0, 0] for values in graph.weights.values()) == [-3, 2]
    moved = graph.to_model()
    onnx.checker.check_model(moved, full_check=True)
    x = np.ones((1, 4), np.float32)
    for condition in (True, False):
        feeds = {"x": x, "c": np.array(condition)}
        expected, given = (
            session(m.SerializeToString(), 99).run(None, feeds)[0] for m in (model, moved)
        )
        np.testing.assert_array_equal(given, expected)


def test_a_branch_that_returns_its_weight_keeps_it():
    tensor = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    output = [helper.make_tensor_value_info("w", FLOAT, [2, 2])]
    one = helper.make_graph(
        [helper.make_node("Constant", [], ["w"], value=tensor)], "one", [], output
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=one, else_branch=one)
    model = model_of([node], {}, inputs={"c": (TensorProto.BOOL, [])}, output_shape=[2, 2])
    graph = FloatGraph.from_model(model)
    assert not graph.weights
    onnx.checker.check_model(graph.to_model(), full_check=True)


def test_exporter_metadata_is_stripped_and_the_users_stays():
    model = product("Gemm", quantized("w", (3, 4)), transB=1)
    secret = "/home/someone/project/model.py"
    model.doc_string = model.graph.doc_string = secret
    for part in (
        model,
        model.graph,
        model.graph.node[0],
        model.graph.input[0],
        model.graph.initializer[0],
    ):
        part.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=secret)
    model.graph.node[0].doc_string = model.graph.node[0].name = secret
    model.graph.input[0].doc_string = secret
    model.metadata_props.add(key="labels", value="cat,dog")
    stripped = FloatGraph.from_model(model).to_model()
    assert secret.encode() not in stripped.SerializeToString()
    assert [(entry.key, entry.value) for entry in stripped.metadata_props] == [
        ("labels", "cat,dog")
    ]


@pytest.mark.parametrize(
    "changes",
    [{"dims": [3, 5]}, {"dims": [1 << 40, 1 << 20]}, {"dims": [-3, -4]}, {"raw_data": b""}],
)
def test_a_tensor_that_lies_is_refused(changes):
    model = product("Gemm", quantized("w", (3, 4)), transB=1)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(
        TensorProto(
            **({"name": "w", "dims": [3, 4], "data_type": FLOAT, "raw_data": bytes(48)} | changes)
        )
    )
    with pytest.raises(FileError, match="'w' declares"):
        FloatGraph.from_model(model)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x00" * 100, bytes(range(256)), b"not a model"]
)
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(FileError, match=r"m\.onnx"):
        FloatGraph.load(tmp_path / "m.onnx")


def test_a_truncated_model_is_refused(tmp_path):
    data = product("Gemm", quantized("w", (30, 40)), transB=1).SerializeToString()
    for length in range(1, len(data), 97):
        (tmp_path / "m.onnx").write_bytes(data[:length])
        with pytest.raises(FileError):
            FloatGraph.load(tmp_path / "m.onnx")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        FloatGraph.load(tmp_path / "none.onnx")


def external(tmp_path, **entries: str) -> ModelProto:
    model = product("Gemm", quantized("w", (3, 4)), transB=1)
    tensor = model.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(bytes(8) + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin", "offset": "8", "length": "48"} | entries).items():
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    return model


def test_external_data_is_read_from_beside_the_model(tmp_path):
    external(tmp_path)
    np.testing.assert_array_equal(
        FloatGraph.load(tmp_path / "m.onnx").weights["w"], quantized("w", (3, 4)).dequantize()
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../w.bin"},
        {"location": "/etc/passwd"},
        {"location": ""},
        {"location": "none.bin"},
        {"offset": "9"},
        {"offset": "-8"},
        {"offset": "x"},
        {"length": "47"},
        {"length": str(1 << 60)},
    ],
)
def test_external_data_elsewhere_or_of_another_length_is_refused(entries, tmp_path):
    external(tmp_path, **entries)
    with pytest.raises(FileError, match="'w'"):
        FloatGraph.load(tmp_path / "m.onnx")


def test_external_data_without_a_path_is_refused(tmp_path):
    with pytest.raises(FileError, match="by its path"):
        FloatGraph.from_model(external(tmp_path))


@pytest.mark.parametrize(
    ("operator", "attributes", "old", "new", "same"),
    [
        ("Relu", {}, 8, 25, True),
        ("Cast", {"to": 1}, 13, 21, True),
        ("Reshape", {}, 11, 21, True),
        ("ReduceMean", {"axes": [1]}, 13, 18, False),
        ("Softmax", {}, 11, 13, False),
        ("Squeeze", {"axes": [1]}, 11, 13, False),
        ("GroupNormalization", {"num_groups": 2}, 18, 21, False),
        ("GridSample", {}, 18, 21, False),
        ("Split", {}, 13, 18, False),
        ("Upsample", {}, 9, 18, False),
        ("Bogus", {}, 9, 18, False),
    ],
)
def test_an_opset_is_raised_only_where_every_operator_keeps_its_meaning(
    operator, attributes, old, new, same
):
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    model = model_of([node], {}, inputs={"x": (FLOAT, [2, 2])}, output_shape=[2, 2], opset=old)
    assert (refuse_opset(model, new) is None) == same
