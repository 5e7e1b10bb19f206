"""Does onnxruntime compute the same with two .onnx files?

Both are run as they are written, with every optimization off: the same operators on the same
weights give the same floats bit for bit, or, where an operator was replaced, the same within
rounding. Then with all optimizations: the second file must say what the first says, either
optimized or as it is written, within rounding (an optimization may make the first file itself less
exact: onnxruntime quantizes the activations of a MatMul whose weight it finds behind
DequantizeLinear).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ecqx_onnx_converters.graph.files import read_proto
from onnx import ModelProto
from rich.console import RenderableType
from rich.text import Text

from ecqx_onnx.data.npz import read_npz
from ecqx_onnx.errors import CheckFailed, DataError, FileError
from ecqx_onnx.inputs.index_bounds import find_index_bounds
from ecqx_onnx.recognition.foreign_graph import seed_random
from ecqx_onnx.runtime.sessions import (
    NUMPY_TYPES,
    Session,
    find_fixed_batch,
    fit_inputs,
    make_synthetic_inputs,
    open_session,
    run,
)
from ecqx_onnx.validation.outputs.bounds import derive_bound
from ecqx_onnx.validation.outputs.comparison import Batch, pad_batch
from ecqx_onnx.validation.outputs.metrics import (
    Agreement,
    Proportion,
    find_largest_difference,
    is_classification,
    measure_accuracy,
    measure_agreement,
)
from ecqx_onnx.validation.report import Check

# Tried for an input's free dimensions until the original takes them; first what is a sequence.
FREE_LENGTHS = (16, 1, 2, 64, 512)
SEEDS = 2


@dataclass(frozen=True)
class Equivalence:
    """What comparing two files found.

    Attributes:
        checks: One a question; a check that could not be made has passed None and says why.
        inputs: Number of sets of inputs that were compared.
        samples: Number of samples in these.
        first: The first set as the second file takes it.
        original_first: The first set as the first file takes it.
        agreement: Of all samples, where the first output is one of classes.
        tie: A lead in the original's scores that is no more than rounding.
        accuracy: The second file's, where there are labels.
        original_accuracy: The first file's.
    """

    checks: tuple[Check, ...]
    inputs: int
    samples: int = 0
    first: tuple[np.ndarray, ...] = ()
    original_first: tuple[np.ndarray, ...] = ()
    agreement: Agreement | None = None
    tie: float = 0.0
    accuracy: Proportion | None = None
    original_accuracy: Proportion | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failure(self) -> str:
        """What failed, in words; "" where nothing did."""
        return "; ".join(
            f"{check.name}: {check.sentence}" for check in self.checks if check.passed is False
        )

    def render(self) -> RenderableType:
        """Draw the checks for a terminal.

        Returns:
            A line for each check.
        """
        marks = {True: "ok", False: "FAILED", None: "-"}
        return Text(
            "\n".join(
                f"{marks[check.passed]} {check.name}: {check.sentence}" for check in self.checks
            )
        )


def compare_models(
    first: Path | bytes,
    second: Path,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    batches: Iterable[Batch] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Equivalence:
    """Run two files on the same inputs and compare what they say.

    Args:
        first: The original, a path or a model with all data in it.
        second: The file that should be the same model.
        inputs: By the first model's names of them, instead of batches.
        batches: Of a data set; without either, random inputs in shapes that the original takes.
        progress: Called with the number of samples done so far.

    Returns:
        What was found.

    Raises:
        DataError: The inputs don't fit, or the data hold no sample.
    """
    seeded, other_seeded = seed_random(first), seed_random(second)
    try:
        written, optimized = (open_session(seeded, level=level) for level in ("disabled", "all"))
        # Trying inputs advances the random numbers of a session.
        trial = written if seeded is first else open_session(seeded, level="disabled")
    except CheckFailed as error:
        return _run_without(second, str(error))
    try:
        other, other_optimized = (
            open_session(other_seeded, level=level) for level in ("disabled", "all")
        )
    except CheckFailed as error:
        return Equivalence((Check("load", False, None, None, str(error)),), 0)
    names = [node.name for node in written.get_inputs()]
    there = [node.name for node in other.get_inputs()]  # weights may be inputs no more
    if unknown := [name for name in there if name not in names]:
        sentence = (
            f"it takes an input '{unknown[0]}', which the original has not ({', '.join(names)})"
        )
        return Equivalence((Check("inputs", False, None, None, sentence),), 0)
    sets: Iterable[Batch] = _draw_random_inputs(trial, _find_bounds(first))
    if batches is not None:
        sets = _fit_batches(written, batches)
    elif inputs is not None:
        sets = [(_take_given_inputs(written, inputs), None)]
    exact, worst = True, [(0.0, 0.0), (0.0, 0.0)]
    count, samples, outputs = 0, 0, 0
    shown: tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]] = ((), ())
    same = Agreement(Proportion(0, 0), 0.0)
    tie = 0.0
    right = Proportion(0, 0)
    original_right = Proportion(0, 0)
    for given, labels in sets:
        values = tuple(pad_batch(array, find_fixed_batch(written)) for array in given)
        kept = tuple(values[names.index(name)] for name in there)
        try:
            references = [run(written, values), run(optimized, values)]
            results = [run(other, kept), run(other_optimized, kept)]
        except CheckFailed as error:
            return Equivalence((Check("run", False, None, None, str(error)),), 0)
        if (mismatch := _find_mismatch(references[0], results[0])) is not None:
            return Equivalence((Check("outputs", False, None, None, mismatch),), 0)
        size = len(given[0]) if given and given[0].ndim else 1
        shown = shown if count else (kept, values)
        count, samples, outputs = count + 1, samples + size, len(references[0])
        exact = exact and all(
            _are_equal(a, b) for a, b in zip(references[0], results[0], strict=True)
        )
        worst[0] = max(_find_worst(references[0], results[0]), worst[0], key=_compute_excess)
        nearest = min(
            references, key=lambda reference: _compute_excess(_find_worst(reference, results[1]))
        )
        worst[1] = max(_find_worst(nearest, results[1]), worst[1], key=_compute_excess)
        if outputs and is_classification(nearest[0]):
            mine, original = results[1][0][:size], nearest[0][:size]
            same += measure_agreement(original, mine)
            tie = max(tie, 2 * derive_bound(original, None).limit)
            if labels is not None:
                right += measure_accuracy(mine, labels)
                original_right += measure_accuracy(original, labels)
        if progress is not None:
            progress(samples)
    if not count and (inputs is not None or batches is not None):
        raise DataError("the data set holds no sample: there is nothing to compare on")
    if not count:
        lengths = ", ".join(map(str, FREE_LENGTHS))
        why = (
            f"the original runs on no random inputs with free lengths of {lengths}: give it real "
            "ones (--inputs)"
        )
        return Equivalence((Check("outputs", None, None, None, f"not compared: {why}"),), 0)
    what = (
        f"{count} set{'s' if count > 1 else ''} of {'given' if inputs is not None else 'random'} "
        "inputs"
    )
    what = what if batches is None else f"{samples} samples of the data"
    checks = tuple(_judge_outputs(exact, worst, outputs, what))
    found = same if same.same else None
    return Equivalence(
        checks, count, samples, *shown, found, tie, right or None, original_right or None
    )


def _find_mismatch(references: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> str | None:
    """A sentence where the outputs cannot be paired."""
    got = [list(array.shape) for array in results]
    wanted = [list(array.shape) for array in references]
    if got == wanted:
        return None
    return f"its outputs have other shapes than the original's: {got} and {wanted}"


def _judge_outputs(
    exact: bool, worst: Sequence[tuple[float, float]], outputs: int, what: str
) -> Iterator[Check]:
    (plain, limit), (fast, fast_limit) = worst
    if exact:
        says = "are equal bit for bit"
    elif plain <= limit:
        says = "differ within rounding"
    else:
        says = "DIFFER"
    yield Check(
        "as written",
        plain <= limit,
        plain,
        limit,
        f"all {outputs} outputs {says}, on {what}, without optimisations",
    )
    says = "agree" if fast <= fast_limit else "do NOT agree"
    sentence = (
        f"with all optimisations they {says} with the original's (largest difference {fast:.2g}, "
        f"limit {fast_limit:.2g})"
    )
    yield Check("optimised", fast <= fast_limit, fast, fast_limit, sentence)


def _run_without(second: Path, why: str) -> Equivalence:
    """The original can't be run: at least the second can."""
    try:
        for level in ("disabled", "all"):
            session = open_session(second, level=level)
    except CheckFailed:
        sentence = (
            f"onnxruntime can run neither model, so they can't be compared; the original: {why}"
        )
        return Equivalence((Check("load", False, None, None, sentence),), 0)
    ran = any(True for _ in _draw_random_inputs(session, _find_bounds(second)))
    sentence = (
        f"the original can't be run ({why}); the packed model {'runs' if ran else 'loads'}, there "
        "is nothing to compare with"
    )
    return Equivalence((Check("outputs", None, None, None, sentence),), 0)


