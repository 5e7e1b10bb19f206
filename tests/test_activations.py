"""PyTorch -> ONNX -> onnxruntime with quantised activations, one small network for each kind of
operator."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from ecqx_onnx_converters.passes.activations import UInt8
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from ecqx_onnx.errors import ModelError
from ecqx_onnx.runtime.sessions import open_session, run
from tests.conversions import quantize_model
from tests.integer_conversions import contract, convert_to_integers


class Net(nn.Module):
    """Layers by name, and a forward that a lambda states."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.rule = forward

    def forward(self, x):
        return self.rule(x, **self.layers)


def conv(inputs=3, outputs=8, size=3, **options):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


IMAGE, ROWS, TOKENS = (4, 3, 9, 9), (4, 12), (2, 5, 12)
CASES = {
    # name: (network, input shape, what must run, gain of the sums in it)
    "convolution": (Net(lambda x, a: a(x), a=conv()), IMAGE, {"QLinearConv": 1}, 1),
    "convolution and Relu": (
        Net(lambda x, a: F.relu(a(x)), a=conv()),
        IMAGE,
        {"QLinearConv": 1},
        1,
    ),
    "convolution and Relu6": (
        Net(lambda x, a: F.relu6(8 * a(x)), a=conv()),
        IMAGE,
        {"QLinearConv": 1},
        8,
    ),
    "hard tanh": (
        Net(lambda x, a: F.hardtanh(a(x), -0.2, 0.1), a=conv()),
        IMAGE,
        {"QLinearConv": 1},
        1,
    ),
    "clip above zero": (
        Net(lambda x, a: torch.clip(a(x), 0.05, 0.3), a=conv()),
        IMAGE,
        {"QLinearConv": 1, "Clip": 1},
        1,
    ),
    "no bias": (Net(lambda x, a: a(x), a=conv(bias=False)), IMAGE, {"QLinearConv": 1}, 1),
    "depthwise": (
        Net(lambda x, a, b: F.relu(b(F.relu(a(x)))), a=conv(), b=conv(8, 8, groups=8)),
        IMAGE,
        {"QLinearConv": 2},
        1,
    ),
    "grouped, strided, dilated": (
        Net(
            lambda x, a, b: b(a(x)), a=conv(), b=nn.Conv2d(8, 8, 3, stride=2, dilation=2, groups=2)
        ),
        IMAGE,
        {"QLinearConv": 2},
        1,
    ),
    "one dimension": (
        Net(lambda x, a: F.relu(a(x)), a=nn.Conv1d(3, 8, 3)),
        (4, 3, 20),
        {"QLinearConv": 1},
        1,
    ),
    "three dimensions": (
        Net(lambda x, a: F.relu(a(x)), a=nn.Conv3d(2, 4, 3)),
        (2, 2, 5, 6, 7),
        {"QLinearConv": 1},
        1,
    ),
    "residual": (
        Net(lambda x, a, b: F.relu(b(F.relu(a(x))) + a(x)), a=conv(), b=conv(8, 8)),
        IMAGE,
        {"QLinearConv": 2, "QLinearAdd": 1},
        2,
    ),
    "Relu of a value that is read elsewhere": (
        Net(lambda x, a, b: (lambda y: b(F.relu(y)) + y)(a(x)), a=conv(), b=conv(8, 8)),
        IMAGE,
        {"QLinearConv": 2, "QLinearAdd": 1, "Clip": 1},
        2,
    ),
    "concat": (
        Net(lambda x, a, b: b(torch.cat([F.relu(a(x)), x], 1)), a=conv(), b=conv(11, 4)),
        IMAGE,
        {"QLinearConv": 2, "QLinearConcat": 1},
        1,
    ),
    "pooling": (
        Net(
            lambda x, a, b: b(F.avg_pool2d(F.max_pool2d(a(x), 2), 2).flatten(1)),
            a=conv(),
            b=nn.Linear(32, 5),
        ),
        IMAGE,
        {"QLinearConv": 1, "QLinearAveragePool": 1, "QGemm": 1},
        1,
    ),
    "mean over pixels": (
        Net(lambda x, a, b: b(a(x).mean((2, 3))), a=conv(), b=nn.Linear(8, 5)),
        IMAGE,
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        1,
    ),
    "mean over pixels that stay": (
        Net(lambda x, a, b: b(F.adaptive_avg_pool2d(a(x), 1)), a=conv(), b=conv(8, 5, 1)),
        IMAGE,
        {"QLinearConv": 2, "QLinearGlobalAveragePool": 1},
        1,
    ),
    "linear": (
        Net(lambda x, a, b: b(F.relu(a(x))), a=nn.Linear(12, 16), b=nn.Linear(16, 5)),
        ROWS,
        {"QGemm": 2},
        1,
    ),
    "linear without bias": (
        Net(lambda x, a, b: b(F.relu(a(x))), a=nn.Linear(12, 16, bias=False), b=nn.Linear(16, 5)),
        ROWS,
        {"QGemm": 2},
        1,
    ),
    "linear on tokens": (
        Net(lambda x, a, b: b(F.relu(a(x))), a=nn.Linear(12, 16), b=nn.Linear(16, 5)),
        TOKENS,
        {"QLinearMatMul": 1, "QLinearAdd": 1, "MatMulIntegerToFloat": 1},
        1,
    ),
    "product of activations": (
        Net(lambda x, a: a(x) @ a(x).transpose(1, 2), a=nn.Linear(12, 12, bias=False)),
        TOKENS,
        {"QLinearMatMul": 1, "MatMulIntegerToFloat": 1},
        2,
    ),
    "shapes only": (
        Net(
            lambda x, a, b: b(F.pad(a(x)[:, :, ::2, ::2], (0, 1, 0, 1, 2, 2)).transpose(2, 3)),
            a=conv(),
            b=conv(12, 4),
        ),
        IMAGE,
        {"QLinearConv": 2, "Pad": 1},
        1,
    ),
    "padding with a number": (
        Net(lambda x, a, b: b(F.pad(a(x), (1, 1, 1, 1), value=0.2)), a=conv(), b=conv(8, 4)),
        IMAGE,
        {"QLinearConv": 2, "Pad": 1},
        1.5,
    ),
    "squeeze and excite": (
        Net(
            lambda x, a, b: F.relu(a(x)) * torch.sigmoid(b(F.relu(a(x)).mean((2, 3), True))),
            a=conv(),
            b=conv(8, 8, 1),
        ),
        IMAGE,
        {"QLinearConv": 2, "QLinearMul": 1, "QLinearSigmoid": 1, "QLinearGlobalAveragePool": 1},
        2,
    ),
    "leaky Relu": (
        Net(lambda x, a: F.leaky_relu(a(x)), a=conv()),
        IMAGE,
        {"QLinearConv": 1, "QLinearLeakyRelu": 1},
        1,
    ),
    "a constant added": (
        Net(lambda x, a: a(x) + torch.full((8, 1, 1), 0.3), a=conv()),
        IMAGE,
        {"QLinearConv": 1, "QLinearAdd": 1},
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_operator_runs_on_integers_and_says_what_pytorch_says(name, tmp_path):
    model, shape, wanted, gain = CASES[name]
    torch.manual_seed(1)
    x = torch.randn(shape)
    for layer in model.layers.values():
        layer.reset_parameters()
    conversion = convert_to_integers(contract(model), x, tmp_path)
    assert {operator: conversion.executed[operator] for operator in wanted} == wanted
    tail = {
        node.operator for node in conversion.integer.stays
    }  # after the last product, which has float sums
    assert all(
        node.reason.startswith("it carries the last product's") for node in conversion.integer.stays
    )
    floats = {
        "Conv",
        "FusedConv",
        "Gemm",
        "FusedGemm",
        "MatMul",
        "Add",
        "Mul",
        "Relu",
        "ReduceMean",
    }
    assert not (floats - tail) & set(conversion.executed)
    assert conversion.executed["DequantizeLinear"] <= 1  # of the network's output
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(expected).max() > 4 * gain * conversion.tolerance, (
        "the network says too little to tell"
    )
    for level in (0, 99):
        assert np.abs(conversion.outputs(x, level) - expected).max() <= gain * conversion.tolerance


def sums_saturate() -> bool:
    """Whether this processor's kernels add pairs of products in 16 bits, as x86 without VNNI does
    (docs/integer-kernels.md)."""
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, kind, [1, 64 if name == "a" else 8])
        for name, kind in (("a", 2), ("y", 6))
    ]
    weights = numpy_helper.from_array(np.full((64, 8), 127, np.int8), "b")
    model = helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:], [weights]), ir_version=8
    )
    (sums,) = run(open_session(model.SerializeToString()), (np.full((1, 64), 255, np.uint8),))
    return bool((sums != 64 * 255 * 127).any())


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_weights_keep_their_narrow_storage(bits, per_channel, tmp_path):
    if bits == 8 and sums_saturate():
        pytest.skip("this processor has no VNNI: its kernels saturate sums of 8-bit weights")
    torch.manual_seed(2)
    model = contract(Net(lambda x, a, b: b(F.relu(a(x)).mean((2, 3))), a=conv(), b=nn.Linear(8, 5)))
    x = torch.randn(IMAGE)
    tensors = quantize_model(model, bits=bits, per_channel=per_channel)
    conversion = convert_to_integers(model, x, tmp_path, tensors=tensors)
    assert conversion.executed["QLinearConv"] == conversion.executed["QGemm"] == 1
    with torch.no_grad():
        assert np.abs(conversion.outputs(x, 99) - model(x).numpy()).max() <= conversion.tolerance


