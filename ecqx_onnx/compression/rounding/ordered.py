"""Rounds layer by layer, each on the inputs that the layers before it, rounded already, give it.

A stage holds the weights that read the same value (Q, K and V). For each stage both networks run up
to that value: x is what the float network has there, x' what the rounded one has. The stage's
target makes up for their difference, error feedback rounds it with the moments of x', and the bias
takes up the mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ecqx_onnx_converters.graph.graph import FloatGraph

from ecqx_onnx.compression.model.biases import corrected_bias
from ecqx_onnx.compression.model.weights import Weight
from ecqx_onnx.compression.rounding.capped import round_to_cancel, window_of
from ecqx_onnx.compression.rounding.moments import (
    MomentKey,
    Moments,
    MomentSum,
    check_finite,
    padding_mask,
    unique_keys,
    vectors_of,
)
from ecqx_onnx.compression.rounding.rounding import (
    Rounded,
    corrected_target,
    round_nearest,
    round_with_feedback,
)
from ecqx_onnx.runtime.runner import Feeds, batch_size
from ecqx_onnx.runtime.segments import Segments

LIVE_BUDGET = 96 << 20  # bytes of values between two layers, in each of the two networks
CORRECTION = 0.1  # dampening of the target's correction: it learns from few samples


@dataclass(frozen=True, eq=False)
class RoundedModel:
    """rounded: per weight. changed: float32 values of weights and biases, as the graph lays them
    out, for `Runner.run`."""

    rounded: Mapping[str, Rounded]
    changed: Mapping[str, np.ndarray]

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be done to weights, each with its name."""
        found: list[str] = []
        for name, entry in self.rounded.items():
            found.extend(f"{name}: {note}" for note in entry.notes)
        return tuple(found)

    def without_weights(self) -> RoundedModel:
        """Drop the float values of weights, which their levels say as well.

        Returns:
            The same levels, and the values of biases only.
        """
        biases = {name: v for name, v in self.changed.items() if name not in self.rounded}
        return RoundedModel(self.rounded, biases)


@dataclass(frozen=True, eq=False)
class Layers:
    """What rounding works on: the graph with biases, and its weights in the graph's order."""

    graph: FloatGraph
    weights: tuple[Weight, ...]
    biases: Mapping[str, str]

    def matrices(self, weight: Weight) -> np.ndarray:
        """Give a weight's float values as matrices.

        Args:
            weight: one of `weights`.

        Returns:
            float32 [groups, rows, columns].
        """
        return weight.to_matrices(self.graph.weights[weight.name])

    def bias(self, weight: Weight) -> np.ndarray | None:
        """Give the float values of a weight's bias.

        Args:
            weight: one of `weights`.

        Returns:
            float32 [rows]; None where the weight has none.
        """
        name = self.biases.get(weight.name)
        return None if name is None else self.graph.weights[name]

    @property
    def variable(self) -> tuple[str, ...]:
        """Initializers that rounding changes."""
        return (*(weight.name for weight in self.weights), *self.biases.values())


def round_at_once(
    layers: Layers,
    steps: Mapping[str, np.ndarray],
    moments: Mapping[MomentKey, Moments],
    *,
    capped: int | None = None,
) -> RoundedModel:
    """Every weight by the moments of the float network's inputs; no data are run.

    Args:
        layers: the network.
        steps: weight -> float32 [groups, rows, 1] or a shape that broadcasts to that.
        moments: of the float network, not centered.
        capped: the outermost level of the grid; None for an open grid.

    Returns:
        Levels of every weight, and the values that change in the graph.
    """
    rounded: dict[str, Rounded] = {}
    changed: dict[str, np.ndarray] = {}
    for weight in layers.weights:
        key = MomentKey.of(weight)
        known = None if key is None else moments.get(key)
        step = steps[weight.name]
        one = round_weight(layers, weight, step, known, known, None, capped=capped)
        rounded[weight.name] = one.rounded
        changed.update(one.changed)
    return RoundedModel(rounded, changed)


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """One weight's levels, and the values that change in the graph."""

    rounded: Rounded
    changed: Mapping[str, np.ndarray]


