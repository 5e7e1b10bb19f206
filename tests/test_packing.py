"""Quantised graphs of every style, made by hand: packed, they say the same in onnxruntime;
unpacked, they are what they were."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import make_plan, match, read_weights, write
from ecqx_onnx_converters.foreign import foreign
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ecqx_onnx.checkpoint.export import export
from ecqx_onnx.cli import app
from ecqx_onnx.errors import CheckFailed, FileError, ModelError
from ecqx_onnx.recognition import packing_plan
from ecqx_onnx.runtime.sessions import count_executed_operators, open_session, run
from ecqx_onnx.validation.equivalence import compare_models
from ecqx_onnx.verbs import pack as pack_module
from ecqx_onnx.verbs.pack import pack, unpack
from tests.conversions import quantize_model, session

FLOAT = TensorProto.FLOAT
rng = np.random.default_rng(0)
LEVELS = np.where(rng.random((128, 128)) < 0.6, 0, rng.integers(-1, 2, (128, 128))).astype(
    np.int8
)  # [out, in], ternary, mostly zero
KERNELS = LEVELS.reshape(64, 64, 4)
STEPS = (rng.random(32) + 0.5).astype(np.float32)


def initializer(name: str, values: np.ndarray, kind: int | None = None) -> TensorProto:
    if kind is None:
        return numpy_helper.from_array(values, name)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def model(
    nodes: Sequence[NodeProto],
    tensors: Sequence[TensorProto],
    *,
    x: Sequence[int | str] = ("n", 128),
    opset: int = 21,
    domains: Sequence[str] = (),
) -> ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, x)],
        [helper.make_tensor_value_info("y", FLOAT, ["n", "m", "l"][: len(x)])],
        list(tensors),
    )
    imports = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(domain, 1) for domain in domains),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=10 if opset < 25 else 13)


@dataclass(frozen=True)
class Case:
    """integers: how many weights stay integers in the packed graph. level: what the stored levels
    must be."""

    model: ModelProto
    levels: np.ndarray
    integers: int = 0


def dequantized(kind: int, zero: int | None, *, per_axis: bool = False, opset: int = 21) -> Case:
    """Gemm with transB = 1 on integers behind DequantizeLinear."""
    step = STEPS[:1].reshape(()) if not per_axis else np.resize(STEPS, 128)
    zeros = np.full(step.shape, zero or 0)
    if per_axis and zero is not None:
        zeros[1::2] += 1  # every second channel has another zero point
    stored = LEVELS + (zeros[:, None] if per_axis else zeros)
    tensors = [
        initializer("q", stored, kind),
        initializer("s", step),
        initializer("z", zeros, kind),
    ]
    inputs = ["q", "s"] if zero is None else ["q", "s", "z"]
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["w"], **({"axis": 0} if per_axis else {})),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    if opset < 11:  # Gemm's third input was not optional yet
        nodes[1].input.append("b")
        tensors.append(initializer("b", np.arange(128, dtype=np.float32)))
    return Case(
        model(
            nodes,
            [tensor for tensor in tensors if zero is not None or tensor.name != "z"],
            opset=opset,
        ),
        LEVELS,
    )


def blocked() -> Case:
    tensors = [
        initializer("q", LEVELS, TensorProto.INT8),
        initializer("s", rng.random((128, 8), dtype=np.float32) + 0.5),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1, block_size=16),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    return Case(model(nodes, tensors), LEVELS, integers=1)


def half() -> Case:
    """float16 scales: the weight is float16, which no function of ours makes."""
    tensors = [initializer("q", LEVELS), initializer("s", np.float16(0.25))]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node("Cast", ["w"], ["v"], to=FLOAT),
        helper.make_node("Gemm", ["x", "v"], ["y"], transB=1),
    ]
    return Case(model(nodes, tensors), LEVELS, integers=1)


def matmul_behind_dequantize_linear() -> Case:
    """onnxruntime would quantise the activations here (MatMulNBits), silently; the packed graph
    does not."""
    tensors = [initializer("q", LEVELS.T), initializer("s", STEPS[:1].reshape(()))]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    return Case(model(nodes, tensors), LEVELS.T)


def fake_quantized(*, clipped: bool, per_axis: bool = False) -> Case:
    """QuantizeLinear -> [Clip] -> DequantizeLinear of floats, a third of them on the edge between
    two levels."""
    steps = np.resize(STEPS, 128) if per_axis else STEPS[:1].reshape(())
    spread = steps[:, None] if per_axis else steps
    noise = rng.choice([-0.5, 0.0, 0.3], LEVELS.shape).astype(np.float32)
    floats = (LEVELS + noise) * spread
    levels = np.rint(floats / spread)
    tensors = [
        initializer("f", floats),
        initializer("s", steps),
        initializer("z", np.zeros(steps.shape), TensorProto.INT8),
    ]
    tensors += [initializer("low", np.int8(-1)), initializer("high", np.int8(1))]
    axis = {"axis": 0} if per_axis else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["f", "s", "z"], ["q"], **axis),
        helper.make_node("Clip", ["q", "low", "high"], ["c"]),
        helper.make_node("DequantizeLinear", ["c" if clipped else "q", "s", "z"], ["w"], **axis),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    if not clipped:
        del nodes[1], tensors[-2:]
    return Case(model(nodes, tensors), np.clip(levels, -1, 1) if clipped else levels)


def quantized_activations(*, fake: bool = False) -> Case:
    """Conv between Q/DQ pairs: runtimes make QLinearConv of it, so the weight's DequantizeLinear
    must stay."""
    tensors = [
        initializer("s", np.float32(0.05)),
        initializer("z", np.uint8(128)),
        initializer("ws", np.float32(0.5)),
        initializer("wz", np.int8(0)),
        initializer("q", KERNELS),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["q", "ws", "wz"], ["w"]),
        helper.make_node("Conv", ["xf", "w"], ["yf"]),
        helper.make_node("QuantizeLinear", ["yf", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"]),
    ]
    if fake:
        tensors[-1] = initializer("f", KERNELS * np.float32(0.5))
        nodes.insert(0, helper.make_node("QuantizeLinear", ["f", "ws", "wz"], ["q"]))
    return Case(model(nodes, tensors, x=["n", 64, 10]), KERNELS, integers=1)


def integer_operator(operator: str) -> Case:
    """x -> QuantizeLinear -> the operator on uint8 activations and int8 weights, zero point 0."""
    convolution = operator in ("QLinearConv", "ConvInteger")
    weight = KERNELS if convolution else LEVELS.T.copy()
    tensors = [
        initializer("s", np.float32(0.05)),
        initializer("z", np.uint8(120)),
        initializer("q", weight),
        initializer("ws", np.float32(0.5)),
        initializer("wz", np.int8(0)),
    ]
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"])]
    shape = ["n", 64, 10] if convolution else ["n", 128]
    if operator.endswith("Integer"):
        nodes += [
            helper.make_node(operator, ["a", "q", "z", "wz"], ["i"]),
            helper.make_node("Cast", ["i"], ["y"], to=FLOAT),
        ]
        return Case(model(nodes, tensors, x=shape), weight, integers=1)
    domain = "com.microsoft" if operator == "QGemm" else ""
    inputs = [
        "a",
        "s",
        "z",
        "q",
        "ws",
        "wz",
        *(["", "s", "z"] if operator == "QGemm" else ["s", "z"]),
    ]
    nodes.append(helper.make_node(operator, inputs, ["b"], domain=domain))
    nodes.append(helper.make_node("DequantizeLinear", ["b", "s", "z"], ["y"]))
    return Case(
        model(nodes, tensors, x=shape, domains=[domain] if domain else []), weight, integers=1
    )


def constants() -> Case:
    """Everything in Constant nodes."""
    values = {"q": LEVELS, "s": np.float32(0.5), "z": np.int8(0)}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in values.items()
    ]
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"]))
    nodes.append(helper.make_node("Gemm", ["x", "w"], ["y"], transB=1))
    return Case(model(nodes, []), LEVELS)


def branches(levels: np.ndarray = LEVELS) -> Case:
    """Both branches of an If have a weight of the same name, with other levels."""

    def branch(sign: int) -> GraphProto:
        tensors = [initializer("q", sign * levels), initializer("s", np.float32(0.5))]
        nodes = [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
            helper.make_node("Gemm", ["x", "w"], ["out"], transB=1),
        ]
        return helper.make_graph(
            nodes, "branch", [], [helper.make_tensor_value_info("out", FLOAT, None)], tensors
        )

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["y"], then_branch=branch(1), else_branch=branch(-1)),
    ]
    return Case(
        model(nodes, [initializer("zero", np.float32(0))], x=["n", levels.shape[1]]), levels
    )


def loop() -> Case:
    """h = Gemm(h, W) three times, W behind DequantizeLinear in the body of a Loop."""
    square = LEVELS
    infos = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("i", TensorProto.INT64, []),
            ("c", TensorProto.BOOL, []),
            ("h", FLOAT, None),
            ("c_out", TensorProto.BOOL, []),
            ("h_out", FLOAT, None),
        )
    ]
    body = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
            helper.make_node("Gemm", ["h", "w"], ["h_out"], transB=1),
            helper.make_node("Identity", ["c"], ["c_out"]),
        ],
        "body", infos[:3], infos[3:], [initializer("q", square), initializer("s", np.float32(0.1))],
    )  # fmt: skip
    tensors = [initializer("three", np.int64(3)), initializer("true", np.array(True))]
    return Case(
        model([helper.make_node("Loop", ["three", "true", "x"], ["y"], body=body)], tensors), square
    )


def floats(values: Sequence[float], *, opset: int = 13) -> Case:
    """Plain float weights on few values: -a, 0, +b."""
    table = np.array(values, np.float32)
    return Case(
        model(
            [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
            [initializer("w", table[LEVELS])],
            opset=opset,
        ),
        LEVELS,
    )


def old_inputs() -> Case:
    """Opset 8, IR 3: every initializer is listed among the inputs, too."""
    case = floats([0.0, 0.5, -0.5], opset=8)
    case.model.ir_version = 3
    case.model.graph.node[0].input.append("b")
    case.model.graph.initializer.append(initializer("b", np.arange(128, dtype=np.float32)))
    for name, shape in (("w", LEVELS.shape), ("b", (128,))):
        case.model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, shape))
    return Case(case.model, LEVELS)


CASES: Mapping[str, Case] = {
    "int8": dequantized(TensorProto.INT8, None),
    "int8, opset 10": dequantized(TensorProto.INT8, 3, opset=10),
    "int8 with zero points per axis": dequantized(TensorProto.INT8, 3, per_axis=True),
    "uint8 around 128": dequantized(TensorProto.UINT8, 128),
    "uint8 around 250": dequantized(TensorProto.UINT8, 250),
    "int4 per axis": dequantized(TensorProto.INT4, None, per_axis=True),
    "uint4": dequantized(TensorProto.UINT4, 8),
    "int2": dequantized(TensorProto.INT2, None, opset=25),
    "blocks": blocked(),
    "float16": half(),
    "MatMul": matmul_behind_dequantize_linear(),
    "QDQ of floats": fake_quantized(clipped=False),
    "QCDQ": fake_quantized(clipped=True),
    "QCDQ per axis": fake_quantized(clipped=True, per_axis=True),
    "quantised activations": quantized_activations(),
    "quantised activations, weight from floats": quantized_activations(fake=True),
    **{
        name: integer_operator(name)
        for name in ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm")
    },
    "Constant nodes": constants(),
    "If": branches(),
    "Loop": loop(),
    "floats on a grid": floats([0.0, 0.5, -0.5]),
    "floats of a codebook": floats([0.0, 0.3, -0.17]),
    "initializers as inputs": old_inputs(),
}


def packed(case: Case, folder: Path, **options) -> tuple[Path, pack_module.PackReport]:
    onnx.save(case.model, folder / "original.onnx")
    onnx.checker.check_model(str(folder / "original.onnx"), full_check=True)
    return folder / "packed.onnx", pack(folder / "original.onnx", folder / "packed.onnx", **options)


@pytest.mark.parametrize("name", CASES)
def test_every_style_of_quantisation_is_packed_without_loss(name, tmp_path):
    case = CASES[name]
    path, report = packed(case, tmp_path)
    assert report.written is not None, report.reason
    assert report.equivalence.inputs == 2
    assert [check.passed for check in report.equivalence.checks] == [True, True]
    assert "bit for bit" in report.equivalence.checks[0].sentence
    weights = {item.weight.name: item for item in read_weights(path)}
    assert all(item.crc_ok for item in weights.values())
    assert sum(item.weight.integers is not None for item in weights.values()) == case.integers
    levels = [item.weight.tensor.levels for item in weights.values()]
    assert any(np.array_equal(found, case.levels) for found in levels)
    assert report.nbytes == path.stat().st_size < (tmp_path / "original.onnx").stat().st_size


@pytest.mark.parametrize("name", CASES)
def test_a_packed_model_is_unpacked_to_what_it_was(name, tmp_path):
    path, _ = packed(CASES[name], tmp_path)
    x = [
        rng.standard_normal([length if isinstance(length, int) else 3 for length in shape]).astype(
            np.float32
        )
        for shape in [
            [
                dim.dim_value or dim.dim_param
                for dim in CASES[name].model.graph.input[0].type.tensor_type.shape.dim
            ]
        ]
    ]
    expected = run(open_session(tmp_path / "original.onnx", level="disabled"), x)
    for options in ({}, {"floats": True}, {"target": "onnxruntime", "dequantize": "folded"}):
        unpack(path, tmp_path / "dense.onnx", force=True, **options)
        for level, exact in (("disabled", not options or "floats" in options), ("all", False)):
            found = run(open_session(tmp_path / "dense.onnx", level=level), x)
            if exact and name != "MatMul":  # which becomes Gemm, of another order of summation
                np.testing.assert_array_equal(found[0], expected[0])
            assert (
                np.abs(found[0] - expected[0]).max() <= 1e-4 * np.abs(expected[0]).max()
                or "activations" in name
            )
        proto = onnx.load(tmp_path / "dense.onnx")
        if not options and name != "floats of a codebook":
            assert not proto.functions
            assert all(node.domain in ("", "com.microsoft") for node in proto.graph.node)
        if "floats" in options:
            assert not read_weights(tmp_path / "dense.onnx")


def test_integer_kernels_are_kept_where_the_original_has_them(tmp_path):
    path, _ = packed(CASES["quantised activations"], tmp_path)
    x = [np.zeros((1, 64, 10), np.float32)]
    assert count_executed_operators(tmp_path / "original.onnx", x)["QLinearConv"] == 1
    assert count_executed_operators(path, x)["QLinearConv"] == 1


def test_a_matmul_behind_dequantize_linear_keeps_float_activations_once_packed(tmp_path):
    path, _ = packed(CASES["MatMul"], tmp_path)
    executed = count_executed_operators(path, [np.zeros((1, 128), np.float32)])
    assert executed["MatMul"] == 1
    assert not executed["MatMulNBits"]


def test_a_weight_on_its_way_through_transpose_is_stored_as_the_product_reads_it(tmp_path):
    tensors = [initializer("q", LEVELS), initializer("s", np.float32(0.5))]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    path, report = packed(Case(model(nodes, tensors), LEVELS), tmp_path)
    assert all(node.op_type != "Transpose" for node in onnx.load(path).graph.node)
    np.testing.assert_array_equal(read_weights(path)[0].weight.tensor.levels, LEVELS.T)
    assert report.equivalence.ok


def quant(x, scale, zero, bits, *, signed, narrow):
    """The definition in QONNX's paper, in float32."""
    lowest = -(2.0 ** (bits - 1)) + narrow if signed else 0.0
    highest = 2.0 ** (bits - 1) - 1 if signed else 2.0**bits - 1 - narrow
    return (np.rint(np.clip(x / scale + zero, lowest, highest)) - zero).astype(np.float32) * scale