def load_inputs(path: Path) -> dict[str, np.ndarray]:
    """Reads the inputs that a model is to be run on.

    Args:
        path: an .npz file, one array per input's name.

    Returns:
        The arrays by their names.

    Raises:
        FileError: for anything but an .npz of plain arrays.
    """
    try:
        return read_npz(path)
    except FileError as error:
        raise FileError(
            f"cannot read '{path}' as an .npz of the model's inputs ({error});"
            " save it with numpy.savez, plain arrays by the inputs' names"
        ) from error


def _take_given_inputs(
    session: Session, inputs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, ...]:
    names = [node.name for node in session.get_inputs()]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise DataError(
            f"the model's input '{missing[0]}' is not among those given ({', '.join(inputs)})"
        )
    return fit_inputs(session, [inputs[name] for name in names])


def _fit_batches(session: Session, batches: Iterable[Batch]) -> Iterator[Batch]:
    """In the types that the model declares, before a batch is filled up."""
    for given, labels in batches:
        size = len(given[0])
        whole = fit_inputs(
            session, [pad_batch(array, find_fixed_batch(session)) for array in given]
        )
        yield tuple(array[:size] for array in whole), labels


def _find_bounds(model: Path | bytes) -> Mapping[str, int]:
    """What the integers that a model takes have to stay below."""
    if isinstance(model, bytes):
        return find_index_bounds(ModelProto.FromString(model))
    return find_index_bounds(read_proto(model))


