"""Levels as digits: each byte holds as many digits of base n as fit, n being the number of levels.

Five ternary weights share a byte (3^5 = 243), three of up to six levels (6^3 = 216), two of up to
sixteen. With uint8 data and operators of opset 13 only, it is less than INT2 for ternary weights,
and reaches runtimes that lack INT4. The graph takes the digits apart in a model-local function that
folds away at load; with m digits to a byte,

    level_i = floor(byte[i div m] / n^(i mod m)) mod n + lowest
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.storage import DOMAIN, MAX_WEIGHTS, Contents, Stored

FUNCTION = "Digits"
OPSET = 13


def count_digits_per_byte(base: int) -> int:
    """Count the digits that a byte holds.

    Args:
        base: In [2, 256].

    Returns:
        The largest m <= 8 with base^m <= 256.
    """
    return next(m for m in range(8, 0, -1) if base**m <= 256)


def encode(levels: np.ndarray, name: str) -> Stored:
    """Encode one weight as a uint8 initializer `name`_, and the node that makes `name` of it.

    Args:
        levels: int8, any shape, not empty.
        name: What the integer tensor shall be called.

    Returns:
        Parts of a graph.
    """
    # 1. The base: one digit for each level from the lowest to the highest.
    lowest = int(levels.min())
    highest = int(levels.max())
    base = max(2, highest - lowest + 1)
    lowest = min(lowest, 128 - base)  # a tensor of nothing but 127 still has two digits, both int8
    # 2. The bytes: the first weight is the lowest digit.
    count = count_digits_per_byte(base)
    powers = base ** np.arange(count)
    digits = np.zeros((-(-levels.size // count), count), np.uint8)
    flat = np.ascontiguousarray(levels).reshape(-1).astype(np.int16)
    digits.reshape(-1)[: levels.size] = flat - lowest
    data = (digits @ powers.astype(np.uint16)).astype(np.uint8)
    # 3. The parts of the graph.
    tensor = TensorProto(
        name=name + "_", data_type=TensorProto.UINT8, dims=data.shape, raw_data=data.tobytes()
    )
    node = helper.make_node(FUNCTION, [tensor.name], [name], domain=DOMAIN)
    attributes = {"p": powers.tolist(), "n": [base], "l": [lowest], "s": list(levels.shape)}
    for key, values in attributes.items():
        node.attribute.append(AttributeProto(name=key, type=AttributeProto.INTS, ints=values))
    return Stored(
        storage="dense",
        label=f"dense, {count} in a byte",
        levels=name,
        type=TensorProto.INT8,
        opset=OPSET,
        initializers=(tensor,),
        nodes=(node,),
        functions=(_make_function(),),
    )


def _make_function() -> FunctionProto:
    """bytes x [k] -> int8 levels y of shape s; attributes: powers p, base n, lowest level l."""
    nodes = []
    for attribute in "pnls":
        nodes.append(helper.make_node("Constant", [], [attribute]))
        reference = AttributeProto(
            name="value_ints", ref_attr_name=attribute, type=AttributeProto.INTS
        )
        nodes[-1].attribute.append(reference)
    steps: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
        ("Constant", "", "a", {"value_ints": [-1]}),
        ("Constant", "", "z", {"value_ints": [0]}),
        ("Cast", "x", "b", {"to": TensorProto.INT64}),
        ("Unsqueeze", "b a", "c", {}),
        ("Div", "c p", "d", {}),
        ("Mod", "d n", "e", {}),
        ("Add", "e l", "f", {}),
        ("Cast", "f", "g", {"to": TensorProto.INT8}),
        ("Reshape", "g a", "h", {}),
        ("ReduceProd", "s", "i", {"keepdims": 1}),
        ("Slice", "h z i", "j", {}),  # less the digits that fill up the last byte
        ("Reshape", "j s", "y", {}),
    )
    for operator, inputs, output, attributes in steps:
        nodes.append(helper.make_node(operator, inputs.split(), [output], **attributes))
    imports = [helper.make_opsetid("", 18)]
    return helper.make_function(
        DOMAIN, FUNCTION, ["x"], ["y"], nodes, imports, ["p", "n", "l", "s"]
    )


def is_digits(node: NodeProto | None) -> bool:
    """Tell whether a node decodes digits.

    Args:
        node: The maker of an integer tensor; None where it has none.

    Returns:
        Whether the node calls this module's function.
    """
    return node is not None and node.op_type == FUNCTION and node.domain == DOMAIN


def decode(name: str, contents: Contents) -> np.ndarray:
    """Decode one weight.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        int8 levels in the weight's shape.

    Raises:
        FileError: Attributes or data are none that `encode` writes.
    """
    # 1. What the node says, trusting none of it.
    node = contents.makers[name]
    numbers = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    data = contents.initializers[node.input[0]]
    shape = numbers.get("s", [-1])
    powers = numbers.get("p", [])
    base = _read_single(numbers, "n")
    lowest = _read_single(numbers, "l")
    # 2. Whether it is what `encode` writes.
    size = math.prod(shape)
    powers_fit = (
        2 <= base <= 256
        and powers == [base**i for i in range(len(powers))]
        and len(powers) == count_digits_per_byte(base)
    )
    shape_fits = min(shape, default=0) >= 0 and 0 < size <= MAX_WEIGHTS
    if not powers_fit or not shape_fits or not -128 <= lowest <= 128 - base:
        raise FileError(
            f"the digits of integer tensor '{name}' are described by {numbers};"
            " the ONNX file is damaged"
        )
    if data.data_type != TensorProto.UINT8 or len(data.raw_data) != -(-size // len(powers)):
        raise FileError(
            f"integer tensor '{name}' has {len(data.raw_data)} bytes for {size} weights;"
            " the ONNX file is damaged"
        )
    # 3. The digits, one position of all bytes at a time.
    packed = np.frombuffer(data.raw_data, np.uint8).astype(np.int16)
    levels = np.empty((packed.size, len(powers)), np.int8)
    for position, power in enumerate(powers):
        levels[:, position] = packed // power % base + lowest
    return levels.reshape(-1)[:size].reshape(shape)


def _read_single(numbers: dict[str, list[int]], key: str) -> int:
    """The one number of an attribute; 0, which fits neither base nor power, if there is not one."""
    values = numbers.get(key, [])
    return values[0] if len(values) == 1 else 0


def stored_bytes(name: str, contents: Contents) -> int:
    """Count the bytes of a weight in a file.

    Args:
        name: The integer tensor's name.
        contents: The model that holds it.

    Returns:
        Bytes of the node and of the initializer that it reads.
    """
    node = contents.makers[name]
    return node.ByteSize() + contents.initializers[node.input[0]].ByteSize()
