"""A graph with quantized activations, put back on floats to measure its integer kernels against.

QuantizeLinear and DequantizeLinear go; what was bytes between them becomes floats. A Relu that the
quantization absorbed does not come back: onnxruntime fuses it into the operator before it, so that
it would cost nothing.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


def remove_quantization(model: ModelProto) -> ModelProto:
    """Put a model's activations on floats.

    Args:
        model: its weights are floats already, as in a DecodedModel; not changed.

    Returns:
        A copy; `model` itself where nothing in it is quantized.
    """
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        return model
    proto = ModelProto()
    proto.CopyFrom(model)
    source: dict[str, str] = {}  # value that goes -> value that it stands for
    kept: list[NodeProto] = []
    outputs = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        node.input[:] = [source.get(name, name) for name in node.input]
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            kept.append(node)
        elif node.output[0] in outputs:
            kept.append(helper.make_node("Identity", [node.input[0]], list(node.output)))
        else:
            source[node.output[0]] = node.input[0]
    copies = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
    _convert_constants_to_floats(proto, copies)
    return proto


def _convert_constants_to_floats(proto: ModelProto, nodes: list[NodeProto]) -> None:
    """Make floats of the bytes that remain, which are padding values and bounds of Clip.

    The time that these take does not depend on their values.
    """
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
    tensors = list(proto.graph.initializer)
    del proto.graph.initializer[:]
    for tensor in tensors:
        if tensor.data_type == TensorProto.UINT8 and tensor.name in read:
            tensor = numpy_helper.from_array(
                numpy_helper.to_array(tensor).astype(np.float32), tensor.name
            )
        if tensor.name in read:
            proto.graph.initializer.append(tensor)
