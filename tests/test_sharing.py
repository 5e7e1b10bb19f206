"""What a file keeps twice, and what runtimes cannot infer: `pack` stores the one once and leaves
the other in place."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.passes.shapes import find_stated_shapes
from ecqx_onnx_converters.passes.sharing import share_equal_tensors
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx.runtime.sessions import open_session, run
from ecqx_onnx.verbs.pack import pack

FLOAT = TensorProto.FLOAT
WEIGHTS = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)


def branches(*, ir_version: int = 8, listed: bool = False, given_out: bool = False) -> ModelProto:
    """Both branches of an If hold the same matrix, and an equal vector; nothing reads `u`."""

    def branch(operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["p"]),
            helper.make_node(operator, ["p", "v"], ["out"]),
        ]
        tensors = [
            numpy_helper.from_array(WEIGHTS, "w"),
            numpy_helper.from_array(np.full(32, 0.25, np.float32), "v"),
        ]
        outputs = [helper.make_tensor_value_info("out", FLOAT, ["n", 32])]
        return helper.make_graph(nodes, operator, [], outputs, tensors)

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node(
            "If", ["positive"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul")
        ),
        helper.make_node("MatMul", ["x", "m"], ["z"]),
    ]
    tensors = [
        numpy_helper.from_array(np.float32(0), "zero"),
        numpy_helper.from_array(WEIGHTS, "m"),
        numpy_helper.from_array(WEIGHTS + 1, "u"),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, ["n", 32])]
    if listed:
        inputs.append(helper.make_tensor_value_info("m", FLOAT, [32, 32]))
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["n", 32]) for name in ("y", "z")]
    if given_out:
        outputs.append(helper.make_tensor_value_info("m", FLOAT, [32, 32]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir_version
    )


def test_tensors_of_equal_bytes_are_stored_once_and_say_the_same(tmp_path):
    onnx.save(branches(), tmp_path / "original.onnx")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.written is not None
    note = next(note for note in report.notes if "left out" in note)
    assert "2 tensors that are another's equal, 1 that nothing reads" in note
    assert report.nbytes < report.original_bytes - 3 * WEIGHTS.nbytes + 500
    assert report.equivalence.ok
    generator = np.random.default_rng(0)
    for sign in (1, -1):
        x = sign * generator.random((2, 32), dtype=np.float32)
        found = run(open_session(tmp_path / "packed.onnx"), [x])
        for one, other in zip(
            found, run(open_session(tmp_path / "original.onnx"), [x]), strict=True
        ):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "equal"),
    [
        ({}, 2),
        ({"listed": True}, 1),  # a caller may give another m
        ({"listed": True, "ir_version": 3}, 2),  # not before IR version 4
        ({"given_out": True}, 1),
    ],
)
def test_tensors_that_callers_see_stay(options, equal):
    graph = FloatGraph.from_model(branches(**options))
    shared = share_equal_tensors(graph)
    assert shared.equal == equal
    assert shared.unread == 1
    assert shared.nbytes == (equal + 1) * WEIGHTS.nbytes
    names = {tensor.name for tensor in shared.graph.proto.graph.initializer}
    assert ("m" in names) == bool("given_out" in options or equal == 1 or "w" not in names)
    assert len(graph.weights) == len(shared.graph.weights) + equal + 1


def reshaped(*, stated: bool) -> ModelProto:
    """A Reshape to a shape that callers give: nothing is known of it but what is stated."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["t"]),
        helper.make_node("Softmax", ["t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", 64]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("y", FLOAT, [None, None])],
        [numpy_helper.from_array(np.sign(np.resize(WEIGHTS, (64, 64))), "w")],
    )
    if stated:
        for name, shape in (("h", ["n", 64]), ("r", ["n", 64]), ("t", ["n", 64])):
            graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_only_shapes_that_cannot_be_inferred_are_stated_in_the_packed_file(tmp_path):
    found = find_stated_shapes(FloatGraph.from_model(reshaped(stated=True)))
    assert [value.name for value in found] == ["t"]
    assert find_stated_shapes(FloatGraph.from_model(reshaped(stated=False))) == ()
    onnx.save(reshaped(stated=True), tmp_path / "original.onnx")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx", check=False)
    assert report.written is not None
    (value,) = onnx.load(tmp_path / "packed.onnx").graph.value_info
    lengths = value.type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in lengths] == ["n", 64]
    onnx.checker.check_model(str(tmp_path / "packed.onnx"), full_check=True)


def test_a_model_that_is_copied_has_no_notes_about_what_was_tried(tmp_path):
    """Raised from opset 11 in vain."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 32])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 32])],
        [numpy_helper.from_array(WEIGHTS, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=6)
    onnx.save(model, tmp_path / "original.onnx")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.written is None
    assert report.notes == ()