def round_weight(
    layers: Layers,
    weight: Weight,
    step: np.ndarray,
    before: Moments | None,
    after: Moments | None,
    cross: Moments | None,
    *,
    capped: int | None = None,
) -> RoundedWeight:
    """Round one weight, and correct its bias.

    Args:
        layers: the network.
        weight: one of its weights.
        step: float32, positive, broadcasts against [groups, rows, 1].
        before: moments of its input in the float network; None for a weight without an input to
            watch, which is rounded to the nearest levels.
        after: moments of its input in the rounded network; None as for `before`.
        cross: centered as `after` is used here; None where both networks have the same input.
        capped: the outermost level of the grid; None for an open grid.

    Returns:
        Its levels, and the values of it and its bias in the graph.
    """
    matrices, bias = layers.matrices(weight), layers.bias(weight)
    if after is None or before is None or after.count == 0:
        if capped is None:
            rounded = round_nearest(matrices, step)
        else:  # rows of a table are picked, not summed: there nothing can cancel
            cancels = weight.kind != "table"
            window = window_of(weight)
            rounded = round_to_cancel(matrices, step, capped, window=window, cancels=cancels)
        if _is_uneven(weight, rounded):
            rounded = round_nearest(matrices, rounded.steps.max())
        return RoundedWeight(rounded, {weight.name: weight.from_matrices(rounded.values)})
    used = after if bias is None else after.centered()
    target = None
    if cross is not None:
        target = corrected_target(matrices, used, cross, dampening=CORRECTION)
    sure = used.shrunk()
    rounded = round_with_feedback(matrices, step, sure, target=target, capped=capped)
    while _is_uneven(weight, rounded):
        widest = rounded.steps.max()
        rounded = round_with_feedback(matrices, widest, sure, target=target)
    values = rounded.values
    changed = {weight.name: weight.from_matrices(values)}
    if bias is not None:
        fixed = corrected_bias(bias, matrices, values, before.mean, after.mean)
        changed[layers.biases[weight.name]] = fixed
    return RoundedWeight(rounded, changed)


def _is_uneven(weight: Weight, rounded: Rounded) -> bool:
    """Whether rows have different steps though the layout has no place for more than one."""
    steps = rounded.steps
    return weight.step_shape() == () and bool((steps != steps.reshape(-1)[0]).any())


