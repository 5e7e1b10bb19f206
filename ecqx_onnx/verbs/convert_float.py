"""Write a float model as an .onnx file of integers, at once: no search, no verdict.

`convert` comes here with a float .onnx file, with bits per weight, and with data to round by.

    bits              a grid of 2^bits - 1 levels
    bits_per_weight   an open grid, its steps turned until the coded bits are used up
    calibration       errors are fed back through second moments of the inputs; without it they
                      cancel over windows and rows, or weights take the nearest level
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ecqx_onnx_converters import WriteReport
from ecqx_onnx_converters.graph.outputs import check_output
from ecqx_onnx_converters.planning.planner import check_forms
from ecqx_onnx_converters.targets import check_name, find_target

from ecqx_onnx import __version__
from ecqx_onnx.compression.encoding import Encoded, FileOptions, encode
from ecqx_onnx.compression.model.biases import with_biases
from ecqx_onnx.compression.model.float_model import FloatModel, load_float_model
from ecqx_onnx.compression.model.weights import find_weights, select_weights
from ecqx_onnx.compression.rounding.capped import fit_capped_steps, outermost_level
from ecqx_onnx.compression.rounding.moments import MomentKey, Moments, collect_moments
from ecqx_onnx.compression.rounding.ordered import (
    Layers,
    RoundedModel,
    round_at_once,
    round_in_order,
)
from ecqx_onnx.compression.rounding.rounding import HIGHEST, widen_steps
from ecqx_onnx.compression.rounding.units import choose_unit
from ecqx_onnx.compression.search.allocation import (
    allocate,
    find_dial,
    measure_rate,
)
from ecqx_onnx.compression.search.bounds import make_bounds
from ecqx_onnx.compression.search.points import Candidate, Point, open_watching_runner
from ecqx_onnx.compression.search.quality import Quality
from ecqx_onnx.compression.search.samples import (
    InputSpec,
    Samples,
    load_calibration,
    load_samples,
)
from ecqx_onnx.compression.search.search import search
from ecqx_onnx.compression.search.sensitivity import fill_unmoved, measure_sensitivity
from ecqx_onnx.delivery.delivery import deliver
from ecqx_onnx.errors import DataError, ModelError, OptionError
from ecqx_onnx.options.input_shape import InputShape
from ecqx_onnx.preprocessing.preprocessing import Preprocessing
from ecqx_onnx.runtime.runner import Feeds, Runner, batch_size
from ecqx_onnx.runtime.sessions import make_synthetic_inputs
from ecqx_onnx.validation.outputs.metrics import Proportion
from ecqx_onnx.validation.references.float_distance import (
    FloatBounds,
    OutputDistance,
    add_distances,
    judge_distance,
    measure_output,
)

BATCH = 32
PROBED = 128  # samples for the sensitivities
RANDOM_SETS = 8  # of inputs, where no data tell the distance from the float model
RANDOM_BATCH = 4
FREE_LENGTHS = (1, 2, 16, 64, 512)  # tried for dimensions that the graph leaves free


@dataclass(frozen=True)
class FloatOptions:
    """How a float model is written.

    Attributes:
        bits: 2 to 8, or None.
        bits_per_weight: coded bits, or None; one of the two is given.
        include, exclude: patterns of weights' names.
        calibration: data to round by, or None.
        calibration_samples: at most so many.
        data: what the result is compared with the float model on; None for random inputs.
        bounds: beyond which distance the report warns.
        file: how it is written.
    """

    bits: int | None
    bits_per_weight: float | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    calibration: Any
    calibration_samples: int
    data: Any
    bounds: FloatBounds
    file: FileOptions


def convert_float(
    model: Any,
    out: Path,
    options: FloatOptions,
    *,
    factory: str | None = None,
    example: Any = None,
    input_shape: InputShape | None = None,
    dynamic: Any = None,
    trust_pickle: bool = False,
    force: bool = False,
) -> WriteReport:
    """Quantize a float model and write it.

    Args:
        model: an .onnx file, or a PyTorch model.
        out: the file to write.
        options: how.
        factory: of a state dict, as for `convert`, like what follows.
        example: for a module.
        input_shape: of the inputs.
        dynamic: which of their axes are free.
        trust_pickle: unpickle a module, which runs its author's code.
        force: replace `out` if it exists.

    Returns:
        How each weight is stored, what stays float and why, and notes; one of them says how far
        the outputs are from the float model's.

    Raises:
        InputError: something given can't be used, or the bits can't be reached.
    """
    check_forms(options.file.storage, options.file.dequantize)
    find_target(options.file.target)
    check_output(out, force=force, source=model)
    check_name(out, options.file.target)
    loaded = load_float_model(
        model,
        factory=factory,
        example=example,
        input_shape=input_shape,
        dynamic=dynamic,
        trust_pickle=trust_pickle,
    )
    weights, passed = select_weights(
        *find_weights(loaded.graph), include=options.include, exclude=options.exclude
    )
    if not weights:
        raise ModelError(
            f"{loaded.source}: has no weight to quantise"
            + (f" ({passed[0].name}: {passed[0].reason})" if passed else "")
        )
    layers = Layers(loaded.graph, weights, {})
    if options.calibration is not None:  # only data tell a mean error that biases can take up
        biased, biases = with_biases(loaded.graph, weights)
        layers = Layers(biased, weights, biases)
    layers, runner, unwatched = open_watching_runner(layers, 1)
    feeds, told = _load_feeds(loaded, runner, options)
    maker = _Maker(layers, runner, feeds, options)
    model_of_levels, encoded = maker.make()
    check, error = _judge(loaded, layers, runner, model_of_levels, options)
    recipe: dict[str, Any] = {"trained": False}
    if options.bits is not None:
        recipe["bits"] = options.bits
    else:
        recipe["bits_per_weight"] = round(encoded.bits_per_weight, 4)
    if math.isfinite(error):
        recipe["float_error"] = float(f"{error:.3g}")
    metadata = {**encoded.metadata, **describe_model(loaded, recipe)}
    report = deliver(encoded.plan, out, metadata=metadata, force=force, valid=loaded.valid)
    reasons = {entry.name: entry.reason for entry in passed}
    kept = tuple(replace(e, reason=reasons.get(e.name, e.reason)) for e in report.kept)
    coded = f"{encoded.bits_per_weight:.3f} coded bits for each quantised weight"
    rounding = (*encoded.notes, *model_of_levels.notes)
    notes = (*report.notes, *loaded.notes, *unwatched, *told, *rounding, coded, check)
    return replace(report, kept=kept, notes=notes)


def describe_model(model: FloatModel, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what the file says of itself.

    Args:
        model: the float model.
        recipe: how its weights were made.

    Returns:
        JSON values by name.
    """
    import json

    document: dict[str, Any] = {"version": __version__, "recipe": dict(recipe)}
    used = model.preprocessing
    if used is not None and used != Preprocessing("array"):
        fields = json.loads(used.to_json())
        document["preprocessing"] = {key: v for key, v in fields.items() if v is not None}
    if model.labels and model.labels != tuple(map(str, range(len(model.labels)))):
        document["labels"] = list(model.labels)
    return document


