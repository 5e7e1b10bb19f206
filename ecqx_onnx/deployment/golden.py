"""(session, data, PyTorch model) -> golden cases: inputs, the outputs that any runner must reproduce, and how closely.

Two float32 implementations of one network each lie within the bound of validation/bounds.py of the exact result, so they lie
within twice that bound of each other: that is the tolerance. Where activations are quantised, a runtime runs integer
kernels, which give the same bits on x86, arm64 and WebAssembly, or the graph as it is written, in floats; the two may differ by
levels. There it is widened by the largest difference of the two, onnxruntime's optimisation levels, on the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ecqx_onnx.data import Split
from ecqx_onnx.errors import DataError, InputError, ModelError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.sessions import (
    NUMPY_TYPES,
    Session,
    find_fixed_batch,
    fit_inputs,
    make_synthetic_inputs,
    run,
)
from ecqx_onnx.validation.bounds import Bound, derive_bound
from ecqx_onnx.validation.comparison import pad_batch
from ecqx_onnx.validation.metrics import find_largest_difference

if TYPE_CHECKING:
    import torch


CASES = 8
MOST_BYTES = 2**20  # of all golden inputs; one case is kept whatever its size
BOUND_SAMPLES = 256
SPECTRUM_ULPS = (
    4.0  # float64 spectra of two languages differ far below that before they are rounded to float32
)


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the model. raw: samples before preprocessing, [N, ...], or None. labels: the class of each, where known."""

    raw: np.ndarray | None
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Tolerance:
    """value: of outputs computed from golden inputs. raw: of those computed from raw samples. how: value's origin in words."""

    value: float
    raw: float
    how: str


def make_cases(
    session: Session, preprocessing: Preprocessing | None, split: Split | None
) -> tuple[Case, ...]:
    """Up to CASES samples, from the split or synthetic. InputError if the graph takes nothing that can be made up."""
    cases: list[Case] = []
    spent = 0
    for raw, inputs, labels in draw_samples(session, preprocessing, split):
        spent += sum(array.nbytes for array in (*inputs, *([] if raw is None else [raw])))
        if cases and spent > MOST_BYTES:
            break
        outputs = run(session, inputs)
        for node, output in zip(session.get_outputs(), outputs, strict=True):
            if output.dtype.kind == "f" and not np.isfinite(output).all():
                raise ModelError(
                    f"output '{node.name}' holds NaN or infinity, which no runner can be checked against"
                )
        cases.append(Case(raw, inputs, outputs, labels))
    return tuple(cases)


def draw_samples(
    session: Session, preprocessing: Preprocessing | None, split: Split | None
) -> Iterator[tuple[np.ndarray | None, tuple[np.ndarray, ...], tuple[int, ...]]]:
    size = find_fixed_batch(session) or 1
    if split is not None and preprocessing is not None:
        for row, label in zip(split.take(CASES).rows, split.take(CASES).y, strict=True):
            raw = pad_batch(split.source.read(np.array([row])), size)
            yield raw, fit_inputs(session, (preprocessing.apply(raw),)), (int(label),) * len(raw)
        return
    make = None if preprocessing is None else choose_raw_maker(session, preprocessing)
    for number in range(CASES):
        if make is None or preprocessing is None:
            yield None, make_synthetic_inputs(session, batch=size, seed=number), ()
            continue
        raw = np.stack([make(np.random.default_rng([number, i])) for i in range(size)])
        yield raw, fit_inputs(session, (preprocessing.apply(raw),)), ()


def choose_raw_maker(
    session: Session, preprocessing: Preprocessing
) -> Callable[[np.random.Generator], np.ndarray] | None:
    """A function that makes up one raw sample; None where the graph's shape does not tell what a raw sample looks like."""
    nodes = session.get_inputs()
    shape = nodes[0].shape[1:]
    if len(nodes) != 1 or not shape or not all(isinstance(length, int) for length in shape):
        return None
    make = choose_maker(preprocessing, tuple(shape))
    try:
        if make is not None:
            fit_inputs(
                session,
                (
                    preprocessing.apply(
                        np.repeat(
                            make(np.random.default_rng(0))[None],
                            find_fixed_batch(session) or 1,
                            axis=0,
                        )
                    ),
                ),
            )
    except (InputError, ValueError):  # recorded for another input than this graph's
        return None
    return make


