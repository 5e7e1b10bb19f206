"""Small ONNX models, and changes of the message that a model is."""

from __future__ import annotations

import random as random_module
from typing import Any

import numpy as np
import onnx
from ecqx_onnx_converters import FloatGraph, build, make_plan, match
from google.protobuf.message import Message
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale
from tests.fuzz.mutation import INTEGERS, mutate_bytes

Random = random_module.Random
SIGNED = [number for number in INTEGERS if -(2**63) <= number < 2**63]

NAMES = (
    "",
    "x",
    "y",
    "w0",
    "w1",
    "b0",
    "nowhere",
    "\x1b[31m",
    "n" * 5000,
    "[/x]",
    "a\0b",
    "\u202e",
)
OPERATORS = (
    "Conv",
    "Gemm",
    "MatMul",
    "Transpose",
    "DequantizeLinear",
    "QuantizeLinear",
    "Clip",
    "Cast",
    "Gather",
)
OPERATORS += (
    "BatchNormalization",
    "Constant",
    "If",
    "Loop",
    "Split",
    "Quant",
    "D",
    "Levels",
    "V",
    "r",
    "Identity",
    "",
)
METADATA = {"version": "0", "labels": ["a", "b"], "recipe": {"bits": 4, "data": "x"}}
METADATA |= {
    "preprocessing": {"version": 1, "kind": "array", "scale": 2.0, "mean": [0.5], "std": [2.0]}
}


def foreign_models() -> list[bytes]:
    """Someone else's: Gemm and MatMul with weights as floats on few values, DequantizeLinear, a
    branch."""
    return [
        _serialized(_foreign(style))
        for style in ("levels", "dequantized", "branch", "quantized", "bn")
    ]


def our_models() -> list[bytes]:
    """Written by the converter: dense, sparse, packed, for DequantizeLinear."""
    options: list[dict[str, Any]] = [
        {"storage": "dense"},
        {"storage": "sparse"},
        {"storage": "packed"},
        {"target": "qdq"},
    ]
    return [_written(shape=(24, 16), **option) for option in options]


def packed_models() -> list[bytes]:
    """With streams of one and of several tensors, small and long; with corrections."""
    made = [_written(shape=shape, storage="packed") for shape in ((24, 16), (300, 200))]
    return [*made, _written(shape=(60, 40), most=128, storage="packed")]


def _serialized(model: ModelProto) -> bytes:
    return model.SerializeToString(deterministic=True)


def _levels(shape: tuple[int, ...], seed: int, most: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    kept = generator.random(shape) < 0.4
    return (generator.integers(-most, min(most, 127) + 1, shape) * kept).astype(np.int8)


def _tensors(shape: tuple[int, int], most: int) -> list[QuantTensor]:
    shapes = [shape, (5, shape[0])]
    return [
        QuantTensor(f"w{i}", _levels(of, i, most), Scale(np.float32(0.05 + i)))
        for i, of in enumerate(shapes)
    ]


def _float_model(shape: tuple[int, int], most: int = 3) -> tuple[ModelProto, list[QuantTensor]]:
    tensors = _tensors(shape, most)
    biases = [np.arange(len(tensor.levels), dtype=np.float32) for tensor in tensors]
    values = [numpy_helper.from_array(tensor.dequantize(), tensor.name) for tensor in tensors]
    values += [numpy_helper.from_array(bias, f"b{i}") for i, bias in enumerate(biases)]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], transB=1),
    ]
    return _model(nodes, values, shape[1]), tensors


