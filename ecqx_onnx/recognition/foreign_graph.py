"""Load someone else's .onnx file as a graph that can be packed, or as one that can be run.

What onnxruntime takes is taken: unsorted nodes, missing imports. QONNX's operators are defined by
standard ones; functions in the domain of ours move to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ecqx_onnx_converters import FloatGraph
from ecqx_onnx_converters.foreign.qonnx import DOMAINS
from ecqx_onnx_converters.foreign.qonnx_functions import Definitions, define_operators
from ecqx_onnx_converters.graph.files import read_proto
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.graph.well_formed import complete_imports, free_domain, sort_nodes
from ecqx_onnx_converters.storage import DOMAIN
from google.protobuf.message import EncodeError
from onnx import ModelProto, NodeProto, helper

from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx

# Operators that draw random numbers, which two sessions would draw differently.
RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)


@dataclass(frozen=True, eq=False)
class ForeignGraph:
    """A model that somebody else wrote.

    Attributes:
        graph: In the form that the specification asks for.
        definitions: What became of QONNX's operators.
        notes: What a user of the packed file should know, a sentence each.
    """

    graph: FloatGraph
    definitions: Definitions
    notes: tuple[str, ...]


def load_foreign_graph(file: OnnxFile) -> ForeignGraph:
    """Load a model to pack it.

    Args:
        file: The model, checked.

    Returns:
        Its graph, which means the same.

    Raises:
        FileError: If it can't be read.
    """
    graph = FloatGraph.load(file.path)
    complete_imports(graph.proto)
    sort_nodes(graph.proto.graph)
    notes: tuple[str, ...] = ()
    renamed = free_domain(graph.proto, DOMAIN)
    if renamed is not None:
        notes = (f"its own functions of domain '{DOMAIN}' are in '{renamed}', beside ours",)
    return ForeignGraph(graph, define_operators(graph.proto), notes)


def seed_random(model: Path | bytes) -> Path | bytes:
    """Give each operator that draws random numbers a seed, so that a model says the same twice.

    Args:
        model: A path, or a model with all data in it.

    Returns:
        A copy in which the n-th such operator has seed n; the model itself where there is none, or
        where it is too large for a copy.
    """
    proto = ModelProto.FromString(model) if isinstance(model, bytes) else read_proto(model)
    if not _list_drawing(proto):
        return model
    try:
        if isinstance(model, Path):
            proto.CopyFrom(read_onnx(model).with_data())
        for number, node in enumerate(_list_drawing(proto), start=1):
            for index in reversed(range(len(node.attribute))):
                if node.attribute[index].name == "seed":
                    del node.attribute[index]
            seed = number if node.op_type == "Dropout" else float(number)
            node.attribute.append(helper.make_attribute("seed", seed))
        return proto.SerializeToString()
    except (EncodeError, ValueError):  # beyond the 2 GB of a protobuf
        return model


def _list_drawing(proto: ModelProto) -> list[NodeProto]:
    """Nodes that draw random numbers, in the order in which they stand."""
    found = []
    for scope in list_graphs(proto.graph):
        for node in scope.node:
            if node.op_type not in RANDOM or node.domain not in ("", "ai.onnx"):
                continue
            if node.op_type == "Dropout" and len(node.input) < 3:  # outside of training
                continue
            found.append(node)
    return found


def make_runnable(file: OnnxFile) -> Path | bytes:
    """Make what onnxruntime can run of a model, with QONNX's operators as they are defined.

    Args:
        file: The model, checked.

    Returns:
        Its path, where nothing is to be defined; else a model with all data in it.
    """
    domains: set[str] = set()
    for scope in list_graphs(file.proto.graph):
        domains.update(node.domain for node in scope.node)
    if domains.isdisjoint(DOMAINS):
        return file.path
    proto = ModelProto()
    proto.CopyFrom(file.with_data())
    complete_imports(proto)
    if not define_operators(proto).defined:
        return file.path
    try:
        return proto.SerializeToString()
    except (EncodeError, ValueError):  # beyond the 2 GB of a protobuf
        return file.path
