"""Reports of a quantization: what became of each weight, and what did not go as asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ecqx_onnx.rendering import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class TensorReport:
    """One quantized weight.

    Attributes:
        name, shape: of the parameter.
        bits: of its grid.
        zeros, ecq_zeros: share of zeros in [0, 1], with relevances and as plain ECQ would have it.
        entropy: bits per weight, of zero order.
        beta: the exponent of f(R) = ρ R^β last used; None for plain ECQ.
        rule: where its relevance comes from.
        warnings: what did not go as asked.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    zeros: float
    ecq_zeros: float
    entropy: float
    beta: float | None
    rule: str
    warnings: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many weights it has."""
        return prod(self.shape)


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What was quantized and how; `print` and notebooks show it as a table.

    Attributes:
        tensors: the quantized weights.
        left_float: (parameter, why).
        approximated: operators that relevance crossed by gradient times input, having no rule of
            their own.
        unmatched: patterns of exclude and bits that no parameter's name matches.
        relevance_failures: (weight, why it has no relevance), or ("all weights", why): what failed
            falls back to plain ECQ.
        parametrized: of left_float, what is computed into another weight in each forward pass.
    """

    tensors: tuple[TensorReport, ...]
    left_float: tuple[tuple[str, str], ...]
    approximated: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    relevance_failures: tuple[tuple[str, str], ...] = ()
    parametrized: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What did not go as asked, one sentence each."""
        return tuple(self._find_warnings())

    def _find_warnings(self) -> Iterator[str]:
        for pattern in self.unmatched:
            yield f"{pattern} matches no parameter"
        quantized = {tensor.name for tensor in self.tensors}
        for what, why in self.relevance_failures:
            if what == "all weights":
                yield f"no relevances, so plain ECQ for all weights: {why}"
            elif what not in quantized:  # those of a quantized weight stand with it
                yield f"{what}: {why}"
        # Two parameters of one weight, such as g and v, give one sentence.
        yield from dict.fromkeys(why for name, why in self.left_float if name in self.parametrized)
        for tensor in self.tensors:
            for warning in tensor.warnings:
                yield f"{tensor.name}: {warning}"

    def _describe(self) -> str:
        size = sum(tensor.size for tensor in self.tensors)
        zeros = sum(tensor.size * tensor.zeros for tensor in self.tensors) / max(1, size)
        bits = sum(tensor.size * tensor.entropy for tensor in self.tensors) / max(1, size)
        return (
            f"{len(self.tensors)} tensors of {size:,} weights, {100 * zeros:.1f} % zeros,"
            f" {bits:.2f} bits per weight, {len(self.left_float)} parameters float,"
            f" {len(self.warnings)} warnings"
        )

    def __repr__(self) -> str:
        return f"Report({self._describe()})"

    def render(self) -> RenderableType:
        """Draw the report.

        Returns:
            A table with a line for each weight, its sums above and the warnings below.
        """
        from rich.console import Group
        from rich.text import Text

        from ecqx_onnx.rendering.trained import draw_trained_weights

        table = draw_trained_weights(self.tensors, self._describe())
        return Group(table, *(Text(f"warning: {warning}") for warning in self.warnings))
