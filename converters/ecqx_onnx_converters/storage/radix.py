"""int8 levels <-> bytes that hold as many digits of base n as fit, n being the number of levels from lowest to highest.

Five ternary weights share a byte (3^5 = 243), three of up to six levels (6^3 = 216), two of up to sixteen. With uint8 data and
operators of opset 13 only, it is smaller than INT2 for ternary weights, and reaches runtimes that lack INT4. The graph takes the
digits apart in a model-local function that folds away at load:

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
    """Largest m with base^m <= 256; at most 8."""
    return next(m for m in range(8, 0, -1) if base**m <= 256)


def encode(levels: np.ndarray, name: str) -> Stored:
    """levels: not empty. One uint8 initializer `name`_, and the node that makes `name` of it."""
    lowest, highest = int(levels.min()), int(levels.max())
    base = max(2, highest - lowest + 1)
    lowest = min(lowest, 128 - base)  # a tensor of nothing but 127 still has two digits, both int8
    count = count_digits_per_byte(base)
    powers = base ** np.arange(count)
    digits = np.zeros((-(-levels.size // count), count), np.uint8)
    digits.reshape(-1)[: levels.size] = (
        np.ascontiguousarray(levels).reshape(-1).astype(np.int16) - lowest
    )
    data = (digits @ powers.astype(np.uint16)).astype(np.uint8)
    tensor = TensorProto(
        name=name + "_", data_type=TensorProto.UINT8, dims=data.shape, raw_data=data.tobytes()
    )
    node = helper.make_node(FUNCTION, [tensor.name], [name], domain=DOMAIN)
    for key, values in (
        ("p", powers.tolist()),
        ("n", [base]),
        ("l", [lowest]),
        ("s", list(levels.shape)),
    ):
        node.attribute.append(AttributeProto(name=key, type=AttributeProto.INTS, ints=values))
    label = f"dense, {count} in a byte"
    return Stored(
        "dense",
        label,
        name,
        TensorProto.INT8,
        OPSET,
        initializers=(tensor,),
        nodes=(node,),
        functions=(make_function(),),
    )


def make_function() -> FunctionProto:
    """byte [k] -> int8 levels of shape s, from powers p, base n, lowest l."""
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
        ("Slice", "h z i", "j", {}),
        ("Reshape", "j s", "y", {}),
    )
    nodes += [
        helper.make_node(op, inputs.split(), [output], **attributes)
        for op, inputs, output, attributes in steps
    ]
    return helper.make_function(
        DOMAIN, FUNCTION, ["x"], ["y"], nodes, [helper.make_opsetid("", 18)], ["p", "n", "l", "s"]
    )


def is_digits(node: NodeProto | None) -> bool:
    return node is not None and node.op_type == FUNCTION and node.domain == DOMAIN


def decode(name: str, contents: Contents) -> np.ndarray:
    """int8 levels. FileError for attributes and data that `encode` doesn't write."""
    node = contents.makers[name]
    numbers = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    data = contents.initializers[node.input[0]]
    shape, powers = numbers.get("s", [-1]), numbers.get("p", [])
    base, lowest = (
        numbers.get(key, [0])[0] if len(numbers.get(key, [])) == 1 else 0 for key in "nl"
    )
    size = math.prod(shape)
    fits = (
        2 <= base <= 256
        and powers == [base**i for i in range(len(powers))]
        and len(powers) == count_digits_per_byte(base)
    )
    if (
        not fits
        or min(shape, default=0) < 0
        or not 0 < size <= MAX_WEIGHTS
        or not -128 <= lowest <= 128 - base
    ):
        raise FileError(
            f"the digits of integer tensor '{name}' are described by {numbers}; the ONNX file is damaged"
        )
    if data.data_type != TensorProto.UINT8 or len(data.raw_data) != -(-size // len(powers)):
        raise FileError(
            f"integer tensor '{name}' has {len(data.raw_data)} bytes for {size} weights; the ONNX file is damaged"
        )
    packed = np.frombuffer(data.raw_data, np.uint8).astype(np.int16)
    levels = np.empty((packed.size, len(powers)), np.int8)
    for position, power in enumerate(powers):
        levels[:, position] = packed // power % base + lowest
    return levels.reshape(-1)[:size].reshape(shape)


def stored_bytes(name: str, contents: Contents) -> int:
    node = contents.makers[name]
    return node.ByteSize() + contents.initializers[node.input[0]].ByteSize()
