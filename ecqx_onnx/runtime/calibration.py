"""Measures the range of activations over calibration data, by onnxruntime's own calibrators.

onnxruntime's calibrators keep every activation of the data that they are fed in one go; here they
get one batch at a time and merge the ranges or histograms, so that memory does not grow with the
data.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "ORT_DISABLE_TELEMETRY", "1"
)  # 1.32 would write files of events into the user's cache at its import
import numpy as np
import onnxruntime
from ecqx_onnx_converters.graph.files import write_proto
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.graph.outputs import open_temporary_folder
from ecqx_onnx_converters.graph.uses import find_makers
from onnx import ModelProto, TensorProto, helper
from onnx.shape_inference import infer_shapes
from onnxruntime.capi import onnxruntime_pybind11_state as state
from onnxruntime.quantization import calibrate

from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.runtime.sessions import run_within_time

METHODS = ("minmax", "percentile", "entropy")
IN_ONE_FILE = 2**30  # bytes of weights; larger models keep them beside the file


def calibrate_ranges(
    graph: FloatGraph,
    values: Sequence[str],
    batches: Iterable[np.ndarray],
    *,
    method: str = "minmax",
) -> Mapping[str, tuple[float, float]]:
    """Measure the range of each value over the calibration data.

    Args:
        graph: a float graph of one input, with all its weights.
        values: names of the activations whose ranges are wanted; none gives an empty result.
        batches: float32 [N, ...], read once, one batch at a time.
        method: "minmax" (the extremes), "percentile" (without the outermost 0.001 %) or "entropy"
            (the range that loses least information).

    Returns:
        Value -> (lowest, highest), both finite.

    Raises:
        OptionError: there is no such method.
        DataError: the data hold no sample, or the graph does not take them.
        ModelError: an activation is not finite, or onnxruntime does not load or calibrate the
            model.
    """
    if method not in METHODS:
        raise OptionError(
            f"there is no calibration method '{method}'; choose one of {', '.join(METHODS)}"
        )
    if not values:
        return {}
    with open_temporary_folder() as folder, _silence_calibrators():
        calibrator = _make_calibrator(graph, values, method, folder)
        session = calibrator.infer_session
        for batch in batches:
            calibrator.collect_data(_Reader([session.feed(batch)]))
        if not session.batches:
            raise DataError(
                "the calibration data hold no sample; give some with --calibration DATA"
            )
        try:
            found = calibrator.compute_data()
        except (ValueError, MemoryError, OverflowError, IndexError) as error:
            raise ModelError(
                f"calibration by '{method}' fails on this model ({error}); use "
                "--calibration-method minmax"
            ) from error
        return {name: _read_bounds(name, found[name]) for name in values}


def measure_channel_peaks(
    graph: FloatGraph, values: Sequence[str], batches: Iterable[np.ndarray]
) -> Mapping[str, np.ndarray]:
    """Measure the largest magnitude of each channel of some values over the batches.

    Args:
        graph: a float graph of one input, with all its weights.
        values: names of activations of shape [N, C, ...].
        batches: float32 [N, ...]; not read if no values are asked for.

    Returns:
        Value -> float32 [C]; empty without data.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(_declare_value(name) for name in values if name not in known)
    peaks: dict[str, np.ndarray] = {}
    with _open_watched_session(proto, graph.weights) as session:
        names = [node.name for node in session.get_outputs()]
        for batch in batches if values else ():
            found = dict(zip(names, session.run(None, session.feed(batch)), strict=True))
            for name in values:
                peak = np.abs(found[name]).max(axis=(0, *range(2, found[name].ndim)), initial=0.0)
                peaks[name] = np.maximum(peaks[name], peak) if name in peaks else peak
    return peaks


@contextlib.contextmanager
def _open_watched_session(
    proto: ModelProto, weights: Mapping[str, np.ndarray]
) -> Iterator[_Watched]:
    """Runs the model as it is written."""
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with open_temporary_folder() as folder:
        path = folder / "float.onnx"
        write_proto(
            proto,
            weights,
            path,
            external=sum(weight.nbytes for weight in weights.values()) > IN_ONE_FILE,
        )
        try:
            yield _Watched(
                onnxruntime.InferenceSession(
                    str(path), settings, providers=["CPUExecutionProvider"]
                )
            )
        except RUNTIME_ERRORS as error:
            raise ModelError(
                f"onnxruntime does not run the float model: {_find_reason(error)}"
            ) from error


def find_ranges_by_value(
    graph: FloatGraph,
    inputs: Sequence[np.ndarray],
    seen: Mapping[str, np.ndarray],
    ranges: Mapping[str, tuple[float, float]],
) -> Mapping[str, tuple[float, float]]:
    """Find where a training's places are in its exported graph, by what is there for these inputs.

    Several names may have one place's value: a Reshape changes nothing of it, a Relu nothing of
    what is positive. A place may have none.

    Args:
        graph: the exported float graph.
        inputs: the arrays that both were run on, in the order of the graph's inputs.
        seen: place -> its value in PyTorch for these inputs.
        ranges: place -> its (lowest, highest).

    Returns:
        Name of a value in the graph -> the range of its place.
    """
    known = {place: _compute_signature(value) for place, value in seen.items()}
    found: dict[str, tuple[float, float]] = {}
    for name, value in _run_every_value(graph, inputs):
        mine = _compute_signature(value)
        for place, wanted in known.items():
            if mine[0] == wanted[0] and np.allclose(
                mine[1:], wanted[1:], rtol=1e-3, atol=1e-4 * wanted[1]
            ):
                found[name] = ranges[place]
                break
    return found


