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
from ecqx_onnx_converters.graph.graph import list_graphs
from ecqx_onnx_converters.graph.well_formed import complete_imports, free_domain, sort_nodes
from ecqx_onnx_converters.storage import DOMAIN
from google.protobuf.message import EncodeError
from onnx import ModelProto

from ecqx_onnx.inputs.onnx_file import OnnxFile


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