@pytest.mark.parametrize(("signed", "narrow"), list(itertools.product((0, 1), (0, 1))))
@pytest.mark.parametrize("domain", ["onnx.brevitas", "qonnx.custom_op.general"])
def test_qonnx_quant_is_packed_on_weights_and_defined_on_activations(
    domain, signed, narrow, tmp_path
):
    scales, zero = (
        rng.random((128, 1), dtype=np.float32) + np.float32(0.5),
        np.float32(0 if signed else 2),
    )
    weights = (rng.standard_normal((128, 128)) * 1.5).astype(np.float32)
    constants = {
        "w": weights, "ws": scales, "wz": zero, "wb": np.float32(3),
        "as": np.float32(0.3), "az": np.float32(1), "ab": np.float32(4),
    }  # fmt: skip
    attributes = {"signed": signed, "narrow": narrow, "rounding_mode": "ROUND"}
    nodes = [
        helper.make_node("Quant", ["x", "as", "az", "ab"], ["a"], domain=domain, **attributes),
        helper.make_node("Quant", ["w", "ws", "wz", "wb"], ["v"], domain=domain, **attributes),
        helper.make_node("Gemm", ["a", "v"], ["y"], transB=1),
    ]
    tensors = [initializer(name, np.asarray(values)) for name, values in constants.items()]
    onnx.save(model(nodes, tensors, opset=13, domains=[domain]), tmp_path / "qonnx.onnx")
    report = pack(tmp_path / "qonnx.onnx", tmp_path / "packed.onnx")
    assert "bit for bit" in report.equivalence.checks[0].sentence
    wanted = quant(weights, scales, zero, 3.0, signed=signed, narrow=narrow)
    (stored,) = read_weights(tmp_path / "packed.onnx")
    np.testing.assert_array_equal(stored.weight.dequantize(), wanted)
    x = rng.standard_normal((5, 128)).astype(np.float32)
    expected = (
        quant(x, np.float32(0.3), np.float32(1), 4.0, signed=signed, narrow=narrow) @ wanted.T
    )
    for level in (0, 99):
        found = session(tmp_path / "packed.onnx", level).run(None, {"x": x})[0]
        np.testing.assert_allclose(
            found, expected, rtol=0, atol=128 * 2.0**-24 * np.abs(expected).max()
        )


