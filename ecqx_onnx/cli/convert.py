"""The command `ecqx-onnx convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ecqx_onnx.cli.arguments import (
    Factory,
    Force,
    InputShape,
    Json,
    MaxDrop,
    MaxError,
    MinAgreement,
    Quiet,
    Strict,
    TrustPickle,
    make_argument,
    make_option,
)
from ecqx_onnx.cli.frame import emit, register_command, show_progress, suggest
from ecqx_onnx.options.convert import ConvertOptions
from ecqx_onnx.options.input_shape import parse_dynamic, parse_input_shape

if TYPE_CHECKING:
    from ecqx_onnx.validation.references.float_distance import FloatBounds


def _option(name: str, *, metavar: str | None = None) -> Any:
    return make_option(ConvertOptions, name, metavar=metavar)


@register_command
def convert(
    model: Annotated[Path, make_argument(ConvertOptions, "model")],
    out: Annotated[Path, make_argument(ConvertOptions, "out")],
    factory: Factory = None,
    input_shape: InputShape = None,
    dynamic: Annotated[list[str] | None, _option("dynamic", metavar="AXIS")] = None,
    bits: Annotated[int | None, _option("bits")] = None,
    bits_per_weight: Annotated[float | None, _option("bits_per_weight")] = None,
    entropy_weight: Annotated[float, _option("entropy_weight")] = 0.0,
    include: Annotated[list[str] | None, _option("include")] = None,
    exclude: Annotated[list[str] | None, _option("exclude")] = None,
    storage: Annotated[str, _option("storage")] = "auto",
    prefer: Annotated[str, _option("prefer")] = "auto",
    dequantize: Annotated[str, _option("dequantize")] = "auto",
    target: Annotated[str, _option("target")] = "onnxruntime",
    opset: Annotated[int | None, _option("opset")] = None,
    activations: Annotated[str, _option("activations")] = "float32",
    calibration: Annotated[str | None, _option("calibration", metavar="DATA")] = None,
    calibration_method: Annotated[str, _option("calibration_method")] = "minmax",
    calibration_samples: Annotated[int, _option("calibration_samples")] = 512,
    floats: Annotated[str, _option("floats")] = "float32",
    data: Annotated[str | None, _option("data")] = None,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    max_drop: MaxDrop = None,
    strict: Strict = True,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the .onnx file: integer weights, and the nodes that turn them into floats.

    Example:  ecqx-onnx convert lenet5.pt lenet5.onnx

    Without training:  ecqx-onnx convert fp32.pt small.onnx --model net.py:net --bits 4

    Any float .onnx:  ecqx-onnx convert float.onnx small.onnx --bits-per-weight 3
    """
    from ecqx_onnx import api

    with show_progress(quiet or as_json, "exporting the model and writing the file"):
        report = api.convert(
            model,
            out,
            factory=factory,
            input_shape=parse_input_shape(input_shape),
            dynamic=parse_dynamic(dynamic),
            bits=bits,
            bits_per_weight=bits_per_weight,
            entropy_weight=entropy_weight,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            storage=storage,
            prefer=prefer,
            dequantize=dequantize,
            target=target,
            opset=opset,
            activations=activations,
            calibration=calibration,
            calibration_method=calibration_method,
            calibration_samples=calibration_samples,
            floats=floats,
            data=data,
            float_bounds=make_float_bounds(min_agreement, max_error, max_drop),
            strict=strict,
            trust_pickle=trust_pickle,
            force=force,
        )
    emit(report, as_json=as_json, quiet=quiet)
    given = () if factory is None else ("--model", factory)
    following = ("validate", report.path, "--against", model, *given, "--data", data or "DATA")
    suggest(*following, as_json=as_json, quiet=quiet)


def make_float_bounds(
    min_agreement: float | None, max_error: float | None, max_drop: float | None
) -> FloatBounds | None:
    """Gather the bounds on the distance from the float model.

    Args:
        min_agreement: per cent of samples in the float model's class, or None.
        max_error: largest relative error of an output, or None.
        max_drop: points of accuracy that may be lost, or None.

    Returns:
        The bounds; None where none is given.
    """
    from ecqx_onnx.validation.references.float_distance import FloatBounds

    if min_agreement is None and max_error is None and max_drop is None:
        return None
    return FloatBounds(min_agreement, max_error, max_drop)