def _draw_random_inputs(session: Session, bounds: Mapping[str, int]) -> Iterator[Batch]:
    """Sets of inputs that the model runs on; none if it takes none of those tried."""
    if any(node.type not in NUMPY_TYPES for node in session.get_inputs()):
        return
    ranges = (bounds, {}) if bounds else (bounds,)  # without, where they are no indices after all
    for length, within in itertools.product(FREE_LENGTHS, ranges):
        for seed in range(SEEDS):
            values = make_synthetic_inputs(session, batch=2, free=length, seed=seed, bounds=within)
            try:
                run(session, values)
            except CheckFailed:
                break
            yield values, None
            if seed == SEEDS - 1:
                return


def _find_worst(
    references: Sequence[np.ndarray], results: Sequence[np.ndarray]
) -> tuple[float, float]:
    """(largest difference, its limit) of the output that is nearest to its limit, or furthest past
    it."""
    pairs = [
        (find_largest_difference(result, reference), derive_bound(reference, None).limit)
        for reference, result in zip(references, results, strict=True)
    ]
    return max(pairs, key=_compute_excess, default=(0.0, 0.0))


def _compute_excess(pair: tuple[float, float]) -> float:
    measured, limit = pair
    if limit:
        return measured / limit
    return float("inf") if measured else 0.0


def _are_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    )
