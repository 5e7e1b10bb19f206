"""Compare an .onnx file with the model that it was made from, here or on devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ecqx_onnx.errors import InputError, OptionError
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.options.option import check_limits, refuse_unknown_options
from ecqx_onnx.options.validate import ValidateOptions
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.devices import TIME_LIMIT, DeviceTable
from ecqx_onnx.validation.references.float_distance import FloatBounds
from ecqx_onnx.verbs.reference import (
    EvaluationData,
    Reference,
    load_evaluation_data,
    load_reference,
    load_samples_or_split,
)

if TYPE_CHECKING:
    from ecqx_onnx.sources.to_checkpoint import Source


def is_onnx(source: Source | None) -> TypeGuard[str | Path]:
    """Tell whether something names an .onnx file.

    Args:
        source: anything that `convert` takes, or None.

    Returns:
        Whether it is a path that ends in .onnx.
    """
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


@refuse_unknown_options
def validate(
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    bisect: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Check that an .onnx file says the same as PyTorch, or as the .onnx file it was packed from.

    Args:
        onnx_file: the file to check.
        against: what it was converted from (anything that `convert` takes), or the float model that
            was quantized, also as an .onnx file: then `float_bounds` say how far it may be away.
            Or the path of the .onnx file that `pack` was given.
        data: a data set's name (see `load_dataset`), a Dataset or a Split; beside a float model
            whatever `compress` takes, labelled or not. Its test split is used, where it has one,
            preprocessed as the file's metadata say. Without it, random inputs are compared.
        inputs: instead of data, against an .onnx file: one array for each of its inputs, by name.
        factory: FILE.py:FACTORY, the network of a state dict.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE.
        trust_pickle: unpickle a module, which runs its author's code.
        samples: use only so many of the data; at least 1.
        float_bounds: how far a file that was not trained may lie from its float model; by default
            99 % of the classes are the same, or a relative error of 0.05; 95 % and 0.1 for what
            `convert --bits` made. No number that the file says of itself counts.
        strict: refuse a state dict that lacks weights, or has others.
        batch_size: samples that run at once; at least 1.
        latency_runs: pairs of measurements; 0 leaves latency out.
        bisect: look for the first tensor inside that differs, PyTorch (or the other .onnx file)
            against onnxruntime, and all of its optimisations against none.
        progress: called with (samples done, samples in all).

    Returns:
        One check a question; `report.ok` says whether every one passed.

    Raises:
        InputError: if a file, the data or an option can't be used.

    Example:
        report = ecqx_onnx.validate("out.onnx", against="model.pt", data="data.npz")
        assert report.ok, report.failures
    """
    from ecqx_onnx import validation

    check_limits(ValidateOptions, samples=samples, batch_size=batch_size, latency_runs=latency_runs)
    if is_onnx(against) and not is_compared_with_float(onnx_file, against, float_bounds):
        if float_bounds is not None:
            raise OptionError(
                f"{against} is not float, and every difference to it counts: leave --min-agreement,"
                " --max-error and --max-drop out"
            )
        _check_against_original(
            onnx_file, against, factory=factory, both_given=None not in (data, inputs)
        )
        evaluation = load_evaluation_data(data, onnx_file, samples=samples, labels_from=against)
        return validation.validate_against_original(
            onnx_file,
            against,
            split=evaluation.split,
            notes=evaluation.notes,
            inputs=inputs,
            batch_size=batch_size,
            latency_runs=latency_runs,
            bisect=bisect,
            progress=progress,
        )
    if inputs is not None and not is_onnx(against):
        raise OptionError(
            "--inputs are for a validation against an .onnx file; beside PyTorch give --data, or"
            " nothing"
        )
    if is_onnx(against):
        _check_against_original(
            onnx_file, against, factory=factory, both_given=None not in (data, inputs)
        )
    reference = load_reference(
        against,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        onnx_file=onnx_file,
    )
    evaluation = load_data_beside(
        reference,
        onnx_file,
        data if inputs is None else inputs,
        samples=samples,
        labels_from=against if is_onnx(against) else None,
    )
    return validation.validate(
        onnx_file,
        reference=reference.module,
        tensors=reference.tensors,
        float_reference=reference.is_float,
        float_model=reference.float_model,
        class_names=bool(reference.labels),
        split=evaluation.split,
        samples=evaluation.samples,
        notes=(*evaluation.notes, *_tell_own_numbers(onnx_file, reference)),
        float_bounds=float_bounds,
        batch_size=batch_size,
        latency_runs=latency_runs,
        bisect=bisect,
        progress=progress,
    )


def is_compared_with_float(
    onnx_file: str | Path, against: str | Path, float_bounds: FloatBounds | None
) -> bool:
    """Tell whether two .onnx files are a float model and what was quantized from it.

    Args:
        onnx_file: the file to check.
        against: the other one.
        float_bounds: how far they may lie apart; whoever gives bounds means a float model.

    Returns:
        False where the other file's weights are integers too, and where the first is a lossless
        repacking of it: then nothing but rounding may differ.
    """
    from ecqx_onnx.inputs.onnx_file import read_onnx
    from ecqx_onnx.validation.references.float_distance import recipe_of
    from ecqx_onnx.validation.references.onnx_reference import find_integer_operator

    if find_integer_operator(read_onnx(against)) is not None:
        return False
    file = read_onnx(onnx_file)
    if float_bounds is not None or recipe_of(file.metadata):
        return True
    return find_integer_operator(file) not in (None, "ecqx-onnx")


