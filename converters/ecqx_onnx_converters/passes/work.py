"""The value that passes work on: a graph, its quantized weights, and notes on what was done.

A pass takes a Work and returns a new one that computes the same, or the same but for a rounding
that its docstring bounds. What it was given stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ecqx_onnx_converters.graph.graph import FloatGraph
from ecqx_onnx_converters.matching.matching import Matching


class Note(Protocol):
    """What one pass did, or why it left something: a frozen value."""

    @property
    def sentence(self) -> str:
        """For the report; empty where there is nothing to tell."""


NoteType = TypeVar("NoteType")


@dataclass(frozen=True, eq=False)
class Work:
    """A float graph on its way into a file.

    Attributes:
        graph: its structure, and its float weights.
        matching: the weights that are quantized, each with its place in the graph.
        notes: what the passes so far say of what they did, in their order.
    """

    graph: FloatGraph
    matching: Matching
    notes: tuple[Note, ...] = ()

    def find_notes(self, kind: type[NoteType]) -> tuple[NoteType, ...]:
        """Find the notes of one kind.

        Args:
            kind: their class, such as BatchNorm.

        Returns:
            Those that are there, in their order.
        """
        return tuple(note for note in self.notes if isinstance(note, kind))

    @property
    def sentences(self) -> list[str]:
        """What the notes tell, for the report."""
        return [note.sentence for note in self.notes if note.sentence]


Pass = Callable[[Work], Work]


def apply_passes(passes: Iterable[Pass], work: Work) -> Work:
    """Apply one pass after the other.

    Args:
        passes: in their order.
        work: where they start; is not changed.

    Returns:
        What the last one made; `work` itself without any.
    """
    for rewrite in passes:
        work = rewrite(work)
    return work
