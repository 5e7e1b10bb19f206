"""Which storage and dequantisation a weight gets, and the words for it."""

from __future__ import annotations

import numpy as np
import pytest
from ecqx_onnx_converters import FloatGraph, Plan, make_plan, match
from onnx import TensorProto, helper

from ecqx_onnx.errors import OptionError
from ecqx_onnx.tensors import Codebook, QuantTensor
from tests.onnx_graphs import model_of, product, quantized


def plan_of(model, *tensors: QuantTensor, **options) -> Plan:
    graph = FloatGraph.from_model(model)
    return make_plan(graph, match(graph.weights, tensors), **options)


@pytest.mark.parametrize(
    ("most", "label", "opset"),
    [(1, "dense INT2", 25), (7, "dense INT4", 21), (15, "dense INT8", 18)],
)
def test_auto_takes_the_narrowest_type_and_the_lowest_opset_that_has_it(most, label, opset):
    weight = quantized("w", (16, 16), most=most)
    plan = plan_of(product("Gemm", weight, transB=1), weight)
    assert plan.entries[0].stored.label == label
    assert plan.opset == opset
    assert plan.entries[0].reason.startswith(label)


def test_auto_takes_sparse_when_few_levels_remain():
    weight = quantized("w", (64, 64))
    weight.levels[1:] = 0
    weight.levels[0, 8:] = 0
    plan = plan_of(product("Gemm", weight, transB=1), weight)
    assert plan.entries[0].stored.label == "sparse INT8"
    assert "less than dense INT4" in plan.entries[0].reason


def test_old_runtimes_get_bytes_at_the_graphs_own_opset():
    weight = quantized("w", (16, 16), most=1)
    plan = plan_of(product("Gemm", weight, transB=1), weight, target="onnxruntime-1.17")
    assert (plan.entries[0].stored.label, plan.opset) == ("dense, 5 in a byte", 18)


def test_tools_that_want_plain_integers_get_no_decoder():
    weight = quantized("w", (16, 16), most=1)
    plan = plan_of(product("Gemm", weight, transB=1), weight, target="qdq")
    assert (plan.entries[0].stored.label, plan.opset) == ("dense INT4", 21)


def test_a_lower_opset_asked_for_is_kept():
    weight = quantized("w", (16, 16), most=1)
    plan = plan_of(product("Gemm", weight, transB=1), weight, opset=21)
    assert (plan.entries[0].stored.label, plan.opset) == ("dense INT4", 21)


def test_a_graph_that_would_change_its_meaning_keeps_its_opset():
    weight = quantized("w", (4, 4))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["z"]),
        helper.make_node("ReduceMean", ["z"], ["y"], axes=[1]),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["n", 4])}
    model = model_of(
        nodes, {"w": weight.dequantize()}, inputs=inputs, output_shape=["n", 1], opset=13
    )
    plan = plan_of(model, weight)
    assert (plan.entries[0].stored.label, plan.opset) == ("dense INT8", 13)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "toaster"}, "toaster"),
        ({"storage": "zip"}, "zip"),
        ({"dequantize": "maybe"}, "maybe"),
        ({"opset": 26}, "up to 25"),
        ({"opset": 17}, "has opset 18"),
        ({"storage": "sparse", "target": "qdq"}, "no sparse tensors"),
    ],
)
def test_options_that_cannot_be_had_are_refused_with_what_to_do(options, words):
    weight = quantized("w", (4, 4))
    with pytest.raises(OptionError, match=words):
        plan_of(product("Gemm", weight, transB=1), weight, **options)


def test_a_codebook_falls_to_folded_and_says_why():
    weight = QuantTensor(
        "w", quantized("w", (4, 4), most=1).levels, Codebook(np.array([0, 0.5, -0.3], np.float32))
    )
    plan = plan_of(product("Gemm", weight, transB=1), weight, dequantize="standard")
    assert plan.entries[0].dequantization == "folded"
    assert "codebook" in plan.entries[0].reason


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_a_step_along_the_inputs_of_a_product_falls_to_folded(operator):
    weight = quantized("w", (3, 4), step=np.linspace(0.1, 0.2, 3).reshape(3, 1))
    plan = plan_of(product(operator, weight), weight, dequantize="standard")
    assert plan.entries[0].dequantization == "folded"
    assert "along the inputs" in plan.entries[0].reason


def test_an_unknown_consumer_falls_to_folded():
    weight = quantized("w", (4, 4))
    plan = plan_of(product("Add", weight), weight, dequantize="standard")
    assert plan.entries[0].dequantization == "folded"
    assert "Add" in plan.entries[0].reason


def test_standard_without_a_choice_is_the_qdq_targets_form():
    weight = quantized("w", (4, 4))
    assert (
        plan_of(product("Gemm", weight, transB=1), weight, target="qdq").entries[0].dequantization
        == "standard"
    )
    assert plan_of(product("Gemm", weight, transB=1), weight).entries[0].dequantization == "folded"


def test_a_weight_that_no_tensor_explains_is_kept_with_a_reason():
    weight = quantized("w", (4, 4))
    plan = plan_of(product("Gemm", weight, transB=1))
    assert [(kept.name, kept.reason) for kept in plan.kept] == [
        ("w", "no quantised tensor has its name or values")
    ]


def test_equal_weights_of_different_parameters_are_not_tied():
    one, other = quantized("one", (4, 4)), quantized("other", (4, 4), seed=1)
    nodes = [
        helper.make_node("MatMul", ["x", "one"], ["z"]),
        helper.make_node("MatMul", ["z", "other"], ["y"]),
    ]
    inputs = {"x": (TensorProto.FLOAT, ["n", 4])}
    weights = {"one": one.dequantize(), "other": other.dequantize()}
    plan = plan_of(model_of(nodes, weights, inputs=inputs, output_shape=["n", 4]), one, other)
    assert len({entry.stored.levels for entry in plan.entries}) == 2
