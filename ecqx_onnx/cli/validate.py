"""The command `ecqx-onnx validate`: on this machine or on devices, or of the file in itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ecqx_onnx.cli.arguments import (
    Factory,
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
from ecqx_onnx.cli.convert import make_float_bounds
from ecqx_onnx.cli.frame import emit, register_command, show_progress
from ecqx_onnx.errors import CheckFailed, InputError, OptionError
from ecqx_onnx.options.input_shape import parse_input_shape
from ecqx_onnx.options.validate import ValidateOptions

if TYPE_CHECKING:
    from ecqx_onnx.validation.devices import DeviceTable


def _option(name: str) -> Any:
    return make_option(ValidateOptions, name)


@register_command
def validate(
    onnx_file: Annotated[Path, make_argument(ValidateOptions, "onnx_file", metavar="FILE.onnx")],
    against: Annotated[Path | None, _option("against")] = None,
    data: Annotated[str | None, _option("data")] = None,
    inputs: Annotated[Path | None, _option("inputs")] = None,
    factory: Factory = None,
    input_shape: InputShape = None,
    samples: Annotated[int | None, _option("samples")] = None,
    batch_size: Annotated[int, _option("batch_size")] = 64,
    device: Annotated[list[str] | None, _option("device")] = None,
    time_limit: Annotated[float, _option("time_limit")] = 1800.0,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    max_drop: MaxDrop = None,
    bisect: Annotated[bool, _option("bisect")] = False,
    strict: Strict = True,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that an .onnx file says the same as PyTorch, or as the .onnx file it was packed from.

    Exit status 1 if not.

    Example:  ecqx-onnx validate lenet5.onnx --against lenet5.pt --data mnist.npz

    On devices:  ecqx-onnx validate lenet5.onnx --against lenet5.pt --device local --device web

    Of a packed file:  ecqx-onnx validate packed.onnx --against model-int8.onnx

    Is a file whole, by its own checksums:  ecqx-onnx validate lenet5.onnx
    """
    from ecqx_onnx import api

    if device and bisect:
        raise OptionError("--bisect looks inside on this machine: leave --device out")
    if device and inputs is not None:
        raise OptionError(
            "--inputs are for a validation against an .onnx file, on this machine: leave --device"
            " out"
        )
    if against is None and data is None and not device and not bisect:
        emit_report(
            check_whole_file(onnx_file, inputs=inputs, factory=factory),
            as_json=as_json,
            quiet=quiet,
        )
        return
    options: dict[str, Any] = {
        "against": against,
        "data": data,
        "factory": factory,
        "input_shape": parse_input_shape(input_shape),
        "samples": samples,
        "float_bounds": make_float_bounds(min_agreement, max_error, max_drop),
        "strict": strict,
        "batch_size": batch_size,
        "trust_pickle": trust_pickle,
    }
    if device:
        with show_progress(quiet or as_json, "making the job for the devices") as progress:
            table = api.validate_on(
                device, onnx_file, **options, time_limit=time_limit, progress=progress
            )
        emit_devices(table, as_json=as_json, quiet=quiet)
        return
    from ecqx_onnx.validation.equivalence import load_inputs

    arrays = None if inputs is None else load_inputs(inputs)
    with show_progress(quiet or as_json, "loading the file and the model") as progress:
        report = api.validate(onnx_file, **options, inputs=arrays, bisect=bisect, progress=progress)
    emit_report(report, as_json=as_json, quiet=quiet)


def check_whole_file(onnx_file: Path, *, inputs: Path | None, factory: str | None) -> Any:
    """Check a file in itself, as nothing is given that it could be compared with.

    Args:
        onnx_file: the file.
        inputs: what --inputs was given, which must be nothing.
        factory: what --model was given, which must be nothing.

    Returns:
        The report.

    Raises:
        OptionError: if one of the two is given.
    """
    from ecqx_onnx.validation import check_file

    if inputs is not None or factory is not None:
        option = "--inputs" if factory is None else "--model"
        raise OptionError(
            f"{option} says how to run what the file is compared with: say what that is with"
            " --against"
        )
    return check_file(onnx_file)


def emit_report(report: Any, *, as_json: bool, quiet: bool) -> None:
    """Show a validation's report.

    Args:
        report: with `ok` and `failures`.
        as_json: as JSON instead of a table.
        quiet: not at all.

    Raises:
        CheckFailed: if a check failed, with the sentence of each.
    """
    emit(report, as_json=as_json, quiet=quiet)
    if not report.ok:
        raise CheckFailed("; ".join(f"{check.name}: {check.sentence}" for check in report.failures))


def emit_devices(table: DeviceTable, *, as_json: bool, quiet: bool) -> None:
    """Show one device as its report, several side by side.

    Args:
        table: the reports, and what went wrong where there is none.
        as_json: as JSON instead of a table.
        quiet: not at all.

    Raises:
        InputError: if a device gave no result.
        CheckFailed: if a check failed on one.
    """
    single = len(table.reports) == 1 and not table.troubles
    if table.reports:
        emit(table.reports[0] if single else table, as_json=as_json, quiet=quiet)
    if table.troubles:
        raise InputError("; ".join(trouble.sentence for trouble in table.troubles))
    if table.ok:
        return
    failed = []
    for report in table.reports:
        for check in report.failures:
            failed.append(f"{report.device}: {check.name}: {check.sentence}")
    raise CheckFailed("; ".join(failed))
