"""Does a file still say what its PyTorch model says? The validation on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from ecqx_onnx_converters.serialization.reading import read_weights

from ecqx_onnx.data import Split
from ecqx_onnx.errors import CheckFailed, DataError, FileError
from ecqx_onnx.inputs.index_bounds import find_index_bounds
from ecqx_onnx.inputs.onnx_file import OnnxFile, read_onnx
from ecqx_onnx.options.validate import ValidateOptions
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.latency import Latency, measure_latency
from ecqx_onnx.runtime.sessions import (
    Session,
    count_executed_operators,
    describe_runtime,
    find_fixed_batch,
    make_synthetic_inputs,
    measure_load_seconds,
    open_session,
    run,
)
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation import checks
from ecqx_onnx.validation.bisection import Bisection, bisect_file
from ecqx_onnx.validation.judgement import (
    SYNTHETIC_BATCH,
    check_stored_weights,
    choose_latency_baseline,
    decode_or_report,
    derive_bounds,
    preprocess_batches,
    read_preprocessing,
)
from ecqx_onnx.validation.outputs.comparison import Batch, Comparison, compare
from ecqx_onnx.validation.outputs.plausibility import doubt_accuracy, doubt_range
from ecqx_onnx.validation.outputs.samples import SampleBatches
from ecqx_onnx.validation.references.float_distance import (
    FloatBounds,
    LayerError,
    choose_bounds,
    is_untrained,
    judge_distance,
    measure_weight,
)
from ecqx_onnx.validation.references.floats import measure_float16_shift
from ecqx_onnx.validation.references.onnx_reference import OnnxReference
from ecqx_onnx.validation.report import Check, ValidationReport

if TYPE_CHECKING:
    import torch


UNTRAINED_SETS = 8  # of random inputs, where the distance from a float model is measured


def validate(
    path: Path | str,
    *,
    reference: torch.nn.Module | OnnxReference | None = None,
    tensors: Sequence[QuantTensor] = (),
    float_reference: bool = False,
    float_model: Callable[..., bytes | None] | None = None,
    split: Split | None = None,
    samples: SampleBatches | None = None,
    notes: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
    float_bounds: FloatBounds | None = None,
    class_names: bool = False,
    batch_size: int = ValidateOptions.batch_size,
    progress: Callable[[int, int], None] | None = None,
    latency_runs: int = ValidateOptions.latency_runs,
    bisect: bool = False,
) -> ValidationReport:
    """Ask everything that can be asked of a file with what is given.

    Args:
        path: The .onnx file.
        reference: The PyTorch model, compared output by output; or a float .onnx file in its
            place, with float_reference.
        tensors: The quantized weights that it holds.
        float_reference: Whether it is the float model from before the quantization, so that
            differences are shown and not judged.
        float_model: Makes the ONNX model from before any quantization, with which the latency of
            integer kernels is compared; called with floats="float16", the same with its parameters
            rounded.
        split: Data with classes; without it, synthetic inputs are compared.
        samples: Instead of a split, samples for any number of inputs, with or without classes.
        notes: Sentences for the report.
        preprocessing: By default what the file records.
        float_bounds: How far a file that was quantized without training may lie from its float
            model.
        class_names: Whether the reference has names for its classes, so that its first output, if
            [N, C], holds class scores.
        batch_size: Samples that run at once.
        progress: Called with (samples done, samples in all).
        latency_runs: Pairs of measurements; 0 leaves latency out.
        bisect: Whether to look for the first tensor that differs.

    Returns:
        A report; its `ok` says whether every check passed.

    Raises:
        InputError: The file or the data cannot be used.
        DataError: The file does not run on synthetic inputs.
    """
    file = read_onnx(path)
    original = reference.path if isinstance(reference, OnnxReference) else None
    found = [checks.check_format(file, original=original)]
    try:
        session = open_session(file.path)
        plain = open_session(file.path, level="disabled")
    except CheckFailed as error:
        found.append(Check("load", False, None, None, str(error)))
        return ValidationReport(
            str(path), describe_runtime(), file.size, 0, tuple(found), notes=tuple(notes)
        )
    found.append(
        Check(
            "load",
            True,
            None,
            None,
            f"{describe_runtime()} loads it with all optimisations and with none",
        )
    )
    inexact = checks.explain_inexactness(file, float_reference=float_reference)
    other = "the float model" if isinstance(reference, OnnxReference) else "PyTorch"

    untrained = is_judged_by_distance(file, reference, float_reference=float_reference)
    seeds = range(UNTRAINED_SETS if untrained else 1)
    total = len(seeds) * SYNTHETIC_BATCH if split is None else len(split)
    if samples is not None:
        total = samples.count
        notes = (*notes, samples.note)
        batches: Iterator[Batch] = samples.read(find_fixed_batch(session) or batch_size)
    elif split is None:
        bounds = find_index_bounds(file.proto)
        batches = (
            (make_synthetic_inputs(session, batch=SYNTHETIC_BATCH, seed=seed, bounds=bounds), None)
            for seed in seeds
        )
    else:
        split, told = prepare_samples(file, split, preprocessing, session)
        notes = (*notes, told)
        batches = preprocess_batches(split, find_fixed_batch(session) or batch_size)
    try:
        counted = None if progress is None else lambda done: progress(done, total)
        shift = None if reference is None else measure_float16_shift(file, float_model)
        comparison = compare(session, reference, batches, progress=counted, shift=shift)
    except CheckFailed as error:
        if split is None and samples is None:  # the shapes or values may be what it cannot take
            raise DataError(
                f"{path}: does not run on synthetic inputs, so give it real data: {error}"
            ) from error
        found.append(Check("run", False, None, None, str(error)))
        return ValidationReport(
            str(path), describe_runtime(), file.size, 0, tuple(found), notes=tuple(notes)
        )
    few = tuple(
        array[: find_fixed_batch(session) or 8] if array.ndim else array
        for array in comparison.first
    )

    found.append(
        checks.check_optimization(
            session,
            plain,
            few,
            derive_bounds(comparison, run(session, few)),
            quantized=checks.has_quantized_activations(file),
        )
    )
    operators = count_executed_operators(file.path, few)
    found.append(checks.check_operators(file, operators))
    model = file.with_data()
    decoded = decode_or_report(model, found)
    if decoded is not None:
        origin = None if float_reference else float_model
        found += check_stored_weights(model, decoded, tensors, float_model=origin)
    if reference is not None:
        found.append(checks.check_difference(comparison, inexact=inexact, reference=other))
    if untrained and reference is not None and comparison.distances:
        found.append(
            judge_float_distance(
                file,
                comparison,
                reference,
                choose_bounds(float_bounds, file.metadata),
                scores=has_scores(file, split, samples, class_names),
                data=name_data(split, samples),
            )
        )
    for check in (
        checks.check_agreement(comparison, inexact=inexact, reference=other),
        checks.check_accuracy(comparison, reference=other),
    ):
        if check is not None:
            found.append(check)
    one = tuple(
        array[: find_fixed_batch(session) or 1] if array.ndim else array
        for array in comparison.first
    )
    latency = _measure_against_baseline(
        file,
        choose_latency_baseline(file, decoded, float_model) if latency_runs else None,
        one,
        latency_runs,
    )
    if (slow := checks.check_latency(file, latency, runtime=describe_runtime())) is not None:
        found.append(slow)
    bisections: tuple[Bisection, ...] = ()
    if bisect:
        other_side: object = reference
        if isinstance(reference, OnnxReference):
            other_side = read_onnx(reference.path)
        bisections = bisect_file(
            file,
            few,
            reference=other_side,
            float_reference=float_reference,
            quantized=checks.has_quantized_activations(file),
        )
    return ValidationReport(
        file=str(path),
        runtime=describe_runtime(),
        size=file.size,
        samples=comparison.samples,
        checks=tuple(found),
        notes=(*notes, *list_doubts(file, comparison, split, has_reference=reference is not None)),
        pytorch_accuracy=comparison.pytorch_accuracy,
        onnx_accuracy=comparison.onnx_accuracy,
        agreement=comparison.agreement.same if comparison.agreement else None,
        largest_difference=max((d.to_pytorch for d in comparison.differences), default=None),
        load_seconds=measure_load_seconds(file.path),
        latency=latency,
        reference=other,
        operators=Counter(operators),
        bisections=bisections,
    )


def is_judged_by_distance(
    file: OnnxFile, reference: torch.nn.Module | OnnxReference | None, *, float_reference: bool
) -> bool:
    """Tell whether the distance from the float model decides, instead of bounds of rounding.

    Args:
        file: The file that is validated.
        reference: What it is compared with.
        float_reference: Whether that is the float model from before the quantization.

    Returns:
        True for files that were quantized without training, and beside any float .onnx file.
    """
    return float_reference and (isinstance(reference, OnnxReference) or is_untrained(file.metadata))


def has_scores(
    file: OnnxFile, split: Split | None, samples: SampleBatches | None, class_names: bool
) -> bool:
    """Tell whether the first output, if [N, C], holds class scores.

    Args:
        file: The file that is validated.
        split: Data with classes, or None.
        samples: Other data, or None.
        class_names: Whether the model that it is compared with has names for its classes.

    Returns:
        True with labels or names of classes.
    """
    labelled = split is not None or (samples is not None and samples.labelled)
    return class_names or labelled or bool(file.metadata.get("labels"))


def name_data(split: Split | None, samples: SampleBatches | None) -> str | None:
    """Name the data for a sentence.

    Args:
        split: Data with classes, or None.
        samples: Other data, or None.

    Returns:
        Their name; None for synthetic inputs.
    """
    if samples is not None:
        return samples.name
    return None if split is None else split.source.name


def _choose_preprocessing(
    file: OnnxFile, split: Split, given: Preprocessing | None
) -> tuple[Preprocessing, str]:
    """(what brings raw samples to the model, a sentence that says so and where it comes from)."""
    stored = read_preprocessing(file)
    if given is not None:
        return given, f"preprocessing: {given.describe()} (as given)"
    if stored is not None:
        return stored, f"preprocessing: {stored.describe()} (recorded in {file.path.name})"
    own = split.preprocessing
    return (
        own,
        f"preprocessing: {own.describe()} (as the data's type asks for; {file.path.name} records "
        "none)",
    )


def prepare_samples(
    file: OnnxFile, split: Split, given: Preprocessing | None, session: Session
) -> tuple[Split, str]:
    """Preprocess samples as a model takes them.

    Args:
        file: The file, which may record a preprocessing.
        split: The samples.
        given: A preprocessing that comes before the recorded one, or None.
        session: The file's, for the shape of its first input.

    Returns:
        The samples, and a sentence that says how they are preprocessed and who decided it.
    """
    preprocessing, told = _choose_preprocessing(file, split, given)
    shape = session.get_inputs()[0].shape[1:] if session.get_inputs() else ()
    lengths = [length if isinstance(length, int) else None for length in shape]
    channels = (
        lengths[0]
        if len(lengths) == 3 and preprocessing.kind == "image" and lengths[0] in (1, 3)
        else None
    )
    return split.with_preprocessing(preprocessing, channels=channels).fitted(lengths), told


def list_doubts(
    file: OnnxFile, comparison: Comparison, split: Split | None, *, has_reference: bool
) -> tuple[str, ...]:
    """Say what is probably wrong with the data, their labels or their preprocessing.

    Args:
        file: The file that was run.
        comparison: What was found on the data.
        split: The data; None for synthetic inputs.
        has_reference: Whether PyTorch's model ran beside it.

    Returns:
        A sentence each; none without data.
    """
    if split is None:
        return ()
    range_doubts = doubt_range(comparison.inputs, _find_calibrated_input_range(file))
    recorded = read_preprocessing(file) is not None
    who = "PyTorch's model" if has_reference else "the model"
    found = doubt_accuracy(
        comparison.confusion, who=who, inputs=comparison.inputs, recorded=recorded
    )
    return (*range_doubts, *found)


def judge_float_distance(
    file: OnnxFile,
    comparison: Comparison,
    reference: torch.nn.Module | OnnxReference,
    bounds: FloatBounds,
    *,
    scores: bool,
    data: str | None,
) -> Check:
    """Judge how far a file is from the float model that it was quantized from without training.

    Args:
        file: The file.
        comparison: A pass beside the float model.
        reference: The float model.
        bounds: What is allowed.
        scores: Whether the first output holds class scores.
        data: The data's name; None for random inputs.

    Returns:
        The check "float model".
    """
    accuracies = None
    if comparison.onnx_accuracy is not None and comparison.pytorch_accuracy is not None:
        accuracies = (comparison.onnx_accuracy, comparison.pytorch_accuracy)
    on = (
        f"{comparison.samples} random inputs"
        if data is None
        else f"{comparison.samples} samples of {data}"
    )
    layers = _measure_weight_errors(file, reference)
    return judge_distance(
        comparison.distances, bounds, on=on, scores=scores, layers=layers, accuracies=accuracies
    )


def _measure_weight_errors(
    file: OnnxFile, reference: torch.nn.Module | OnnxReference
) -> list[LayerError]:
    """Of the file's quantised weights that the float model has under their names and in their
    shapes; none beside an .onnx file, where error feedback makes a weight's own error say little.
    """
    if isinstance(reference, OnnxReference):
        return []
    try:
        stored = read_weights(file.with_data())
    except FileError:  # which the check of the weights tells
        return []
    state = reference.state_dict()
    found = []
    for item in stored:
        weight = item.weight
        name = next((name for name in (*weight.sources, weight.name) if name in state), None)
        exact = None if name is None else state[name].detach().cpu().float().numpy()
        if name is None or exact is None:
            continue
        values = weight.dequantize()
        values = values.T if values.shape != exact.shape and values.ndim == 2 else values
        if values.shape == exact.shape:
            found.append(measure_weight(name, values, exact, rescaled=True))
    return found


def _find_calibrated_input_range(file: OnnxFile) -> tuple[float, float] | None:
    """Lowest and highest value of the first input that 8 bit activations can tell.

    None where it is not quantised.
    """
    graph = file.proto.graph
    if not graph.input:
        return None
    floats = {value.name: value for value in graph.initializer}
    reading = [
        n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == graph.input[0].name
    ]
    if (
        not reading
        or len(reading[0].input) < 3
        or not all(name in floats for name in reading[0].input[1:3])
    ):
        return None
    scale, zero = (onnx.numpy_helper.to_array(floats[name]) for name in reading[0].input[1:3])
    if scale.size != 1 or zero.dtype.kind not in "iu":
        return None
    limits = np.iinfo(zero.dtype)
    step, place = float(scale.reshape(())), int(zero.reshape(()))
    return step * (limits.min - place), step * (limits.max - place)


def _measure_against_baseline(
    file: OnnxFile, baseline: bytes | None, inputs: Sequence, runs: int
) -> Latency | None:
    if baseline is None:
        return None
    try:
        return measure_latency(file.path, baseline, inputs, runs=runs)
    except CheckFailed:  # a graph that only runs as it is written has no float twin to compare with
        return None
