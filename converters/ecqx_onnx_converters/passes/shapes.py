"""Fix the free size of the batch, so that a graph takes one sample at a time."""

from __future__ import annotations

from onnx import GraphProto


def fix_batch(graph: GraphProto) -> None:
    """Set the free length that leads the inputs to 1; other free lengths stay.

    Args:
        graph: its inputs and outputs are changed in place.
    """
    stored = {tensor.name for tensor in graph.initializer}
    leading = {
        value.type.tensor_type.shape.dim[0].dim_param
        for value in graph.input
        if value.name not in stored and value.type.tensor_type.shape.dim
    } - {""}
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in leading:
                dim.dim_value = 1  # of a oneof: the name goes
