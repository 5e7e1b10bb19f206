"""Integers -> floats in the graph, in every form and type, and the runtime's facts that the choice
of form rests on."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from ecqx_onnx_converters import FloatGraph, build, make_plan, match
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from tests.conversions import session
from tests.onnx_graphs import model_of, product, quantized

X = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)


def written(model: ModelProto, *tensors: QuantTensor, **options) -> ModelProto:
    graph = FloatGraph.from_model(model)
    return build(make_plan(graph, match(graph.weights, tensors), **options)).to_model()


def outputs(model: ModelProto, level: int, **feeds: np.ndarray) -> np.ndarray:
    return session(model.SerializeToString(), level).run(None, feeds)[0]


def optimized(model: ModelProto, folder) -> ModelProto:
    """What onnxruntime makes of the model when it loads it."""
    session(model.SerializeToString(), 99, optimized_model_filepath=str(folder / "optimised.onnx"))
    return onnx.load(folder / "optimised.onnx")


def identity(weight: QuantTensor) -> ModelProto:
    """y = x + W with x a scalar: shows the weight itself."""
    node = helper.make_node("Add", ["x", "w"], ["y"])
    return model_of(
        [node],
        {"w": weight.dequantize()},
        inputs={"x": (TensorProto.FLOAT, [])},
        output_shape=list(weight.shape),
    )


@pytest.mark.parametrize("level", [0, 99])
@pytest.mark.parametrize("most", [1, 7, 127])
@pytest.mark.parametrize(
    "step",
    [
        np.float32(0.1),
        np.linspace(0.1, 0.3, 6).reshape(6, 1),
        np.linspace(0.1, 0.3, 42).reshape(6, 7),
    ],
)
def test_folded_scale_is_exact(most, step, level):
    weight = quantized("w", (6, 7), most=most, step=step)
    np.testing.assert_array_equal(
        outputs(written(identity(weight), weight), level, x=np.array(0, np.float32)),
        weight.dequantize(),
    )


@pytest.mark.parametrize("level", [0, 99])
@pytest.mark.parametrize(("lowest", "highest"), [(-1, 1), (0, 3), (-8, 7), (0, 15), (-128, 127)])
def test_folded_codebook_is_exact_with_negative_levels_counting_from_the_end(
    lowest, highest, level
):
    generator = np.random.default_rng(2)
    values = generator.normal(size=highest - lowest + 1).astype(np.float32)
    weight = QuantTensor(
        "w", generator.integers(lowest, highest + 1, (30, 20)).astype(np.int8), Codebook(values)
    )
    np.testing.assert_array_equal(
        outputs(written(identity(weight), weight), level, x=np.array(0, np.float32)),
        weight.dequantize(),
    )


@pytest.mark.parametrize("most", [1, 7, 127])
def test_folded_weights_leave_nothing_to_do_at_inference(most, tmp_path):
    weight = quantized("w", (64, 32), most=most)
    nodes = [
        node.op_type
        for node in optimized(written(product("MatMul", weight), weight), tmp_path).graph.node
    ]
    assert nodes == ["MatMul"]


def test_a_folded_codebook_leaves_nothing_to_do_at_inference(tmp_path):
    weight = QuantTensor(
        "w", quantized("w", (64, 32), most=1).levels, Codebook(np.array([0, 0.5, -0.3], np.float32))
    )
    nodes = [
        node.op_type
        for node in optimized(written(product("MatMul", weight), weight), tmp_path).graph.node
    ]
    assert nodes == ["MatMul"]


@pytest.mark.parametrize("most", [1, 7, 127])
@pytest.mark.parametrize(
    ("operator", "attributes"), [("MatMul", {}), ("Gemm", {"transB": 0}), ("Gemm", {"transB": 1})]
)
def test_standard_products_keep_float_activations(operator, attributes, most, tmp_path):
    shape = (32, 64) if attributes.get("transB") else (64, 32)
    weight = quantized("w", shape, most=most, step=2.0**-6)
    model = written(product(operator, weight, **attributes), weight, dequantize="standard")
    executed = {node.op_type for node in optimized(model, tmp_path).graph.node}
    assert executed <= {"DequantizeLinear", "Gemm", "Reshape", "Shape", "Slice", "Concat"}
    expected = X.astype(np.float64) @ (
        weight.dequantize().T if attributes.get("transB") else weight.dequantize()
    )
    for level in (0, 99):
        np.testing.assert_allclose(
            outputs(model, level, x=X), expected, atol=64 * 2.0**-24 * np.abs(X).max() * 64
        )


def test_a_matmul_of_any_rank_becomes_a_gemm_between_reshapes():
    weight = quantized("w", (4, 3))
    inputs = {"x": (TensorProto.FLOAT, ["a", "b", "c", 4])}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of(
        [node], {"w": weight.dequantize()}, inputs=inputs, output_shape=["a", "b", "c", 3]
    )
    made = written(model, weight, dequantize="standard")
    for shape in [(2, 3, 5, 4), (1, 1, 1, 4), (0, 3, 5, 4)]:
        x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
        np.testing.assert_allclose(outputs(made, 99, x=x), x @ weight.dequantize(), atol=1e-5)


@pytest.mark.parametrize("step", [np.float32(0.1), np.linspace(0.1, 0.3, 8).reshape(1, 8)])
@pytest.mark.parametrize("most", [1, 7, 127])
def test_standard_embeddings_gather_integers_and_dequantise_rows(most, step, tmp_path):
    weight = quantized("w", (20, 8), most=most, step=step)
    node = helper.make_node("Gather", ["w", "x"], ["y"])
    inputs = {"x": (TensorProto.INT64, ["n", "t"])}
    model = model_of([node], {"w": weight.dequantize()}, inputs=inputs, output_shape=["n", "t", 8])
    made = written(model, weight, dequantize="standard")
    tokens = np.random.default_rng(4).integers(0, 20, (3, 5))
    for level in (0, 99):
        np.testing.assert_array_equal(outputs(made, level, x=tokens), weight.dequantize()[tokens])
    kinds = [node.op_type for node in optimized(made, tmp_path).graph.node]
    assert kinds.index("Gather") < kinds.index("Mul")
    assert "DequantizeLinear" not in kinds


# Facts of the runtime that the forms rest on. When one of these turns red, the form can be
# simplified or must be changed.


def _dequantized(operator: str, *, transposed: bool) -> ModelProto:
    weight = quantized("w", (32, 64) if transposed else (64, 32))
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node(operator, ["x", "w"], ["y"], **({"transB": 1} if transposed else {})),
    ]
    initializers = [
        TensorProto(
            name="q",
            data_type=TensorProto.INT8,
            dims=weight.shape,
            raw_data=weight.levels.tobytes(),
        ),
        numpy_helper.from_array(np.float32(0.125), "s"),
    ]
    model = model_of(
        nodes, {}, inputs={"x": (TensorProto.FLOAT, ["n", 64])}, output_shape=["n", 32], opset=21
    )
    model.graph.initializer.extend(initializers)
    model.ir_version = 10
    return model


def test_fact_dequantizelinear_before_matmul_quantises_activations(tmp_path):
    made = {
        node.op_type
        for node in optimized(_dequantized("MatMul", transposed=False), tmp_path).graph.node
    }
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 25):
        assert "MatMulNBits" in made


def test_fact_dequantizelinear_before_gemm_with_transb_stays_float(tmp_path):
    made = {
        node.op_type
        for node in optimized(_dequantized("Gemm", transposed=True), tmp_path).graph.node
    }
    assert made == {"DequantizeLinear", "Gemm"}


def test_scale_axis_other_than_the_first_is_written_for_transposed_convs():
    weight = QuantTensor(
        "w",
        quantized("w", (3, 4, 2, 2)).levels,
        Scale(np.linspace(0.1, 0.2, 4).reshape(1, 4, 1, 1).astype(np.float32)),
    )
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"])
    inputs = {"x": (TensorProto.FLOAT, ["n", 3, 5, 5])}
    model = model_of([node], {"w": weight.dequantize()}, inputs=inputs, output_shape=["n", 4, 6, 6])
    made = written(model, weight, dequantize="standard")
    assert made.graph.node[0].op_type == "DequantizeLinear"
    assert not made.graph.node[0].attribute  # axis 1 is the default
    x = np.random.default_rng(5).normal(size=(2, 3, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(outputs(made, 99, x=x), outputs(model, 99, x=x), atol=1e-5)
