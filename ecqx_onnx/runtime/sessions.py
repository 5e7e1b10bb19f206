"""Sessions of onnxruntime: loading a model, running it, its load time, and which operators ran."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # 1.32 would write files of events into the user's cache at its import
import onnxruntime
from ecqx_onnx_converters.graph.outputs import open_temporary_folder
from onnxruntime.capi import onnxruntime_pybind11_state as state

from ecqx_onnx.errors import CheckFailed, DataError, FileError, ModelError
from ecqx_onnx.runtime import watchdog
from ecqx_onnx.runtime.random_values import draw_values, names_lengths

Session = onnxruntime.InferenceSession
Level = Literal["all", "disabled"]
LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
MOST_VALUES = 1 << 27  # of an input that is made up
RUNTIME_ERRORS = (
    MemoryError,  # the runtime's bad_alloc
    state.EPFail,
    state.EngineError,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
)
SOURCE_LOCATION = re.compile(
    r"\S+\.(?:h|cc|cpp):\d+ [^()]*\([^()]*\)(?: const)? ?"
)  # file, line and C++ signature
PROVIDER = "CPUExecutionProvider"
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(string)": np.object_,
    "tensor(bool)": np.bool_,
}


def describe_runtime() -> str:
    """Say which runtime runs here, for reports.

    Returns:
        Its name, version and execution provider.
    """
    return f"onnxruntime {onnxruntime.__version__}, {PROVIDER}"


def open_session(
    model: Path | bytes, *, level: Level = "all", threads: int = 0, profile: Path | None = None
) -> onnxruntime.InferenceSession:
    """Load a model into onnxruntime, on the CPU.

    Args:
        model: path of an .onnx file, or its bytes.
        level: of the graph optimizations, a key of `LEVELS`.
        threads: within one operator; 0 leaves the choice to the runtime.
        profile: prefix of the file that the runtime writes its profile to; None for no profile.

    Returns:
        The session.

    Raises:
        CheckFailed: onnxruntime does not take the model, with its own reason.
        ModelError: loading takes longer than any real model needs.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = threads
    options.log_severity_level = (
        4  # its messages reach us as exceptions; only fatal ones may go to stderr
    )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    source = model if isinstance(model, bytes) else str(model)

    def cancel() -> None:
        options.set_load_cancellation_flag(True)

    try:
        with watchdog.limit_time("loading the model", watchdog.LONGEST_LOAD, cancel):
            return onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
    except RUNTIME_ERRORS as error:
        raise CheckFailed(
            f"onnxruntime {onnxruntime.__version__} does not load it: {shorten_reason(error)}"
        ) from None


