"""The latency of a model beside another one, from interleaved runs in one process on one thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from ecqx_onnx.runtime.sessions import open_session, run

FLOAT = "the float model"


@dataclass(frozen=True)
class Latency:
    """Medians over interleaved runs of one sample on one thread, in seconds.

    Attributes:
        ratio: median over the pairs of seconds / other_seconds.
        runs: pairs measured.
        against: what the other model is, in words.
    """

    seconds: float
    other_seconds: float
    ratio: float
    runs: int
    against: str = FLOAT


WARM_UPS = 3
# Seconds: faster models run several times per measurement, so that the clock does not matter.
SHORTEST = 1e-3
LONGEST = 10.0  # seconds for the whole measurement, after which it stops early


def measure_latency(
    model: Path | bytes,
    other: Path | bytes,
    inputs: Sequence[np.ndarray],
    *,
    runs: int,
    against: str = FLOAT,
) -> Latency:
    """Measure the latency of two models side by side.

    Args:
        model: path or bytes of the one.
        other: path or bytes of the one that it is held against.
        inputs: one sample's arrays, in the types and order of both graphs' inputs.
        runs: pairs of measurements, each of the two first in turn; fewer after 10 seconds.
        against: what `other` is, in words.

    Returns:
        Medians in seconds, and of the ratio.

    Raises:
        CheckFailed: the runtime does not load or run one of them.
    """
    sessions = (open_session(model, threads=1), open_session(other, threads=1))
    for session in sessions:
        for _ in range(WARM_UPS):
            run(session, inputs)
    inner = max(
        1,
        round(
            SHORTEST / max(1e-6, min(_measure_seconds(session, inputs, 1) for session in sessions))
        ),
    )
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + LONGEST
    while len(times) < runs and (not times or time.perf_counter() < end):
        order = (0, 1) if len(times) % 2 == 0 else (1, 0)
        pair = {which: _measure_seconds(sessions[which], inputs, inner) for which in order}
        times.append((pair[0], pair[1]))
    table = np.array(times)
    ratio = float(np.median(table[:, 0] / table[:, 1]))
    return Latency(
        float(np.median(table[:, 0])), float(np.median(table[:, 1])), ratio, len(times), against
    )


def _measure_seconds(
    session: onnxruntime.InferenceSession, inputs: Sequence[np.ndarray], repeats: int
) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run(session, inputs)
    return (time.perf_counter() - start) / repeats
