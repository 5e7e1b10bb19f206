"""One call decodes and dequantises where all packed weights allow it; what the file says stays the
same."""

import contextlib
import json

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import FloatGraph, make_plan, match, read_weights, write
from ecqx_onnx_converters.dequantization.fused import FUSED, expand_call
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching
from ecqx_onnx_converters.serialization.metadata import METADATA_KEY, from_text
from ecqx_onnx_converters.storage import DOMAIN
from ecqx_onnx_converters.storage.packed import stages
from onnx import helper
from onnx.reference import ReferenceEvaluator

from ecqx_onnx.errors import FileError
from ecqx_onnx.inspection import inspect
from ecqx_onnx.runtime.sessions import open_session, run
from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx.verbs import pack
from tests.conversions import Conversion, assert_says_the_same, convert, float_graph, quantize_model
from tests.onnx_graphs import model_of
from tests.test_layers import Tied

IMAGES = (torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)),)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 96, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(6144, 4),
    ).eval()


def few_columns(tensors, model):
    """The second weight reads two input channels only, so that it is coded with its first axes
    swapped."""
    tensors[1].levels[:, 2:] = 0
    with torch.no_grad():
        model[2].weight.copy_(torch.from_numpy(tensors[1].dequantize()))


def calls(path):
    """Of our functions that are not the stream's."""
    return {node.op_type for node in onnx.load(path).graph.node if node.domain == DOMAIN} - {"D"}


def functions(path):
    return {function.name for function in onnx.load(path).functions}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("options", "name"),
    [({"bits": 3}, "V"), ({"bits": 3, "per_channel": True}, "W"), ({"codebook": True}, "B")],
)
def test_one_call_a_weight_says_what_two_said(options, name, turned, tmp_path):
    model = net()
    tensors = quantize_model(model, **options)
    if turned:
        few_columns(tensors, model)
    conversion = convert(float_graph(model, IMAGES), tensors, tmp_path, storage="packed")
    assert calls(conversion.path) == {name}
    assert functions(conversion.path) == {"D", "r", name}
    assert (
        "Transpose" in {node.op_type for node in onnx.load(conversion.path).graph.node}
    ) == turned
    assert_says_the_same(conversion, model, IMAGES)
    pack.unpack(conversion.path, tmp_path / "dense.onnx")
    dense = Conversion(
        tmp_path / "dense.onnx",
        conversion.report,
        conversion.matching,
        read_weights(tmp_path / "dense.onnx"),
    )
    assert_says_the_same(dense, model, IMAGES)
    assert functions(dense.path) <= set(FUSED.values()) | {"Dequantize"}


def test_levels_that_are_sums_are_multiplied_whole(tmp_path):
    """One step a tensor, and all of int8: 122 steps and 5 more are not 127 steps in float32."""
    model = torch.nn.Sequential(torch.nn.Linear(60, 80))
    (tensor,) = quantize_model(model, bits=8)
    levels = np.random.default_rng(0).integers(-128, 128, tensor.levels.shape).astype(np.int8)
    tensor = QuantTensor(tensor.name, levels, Scale(np.float32(0.1)))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(tensor.dequantize()))
    images = (torch.randn(3, 60),)
    conversion = convert(float_graph(model, images), [tensor], tmp_path, storage="packed")
    assert calls(conversion.path) == {"W"}
    assert_says_the_same(conversion, model, images)
    (stored,) = read_weights(conversion.path)
    np.testing.assert_array_equal(stored.weight.tensor.levels, levels)


def by_columns(tensor):
    """Each column has one level, most are zero: so the matrix is coded with its axes swapped."""
    tensor.levels[:] = tensor.levels[:1]
    tensor.levels[:, ::2] = 0


