"""Models that onnxruntime runs, or QONNX defines, in forms that onnx's checker refuses."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.verbs.pack import pack
from ecqx_onnx.verbs.validate import validate
from tests.strangers import (
    FLOAT,
    assert_packed,
    assert_same_outputs,
    draw_grid,
    make_model,
    run_file,
    save,
)

X = {"x": np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)}
ENDS = {"inputs": [("x", FLOAT, ["n", 128])], "outputs": [("y", FLOAT, ["n", 128])]}
QONNX = "qonnx.custom_op.general"
W = draw_grid((128, 128))
ONES = np.ones(128, np.float32)
ONCE = {"scale": [2.0], "offset": [0.5]}


def odd_models() -> dict[str, onnx.ModelProto]:
    product = helper.make_node("MatMul", ["x", "w"], ["t"])
    relu = helper.make_node("Relu", ["t"], ["y"])
    norm = helper.make_node("LayerNormalization", ["t", "g", "b"], ["y"], axis=-1)
    simple = helper.make_node("SimplifiedLayerNormalization", ["t", "g"], ["y"], axis=-1)
    gelu = helper.make_node("Gelu", ["t"], ["y"], domain="com.microsoft")
    scaled = helper.make_node(
        "Scaler", ["t"], ["y"], domain="ai.onnx.ml", scale=[2.0], offset=[0.5]
    )
    weights = {"w": W, "g": ONES, "b": ONES}
    branch = helper.make_graph(
        [helper.make_node("Identity", ["t"], ["r"])],
        "b",
        [],
        [helper.make_empty_tensor_value_info("r")],
    )
    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    found = {
        "unsorted": make_model([relu, product], {"w": W}, **ENDS),
        "unsorted around a branch": make_model(
            [choose, product], {"w": W, "c": np.array(True)}, **ENDS
        ),
        "LayerNormalization of opset 13": make_model(
            [product, norm], weights, opset=13, ir_version=7, **ENDS
        ),
        "LayerNormalization of opset 11": make_model(
            [product, norm], weights, opset=11, ir_version=6, **ENDS
        ),
        "SimplifiedLayerNormalization": make_model([product, simple], weights, opset=17, **ENDS),
        "com.microsoft not imported": make_model([product, gelu], {"w": W}, **ENDS),
        "nothing imported but com.microsoft": make_model(
            [product, gelu], {"w": W}, opset=None, domains={"com.microsoft": 1}, **ENDS
        ),
        "ai.onnx.ml not imported": make_model([product, scaled], {"w": W}, **ENDS),
        "ir version 3, weights no inputs": make_model(
            [product, relu], {"w": W}, opset=8, ir_version=3, **ENDS
        ),
    }
    shapeless = make_model([product, relu], {"w": W}, opset=9, ir_version=4, **ENDS)
    shapeless.graph.output[0].type.tensor_type.ClearField("shape")
    found["an output without a shape"] = shapeless
    untyped = make_model([product, relu], {"w": W}, **ENDS)
    untyped.graph.output[0].ClearField("type")
    found["an output without a type"] = untyped
    return found


@pytest.mark.parametrize("name", odd_models())
def test_what_onnxruntime_runs_is_packed_whatever_the_checker_says(name, tmp_path):
    path = save(odd_models()[name], tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert_packed(report, path, X)
    assert report.nbytes < 0.2 * path.stat().st_size
    result = validate(tmp_path / "packed.onnx", against=path, latency_runs=0)
    assert result.ok, result.failures


def test_a_model_of_trees_alone_is_copied(tmp_path):
    node = helper.make_node(
        "LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", coefficients=[0.5] * 128, targets=1
    )
    model = make_model(
        [node],
        {},
        opset=None,
        domains={"ai.onnx.ml": 1},
        inputs=[("x", FLOAT, ["n", 128])],
        outputs=[("y", FLOAT, ["n", 1])],
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "copy.onnx")
    assert report.written is None
    assert "no weight" in report.reason
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()
    for command in (
        ["validate", str(tmp_path / "copy.onnx"), "--against", str(path)],
        ["inspect", str(path)],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


def test_functions_in_the_domain_of_ours_stay_theirs(tmp_path):
    nodes = [
        helper.make_node("D", ["x"], ["a"], domain="qx"),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("V", ["b"], ["y"], domain="qx"),
    ]
    model = make_model(nodes, {"w": W}, domains={"qx": 1, "qx_1": 1}, **ENDS)
    bodies = {
        "D": [helper.make_node("Neg", ["i"], ["o"])],
        "V": [
            helper.make_node("Relu", ["i"], ["k"]),
            helper.make_node("D", ["k"], ["o"], domain="qx"),
        ],
    }
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("qx", 1)]
    for name, body in bodies.items():
        model.functions.append(helper.make_function("qx", name, ["i"], ["o"], body, imports))
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert_packed(report, path, X)
    assert any("qx_2" in note for note in report.notes)


ROUNDINGS = {  # QONNX's table of numbers, their modes, and what becomes of them
    "ROUND": (6, 2, 2, 1, 1, -1, -1, -2, -2, -6),
    "CEIL": (6, 3, 2, 2, 1, -1, -1, -1, -2, -5),
    "FLOOR": (5, 2, 1, 1, 1, -1, -2, -2, -3, -6),
    "UP": (6, 3, 2, 2, 1, -1, -2, -2, -3, -6),
    "DOWN": (5, 2, 1, 1, 1, -1, -1, -1, -2, -5),
    "HALF_UP": (6, 3, 2, 1, 1, -1, -1, -2, -3, -6),
    "HALF_DOWN": (5, 2, 2, 1, 1, -1, -1, -2, -2, -5),
}
NUMBERS = np.array([5.5, 2.5, 1.6, 1.1, 1.0, -1.0, -1.1, -1.6, -2.5, -5.5], np.float32)


@pytest.mark.parametrize("mode", ROUNDINGS)
@pytest.mark.parametrize("operator", ["Quant", "IntQuant"])
def test_every_rounding_of_qonnx_is_its_specifications(operator, mode, tmp_path):
    attributes = {"signed": 1, "narrow": 0, "rounding_mode": mode.lower()}
    numbers = np.resize(NUMBERS, (128, 128))
    nodes = [
        helper.make_node(operator, ["w", "s", "z", "k"], ["v"], domain=QONNX, **attributes),
        helper.make_node(operator, ["x", "s", "z", "k"], ["a"], domain=QONNX, **attributes),
        helper.make_node("MatMul", ["a", "v"], ["b"]),
        helper.make_node("MatMul", ["b", "u"], ["y"]),
    ]
    constants = {
        "w": numbers, "s": np.float32(1), "z": np.float32(0), "k": np.int32(4),
        "u": np.eye(128, dtype=np.float32),
    }  # fmt: skip
    model = make_model(nodes, constants, domains={QONNX: 1}, opset=14, **ENDS)
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert report.written is not None
    assert "bit for bit" in report.equivalence.checks[0].sentence
    expected = np.resize(np.array(ROUNDINGS[mode], np.float32), (128, 128))
    x = numbers[:3]
    for optimized in (False, True):
        found = run_file(tmp_path / "packed.onnx", {"x": x}, optimized=optimized)[0]
        np.testing.assert_array_equal(found, expected[:3] @ expected)


@pytest.mark.parametrize(
    ("version", "mode"), list(itertools.product((1, 2), ("FLOOR", "ROUND", "CEIL")))
)
def test_trunc_is_its_specification(version, mode, tmp_path):
    before, after = np.float32(8), np.float32(4)
    scale, zero = np.float32(0.5), np.float32(1)
    names = ["x", "s", "z", "k", "l"]
    if version == 2:
        names = ["x", "s", "z", "k", "t", "l"]
    constants = {"s": scale, "z": zero, "k": before, "l": after, "t": np.float32(8), "w": W}
    nodes = [
        helper.make_node("Trunc", names, ["a"], domain=QONNX, rounding_mode=mode),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Sub", ["b", "b"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    path = save(
        make_model(nodes, constants, domains={QONNX: version}, opset=13, **ENDS),
        tmp_path / "model.onnx",
    )
    report = pack(path, tmp_path / "packed.onnx")
    assert report.written is not None
    x = np.linspace(-70, 70, 3 * 128, dtype=np.float32).reshape(3, 128)
    rounding = {"FLOOR": np.floor, "ROUND": np.rint, "CEIL": np.ceil}[mode]
    whole = np.rint(x / scale + zero) / 16
    if version == 1:
        expected = (rounding(whole) - zero) * scale
    else:
        expected = (rounding(np.clip(whole, -8, 7)) - zero / 16) * np.float32(8)
    found = run_file(tmp_path / "packed.onnx", {"x": x})[0]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_nodes_that_round_in_several_ways_are_all_defined(tmp_path):
    nodes = [
        helper.make_node("Quant", ["w", "s", "z", "k"], ["v"], domain=QONNX, rounding_mode="CEIL"),
        helper.make_node("Quant", ["x", "s", "z", "k"], ["a"], domain=QONNX, rounding_mode="ROUND"),
        helper.make_node("Quant", ["a", "t", "z", "k"], ["b"], domain=QONNX, rounding_mode="FLOOR"),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    constants = {
        "w": np.resize(NUMBERS, (128, 128)), "s": np.float32(0.5), "z": np.float32(0),
        "k": np.float32(4), "t": np.float32(0.75),
    }  # fmt: skip
    path = save(
        make_model(nodes, constants, domains={QONNX: 1}, opset=13, **ENDS), tmp_path / "m.onnx"
    )
    report = pack(path, tmp_path / "packed.onnx")
    assert report.written is not None
    a = np.clip(np.rint(X["x"] / np.float32(0.5)), -8, 7) * np.float32(0.5)
    b = np.floor(np.clip(a / np.float32(0.75), -8, 7)) * np.float32(0.75)
    v = np.ceil(np.clip(constants["w"] / np.float32(0.5), -8, 7)) * np.float32(0.5)
    found = run_file(tmp_path / "packed.onnx", X)[0]
    np.testing.assert_allclose(found, b @ v, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "words"),
    [
        ("FloatQuant", 6, {}, "FloatQuant of qonnx"),
        ("Quant", 4, {"rounding_mode": "STOCHASTIC"}, "rounds by STOCHASTIC"),
        ("Trunc", 4, {}, "Trunc with 4 inputs"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_an_operator_of_qonnx_that_nothing_defines_is_named(
    operator, inputs, attributes, words, check, tmp_path
):
    names = ["x", "s", "s", "s", "s", "s"][:inputs]
    nodes = [
        helper.make_node(operator, names, ["a"], domain=QONNX, **attributes),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    constants = {"w": W, "s": np.float32(1)}
    path = save(
        make_model(nodes, constants, domains={QONNX: 1}, opset=13, **ENDS), tmp_path / "m.onnx"
    )
    report = pack(path, tmp_path / "copy.onnx", check=check)
    assert report.written is None
    assert words in report.reason
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()
    assert validate(tmp_path / "copy.onnx", against=path).ok


BETWEEN = {
    "nothing": ("n", ()),
    "relu": ("a", (helper.make_node("Relu", ["n"], ["a"]),)),
    "pool": (
        "p",
        (
            helper.make_node("Relu", ["n"], ["a"]),
            helper.make_node("AveragePool", ["a"], ["p"], kernel_shape=[2, 2]),
        ),
    ),
    "branch": (
        "d",
        (
            helper.make_node("Relu", ["n"], ["a"]),
            helper.make_node("Add", ["a", "n"], ["d"]),
        ),
    ),
}


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("rounding", ["Quant", "QuantizeLinear", "Cast", "function"])
def test_a_batchnorm_is_not_folded_where_values_are_rounded_further_on(between, rounding, tmp_path):
    last, nodes = BETWEEN[between]
    generator = np.random.default_rng(0)
    ends = {
        "Quant": (helper.make_node("Quant", [last, "sa", "z", "k"], ["y"], domain=QONNX),),
        "QuantizeLinear": (
            helper.make_node("QuantizeLinear", [last, "sa", "u"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "sa", "u"], ["y"]),
        ),
        "Cast": (
            helper.make_node("Div", [last, "sa"], ["e"]),
            helper.make_node("Cast", ["e"], ["i"], to=TensorProto.INT32),
            helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
        ),
        "function": (
            helper.make_node("Div", [last, "sa"], ["e"]),
            helper.make_node("Whole", ["e"], ["y"], domain="mine"),
        ),
    }
    model = make_model(
        [
            helper.make_node("Conv", ["x", "w"], ["t"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", ["t", "g", "b", "m", "v"], ["n"]),
            *nodes,
            *ends[rounding],
        ],
        {
            "w": draw_grid((32, 16, 3, 3), step=0.3),
            "g": generator.random(32, dtype=np.float32) + 0.5,
            "b": generator.standard_normal(32).astype(np.float32),
            "m": generator.standard_normal(32).astype(np.float32),
            "v": generator.random(32, dtype=np.float32) + 0.5,
            "sa": np.float32(0.1),
            "z": np.float32(0),
            "k": np.float32(8),
            "u": np.uint8(128),
        },
        inputs=[("x", FLOAT, ["n", 16, 32, 32])],
        outputs=[("y", FLOAT, None)],
        opset=13,
        domains={QONNX: 1, "mine": 1},
    )
    body = [helper.make_node("Floor", ["i"], ["o"])]
    imports = [helper.make_opsetid("", 13)]
    model.functions.append(helper.make_function("mine", "Whole", ["i"], ["o"], body, imports))
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert report.written is not None
    assert "bit for bit" in report.equivalence.checks[0].sentence
    assert not any("BatchNormalization went" in note for note in report.notes)


def test_a_batchnorm_in_front_of_floats_is_still_folded(tmp_path):
    model = make_model(
        [
            helper.make_node("Gemm", ["x", "w"], ["t"]),
            helper.make_node("BatchNormalization", ["t", "b", "b", "b", "b"], ["n"]),
            helper.make_node("Shape", ["n"], ["s"]),
            helper.make_node("Cast", ["s"], ["i"], to=TensorProto.INT32),
            helper.make_node("Cast", ["i"], ["f"], to=FLOAT),
            helper.make_node("ReduceMax", ["f"], ["r"], keepdims=0),
            helper.make_node("Mul", ["n", "r"], ["y"]),
        ],
        {"w": W, "b": np.float32(1.3) * ONES},
        opset=15,
        **ENDS,
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert any("1 BatchNormalization went" in note for note in report.notes)
    for a, b in zip(run_file(path, X), run_file(report.path, X), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_notes_of_a_copy_are_those_of_a_copy(tmp_path):
    floats = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    model = make_model(
        [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("Softmax", ["t"], ["y"], axis=1),
        ],
        {"w": floats},
        opset=11,
        ir_version=6,
        **ENDS,
    )
    model.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [128, 128]))
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "copy.onnx")
    assert report.written is None
    assert report.notes == ()
    assert numpy_helper.to_array(onnx.load(report.path).graph.initializer[0]).size
    assert_same_outputs(path, report.path, X)


def test_a_model_whose_equal_tensors_are_shared_is_its_original_by_validate(tmp_path):
    floats = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    model = make_model(
        [
            helper.make_node("MatMul", ["x", "w"], ["t"]),
            helper.make_node("MatMul", ["t", "v"], ["y"]),
        ],
        {"w": floats, "v": floats},
        **ENDS,
    )
    path = save(model, tmp_path / "model.onnx")
    report = pack(path, tmp_path / "packed.onnx")
    assert report.nbytes < 0.6 * path.stat().st_size
    assert_same_outputs(path, report.path, X)
    result = validate(report.path, against=path, latency_runs=0)
    assert result.ok, result.failures
