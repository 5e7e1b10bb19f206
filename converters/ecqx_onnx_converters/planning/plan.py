"""The plan of a file as frozen values: what becomes of each weight, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ecqx_onnx_converters.dequantization.standard import StandardForm
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.matching.matching import GraphWeight, Missing
from ecqx_onnx_converters.storage import Stored
from ecqx_onnx_converters.targets import Target


@dataclass(frozen=True, eq=False)
class Entry:
    """What one weight of the graph becomes.

    stored: its integers; tied weights share one.
    permutation: of the stored levels, to get the graph's layout; None where they have it already.
    form: how DequantizeLinear feeds the consumers; None for the folded function.
    """

    weight: GraphWeight
    stored: Stored
    permutation: tuple[int, ...] | None
    form: StandardForm | None
    reason: str

    @property
    def dequantization(self) -> str:
        if self.form is None:
            return "folded" if self.weight.integers is None else "none"
        return "integer" if self.form.integer else "standard"


@dataclass(frozen=True)
class Kept:
    """A weight that stays float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    graph: FloatGraph
    target: Target
    opset: int
    entries: tuple[Entry, ...]
    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