def test_qonnx_bipolar_quant_gives_two_levels(tmp_path):
    weights = rng.standard_normal((128, 128)).astype(np.float32)
    tensors = [initializer("w", weights), initializer("s", np.float32(0.25))]
    nodes = [
        helper.make_node("BipolarQuant", ["x", "s"], ["a"], domain="qonnx.custom_op.general"),
        helper.make_node("BipolarQuant", ["w", "s"], ["v"], domain="qonnx.custom_op.general"),
        helper.make_node("Gemm", ["a", "v"], ["y"], transB=1),
    ]
    onnx.save(
        model(nodes, tensors, opset=13, domains=["qonnx.custom_op.general"]),
        tmp_path / "qonnx.onnx",
    )
    pack(tmp_path / "qonnx.onnx", tmp_path / "packed.onnx")
    (stored,) = read_weights(tmp_path / "packed.onnx")
    np.testing.assert_array_equal(stored.weight.tensor.levels, np.where(weights >= 0, 1, -1))
    x = rng.standard_normal((5, 128)).astype(np.float32)
    expected = np.where(x >= 0, 0.25, -0.25) @ np.where(weights >= 0, 0.25, -0.25).T
    np.testing.assert_allclose(
        session(tmp_path / "packed.onnx", 99).run(None, {"x": x})[0], expected, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("external", [False, True])
def test_a_model_in_which_nothing_can_be_packed_is_copied_byte_for_byte(external, tmp_path):
    floats = rng.standard_normal((128, 128)).astype(np.float32)
    original = model(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], [initializer("w", floats)]
    )
    (tmp_path / "there").mkdir()
    onnx.save(
        original, tmp_path / "original.onnx", save_as_external_data=external, location="weights.bin"
    )
    report = pack(tmp_path / "original.onnx", tmp_path / "there" / "out.onnx")
    assert report.written is None
    assert "w: its 16384 entries lie on more than 256 values" in report.reason
    copy = tmp_path / "there" / "out.onnx"
    assert sorted(path.name for path in copy.parent.iterdir()) == [
        "out.onnx",
        *(["out.onnx.data"] if external else []),
    ]
    if external:
        assert (tmp_path / "there" / "out.onnx.data").read_bytes() == (
            tmp_path / "weights.bin"
        ).read_bytes()
        assert onnx.load(copy) == onnx.load(tmp_path / "original.onnx")
    else:
        assert copy.read_bytes() == (tmp_path / "original.onnx").read_bytes()
    session(copy, 99)


