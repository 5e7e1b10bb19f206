"""Declaring a newer opset: agrees with onnx's version converter on every operator; raising an old
graph: the same outputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.graph.opset_raising import UNTRUSTED, raise_opset
from ecqx_onnx_converters.graph.opsets import CHANGED, lower_opset, refuse_opset
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.serialization.compact import drop_defaults
from onnx import ModelProto, TensorProto, defs, helper, numpy_helper, version_converter

from ecqx_onnx.verbs.pack import pack
from tests.conversions import session

FLOAT = TensorProto.FLOAT
OPTIONAL = defs.OpSchema.FormalParameterOption.Optional
KINDS = {
    "tensor(float)": FLOAT,
    "tensor(int64)": TensorProto.INT64,
    "tensor(bool)": TensorProto.BOOL,
    "tensor(string)": 8,
}
VALUES = {"INT": 1, "FLOAT": 1.0, "STRING": "x", "INTS": [0], "FLOATS": [1.0], "STRINGS": ["x"]}


def steps() -> list[tuple[str, int]]:
    """(operator, version) of every change to a standard operator in opsets 8 to 25."""
    changes = [
        (schema.name, schema.since_version)
        for schema in defs.get_all_schemas_with_history()
        if schema.domain == ""
    ]
    return sorted(
        (name, version)
        for name, version in changes
        if 8 <= version <= 25 and _exists(name, version - 1)
    )


def _exists(name: str, version: int) -> bool:
    try:
        defs.get_schema(name, version)
    except defs.SchemaError:
        return False
    return True


def smallest_model(name: str, opset: int) -> ModelProto | None:
    """One node with its required inputs and attributes, and an axis where it has one; None for one
    that can't be made up."""
    schema = defs.get_schema(name, opset)
    allowed = {
        constraint.type_param_str: constraint.allowed_type_strs
        for constraint in schema.type_constraints
    }
    infos = []
    for index, port in enumerate(port for port in schema.inputs if port.option != OPTIONAL):
        kind = next(
            (
                kind
                for text, kind in KINDS.items()
                if text in allowed.get(port.type_str, [port.type_str])
            ),
            None,
        )
        if kind is None:
            return None
        infos.append(helper.make_tensor_value_info(f"x{index}", kind, [2, 3, 4, 4]))
    names = [
        f"y{index}" for index, port in enumerate(schema.outputs) if port.option != OPTIONAL
    ] or ["y0"]
    outputs = [helper.make_tensor_value_info(output, FLOAT, [2, 3, 4, 4]) for output in names]
    node = helper.make_node(name, [info.name for info in infos], names)
    for key, attribute in schema.attributes.items():
        if attribute.required or key in ("axis", "axes"):
            value = [0, 1, 2, 3] if key == "perm" else VALUES.get(attribute.type.name)
            if value is None:
                return None
            node.attribute.append(helper.make_attribute(key, value))
    graph = helper.make_graph([node], "graph", infos, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def converter_leaves_it(model: ModelProto, opset: int) -> bool:
    """Up to attributes that only state a default."""
    converted = version_converter.convert_version(model, opset)
    before = ModelProto()
    before.CopyFrom(model)
    for one in (converted, before):
        drop_defaults(one, opset)
    if len(converted.graph.node) != 1 or converted.graph.initializer:
        return False
    old, new = before.graph.node[0], converted.graph.node[0]
    attributes = [
        sorted(entry.SerializeToString() for entry in node.attribute) for node in (old, new)
    ]
    return (old.op_type, old.input, attributes[0]) == (new.op_type, new.input, attributes[1])


def test_what_is_only_declared_anew_is_what_the_version_converter_leaves_as_it_is():
    asked, wrong, strict = 0, [], []
    for name, version in steps():
        model = smallest_model(name, version - 1)
        if model is None:  # a subgraph, a sequence
            continue
        asked += 1
        declared = refuse_opset(model, version) is None
        left = converter_leaves_it(model, version)
        if declared and not left:
            wrong.append((name, version))
        if left and not declared:
            strict.append((name, version))
    assert asked > 300
    assert wrong == [
        ("Dropout", 12)
    ]  # its ratio moved from a default to a default input; in inference it does nothing
    assert sorted(strict) == sorted(
        (name, CHANGED[name]) for name in UNTRUSTED
    )  # the converter overlooks these


def test_an_attribute_that_became_an_input_matters_only_where_a_node_states_it():
    def squeeze(**attributes) -> ModelProto:
        node = helper.make_node("Squeeze", ["x"], ["y"], **attributes)
        infos = [
            helper.make_tensor_value_info(name, FLOAT, shape)
            for name, shape in (("x", [1, 3]), ("y", [3]))
        ]
        graph = helper.make_graph([node], "graph", infos[:1], infos[1:])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)

    assert refuse_opset(squeeze(), 13) is None
    assert "Squeeze changes" in refuse_opset(squeeze(axes=[0]), 13).reason


