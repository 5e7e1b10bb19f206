"""One point of the curve of bytes against quality, and how it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ecqx_onnx_converters.graph.graph import FloatGraph

from ecqx_onnx.compression.encoding import Encoded, FileOptions, encode
from ecqx_onnx.compression.model.exposed import expose_inputs
from ecqx_onnx.compression.model.weights import Weight
from ecqx_onnx.compression.rounding.moments import collect_moments, unique_keys
from ecqx_onnx.compression.rounding.ordered import (
    LIVE_BUDGET,
    Layers,
    RoundedModel,
    measure_live_bytes,
    round_at_once,
    round_in_order,
)
from ecqx_onnx.compression.rounding.units import choose_unit
from ecqx_onnx.compression.search.allocation import (
    FINEST,
    RateCurve,
    allocate,
    find_dial,
    measure_rate,
)
from ecqx_onnx.compression.search.quality import Quality, QualitySum
from ecqx_onnx.compression.search.samples import Samples
from ecqx_onnx.compression.search.sensitivity import LEAST, fill_unmoved, measure_sensitivity
from ecqx_onnx.errors import DataError, ModelError
from ecqx_onnx.runtime.runner import Feeds, Runner, batch_size, trim_heap

PROBED = 128  # samples for the sensitivities
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """What was reached at one setting of the dial.

    Attributes:
        bits: that were expected for all quantized weights, by the rate curves; the search's
            coordinate.
        nbytes: of the whole file, from the real encoder.
        bits_per_weight: coded.
        quality: on the samples of the search.
        steps: weight -> multiple of its deviation.
    """

    bits: float
    nbytes: int
    bits_per_weight: float
    quality: Quality
    steps: Mapping[str, float] = field(repr=False)

    @property
    def sentence(self) -> str:
        """In words, for a progress line."""
        parts = [f"{self.nbytes:,} bytes, {self.bits_per_weight:.2f} bits a weight"]
        if self.quality.agreement is not None:
            parts.append(f"agreement {100 * self.quality.agreement.share:.1f} %")
        if self.quality.drop is not None:
            parts.append(f"{self.quality.drop:+.2f} points lost")
        parts.append(f"error {self.quality.error:.4f}")
        return ", ".join(parts)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A point, the file that it stands for, and what rounding had to do to weights.

    Attributes:
        rounded: levels and biases; None where nobody keeps them.
    """

    point: Point
    notes: tuple[str, ...]
    encoded: Encoded
    rounded: RoundedModel | None = None


