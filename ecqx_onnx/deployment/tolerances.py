"""Tolerances: how closely a runner on another device must reproduce a model's outputs.

Two float32 implementations of one network each lie within the bound of the exact result
(validation/outputs/bounds.py), so they lie within twice that bound of each other: that is the
tolerance. Where activations are quantized, a runtime runs integer kernels, which give the same bits
on x86, arm64 and WebAssembly, or the graph as it is written, in floats; the two may differ by
levels. There it is widened by the largest difference of the two, onnxruntime's optimization levels,
on the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ecqx_onnx.data import Split
from ecqx_onnx.deployment.golden import Case
from ecqx_onnx.errors import DataError, ModelError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.sessions import Session, run
from ecqx_onnx.validation.outputs.bounds import Bound, derive_bound
from ecqx_onnx.validation.outputs.comparison import pad_batch
from ecqx_onnx.validation.outputs.metrics import find_largest_difference

if TYPE_CHECKING:
    import torch


BOUND_SAMPLES = 256
SWINGS = 4  # random draws a case
# float64 spectra of two languages differ far below that before they are rounded to float32.
SPECTRUM_ULPS = 4.0


@dataclass(frozen=True)
class Tolerance:
    """How far an output may lie from its golden values, as the largest absolute difference.

    Attributes:
        value: for outputs computed from golden inputs.
        raw: for outputs computed from raw samples, whose preprocessing may round differently.
        how: where value comes from, in words.
    """

    value: float
    raw: float
    how: str


def compute_preprocessing_tolerance(
    preprocessing: Preprocessing | None, cases: Sequence[Case]
) -> float:
    """Compute how far another language's model input may lie from ours.

    Args:
        preprocessing: what makes inputs of raw samples; None where there is none.
        cases: the golden cases.

    Returns:
        0 but for spectra, whose last float32 bits may differ.
    """
    if preprocessing is None or preprocessing.spectrum is None:
        return 0.0
    highest = 0.0
    for case in cases:
        for array in case.inputs:
            highest = max(highest, float(np.abs(array).max(initial=0)))
    return SPECTRUM_ULPS * float(np.spacing(np.float32(highest)))


def compute_tolerances(
    session: Session,
    plain: Session,
    cases: Sequence[Case],
    *,
    reference: torch.nn.Module | None,
    batches: Iterator[Sequence[np.ndarray]],
    quantized: bool,
    input_tolerance: float,
) -> tuple[Tolerance, ...]:
    """Compute the tolerance of each output.

    Args:
        session: the model.
        plain: the same file without optimizations.
        cases: the golden cases.
        reference: PyTorch's model, from which sharp bounds are derived; None gives coarse ones.
        batches: model inputs besides the cases, some of the data.
        quantized: whether activations are quantized, so that kernels may differ by levels.
        input_tolerance: what `compute_preprocessing_tolerance` gives.

    Returns:
        One for each output of the model.

    Raises:
        ModelError: if PyTorch's model has another number of outputs, or the two sessions give
            outputs of different shapes.
    """
    # 1. The widest bound over all inputs, and the largest difference of the two sessions.
    bounds: list[Bound] = []
    level_gaps = [0.0] * len(session.get_outputs())
    for inputs in (*(case.inputs for case in cases), *batches):
        found = _compute_bounds(session, reference, inputs)
        if not bounds:
            bounds = found
        bounds = [bound.widen(other) for bound, other in zip(bounds, found, strict=True)]
        if quantized:
            gaps = _compare_outputs(run(session, inputs), run(plain, inputs))
            level_gaps = list(map(max, level_gaps, gaps))
    # 2. How much of the difference of preprocessed inputs reaches the outputs.
    swings = _measure_swings(session, cases, input_tolerance)
    # 3. Their sum, and in words where it comes from.
    tolerances = []
    for bound, gap, swing in zip(bounds, level_gaps, swings, strict=True):
        value = 2 * bound.limit
        how = f"2 x ({bound.formula})"
        if quantized:
            value += gap
            how += f" + {gap:.2e} between integer kernels and the graph as written"
        if not math.isfinite(value):
            raise ModelError(
                "two optimisation levels of onnxruntime give outputs of other shapes: which is "
                "right?"
            )
        tolerances.append(Tolerance(value, value + swing, how))
    return tuple(tolerances)


def _compare_outputs(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> list[float]:
    """The largest difference of each output."""
    return [find_largest_difference(a, b) for a, b in zip(one, other, strict=True)]


def _compute_bounds(
    session: Session, reference: torch.nn.Module | None, inputs: Sequence[np.ndarray]
) -> list[Bound]:
    """The rounding bound of each output for these inputs."""
    if reference is None:
        return [derive_bound(output, None) for output in run(session, inputs)]
    from ecqx_onnx.validation.references.pytorch_outputs import run_reference, run_reference_exactly

    wanted = run_reference(reference, inputs)
    exact = run_reference_exactly(reference, inputs)
    if len(wanted) != len(session.get_outputs()):
        raise ModelError(
            f"PyTorch's model gives {len(wanted)} outputs and the file "
            f"{len(session.get_outputs())}: give its own model"
        )
    if exact is None:
        return [derive_bound(output, None) for output in wanted]
    return [derive_bound(output, exact[i]) for i, output in enumerate(wanted)]


def _measure_swings(session: Session, cases: Sequence[Case], tolerance: float) -> list[float]:
    """How far outputs may move when each input value moves by the tolerance.

    4 times the most of some random draws, as these need not hit the worst one.
    """
    largest = [0.0] * len(session.get_outputs())
    if tolerance == 0:
        return largest
    generator = np.random.default_rng(0)
    for case in cases:
        for _ in range(SWINGS):
            moved = []
            for array in case.inputs:
                step = tolerance * generator.choice([-1, 1], array.shape)
                moved.append(array + step.astype(array.dtype))
            gaps = _compare_outputs(run(session, moved), case.outputs)
            largest = list(map(max, largest, gaps))
    return [4 * swing for swing in largest]


def draw_bound_batches(
    split: Split, preprocessing: Preprocessing, size: int
) -> Iterator[Sequence[np.ndarray]]:
    """Draw model inputs from a data set for `compute_tolerances`.

    Args:
        split: the samples, of which at most BOUND_SAMPLES are taken, evenly spaced.
        preprocessing: what makes inputs of them.
        size: samples of a batch; the last is filled up.

    Yields:
        The inputs of one call. It ends early at a sample that cannot be read.
    """
    taken = split.with_preprocessing(preprocessing).take(BOUND_SAMPLES)
    try:
        for x, _ in taken.batches(size):
            yield (pad_batch(x, size),)
    except DataError:  # NaN in a sample, say: validation has told
        return
