"""The options of a training, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ecqx_onnx.errors import OptionError

Schedule = Literal["cosine", "constant"]
Precision = Literal["float32", "bfloat16"]
# The paper trains by Adam at a constant rate, and takes relevances to the end [ECQx, sec. 5.1].
PAPER_TRAINING = {
    "learning_rate": 1e-3,
    "schedule": "constant",
    "relevance_until": 1.0,
    "entropy_ramp": 0.0,
}
DistillBy = Literal["auto", "logits", "mse", "cosine"]


@dataclass(frozen=True)
class _Setup:
    """The numbers of one training, which a resumed run must share."""

    epochs: int
    batch_size: int
    learning_rate: float
    schedule: Schedule
    validation: float
    distillation: float
    temperature: float
    entropy_ramp: float
    precision: Precision
    seed: int
    relevance_until: float = 1.0  # a state written before there was this option has none
    loss: str = "cross_entropy"
    metric: str | None = None
    distill_by: str = "auto"
    budget: str | None = None

    def __post_init__(self) -> None:
        counts_fit = self.epochs >= 0 and self.batch_size >= 1
        rate_fits = math.isfinite(self.learning_rate) and self.learning_rate >= 0
        if not (counts_fit and rate_fits):
            raise OptionError(
                f"epochs {self.epochs}, batch size {self.batch_size}, learning rate"
                f" {self.learning_rate}: they must be at least 0, 1 and 0"
            )
        shares_fit = 0 <= self.validation < 1 and 0 <= self.distillation <= 1
        if not (shares_fit and self.temperature > 0):
            raise OptionError(
                f"validation {self.validation}, distillation {self.distillation}, temperature"
                f" {self.temperature}: the first is a share below 1, the second one up to 1, the"
                " third above 0"
            )
        if not 0 <= self.entropy_ramp < 1:
            raise OptionError(
                f"entropy_ramp is {self.entropy_ramp}: choose a share of the training from 0 to"
                " below 1"
            )
        if not 0 < self.relevance_until <= 1:
            raise OptionError(
                f"relevance_until is {self.relevance_until}: choose a share of the training above"
                " 0, up to 1"
            )
        choices_of = {
            "schedule": get_args(Schedule),
            "precision": get_args(Precision),
            "distill_by": get_args(DistillBy),
        }
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"{name} '{value}' is unknown: use one of {', '.join(choices)}")

    def rate_scale(self, done: float) -> float:
        """Factor of the learning rates of weights and steps.

        done: share of the training, in [0, 1].
        """
        if self.schedule == "constant":
            return 1.0
        return (1 + math.cos(math.pi * done)) / 2  # from 1 to 0

    def entropy_scale(self, done: float) -> float:
        """Factor of γ: pruned gradually, a net mends as it goes.

        done: share of the training, in [0, 1].
        """
        if not self.entropy_ramp:
            return 1.0
        return min(1.0, done / self.entropy_ramp)

    def counts(self, epoch: int) -> bool:
        """Whether an epoch may be the best: it ran at the full γ throughout, or is the last."""
        return epoch - 1 >= self.entropy_ramp * self.epochs or epoch == self.epochs
