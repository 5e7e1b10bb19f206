"""Runs a float ONNX graph in onnxruntime with weights that change from call to call.

The weights are inputs of the session instead of constants, so that one session serves every point
of a search: rounded weights are just other arrays. Any value of the main graph can be read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnxruntime
from ecqx_onnx_converters.graph.files import write_proto
from ecqx_onnx_converters.graph.graph import FloatGraph
from onnx import ModelProto, TensorProto, helper

from ecqx_onnx.errors import DataError, ModelError
from ecqx_onnx.runtime.sessions import PROVIDER, RUNTIME_ERRORS, run_within_time, shorten_reason

IN_ONE_FILE = 2**30  # bytes of weights; larger models keep them beside the file
Feeds = Mapping[str, np.ndarray]


class Batch(dict[str, np.ndarray]):
    """The inputs of one run by name. count: samples in it, which the first axis need not tell."""

    def __init__(self, arrays: Feeds, count: int) -> None:
        super().__init__(arrays)
        self.count = count


def batch_size(feeds: Feeds) -> int:
    """Samples in a batch: as it says, else the first axis of its inputs.

    Args:
        feeds: the inputs of one run by name, or a `Batch`.

    Returns:
        The number of samples, 1 where no input has an axis.
    """
    if isinstance(feeds, Batch):
        return feeds.count
    return max((len(array) for array in feeds.values() if array.ndim), default=1)


class Runner:
    """One session over a graph. `weights` are those given at each call, the graph's own otherwise.

    Attributes:
        inputs: the model's inputs, as onnxruntime describes them (name, shape, type).
        outputs: names of the model's outputs, in the graph's order.
    """

    def __init__(
        self,
        graph: FloatGraph,
        *,
        variable: Sequence[str] = (),
        values: Sequence[str] = (),
        threads: int = 1,
    ) -> None:
        """Loads the session.

        Args:
            graph: a float graph with all its weights.
            variable: initializers that calls may replace.
            values: activations of the main graph that calls may ask for, besides the outputs.
            threads: of onnxruntime, within one operator.
        Raises:
            ModelError: onnxruntime does not load the graph.
        """
        proto = ModelProto()
        proto.CopyFrom(graph.proto)
        self._own = {name: graph.weights[name] for name in variable}
        self.outputs = [value.name for value in proto.graph.output]
        _make_inputs(proto, graph, set(variable))
        known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
        for name in dict.fromkeys(values):
            if name not in known:
                value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
                proto.graph.output.append(value)
        self._given = {value.name for value in proto.graph.input}
        rest = {name: array for name, array in graph.weights.items() if name not in self._own}
        self._session = load_session(proto, rest, threads)
        self.inputs = [node for node in self._session.get_inputs() if node.name not in self._own]

    def run(
        self,
        feeds: Feeds,
        *,
        fetch: Sequence[str] | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """The values `fetch` (by default the model's outputs) for one batch.

        Args:
            feeds: the model's inputs by name.
            fetch: names of outputs, of activations named at construction, or of inputs.
            weights: float32 values of variable initializers, for those that are not as they were.

        Returns:
            One array for each name, in the order of `fetch`.

        Raises:
            DataError: the batch does not fit the model.
        """
        wanted = list(self.outputs if fetch is None else fetch)
        inside = [name for name in wanted if name not in feeds]
        everything = {**self._own, **(weights or {}), **feeds}
        # Values that nobody asked for in this call need not be computed.
        results = run_session(self._session, inside, everything, only_needed=True) if inside else []
        by_name = dict(zip(inside, results, strict=True))
        return [by_name[name] if name in by_name else feeds[name] for name in wanted]


def _make_inputs(proto: ModelProto, graph: FloatGraph, variable: set[str]) -> None:
    """Turns initializers into inputs of the model, and takes the other ones out of the inputs."""
    names = {tensor.name for tensor in proto.graph.initializer}
    for values in (proto.graph.initializer, proto.graph.input):
        for index in reversed(range(len(values))):
            listed = values is proto.graph.input and values[index].name in names
            if values[index].name in variable or listed:
                del values[index]
    for name in sorted(variable):
        shape = graph.weights[name].shape
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    # Shapes that inference finds anew; stale ones could contradict the values that are outputs now.
    proto.graph.ClearField("value_info")


def run_session(
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    feeds: Feeds,
    *,
    only_needed: bool = False,
) -> list[np.ndarray]:
    """Run a session of the float model on inputs that come from the user's data.

    Args:
        session: of onnxruntime.
        names: of the values wanted, in this order.
        feeds: the inputs by name.
        only_needed: leave out nodes that none of these values needs.

    Returns:
        One value for each name.

    Raises:
        DataError: the inputs don't fit, told in the runtime's words.
        ModelError: the run takes longer than any real model needs.
    """
    try:
        return run_within_time(session, list(names), feeds, only_needed=only_needed)
    except (*RUNTIME_ERRORS, ValueError, RuntimeError) as error:
        raise DataError(
            f"the float model does not run on the data: {shorten_reason(error)}"
        ) from None


def load_session(
    proto: ModelProto, weights: Mapping[str, np.ndarray], threads: int
) -> onnxruntime.InferenceSession:
    """A session with all optimizations. The proto is used up.

    Args:
        proto: a model whose initializers named in `weights` hold no data.
        weights: their values.
        threads: within one operator.

    Returns:
        A session on the CPU, ready to run.

    Raises:
        ModelError: onnxruntime does not load it.
    """
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = False  # what one large batch took would stay taken
    large = sum(array.nbytes for array in weights.values()) > IN_ONE_FILE
    with tempfile.TemporaryDirectory(prefix="ecqx-onnx-") as folder:
        path = Path(folder) / "float.onnx"
        write_proto(proto, weights, path, external=large)
        try:
            return onnxruntime.InferenceSession(str(path), settings, providers=[PROVIDER])
        except RUNTIME_ERRORS as error:
            raise ModelError(
                f"onnxruntime does not load the float model: {shorten_reason(error)}"
            ) from None


def trim_heap() -> None:
    """Gives memory that was freed back to the system; glibc keeps it for later otherwise.

    Other systems have no such call (macOS, musl), or no library of this process (Windows).
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
