"""What an inspection found: values that can be shown as tables or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.rendering.fitted import Column, FactTable, FittedTable
from ecqx_onnx.rendering.weights import WeightRow, draw_weights
from ecqx_onnx.tensors import QuantTensor

PARTS = (
    Column("what the bytes are for", "name"),
    Column("bytes", right=True),
    Column("share", right=True),
)
SHOWN_FLOATS = 12  # rows of float weights in the tables; the JSON has all


@dataclass(frozen=True)
class InspectedTensor:
    """One quantized weight.

    Attributes:
        name: of its initializer in the file.
        sources: its names in PyTorch; several for tied weights.
        shape: of the weight.
        bits: of its levels.
        zeros: share in [0, 1] of weights that are zero.
        entropy: of its levels, in bits per weight.
        storage: how the integers lie in the file.
        dequantization: how the graph reads them; empty in a checkpoint.
        nbytes: of its integers as they are stored.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    bits: int
    zeros: float
    entropy: float
    storage: str
    dequantization: str
    nbytes: int

    @classmethod
    def from_tensor(
        cls,
        tensor: QuantTensor,
        sources: tuple[str, ...],
        storage: str,
        dequantization: str,
        nbytes: int,
    ) -> InspectedTensor:
        """Describe a tensor.

        Args:
            tensor: the weight.
            sources: its names in PyTorch.
            storage: how the integers lie in the file.
            dequantization: how the graph reads them.
            nbytes: of its integers as they are stored.

        Returns:
            A row of the table.
        """
        return cls(
            tensor.name,
            sources,
            tensor.shape,
            tensor.bits,
            tensor.zeros,
            tensor.entropy,
            storage,
            dequantization,
            nbytes,
        )

    def to_json(self) -> dict[str, Any]:
        """Turn it into plain JSON values.

        Returns:
            Sizes in bytes, shares in [0, 1], entropy in bits per weight.
        """
        return {
            "name": self.name,
            "sources": list(self.sources),
            "shape": list(self.shape),
            "bits": self.bits,
            "zeros": self.zeros,
            "entropy": self.entropy,
            "storage": self.storage,
            "dequantization": self.dequantization,
            "bytes": self.nbytes,
        }


@dataclass(frozen=True)
class FloatWeight:
    """A float tensor of two or more dimensions."""

    name: str
    shape: tuple[int, ...]
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Turn it into plain JSON values.

        Returns:
            Its name, shape and bytes.
        """
        return {"name": self.name, "shape": list(self.shape), "bytes": self.nbytes}


@dataclass(frozen=True)
class Inspection:
    """What is in a file.

    Attributes:
        file: its path.
        kind: "ONNX model" or "checkpoint".
        nbytes: of the file and its external data.
        facts: (what, value) in words.
        tensors: the quantized weights.
        floats: tensors of two or more dimensions that are float.
        parts: bytes by what they are for; they sum to nbytes.
        recipe: how it was made, if it says.
        preprocessing: of raw samples, if it says.
        labels: names of the classes.
        inflated: the metadata lists quantized weights that are float in the file.
        warnings: one sentence each.
    """

    file: str
    kind: str
    nbytes: int
    facts: tuple[tuple[str, str], ...]
    tensors: tuple[InspectedTensor, ...]
    floats: tuple[FloatWeight, ...]
    parts: Mapping[str, int]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    inflated: bool = False
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Turn it into plain JSON values.

        Returns:
            Sizes in bytes, shares in [0, 1], entropy in bits per weight.
        """
        return {
            "file": self.file,
            "kind": self.kind,
            "bytes": self.nbytes,
            "facts": dict(self.facts),
            "tensors": [row.to_json() for row in self.tensors],
            "float": [row.to_json() for row in self.floats],
            "parts": dict(self.parts),
            "recipe": dict(self.recipe),
            "preprocessing": dict(self.preprocessing),
            "labels": list(self.labels),
            "inflated": self.inflated,
            "warnings": list(self.warnings),
        }

    def render(self) -> RenderableType:
        """Show it as tables for a terminal.

        Returns:
            What `rich` prints.
        """
        rows = [
            *self.facts,
            ("recipe", _format_fields(self.recipe)),
            ("preprocessing", _format_fields(self.preprocessing)),
        ]
        rows.append(("labels", ", ".join(self.labels)))
        facts = FactTable(rows, title=f"{self.file}: {self.kind}, {self.nbytes:,} bytes")
        shares = []
        for name, count in sorted(self.parts.items(), key=lambda item: -item[1]):
            if count:
                shares.append((name, f"{count:,}", f"{count / max(1, self.nbytes):.1%}"))
        parts = FittedTable(PARTS, shares)
        tables: list[RenderableType] = [facts]
        if self.tensors:
            tables.append(self._render_weights())
        for row in self.floats[:SHOWN_FLOATS]:
            tables.append(
                Text(f"float: {row.name} {list(row.shape)}, {row.nbytes:,} bytes", style="dim")
            )
        rest = self.floats[SHOWN_FLOATS:]
        if rest:
            nbytes = sum(row.nbytes for row in rest)
            more = f"float: {len(rest)} more weights, {nbytes:,} bytes"
            tables.append(Text(more, style="dim"))
        return Group(*tables, parts, *(Text(warning, style="yellow") for warning in self.warnings))

    def _render_weights(self) -> FittedTable:
        rows = []
        for row in self.tensors:
            rows.append(
                WeightRow(
                    name=", ".join(row.sources),
                    shape=row.shape,
                    bits=row.bits,
                    zeros=row.zeros,
                    entropy=row.entropy,
                    storage=row.storage,
                    dequantization=row.dequantization,
                    nbytes=row.nbytes,
                )
            )
        return draw_weights(rows)


def _format_fields(fields: Mapping[str, Any]) -> str:
    """What is set, as `name value`."""
    unset: tuple[Any, ...] = (None, [], "", {})
    words = []
    for name, value in fields.items():
        if name == "version" or value in unset:
            continue
        shown = f"({_format_fields(value)})" if isinstance(value, Mapping) else value
        words.append(f"{name} {shown}")
    return ", ".join(words)
