"""The validation of a file on another device: the same report, of what the device computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ecqx_onnx_converters.graph.outputs import open_temporary_folder

from ecqx_onnx.data import Split
from ecqx_onnx.errors import CheckFailed, FileError, ModelError
from ecqx_onnx.inputs.index_bounds import find_index_bounds
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.options.validate import ValidateOptions
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.latency import Latency
from ecqx_onnx.runtime.sessions import (
    NUMPY_TYPES,
    Session,
    find_fixed_batch,
    fit_inputs,
    make_synthetic_inputs,
    open_session,
)
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation import checks
from ecqx_onnx.validation.devices.devices import Device, find_device
from ecqx_onnx.validation.devices.job import Result, read_result, write_job
from ecqx_onnx.validation.judgement import (
    SYNTHETIC_BATCH,
    check_stored_weights,
    choose_latency_baseline,
    decode_or_report,
    derive_bounds,
    preprocess_batches,
)
from ecqx_onnx.validation.outputs.comparison import Batch, compare, pad_batch
from ecqx_onnx.validation.outputs.samples import SampleBatches
from ecqx_onnx.validation.references.float_distance import FloatBounds, choose_bounds
from ecqx_onnx.validation.references.floats import measure_float16_shift
from ecqx_onnx.validation.references.onnx_reference import OnnxReference
from ecqx_onnx.validation.report import Check, ValidationReport
from ecqx_onnx.validation.validator import (
    has_scores,
    is_judged_by_distance,
    judge_float_distance,
    list_doubts,
    name_data,
    prepare_samples,
)

if TYPE_CHECKING:
    import torch


TIME_LIMIT = ValidateOptions.time_limit  # seconds for everything that the runner does


def validate_on(
    device: str | Device,
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
    latency_runs: int = ValidateOptions.latency_runs,
    time_limit: float = TIME_LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> ValidationReport:
    """Ask of a file what `validate` asks, but run it on a device.

    Every output, the load, the latency and the operators are the device's own. The inputs are
    preprocessed here and travel as they go into the model.

    Args:
        device: A device or its name.
        path: The .onnx file.
        reference: As for `validate`, like all that follow but the last two.
        tensors: The quantized weights that it holds.
        float_reference: Whether it is the float model from before the quantization.
        float_model: Makes the ONNX model from before any quantization.
        split: Data with classes; without it, synthetic inputs are compared.
        samples: Instead of a split, samples for any number of inputs.
        notes: Sentences for the report.
        preprocessing: By default what the file records.
        float_bounds: How far an untrained file may lie from its float model.
        class_names: Whether the reference has names for its classes.
        batch_size: Samples that run at once.
        latency_runs: Pairs of measurements; 0 leaves latency out.
        time_limit: Seconds for everything that the runner does.
        progress: Called with (batches done, batches in all).

    Returns:
        A report; its `ok` says whether every check passed.

    Raises:
        InputError: The device is absent, or its runner dies or is not done in time.
        ModelError: A runtime does not take the file.
    """
    device = find_device(device) if isinstance(device, str) else device
    file = read_onnx(path)
    original = reference.path if isinstance(reference, OnnxReference) else None
    found = [checks.check_format(file, original=original)]
    try:
        session = open_session(
            file.path, level="disabled"
        )  # only for what inputs and outputs look like
    except CheckFailed as error:
        raise ModelError(f"{path}: its inputs and outputs cannot be told here: {error}") from None
    if split is not None:
        split, told = prepare_samples(file, split, preprocessing, session)
        notes = (*notes, told)
    if samples is not None:
        notes = (*notes, samples.note)
    inexact = checks.explain_inexactness(file, float_reference=float_reference)
    other = "the float model" if isinstance(reference, OnnxReference) else "PyTorch"
    size = find_fixed_batch(session)

    def batches() -> Iterator[Batch]:
        if samples is not None:
            yield from samples.read(size or batch_size)
        elif split is None:
            bounds = find_index_bounds(file.proto)
            yield make_synthetic_inputs(session, batch=SYNTHETIC_BATCH, bounds=bounds), None
        else:
            yield from preprocess_batches(split, size or batch_size)

    def feeds() -> Iterator[Mapping[str, np.ndarray]]:
        names = [node.name for node in session.get_inputs()]
        for raw, _ in batches():
            yield dict(
                zip(
                    names,
                    fit_inputs(session, [pad_batch(array, size) for array in raw]),
                    strict=True,
                )
            )

    first = next(feeds(), {})
    shift = None if reference is None else measure_float16_shift(file, float_model)
    single = {name: array[: size or 1] if array.ndim else array for name, array in first.items()}
    model = file.with_data()
    decoded = decode_or_report(model, found)
    serialized = choose_latency_baseline(file, decoded, float_model) if latency_runs else None
    with open_temporary_folder() as temporary:
        job = write_job(
            file, temporary, feeds(), single, decoded=serialized, latency_runs=latency_runs
        )
        results = device.run(job, time_limit=time_limit, progress=progress)
        result = read_result(job, device.name, folder=results)
        found.append(Check("load", True, None, None, f"{result.runtime} loads and runs it"))
        comparison = compare(_Replay(session, result.outputs()), reference, batches(), shift=shift)
        if result.plain is not None:
            feed = list(first.values())
            optimized = _Replay(session, result.outputs())
            bounds = derive_bounds(comparison, next(result.outputs()))
            plain = _Replay(session, iter([result.plain]))
            found.append(
                checks.check_optimization(
                    optimized, plain, feed, bounds, quantized=checks.has_quantized_activations(file)
                )
            )
    if result.operators is not None:
        found.append(checks.check_operators(file, Counter(result.operators)))
    if decoded is not None:
        origin = None if float_reference else float_model
        found += check_stored_weights(model, decoded, tensors, float_model=origin)
    if reference is not None:
        found.append(checks.check_difference(comparison, inexact=inexact, reference=other))
        judged = is_judged_by_distance(file, reference, float_reference=float_reference)
        if judged and comparison.distances:
            scores = has_scores(file, split, samples, class_names)
            data = name_data(split, samples)
            found.append(
                judge_float_distance(
                    file,
                    comparison,
                    reference,
                    choose_bounds(float_bounds, file.metadata),
                    scores=scores,
                    data=data,
                )
            )
    for check in (
        checks.check_agreement(comparison, inexact=inexact, reference=other),
        checks.check_accuracy(comparison, reference=other),
    ):
        if check is not None:
            found.append(check)
    latency = _convert_latency(result)
    if (slow := checks.check_latency(file, latency, runtime=result.runtime)) is not None:
        found.append(slow)
    return ValidationReport(
        file=str(path),
        runtime=result.runtime,
        size=file.size,
        samples=comparison.samples,
        checks=tuple(found),
        notes=(*notes, *list_doubts(file, comparison, split, has_reference=reference is not None)),
        pytorch_accuracy=comparison.pytorch_accuracy,
        onnx_accuracy=comparison.onnx_accuracy,
        agreement=comparison.agreement.same if comparison.agreement else None,
        largest_difference=max((d.to_pytorch for d in comparison.differences), default=None),
        load_seconds=result.load_seconds,
        latency=latency,
        reference=other,
        operators=result.operators or {},
        device=device.name,
        peak_memory=result.peak_memory,
    )


def _convert_latency(result: Result) -> Latency | None:
    found = result.latency
    if found is None or found.float_seconds is None or found.ratio is None:
        return None
    return Latency(found.seconds, found.float_seconds, found.ratio, found.runs)


class _Replay:
    """A session that ran elsewhere.

    Each `run` gives the next batch of outputs, once they fit what the graph declares.
    """

    def __init__(self, session: Session, outputs: Iterator[tuple[np.ndarray, ...]]) -> None:
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.outputs = outputs

    def run(
        self, names: None, feed: Mapping[str, np.ndarray], options: object = None
    ) -> list[np.ndarray]:
        arrays = next(self.outputs)
        lengths: dict[str, int] = {}
        for node in self.get_inputs():
            for symbol, length in zip(node.shape, feed[node.name].shape, strict=True):
                if isinstance(symbol, str):
                    lengths[symbol] = length
        if len(arrays) != len(self.get_outputs()):
            raise FileError(
                f"the device returned {len(arrays)} outputs of {len(self.get_outputs())};"
                " its runner is at fault"
            )
        for node, array in zip(self.get_outputs(), arrays, strict=True):
            wanted = [lengths.get(d) if isinstance(d, str) else d for d in node.shape]
            fits = len(wanted) == array.ndim and all(
                w in (None, n) for w, n in zip(wanted, array.shape, strict=True)
            )
            if not fits or array.dtype != NUMPY_TYPES.get(node.type):
                raise FileError(
                    f"the device returned output '{node.name}' as {array.dtype} "
                    f"{list(array.shape)}, "
                    "but the graph declares "
                    f"{node.type} {node.shape}; its runner is at fault"
                )
        return list(arrays)
