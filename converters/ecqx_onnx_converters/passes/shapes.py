"""Fix the free size of the batch; find the shapes that no runtime infers by itself.

A graph may state the shapes of its inner values. Most of these a runtime infers; from the others it
knows which of its fused operators fit (onnxruntime's SkipLayerNormalization needs them), so that a
model without them is slower.
"""

from __future__ import annotations

import onnx
from onnx import GraphProto, ValueInfoProto

from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.opset_raising import REFUSALS, strip_weights

UNKNOWN = "unk__"  # how onnx's shape inference begins names of lengths that it does not know


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


def find_stated_shapes(graph: FloatGraph) -> tuple[ValueInfoProto, ...]:
    """Find the shapes of inner values that the graph states and that cannot be inferred.

    Args:
        graph: someone's; it isn't changed.

    Returns:
        Of the main graph's values those whose stated lengths, or names of lengths, onnx's shape
        inference does not find; none where it fails.
    """
    model = strip_weights(graph)
    stated = list(model.graph.value_info)
    if not stated:
        return ()
    del model.graph.value_info[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except REFUSALS:
        return ()
    known = {value.name: _list_lengths(value) for value in inferred.graph.value_info}
    listed = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    found = []
    for value in stated:
        lengths = _list_lengths(value)
        if value.name not in listed and lengths and lengths != known.get(value.name):
            found.append(ValueInfoProto(name=value.name, type=value.type))
    return tuple(found)


def _list_lengths(value: ValueInfoProto) -> list[int | str | None] | None:
    """Each length, its name where it is free, or None; None for a value without a shape."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    lengths: list[int | str | None] = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            lengths.append(dim.dim_value)
        elif dim.dim_param and not dim.dim_param.startswith(UNKNOWN):
            lengths.append(dim.dim_param)
        else:
            lengths.append(None)
    return lengths
