"""What `compress` gives back: the points, the chosen one, the verdict; as a table and as JSON."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ecqx_onnx_converters import WriteReport
from rich.console import Console, Group, RenderableType
from rich.text import Text

from ecqx_onnx.compression.search.bounds import Bounds
from ecqx_onnx.compression.search.points import Point
from ecqx_onnx.compression.search.quality import Quality
from ecqx_onnx.compression.search.search import sort_finest_first
from ecqx_onnx.compression.verdict import Verdict
from ecqx_onnx.rendering.fitted import Column, FittedTable
from ecqx_onnx.validation.outputs.metrics import Proportion


@dataclass(frozen=True, eq=False)
class CompressResult:
    """One run of `compress`.

    Attributes:
        path: of the file; None where a bound was missed and nothing was written.
        source: the float model.
        bounds: what was asked for.
        points: all that were tried.
        chosen: the point that was written.
        verdict: on samples that nothing has seen.
        misses: bounds that don't hold, a clause each.
        report: what lies in the file.
        entries: quantized weights.
        slopes: the sensitivity of each.
        seconds: wall time.
    """

    path: Path | None
    source: str
    bounds: Bounds
    points: tuple[Point, ...]
    chosen: Point
    verdict: Verdict
    misses: tuple[str, ...]
    report: WriteReport
    entries: int
    slopes: Mapping[str, float] = field(repr=False, default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether all bounds hold, on the search samples and on the verdict's."""
        return not self.misses

    @property
    def advice(self) -> str:
        """What would help where a bound was missed; the next command where none was."""
        if self.ok:
            out = shlex.quote(str(self.report.path))
            return (
                f"next: ecqx-onnx validate {out} --against {shlex.quote(self.source)} --data DATA,"
                f" or ecqx-onnx deploy {out} --to web DIR"
            )
        if self.bounds.limits_quality and self.bounds.limits_size:
            return "allow more bytes or a larger error; or train: ecqx-onnx quantize"
        if self.bounds.limits_size:
            return "allow more bytes, or add --floats float16; what stays float is listed above"
        return (
            "more samples (--samples, more data) make the search surer; or allow a larger error;"
            " --keep-best writes the best that was reached"
        )

    def to_json(self) -> dict[str, Any]:
        """Give the result as plain values for JSON.

        Returns:
            A document with sizes in bytes, shares in [0, 1] and times in seconds.
        """
        return {
            "file": None if self.path is None else str(self.path),
            "source": self.source,
            "ok": self.ok,
            "misses": list(self.misses),
            "bounds": asdict(self.bounds),
            "bytes": self.report.nbytes,
            "float_bytes": self.verdict.before.nbytes,
            "bits_per_weight": self.chosen.bits_per_weight,
            "file_bits_per_weight": 8 * self.report.nbytes / max(1, self.entries),
            "weights": self.entries,
            "verdict": _write_quality(self.verdict.quality),
            "load_seconds": [self.verdict.before.load, self.verdict.after.load],
            "latency_seconds": [self.verdict.before.latency, self.verdict.after.latency],
            "points": [_write_point(point) for point in self.points],
            "chosen": _write_point(self.chosen),
            "float": [
                {"name": kept.name, "shape": list(kept.shape), "reason": kept.reason}
                for kept in self.report.kept
            ],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def render(self) -> RenderableType:
        """Give the result as tables and lines for a terminal.

        Returns:
            What rich can print.
        """
        lines: list[RenderableType] = [self._verdict_table(), self._curve_table()]
        for kept in self.report.kept[:12]:
            lines.append(Text(f"stays float: {kept.name} {list(kept.shape)}: {kept.reason}"))
        if len(self.report.kept) > 12:
            lines.append(Text(f"stays float: {len(self.report.kept) - 12} more tensors"))
        lines += [Text(f"note: {note}", style="yellow") for note in self.notes]
        lines += [Text(f"missed: {miss}", style="red") for miss in self.misses]
        lines.append(Text(self._headline(), style="bold"))
        lines.append(Text(self.advice))
        return Group(*lines)

    def _headline(self) -> str:
        before, after = self.verdict.before.nbytes, self.report.nbytes
        name = str(self.path) if self.path is not None else "nothing was written"
        return (
            f"{name}: {after:,} bytes, {before / max(1, after):.1f} times smaller than"
            f" {self.source}; {self.chosen.bits_per_weight:.2f} coded bits a weight"
        )

    def _verdict_table(self) -> FittedTable:
        title = f"{self.source} on {self.verdict.quality.samples} samples that nothing has seen"
        columns = (
            Column("on these", "name"),
            Column("float", "prose", right=True),
            Column("compressed", "prose", right=True),
        )
        return FittedTable(columns, self._rows(), title=title)

    def _rows(self) -> list[tuple[str, str, str]]:
        quality, before, after = self.verdict.quality, self.verdict.before, self.verdict.after
        whole = 8 * self.report.nbytes / max(1, self.entries)
        rows = [
            ("bytes", f"{before.nbytes:,}", f"{after.nbytes:,}"),
            ("times smaller", "1", f"{before.nbytes / max(1, after.nbytes):.1f}"),
            ("coded bits a weight", "32", f"{self.chosen.bits_per_weight:.3f}"),
            ("bits of the whole file a weight", "", f"{whole:.3f}"),
        ]
        if quality.accuracy is not None and quality.float_accuracy is not None:
            rows.append(("accuracy", str(quality.float_accuracy), str(quality.accuracy)))
        if quality.agreement is not None:
            rows.append(("agreement", "", str(quality.agreement)))
        for output in quality.outputs[:8]:
            rows.append((f"{output.name}: error", "", f"{output.error:.4f}"))
            rows.append((f"{output.name}: cosine", "", f"{output.cosine:.5f}"))
            worst = f"{output.worst_error:.4f} (sample {output.worst_sample})"
            rows.append((f"{output.name}: worst sample", "", worst))
        rows.append(("load", f"{1e3 * before.load:.1f} ms", f"{1e3 * after.load:.1f} ms"))
        latency = f"latency of {before.batch} samples"
        rows.append((latency, f"{1e3 * before.latency:.2f} ms", f"{1e3 * after.latency:.2f} ms"))
        return rows

    def _curve_table(self) -> FittedTable:
        rows = []
        for point in sort_finest_first(self.points):
            agreement, drop = point.quality.agreement, point.quality.drop
            rows.append(
                (
                    f"{point.nbytes:,}",
                    f"{point.bits_per_weight:.3f}",
                    "" if agreement is None else f"{100 * agreement.share:.2f} %",
                    "" if drop is None else f"{drop:+.2f}",
                    f"{point.quality.error:.4f}",
                    "chosen" if point.bits == self.chosen.bits else "",
                )
            )
        columns = (
            Column("bytes", right=True),
            Column("bits a weight", right=True),
            Column("agreement", right=True, meaning="samples with the float model's class"),
            Column("lost points", right=True, meaning="of accuracy"),
            Column("error", right=True, meaning="||y - y'|| / ||y|| of the worst output"),
            Column(""),
        )
        # Columns that say something of any point.
        cells = list(zip(*rows, strict=True))
        known = [number for number, column in enumerate(cells) if any(column)]
        return FittedTable(
            [columns[number] for number in known],
            list(zip(*[cells[number] for number in known], strict=True)),
            title=f"points tried; wanted: {self.bounds.words}",
        )

    def _repr_html_(self) -> str:
        """For a notebook."""
        from ecqx_onnx.compression.page import as_html

        return as_html(self, whole=False)

    def __str__(self) -> str:
        console = Console(width=100, record=True, file=io.StringIO())
        console.print(self.render())
        return console.export_text()


def _write_quality(quality: Quality) -> dict[str, Any]:
    return {
        "error": quality.error,
        "drop": quality.drop,
        "samples": quality.samples,
        "agreement": _write_proportion(quality.agreement),
        "accuracy": _write_proportion(quality.accuracy),
        "float_accuracy": _write_proportion(quality.float_accuracy),
        "outputs": [asdict(output) for output in quality.outputs],
    }


def _write_proportion(proportion: Proportion | None) -> dict[str, float | int] | None:
    return None if proportion is None else proportion.to_json()


def _write_point(point: Point) -> dict[str, Any]:
    return {
        "bits": point.bits,
        "bytes": point.nbytes,
        "bits_per_weight": point.bits_per_weight,
        "quality": _write_quality(point.quality),
    }


def _list_rows(points: Sequence[Point]) -> list[tuple[int, float]]:
    """(bytes, error) of each point, for a chart."""
    return [(point.nbytes, point.quality.error) for point in points]