def test_what_stays_float_says_why(tmp_path):
    torch.manual_seed(3)
    layers = {"a": conv(), "b": nn.ConvTranspose2d(8, 4, 3), "c": conv(4, 4), "d": conv(4, 4)}
    model = contract(Net(lambda x, a, b, c, d: d(c(b(a(x)))), **layers))
    tensors = quantize_model(model)
    kept = tuple(tensor for tensor in tensors if tensor.name != "layers.c.weight")
    conversion = convert_to_integers(model, torch.randn(IMAGE), tmp_path, tensors=kept)
    reasons = {node.operator: node.reason for node in conversion.integer.stays}
    assert reasons["ConvTranspose"] == "onnxruntime has no integer kernel for ConvTranspose"
    assert reasons["Conv"] == "its weight 'layers.c.weight' is not quantised"
    assert conversion.executed["QLinearConv"] == 2


def test_a_codebook_stays_float_and_says_why(tmp_path):
    torch.manual_seed(4)
    model = contract(Net(lambda x, a, b: b(F.relu(a(x))), a=nn.Linear(12, 16), b=nn.Linear(16, 5)))
    tensors = (
        *quantize_model(model.layers["a"], codebook=True),
        *quantize_model(model.layers["b"]),
    )
    tensors = tuple(
        type(t)(f"layers.{'ab'[i]}.weight", t.levels, t.meaning) for i, t in enumerate(tensors)
    )
    conversion = convert_to_integers(model, torch.randn(ROWS), tmp_path, tensors=tensors)
    assert [(node.operator, "codebook" in node.reason) for node in conversion.integer.stays] == [
        ("Gemm", True),
        ("Relu", False),
    ]


