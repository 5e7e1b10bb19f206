"""Rounds the layers in order, each on the inputs it gets from the layers already rounded.

A stage holds the weights that read the same value (Q, K and V). For each stage two networks run up
to that value: the float network, which has x there, and the rounded one, which has x'. Then, for
each weight W with the bias b,

    V = argmin_V E|W x - V x'|²    makes up for what rounding did to the input
    W' = kΔ                        is V, rounded by error feedback with the moments E[x' x'ᵀ]
    b' = b + W E[x] - W' E[x']     takes up the mean error

V is that of GPTAQ [Li et al. 2025, arXiv 2504.02692], see `corrected_target`; error feedback that
of GPTQ [Frantar et al. 2023, arXiv 2210.17323], see `round_with_feedback`. With a bias the moments
are centered, since it takes up what the means would.
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

# Bytes that each of the two networks may keep between two layers. Where more is alive, nodes run
# again from the last place that had less: more time, but bounded memory.
LIVE_BUDGET = 96 << 20
CORRECTION = 0.1  # dampening of the target's correction, which is learned from few samples


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
    """Round every weight by the moments of the float network's inputs; no data are run.

    Args:
        layers: the network.
        steps: weight -> its step, float32 [groups, rows, 1] or a shape that broadcasts to that.
        moments: moments of the float network's inputs, not centered.
        capped: the outermost level of a grid that ends there, in [1, 127]; None for an open grid,
            of as many levels as the step asks for.

    Returns:
        Levels of every weight, and the values that change in the graph.
    """
    rounded: dict[str, Rounded] = {}
    changed: dict[str, np.ndarray] = {}
    for weight in layers.weights:
        key = MomentKey.of(weight)
        known = None if key is None else moments.get(key)
        step = steps[weight.name]
        made = round_weight(layers, weight, step, known, known, None, capped=capped)
        rounded[weight.name] = made.rounded
        changed.update(made.changed)
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
    float_moments: Moments | None,
    rounded_moments: Moments | None,
    cross: Moments | None,
    *,
    capped: int | None = None,
) -> RoundedWeight:
    """Round one weight, and correct its bias.

    Args:
        layers: the network.
        weight: one of its weights.
        step: its step, float32, positive, broadcasts against [groups, rows, 1].
        float_moments: moments of its input x in the float network. Only their mean is read here;
            their blocks may be empty, as `MomentSum.add_mean` leaves them. None for a weight
            without an input to watch, which is rounded to the nearest levels.
        rounded_moments: moments of its input x' in the rounded network, not centered; None as for
            `float_moments`.
        cross: E[x x'ᵀ], rows belonging to x; if the weight has a bias, less E[x] E[x']ᵀ. None where
            both networks have the same input.
        capped: the outermost level of a grid that ends there, in [1, 127]; None for an open grid.

    Returns:
        Its levels, and the values of it and its bias in the graph.
    """
    matrices, bias = layers.matrices(weight), layers.bias(weight)
    if rounded_moments is None or float_moments is None or rounded_moments.count == 0:
        if capped is None:
            rounded = round_nearest(matrices, step)
        else:  # rows of a table are picked, not summed: there nothing can cancel
            cancels = weight.kind != "table"
            window = window_of(weight)
            rounded = round_to_cancel(matrices, step, capped, window=window, cancels=cancels)
        if _is_uneven(weight, rounded):
            rounded = round_nearest(matrices, rounded.steps.max())
        return RoundedWeight(rounded, {weight.name: weight.from_matrices(rounded.values)})
    used = rounded_moments if bias is None else rounded_moments.centered()
    target = None
    if cross is not None:
        target = corrected_target(matrices, used, cross, dampening=CORRECTION)
    shrunk = used.shrunk()
    rounded = round_with_feedback(matrices, step, shrunk, target=target, capped=capped)
    while _is_uneven(weight, rounded):
        widest = rounded.steps.max()
        rounded = round_with_feedback(matrices, widest, shrunk, target=target)
    values = rounded.values
    changed = {weight.name: weight.from_matrices(values)}
    if bias is not None:
        means = (float_moments.mean, rounded_moments.mean)
        changed[layers.biases[weight.name]] = corrected_bias(bias, matrices, values, *means)
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
    """Round every weight on the inputs that the rounded layers before it give.

    Args:
        layers: the network.
        steps: weight -> its step, as for `round_at_once`.
        batches: the samples; what is alive between two layers is kept for all of them.
        threads: how many threads onnxruntime has.
        live_bytes: position of a node -> bytes that would be kept there for all batches. Where
            these are more than LIVE_BUDGET, the nodes since the last place with fewer run again.
            None to keep them everywhere.
        progress: called with (stages done, stages) before each stage.
        capped: the outermost level of a grid that ends there, in [1, 127]; None for an open grid.
        known: moments of the float network's inputs, for weights inside subgraphs, which no order
            reaches.

    Returns:
        Levels of every weight, and the values that change in the graph.
    """
    rounded: dict[str, Rounded] = {}
    changed: dict[str, np.ndarray] = {}
    float_run = Segments(layers.graph, batches, threads=threads)
    rounded_run = Segments(layers.graph, batches, threads=threads)
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
                float_run.advance(position, {})
                rounded_run.advance(position, changed)
            pairs = _pair_moments(keys, float_run, rounded_run, position, batches, changed)
        for weight in stage:
            key = MomentKey.of(weight)
            pair = None if key is None else pairs.get(key)
            if pair is None and key is not None and known is not None:
                # Inside a subgraph the rounded network's input is not seen: x stands in for it.
                inner = known.get(key)
                step = steps[weight.name]
                made = round_weight(layers, weight, step, inner, inner, None, capped=capped)
            else:
                made = _round_by_pair(layers, weight, steps[weight.name], pair, capped)
            rounded[weight.name] = made.rounded
            changed.update(made.changed)
    return RoundedModel(rounded, changed)


def _round_by_pair(
    layers: Layers, weight: Weight, step: np.ndarray, pair: _Pair | None, capped: int | None
) -> RoundedWeight:
    if pair is None:
        return round_weight(layers, weight, step, None, None, None, capped=capped)
    cross = pair.cross(centered=weight.name in layers.biases)
    moments = (pair.float_moments, pair.rounded_moments)
    return round_weight(layers, weight, step, *moments, cross, capped=capped)


def _find_readers(layers: Layers) -> dict[str, int]:
    """Weight -> index of the main graph's node that multiplies with it, for those with one."""
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
    """Neighbors that read the same value, together; in the order of the nodes that read them.

    Weights without such a node (tables of words, weights of subgraphs) come first: they wait for no
    input, and layers behind them shall see them rounded already.
    """
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
    """Moments of one input in both networks.

    float_moments: the mean of x; no blocks, which nothing reads. rounded_moments: of x', all.
    products: E[x x'ᵀ], a block's rows belonging to x.
    """

    float_moments: Moments
    rounded_moments: Moments
    products: Moments

    def cross(self, *, centered: bool) -> Moments:
        """E[x x'ᵀ], or E[x x'ᵀ] - E[x] E[x']ᵀ."""
        products = self.products
        if not centered:
            return products
        blocks = []
        for start, block in zip(products.starts, products.blocks, strict=True):
            part = slice(start, start + block.shape[-1])
            float_mean = self.float_moments.mean[:, part]
            rounded_mean = self.rounded_moments.mean[:, part]
            blocks.append(block - float_mean[:, :, None] * rounded_mean[:, None, :])
        return Moments(tuple(blocks), products.starts, products.mean, products.count)


