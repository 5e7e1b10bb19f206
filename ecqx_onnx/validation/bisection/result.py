"""What halving found: the tensors that were looked at, the first bad one, and the likely cause."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.rendering.fitted import Column, FittedTable

COLUMNS = (
    Column(""),
    Column("tensor", "name"),
    Column("operator"),
    Column("SNR (dB)", right=True, meaning="10 log10 of the signal's energy over the error's"),
    Column("bound", right=True),
)


@dataclass(frozen=True)
class Probe:
    """One tensor that was compared.

    Attributes:
        position: from the input, 0 for the first tensor that could be compared.
        name: its name, with that of a weight where one is known.
        operator: that makes it.
        snr: 10 log10(sum y² / sum (y - y')²) in dB; infinity where nothing differs.
        passed: whether it is within its bound.
    """

    position: int
    name: str
    operator: str
    snr: float
    passed: bool


@dataclass(frozen=True)
class Bisection:
    """What halving found between two computations.

    Attributes:
        between: the two, in words.
        tensors: how many could be compared.
        bound: least SNR in dB.
        probes: those that were, from the input to the output.
        cause: a sentence on what is the likely cause, or on why nothing was found.
    """

    between: str
    tensors: int
    bound: float
    probes: tuple[Probe, ...]
    cause: str

    @property
    def first(self) -> Probe | None:
        """The first tensor beyond its bound; None if none is."""
        return next((probe for probe in self.probes if not probe.passed), None)

    def to_json(self) -> dict[str, Any]:
        """Write it as plain values.

        Returns:
            SNR in dB, null where nothing differs.
        """
        probes = []
        for probe in self.probes:
            probes.append(
                {
                    "position": probe.position,
                    "name": probe.name,
                    "operator": probe.operator,
                    "snr_db": probe.snr if math.isfinite(probe.snr) else None,
                    "passed": probe.passed,
                }
            )
        return {
            "between": self.between,
            "tensors": self.tensors,
            "bound_db": self.bound,
            "first": self.first.name if self.first else None,
            "probes": probes,
            "cause": self.cause,
        }

    def render(self) -> RenderableType:
        """Draw it.

        Returns:
            A table of the tensors, from input to output, and the sentence.
        """
        rows = []
        for probe in self.probes:
            mark = Text("ok", style="green") if probe.passed else Text("beyond", style="bold red")
            snr = f"{probe.snr:.1f}" if math.isfinite(probe.snr) else "equal"
            rows.append((mark, probe.name, probe.operator, snr, f"{self.bound:.0f}"))
        title = f"{self.between}: {len(self.probes)} of {self.tensors} tensors looked at"
        lines: list[RenderableType] = []
        if rows:
            lines.append(FittedTable(COLUMNS, rows, title=title))
        lines.append(Text(self.cause, style="bold red" if self.first else ""))
        return Group(*lines)
