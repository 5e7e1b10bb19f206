"""The options of a training, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ecqx_onnx.errors import OptionError

Schedule = Literal["cosine", "constant"]
Precision = Literal["float32", "bfloat16"]


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

    def __post_init__(self) -> None:
        if (
            self.epochs < 0
            or self.batch_size < 1
            or not (math.isfinite(self.learning_rate) and self.learning_rate >= 0)
        ):
            raise OptionError(
                f"epochs {self.epochs}, batch size {self.batch_size}, learning rate {self.learning_rate}: "
                "they must be at least 0, 1 and 0"
            )
        if (
            not 0 <= self.validation < 1
            or not 0 <= self.distillation <= 1
            or not self.temperature > 0
        ):
            raise OptionError(
                f"validation {self.validation}, distillation {self.distillation}, temperature {self.temperature}: the first is a "
                "share below 1, the second one up to 1, the third above 0"
            )
        if not 0 <= self.entropy_ramp < 1:
            raise OptionError(
                f"entropy_ramp is {self.entropy_ramp}: choose a share of the training from 0 to below 1"
            )
        if not 0 < self.relevance_until <= 1:
            raise OptionError(
                f"relevance_until is {self.relevance_until}: choose a share of the training above 0, up to 1"
            )
        for name, choices in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"{name} '{getattr(self, name)}' is unknown: use one of {', '.join(choices)}"
                )

    def rate_scale(self, done: float) -> float:
        """What the learning rates of weights and steps are multiplied by when this share of the training is done."""
        return (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1.0

    def entropy_scale(self, done: float) -> float:
        """What γ is multiplied by when this share of the training is done: pruned gradually, a net mends as it goes."""
        return min(1.0, done / self.entropy_ramp) if self.entropy_ramp else 1.0

    def counts(self, epoch: int) -> bool:
        """Whether this epoch may be the best: all of it ran at the full γ, or there is no other."""
        return epoch - 1 >= self.entropy_ramp * self.epochs or epoch == self.epochs
