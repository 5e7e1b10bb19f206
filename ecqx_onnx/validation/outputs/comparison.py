"""One pass over the data: a file's outputs beside PyTorch's, one batch in memory at a time.

Enter: a session, PyTorch's model, batches. Leave: differences and their bounds, agreement,
accuracies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ecqx_onnx.errors import DataError
from ecqx_onnx.runtime.sessions import Session, find_fixed_batch, fit_inputs, run
from ecqx_onnx.validation.outputs.bounds import Bound, derive_bound
from ecqx_onnx.validation.outputs.metrics import (
    Agreement,
    Proportion,
    find_largest_difference,
    is_classification,
    measure_accuracy,
    measure_agreement,
)
from ecqx_onnx.validation.outputs.plausibility import MOST_CLASSES, Confusion, InputRange
from ecqx_onnx.validation.references.float_distance import (
    OutputDistance,
    add_distances,
    measure_output,
)
from ecqx_onnx.validation.references.floats import RUNS, Shift
from ecqx_onnx.validation.references.onnx_reference import OnnxReference

if TYPE_CHECKING:
    import torch


EXACT_SAMPLES = (
    256  # the first ones get a float64 result in any case, later batches where they look suspicious
)

Batch = tuple[Sequence[np.ndarray], np.ndarray | None]
"""(the model's inputs, class of each sample or None)"""
Progress = Callable[[int], None]
"""Called with the number of samples done so far."""


@dataclass(frozen=True)
class Difference:
    """One output of the graph against PyTorch's.

    Attributes:
        output: Its name.
        measured: Largest |onnx - exact| where an exact result was computed, |onnx - PyTorch|
            elsewhere; inf for other shapes.
        to_pytorch: Largest |onnx - PyTorch| over all samples.
        bound: How far they may lie apart.
        moved: Largest change of the output by rounded parameters, which `measured` leaves out
            (floats.py); 0 without such.
    """

    output: str
    measured: float
    to_pytorch: float
    bound: Bound
    moved: float = 0.0

    @property
    def within(self) -> bool:
        """Whether the difference is no more than rounding."""
        return self.measured <= self.bound.limit


@dataclass(frozen=True)
class Comparison:
    """What a pass over the data found.

    Attributes:
        samples: How many were run.
        first: The inputs of the first batch.
        differences: One for each output; empty without a reference.
        agreement: Of the first output's classes with the reference's.
        pytorch_accuracy: The reference's, of the first output, if it is one of classes.
        onnx_accuracy: The file's.
        mismatch: A sentence where the two models' outputs cannot be paired; the pass ended there.
        confusion: Of the reference where there is one, else of the file.
        inputs: The range of the first input, if it is of floats.
        distances: Of each output to the reference's, relative to it; summed over the samples.
    """

    samples: int
    first: tuple[np.ndarray, ...]
    differences: tuple[Difference, ...] = ()
    agreement: Agreement | None = None
    pytorch_accuracy: Proportion | None = None
    onnx_accuracy: Proportion | None = None
    mismatch: str | None = None
    confusion: Confusion | None = None
    inputs: InputRange | None = None
    distances: tuple[OutputDistance, ...] = ()


def compare(
    session: Session,
    reference: torch.nn.Module | OnnxReference | None,
    batches: Iterable[Batch],
    *,
    progress: Progress | None = None,
    shift: Shift | None = None,
) -> Comparison:
    """Run a file, and PyTorch's model beside it, on all batches.

    Args:
        session: The file's, or one that replays the outputs of another machine.
        reference: PyTorch's model, or a float .onnx file in its place, or None.
        batches: Inputs, and labels or None, in the model's preprocessing.
        progress: Called with the number of samples done so far.
        shift: What the file's rounded parameters change in the outputs.

    Returns:
        What was found.

    Raises:
        DataError: There is no sample, or inputs or labels do not fit the graph.
        CheckFailed: The runtime fails.
    """
    size = find_fixed_batch(session)
    differences = _Differences(session, reference, shift)
    samples, first = 0, None
    confusion: Confusion | None = None
    reach: InputRange | None = None
    distances: tuple[OutputDistance, ...] = ()
    agreed = Agreement(Proportion(0, 0), 0.0)
    right = Proportion(0, 0)
    reference_right = Proportion(0, 0)
    for raw, labels in batches:
        count = len(raw[0]) if raw and raw[0].ndim else 1
        inputs = fit_inputs(session, [pad_batch(array, size) for array in raw])
        first = first or inputs
        got = run(session, inputs)
        samples += count
        seen = InputRange.of(inputs[0]) if inputs else None
        reach = seen if reach is None or seen is None else reach.widen(seen)
        classes = bool(got) and is_classification(got[0])
        if classes and labels is not None:
            right += measure_accuracy(got[0][:count], labels)
        if reference is not None:
            wanted = _run_reference(reference, inputs)
            if [array.shape for array in wanted] != [array.shape for array in got]:
                return Comparison(
                    samples,
                    first,
                    onnx_accuracy=right or None,
                    mismatch=_describe_mismatch(got, wanted),
                )
            parts = zip(session.get_outputs(), got, wanted, strict=True)
            apart = [
                measure_output(node.name, _cut_padding(mine, count), _cut_padding(exact, count))
                for node, mine, exact in parts
            ]
            distances = add_distances(distances, apart)
            differences.judge(inputs, got, wanted, samples_before=samples - count)
            if classes:
                agreed += measure_agreement(wanted[0][:count], got[0][:count])
                if labels is not None:
                    reference_right += measure_accuracy(wanted[0][:count], labels)
                    confusion = _count_confusion(confusion, labels, wanted[0][:count])
        elif classes and labels is not None:
            confusion = _count_confusion(confusion, labels, got[0][:count])
        if progress is not None:
            progress(samples)
    if first is None:
        raise DataError("the data set holds no sample: there is nothing to validate on")
    same = agreed if agreed.same else None
    return Comparison(
        samples,
        first,
        tuple(differences.worst),
        same,
        reference_right or None,
        right or None,
        confusion=confusion,
        inputs=reach,
        distances=distances,
    )


def _run_reference(
    reference: torch.nn.Module | OnnxReference, inputs: Sequence[np.ndarray]
) -> tuple[np.ndarray, ...]:
    if isinstance(reference, OnnxReference):
        return reference.run(inputs)
    from ecqx_onnx.validation.references.pytorch_outputs import run_reference

    return run_reference(reference, inputs)


def _cut_padding(array: np.ndarray, count: int) -> np.ndarray:
    """Without what a fixed batch was filled up with."""
    return array[:count] if array.ndim else array


def _count_confusion(
    before: Confusion | None, labels: np.ndarray, scores: np.ndarray
) -> Confusion | None:
    """scores: [N, C]. None where there are too many classes to count pairs of them."""
    classes = scores.shape[1]
    if classes > MOST_CLASSES:
        return None
    found = Confusion.count(labels, scores.argmax(1), classes)
    return found if before is None else before + found


class _Differences:
    """The worst difference of each output so far, and its bound, which grows with the data."""

    def __init__(
        self,
        session: Session,
        reference: torch.nn.Module | OnnxReference | None,
        shift: Shift | None = None,
    ) -> None:
        self.shift = shift
        self.names = [node.name for node in session.get_outputs()]
        self.reference = reference
        self.worst: list[Difference] = []
        # What is compared with a float .onnx file is quantized: rounding errors don't matter.
        self.has_exact = reference is not None and not isinstance(reference, OnnxReference)

    def judge(
        self,
        inputs: Sequence[np.ndarray],
        got: Sequence[np.ndarray],
        wanted: Sequence[np.ndarray],
        *,
        samples_before: int,
    ) -> None:
        """Against the float64 result for the first samples, and later wherever PyTorch's own is not
        close enough."""
        to_pytorch = [find_largest_difference(g, w) for g, w in zip(got, wanted, strict=True)]
        moved = [0.0] * len(got)
        if self.shift is not None:
            shifts = self.shift(inputs)
            moved = [float(np.abs(change).max(initial=0.0)) for change in shifts]
            got = [output - change for output, change in zip(got, shifts, strict=True)]
        between = [find_largest_difference(g, w) for g, w in zip(got, wanted, strict=True)]
        exact = None
        if self.has_exact and (samples_before < EXACT_SAMPLES or self._is_undecided(between)):
            from ecqx_onnx.validation.references.pytorch_outputs import run_reference_exactly

            exact = run_reference_exactly(self.reference, inputs)  # type: ignore[arg-type]
            self.has_exact = exact is not None
        for i, name in enumerate(self.names):
            measured = between[i] if exact is None else find_largest_difference(got[i], exact[i])
            limit = derive_bound(
                wanted[i],
                None if exact is None else exact[i],
                runs=1 if self.shift is None else RUNS,
            )
            if i == len(self.worst):
                self.worst.append(Difference(name, measured, to_pytorch[i], limit, moved[i]))
                continue
            before = self.worst[i]
            limit = before.bound if exact is None else before.bound.widen(limit)
            furthest = max(before.to_pytorch, to_pytorch[i])
            self.worst[i] = Difference(
                name, max(before.measured, measured), furthest, limit, max(before.moved, moved[i])
            )

    def _is_undecided(self, between: Sequence[float]) -> bool:
        """Some output lies too far from PyTorch's, and none had failed before.

        Only then is the float64 result worth its time.
        """
        far = any(
            difference > before.bound.limit
            for difference, before in zip(between, self.worst, strict=True)
        )
        return far and all(before.within for before in self.worst)


def pad_batch(array: np.ndarray, size: int | None) -> np.ndarray:
    """Fill a batch up to the size that a graph insists on.

    Args:
        array: Samples along axis 0, at least one.
        size: The fixed batch size, or None.

    Returns:
        The array, with its last sample repeated.
    """
    missing = 0 if size is None or array.ndim == 0 else size - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing > 0 else array


def _describe_mismatch(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> str:
    shapes = [list(array.shape) for array in got]
    theirs = [list(array.shape) for array in wanted]
    return f"its outputs have other shapes than PyTorch's: {shapes} and {theirs}"