def _compute_signature(value: np.ndarray) -> tuple[float, ...]:
    """(entries, largest magnitude, lowest, highest, mean, root mean square): what a Reshape or
    Transpose leaves as it is."""
    x = value.astype(np.float64).reshape(-1)
    if not x.size:
        return (0.0,) * 6
    return (
        float(x.size),
        float(np.abs(x).max()),
        float(x.min()),
        float(x.max()),
        float(x.mean()),
        float(np.sqrt((x * x).mean())),
    )


def _run_every_value(
    graph: FloatGraph, inputs: Sequence[np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Each float32 value of the graph outside its inner graphs, for these inputs."""
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    known = {value.name for value in proto.graph.output}
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in infer_shapes(proto).graph.value_info
    }
    made = [
        name
        for name in find_makers(proto.graph.node)
        if name and kinds.get(name) == TensorProto.FLOAT
    ]
    proto.graph.output.extend(_declare_value(name) for name in made if name not in known)
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in stored]
    feeds = dict(zip(names, inputs, strict=True))
    with _open_watched_session(proto, graph.weights) as session:
        outputs = session.run(None, feeds)
    yield from feeds.items()
    yield from (
        (node.name, value) for node, value in zip(session.get_outputs(), outputs, strict=True)
    )


def _read_bounds(name: str, data: calibrate.TensorData) -> tuple[float, float]:
    low, high = (float(np.min(bound)) for bound in data.range_value)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ModelError(
            f"activation '{name}' ranges from {low} to {high} on the calibration data: mend the "
            "model or the data"
        )
    return low, high


def _make_calibrator(graph: FloatGraph, values: Sequence[str], method: str, folder: Path) -> Any:
    """One that looks at `values` only; a sum of each is an output besides, since sums of NaN are
    NaN while extremes skip it."""
    kinds = {
        "minmax": (calibrate.MinMaxCalibrater, {}),
        "percentile": (calibrate.PercentileCalibrater, {"symmetric": False}),
        "entropy": (calibrate.EntropyCalibrater, {}),
    }
    base, options = kinds[method]

    class Chosen(base):  # type: ignore[misc, valid-type]
        def select_tensors_to_calibrate(
            self, model: ModelProto
        ) -> tuple[list[str], dict[str, Any]]:
            return list(values), {name: _declare_value(name) for name in values}

        def create_inference_session(self) -> None:
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = (
                3  # the calibrators leave unused constants in the graph, of which it would warn
            )
            self.infer_session = _Watched(
                onnxruntime.InferenceSession(
                    self.augmented_model_path, settings, providers=["CPUExecutionProvider"]
                )
            )

    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    for index in reversed(
        [i for i, value in enumerate(proto.graph.value_info) if value.name in values]
    ):
        del proto.graph.value_info[index]
    proto.graph.value_info.extend(_declare_value(name) for name in values if name not in known)
    for name in values:
        proto.graph.node.append(helper.make_node("ReduceSum", [name], [name + SUM], keepdims=0))
        proto.graph.output.append(helper.make_tensor_value_info(name + SUM, TensorProto.FLOAT, []))
    external = sum(weight.nbytes for weight in graph.weights.values()) > IN_ONE_FILE
    write_proto(proto, graph.weights, folder / "float.onnx", external=external)
    augmented = str(folder / "augmented.onnx")
    calibrator = Chosen(
        folder / "float.onnx", None, augmented, use_external_data_format=external, **options
    )
    calibrator.augment_graph()
    try:
        calibrator.create_inference_session()
    except RUNTIME_ERRORS as error:
        raise ModelError(
            "onnxruntime does not load the float model, so that nothing can be calibrated: "
            f"{_find_reason(error)}"
        ) from error
    return calibrator


SUM = "/sum"


RUNTIME_ERRORS = (
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.NotImplemented,
    state.RuntimeException,
)


def _find_reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _declare_value(name: str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


class _Watched:
    """A session that refuses data it cannot take and results that are no numbers, in our words."""

    def __init__(self, session: Any) -> None:
        self.session, self.batches = session, 0
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def feed(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        inputs = self.session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(node.name for node in inputs)
            raise ModelError(
                f"the model takes {len(inputs)} inputs ({names}), and calibration data give one"
            )
        shape = inputs[0].shape
        fits = len(shape) == batch.ndim and all(
            not isinstance(wanted, int) or wanted == length
            for wanted, length in zip(shape, batch.shape, strict=True)
        )
        if not fits:
            wanted = ["any" if not isinstance(length, int) else length for length in shape]
            raise DataError(
                f"the model takes inputs of shape {wanted}, and the calibration data give "
                f"{list(batch.shape)};"
                " calibrate on data as the model was trained on"
            )
        return {inputs[0].name: batch}

    def run(
        self, names: Sequence[str] | None, inputs: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        try:
            outputs = run_within_time(self.session, names, inputs)
        except RUNTIME_ERRORS as error:
            raise DataError(
                f"the model does not run on the calibration data: {_find_reason(error)}"
            ) from error
        for node, value in zip(self.session.get_outputs(), outputs, strict=True):
            if node.name.endswith(SUM) and not np.isfinite(value).all():
                name = node.name.removesuffix(SUM)
                raise ModelError(
                    f"activation '{name}' holds NaN or infinity on the calibration data: mend the "
                    "model or the data"
                )
        self.batches += 1
        return outputs


class _Reader(calibrate.CalibrationDataReader):
    """One batch."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return self.feeds.pop() if self.feeds else None


@contextlib.contextmanager
def _silence_calibrators() -> Iterator[None]:
    """The calibrators print their progress and warn of what is caught above."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
