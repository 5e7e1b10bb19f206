"""Makes the integers that a graph reads as such out of stored levels, and reads them back.

`make_integers` writes one node: a Cast; a call of `Offset` where level 0 stands for another
integer; or a call of `Bytes` where a byte holds several levels, as MatMulNBits and
GatherBlockQuantized read them. All of them fold while loading.

    Offset (levels l, offset o)                        l + o
    Bytes (levels l, shape s, powers d, offset o)      Reshape(l, s) · d + o, over the last axis
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.dequantization.dequantization import Dequantization
from ecqx_onnx_converters.graph.graph import NARROW
from ecqx_onnx_converters.matching.digits import list_powers
from ecqx_onnx_converters.matching.matching import Integers
from ecqx_onnx_converters.storage import DOMAIN

OFFSET, BYTES = "Offset", "Bytes"
INTEGER_FUNCTIONS = (OFFSET, BYTES)


def make_integers(
    form: Integers, rank: int, *, levels: str, output: str, constant: str
) -> Dequantization:
    """Write the node for the integers of type form.type that the graph reads.

    Args:
        form: The type, the offset, and how many bits a level has.
        rank: Number of dimensions of the levels.
        levels: Name of the stored value.
        output: Name of the value that the graph reads.
        constant: Name of the offset.

    Returns:
        The node and its constants.
    """
    if form.digits == 1 and not form.offset:
        node = helper.make_node("Cast", [levels], [output], to=form.type)
        return Dequantization("none", node, ())
    offset = numpy_helper.from_array(np.array(form.offset, np.int32), constant)
    if form.digits == 1:
        node = helper.make_node(OFFSET, [levels, constant], [output], domain=DOMAIN, to=form.type)
        return Dequantization("none", node, (offset,), OFFSET)
    # What has one name in a file is written once.
    shape = numpy_helper.from_array(_make_shape(form, rank), f"ecqx.shape.{rank}.{form.bits}")
    powers = numpy_helper.from_array(list_powers(form), f"ecqx.powers.{form.bits}")
    inputs = [levels, shape.name, powers.name, constant]
    node = helper.make_node(BYTES, inputs, [output], domain=DOMAIN, to=form.type)
    return Dequantization("none", node, (shape, powers, offset), BYTES)


def read_integers(node: NodeProto, constants: Sequence[np.ndarray], rank: int) -> Integers:
    """Read what `make_integers` wrote.

    Args:
        node: Of a file.
        constants: The values of its inputs behind the first.
        rank: Number of dimensions of the levels.

    Returns:
        The type, the offset, and how many bits a level has.

    Raises:
        FileError: No such node is written by us.
    """
    element_type = 0
    for attribute in node.attribute:
        if attribute.name == "to":
            element_type = attribute.i
            break
    kind = (node.op_type, "" if node.domain == "ai.onnx" else node.domain)
    form = None
    if kind == ("Cast", ""):
        form = Integers(element_type)
    elif kind == (OFFSET, DOMAIN) and len(constants) == 1 and constants[0].size == 1:
        form = Integers(element_type, int(constants[0].reshape(())))
    elif kind == (BYTES, DOMAIN) and len(constants) == 3:
        form = _read_bytes(element_type, constants, rank)
    if form is None or element_type not in NARROW:
        raise FileError(
            f"the integers '{node.output[0]}' are made by {node.op_type} to type {element_type};"
            " the ONNX file is damaged"
        )
    return form


def _read_bytes(type: int, constants: Sequence[np.ndarray], rank: int) -> Integers | None:
    """What a call of `Bytes` makes; None if it is none that `make_integers` writes."""
    shape, powers, offset = constants
    if powers.shape not in ((2,), (4,)) or offset.shape != () or rank < 1:
        return None
    form = Integers(type, int(offset), 8 // len(powers))
    same_shape = np.array_equal(shape, _make_shape(form, rank))
    if not same_shape or not np.array_equal(powers, list_powers(form)):
        return None
    return form


def _make_shape(form: Integers, rank: int) -> np.ndarray:
    """int64: the levels' own, the last axis cut into bytes."""
    return np.array([*[0] * (rank - 1), -1, form.digits])


def make_integer_function(name: str, opset: int) -> FunctionProto:
    """Write the model-local function that `make_integers` calls.

    Args:
        name: One of INTEGER_FUNCTIONS.
        opset: Of the operators in it.

    Returns:
        The function.
    """
    cast = helper.make_node("Cast", ["sum"], ["integers"])
    cast.attribute.append(AttributeProto(name="to", ref_attr_name="to", type=AttributeProto.INT))
    if name == OFFSET:
        inputs = ["levels", "offset"]
        nodes = [
            helper.make_node("Cast", ["levels"], ["wide"], to=TensorProto.INT32),
            helper.make_node("Add", ["wide", "offset"], ["sum"]),
        ]
    else:
        inputs = ["levels", "shape", "powers", "offset"]
        nodes = [
            helper.make_node("Cast", ["levels"], ["narrow"], to=TensorProto.INT8),
            helper.make_node("Reshape", ["narrow", "shape"], ["digits"]),
            helper.make_node("MatMulInteger", ["digits", "powers"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["sum"]),
        ]
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, name, inputs, ["integers"], [*nodes, cast], imports, ["to"])