class PointMaker:
    """Makes points of one model on one set of data: statistics once, then any number of points."""

    def __init__(
        self,
        layers: Layers,
        statistics: Samples,
        search: Samples,
        *,
        batch: int,
        classes: tuple[int, int] | None,
        options: FileOptions,
        metadata: Mapping[str, Any],
        threads: int,
        say: Say,
        keep_levels: bool = False,
    ) -> None:
        """
        Args:
            layers: the network.
            statistics, search: samples that rounding learns from, and that points are judged by.
            batch: samples in one run.
            classes: (output, axis) of class scores, where there are any.
            options, metadata: of the file.
            threads: of onnxruntime.
            say: told what is done.
            keep_levels: candidates hold their levels, for a checkpoint.
        """
        self.layers, self._runner, notes = open_watching_runner(layers, threads)
        self.notes = list(notes)
        self._keep_levels = keep_levels
        self._options, self._metadata = options, metadata
        self._threads, self._say = threads, say
        self._classes = classes
        self._in_order = True
        self._batches = self._choose_statistics(statistics, batch)
        self._search = list(search.batches(batch))
        self._expected = [self._runner.run(feeds) for feeds, _ in self._search]
        self._learn()

    def _choose_statistics(self, statistics: Samples, batch: int) -> list[Feeds]:
        """All batches, or as many as leave room for the values between two layers."""
        first = statistics.take(batch).feeds(batch)[:1]
        try:
            live = measure_live_bytes(self.layers, first, threads=self._threads)
        except (ModelError, DataError) as error:
            self._in_order = False
            self.notes.append(f"weights are rounded without regard to each other: {error}")
            live = {}
        # A few places may have more alive than the budget; most must do with it.
        each = float(np.median(list(live.values()))) / batch if live else 0.0
        most = int(LIVE_BUDGET / each) if each else len(statistics)
        most = max(batch, most // batch * batch)
        if most < len(statistics):
            self.notes.append(
                f"{most} of {len(statistics)} samples are used for statistics, to bound memory"
            )
            statistics = statistics.take(most)
        rounds = len(statistics) / batch
        self._live_bytes = {position: nbytes * rounds for position, nbytes in live.items()}
        return statistics.feeds(batch)

    def _learn(self) -> None:
        """Units, rates and moments."""
        layers = self.layers
        self._units = {}
        curves = []
        for weight in layers.weights:
            matrices = layers.matrices(weight)
            self._units[weight.name] = choose_unit(weight, matrices)
            curves.append(measure_rate(weight.name, matrices, self._units[weight.name]))
        self._curves: tuple[RateCurve, ...] = tuple(curves)
        self._say(f"statistics of {len(layers.weights)} weights")
        samples = _count_samples(self._batches)
        self._moments = collect_moments(
            self._runner, layers.weights, self._batches, samples=samples
        )
        self.slopes: dict[str, float] = {}

    def measure(self, known: Mapping[str, float] | None = None) -> None:
        """Measure the sensitivities, or take those of an earlier run.

        Args:
            known: weight -> a_l of an earlier run; used if it names exactly these weights.
        """
        if known is not None and set(known) == {weight.name for weight in self.layers.weights}:
            self.slopes = dict(known)
            return
        size = batch_size(self._batches[0])
        some = self._batches[: max(1, PROBED // max(1, size))]

        start = time.monotonic()

        def show(done: int, total: int) -> None:
            if done % max(1, total // 10) == 0:
                left = (time.monotonic() - start) * (total - done) / max(1, done)
                guess = f" (about {left:.0f} s)" if done else ""
                self._say(f"sensitivity of weight {done + 1} of {total}{guess}")

        measured = measure_sensitivity(
            self.layers, self._units, self._moments, self._runner, some, progress=show
        )
        sizes = {curve.name: curve.size for curve in self._curves}
        self.slopes = fill_unmoved(measured, sizes)
        unmoved = [name for name in measured if measured[name] <= LEAST]
        if unmoved:
            self.notes.append(
                f"{len(unmoved)} weights ({unmoved[0]} first) moved no output on these data: they"
                " get as many bits as others of their size"
            )

    def errors_at_finest(self) -> dict[str, float]:
        """Measure the relative output error that each weight alone makes at the finest step.

        No dial can better it, as int8 has no finer levels for a weight with entries far outside.

        Returns:
            Weight -> error of the outputs.
        """
        size = batch_size(self._batches[0])
        some = self._batches[: max(1, PROBED // max(1, size))]
        slopes = measure_sensitivity(
            self.layers, self._units, self._moments, self._runner, some, probe=FINEST
        )
        return {name: FINEST * slope**0.5 for name, slope in slopes.items()}

    @property
    def entries(self) -> int:
        """Weights that are quantized."""
        return sum(curve.size for curve in self._curves)

    def steps_for(self, bits: float) -> dict[str, float]:
        """Find the steps at which the curves expect so many bits for a weight.

        Args:
            bits: expected bits per weight.

        Returns:
            Weight -> step as a multiple of its unit.
        """
        dial = find_dial(self._curves, self.slopes, bits * self.entries)
        return allocate(self._curves, self.slopes, dial)

    def make(self, bits: float) -> Candidate:
        """Make one point: allocate, round, encode and measure.

        Args:
            bits: expected bits per weight.

        Returns:
            The point and the file in memory.
        """
        multiples = self.steps_for(bits)
        steps = {
            name: self._units[name] * np.float32(multiple) for name, multiple in multiples.items()
        }
        if self._in_order:
            model = round_in_order(
                self.layers,
                steps,
                self._batches,
                threads=self._threads,
                live_bytes=self._live_bytes,
                known=self._moments,
            )
        else:
            model = round_at_once(self.layers, steps, self._moments)
        trim_heap()
        encoded = encode(self.layers, model, self._options, metadata=self._metadata)
        quality = self.judge(model)
        point = Point(bits, encoded.nbytes, encoded.bits_per_weight, quality, multiples)
        trim_heap()
        kept = model.without_weights() if self._keep_levels else None
        return Candidate(point, model.notes, encoded, kept)

    def release(self) -> None:
        """Lets go of what making points needs, so that the file is judged in its place."""
        del self._runner, self._moments, self._batches, self._search, self._expected
        trim_heap()

    def judge(self, model: RoundedModel) -> Quality:
        """Measure a rounded model on the samples of the search.

        Args:
            model: the values that change in the graph.

        Returns:
            Quality against the float model.
        """
        total = QualitySum(self._runner.outputs, classes=self._classes)
        for (feeds, labels), expected in zip(self._search, self._expected, strict=True):
            found = self._runner.run(feeds, weights=model.changed)
            size = batch_size(feeds)
            total.add(expected, found, labels, size)
        return total.finish()


def open_watching_runner(layers: Layers, threads: int) -> tuple[Layers, Runner, tuple[str, ...]]:
    """Open a session that gives the inputs of weights, those inside subgraphs among them.

    Args:
        layers: the network.
        threads: of onnxruntime.

    Returns:
        (layers whose weights say where their inputs are watched, the session, sentences for the
        report).

    Raises:
        ModelError: onnxruntime does not load the network.
    """
    exposed = expose_inputs(layers.graph, layers.weights)
    try:
        runner = _open_runner(exposed.graph, exposed.weights, layers, threads)
    except ModelError as error:
        if exposed.graph is layers.graph:
            raise
        note = f"weights inside If, Loop or Scan are rounded without statistics: {error}"
        return layers, _open_runner(layers.graph, layers.weights, layers, threads), (note,)
    return replace(layers, weights=exposed.weights), runner, ()


def _open_runner(
    graph: FloatGraph, weights: Sequence[Weight], layers: Layers, threads: int
) -> Runner:
    values = [str(key.product.value) for key in unique_keys(weights)]
    return Runner(graph, variable=layers.variable, values=values, threads=threads)


def _count_samples(batches: Sequence[Feeds]) -> int:
    """Samples in all batches."""
    return sum(batch_size(feeds) for feeds in batches)