def _known_preprocessing(model: FloatModel) -> Preprocessing | None:
    known = model.preprocessing
    return None if known is None or known == Preprocessing("array") else known


def _load_feeds(
    model: FloatModel, runner: Runner, options: FloatOptions
) -> tuple[list[Feeds], tuple[str, ...]]:
    """(batches to round by, none without calibration data; a sentence on them)."""
    if options.calibration is None:
        return [], ()
    specs = [InputSpec.of(node) for node in runner.inputs]
    known = _known_preprocessing(model)
    samples = load_calibration(
        options.calibration, specs, preprocessing=known, samples=options.calibration_samples
    )
    used = samples.preprocessing
    told = (
        f"rounded by {len(samples)} samples of {samples.name}; preprocessing:"
        f" {used.describe() if used else 'none, arrays as they are'}"
    )
    return samples.feeds(_batch_of(specs, samples)), (told,)


def _batch_of(specs: Sequence[InputSpec], samples: Samples) -> int:
    fixed = [spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None]
    if samples.calls:
        return 1
    if fixed and fixed[0] and len(samples) % fixed[0]:
        raise DataError(
            f"the model takes batches of {fixed[0]}, and {len(samples)} samples are no whole number"
            " of them: choose --calibration-samples so"
        )
    return int(fixed[0]) if fixed and fixed[0] else BATCH


