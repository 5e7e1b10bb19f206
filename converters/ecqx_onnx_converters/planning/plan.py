"""The plan of a file as frozen values: what becomes of each weight, and why."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ValueInfoProto

from ecqx_onnx_converters.dequantization.standard import StandardForm
from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.matching.matching import GraphWeight, Missing
from ecqx_onnx_converters.storage import Stored
from ecqx_onnx_converters.targets import Target


@dataclass(frozen=True, eq=False)
class Entry:
    """What one weight of the graph becomes.

    Attributes:
        weight: the weight, its levels in the graph's layout.
        stored: its integers; tied weights share one.
        permutation: of the stored levels, to get the graph's layout; None where they have it
            already.
        form: how DequantizeLinear feeds the consumers; None for the folded function.
        reason: why it is stored and dequantized like this, in words.
    """

    weight: GraphWeight
    stored: Stored
    permutation: tuple[int, ...] | None
    form: StandardForm | None
    reason: str

    @property
    def dequantization(self) -> str:
        """The kind of dequantization: "folded", "standard", "integer" or "none".

        It is "integer" where integer kernels read the DequantizeLinear, "none" where the graph
        reads integers.
        """
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
    """What becomes of all weights of a graph, for the writer.

    Attributes:
        graph: the float graph.
        target: what the runtime can read, less what this graph can't use.
        opset: of the file to write.
        entries: the quantized weights, in the order of the matching.
        kept: weights that stay float.
        missing: QuantTensors that are nowhere in the graph.
        shapes: of inner values, which the file shall state; all others are left to the runtime.
    """

    graph: FloatGraph
    target: Target
    opset: int
    entries: tuple[Entry, ...]
    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...] = ()
    shapes: tuple[ValueInfoProto, ...] = ()
