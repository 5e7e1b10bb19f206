"""Why something cannot be had: a value with a reason in words, which reaches the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why something can't be had, in words for the report."""

    reason: str
