"""Runs a graph piece by piece, and keeps between two pieces what later nodes still read.

Rounding a network layer by layer needs the input of each layer in turn. Running from the beginning
each time would cost as many passes as there are layers; piece by piece, all of them cost one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ecqx_onnx_converters.graph.graph import FloatGraph, list_graphs, list_subgraphs
from onnx import ModelProto, NodeProto, helper

from ecqx_onnx.errors import ModelError
from ecqx_onnx.runtime.runner import Feeds, load_session, run_session


class Segments:
    """A position in a graph's nodes, and for each batch the values alive there."""

    def __init__(self, graph: FloatGraph, batches: Sequence[Feeds], *, threads: int = 1) -> None:
        """Stands before the first node.

        Args:
            graph: with all its weights; nodes of the main graph sorted, as ONNX asks for.
            batches: the model's inputs.
            threads: of onnxruntime.
        """
        self._graph = graph
        self._threads = threads
        self._initializers = {tensor.name: tensor for tensor in graph.proto.graph.initializer}
        self._reads = [set(_read_names(node)) for node in graph.proto.graph.node]
        self._last_read = self._find_last_reads()
        self.position = 0
        self.live: list[dict[str, np.ndarray]] = [dict(feeds) for feeds in batches]

    def _find_last_reads(self) -> dict[str, int]:
        last: dict[str, int] = {}
        for index, names in enumerate(self._reads):
            for name in names:
                last[name] = index
        return last

    @property
    def live_bytes(self) -> int:
        """Bytes of all values that are alive here."""
        total = 0
        for alive in self.live:
            total += sum(value.nbytes for value in alive.values())
        return total

    def advance(self, position: int, weights: Mapping[str, np.ndarray]) -> None:
        """Runs the nodes up to `position` with these values of changed weights.

        Args:
            position: index of a node of the main graph, the first that is not run; nothing happens
                where it was reached already.
            weights: initializer -> its values, for those that differ from the graph's own.
        """
        if position <= self.position:
            return
        kept = []
        for index in range(self.position, position):
            kept += [n for n in self._outputs(index) if self._last_read.get(n, -1) >= position]
        for batch, new in enumerate(self._run(self.position, position, kept, weights)):
            alive = self.live[batch]
            needed = {
                name: value
                for name, value in alive.items()
                if self._last_read.get(name, -1) >= position
            }
            self.live[batch] = {**needed, **new}
        self.position = position

    def peek(
        self, position: int, names: Sequence[str], weights: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Values that the nodes up to `position` make, for each batch, without going there.

        Args:
            position: index of the first node that is not run.
            names: of the values wanted.
            weights: initializer -> its values, for those that differ from the graph's own.

        Yields:
            For each batch, the values by name.
        """
        yield from self._run(self.position, position, names, weights)

    def _outputs(self, index: int) -> list[str]:
        return [name for name in self._graph.proto.graph.node[index].output if name]

    def _run(
        self, start: int, end: int, wanted: Sequence[str], weights: Mapping[str, np.ndarray]
    ) -> Iterator[dict[str, np.ndarray]]:
        if not wanted:
            yield from ({} for _ in self.live)
            return
        session = load_session(*self._model(start, end, wanted, weights), self._threads)
        inputs = [node.name for node in session.get_inputs()]
        for alive in self.live:
            feeds = {name: alive[name] for name in inputs}
            results = run_session(session, wanted, feeds)
            if not all(isinstance(value, np.ndarray) for value in results):
                raise ModelError("a value between two layers is no tensor, but a sequence or a map")
            yield dict(zip(wanted, results, strict=True))

    def _model(
        self, start: int, end: int, wanted: Sequence[str], weights: Mapping[str, np.ndarray]
    ) -> tuple[ModelProto, dict[str, np.ndarray]]:
        """The nodes from `start` to `end` as a model of their own, and its initializers' values."""
        whole = self._graph.proto
        nodes = whole.graph.node[start:end]
        read = set().union(*(self._reads[index] for index in range(start, end)))
        inputs = []
        for name, value in self.live[0].items():
            if name in read and name not in self._initializers:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                inputs.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
        outputs = [helper.make_empty_tensor_value_info(name) for name in wanted]
        graph = helper.make_graph(list(nodes), "segment", inputs, outputs)
        graph.initializer.extend(
            tensor for name, tensor in self._initializers.items() if name in read
        )
        model = helper.make_model(
            graph, opset_imports=whole.opset_import, functions=whole.functions
        )
        model.ir_version = whole.ir_version
        arrays = {name: values for name, values in self._graph.weights.items() if name in read}
        arrays |= {name: values for name, values in weights.items() if name in read}
        return model, arrays


def _read_names(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs read from outside among them."""
    yield from (name for name in node.input if name)
    for inner in list_subgraphs(node):
        for scope in list_graphs(inner):
            yield from (value.name for value in scope.output)
            for each in scope.node:
                yield from (name for name in each.input if name)
