"""The float ONNX model that a checkpoint stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecqx_onnx_converters import FloatGraph, Matching
from ecqx_onnx_converters.graph.files import PROTOBUF_LIMIT
from ecqx_onnx_converters.passes.batchnorm import fold_batchnorms
from ecqx_onnx_converters.passes.float16 import round_parameters, store_half_steps

if TYPE_CHECKING:
    from ecqx_onnx.checkpoint.checkpoint import Checkpoint


def make_float_model(checkpoint: Checkpoint, *, floats: str = "float32") -> bytes | None:
    """Make the float ONNX model that a checkpoint stands for.

    Args:
        checkpoint: of a quantized model.
        floats: "float32", or "float16" for parameters rounded as `convert` with this option rounds.

    Returns:
        A serialized ModelProto with dequantized weights; None where that is more than a protobuf
        holds.
    """
    graph, matching, _ = fold_batchnorms(checkpoint.graph, checkpoint.matching)
    if floats == "float16":
        matching, _ = store_half_steps(matching)
    whole = restore_float_weights(graph, matching)
    if floats == "float16":
        whole = round_parameters(whole, {weight.name for weight in matching.found})
    size = sum(values.nbytes for values in whole.weights.values())
    return None if size > PROTOBUF_LIMIT else whole.to_model().SerializeToString()


def restore_float_weights(graph: FloatGraph, matching: Matching) -> FloatGraph:
    """Put dequantized weights back into a graph.

    Args:
        graph: without the weights that are quantized.
        matching: these weights, each with its place in the graph.

    Returns:
        The graph with all its weights as floats.
    """
    placed = {weight.name: weight.dequantize() for weight in matching.found}
    return FloatGraph(graph.proto, {**graph.weights, **placed})
