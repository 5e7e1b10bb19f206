"""Does a file still say what the .onnx file says that it was made from?

For files of `pack`, behind which there is no PyTorch model, and for any two files that should be
the same model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from ecqx_onnx_converters.serialization.reading import read_weights

from ecqx_onnx.data import Split
from ecqx_onnx.errors import CheckFailed, DataError, FileError, ModelError
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.options.validate import ValidateOptions
from ecqx_onnx.recognition.foreign_graph import make_runnable
from ecqx_onnx.runtime.decoded_model import DecodedModel, decode_model
from ecqx_onnx.runtime.latency import Latency, measure_latency
from ecqx_onnx.runtime.sessions import (
    count_executed_operators,
    describe_runtime,
    find_fixed_batch,
    measure_load_seconds,
    open_session,
)
from ecqx_onnx.validation import checks
from ecqx_onnx.validation.bisection import Bisection, bisect_file
from ecqx_onnx.validation.equivalence import Equivalence, compare_models
from ecqx_onnx.validation.identity import check_identity
from ecqx_onnx.validation.judgement import (
    check_stored_weights,
    decode_or_report,
    preprocess_batches,
    read_preprocessing,
)
from ecqx_onnx.validation.report import Check, ValidationReport
from ecqx_onnx.validation.stored.parameters import compare_parameters, list_float_tensors
from ecqx_onnx.validation.validator import prepare_samples


def validate_against_original(
    path: Path | str,
    original: Path | str,
    *,
    split: Split | None = None,
    notes: Sequence[str] = (),
    inputs: Mapping[str, np.ndarray] | None = None,
    batch_size: int = ValidateOptions.batch_size,
    progress: Callable[[int, int], None] | None = None,
    latency_runs: int = ValidateOptions.latency_runs,
    bisect: bool = False,
) -> ValidationReport:
    """Compare a file with its original, in everything that can be asked of both.

    Args:
        path: The file to check.
        original: The .onnx file that it was made from.
        split: Labelled data.
        notes: Sentences for the report.
        inputs: By the original's names of them, instead of a split. Without either, random ones in
            shapes that the original takes.
        batch_size: Samples that run at once.
        progress: Called with (samples done, samples in all).
        latency_runs: Pairs of measurements; 0 leaves latency out.
        bisect: Whether to look for the first tensor that differs.

    Returns:
        A report; its `ok` says whether every check passed. A copy of the original is told as such
        and not run, unless data or inputs are given.

    Raises:
        InputError: A file or the data cannot be used, or nothing could be compared.
        ModelError: The original does not load.
        DataError: Nothing was proven.
    """
    file, source = read_onnx(path), read_onnx(original)
    identity = check_identity(file, source)
    if identity is not None and split is None and inputs is None:
        return ValidationReport(
            str(path), describe_runtime(), file.size, 0, (identity,), notes=tuple(notes)
        )
    runnable = make_runnable(source)
    found = [checks.check_format(file, original=source.path)]
    try:
        session = open_session(runnable)
    except CheckFailed as error:
        raise ModelError(f"{original}: there is nothing to compare with: {error}") from error
    batches = None
    if split is not None:
        named = source if read_preprocessing(file) is None else file
        split, told = prepare_samples(named, split, None, session)
        notes = (*notes, told)
        batches = preprocess_batches(split, find_fixed_batch(session) or batch_size)
    counted = None if progress is None or split is None else lambda done: progress(done, len(split))
    same = compare_models(runnable, file.path, inputs=inputs, batches=batches, progress=counted)
    for check in same.checks:
        if check.passed is None:  # nothing was proven
            raise DataError(f"{path}: {check.sentence}")
    found += same.checks
    if not same.samples:
        return ValidationReport(
            str(path), describe_runtime(), file.size, 0, tuple(found), notes=tuple(notes)
        )
    executed, before = count_executed_operators(file.path, same.first), Counter[str]()
    if any(map(checks.rounds_activations, executed)):
        before = count_executed_operators(runnable, same.original_first)
    found.append(checks.check_operators(file, executed, original=before))
    model = file.with_data()
    decoded = decode_or_report(model, found)
    if decoded is not None:
        found += check_stored_weights(model, decoded, ())
        parameters = _check_original_parameters(source, model, decoded)
        if parameters is not None:
            found.append(parameters)
    if same.agreement is not None:
        found.append(checks.check_classes(same.agreement, same.tie, reference="the original"))
    if same.accuracy is not None and same.original_accuracy is not None:
        found.append(
            checks.check_chance(same.accuracy, same.original_accuracy, reference="the original")
        )
    bisections: tuple[Bisection, ...] = ()
    if bisect:
        few = tuple(array[:8] if array.ndim else array for array in same.first)
        rounds = checks.has_quantized_activations(source)
        bisections = bisect_file(file, few, reference=source, quantized=rounds)
    return ValidationReport(
        file=str(path),
        runtime=describe_runtime(),
        bisections=bisections,
        size=file.size,
        samples=same.samples,
        checks=tuple(found),
        notes=tuple(notes),
        onnx_accuracy=same.accuracy,
        agreement=same.agreement.same if same.agreement else None,
        load_seconds=measure_load_seconds(file.path),
        latency=_measure_against_original(runnable, file.path, same, latency_runs),
        operators=executed,
    )


def _check_original_parameters(
    source: OnnxFile, model: onnx.ModelProto, decoded: DecodedModel
) -> Check | None:
    """The original's float tensors are in the file.

    As they are, or as `pack` rewrites BatchNormalization and old opsets.
    """
    try:
        before = list_float_tensors(decode_model(source.with_data()).proto)
        stored = read_weights(model)
    except (CheckFailed, FileError):  # told by other checks
        return None
    found = list_float_tensors(decoded.proto)
    compared = compare_parameters(found, before, stored=stored)
    if compared.faults:
        rewritten = _rewrite_parameters(source)
        again = None if rewritten is None else compare_parameters(found, rewritten, stored=stored)
        if again is not None and not again.faults:
            return checks.check_parameters(again, reference="the original, as pack rewrites it")
    return checks.check_parameters(compared, reference="the original")


def _rewrite_parameters(source: OnnxFile) -> dict[str, np.ndarray] | None:
    from ecqx_onnx.recognition.packing_plan import (
        rewrite_model,
    )  # here, since packing compares models by this room

    model = rewrite_model(source)
    return None if model is None else list_float_tensors(decode_model(model).proto)


def _measure_against_original(
    original: Path | bytes, path: Path, same: Equivalence, runs: int
) -> Latency | None:
    """Of one sample; None where the two don't take the same inputs, or not a single sample."""
    if not runs or len(same.first) != len(same.original_first):
        return None
    batch = find_fixed_batch(open_session(path)) or 1
    one = tuple(array[:batch] if array.ndim else array for array in same.first)
    try:
        return measure_latency(path, original, one, runs=runs, against="the original")
    except CheckFailed:
        return None
