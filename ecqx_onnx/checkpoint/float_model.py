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
    """The checkpoint's graph with its weights as floats; None where that is more than a protobuf holds.

    floats: "float16" for parameters rounded as `convert` with this option rounds them.
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
    """The graph with its quantised weights in place."""
    placed = {weight.name: weight.dequantize() for weight in matching.found}
    return FloatGraph(graph.proto, {**graph.weights, **placed})
