"""Decide how a standard DequantizeLinear may feed a weight's consumers, and edit the graph so.

onnxruntime >= 1.25 turns DequantizeLinear + MatMul, and + Gemm with transB=0, into MatMulNBits with
int8 activations: silently, with errors of percents. Conv and Gemm with transB=1 are left alone. A
table that is dequantised before a Gather is dequantised whole at every inference, so the integers
are gathered and then their rows dequantised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ecqx_onnx.tensors import QuantTensor, Scale
from ecqx_onnx_converters.graph.names import NameMaker
from ecqx_onnx_converters.graph.uses import Use, set_attribute
from ecqx_onnx_converters.refusal import Refusal

# Operator -> inputs at which a weight behind DequantizeLinear keeps its exact float arithmetic.
PLAIN = {"Conv": (1,), "ConvTranspose": (1,), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2)}


@dataclass(frozen=True)
class StandardForm:
    """How DequantizeLinear feeds a weight's consumers.

    Attributes:
        transposed: the float value has the transpose of the weight's layout, [out, in], for Gemm
            with transB=1.
        dense: some consumer reads the whole float value (false when only rows are gathered).
        integer: the consumers are integer kernels, which the runtime fuses with DequantizeLinear of
            INT8 with a zero point.
    """

    transposed: bool
    dense: bool
    integer: bool = False


def find_standard_form(
    tensor: QuantTensor, uses: Sequence[Use], *, is_output: bool = False
) -> StandardForm | Refusal:
    """Find how DequantizeLinear may feed all consumers of a weight with exact float arithmetic.

    Args:
        tensor: the weight in the graph's layout, with one step or a step along one axis.
        uses: its consumers.
        is_output: whether the weight is an output of the graph as well, which has its layout.

    Returns:
        The form, or why there is none.
    """
    kinds = [_classify_use(use) for use in uses]
    if is_output:
        kinds.append("plain")
    for kind in kinds:
        if isinstance(kind, Refusal):
            return kind
    axis = tensor.meaning.axis if isinstance(tensor.meaning, Scale) else None
    if "gather" in kinds and axis == 0:
        return Refusal(
            "rows of an embedding with one step each would need their steps gathered, too"
        )
    if "gemm" in kinds and axis == 1 - (find_output_axis(uses)):
        return Refusal(
            "the step varies along the inputs of a matrix product; onnxruntime is exact with a "
            "step along its outputs"
        )
    dense = {kind for kind in kinds if kind != "gather"}
    layouts = {
        kind == "gemm" and not read_attribute(use, "transB")
        for kind, use in zip(kinds, uses, strict=False)  # the output comes last, and is no use
        if kind != "gather"
    }
    if is_output:
        layouts.add(False)
    if len(layouts) > 1:
        return Refusal("it is wanted both as it is and transposed")
    if "gather" in kinds and True in layouts:
        return Refusal("its rows are gathered, and a product wants it transposed")
    return StandardForm(transposed=layouts == {True}, dense=bool(dense))


def read_attribute(use: Use, name: str) -> int:
    """Read a whole number among a consumer's attributes.

    Args:
        use: the consumer.
        name: of the attribute.

    Returns:
        Its value; 0 where it is absent.
    """
    return next((attribute.i for attribute in use.node.attribute if attribute.name == name), 0)


def find_output_axis(uses: Sequence[Use]) -> int:
    """Find the axis of a matrix along which its products' outputs lie.

    Args:
        uses: Gemm and MatMul nodes that read it.

    Returns:
        0 or 1.
    """
    if any(use.node.op_type == "Gemm" and read_attribute(use, "transB") for use in uses):
        return 0
    return 1


def _classify_use(use: Use) -> str | Refusal:
    """ "plain", "gemm" or "gather"."""
    operator, position = use.node.op_type, use.position
    if use.node.domain in ("", "ai.onnx"):
        if position in PLAIN.get(operator, ()):
            return "plain"
        if operator in ("Gemm", "MatMul") and position == 1:
            return "gemm"
        if operator == "Gather" and position == 0 and read_attribute(use, "axis") == 0:
            return "gather"
    return Refusal(
        f"its consumer {operator} isn't known to keep float arithmetic behind DequantizeLinear"
    )


def apply_standard(
    tensor: QuantTensor,
    uses: Sequence[Use],
    *,
    weight: str,
    levels: str,
    type: int,
    step: str,
    names: NameMaker,
) -> None:
    """Edit a weight's consumers in place, so that they read what DequantizeLinear makes.

    Args:
        tensor: the weight in the graph's layout.
        uses: its consumers.
        weight: name of the value that DequantizeLinear makes, [out, in] for products.
        levels: name of the integers.
        type: their TensorProto type.
        step: name of what dequantizes them.
        names: makes names that are free.
    """
    for use in uses:
        if use.node.op_type == "Gather":
            _gather_integers(use, levels, type, step, names)
        elif use.node.op_type == "Gemm":
            set_attribute(use.node, "transB", 1)
        elif use.node.op_type == "MatMul":
            _put_gemm_for_matmul(use, weight, tensor.shape, names)


def _gather_integers(use: Use, levels: str, type: int, step: str, names: NameMaker) -> None:
    """Gather integers, then Cast and Mul on the rows. No DequantizeLinear: onnxruntime 1.24 to 1.26
    carry it past a Reshape with a QuantizeLinear in between, to uint8, and negative levels become
    zero. step: (), or [columns]."""
    output, attributes = use.node.output[0], use.attributes
    before = []
    if type not in (
        TensorProto.INT8,
        TensorProto.UINT8,
    ):  # Gather takes no 4- and 2-bit types; this Cast folds at load
        before.append(helper.make_node("Cast", [levels], [names("g")], to=TensorProto.INT8))
        levels = before[0].output[0]
    rows, floats = names("g"), names("g")
    gather = helper.make_node("Gather", [levels, use.node.input[1]], [rows], **attributes)
    cast = helper.make_node("Cast", [rows], [floats], to=TensorProto.FLOAT)
    _replace_nodes(use, [*before, gather, cast, helper.make_node("Mul", [floats, step], [output])])


def _put_gemm_for_matmul(use: Use, weight: str, shape: tuple[int, ...], names: NameMaker) -> None:
    """MatMul(x, W) -> Reshape(Gemm(Reshape(x, [-1, in]), weight, transB=1), [x.shape[:-1], out]);
    weight: [out, in]."""
    inputs, outputs = shape
    x, y = use.node.input[0], use.node.output[0]
    flat, product, whole, leading, full = (names("m") for _ in range(5))
    constants = {key: names("c") for key in ("flat", "start", "end", "out")}
    values = {"flat": [-1, inputs], "start": [0], "end": [-1], "out": [outputs]}
    use.scope.initializer.extend(
        numpy_helper.from_array(np.array(values[key], np.int64), constants[key])
        for key in constants
    )
    nodes = [
        helper.make_node("Reshape", [x, constants["flat"]], [flat]),
        helper.make_node("Gemm", [flat, weight], [product], transB=1),
        helper.make_node("Shape", [x], [whole]),
        helper.make_node("Slice", [whole, constants["start"], constants["end"]], [leading]),
        helper.make_node("Concat", [leading, constants["out"]], [full], axis=0),
        helper.make_node("Reshape", [product, full], [y]),
    ]
    _replace_nodes(use, nodes)


def _replace_nodes(use: Use, nodes: Sequence[NodeProto]) -> None:
    """Puts the nodes where the consumer was; its own message becomes the last of them, so that
    other Uses of it stay valid."""
    position = next(
        index for index, node in enumerate(use.scope.node) if node is use.node or node == use.node
    )
    use.node.CopyFrom(nodes[-1])
    for offset, node in enumerate(nodes[:-1]):
        use.scope.node.insert(position + offset, node)
