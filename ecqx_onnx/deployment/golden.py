"""Golden cases: inputs for a model, and the outputs that any runner must reproduce.

Inputs come from a data set where there is one, else they are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ecqx_onnx.data import Split
from ecqx_onnx.errors import InputError, ModelError
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.sessions import (
    Session,
    find_fixed_batch,
    fit_inputs,
    make_synthetic_inputs,
    run,
)
from ecqx_onnx.validation.outputs.comparison import pad_batch

CASES = 8
MOST_BYTES = 2**20  # of all golden inputs; one case is kept whatever its size
LOUDNESS = 3000  # standard deviation of made-up audio, int16

Maker = Callable[[np.random.Generator], np.ndarray]
"""generator -> one raw sample, made up."""


@dataclass(frozen=True, eq=False)
class Case:
    """One call of the model.

    Attributes:
        raw: samples before preprocessing, [N, ...]; None where only model inputs are known.
        inputs: the model's inputs, each [N, ...].
        outputs: the model's outputs by onnxruntime, each [N, ...].
        labels: the class of each sample, where they are known; else empty.
    """

    raw: np.ndarray | None
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    labels: tuple[int, ...]

    @property
    def input_bytes(self) -> int:
        """Size of the inputs and of the raw samples."""
        size = sum(array.nbytes for array in self.inputs)
        if self.raw is not None:
            size += self.raw.nbytes
        return size


def make_cases(
    session: Session, preprocessing: Preprocessing | None, split: Split | None
) -> tuple[Case, ...]:
    """Make golden cases, at most CASES, and one where a single one is large.

    Args:
        session: the model, which computes the outputs.
        preprocessing: what makes inputs of raw samples; None where it is not known.
        split: samples of a data set; None has inputs made up.

    Returns:
        The cases; none for an empty split.

    Raises:
        InputError: if the graph takes nothing that can be made up.
        ModelError: if an output holds NaN or infinity.
    """
    cases: list[Case] = []
    spent = 0
    for raw, inputs, labels in _draw_samples(session, preprocessing, split):
        case = Case(raw, inputs, (), labels)
        spent += case.input_bytes
        if cases and spent > MOST_BYTES:
            break
        outputs = run(session, inputs)
        for node, output in zip(session.get_outputs(), outputs, strict=True):
            if output.dtype.kind == "f" and not np.isfinite(output).all():
                raise ModelError(
                    f"output '{node.name}' holds NaN or infinity, which no runner can be checked "
                    "against"
                )
        cases.append(replace(case, outputs=outputs))
    return tuple(cases)


def _draw_samples(
    session: Session, preprocessing: Preprocessing | None, split: Split | None
) -> Iterator[tuple[np.ndarray | None, tuple[np.ndarray, ...], tuple[int, ...]]]:
    """(raw samples, model inputs, classes) of each case."""
    size = find_fixed_batch(session) or 1
    if split is not None and preprocessing is not None:
        taken = split.take(CASES)
        for row, label in zip(taken.rows, taken.y, strict=True):
            raw = pad_batch(split.source.read(np.array([row])), size)
            yield raw, fit_inputs(session, (preprocessing.apply(raw),)), (int(label),) * len(raw)
        return
    make = None
    if preprocessing is not None:
        make = choose_raw_maker(session, preprocessing)
    for number in range(CASES):
        if make is None or preprocessing is None:
            yield None, make_synthetic_inputs(session, batch=size, seed=number), ()
            continue
        raw = np.stack([make(np.random.default_rng([number, i])) for i in range(size)])
        yield raw, fit_inputs(session, (preprocessing.apply(raw),)), ()


def choose_raw_maker(session: Session, preprocessing: Preprocessing) -> Maker | None:
    """Choose how raw samples are made up.

    Args:
        session: the model, whose input's shape tells the shape of raw samples.
        preprocessing: what makes inputs of them.

    Returns:
        A function that makes up one raw sample; None where the graph's shape does not tell what a
        raw sample looks like, or the preprocessing was recorded for another input than this one.
    """
    nodes = session.get_inputs()
    shape = nodes[0].shape[1:]
    if len(nodes) != 1 or not shape or not all(isinstance(length, int) for length in shape):
        return None
    make = _choose_maker(preprocessing, tuple(shape))
    if make is None:
        return None
    try:
        sample = make(np.random.default_rng(0))
        batch = np.repeat(sample[None], find_fixed_batch(session) or 1, axis=0)
        fit_inputs(session, (preprocessing.apply(batch),))
    except (InputError, ValueError):
        return None
    return make


def _choose_maker(preprocessing: Preprocessing, shape: tuple[int, ...]) -> Maker | None:
    """What makes up raw samples for model inputs [N, *shape]; None where they can't be told."""
    scale = preprocessing.scale
    if preprocessing.kind == "image" and len(shape) == 3:
        channels, height, width = shape
        pixels = (height, width) if channels == 1 else (height, width, channels)
        highest = int(min(255, scale)) if scale > 1 else 255
        return lambda generator: generator.integers(0, highest + 1, pixels, dtype=np.uint8)
    if preprocessing.kind == "waveform":
        samples = _count_samples(preprocessing, shape)
        return lambda generator: (generator.standard_normal(samples) * LOUDNESS).astype(np.int16)
    if preprocessing.kind == "array" and scale == 255:
        return lambda generator: generator.integers(0, 256, shape, dtype=np.uint8)
    if preprocessing.kind == "array":
        return lambda generator: (generator.standard_normal(shape) * scale).astype(np.float32)
    if preprocessing.kind == "indices":
        return lambda generator: generator.integers(0, 2, shape)
    return None


def _count_samples(preprocessing: Preprocessing, shape: tuple[int, ...]) -> int:
    """The length of a waveform that becomes a model input of this shape."""
    if preprocessing.samples is not None:
        return preprocessing.samples
    spectrum = preprocessing.spectrum
    if spectrum is None:
        return shape[-1]
    return spectrum.frame_length + (shape[-2] - 1) * spectrum.hop
