"""What benchmarks share: where things lie, the command line's frame, curves and intervals."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs"  # what was trained; runs/ is not done again
RESULTS = ROOT / "benchmarks" / "results"  # what was printed, by date and benchmark
SHARED_DATA = ROOT.parent / "shared" / "data"

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Point = Mapping[str, float]
"""accuracy in %, and what it is compared at: zeros, bits per weight, entropy in bytes."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the benchmark's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def name_results(benchmark: str) -> Path:
    """Where today's table of a benchmark goes: `benchmarks/results/DATE-BENCHMARK.md`."""
    return RESULTS / f"{datetime.date.today().isoformat()}-{benchmark}.md"


def describe_run(command: str) -> str:
    """The first line of a file of results: machine, onnxruntime, date, command."""
    import onnxruntime

    machine = f"{platform.machine()} ({platform.system()}, {os.cpu_count()} cores)"
    today = datetime.date.today().isoformat()
    return f"Measured on {machine}, onnxruntime {onnxruntime.__version__}, {today}: `{command}`"


def interpolate_accuracy(points: Iterable[Point], axis: str, value: float) -> float | None:
    """The accuracy where `axis` has this value: how methods are compared at equal zeros or bytes.

    Linear between neighbors; None outside the curve.
    """
    for a, b in pairwise(sorted(points, key=lambda point: point[axis])):
        if a[axis] <= value <= b[axis]:
            slope = (b["accuracy"] - a["accuracy"]) / max(1e-9, b[axis] - a[axis])
            return a["accuracy"] + slope * (value - a[axis])
    return None


def compute_half_width(values: list[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t; 0 for one value."""
    mean = sum(values) / len(values)
    freedom = len(values) - 1
    if not freedom:
        return 0.0
    variance = sum((value - mean) ** 2 for value in values) / freedom
    return STUDENT[freedom - 1] * math.sqrt(variance / len(values))


def format_interval(values: list[float]) -> str:
    """mean ± half of the 95 % interval of the mean."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {compute_half_width(values):.2f}"
