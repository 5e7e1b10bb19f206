"""The reports of one file, or of several, on several devices, side by side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ecqx_onnx.validation.report import Check, ValidationReport, show

ROWS = (
    "runtime", "verdict", "accuracy (95 %)", "PyTorch's class", "largest difference",
    "load", "latency", "x float", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """A device that gave no result, and why, in one sentence."""

    device: str
    sentence: str


@dataclass(frozen=True)
class DeviceTable:
    """Reports of one file (or several) on several devices.

    Attributes:
        reports: One for each device that gave one.
        troubles: Devices that gave none.
    """

    reports: tuple[ValidationReport, ...]
    troubles: tuple[Trouble, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every device gave a report without failures."""
        return not self.troubles and all(report.ok for report in self.reports)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed, of all reports."""
        found: list[Check] = []
        for report in self.reports:
            found += report.failures
        return tuple(found)

    def render(self) -> RenderableType:
        """Draw the reports for a terminal.

        Returns:
            A table with a column for each device, then notes and what failed.
        """
        notes: dict[str, None] = {}  # each once, in order
        failed: list[Text] = []
        slow: list[Text] = []
        for report in self.reports:
            notes.update(dict.fromkeys(report.notes))
            for check in report.checks:
                sentence = f"{report.device}: {check.name}: {check.sentence}"
                if check in report.failures:
                    failed.append(Text(sentence, style="red"))
                if check.name == "latency":
                    slow.append(Text(sentence, style="yellow"))
        noted = [Text(f"note: {note}", style="yellow") for note in notes]
        return Group(self._draw_table(), *noted, *failed, *slow)

    def to_json(self) -> list[dict[str, Any]]:
        """Describe the reports in JSON values.

        Returns:
            A report for each device; of one without result: device, ok, error.
        """
        described = [report.to_json() for report in self.reports]
        for trouble in self.troubles:
            described.append({"device": trouble.device, "ok": False, "error": trouble.sentence})
        return described

    def _draw_table(self) -> Table:
        files = {f"{report.file}: {show(report.size)} bytes" for report in self.reports}
        title = ", ".join(sorted(files)) or "on each device"
        table = Table(title=Text(title), title_justify="left")
        columns = [_make_column(report) for report in self.reports]
        columns += [(trouble.device, "", "no result") for trouble in self.troubles]
        for column in (("",), *columns):
            table.add_column(Text(column[0]), overflow="fold")
        cells = [column[1:] for column in columns]
        for row in itertools.zip_longest(ROWS, *cells, fillvalue=""):
            table.add_row(*map(Text, row))
        return table


def _make_column(report: ValidationReport) -> tuple[str, ...]:
    """The device's name, then a cell for each of ROWS."""
    verdict = "ok" if report.ok else "FAILED"
    same, load, latency, ratio, memory = "", "", "", "", ""
    if report.agreement:
        same = f"{100 * report.agreement.share:.2f} % of {report.agreement.total}"
    if report.load_seconds is not None:
        load = f"{1e3 * report.load_seconds:.1f} ms"
    if report.latency:
        latency = f"{1e3 * report.latency.seconds:.3f} ms"
        ratio = f"{report.latency.ratio:.2f}"
    if report.peak_memory is not None:
        memory = f"{report.peak_memory / 2**20:.1f} MiB"
    return (
        report.device or "here",
        report.runtime,
        verdict,
        str(report.onnx_accuracy or ""),
        same,
        show(report.largest_difference),
        load,
        latency,
        ratio,
        memory,
    )
