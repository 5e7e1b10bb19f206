"""How far a model that was quantized without training lies from its float model.

The relative error of an output is ||quantized - float|| / ||float||, over all samples. For class
scores the share of samples that get the float model's class says more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ecqx_onnx.errors import OptionError
from ecqx_onnx.validation.outputs.metrics import Proportion, is_classification
from ecqx_onnx.validation.report import Check

LEAST_AGREEMENT = 99.0  # per cent, of class scores
LARGEST_ERROR = 0.05  # relative, of all other outputs
# The same for `convert --bits`, which is asked for bits and not for closeness.
ROUNDED_AGREEMENT = 95.0
ROUNDED_ERROR = 0.1
SHOWN_LAYERS = 3
SHOWN_OUTPUTS = 4
NAME = "float model"


@dataclass(frozen=True)
class FloatBounds:
    """How far an untrained result may lie from its float model.

    Where none is given, the defaults are judged: one for class scores, one for all other outputs.
    Where one is given, only what is given.

    Attributes:
        min_agreement: Per cent of the samples that keep the float model's class; None: not judged.
        max_error: Relative error of every output; None: not judged.
        max_drop: Points of accuracy, on labelled data; None: not judged.
        default_agreement: Per cent, where no bound is given.
        default_error: Relative, where no bound is given.
    """

    min_agreement: float | None = None
    max_error: float | None = None
    max_drop: float | None = None
    default_agreement: float = LEAST_AGREEMENT
    default_error: float = LARGEST_ERROR

    @property
    def given(self) -> bool:
        """Whether there is a bound at all."""
        return any(v is not None for v in (self.min_agreement, self.max_error, self.max_drop))

    def __post_init__(self) -> None:
        share = self.min_agreement
        if share is not None and 0 < share <= 1:
            raise OptionError(f"--min-agreement {share:g} is in per cent: write {100 * share:g}")
        if share is not None and not 0 <= share <= 100:
            raise OptionError(
                f"--min-agreement {share:g} is no percentage: write a number from 0 to 100, such "
                "as 98"
            )
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise OptionError(
                f"--max-error {self.max_error:g} is no relative error: write a number such as 0.1"
            )
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            raise OptionError(
                f"--max-drop {self.max_drop:g} is not in points of accuracy: write 0 to 100, such "
                "as 0.5"
            )


ROUNDED = FloatBounds(default_agreement=ROUNDED_AGREEMENT, default_error=ROUNDED_ERROR)


def choose_bounds(given: FloatBounds | None, metadata: Mapping[str, object]) -> FloatBounds:
    """Choose what a file is judged by.

    Args:
        given: by the user; None where nothing is.
        metadata: of the file. Only whether `convert --bits` made it is asked, never a number.

    Returns:
        What is given, else the defaults of the command that the file names.
    """
    if given is not None:
        return given
    asked_for_bits = {"bits", "bits_per_weight"} & recipe_of(metadata).keys()
    return ROUNDED if asked_for_bits else FloatBounds()


@dataclass(frozen=True)
class OutputDistance:
    """One output's distance, summed over the samples so far.

    Attributes:
        name: The output's.
        squares: Sum of the squared differences.
        float_squares: Sum of the float model's squared values.
        same: Samples with the float model's class, where the output has the form of class scores.
    """

    name: str
    squares: float
    float_squares: float
    same: Proportion

    @property
    def error(self) -> float:
        """||quantised - float|| / ||float||.

        Infinite where only one of them is no number or zero.
        """
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.float_squares) if self.float_squares > 0 else math.inf

    def __add__(self, other: OutputDistance) -> OutputDistance:
        squares = self.squares + other.squares
        float_squares = self.float_squares + other.float_squares
        return OutputDistance(self.name, squares, float_squares, self.same + other.same)


@dataclass(frozen=True)
class LayerError:
    """||quantised - float|| / ||float|| of one weight."""

    name: str
    error: float


def measure_output(name: str, quantized: np.ndarray, exact: np.ndarray) -> OutputDistance:
    """Measure how far an output lies from the float model's.

    Args:
        name: The output's.
        quantized: The quantized model's, [N, ...].
        exact: The float model's, in the same shape.

    Returns:
        Its distance on these samples; infinite for other shapes.
    """
    a, b = quantized.astype(np.float64), exact.astype(np.float64)
    if a.shape != b.shape:
        return OutputDistance(name, math.inf, float(np.square(b).sum()), Proportion(0, 0))
    both_infinite = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(both_infinite, 0.0, a - b)
        squares = float(np.nan_to_num(np.square(difference), nan=math.inf).sum())
        finite = b[np.isfinite(b)]
    same = Proportion(0, 0)
    if is_classification(exact):
        same = Proportion(int(np.count_nonzero(quantized.argmax(1) == exact.argmax(1))), len(exact))
    return OutputDistance(name, squares, float(np.square(finite).sum()), same)


def add_distances(
    before: Sequence[OutputDistance], new: Sequence[OutputDistance]
) -> tuple[OutputDistance, ...]:
    """Add the distances of one batch more.

    Args:
        before: One for each output, or none so far.
        new: One for each output, of the batch.

    Returns:
        Their sums.
    """
    if not before:
        return tuple(new)
    return tuple(a + b for a, b in zip(before, new, strict=True))


def measure_weight(
    name: str, quantized: np.ndarray, exact: np.ndarray, *, rescaled: bool = False
) -> LayerError:
    """Measure the relative error of a weight.

    Args:
        name: The weight's.
        quantized: Its dequantized values.
        exact: The float values in the same shape.
        rescaled: Whether the first carries a factor per output channel (axis 0), which is left out.

    Returns:
        ||quantized - exact|| / ||exact||, 0 for a weight of zeros.
    """
    a, b = quantized.astype(np.float64), exact.astype(np.float64)
    if rescaled:
        axes = tuple(range(1, a.ndim))
        power = np.square(a).sum(axes, keepdims=True)
        a = a * (a * b).sum(axes, keepdims=True) / np.where(power > 0, power, 1)
    norm = float(np.linalg.norm(b))
    return LayerError(name, float(np.linalg.norm(a - b)) / norm if norm else 0.0)


def judge_distance(
    distances: Sequence[OutputDistance],
    bounds: FloatBounds,
    *,
    on: str,
    scores: bool,
    layers: Sequence[LayerError] = (),
    movements: Sequence[LayerError] = (),
    accuracies: tuple[Proportion, Proportion] | None = None,
) -> Check:
    """Say how far a model that was quantised without training is from its float model.

    Args:
        distances: of every output.
        bounds: what is allowed.
        on: what both were run on, in words: "256 samples of digits.npz", "32 random inputs".
        scores: whether the first output holds class scores: it comes with labels, or with class
            names.
        layers: errors of the weights; the worst are named.
        movements: errors of the outputs where that weight alone is quantized; the worst are named.
        accuracies: (the quantised model's, the float model's), where there are labels.

    Returns:
        A check that fails where a bound is crossed.
    """
    has_classes = scores and bool(distances) and bool(distances[0].same)
    faults = _list_unanswerable(bounds, has_classes=has_classes, labelled=accuracies is not None)
    parts: list[str] = []
    measured: float | None = None
    limit: float | None = None
    for place, distance in enumerate(distances):
        classes = place == 0 and has_classes
        if classes:
            share = 100 * distance.same.share
            least = bounds.min_agreement if bounds.given else bounds.default_agreement
            measured, limit = share, least
            parts.append(
                f"{share:.2f} % of its classes are the same, relative error {distance.error:.3g}"
            )
            if least is not None and share < least:
                faults.append(f"{least:g} % are wanted (--min-agreement)")
        else:
            parts.append(
                f"relative error {distance.error:.3g}"
                + (f" of '{distance.name}'" if len(distances) > 1 else "")
            )
        allowed = bounds.max_error
        if not bounds.given and not classes:
            allowed = bounds.default_error
        if measured is None:
            measured, limit = distance.error, allowed
        if allowed is not None and not distance.error <= allowed:
            faults.append(f"{distance.error:.3g} is more than {allowed:g} (--max-error)")
    if accuracies is not None:
        drop = 100 * (accuracies[1].share - accuracies[0].share)
        parts.append(f"{drop:.2f} points of accuracy lost")
        if bounds.max_drop is not None and drop > bounds.max_drop + 1e-9:
            faults.append(f"{drop:.2f} points lost are more than {bounds.max_drop:g} (--max-drop)")
    more = f" and {len(parts) - SHOWN_OUTPUTS} more" if len(parts) > SHOWN_OUTPUTS else ""
    sentence = f"against the float model, on {on}: {'; '.join(parts[:SHOWN_OUTPUTS])}{more}"
    if layers:
        sentence += f"; worst weights {_name_worst(layers)}"
    if movements:
        sentence += f"; each alone, these move the outputs most: {_name_worst(movements)}"
    if faults:
        sentence += (
            f": TOO FAR, {faults[0]}; quantise to more bits, --exclude the worst weights, or "
            "train with `quantize`"
        )
    return Check(NAME, not faults, measured, limit, sentence)


def _name_worst(layers: Sequence[LayerError]) -> str:
    """The layers of the largest errors, with these."""
    worst = sorted(layers, key=lambda layer: layer.error, reverse=True)[:SHOWN_LAYERS]
    return ", ".join(f"{layer.name} {layer.error:.2g}" for layer in worst)


def _list_unanswerable(bounds: FloatBounds, *, has_classes: bool, labelled: bool) -> list[str]:
    """Bounds that nothing was measured for: no file passes by them."""
    found = []
    if bounds.min_agreement is not None and not has_classes:
        found.append("nothing says that an output holds class scores: bound --max-error instead")
    if bounds.max_drop is not None and not labelled:
        found.append("--max-drop needs data with labels: add --data, or bound --max-error")
    return found


def recipe_of(metadata: Mapping[str, object]) -> Mapping[str, object]:
    """Look up how a file was made.

    Args:
        metadata: The file's.

    Returns:
        Its recipe; empty in a foreign file.
    """
    recipe = metadata.get("recipe")
    return recipe if isinstance(recipe, Mapping) else {}


def is_untrained(metadata: Mapping[str, object]) -> bool:
    """Tell whether we quantized the weights without training.

    Args:
        metadata: The file's.

    Returns:
        False in a foreign file.
    """
    return recipe_of(metadata).get("trained") is False
