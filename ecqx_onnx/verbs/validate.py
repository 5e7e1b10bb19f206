"""Compare an .onnx file with the model that it was made from, here or on devices."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ecqx_onnx.checkpoint.float_model import make_float_model
from ecqx_onnx.data import Dataset, Split
from ecqx_onnx.errors import InputError, OptionError
from ecqx_onnx.validation import ValidationReport
from ecqx_onnx.validation.devices import TIME_LIMIT, DeviceTable
from ecqx_onnx.validation.float_distance import FloatBounds

if TYPE_CHECKING:
    from ecqx_onnx.sources.to_checkpoint import Source


def is_onnx(source: Source | None) -> TypeGuard[str | Path]:
    """Whether it names an .onnx file."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


def validate(
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Does the .onnx file say the same as PyTorch? `report.ok`, and one check a question.

    against: what it was converted from (anything that `convert` takes), or the float model that was quantised: differences to
    that one are shown, and only the accuracy is judged. Or the path of the .onnx file that `pack` was given. data: a data set's
    name (see `load_dataset`), a Dataset or a Split; its test split is used, preprocessed as the file's metadata says. samples:
    only so many of it.
    float_bounds: how far a file of `convert(bits=...)` may lie from its float model.
    inputs: instead of data, against an .onnx file, one array for each of its inputs.
    """
    from ecqx_onnx import validation

    if is_onnx(against):
        if factory is not None:
            raise OptionError(
                f"--model names the network of a state dict, and {against} is an .onnx file: leave it out"
            )
        if (
            Path(against).is_file()
            and Path(onnx_file).is_file()
            and Path(against).samefile(onnx_file)
        ):
            raise OptionError(
                f"{against} is the file itself, which proves nothing; give what it was made from"
            )
        if inputs is not None and data is not None:
            raise OptionError("--inputs and --data both say what to run on; give one of them")
        sides, _ = load_sides(
            None,
            data,
            onnx_file=onnx_file,
            factory=None,
            input_shape=None,
            trust_pickle=False,
            samples=samples,
            names_from=against,
        )
        return validation.validate_against_original(
            onnx_file,
            against,
            split=sides["split"],
            notes=sides["notes"],
            inputs=inputs,
            batch_size=batch_size,
            latency_runs=latency_runs,
            progress=progress,
        )
    if inputs is not None:
        raise OptionError(
            "--inputs are for a validation against an .onnx file; beside PyTorch give --data, or nothing"
        )
    sides, _ = load_sides(
        against,
        data,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        samples=samples,
    )
    return validation.validate(
        onnx_file,
        **sides,
        float_bounds=float_bounds,
        batch_size=batch_size,
        latency_runs=latency_runs,
        progress=progress,
    )


def validate_on(
    devices: Sequence[str],
    onnx_file: str | Path,
    *,
    against: Source | None = None,
    data: Any = None,
    factory: str | None = None,
    input_shape: Sequence[int] | None = None,
    trust_pickle: bool = False,
    samples: int | None = None,
    float_bounds: FloatBounds | None = None,
    strict: bool = True,
    batch_size: int = 64,
    latency_runs: int = 50,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[int, int, str], None] | None = None,
) -> DeviceTable:
    """As `validate`, on each of the devices (see docs/devices.md), the reports side by side.

    time_limit: seconds for what runs on one device. progress: called with (batches done, in all, the device).
    InputError before anything runs if one is absent; one that fails later stands in `troubles`, and the others go on.
    """
    from ecqx_onnx.inputs.onnx_file import read_onnx
    from ecqx_onnx.validation import devices as room

    read_onnx(onnx_file)  # a damaged file is no device's trouble
    if is_onnx(against):
        raise OptionError(
            f"devices are compared with PyTorch's model, and {against} is an .onnx file: leave --device out"
        )
    found = [room.find_device(name) for name in devices]
    sides, _ = load_sides(
        against,
        data,
        onnx_file=onnx_file,
        factory=factory,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        strict=strict,
        samples=samples,
    )
    reports, troubles = [], []
    for device in found:
        shown = (
            None if progress is None else functools.partial(report_on_device, progress, device.name)
        )
        try:
            report = room.validate_on(
                device,
                onnx_file,
                **sides,
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


def report_on_device(
    progress: Callable[[int, int, str], None], device: str, done: int, total: int
) -> None:
    progress(done, total, device)


def load_sides(
    against: Source | None,
    data: Any,
    *,
    onnx_file: str | Path,
    factory: str | None,
    input_shape: Sequence[int] | None,
    trust_pickle: bool,
    samples: int | None,
    strict: bool = True,
    names: Sequence[str] = (),
    names_from: str | Path | None = None,
) -> tuple[dict[str, Any], Any]:
    """What a file is compared with: the PyTorch side and the data, as validation takes them; and the data set.

    The data's classes get the numbers that the file's class names give them; where the file has no names, those of the
    checkpoint, of the .onnx file `names_from`, or `names`.
    """
    from ecqx_onnx.data import load_dataset
    from ecqx_onnx.data.class_names import match_classes

    checkpoint = None
    if against is not None:
        from ecqx_onnx.sources.to_checkpoint import as_checkpoint

        checkpoint = as_checkpoint(
            against,
            factory=factory,
            input_shape=input_shape,
            trust_pickle=trust_pickle,
            strict=strict,
            allow_float=True,
        )
    dataset, notes = load_dataset(data) if isinstance(data, str) else data, ()
    if isinstance(dataset, Dataset):
        known, outputs = read_class_names(onnx_file)
        if not known and names_from is not None:
            known = read_class_names(names_from)[0]
        if not known:
            known = names or (() if checkpoint is None else checkpoint.labels)
        dataset, notes = match_classes(dataset, known, outputs=outputs)
    split = dataset.test if isinstance(dataset, Dataset) else dataset
    if isinstance(split, Split) and samples is not None:
        split = split.take(samples)
    sides = {
        "reference": None if checkpoint is None else checkpoint.module(),
        "tensors": () if checkpoint is None else checkpoint.tensors,
        "float_reference": checkpoint is not None and not checkpoint.tensors,
        "float_model": None
        if checkpoint is None
        else functools.partial(make_float_model, checkpoint),
        "split": split,
        "notes": notes,
        "class_names": checkpoint is not None and bool(checkpoint.labels),
    }
    return sides, dataset


def read_class_names(path: str | Path) -> tuple[tuple[str, ...], int | None]:
    """What an .onnx file says of its classes: their names, empty if none, and how many scores its first output holds."""
    from ecqx_onnx.inputs.onnx_file import read_onnx

    file = read_onnx(path)
    labels = file.metadata.get("labels")
    names = tuple(map(str, labels)) if isinstance(labels, list) else ()
    outputs = file.proto.graph.output
    dims = outputs[0].type.tensor_type.shape.dim if outputs else ()
    return names, dims[1].dim_value or None if len(dims) == 2 else None
