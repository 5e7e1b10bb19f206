"""onnxruntime's own tools for phones: the .ort converter and the usability checker."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from ecqx_onnx_converters.graph.outputs import open_temporary_folder

from ecqx_onnx.errors import ModelError
from ecqx_onnx.runtime.sessions import RUNTIME_ERRORS, shorten_reason


def convert_to_ort(source: Path, folder: Path) -> None:
    """Write a model in onnxruntime's own format.

    Args:
        source: the .onnx file.
        folder: where the .ort file and the list of its operators go.

    Raises:
        ModelError: the converter does not take it.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import (
        OptimizationStyle,
        convert_onnx_models_to_ort,
    )

    with _silence_tools():
        try:
            convert_onnx_models_to_ort(
                source,
                folder,
                [OptimizationStyle.Fixed],
                target_platform="arm",
                enable_type_reduction=True,
            )
        except (
            *RUNTIME_ERRORS,
            KeyError,
            ValueError,
            RuntimeError,
        ) as error:  # KeyError: of a type that .ort files cannot have
            if isinstance(error, KeyError):
                what = f"its converter has no entry for {error}"
            else:
                what = shorten_reason(error)
            raise ModelError(
                f"{source.stem}.ort was not written: onnxruntime does not convert it: {what}"
            ) from None


def note_accelerators(path: Path, accelerators: Sequence[str]) -> tuple[str, ...]:
    """Ask onnxruntime's usability checker about a graph, as accelerators meet it.

    They see it with its weights folded, and in float.

    Args:
        path: the .onnx file.
        accelerators: of "NNAPI", "CoreML NeuralNetwork" and "CoreML MLProgram".

    Returns:
        One sentence for each.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    checkers = {
        "NNAPI": usability_checker.check_nnapi_partitions,
        "CoreML NeuralNetwork": lambda model, fixed: usability_checker.check_coreml_partitions(
            model, fixed, "coreml_supported_neuralnetwork_ops.md"
        ),
        "CoreML MLProgram": lambda model, fixed: usability_checker.check_coreml_partitions(
            model, fixed, "coreml_supported_mlprogram_ops.md"
        ),
    }
    with open_temporary_folder() as folder, _silence_tools():
        optimized = folder / "model.onnx"
        optimize_model(path, optimized, use_external_initializers=True)
        model: onnx.ModelProto = ModelProtoWithShapeInfo(optimized).model_with_shape_info
        found = {name: checkers[name](model, True) for name in accelerators}
    notes = []
    for name, info in found.items():
        share = (
            f"{info.num_supported_nodes} of {info.num_nodes} nodes in {info.num_partitions} part(s)"
        )
        if info.unsupported_ops:
            lacks = f"; it lacks {', '.join(sorted(info.unsupported_ops))}"
        else:
            lacks = ""
        notes.append(
            f"usability checker of onnxruntime: {name} {info.suitability().name}, {share}{lacks}"
        )
    return tuple(notes)


@contextlib.contextmanager
def _silence_tools() -> Iterator[None]:
    """Keep the tools' progress, which they print and log, off the terminal.

    One of them also leaves a file to the garbage collector, of which Python would warn.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logging.disable(before)