class _Maker:
    """Rounds by one of the ways that the options ask for."""

    def __init__(
        self, layers: Layers, runner: Runner, feeds: list[Feeds], options: FloatOptions
    ) -> None:
        self.layers, self.runner, self.feeds, self.options = layers, runner, feeds, options
        self.moments: Mapping[MomentKey, Moments] = {}
        if feeds:
            count = sum(batch_size(batch) for batch in feeds)
            self.moments = collect_moments(runner, layers.weights, feeds, samples=count)

    def make(self) -> tuple[RoundedModel, Encoded]:
        """The levels of all weights, and the file in memory."""
        if self.options.bits is not None:
            highest = outermost_level(self.options.bits)
            steps = {
                weight.name: fit_capped_steps(weight, self.layers.matrices(weight), highest)
                for weight in self.layers.weights
            }
            made = self._round(steps, highest)
            return made, encode(self.layers, made, self.options.file, metadata={})
        return self._search()

    def _round(self, steps: Mapping[str, np.ndarray], capped: int | None) -> RoundedModel:
        if self.feeds:
            known = self.moments
            return round_in_order(self.layers, steps, self.feeds, capped=capped, known=known)
        if capped is None:  # nothing is clipped, and without data errors can only cancel
            capped = HIGHEST
            steps = {
                weight.name: widen_steps(self.layers.matrices(weight), steps[weight.name])[0]
                for weight in self.layers.weights
            }
        return round_at_once(self.layers, steps, {}, capped=capped)

    def _search(self) -> tuple[RoundedModel, Encoded]:
        """Steps that use up the bits per weight, shared out by sensitivity where data tell it."""
        units = {}
        curves = []
        for weight in self.layers.weights:
            matrices = self.layers.matrices(weight)
            units[weight.name] = choose_unit(weight, matrices)
            curves.append(measure_rate(weight.name, matrices, units[weight.name]))
        sizes = {curve.name: curve.size for curve in curves}
        slopes: Mapping[str, float] = {name: float(size) for name, size in sizes.items()}
        if self.feeds:
            some = self.feeds[: max(1, PROBED // BATCH)]
            found = measure_sensitivity(self.layers, units, self.moments, self.runner, some)
            slopes = fill_unmoved(found, sizes)
        entries = sum(sizes.values())
        made: dict[float, RoundedModel] = {}

        def make(bits: float) -> Candidate:
            dial = find_dial(curves, slopes, bits * entries)
            chosen = allocate(curves, slopes, dial)
            steps = {name: units[name] * np.float32(multiple) for name, multiple in chosen.items()}
            made.clear()
            made[bits] = self._round(steps, None)
            encoded = encode(self.layers, made[bits], self.options.file, metadata={})
            quality = Quality((), None, None, None, 0)
            point = Point(bits, encoded.nbytes, encoded.bits_per_weight, quality, chosen)
            return Candidate(point, (), encoded, made[bits].without_weights())

        wanted = self.options.bits_per_weight
        found_point = search(make, make_bounds(bits_per_weight=wanted), entries=entries)
        candidate = found_point.chosen
        if not found_point.held:
            raise OptionError(
                f"--bits-per-weight {wanted:g} cannot be reached: the fewest are"
                f" {candidate.point.bits_per_weight:.2f}; tables and steps count"
            )
        assert candidate.rounded is not None
        return candidate.rounded, candidate.encoded


def _judge(
    model: FloatModel,
    layers: Layers,
    runner: Runner,
    made: RoundedModel,
    options: FloatOptions,
) -> tuple[str, float]:
    """(a sentence on the distance from the float model, the largest relative error)."""
    try:
        batches, name, labelled = _data_to_judge_on(model, runner, options)
    except DataError as trouble:
        if options.data is not None:
            raise
        return f"how far this is from the float model is not known: {trouble}", math.inf
    changed = dict(made.changed)
    for weight in layers.weights:
        if weight.name in made.rounded:
            changed[weight.name] = weight.from_matrices(made.rounded[weight.name].values)
    distances: tuple[OutputDistance, ...] = ()
    right, float_right = Proportion(0, 0), Proportion(0, 0)
    count = 0
    for feeds, labels in batches:
        exact = runner.run(feeds)
        found = runner.run(feeds, weights=changed)
        pairs = zip(runner.outputs, found, exact, strict=True)
        distances = add_distances(distances, [measure_output(*pair) for pair in pairs])
        count += max((len(array) for array in feeds.values() if array.ndim), default=1)
        if labels is not None and exact[0].ndim == 2:
            right += Proportion(int((found[0].argmax(1) == labels).sum()), len(labels))
            float_right += Proportion(int((exact[0].argmax(1) == labels).sum()), len(labels))
    check = judge_distance(
        distances,
        options.bounds,
        on=f"{count} {name}",
        scores=labelled or bool(model.labels),
        accuracies=(right, float_right) if right else None,
    )
    error = max((distance.error for distance in distances), default=0.0)
    return ("warning: " if check.passed is False else "") + check.sentence, error


class _Declared:
    """A runner's inputs as a session declares them."""

    def __init__(self, runner: Runner) -> None:
        self.get_inputs = lambda: runner.inputs


def _draw_inputs(runner: Runner, seed: int) -> Feeds:
    """Random inputs, in lengths that the model takes where it leaves them free."""
    names = [node.name for node in runner.inputs]
    for length in FREE_LENGTHS:
        declared: Any = _Declared(runner)
        arrays = make_synthetic_inputs(declared, batch=RANDOM_BATCH, free=length, seed=seed)
        feeds = dict(zip(names, arrays, strict=True))
        try:
            runner.run(feeds)
        except DataError:
            continue
        return feeds
    raise DataError("the model takes no random inputs: add --data to see how far the result is")


def _data_to_judge_on(
    model: FloatModel, runner: Runner, options: FloatOptions
) -> tuple[list[tuple[Feeds, np.ndarray | None]], str, bool]:
    """(batches with labels or None, the data in words, whether they have labels)."""
    if options.data is None:
        batches: list[tuple[Feeds, np.ndarray | None]] = []
        for seed in range(RANDOM_SETS):
            batches.append((_draw_inputs(runner, seed), None))
        return batches, "random inputs", False
    specs = [InputSpec.of(node) for node in runner.inputs]
    samples = load_samples(options.data, specs, preprocessing=_known_preprocessing(model))
    size = 1 if samples.calls else BATCH
    return list(samples.batches(size)), f"samples of {samples.name}", samples.labels is not None
