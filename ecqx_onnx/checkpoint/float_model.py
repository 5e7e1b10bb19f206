"""The float ONNX model that a checkpoint stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.graph.files import PROTOBUF_LIMIT
from ecqx_onnx_converters.passes.sequence import list_passes
from ecqx_onnx_converters.passes.work import Work, apply_passes

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
    work = Work(checkpoint.graph, checkpoint.matching)
    work = apply_passes(list_passes(floats, emulate=True), work)
    whole = restore_float_weights(work)
    size = sum(values.nbytes for values in whole.weights.values())
    return None if size > PROTOBUF_LIMIT else whole.to_model().SerializeToString()


def restore_float_weights(work: Work) -> FloatGraph:
    """Put dequantized weights back into a graph.

    Args:
        work: a graph without the weights that are quantized, and these.

    Returns:
        The graph with all its weights as floats.
    """
    placed = {weight.name: weight.dequantize() for weight in work.matching.found}
    return FloatGraph(work.graph.proto, {**work.graph.weights, **placed})
