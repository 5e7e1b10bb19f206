"""The written file against the float model, on samples that neither rounding nor search saw."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ecqx_onnx_converters.graph.files import write_proto
from ecqx_onnx_converters.graph.graph import FloatGraph
from onnx import ModelProto

from ecqx_onnx.compression.search.quality import Quality, QualitySum
from ecqx_onnx.compression.search.samples import Samples
from ecqx_onnx.runtime.runner import IN_ONE_FILE, Feeds, batch_size, run_session, trim_heap
from ecqx_onnx.runtime.sessions import Session, open_session

KEPT = 64 << 20  # bytes of the float model's outputs that are kept while the file is judged
ROUNDS = 5  # of one input, for the latency; the least counts


@dataclass(frozen=True)
class Cost:
    """What a file costs where it runs.

    Attributes:
        load, latency: seconds, one thread; latency is of one batch of `batch` samples.
    """

    nbytes: int
    load: float
    latency: float
    batch: int


@dataclass(frozen=True)
class Verdict:
    """How good a file is, and what it costs beside the float model.

    Attributes:
        quality: of the file against the float model.
        before, after: what either one costs.
    """

    quality: Quality
    before: Cost
    after: Cost


def judge_file(
    reference: Path,
    file: Path,
    samples: Samples,
    *,
    batch: int,
    classes: tuple[int, int] | None,
    sizes: tuple[int, int],
) -> Verdict:
    """Runs both files.

    Args:
        reference: the float model as an .onnx file.
        file: the compressed one.
        samples: that were not used before.
        batch: samples in one run.
        classes: (output, axis) of class scores.
        sizes: bytes of either one.

    Returns:
        Quality of the file against the float model, and what either one costs.
    """
    before, load_before = _open(reference)
    names = [node.name for node in before.get_outputs()]
    first = next(samples.batches(batch))[0]
    size = batch_size(first)
    outputs = run_session(before, names, first)
    latency_before = _measure_latency(before, names, first)
    kept: list[list[np.ndarray]] | None = None
    if sum(array.nbytes for array in outputs) * len(samples) <= KEPT * size:
        # The float model's outputs are small: it makes room before the other one is loaded.
        kept = [run_session(before, names, feeds) for feeds, _ in samples.batches(batch)]
        before = None
        trim_heap()
    after, load_after = _open(file)
    total = QualitySum(names, classes=classes)
    for number, (feeds, labels) in enumerate(samples.batches(batch)):
        expected = kept[number] if kept is not None else run_session(before, names, feeds)
        found = run_session(after, names, feeds)
        total.add(expected, found, labels, batch_size(feeds))
    costs = (
        Cost(sizes[0], load_before, latency_before, size),
        Cost(sizes[1], load_after, _measure_latency(after, names, first), size),
    )
    return Verdict(total.finish(), *costs)


def _open(path: Path) -> tuple[Session, float]:
    start = time.perf_counter()
    session = open_session(path, threads=1)
    return session, time.perf_counter() - start


def _measure_latency(session: Session, names: Sequence[str], feeds: Feeds) -> float:
    run_session(session, names, feeds)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run_session(session, names, feeds)
        times.append(time.perf_counter() - start)
    return float(np.min(times))


def write_reference(graph: FloatGraph, path: Path) -> Path:
    """Write the float graph of a PyTorch model as a file, to be judged against.

    Args:
        graph: a float graph with its weights.
        path: of the file.

    Returns:
        The same path.
    """
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    large = sum(array.nbytes for array in graph.weights.values()) > IN_ONE_FILE
    write_proto(proto, graph.weights, path, external=large)
    return path