def test_a_model_whose_data_lies_in_another_file_is_packed(tmp_path):
    external = ModelProto.FromString(
        CASES["int8 with zero points per axis"].model.SerializeToString()
    )  # saving so changes it
    onnx.save(
        external,
        tmp_path / "original.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.equivalence.ok
    np.testing.assert_array_equal(
        read_weights(tmp_path / "packed.onnx")[0].weight.tensor.levels, LEVELS
    )


def test_a_model_that_would_not_get_smaller_is_copied_with_the_reason(tmp_path):
    small = initializer("q", LEVELS[:4, :4])
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    onnx.save(
        model(nodes, [small, initializer("s", np.float32(1))], x=["n", 4]),
        tmp_path / "original.onnx",
    )
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.written is None
    assert "stored anew it would take" in report.reason
    assert (tmp_path / "packed.onnx").read_bytes() == (tmp_path / "original.onnx").read_bytes()


def test_weights_of_branches_that_would_not_get_smaller_stay(tmp_path):
    onnx.save(branches(LEVELS[:4, :4]).model, tmp_path / "original.onnx")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.written is None
    assert {kept.name.split("_")[0] for kept in report.kept} == {"w", "q"}


@pytest.mark.parametrize("name", ["int8", "QLinearConv", "quantised activations"])
def test_a_single_wrong_level_is_found_and_nothing_is_written(name, tmp_path, monkeypatch):
    search = foreign.find_quantized

    def wrong(*arguments, **options):
        found = search(*arguments, **options)
        levels = found.weights[0].tensor.levels
        levels.setflags(write=True)
        levels.reshape(-1)[7] ^= 1
        return found

    monkeypatch.setattr(packing_plan, "find_quantized", wrong)
    with pytest.raises(CheckFailed, match="not the original"):
        packed(CASES[name], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"original.onnx"}


def test_every_flipped_byte_of_the_integers_is_refused_when_unpacking(tmp_path):
    path, _ = packed(CASES["int8"], tmp_path)
    content = path.read_bytes()
    data = max((tensor.raw_data for tensor in onnx.load(path).graph.initializer), key=len)
    start = content.index(data)
    for position in range(start, start + len(data), len(data) // 16):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with pytest.raises(FileError, match="damaged"):
            unpack(path, tmp_path / "dense.onnx")
    assert not (tmp_path / "dense.onnx").exists()


def test_a_file_of_someone_else_has_nothing_to_unpack(tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "foreign.onnx")
    with pytest.raises(ModelError, match="nothing to unpack"):
        unpack(tmp_path / "foreign.onnx", tmp_path / "dense.onnx")


def test_a_model_that_only_onnxs_checker_rejects_is_packed_and_told(tmp_path):
    rejected = ModelProto()
    rejected.CopyFrom(CASES["int8"].model)
    rejected.graph.output[0].ClearField("type")
    onnx.save(rejected, tmp_path / "original.onnx")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert report.written is not None
    assert report.equivalence.ok
    assert any("onnx's checker rejects it, as it rejects the original" in n for n in report.notes)
    unpack(tmp_path / "packed.onnx", tmp_path / "dense.onnx")


def test_the_command_line_packs_and_unpacks(tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    np.savez(tmp_path / "inputs.npz", x=np.ones((3, 128), np.float32))
    original, small, dense = (
        str(tmp_path / name) for name in ("original.onnx", "packed.onnx", "dense.onnx")
    )
    result = CliRunner().invoke(
        app, ["pack", original, small, "--inputs", str(tmp_path / "inputs.npz"), "--json"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["packed"]
    assert report["bytes"] == (tmp_path / "packed.onnx").stat().st_size < report["original_bytes"]
    assert [check["passed"] for check in report["checks"]] == [True, True]
    assert CliRunner().invoke(app, ["unpack", small, dense]).exit_code == 0
    result = CliRunner().invoke(app, ["unpack", original, dense, "--force"])
    assert result.exit_code == 2
    assert "nothing to unpack" in result.stderr


def test_a_packed_file_is_not_packed_again(tmp_path):
    path, _ = packed(CASES["int8"], tmp_path)
    report = pack(path, tmp_path / "again.onnx")
    assert report.written is None
    assert "stored by ecqx-onnx already" in report.reason
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


class Recurrent(torch.nn.Module):
    """An embedding tied to the last layer, an LSTM, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(200, 32)
        self.lstm = torch.nn.LSTM(32, 32, batch_first=True)
        self.linear = torch.nn.Linear(32, 10)
        self.last = torch.nn.Linear(32, 200, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.lstm(self.embedding(x))[0][:, -1]
        return torch.cat([self.last(states), self.linear(states)], 1)


def test_embeddings_recurrent_and_tied_weights_are_unpacked(tmp_path):
    torch.manual_seed(0)
    network = Recurrent().eval()
    tensors = quantize_model(network)
    graph = export(network, (torch.zeros(2, 7, dtype=torch.int64),)).graph
    matching = match(graph.weights, tensors)
    for form in ("folded", "standard"):
        write(
            make_plan(graph, matching, storage="sparse", dequantize=form),
            tmp_path / "sparse.onnx",
            force=True,
        )
        for options in ({}, {"floats": True}, {"target": "onnxruntime-1.17"}):
            unpack(tmp_path / "sparse.onnx", tmp_path / "dense.onnx", force=True, **options)
            assert not onnx.load(tmp_path / "dense.onnx").graph.sparse_initializer
            same = compare_models(tmp_path / "sparse.onnx", tmp_path / "dense.onnx")
            assert same.ok, same.failure


def test_unpacking_keeps_integer_kernels(tmp_path):
    """A DequantizeLinear with a zero point feeds one, and stays as it is."""
    path, _ = packed(CASES["quantised activations"], tmp_path)
    unpack(path, tmp_path / "dense.onnx")
    assert (
        count_executed_operators(tmp_path / "dense.onnx", [np.zeros((1, 64, 10), np.float32)])[
            "QLinearConv"
        ]
        == 1
    )


CODED = (
    "int8 with zero points per axis",
    "QLinearConv",
    "uint8 around 250",
    "floats of a codebook",
    "If",
)


@pytest.mark.parametrize("name", CODED)
def test_entropy_coded_weights_serve_every_style_and_come_back(name, tmp_path):
    onnx.save(CASES[name].model, tmp_path / "original.onnx")
    plain = pack(tmp_path / "original.onnx", tmp_path / "dense.onnx", storage="dense")
    report = pack(tmp_path / "original.onnx", tmp_path / "packed.onnx", storage="packed")
    assert {row.storage.split()[0].strip(",") for row in report.written.tensors} == {"packed"}
    assert "bit for bit" in report.equivalence.checks[0].sentence
    assert sum(row.nbytes for row in report.written.tensors) < sum(
        row.nbytes for row in plain.written.tensors
    )
    unpack(
        tmp_path / "packed.onnx",
        tmp_path / "unpacked.onnx",
        target="onnxruntime",
        dequantize="folded",
    )
    assert compare_models(tmp_path / "packed.onnx", tmp_path / "unpacked.onnx").ok
