"""What was written, weight by weight, as frozen values."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ecqx_onnx_converters.matching.matching import Missing
from ecqx_onnx_converters.passes.integer_nodes import FloatNode
from ecqx_onnx_converters.planning.plan import Kept


@dataclass(frozen=True)
class WrittenTensor:
    """One weight as it lies in the file.

    Attributes:
        name: In the float graph.
        sources: Parameters of the model that it was made of.
        shape: The weight's.
        bits: Fewest bits that hold every level as one integer.
        zeros: Share of entries of level 0, in [0, 1].
        entropy: Zero-order, in bits per weight.
        storage: The codec as the report names it, such as "dense INT4".
        dequantization: Its form: "folded", "standard", "integer" or "none".
        nbytes: Of the integers as they are stored, as `inspect` counts them; tied weights count
            them once, with the first.
        rescaled: Whether the graph's values are the parameter's times a batch norm's factor,
            restored to a relative 2^-22 rather than bit for bit.
        reason: Why it has this storage or form where another was asked for; empty otherwise.
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
    rescaled: bool
    reason: str


@dataclass(frozen=True)
class WriteReport:
    """A written file.

    Attributes:
        path: Of the ONNX file.
        nbytes: Of all files.
        opset: Of the standard operators.
        target: Name of the target it was written for.
        tensors: Quantized weights.
        kept: Float weights, and why they stay so.
        missing: Quantized tensors that the graph doesn't have.
        notes: What the target's own tools say of the file, a sentence each.
        kernels: Operator -> how many of its nodes run on integers; empty for float activations.
        stays: The nodes that don't; empty for float activations.
        wire_bytes: Of the file under brotli; None where that was not measured.
    """

    path: Path
    nbytes: int
    opset: int
    target: str
    tensors: tuple[WrittenTensor, ...]
    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    stays: tuple[FloatNode, ...] = ()
    wire_bytes: int | None = None

    def __str__(self) -> str:
        lines = []
        for row in self.tensors:
            shape = "x".join(map(str, row.shape))
            lines.append(
                f"{row.name}  {shape}  {row.bits} bits, {row.zeros:.1%} zeros,"
                f" {row.storage}, {row.nbytes:,} bytes"
            )
        for kept in self.kept:
            lines.append(f"stays float: {kept.name} {list(kept.shape)}: {kept.reason}")
        lines += self.notes
        lines.append(f"{self.path}: {self.nbytes:,} bytes; opset {self.opset}, for {self.target}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"