def choose_maker(
    preprocessing: Preprocessing, shape: tuple[int, ...]
) -> Callable[[np.random.Generator], np.ndarray] | None:
    levels = int(min(255, preprocessing.scale)) if preprocessing.scale > 1 else 255
    if preprocessing.kind == "image" and len(shape) == 3:
        pixels = shape[1:] if shape[0] == 1 else (*shape[1:], shape[0])
        return lambda generator: generator.integers(0, levels + 1, pixels, dtype=np.uint8)
    if preprocessing.kind == "waveform":
        samples = preprocessing.samples
        if samples is None:
            spectrum = preprocessing.spectrum
            samples = (
                shape[-1]
                if spectrum is None
                else spectrum.frame_length + (shape[-2] - 1) * spectrum.hop
            )
        return lambda generator: (generator.standard_normal(samples) * 3000).astype(np.int16)
    if preprocessing.kind == "array":
        if preprocessing.scale == 255:
            return lambda generator: generator.integers(0, 256, shape, dtype=np.uint8)
        return lambda generator: (generator.standard_normal(shape) * preprocessing.scale).astype(
            np.float32
        )
    if preprocessing.kind == "indices":
        return lambda generator: generator.integers(0, 2, shape)
    return None


def compute_preprocessing_tolerance(
    preprocessing: Preprocessing | None, cases: Sequence[Case]
) -> float:
    """How far another language's input may lie from ours: nowhere, but for spectra, where float32 rounding may differ."""
    if preprocessing is None or preprocessing.spectrum is None:
        return 0.0
    highest = max(float(np.abs(array).max(initial=0)) for case in cases for array in case.inputs)
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
    """One per output. plain: the same file without optimisations. batches: model inputs, some of the data, besides the cases."""
    bounds: list[Bound] = []
    levels = [0.0] * len(session.get_outputs())
    for inputs in (*(case.inputs for case in cases), *batches):
        for i, found in enumerate(compute_bounds(session, reference, inputs)):
            if i == len(bounds):
                bounds.append(found)
            bounds[i] = bounds[i].widen(found)
        if quantized:
            both = zip(run(session, inputs), run(plain, inputs), strict=True)
            levels = [
                max(level, find_largest_difference(a, b))
                for level, (a, b) in zip(levels, both, strict=True)
            ]
    swings = measure_swings(session, cases, input_tolerance)
    found_all = []
    for one, level, swing in zip(bounds, levels, swings, strict=True):
        value, how = 2 * one.limit, f"2 x ({one.formula})"
        if quantized:
            value, how = (
                value + level,
                f"{how} + {level:.2e} between integer kernels and the graph as written",
            )
        if not math.isfinite(value):
            raise ModelError(
                "two optimisation levels of onnxruntime give outputs of other shapes: which is right?"
            )
        found_all.append(Tolerance(value, value + swing, how))
    return tuple(found_all)


def compute_bounds(
    session: Session, reference: torch.nn.Module | None, inputs: Sequence[np.ndarray]
) -> list[Bound]:
    from ecqx_onnx.validation.pytorch_outputs import run_reference, run_reference_exactly

    if reference is None:
        return [derive_bound(output, None) for output in run(session, inputs)]
    wanted = run_reference(reference, inputs)
    exact = run_reference_exactly(reference, inputs)
    if len(wanted) != len(session.get_outputs()):
        raise ModelError(
            f"PyTorch's model gives {len(wanted)} outputs and the file {len(session.get_outputs())}: give its own model"
        )
    return [
        derive_bound(output, None if exact is None else exact[i]) for i, output in enumerate(wanted)
    ]


def measure_swings(session: Session, cases: Sequence[Case], tolerance: float) -> list[float]:
    """How far outputs may move when each input value moves by the tolerance: 4 times the most of some random draws."""
    most = [0.0] * len(session.get_outputs())
    if tolerance == 0:
        return most
    generator = np.random.default_rng(0)
    for case in cases:
        for _ in range(4):
            moved = [
                a + (tolerance * generator.choice([-1, 1], a.shape)).astype(a.dtype)
                for a in case.inputs
            ]
            both = zip(run(session, moved), case.outputs, strict=True)
            most = [
                max(old, find_largest_difference(a, b))
                for old, (a, b) in zip(most, both, strict=True)
            ]
    return [4 * swing for swing in most]


def find_element_type(node: Any) -> str:
    """numpy's name of an input's or output's type. ModelError for types that runners cannot be given."""
    if node.type not in NUMPY_TYPES:
        raise ModelError(
            f"'{node.name}' has type {node.type}, for which no golden values can be made"
        )
    return np.dtype(NUMPY_TYPES[node.type]).name


def draw_bound_batches(
    split: Split, preprocessing: Preprocessing, size: int
) -> Iterator[Sequence[np.ndarray]]:
    """Model inputs of up to BOUND_SAMPLES samples."""
    taken = split.with_preprocessing(preprocessing).take(BOUND_SAMPLES)
    try:
        for x, _ in taken.batches(size):
            yield (pad_batch(x, size),)
    except DataError:  # NaN in a sample, say: validation has told
        return