@pytest.mark.parametrize("codebook", [False, True])
def test_a_float_convolution_between_integer_ones_keeps_its_float_weights(codebook, tmp_path):
    """onnxruntime would round them to 8 bits, one step for all, as it does with float weights
    between bytes and bytes."""
    torch.manual_seed(3)
    layers = {"a": conv(), "b": conv(8, 8), "c": conv(8, 4)}
    model = contract(Net(lambda x, a, b, c: c(F.relu(b(F.relu(a(x))))), **layers))
    tensors = [tensor for tensor in quantize_model(model) if tensor.name != "layers.b.weight"]
    if codebook:
        (table,) = quantize_model(model.layers["b"], codebook=True)
        tensors.append(replace(table, name="layers.b.weight"))
    conversion = convert_to_integers(model, torch.randn(IMAGE), tmp_path, tensors=tensors)
    assert {node.operator for node in conversion.integer.stays} == {"Conv", "Relu"}
    assert conversion.executed["QLinearConv"] == 2
    assert conversion.executed["Conv"] + conversion.executed["FusedConv"] == 1


def test_a_model_without_integer_weights_is_refused(tmp_path):
    torch.manual_seed(4)
    model = contract(Net(lambda x, a: a(x), a=nn.Linear(12, 16)))
    with pytest.raises(ModelError, match=r"no node of the model can run on integers .*codebook"):
        convert_to_integers(
            model, torch.randn(ROWS), tmp_path, tensors=quantize_model(model, codebook=True)
        )