def _model(nodes: list[NodeProto], values: list[TensorProto], inputs: int) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])
    graph = helper.make_graph(nodes, "g", [x], [y], values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _written(*, shape: tuple[int, int], most: int = 3, **options: Any) -> bytes:
    model, tensors = _float_model(shape, most)
    graph = FloatGraph.from_model(model)
    plan = make_plan(graph, match(graph.weights, tensors), **options)
    return _serialized(build(plan, metadata=METADATA).to_model())


def _foreign(style: str) -> ModelProto:
    model, tensors = _float_model((24, 16))
    graph = model.graph
    if style == "dequantized" or style == "branch":
        for tensor in tensors:
            _replace(graph, tensor.name, numpy_helper.from_array(tensor.levels, f"{tensor.name}.q"))
            graph.initializer.append(
                numpy_helper.from_array(np.array(tensor.meaning.step), f"{tensor.name}.s")
            )  # type: ignore[union-attr]
            made = helper.make_node(
                "DequantizeLinear", [f"{tensor.name}.q", f"{tensor.name}.s"], [tensor.name]
            )
            graph.node.insert(0, made)
    if style == "quantized":
        nodes = [
            helper.make_node("QuantizeLinear", ["w0", "s", "z"], ["q0"]),
            helper.make_node("DequantizeLinear", ["q0", "s", "z"], ["d0"]),
        ]
        graph.initializer.append(numpy_helper.from_array(np.float32(0.05), "s"))
        graph.initializer.append(numpy_helper.from_array(np.int8(0), "z"))
        graph.node[0].input[1] = "d0"
        for node in reversed(nodes):
            graph.node.insert(0, node)
    if style == "bn":
        names = ["scale", "shift", "mean", "variance"]
        graph.initializer.extend(
            numpy_helper.from_array(np.full(24, 0.5, np.float32), name) for name in names
        )
        graph.node[0].output[0] = "p"
        graph.node.insert(1, helper.make_node("BatchNormalization", ["p", *names], ["h"]))
    if style == "branch":
        last = graph.node.pop()
        inner = helper.make_graph([last], "inner", [], [graph.output[0]])
        graph.initializer.append(numpy_helper.from_array(np.array(True), "t"))
        graph.node.append(
            helper.make_node("If", ["t"], ["y"], then_branch=inner, else_branch=inner)
        )
    return model


def _replace(graph: Any, name: str, new: TensorProto) -> None:
    old = next(tensor for tensor in graph.initializer if tensor.name == name)
    graph.initializer.remove(old)
    graph.initializer.append(new)


# ---- changes ----


def mutate_model(data: bytes, random: Random) -> bytes:
    """One to three changes anywhere in the message; sometimes of its bytes."""
    if random.random() < 0.15:
        return mutate_bytes(data, random)
    model = onnx.load_model_from_string(data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kind = random.random()
        if kind < 0.25 and model.graph.initializer:
            mutate_tensor(random.choice(model.graph.initializer), random)
        elif kind < 0.6 and model.graph.node:
            mutate_node(random.choice(_all_nodes(model)), model, random)
        elif kind < 0.7 and model.graph.initializer:
            _sparse(model, random)
        else:
            _mutate_message(model, random)
    try:
        return model.SerializeToString()
    except Exception:  # a name that protobuf doesn't take
        return data


def _all_nodes(model: ModelProto) -> list[NodeProto]:
    nodes = list(model.graph.node)
    for node in list(nodes):
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    return nodes + [node for function in model.functions for node in function.node]


def mutate_tensor(tensor: TensorProto, random: Random) -> None:
    """Type, shape, data, name or place, each on its own."""
    kind = random.randrange(8)
    if kind == 0:
        tensor.data_type = random.choice((*range(24), 99, 2**31 - 1, -1))
    elif kind == 1 and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(SIGNED)
    elif kind == 2:
        tensor.dims[:] = random.choice(
            ([], [0], [1], [2**40, 2**40], [-1], [*tensor.dims, 1], list(tensor.dims)[::-1])
        )
    elif kind == 3:
        tensor.raw_data = mutate_bytes(tensor.raw_data, random)
    elif kind == 4 and tensor.int64_data:
        tensor.int64_data[random.randrange(len(tensor.int64_data))] = random.choice(SIGNED)
    elif kind == 5:
        tensor.name = random.choice(NAMES)
    elif kind == 6:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(
            key="location",
            value=random.choice(("input.onnx", "..", "x\0", "n" * 300, "/dev/zero", "")),
        )
    elif tensor.raw_data:
        at = random.randrange(len(tensor.raw_data))
        changed = bytearray(tensor.raw_data)
        changed[at] = random.choice(
            (0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ 1 << random.randrange(8))
        )
        tensor.raw_data = bytes(changed)


def mutate_node(node: NodeProto, model: ModelProto, random: Random) -> None:
    """Inputs, outputs, operator, attributes."""
    names = [
        *NAMES,
        *(name for other in model.graph.node for name in (*other.input, *other.output)),
    ]
    kind = random.randrange(8)
    if kind == 0:
        node.op_type = random.choice(OPERATORS)
    elif kind == 1:
        node.domain = random.choice(
            ("", "ai.onnx", "qx", "com.microsoft", "qonnx.custom_op.general", "nowhere")
        )
    elif kind in (2, 3) and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(names)
    elif kind == 4:
        del (node.input if random.random() < 0.5 else node.output)[random.randrange(2) :]
    elif kind == 5:
        node.input.append(random.choice(names))
    elif kind == 6 and node.output:
        node.output[random.randrange(len(node.output))] = random.choice(names)
    else:
        _mutate_attribute(node, random)


def _mutate_attribute(node: NodeProto, random: Random) -> None:
    if not node.attribute or random.random() < 0.3:
        name = random.choice(
            ("axis", "to", "perm", "transB", "group", "value", "alpha", "epsilon", "bits")
        )
        value = random.choice(
            (0, -1, 2**31 - 1, -(2**63), [1, 0], [7, -7], 0.5, float("nan"), "text", b"\xff")
        )
        node.attribute.append(helper.make_attribute(name, value))
        return
    attribute = random.choice(node.attribute)
    kind = random.randrange(4)
    if kind == 0:
        node.attribute.remove(attribute)
    elif kind == 1:
        attribute.i = random.choice((0, -1, 2, 99, 2**31 - 1, 2**63 - 1, -(2**63)))
    elif kind == 2:
        attribute.type = random.randrange(15)
    else:
        attribute.ints[:] = random.choice(([], [1], [1, 0], [0, 0], [-1, 5], [2**62]))


def _sparse(model: ModelProto, random: Random) -> None:
    """A tensor becomes a sparse one, with positions that may be anything."""
    tensor = random.choice(model.graph.initializer)
    positions = np.array(sorted(random.sample(range(64), 3)), np.int64)
    if random.random() < 0.5:
        positions[random.randrange(3)] = random.choice(SIGNED)
    values = TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=[3],
        raw_data=bytes(3 * random.choice((1, 4, 8))),
    )
    dims = random.choice((list(tensor.dims), [64], [2**20, 2**20], [-1], [2**31], []))
    model.graph.sparse_initializer.add(
        values=values, indices=numpy_helper.from_array(positions), dims=dims
    )
    if random.random() < 0.7:
        model.graph.initializer.remove(tensor)


def _mutate_message(message: Message, random: Random) -> None:
    """Some field, anywhere below, is lost, doubled or set to something extreme."""
    fields = message.ListFields()
    if not fields:
        return
    field, value = random.choice(fields)
    if field.message_type is not None:
        if field.is_repeated and random.random() < 0.3:
            _mutate_list(value, random)
        elif random.random() < 0.9:
            _mutate_message(random.choice(value) if field.is_repeated else value, random)
        else:
            message.ClearField(field.name)
        return
    new = _scalar(field, random)
    try:
        if field.is_repeated:
            value[random.randrange(len(value))] = new
        else:
            setattr(message, field.name, new)
    except (ValueError, TypeError):  # not of this field's range
        message.ClearField(field.name)


def _mutate_list(values: Any, random: Random) -> None:
    kind, at = random.randrange(3), random.randrange(len(values))
    if kind == 0:
        del values[at]
    elif kind == 1:
        values.add().CopyFrom(values[at])
    else:
        other = values[random.randrange(len(values))]
        copy = type(other)()
        copy.CopyFrom(other)
        values[at].CopyFrom(copy)


def _scalar(field: Any, random: Random) -> Any:
    if field.type == field.TYPE_STRING:
        return random.choice(NAMES)
    if field.type == field.TYPE_BYTES:
        return random.randbytes(random.randrange(20))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return random.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    return random.choice(INTEGERS)
