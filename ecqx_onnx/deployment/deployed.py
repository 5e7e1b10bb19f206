"""What `deploy` wrote: figures for a table and for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.deployment.tolerances import Tolerance
from ecqx_onnx.rendering.fitted import Column, FittedTable
from ecqx_onnx.validation.outputs.metrics import Proportion

GOLDEN = "golden/"  # the folder's files of inputs and outputs


@dataclass(frozen=True)
class Deployed:
    """What was written.

    Attributes:
        folder: that holds everything.
        platform: its name.
        files: (name within the folder, bytes), sorted.
        model_bytes: size of the model's file.
        float32_bytes: size of the same model with float weights; None where it has none of ours.
        accuracy: expected on the data set; None without data.
        tolerances: of each output.
        cases: how many golden cases there are.
        notes: what a user should know, one sentence each.
    """

    folder: Path
    platform: str
    files: tuple[tuple[str, int], ...]
    model_bytes: int
    float32_bytes: int | None
    accuracy: Proportion | None
    tolerances: tuple[Tolerance, ...]
    cases: int
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def to_json(self) -> dict[str, Any]:
        """List the figures as `--json` prints them.

        Returns:
            Values that JSON can hold, by name.
        """
        return {
            "folder": str(self.folder),
            "platform": self.platform,
            "bytes": self.size,
            "model_bytes": self.model_bytes,
            "float32_bytes": self.float32_bytes,
            "accuracy": self.accuracy.to_json() if self.accuracy else None,
            "golden_cases": self.cases,
            "tolerances": [asdict(tolerance) for tolerance in self.tolerances],
            "files": dict(self.files),
            "notes": list(self.notes),
        }

    def render(self) -> RenderableType:
        """Draw the list of files and the notes.

        Returns:
            What rich prints.
        """
        rows = []
        golden_bytes = 0
        for name, size in self.files:
            if name.startswith(GOLDEN):
                golden_bytes += size
            else:
                rows.append((name, f"{size:,}"))
        rows.append((f"{GOLDEN} ({self.cases} cases)", f"{golden_bytes:,}"))
        columns = (Column("file", "name"), Column("bytes", right=True))
        table = FittedTable(columns, rows, title=f"{self.folder}: ready for {self.platform}")
        lines: list[RenderableType] = [table]
        lines += [Text(f"note: {note}", style="yellow") for note in self.notes]
        words = f"{self.folder}: {self.size:,} bytes, the model {self.model_bytes:,}"
        if self.accuracy:
            words += f"; expected accuracy {self.accuracy}"
        lines.append(Text(f"{words}; see README.md", style="bold"))
        return Group(*lines)