def test_a_matrix_that_the_graph_gives_out_keeps_its_layout(tmp_path):
    (tensor,) = quantize_model(torch.nn.Sequential(torch.nn.Linear(60, 80)), bits=3)
    by_columns(tensor)
    model = model_of(
        [helper.make_node("Gemm", ["x", "0.weight"], ["y"], transB=1)],
        {"0.weight": tensor.dequantize()},
        inputs={"x": (onnx.TensorProto.FLOAT, [2, 60])},
        output_shape=[2, 80],
    )
    model.graph.output.append(
        helper.make_tensor_value_info("0.weight", onnx.TensorProto.FLOAT, [80, 60])
    )
    graph = FloatGraph.from_model(model)
    write(make_plan(graph, match(graph.weights, [tensor]), storage="packed"), tmp_path / "out.onnx")
    _, given = run(open_session(tmp_path / "out.onnx"), (np.zeros((2, 60), np.float32),))
    np.testing.assert_array_equal(given, tensor.dequantize())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"bits": 3, "per_channel": True}, {"codebook": True}]
)
def test_gemm_turns_a_matrix_that_is_coded_by_columns_itself(options, shared, tmp_path):
    """Unless something else reads the matrix, too."""

    class Matrix(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(60, 80)

        def forward(self, x):
            y = self.layer(x)
            return y + (y.abs() @ self.layer.weight).sum(1, keepdim=True) if shared else y

    torch.manual_seed(0)
    model, x = Matrix().eval(), (torch.randn(5, 60),)
    (tensor,) = quantize_model(model, **options)
    by_columns(tensor)
    with torch.no_grad():
        model.layer.weight.copy_(torch.from_numpy(tensor.dequantize()))
    conversion = convert(float_graph(model, x), [tensor], tmp_path, storage="packed")
    nodes = onnx.load(conversion.path).graph.node
    assert ("Transpose" in {node.op_type for node in nodes}) == shared
    (gemm,) = (node for node in nodes if node.op_type == "Gemm")
    assert any(attribute.name == "transB" for attribute in gemm.attribute) == shared
    assert_says_the_same(conversion, model, x)
    pack.unpack(conversion.path, tmp_path / "dense.onnx")
    (weight,) = read_weights(tmp_path / "dense.onnx")
    levels = weight.weight.tensor.levels
    np.testing.assert_array_equal(levels if shared else levels.T, tensor.levels)
    assert_says_the_same(
        Conversion(tmp_path / "dense.onnx", conversion.report, Matching((), ()), (weight,)),
        model,
        x,
    )


@pytest.mark.parametrize("turned", [False, True])
def test_a_codebook_with_a_factor_has_a_call_of_its_own(turned, tmp_path):
    model = net()
    tensors = quantize_model(model, codebook=True)
    if turned:
        few_columns(tensors, model)
    graph = float_graph(model, IMAGES)
    factors = [
        np.linspace(0.5, 2, len(t.levels), dtype=np.float32).reshape(-1, *[1] * (t.levels.ndim - 1))
        for t in tensors
    ]
    found = {weight.sources: weight for weight in match(graph.weights, tensors).found}
    scaled = tuple(
        GraphWeight(found[t.name,].name, t, (t.name,), factor)
        for t, factor in zip(tensors, factors, strict=True)
    )
    write(make_plan(graph, Matching(scaled, ()), storage="packed"), tmp_path / "out.onnx")
    assert calls(tmp_path / "out.onnx") == {"F"}
    with torch.no_grad():
        for layer, tensor, factor in zip(
            (model[0], model[2], model[4]), tensors, factors, strict=True
        ):
            layer.weight.copy_(torch.from_numpy(tensor.dequantize() * factor))
    stored = read_weights(tmp_path / "out.onnx")
    assert_says_the_same(
        Conversion(tmp_path / "out.onnx", None, Matching(scaled, ()), stored), model, IMAGES
    )


def test_steps_in_float16_and_in_float32_share_a_call(tmp_path):
    model = net()
    tensors = list(quantize_model(model, per_channel=True))
    halves = Scale(tensors[1].meaning.step.astype(np.float16).astype(np.float32))
    tensors[1] = type(tensors[1])(tensors[1].name, tensors[1].levels, halves)
    with torch.no_grad():
        model[2].weight.copy_(torch.from_numpy(tensors[1].dequantize()))
    conversion = convert(float_graph(model, IMAGES), tensors, tmp_path, storage="packed")
    assert calls(conversion.path) == {"W"}
    types = {
        tensor.data_type
        for tensor in onnx.load(conversion.path).graph.initializer
        if len(tensor.dims) == 4
    }
    assert types == {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    assert_says_the_same(conversion, model, IMAGES)


def test_what_only_some_could_have_none_has(tmp_path, monkeypatch):
    tied, tokens = Tied().eval(), (torch.randint(0, 20, (2, 5)),)
    tensors = quantize_model(tied)
    conversion = convert(
        float_graph(tied, tokens), tensors, tmp_path, storage="packed", dequantize="folded"
    )
    assert calls(conversion.path) == {"Levels", "Dequantize"}
    assert_says_the_same(conversion, tied, tokens)
    model = net()
    tensors = quantize_model(model)
    for options in ({"dequantize": "standard"}, {}):
        monkeypatch.setattr(stages, "STAGED_FROM", 1 << 20 if options else 1)
        conversion = convert(
            float_graph(model, IMAGES), tensors, tmp_path, storage="packed", **options
        )
        assert "Levels" in calls(conversion.path)
        assert_says_the_same(conversion, model, IMAGES)


def test_a_file_whose_calls_are_gone_says_so(tmp_path):
    model = net()
    tensors = quantize_model(model)
    path = convert(float_graph(model, IMAGES), tensors, tmp_path, storage="packed").path
    proto = onnx.load(path)
    for node in [node for node in proto.graph.node if node.op_type == "V"]:
        proto.graph.node.remove(node)
    onnx.save(proto, tmp_path / "gone.onnx")
    with pytest.raises(FileError, match="simplify it before"):
        read_weights(tmp_path / "gone.onnx")
    assert inspect(tmp_path / "gone.onnx").inflated


@pytest.mark.parametrize("change", ["inputs", "outputs", "turn", "no turn", "value"])
def test_a_call_that_lies_is_refused(change, tmp_path):
    model = net()
    tensors = quantize_model(model)
    few_columns(tensors, model)
    path = convert(float_graph(model, IMAGES), tensors, tmp_path, storage="packed").path
    proto = onnx.load(path)
    call = next(node for node in proto.graph.node if node.op_type == "V")
    turn = next(node for node in proto.graph.node if node.op_type == "Transpose")
    if change == "inputs":
        del call.input[2:]
    elif change == "outputs":
        del call.output[:]
    elif change == "turn":
        turn.attribute[0].ints[0] = 7
    elif change == "no turn":
        del turn.attribute[:]
    else:
        entry = next(entry for entry in proto.metadata_props if entry.key == METADATA_KEY)
        content = from_text(entry.value)
        content["tensors"][0][2] = turn.output[0]
        entry.value = json.dumps(content)
    onnx.save(proto, tmp_path / "lies.onnx")
    with contextlib.suppress(FileError):
        assert not all(stored.crc_ok for stored in read_weights(tmp_path / "lies.onnx"))
    assert inspect(tmp_path / "lies.onnx").warnings


def test_one_call_is_standard_onnx_and_exact_whatever_the_step(tmp_path):
    """By onnx's own evaluator. A step may be so small that its multiples are hardly numbers."""
    matrix = np.random.default_rng(0).integers(-7, 8, (60, 80)).astype(np.int8)
    for step in (0.1, 1e-45, 3e-39, 1e37, -0.01):
        tensor = QuantTensor("w", matrix, Scale(np.float32(step).reshape(())))
        model = model_of(
            [helper.make_node("Identity", ["w"], ["y"])],
            {"w": tensor.dequantize()},
            inputs={},
            output_shape=[60, 80],
        )
        graph = FloatGraph.from_model(model)
        path = tmp_path / f"{step}.onnx"
        write(make_plan(graph, match(graph.weights, [tensor]), storage="packed"), path)
        assert calls(path) == {"V" if step > 0 else "W"}
        expected = (matrix.astype(np.float32) * np.float32(step)).view(np.int32)
        for given in (
            ReferenceEvaluator(str(path)).run(None, {})[0],
            run(open_session(path), ())[0],
        ):
            np.testing.assert_array_equal(given.view(np.int32), expected)


@pytest.mark.parametrize(
    "what", ["decoder's inputs", "split's inputs", "sizes", "shape", "turn", "text"]
)
def test_whatever_keeps_a_weight_from_being_read_is_told(what, tmp_path):
    model = net()
    tensors = quantize_model(model)
    few_columns(tensors, model)
    proto = onnx.load(convert(float_graph(model, IMAGES), tensors, tmp_path, storage="packed").path)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = {node.op_type: node for node in proto.graph.node}
    message = "damaged"
    if what == "decoder's inputs":
        del nodes["D"].input[1:]
        message = "lacks inputs"
    elif what == "split's inputs":
        del nodes["Split"].input[1:]
        message = "lacks inputs"
    elif what in ("sizes", "shape"):
        sizes = constants[nodes["Split"].input[1] if what == "sizes" else nodes["V"].input[3]]
        sizes.CopyFrom(
            onnx.TensorProto(name=sizes.name, data_type=onnx.TensorProto.INT64, int64_data=[3])
        )
    elif what == "turn":
        del nodes["Transpose"].input[:]
        message = "convert the model again"
    else:
        sizes = constants[nodes["V"].input[3]]
        sizes.CopyFrom(
            onnx.TensorProto(
                name=sizes.name, data_type=onnx.TensorProto.STRING, dims=[1], string_data=[b"a"]
            )
        )
    with pytest.raises(FileError, match=message):
        read_weights(proto)


def test_expanding_leaves_other_nodes_alone():
    for node in (helper.make_node("W", ["a"], ["b"]), helper.make_node("Relu", ["a"], ["b"])):
        assert expand_call(node) == [node]