def test_a_bias_beyond_int32_keeps_its_layer_float(tmp_path):
    torch.manual_seed(5)
    model = contract(Net(lambda x, a, b: b(F.relu(a(x))), a=conv(), b=conv(8, 4)))
    with torch.no_grad():
        model.layers["a"].bias += 1e9
    conversion = convert_to_integers(model, torch.randn(IMAGE), tmp_path)
    reasons = {node.name: node.reason for node in conversion.integer.stays}
    assert "more than int32 holds" in reasons["layers.a.weight"]
    assert conversion.executed["QLinearConv"] == 1


def test_a_channel_that_died_in_training_runs_on_integers_all_the_same(tmp_path):
    torch.manual_seed(6)
    model = contract(
        Net(lambda x, a, n, b: b(F.relu(n(a(x)))), a=conv(), n=nn.BatchNorm2d(8), b=conv(8, 4))
    )
    with torch.no_grad():
        model.layers["n"].weight[3] = 1e-12
        model.layers["n"].bias[3] = 0.4
    x = torch.randn(IMAGE)
    conversion = convert_to_integers(model, x, tmp_path)
    assert conversion.executed["QLinearConv"] == 2
    with torch.no_grad():
        assert np.abs(conversion.outputs(x, 99) - model(x).numpy()).max() <= conversion.tolerance


@given(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_scale_and_zero_point_cover_the_range_and_keep_zero_exact(first, second):
    low, high = sorted((first, second))
    format = UInt8.of(low, high)
    low, high = min(low, 0), max(high, 0)
    scale = float(format.scale)
    assert math.isfinite(scale)
    assert scale > 0
    # Oracle: real arithmetic. Both ends are at most half a step, and float32's rounding of the
    # scale, beyond what bytes reach.
    slack = scale * (0.5 + 255 * 2.0**-23)
    assert scale * (0 - format.zero_point) <= low + slack
    assert scale * (255 - format.zero_point) >= high - slack
    assert format.quantize(np.zeros(1, np.float32))[0] == format.zero_point


def test_a_value_that_is_always_zero_gets_a_scale():
    assert UInt8.of(0.0, 0.0) == UInt8(np.float32(1), 0)


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    st.floats(-20, 0),
    st.floats(0.1, 20),
)
def test_bytes_are_those_of_the_onnx_specification(values, low, high):
    format, x = UInt8.of(low, high), np.array(values, np.float32)
    inputs = [
        numpy_helper.from_array(x, "x"),
        numpy_helper.from_array(np.array(format.scale, np.float32), "s"),
    ]
    inputs.append(numpy_helper.from_array(np.array(format.zero_point, np.uint8), "z"))
    output = helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])], "g", [], [output], inputs
    )
    specified = ReferenceEvaluator(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    ).run(None, {})[0]
    np.testing.assert_array_equal(format.quantize(x), specified)