def old_graph(levels: np.ndarray) -> ModelProto:
    """Opset 9: Squeeze and Unsqueeze with attributes, Softmax over all axes from the second on,
    weights of three values."""
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["a"], axes=[1]),
        helper.make_node("Squeeze", ["a"], ["b"], axes=[1]),
        helper.make_node("MatMul", ["b", "w"], ["c"]),
        helper.make_node("Unsqueeze", ["c"], ["d"], axes=[2]),
        helper.make_node("Softmax", ["d"], ["e"], axis=1),
        helper.make_node("Clip", ["e"], ["y"], min=0.0, max=0.5),
    ]
    infos = [
        helper.make_tensor_value_info(name, FLOAT, shape)
        for name, shape in (("x", ["n", 128]), ("y", ["n", 64, 1]))
    ]
    weight = numpy_helper.from_array(levels.astype(np.float32) * np.float32(0.25), "w")
    graph = helper.make_graph(nodes, "graph", infos[:1], infos[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=6)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_an_old_graph_is_raised_and_says_the_same(opset):
    original = old_graph(np.random.default_rng(0).integers(-1, 2, (128, 64)))
    graph = FloatGraph.from_model(original)
    raised = raise_opset(graph, opset)
    assert (graph.opset, raised.opset) == (9, opset)
    model = raised.to_model()
    onnx.checker.check_model(model, full_check=True)
    x = np.random.default_rng(1).standard_normal((5, 128)).astype(np.float32)
    expected = session(original.SerializeToString(), 0).run(None, {"x": x})[0]
    np.testing.assert_array_equal(
        session(model.SerializeToString(), 0).run(None, {"x": x})[0], expected
    )


def test_what_the_converter_overlooks_is_refused():
    node = helper.make_node("Hardmax", ["x"], ["y"], axis=1)
    infos = [helper.make_tensor_value_info(name, FLOAT, [2, 3, 4]) for name in "xy"]
    graph = helper.make_graph([node], "graph", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    refusal = raise_opset(FloatGraph.from_model(model), 13)
    assert isinstance(refusal, Refusal)
    assert "overlooks" in refusal.reason


def test_pack_raises_an_old_graph_to_reach_shorter_storages(tmp_path):
    onnx.save(old_graph(np.random.default_rng(0).integers(-1, 2, (128, 64))), tmp_path / "old.onnx")
    report = pack(tmp_path / "old.onnx", tmp_path / "packed.onnx")
    assert report.written is not None, report.reason
    assert report.written.opset == 21
    assert "raised from opset 9 to 21" in report.notes[0]
    assert "bit for bit" in report.equivalence.checks[0].sentence
    assert report.nbytes < 0.1 * report.original_bytes
    kept = pack(tmp_path / "old.onnx", tmp_path / "kept.onnx", rewrite=False)
    assert kept.written.opset < 13
    assert kept.nbytes > 2 * report.nbytes  # int8, where several weights share a byte


def test_an_opset_is_lowered_only_where_that_changes_nothing():
    node = helper.make_node("ReduceMax", ["x"], ["y"], keepdims=0)
    infos = [
        helper.make_tensor_value_info("x", FLOAT, [2, 3]),
        helper.make_tensor_value_info("y", FLOAT, []),
    ]
    graph = helper.make_graph([node], "graph", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=10)
    lower_opset(model, 21)
    assert model.opset_import[0].version == 21
    model.graph.node[0].input.append("axes")  # an attribute until opset 18
    lower_opset(model, 13)
    assert model.opset_import[0].version == 21
