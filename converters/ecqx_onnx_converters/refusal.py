"""A reason, in words, why something cannot be had; it reaches the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something can't be had.

    Attributes:
        reason: A sentence for the report.
    """

    reason: str
