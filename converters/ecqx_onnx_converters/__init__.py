"""Writes small ONNX files, which stock onnxruntime runs, from float graphs and weight levels.

    graph = FloatGraph.from_model(model)  # structure and data apart, exporter metadata gone
    matching = match(graph.weights, tensors)  # where each QuantTensor sits
    plan = make_plan(graph, matching, target="onnxruntime")
    report = write(plan, "out.onnx")
    stored = read_weights("out.onnx")  # and back

Numpy and ONNX only: no torch, no onnxruntime.
"""

from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.matching.matching import GraphWeight, Matching, match
from ecqx_onnx_converters.planning.plan import Plan
from ecqx_onnx_converters.planning.planner import make_plan
from ecqx_onnx_converters.serialization.reading import StoredWeight, read_weights
from ecqx_onnx_converters.serialization.report import WriteReport
from ecqx_onnx_converters.serialization.writer import build, write
from ecqx_onnx_converters.targets import TARGETS, Target

__all__ = [
    "TARGETS",
    "FloatGraph",
    "GraphWeight",
    "Matching",
    "Plan",
    "StoredWeight",
    "Target",
    "WriteReport",
    "build",
    "make_plan",
    "match",
    "read_weights",
    "write",
]
