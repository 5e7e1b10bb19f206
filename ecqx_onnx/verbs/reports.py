"""What `quantize` and `pack` did: reports that show themselves as table, JSON and in a notebook."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecqx_onnx_converters import WriteReport
from ecqx_onnx_converters.planning.plan import Kept
from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.delivery.wire import NOT_MEASURED, WireSizes
from ecqx_onnx.rendering import Shown
from ecqx_onnx.rendering.trained import draw_trained_weights
from ecqx_onnx.rendering.write_report import render_write_report, write_report_to_json
from ecqx_onnx.tensors import QuantTensor
from ecqx_onnx.validation.equivalence import Equivalence
from ecqx_onnx.validation.outputs.metrics import Proportion

if TYPE_CHECKING:
    from ecqx_onnx.quantization.objectives.objective import Score
    from ecqx_onnx.quantization.report import Report
    from ecqx_onnx.quantization.training import EpochRecord


@dataclass(frozen=True, eq=False, repr=False)
class Quantized(Shown):
    """What `quantize` did.

    Attributes:
        path: of the checkpoint.
        before: the float network's accuracy on the test split, or its score by another metric;
            None without weights, and for metrics that compare with the float network.
        after: the quantized network's, with activations rounded as they were while training. No
            choice was made on the test split.
        best_epoch: whose weights were kept; 0 if levels were only assigned.
        history: one record an epoch.
        report: how each weight was quantized.
        tensors: the quantized weights.
        data: name of the data set.
        notes: what a user should know, one sentence each.
        activations: "float32" or "int8".
    """

    path: Path
    before: Proportion | Score | None
    after: Proportion | Score
    best_epoch: int
    history: tuple[EpochRecord, ...]
    report: Report
    tensors: tuple[QuantTensor, ...]
    data: str
    notes: tuple[str, ...]
    activations: str = "float32"

    @property
    def zeros(self) -> float:
        """Share of zeros over all quantized weights, in [0, 1]."""
        return sum(t.zeros * t.size for t in self.tensors) / self._weights

    @property
    def bits_per_weight(self) -> float:
        """Zero-order entropy of the levels over all quantized weights, in bits."""
        return sum(t.entropy * t.size for t in self.tensors) / self._weights

    @property
    def _weights(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def __repr__(self) -> str:
        return (
            f"<Quantized {self.path}: {self._show_after()}, zeros {self.zeros:.1%}, "
            f"{self.bits_per_weight:.2f} bit per weight>"
        )

    def _show_after(self) -> str:
        return f"accuracy {self.after}" if isinstance(self.after, Proportion) else str(self.after)

    def to_json(self) -> dict[str, Any]:
        """Write the report as plain values.

        Returns:
            Dicts, lists, numbers, texts. Shares in [0, 1], entropy in bits per weight.
        """
        left_float = []
        for name, reason in self.report.left_float:
            left_float.append({"name": name, "reason": reason})
        return {
            "file": str(self.path),
            "data": self.data,
            **self._write_scores(),
            "activations": self.activations,
            "zeros": self.zeros,
            "bits_per_weight": self.bits_per_weight,
            "best_epoch": self.best_epoch,
            "history": [asdict(record) for record in self.history],
            "tensors": [asdict(row) for row in self.report.tensors],
            "left_float": left_float,
            "warnings": list(self.report.warnings),
            "notes": list(self.notes),
        }

    def _write_scores(self) -> dict[str, Any]:
        before = self.before.to_json() if self.before else None
        after = self.after.to_json()
        if isinstance(self.after, Proportion):
            return {"accuracy_before": before, "accuracy": after}
        return {"accuracy_before": None, "accuracy": None, "score_before": before, "score": after}

    def render(self) -> RenderableType:
        """Draw the report.

        Returns:
            A table of the weights, warnings and notes, and a line that sums it up.
        """
        title = f"{self.path}, trained on {self.data}"
        lines: list[RenderableType] = [draw_trained_weights(self.report.tensors, title)]
        for warning in self.report.warnings:
            lines.append(Text(f"warning: {warning}", style="yellow"))
        for note in self.notes:
            lines.append(Text(f"note: {note}", style="yellow"))
        lines.append(Text(self._summarize(), style="bold"))
        return Group(*lines)

    def _summarize(self) -> str:
        before = f"{self.before} before, " if self.before else ""
        before = f"accuracy {before}" if isinstance(self.after, Proportion) else before
        rounded = " with 8-bit activations" if self.activations == "int8" else ""
        return (
            f"{self.path}: test {before}{self.after} after{rounded};"
            f" zeros {self.zeros:.1%}, {self.bits_per_weight:.2f} bit per weight;"
            f" best epoch {self.best_epoch}, chosen on the validation split"
        )


@dataclass(frozen=True, repr=False)
class PackReport(Shown):
    """What `pack` did.

    Attributes:
        path: of the file that was written.
        original_bytes: of the model and its external data.
        nbytes: of what was written.
        written: how the weights are stored; None where the model was copied unchanged.
        reason: why it was copied unchanged; empty where it was not.
        kept: weights that stay as they were, each with the reason.
        notes: what a user should know, one sentence each.
        equivalence: the check against the original; None without a check, or when it was copied.
        wire: bytes of both under brotli, where they were measured.
    """

    path: Path
    original_bytes: int
    nbytes: int
    written: WriteReport | None
    reason: str
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]
    equivalence: Equivalence | None
    wire: WireSizes = NOT_MEASURED

    def __repr__(self) -> str:
        return f"<PackReport {self._summarize()}>"

    def to_json(self) -> dict[str, Any]:
        """Write the report as plain values.

        Returns:
            Dicts, lists, numbers, texts; sizes in bytes.
        """
        kept = []
        for entry in self.kept:
            kept.append({"name": entry.name, "shape": list(entry.shape), "reason": entry.reason})
        written = write_report_to_json(self.written) if self.written else None
        checks = self.equivalence.checks if self.equivalence else ()
        return {
            "file": str(self.path),
            "original_bytes": self.original_bytes,
            "bytes": self.nbytes,
            "wire_bytes": self.wire.written,
            "original_wire_bytes": self.wire.original,
            "packed": written is not None,
            "reason": self.reason,
            "tensors": written["tensors"] if written else [],
            "opset": written["opset"] if written else None,
            "kept": kept,
            "notes": list(self.notes),
            "checks": [check.to_json() for check in checks],
        }

    def render(self) -> RenderableType:
        """Draw the report.

        Returns:
            The weights, notes, the check, and a line that sums it up.
        """
        lines: list[RenderableType] = []
        if self.written is not None:
            lines.append(render_write_report(replace(self.written, kept=self.kept)))
        else:
            for entry in self.kept:
                sentence = f"stays: {entry.name} {list(entry.shape)}: {entry.reason}"
                lines.append(Text(sentence, style="yellow"))
        for note in (*self.notes, *self.wire.sentences):
            lines.append(Text(f"note: {note}", style="yellow"))
        if self.equivalence is not None:
            lines.append(self.equivalence.render())
        lines.append(Text(self._summarize(), style="bold"))
        return Group(*lines)

    def _summarize(self) -> str:
        if self.written is None:
            return f"{self.path}: copied unchanged, {self.nbytes:,} bytes: {self.reason}"
        ratio = self.original_bytes / max(1, self.nbytes)
        return (
            f"{self.path}: {self.original_bytes:,} bytes before, {self.nbytes:,} after"
            f" ({ratio:.2f}x)"
        )