def round_in_order(
    layers: Layers,
    steps: Mapping[str, np.ndarray],
    batches: Sequence[Feeds],
    *,
    threads: int = 1,
    live_bytes: Mapping[int, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
    capped: int | None = None,
    known: Mapping[MomentKey, Moments] | None = None,
) -> RoundedModel:
    """Every weight on the inputs that the rounded layers before it give.

    Args:
        layers: the network.
        steps: weight -> step, as for `round_at_once`.
        batches: the samples; what is alive between two layers is kept for all of them.
        threads: of onnxruntime.
        live_bytes: position of a node -> bytes that would be kept there for all batches. Where
            these are more than LIVE_BUDGET, the nodes since the last place with fewer run again.
        progress: called with (stages done, stages).
        capped: the outermost level of the grid; None for an open grid.
        known: moments of the float network, for weights inside subgraphs, which no order reaches.

    Returns:
        Levels of every weight, and the values that change in the graph.
    """
    rounded: dict[str, Rounded] = {}
    changed: dict[str, np.ndarray] = {}
    own = Segments(layers.graph, batches, threads=threads)
    new = Segments(layers.graph, batches, threads=threads)
    readers = _find_readers(layers)
    stages = _find_stages(layers.weights, readers)
    for number, stage in enumerate(stages):
        if progress is not None:
            progress(number, len(stages))
        keys = unique_keys([weight for weight in stage if weight.name in readers])
        pairs: dict[MomentKey, _Pair] = {}
        if keys:
            # Weights of subgraphs have no reader in the outer graph.
            position = min(readers[weight.name] for weight in stage if weight.name in readers)
            if live_bytes is None or live_bytes.get(position, 0) <= LIVE_BUDGET:
                own.advance(position, {})
                new.advance(position, changed)
            pairs = _pair_moments(keys, own, new, position, batches, changed)
        for weight in stage:
            key = MomentKey.of(weight)
            pair = None if key is None else pairs.get(key)
            if pair is None and key is not None and known is not None:
                alone = known.get(key)
                step = steps[weight.name]
                one = round_weight(layers, weight, step, alone, alone, None, capped=capped)
            else:
                one = _round_by_pair(layers, weight, steps[weight.name], pair, capped)
            rounded[weight.name] = one.rounded
            changed.update(one.changed)
    return RoundedModel(rounded, changed)


def _round_by_pair(
    layers: Layers, weight: Weight, step: np.ndarray, pair: _Pair | None, capped: int | None
) -> RoundedWeight:
    if pair is None:
        return round_weight(layers, weight, step, None, None, None, capped=capped)
    cross = pair.cross(centered=weight.name in layers.biases)
    return round_weight(layers, weight, step, pair.before, pair.after, cross, capped=capped)


def _find_readers(layers: Layers) -> dict[str, int]:
    """Weight -> index of the first node that multiplies with it, for those with an input."""
    places = {}
    for index, node in enumerate(layers.graph.proto.graph.node):
        for output in node.output:
            places[output] = index
    found = {}
    for weight in layers.weights:
        key, product = MomentKey.of(weight), weight.watched
        if key is not None and product is not None and product.node_output in places:
            found[weight.name] = places[product.node_output]
    return found


def _find_stages(weights: Sequence[Weight], readers: Mapping[str, int]) -> list[list[Weight]]:
    """Neighbors that read the same value, together; in the order of the nodes that read them."""
    ordered = sorted(weights, key=lambda weight: readers.get(weight.name, -1))
    stages: list[list[Weight]] = []
    last: str | None = None
    for weight in ordered:
        key = MomentKey.of(weight)
        value = None if key is None else key.product.value
        if stages and value == last:
            stages[-1].append(weight)
        else:
            stages.append([weight])
        last = value
    return stages


@dataclass(frozen=True, eq=False)
class _Pair:
    """Moments of x and of x', and E[x x'ᵀ] (a block's rows belong to x)."""

    before: Moments
    after: Moments
    mixed: Moments

    def cross(self, *, centered: bool) -> Moments:
        if not centered:
            return self.mixed
        blocks = []
        for start, block in zip(self.mixed.starts, self.mixed.blocks, strict=True):
            part = slice(start, start + block.shape[-1])
            one, other = self.before.mean[:, part], self.after.mean[:, part]
            blocks.append(block - one[:, :, None] * other[:, None, :])
        return Moments(tuple(blocks), self.mixed.starts, self.mixed.mean, self.mixed.count)


def _pair_moments(
    keys: Sequence[MomentKey],
    own: Segments,
    new: Segments,
    position: int,
    batches: Sequence[Feeds],
    changed: Mapping[str, np.ndarray],
) -> dict[MomentKey, _Pair]:
    """Moments of what the node at `position` reads, in both networks."""
    names = list(dict.fromkeys(str(key.product.value) for key in keys))
    # An LSTM's own state is no value before it: its node runs once more, with float weights.
    inside = [name for name in names if name not in own.live[0]]
    extra_own = own.peek(position + 1, inside, {})
    extra_new = new.peek(position + 1, inside, changed)
    sums = {key: (MomentSum(), MomentSum(), MomentSum()) for key in keys}
    samples = sum(batch_size(feeds) for feeds in batches)
    extras = zip(extra_own, extra_new, strict=True)
    for number, (feeds, (more_own, more_new)) in enumerate(zip(batches, extras, strict=True)):
        mask, share = padding_mask(feeds), max(1, batch_size(feeds)) / samples
        before = {**own.live[number], **more_own}
        after = {**new.live[number], **more_new}
        for key, (first, second, mixed) in sums.items():
            name = str(key.product.value)
            x = vectors_of(key, before[name], number, share, mask)
            rounded = vectors_of(key, after[name], number, share, mask)
            first.add_mean(x)
            second.add(rounded)
            mixed.add(rounded, x)
    pairs = {}
    for key, parts in sums.items():
        check_finite(str(key.product.value), parts[1])
        pairs[key] = _Pair(*(part.finish() for part in parts))
    return pairs


def measure_live_bytes(
    layers: Layers, batches: Sequence[Feeds], *, threads: int = 1
) -> dict[int, int]:
    """Measure how many bytes are alive before each layer, for these batches.

    Args:
        layers: the network.
        batches: inputs by name.
        threads: of onnxruntime.

    Returns:
        Position of each layer's node -> bytes.
    """
    segments = Segments(layers.graph, batches, threads=threads)
    found = {}
    for position in sorted(set(_find_readers(layers).values())):
        segments.advance(position, {})
        found[position] = segments.live_bytes
    return found