def run(
    session: onnxruntime.InferenceSession, inputs: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Run a session on inputs that fit it.

    Args:
        session: a loaded session of onnxruntime.
        inputs: arrays in the order of the graph's inputs.

    Returns:
        All outputs, in the graph's order.

    Raises:
        CheckFailed: the runtime fails on inputs that fit.
        ModelError: it takes too long, or an output is no tensor.
    """
    names = [node.name for node in session.get_inputs()]
    for node in session.get_outputs():
        if node.type.startswith("tensor(") and node.type not in NUMPY_TYPES:
            raise ModelError(
                f"output '{node.name}' is a {node.type}, which numpy has not: it can't be compared"
            )
    try:
        outputs = run_within_time(session, None, dict(zip(names, inputs, strict=True)))
    except RUNTIME_ERRORS as error:
        raise CheckFailed(
            f"onnxruntime {onnxruntime.__version__} fails while running it: {shorten_reason(error)}"
        ) from None
    found = []
    for node, output in zip(session.get_outputs(), outputs, strict=True):
        array = _make_array(output)
        if array is None:
            raise ModelError(f"output '{node.name}' is a {node.type}, which can't be compared")
        found.append(array)
    return tuple(found)


def _make_array(output: Any) -> np.ndarray | None:
    """An output as one array: tensors of a sequence one after the other, the values of a map by its
    keys; None for anything else."""
    if isinstance(output, np.ndarray):
        return output
    if isinstance(output, dict):
        return np.array([output[key] for key in sorted(output, key=str)])
    if not isinstance(output, list):
        return None
    parts = [_make_array(part) for part in output]
    if not all(isinstance(part, np.ndarray) for part in parts):
        return None
    arrays = [part for part in parts if part is not None]
    if len({array.shape for array in arrays}) == 1:
        return np.stack(arrays)
    flat = [array.reshape(-1) for array in arrays]
    return np.concatenate(flat) if flat else np.zeros(0, np.float32)


def run_within_time(
    session: onnxruntime.InferenceSession,
    names: Sequence[str] | None,
    feeds: Mapping[str, np.ndarray],
    *,
    only_needed: bool = False,
) -> list[Any]:
    """Run a session as onnxruntime does, but no longer than any real model needs.

    Args:
        session: of onnxruntime.
        names: of the outputs that are wanted, in this order; None for all.
        feeds: the inputs by name.
        only_needed: leave out nodes that none of these outputs needs.

    Returns:
        The outputs: arrays, but for models whose outputs are sequences or maps.

    Raises:
        ModelError: after `watchdog.LONGEST_RUN` seconds.
    """
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = only_needed
    options.log_severity_level = 4  # the runtime's own words reach us as exceptions

    def stop() -> None:
        options.terminate = True

    with watchdog.limit_time("running the model", watchdog.LONGEST_RUN, stop):
        found: list[Any] = session.run(names, dict(feeds), options)
        return found


def shorten_reason(error: Exception) -> str:
    """The runtime's message without its prefixes and line breaks, at most 300 characters.

    Args:
        error: raised by onnxruntime.

    Returns:
        One line.
    """
    text = " ".join(str(error).split())
    text = text.rsplit("[ONNXRuntimeError] : ", 1)[-1].split(" : ", 2)[-1]
    text = SOURCE_LOCATION.sub("", text)
    return text if len(text) <= 300 else text[:297] + "..."


def fit_inputs(
    session: onnxruntime.InferenceSession, inputs: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Bring inputs to the types that the graph declares.

    Args:
        session: a loaded session of onnxruntime.
        inputs: arrays in the order of the graph's inputs.

    Returns:
        The same arrays, contiguous, each in its input's type.

    Raises:
        DataError: their count, a shape or the kind of number does not fit.
        ModelError: an input has a type that no array can feed.
    """
    nodes = session.get_inputs()
    if len(nodes) != len(inputs):
        names = ", ".join(node.name for node in nodes)
        raise DataError(
            f"the model takes {len(nodes)} inputs ({names}), but the data set gives {len(inputs)}"
        )
    return tuple(_fit_one(node, array) for node, array in zip(nodes, inputs, strict=True))


def _fit_one(node: onnxruntime.NodeArg, array: np.ndarray) -> np.ndarray:
    dtype = NUMPY_TYPES.get(node.type)
    if dtype is None:
        raise ModelError(f"input '{node.name}' has type {node.type}, which validation cannot feed")
    wanted = [length if isinstance(length, int) else None for length in node.shape]
    fits = len(wanted) == array.ndim and all(
        w in (None, n) for w, n in zip(wanted, array.shape, strict=True)
    )
    if not fits:
        raise DataError(
            f"input '{node.name}' has shape {node.shape}, but the data set gives "
            f"{list(array.shape)}; give data of that shape"
        )
    if np.issubdtype(array.dtype, np.floating) and not np.issubdtype(dtype, np.floating):
        raise DataError(
            f"input '{node.name}' takes {node.type}, but the data set gives {array.dtype}"
        )
    return np.ascontiguousarray(array, dtype=dtype)


def find_fixed_batch(session: onnxruntime.InferenceSession) -> int | None:
    """Find the batch size that the graph insists on.

    Args:
        session: a loaded session of onnxruntime.

    Returns:
        The first length of its inputs; None if that is free, or differs between inputs.
    """
    lengths = {
        node.shape[0]
        for node in session.get_inputs()
        if node.shape and isinstance(node.shape[0], int)
    }
    return lengths.pop() if len(lengths) == 1 else None


def make_synthetic_inputs(
    session: onnxruntime.InferenceSession,
    *,
    batch: int = 1,
    free: int = 1,
    seed: int = 0,
    bounds: Mapping[str, int] | None = None,
) -> tuple[np.ndarray, ...]:
    """Make random inputs for a model: normal floats, integers in range, masks of padded rows.

    Args:
        session: a loaded session of onnxruntime.
        batch: length of a first axis that the graph leaves free, and of all that have its name.
        free: length of any other axis that it leaves free; a sum of names is as long as these.
        seed: of the generator.
        bounds: what integers have to stay below, by input (see `find_index_bounds`).

    Returns:
        One array for each input, in the declared type.

    Raises:
        ModelError: an input has a type that no array can feed, or more than MOST_VALUES values.
    """
    generator = np.random.default_rng(seed)
    arrays: list[np.ndarray] = []
    shapes = _choose_shapes(session, batch=batch, free=free)
    for node, shape in zip(session.get_inputs(), shapes, strict=True):
        dtype = NUMPY_TYPES.get(node.type)
        if dtype is None:
            raise ModelError(
                f"input '{node.name}' has type {node.type}, which validation cannot feed"
            )
        if math.prod(shape) > MOST_VALUES:
            raise ModelError(
                f"input '{node.name}' has the shape {node.shape}, more than {MOST_VALUES} values: "
                "give real ones"
            )
        bound = (bounds or {}).get(node.name)
        length = None
        if names_lengths(node.name):
            length = _find_counted_length(session, shapes, node.name)
        values = draw_values(node.name, dtype, shape, generator, bound=bound, length=length)
        arrays.append(values)
    return tuple(arrays)


def _choose_shapes(
    session: onnxruntime.InferenceSession, *, batch: int, free: int
) -> list[list[int]]:
    """One shape for each input; axes of one name have one length, wherever they are."""
    nodes = session.get_inputs()
    firsts = {node.shape[0] for node in nodes if node.shape and isinstance(node.shape[0], str)}
    shapes = []
    for node in nodes:
        shape = []
        for axis, length in enumerate(node.shape):
            if isinstance(length, int):
                shape.append(length)
            elif isinstance(length, str) and length:
                shape.append(_resolve_length(length, firsts, batch=batch, free=free))
            else:
                shape.append(batch if axis == 0 else free)
        shapes.append(shape)
    return shapes


def _resolve_length(name: str, firsts: set[str], *, batch: int, free: int) -> int:
    """Of an axis that is named, or is a sum of names and numbers ("past + sequence")."""
    total = 0
    for part in name.split("+"):
        part = part.strip(" ()")
        if part.isdigit() and len(part) < 6:
            total += int(part)
        else:
            total += batch if part in firsts else free
    return total


def _find_counted_length(
    session: onnxruntime.InferenceSession, shapes: Sequence[Sequence[int]], name: str
) -> int | None:
    """How long the sequences are whose lengths an input holds: those of the input whose name it
    begins with, else of the first with a free axis beside the batch."""
    found: list[tuple[bool, int]] = []
    for node, shape in zip(session.get_inputs(), shapes, strict=True):
        if node.name == name or len(shape) < 2:
            continue
        axes = [axis for axis in range(1, len(shape)) if not isinstance(node.shape[axis], int)]
        if axes:
            found.append((name.startswith(node.name.rstrip("s")), shape[axes[0]]))
        else:
            found.append((False, shape[-1]))
    named = [length for is_named, length in found if is_named]
    if named:
        return named[0]
    return found[0][1] if found else None


def measure_load_seconds(model: Path | bytes, *, repeats: int = 3) -> float:
    """Measure the time from file to ready session, with one thread and all optimizations.

    Args:
        model: path of an .onnx file, or its bytes.
        repeats: how often it is loaded, at least 1.

    Returns:
        The median, in seconds.
    """
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        open_session(model, threads=1)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def count_executed_operators(model: Path | bytes, inputs: Sequence[np.ndarray]) -> Counter[str]:
    """Count how often each operator ran in one inference, by the runtime's own profile.

    Args:
        model: path of an .onnx file, or its bytes.
        inputs: arrays that fit, in the order of the graph's inputs.

    Returns:
        Operator type -> how often it ran, after all optimizations.

    Raises:
        FileError: the profile cannot be read, where the runtime had no room to write it.
        CheckFailed: onnxruntime does not load or run the model.
    """
    with open_temporary_folder() as folder:
        session = open_session(model, threads=1, profile=folder / "profile")
        run(session, inputs)
        profile = Path(session.end_profiling())
        try:
            events = json.loads(profile.read_text(encoding="utf-8"))
        except (
            OSError,
            ValueError,
        ) as error:  # onnxruntime does not tell that it could not write all of it
            raise FileError(
                f"cannot read the profile that onnxruntime wrote to '{profile}' ({error}); free "
                "some space there"
            ) from error
    return Counter(
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["args"].get("op_name")
    )