def _pair_moments(
    keys: Sequence[MomentKey],
    float_run: Segments,
    rounded_run: Segments,
    position: int,
    batches: Sequence[Feeds],
    changed: Mapping[str, np.ndarray],
) -> dict[MomentKey, _Pair]:
    """Moments of what the node at `position` reads, in both networks."""
    names = list(dict.fromkeys(str(key.product.value) for key in keys))
    # An LSTM's own state is no value before it: its node runs once more, with float weights.
    inside = [name for name in names if name not in float_run.live[0]]
    float_inside = float_run.peek(position + 1, inside, {})
    rounded_inside = rounded_run.peek(position + 1, inside, changed)
    sums = {key: (MomentSum(), MomentSum(), MomentSum()) for key in keys}
    samples = sum(batch_size(feeds) for feeds in batches)
    both_inside = zip(float_inside, rounded_inside, strict=True)
    for batch, (feeds, (of_float, of_rounded)) in enumerate(zip(batches, both_inside, strict=True)):
        mask, share = padding_mask(feeds), max(1, batch_size(feeds)) / samples
        float_values = {**float_run.live[batch], **of_float}
        rounded_values = {**rounded_run.live[batch], **of_rounded}
        for key, (float_sum, rounded_sum, product_sum) in sums.items():
            name = str(key.product.value)
            x = vectors_of(key, float_values[name], batch, share, mask)
            x_rounded = vectors_of(key, rounded_values[name], batch, share, mask)
            float_sum.add_mean(x)  # of x only the mean is read, for the bias and for centering
            rounded_sum.add(x_rounded)
            product_sum.add(x_rounded, x)
    pairs = {}
    for key, (float_sum, rounded_sum, product_sum) in sums.items():
        check_finite(str(key.product.value), rounded_sum)
        pairs[key] = _Pair(float_sum.finish(), rounded_sum.finish(), product_sum.finish())
    return pairs


def measure_live_bytes(
    layers: Layers, batches: Sequence[Feeds], *, threads: int = 1
) -> dict[int, int]:
    """Measure how many bytes are alive before each layer, for these batches.

    Args:
        layers: the network.
        batches: the samples, inputs by name.
        threads: how many threads onnxruntime has.

    Returns:
        Position of each layer's node -> bytes that are alive before it.
    """
    segments = Segments(layers.graph, batches, threads=threads)
    found = {}
    for position in sorted(set(_find_readers(layers).values())):
        segments.advance(position, {})
        found[position] = segments.live_bytes
    return found