def load_data_beside(
    reference: Reference,
    onnx_file: str | Path,
    data: Any,
    *,
    samples: int | None,
    labels_from: str | Path | None = None,
) -> EvaluationData:
    """Load data; beside a float model they need no labels.

    Args:
        reference: what the file is compared with.
        onnx_file: the file.
        data: as for `validate`.
        samples: take only so many.
        labels_from: another .onnx file with class names.

    Returns:
        A split, or samples by the names of inputs; empty for None.

    Raises:
        InputError: if the data can't be read, or don't fit the file.
    """
    if reference.is_float:
        return load_samples_or_split(
            data, onnx_file, reference, samples=samples, labels_from=labels_from
        )
    return load_evaluation_data(data, onnx_file, samples=samples, labels=reference.labels)


def _tell_own_numbers(onnx_file: str | Path, reference: Reference) -> tuple[str, ...]:
    """What the file says of its distance from the float model, which nothing is judged by."""
    from ecqx_onnx.inputs.onnx_file import read_onnx
    from ecqx_onnx.validation.references.float_distance import recipe_of

    stated = recipe_of(read_onnx(onnx_file).metadata).get("float_error")
    if not reference.is_float or not isinstance(stated, int | float):
        return ()
    return (f"the file itself states a relative error of {stated:g}, which is not judged by",)


def _check_against_original(
    onnx_file: str | Path, against: str | Path, *, factory: str | None, both_given: bool
) -> None:
    """OptionError for what does not go with a validation against an .onnx file."""
    if factory is not None:
        raise OptionError(
            f"--model names the network of a state dict, and {against} is an .onnx file: leave it"
            " out"
        )
    both_exist = Path(against).is_file() and Path(onnx_file).is_file()
    if both_exist and Path(against).samefile(onnx_file):
        raise OptionError(
            f"{against} is the file itself, which proves nothing; give what it was made from"
        )
    if both_given:
        raise OptionError("--inputs and --data both say what to run on; give one of them")


@refuse_unknown_options
def validate_on(
    devices: Sequence[str],
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: InputShape | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> DeviceTable:
    """Check a file as `validate` does, on each of several devices (see docs/devices.md).

    Args:
        devices: their names, such as "node" or "ssh://user@host".
        onnx_file: the file to check.
        against: what it was converted from, as `convert` takes it, or the float model, also as an
            .onnx file.
        data: a data set's name, a Dataset or a Split; without it, random inputs are compared.
        factory: FILE.py:FACTORY, the network of a state dict.
        input_shape: of one input without the batch, where FILE.py has no INPUT_SHAPE.
        trust_pickle: unpickle a module, which runs its author's code.
        samples: use only so many of the data; at least 1.
        float_bounds: how far a file of `convert(bits=...)` may lie from its float model.
        strict: refuse a state dict that lacks weights, or has others.
        batch_size: samples that run at once; at least 1.
        latency_runs: pairs of measurements; 0 leaves latency out.
        time_limit: seconds for what runs on one device; at least 1.
        progress: called with (batches done, in all, the device).

    Returns:
        The reports side by side; a device that fails stands in `troubles`, and the others go on.

    Raises:
        InputError: before anything runs, if a device is absent or something given can't be used.
    """
    from ecqx_onnx.inputs.onnx_file import read_onnx
    from ecqx_onnx.validation import devices as room
    from ecqx_onnx.validation.references.onnx_reference import find_integer_operator

    check_limits(ValidateOptions, samples=samples, batch_size=batch_size, time_limit=time_limit)
    read_onnx(onnx_file)  # a damaged file is no device's trouble
    if is_onnx(against) and find_integer_operator(read_onnx(against)) is not None:
        raise OptionError(
            f"devices are compared with a float model, and {against} is none: leave --device out"
        )
    found = [room.find_device(name) for name in devices]
    reference = load_reference(
        against,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        onnx_file=onnx_file,
    )
    evaluation = load_data_beside(
        reference,
        onnx_file,
        data,
        samples=samples,
        labels_from=against if is_onnx(against) else None,
    )
    reports = []
    troubles = []
    for device in found:
        shown = None
        if progress is not None:
            shown = functools.partial(_report_on_device, progress, device.name)
        try:
            report = room.validate_on(
                device,
                onnx_file,
                reference=reference.module,
                tensors=reference.tensors,
                float_reference=reference.is_float,
                float_model=reference.float_model,
                class_names=bool(reference.labels),
                split=evaluation.split,
                samples=evaluation.samples,
                notes=evaluation.notes,
                float_bounds=float_bounds,
                batch_size=batch_size,
                latency_runs=latency_runs,
                time_limit=time_limit,
                progress=shown,
            )
            reports.append(report)
        except InputError as error:
            troubles.append(room.Trouble(device.name, str(error)))
    return room.DeviceTable(tuple(reports), tuple(troubles))


def _report_on_device(
    progress: Callable[[int, int, str], None], device: str, done: int, total: int
) -> None:
    progress(done, total, device)
