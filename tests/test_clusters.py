"""Tensors whose rows differ in spread are cut into clusters: fewer bytes, the same levels, and what
no encoder writes is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters import read_weights
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import DOMAIN, Contents
from ecqx_onnx_converters.storage.packed import clusters, encoder
from ecqx_onnx_converters.targets import find_target
from onnx import ModelProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx.runtime.sessions import open_session, run
from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx.verbs import pack
from tests.conversions import assert_says_the_same, convert, float_graph, quantize_model

TARGET = find_target("onnxruntime")


def uneven(shape, axis, *, seed=0):
    """Gaussian levels whose spread along an axis goes from 1 to 30, in no order."""
    generator = np.random.default_rng(seed)
    lengths = [1] * len(shape)
    lengths[axis] = shape[axis]
    spread = generator.permutation(np.geomspace(1, 30, shape[axis])).reshape(lengths)
    drawn = np.rint(generator.normal(size=shape) * spread)
    return np.clip(drawn, -128, 127).astype(np.int8)


TENSORS = {
    "rows": uneven((128, 256), 0),
    "columns": uneven((256, 128), 1),
    "output channels": uneven((96, 48, 3, 3), 0),
    "input channels": uneven((48, 96, 3, 3), 1),
    "last axis": uneven((2, 160, 128), 2),
    "middle axis": uneven((2, 128, 160), 1),
}


def model_of(tensors):
    """A model without inputs that gives out the tensors."""
    named = [(f"w{index}", levels) for index, levels in enumerate(tensors)]
    stored = clusters.encode_all(named, TARGET)
    outputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT8, levels.shape)
        for name, levels in named
    ]
    nodes = [node for one in stored for node in one.nodes]
    initializers = [tensor for one in stored for tensor in one.initializers]
    graph = helper.make_graph(nodes, "g", [], outputs, initializers)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(
        graph, functions=list(stored[0].functions), opset_imports=imports, ir_version=8
    )
    return model, stored


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_uneven_rows_is_cut_and_comes_back(name, tmp_path):
    levels = TENSORS[name]
    even = np.random.default_rng(0).integers(-3, 4, (40, 50)).astype(np.int8)
    model, stored = model_of([levels, even])
    assert [node.op_type for node in model.graph.node].count("Concat") == 1
    onnx.checker.check_model(model, full_check=True)
    contents = Contents.of(model)
    for index, wanted in enumerate((levels, even)):
        found = clusters.decode(f"w{index}", contents)
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, wanted)
        assert clusters.stored_bytes(f"w{index}", contents) == stored[index].nbytes
    onnx.save(model, tmp_path / "m.onnx")
    for level in ("disabled", "all"):
        for found, wanted in zip(
            run(open_session(tmp_path / "m.onnx", level=level), []), (levels, even), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("shape", "axis"), [((512, 512), 0), ((512, 512), 1), ((2, 256, 512), 2)])
def test_clusters_take_fewer_bytes(shape, axis):
    levels = uneven(shape, axis)
    cut, whole = (
        sum(part.ByteSize() for kind in ("nodes", "initializers") for part in getattr(made, kind))
        for made in (
            clusters.encode(levels, "w", TARGET),
            encoder.encode(levels, "w", TARGET),
        )
    )
    assert cut < 0.96 * whole


def test_a_tensor_of_even_rows_or_few_weights_is_left_whole():
    generator = np.random.default_rng(0)
    even = np.rint(generator.normal(size=(300, 300)) * 20).astype(np.int8)
    assert clusters.choose_cut(even) is None
    assert clusters.choose_cut(uneven((16, 64), 0)) is None
    assert clusters.choose_cut(np.zeros((200, 200), np.int8)) is None
    assert clusters.choose_cut(even.reshape(-1)) is None


def test_every_cluster_is_a_part_of_the_rows_by_mean_magnitude():
    levels = TENSORS["middle axis"]
    cut = clusters.choose_cut(levels)
    table = levels.transpose(cut.permutation).reshape(cut.rows, -1)
    assert sorted(cut.order.tolist()) == list(range(cut.rows))
    means = [np.abs(table[row].astype(int)).mean() for row in cut.order]
    assert means == sorted(means)
    parts = cut.list_clusters(levels)
    np.testing.assert_array_equal(np.concatenate(parts), table[cut.order])


def test_a_target_without_decoders_refuses_as_ever():
    assert isinstance(clusters.encode(TENSORS["rows"], "w", find_target("qdq")), Refusal)


@pytest.mark.parametrize("name", ["rows", "columns"])
@pytest.mark.parametrize("fault", ["order", "type", "shape", "node", "perm", "nested"])
def test_what_no_encoder_writes_is_refused(name, fault):
    model, _ = model_of([TENSORS[name]])
    broken = ModelProto()
    broken.CopyFrom(model)
    values = {tensor.name: tensor for tensor in broken.graph.initializer}
    nodes = {node.op_type: node for node in broken.graph.node}
    order = values[nodes["Gather"].input[1]]
    shape = values[nodes["Reshape"].input[1]]
    if fault == "order":
        order.int32_data[0] = order.int32_data[1]
    elif fault == "type":
        order.data_type = onnx.TensorProto.INT64
        order.int64_data[:] = order.int32_data
        del order.int32_data[:]
    elif fault == "shape":
        shape.int64_data[0] += 1
    elif fault == "node":
        nodes["Gather"].op_type = "GatherElements"
    elif fault == "perm":
        if name == "rows":
            pytest.skip("it is not transposed")
        nodes["Transpose"].attribute[0].ints[0] = 1 - nodes["Transpose"].attribute[0].ints[0]
    else:
        nodes["Concat"].input[0] = nodes["Gather"].output[0]
    with pytest.raises(FileError):
        clusters.decode("w0", Contents.of(broken))


def test_a_net_whose_rows_are_uneven_is_converted_and_unpacked(tmp_path):
    """Its other weight could be decoded and dequantized in one call; a file has one way for all."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 40)).eval()
    tensors = list(quantize_model(model, bits=8))
    tensors[0] = QuantTensor(tensors[0].name, TENSORS["rows"], Scale(np.float32(0.01)))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(tensors[0].dequantize()))
    x = (torch.randn(3, 256),)
    conversion = convert(float_graph(model, x), tensors, tmp_path, storage="packed")
    assert_says_the_same(conversion, model, x)
    operators = [node.op_type for node in onnx.load(conversion.path).graph.node]
    assert operators.count("Concat") == 1
    pack.unpack(conversion.path, tmp_path / "dense.onnx")
    found = {item.weight.name: item.weight for item in read_weights(tmp_path / "dense.onnx")}
    np.testing.assert_array_equal(
        np.sort(found[tensors[0].name].dequantize(), axis=None),
        np.sort(tensors[0].dequantize(), axis=None),
    )
