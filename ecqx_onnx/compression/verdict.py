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
from ecqx_onnx.runtime.runner import IN_ONE_FILE, Feeds, batch_size, run_session
from ecqx_onnx.runtime.sessions import Session, open_session

ROUNDS = 5  # of one input, for the latency; the least counts


@dataclass(frozen=True)
class Cost:
    """load, latency: seconds, one thread; latency is of one batch of `batch` samples."""

    nbytes: int
    load: float
    latency: float
    batch: int


@dataclass(frozen=True)
class Verdict:
    """quality: of the file against the float model. before, after: what either one costs."""

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
    """
    before, load_before = _open(reference)
    after, load_after = _open(file)
    names = [node.name for node in before.get_outputs()]
    total = QualitySum(names, classes=classes)
    first: Feeds | None = None
    for feeds, labels in samples.batches(batch):
        first = feeds if first is None else first
        expected = run_session(before, names, feeds)
        found = run_session(after, names, feeds)
        total.add(expected, found, labels, batch_size(feeds))
    assert first is not None
    size = batch_size(first)
    costs = []
    for session, load, nbytes in zip(
        (before, after), (load_before, load_after), sizes, strict=True
    ):
        costs.append(Cost(nbytes, load, _latency(session, names, first), size))
    return Verdict(total.finish(), costs[0], costs[1])


def _open(path: Path) -> tuple[Session, float]:
    start = time.perf_counter()
    session = open_session(path, threads=1)
    return session, time.perf_counter() - start


def _latency(session: Session, names: Sequence[str], feeds: Feeds) -> float:
    run_session(session, names, feeds)
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run_session(session, names, feeds)
        times.append(time.perf_counter() - start)
    return float(np.min(times))


def write_reference(graph: FloatGraph, path: Path) -> Path:
    """The float graph of a PyTorch model as a file, to be judged against."""
    proto = ModelProto()
    proto.CopyFrom(graph.proto)
    large = sum(array.nbytes for array in graph.weights.values()) > IN_ONE_FILE
    write_proto(proto, graph.weights, path, external=large)
    return path
