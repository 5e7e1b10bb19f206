"""Write the nodes and constants that turn stored integers into the float weight.

`make_folded`: one node of a model-local function whose body is Cast and Mul, or Cast and Gather for
a codebook; runtimes inline it and fold it while loading, so inference runs at float speed.
`make_standard`: DequantizeLinear, which every tool knows and which onnxruntime recomputes at every
inference. `make_integer`: the same in front of an integer kernel. Where the graph reads integers
(QLinearConv, a foreign DequantizeLinear), see integers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.storage import DOMAIN

# Function name -> (inputs: levels, then constants; body). One letter a value: each is in every
# file. Codebook levels may be negative: Gather counts negative indices from the end, as Codebook
# does.
BODIES = {
    "Dequantize": ("ls", (("Cast", "l", "a"), ("Mul", "as", "w"))),
    "DequantizeHalf": (
        "ls",
        (("Cast", "l", "a"), ("Cast", "s", "b"), ("Mul", "ab", "w")),
    ),  # steps in float16
    "LookUp": ("lv", (("CastIndex", "l", "a"), ("Gather", "va", "w"))),
    "LookUpScaled": ("lvf", (("CastIndex", "l", "a"), ("Gather", "va", "b"), ("Mul", "bf", "w"))),
}


@dataclass(frozen=True, eq=False)
class Dequantization:
    """Constants and the one node that turns the integer tensor into the weight; `make_function` is
    the model-local function it calls.

    Attributes:
        form: "folded", "standard", "integer" (DequantizeLinear in front of an integer kernel) or
            "none" (the graph reads integers).
        before: nodes in front of that node.
    """

    form: str
    node: NodeProto
    initializers: tuple[TensorProto, ...]
    function: str | None = None
    before: tuple[NodeProto, ...] = ()


def make_folded(
    tensor: QuantTensor,
    *,
    levels: str,
    output: str,
    constant: str,
    factor: np.ndarray | None = None,
) -> Dequantization:
    """Call the model-local function that computes the weight, which runtimes fold while loading.

    Args:
        tensor: says what the levels stand for.
        levels: name of the integer value.
        output: name of the float value.
        constant: name of the step or the codebook; a factor's name is that with an f appended.
        factor: float32, multiplied onto a codebook's values.

    Returns:
        The call and its constants.
    """
    if isinstance(tensor.meaning, Scale):
        half = is_half(tensor.meaning.step)
        inputs, step = [constant], tensor.meaning.step.astype(np.float16 if half else np.float32)
        constants, name = (
            [numpy_helper.from_array(step, constant)],
            "DequantizeHalf" if half else "Dequantize",
        )
    else:
        inputs, constants = (
            [constant],
            [numpy_helper.from_array(tensor.meaning.values.astype(np.float32), constant)],
        )
        name = "LookUp"
        if factor is not None:
            name, inputs = "LookUpScaled", [constant, constant + "f"]
            constants.append(numpy_helper.from_array(factor.astype(np.float32), constant + "f"))
    return Dequantization(
        "folded",
        helper.make_node(name, [levels, *inputs], [output], domain=DOMAIN),
        tuple(constants),
        name,
    )


def is_half(steps: np.ndarray) -> bool:
    """Tell whether steps are stored as float16, since `passes/float16.py` has rounded them.

    Args:
        steps: float32, any shape.

    Returns:
        True if they are several, and all of them float16 numbers.
    """
    with np.errstate(over="ignore"):
        return steps.size > 1 and bool((steps.astype(np.float16) == steps).all())


def make_standard(
    tensor: QuantTensor, *, levels: str, output: str, constant: str
) -> Dequantization | Refusal:
    """Write a DequantizeLinear.

    Args:
        tensor: has one step, or one per index along one axis.
        levels: name of the integer value.
        output: name of the float value.
        constant: name of the step.

    Returns:
        The node and its step, or why there can be none.
    """
    refusal = refuse_standard(tensor)
    if refusal is not None:
        return refusal
    assert isinstance(tensor.meaning, Scale)  # narrowed by why_not_standard
    axis = tensor.meaning.axis
    step = numpy_helper.from_array(
        tensor.meaning.step.reshape(() if axis is None else (-1,)).astype(np.float32), constant
    )
    node = helper.make_node("DequantizeLinear", [levels, constant], [output])
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return Dequantization("standard", node, (step,))


def make_integer(
    tensor: QuantTensor, *, levels: str, type: int, output: str, constant: str
) -> Dequantization | Refusal:
    """Write a DequantizeLinear for an integer kernel.

    It reads INT8, since onnxruntime fuses no narrower type (a Cast in front folds at load), and has
    a zero point, without which QGemm fails at run time up to 1.27. Zero points of one shape have
    one name, so that a file needs them once.

    Args:
        tensor: has one step, or one per index along one axis.
        levels: name of the integer value.
        type: TensorProto type of the levels.
        output: name of the float value.
        constant: name of the step.

    Returns:
        The nodes and constants, or why there can be none.
    """
    made = make_standard(tensor, levels=levels, output=output, constant=constant)
    if isinstance(made, Refusal):
        return made
    dims = tuple(made.initializers[0].dims)
    zero = numpy_helper.from_array(
        np.zeros(dims, np.int8), "ecqx.zero" + "".join(f".{length}" for length in dims)
    )
    made.node.input.append(zero.name)
    cast = helper.make_node("Cast", [levels], [constant + "i"], to=TensorProto.INT8)
    if type == TensorProto.INT8:
        return Dequantization("integer", made.node, (*made.initializers, zero))
    made.node.input[0] = cast.output[0]
    return Dequantization("integer", made.node, (*made.initializers, zero), before=(cast,))


def refuse_standard(tensor: QuantTensor) -> Refusal | None:
    """Say why DequantizeLinear cannot compute a weight.

    Args:
        tensor: the weight.

    Returns:
        The reason; None if it can.
    """
    if isinstance(tensor.meaning, Codebook):
        return Refusal("a codebook isn't a uniform grid, which DequantizeLinear needs")
    if sum(length > 1 for length in tensor.meaning.step.shape) > 1:
        return Refusal(
            f"the step, of shape {list(tensor.meaning.step.shape)}, varies along more than the one "
            "axis of DequantizeLinear"
        )
    return None


def make_function(name: str, opset: int) -> FunctionProto:
    """Write a model-local function.

    Args:
        name: one of BODIES.
        opset: of the operators in it.

    Returns:
        The function.
    """
    inputs, body = BODIES[name]
    nodes = []
    for operation, sources, result in body:
        if operation.startswith("Cast"):
            to = TensorProto.INT32 if operation == "CastIndex" else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [sources], [result], to=to))
        else:
            nodes.append(helper.make_node(operation, list(sources), [result]))
    return helper.make_function(
        DOMAIN, name, list(inputs), ["w"], nodes, [helper.make_opsetid("", opset)]
    )


def read_meaning(
    node: NodeProto, constants: dict[str, np.ndarray], rank: int
) -> tuple[Scale | Codebook, np.ndarray | None]:
    """Read what `make_folded` or `make_standard` wrote.

    Args:
        node: of a file.
        constants: its values by name.
        rank: number of dimensions of the integer tensor.

    Returns:
        What the node's levels stand for, and the factor, or None.

    Raises:
        FileError: if the node reads no constants, or constants that do not fit.
    """
    missing = [
        name
        for name in node.input[1 : 2 if node.op_type == "DequantizeLinear" else None]
        if name not in constants
    ]
    if missing or len(node.input) < 2:
        raise FileError(
            f"the dequantisation of '{node.input[0]}' reads '{missing[:1] or node.op_type}', not a "
            "constant; the file is damaged"
        )
    first = constants[node.input[1]]
    if node.op_type == "DequantizeLinear":
        if first.ndim == 0:
            return Scale(first), None
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if first.ndim != 1 or not -rank <= axis < rank:
            raise FileError(
                f"the step of '{node.input[0]}' has shape {list(first.shape)} and axis {axis}; the "
                "file is damaged"
            )
        return Scale(
            first.reshape([-1 if dimension == axis % rank else 1 for dimension in range(rank)])
        ), None
    if node.op_type == "Mul":  # of an embedding's rows, whose columns may have steps of their own
        return Scale(first.reshape((*(1,) * (rank - 1), -1)) if first.ndim else first), None
    if node.op_type in ("Dequantize", "DequantizeHalf"):
        return Scale(first), None
    return Codebook(first), constants[node.input[2]] if node.op_type == "LookUpScaled" else None
