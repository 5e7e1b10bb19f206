"""Tells which uint8 tensors hold several integers in a byte, by the operators that read them.

    MatMulNBits(x, B, …)                 B: `bits` of 2, 4 or 8 (onnxruntime's own operator)
    GatherBlockQuantized(data, …)        data as uint8: `bits` of 4 or 8, along the last axis

Source: onnxruntime, docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from ecqx_onnx_converters.foreign.quantization_nodes import read_attribute
from ecqx_onnx_converters.graph.uses import Use
from ecqx_onnx_converters.refusal import Refusal

DOMAIN = "com.microsoft"
POSITIONS = {"MatMulNBits": 1, "GatherBlockQuantized": 0}  # operator -> position of the bytes
INTEGER_ACTIVATIONS = 4  # MatMulNBits' accuracy_level that computes with int8


def find_bits(tensor: TensorProto, uses: Sequence[Use]) -> int | Refusal:
    """Find how many bits each integer of a tensor has.

    Args:
        tensor: An initializer.
        uses: All that reads it.

    Returns:
        2 or 4 where all that reads a uint8 tensor takes several integers out of a byte; 8 for whole
        elements of the tensor's own type; or why the tensor has to lie in the file as it is.
    """
    found = set[int]()
    for use in uses:
        node = use.node
        bits = 8
        if node.domain == DOMAIN and POSITIONS.get(node.op_type) == use.position:
            bits = read_attribute(node, "bits", 4)
            level = read_attribute(node, "accuracy_level", 0)
            if node.op_type == "MatMulNBits" and level == INTEGER_ACTIVATIONS:
                return Refusal(
                    "its MatMulNBits has accuracy_level 4, which without optimisations computes"
                    " otherwise on integers that the graph makes"
                )
        found.add(bits)
    if tensor.data_type == TensorProto.UINT8 and found in ({2}, {4}):
        return found.pop()
    return 8
