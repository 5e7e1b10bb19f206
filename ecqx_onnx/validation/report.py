"""What a validation found, as frozen values: JSON for programs, tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.rendering.fitted import Column, FactTable, FittedTable
from ecqx_onnx.runtime.latency import FLOAT, Latency
from ecqx_onnx.validation.bisection.result import Bisection
from ecqx_onnx.validation.outputs.metrics import Proportion

COLUMNS = (
    Column(""),
    Column("check"),
    Column("measured"),
    Column("limit"),
    Column("what it says", "prose"),
)

Value = float | int | str | None


@dataclass(frozen=True)
class Check:
    """One question to the file and its answer.

    Attributes:
        passed: None where nothing was at stake or the question could not be asked; `sentence` says
            which.
        measured, limit: of the same unit, named in the sentence.
    """

    name: str
    passed: bool | None
    measured: Value
    limit: Value
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """Describe the check in JSON values.

        Returns:
            Its fields; infinities and NaN as text.
        """
        return {
            "name": self.name,
            "passed": self.passed,
            "measured": _drop_infinity(self.measured),
            "limit": _drop_infinity(self.limit),
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class ValidationReport:
    """What a validation found.

    Attributes:
        file: Its path.
        runtime: Name and version of what ran it, and where.
        size: Bytes of the file.
        samples: How many were compared.
        checks: One a question.
        pytorch_accuracy: The reference's, where there are labels.
        onnx_accuracy: The file's.
        agreement: Samples to which both give the same class.
        largest_difference: Between the outputs of both.
        load_seconds: How long loading takes.
        latency: Of one sample, beside a baseline.
        operators: Executed type -> count.
        device: Its name; None for the process that validates.
        peak_memory: Bytes that loading the file and running a batch took on the device (of
            WebAssembly: the whole heap); None where nobody measured it.
        notes: What a user should know, a sentence each.
        bisections: Where the outputs begin to differ, if that was asked for.
        reference: What it was compared with, in words.
    """

    file: str
    runtime: str
    size: int
    samples: int
    checks: tuple[Check, ...]
    pytorch_accuracy: Proportion | None = None
    onnx_accuracy: Proportion | None = None
    agreement: Proportion | None = None
    largest_difference: float | None = None
    load_seconds: float | None = None
    latency: Latency | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    device: str | None = None
    peak_memory: int | None = None
    notes: tuple[str, ...] = ()
    bisections: tuple[Bisection, ...] = ()
    reference: str = "PyTorch"

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def render(self) -> RenderableType:
        """Draw the report for a terminal.

        Returns:
            Every check, the numbers, and a last line with the verdict.
        """
        rows = []
        for check in self.checks:
            numbers_of = (show(check.measured), show(check.limit))
            rows.append((_draw_mark(check), check.name, *numbers_of, check.sentence))
        checks = FittedTable(COLUMNS, rows, title=f"{self.file} on {self.runtime}")
        numbers = FactTable(_list_numbers(self))
        notes = [Text(f"note: {note}", style="yellow") for note in self.notes]
        places = [bisection.render() for bisection in self.bisections]
        return Group(checks, numbers, *notes, *places, _draw_verdict(self))

    def to_json(self) -> dict[str, Any]:
        """Describe the report in JSON values.

        Returns:
            Sizes in bytes, times in seconds, shares in [0, 1].
        """
        float_latency = None
        if self.latency and self.latency.against == FLOAT:
            float_latency = self.latency.other_seconds
        return {
            "file": self.file,
            "device": self.device,
            "runtime": self.runtime,
            "ok": self.ok,
            "bytes": self.size,
            "samples": self.samples,
            "pytorch_accuracy": self.pytorch_accuracy.to_json() if self.pytorch_accuracy else None,
            "onnx_accuracy": self.onnx_accuracy.to_json() if self.onnx_accuracy else None,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "largest_difference": _drop_infinity(self.largest_difference),
            "load_seconds": self.load_seconds,
            "latency_seconds": self.latency.seconds if self.latency else None,
            "float_latency_seconds": float_latency,
            "latency_ratio": self.latency.ratio if self.latency else None,
            "latency_against": self.latency.against if self.latency else None,
            "peak_memory_bytes": self.peak_memory,
            "operators": dict(sorted(self.operators.items())),
            "checks": [check.to_json() for check in self.checks],
            "notes": list(self.notes),
            "bisections": [bisection.to_json() for bisection in self.bisections],
        }


def show(value: Value) -> str:
    """Write a value for people.

    Args:
        value: A number, a text or None.

    Returns:
        Three digits of a float, groups of three of an integer, "" for None.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _list_numbers(report: ValidationReport) -> list[tuple[str, str]]:
    rows = [("size", f"{show(report.size)} bytes"), ("samples compared", show(report.samples))]
    if report.pytorch_accuracy and report.onnx_accuracy:
        rows.append((f"accuracy of {report.reference} (95 %)", str(report.pytorch_accuracy)))
    if report.onnx_accuracy:
        rows.append(("accuracy of ONNX (95 %)", str(report.onnx_accuracy)))
    if report.load_seconds is not None:
        rows.append(("load time", f"{1e3 * report.load_seconds:.1f} ms"))
    if report.latency:
        latency = report.latency
        rows.append(
            (
                "latency, one sample",
                f"{1e3 * latency.seconds:.3f} ms, {latency.ratio:.2f} x {latency.against}",
            )
        )
    if report.peak_memory is not None:
        rows.append(("peak memory", f"{report.peak_memory / 2**20:.1f} MiB"))
    if report.operators:
        rows.append(
            (
                "executed operators",
                ", ".join(f"{count} {name}" for name, count in sorted(report.operators.items())),
            )
        )
    return rows


def _draw_mark(check: Check) -> Text:
    if check.passed is None:
        return Text("-", style="dim")
    return Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")


def _draw_verdict(report: ValidationReport) -> Text:
    done = sum(check.passed is True for check in report.checks)
    if report.ok:
        return Text(f"All {done} checks passed.", style="bold green")
    names = ", ".join(check.name for check in report.failures)
    return Text(
        f"{len(report.failures)} of {done + len(report.failures)} checks failed: {names}.",
        style="bold red",
    )


def _drop_infinity(value: Value) -> Value:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
