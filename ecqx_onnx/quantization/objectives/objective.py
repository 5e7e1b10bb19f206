"""The objective of a training: one loss, one metric, and how the float network is followed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecqx_onnx.errors import DataError, InputError, OptionError
from ecqx_onnx.quantization.objectives.losses import LOSSES, Loss, follow
from ecqx_onnx.quantization.objectives.metrics import METRICS, Metric
from ecqx_onnx.quantization.objectives.values import find_scores

DISTILLATION = "distillation"
Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
METRIC_OF_LOSS = {
    "cross_entropy": "accuracy",
    "bce": "label_accuracy",
    "mse": "mse",
    "l1": "l1",
    "dice": "dice",
}
MISFIT = (IndexError, RuntimeError, TypeError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True)
class Score:
    """The mean of a metric over samples.

    Attributes:
        metric: its name.
        total: sum over samples.
        squares: sum of squares.
        samples: how many.
        higher_is_better: whether more of it is better.
    """

    metric: str
    total: float
    squares: float
    samples: int
    higher_is_better: bool = True

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / max(1, self.samples)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean, for independent samples.

        Wilson's for a share of samples that are right or wrong; else the normal approximation.
        """
        n, p = max(1, self.samples), self.value
        if self.squares == self.total and 0 <= p <= 1:  # each is 0 or 1
            scale = 1 + Z95**2 / n
            centre = (p + Z95**2 / (2 * n)) / scale
            half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / scale
            return max(0.0, centre - half), min(1.0, centre + half)
        variance = max(0.0, self.squares / max(1, self.samples) - self.value**2)
        half = Z95 * math.sqrt(variance / max(1, self.samples - 1))
        return self.value - half, self.value + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.metric} {self.value:.4g} ({low:.4g} to {high:.4g})"

    def to_json(self) -> dict[str, Any]:
        """Describe the score in JSON values.

        Returns:
            metric, value, low and high of the 95 % interval, samples, higher_is_better.
        """
        low, high = self.interval
        return {
            "metric": self.metric,
            "value": self.value,
            "low": low,
            "high": high,
            "samples": self.samples,
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True)
class Objective:
    """What a training makes small, and what it is judged by.

    Attributes:
        loss_name: as options show it; "distillation" where there are no targets.
        loss: of (output, targets); None where only the float network is followed.
        metric: what chooses the best epoch.
        share: of the loss that follows the float network, in [0, 1].
        by: how it is followed, see `losses.follow`.
        temperature: of by="logits".
    """

    loss_name: str
    loss: Loss | None
    metric: Metric
    share: float
    by: str
    temperature: float

    @property
    def needs_float(self) -> bool:
        """Whether the float network has to be kept beside the one in training."""
        return self.share > 0 or self.metric.against_float

    @property
    def is_classification(self) -> bool:
        """Whether it is judged by the share of right classes."""
        return self.metric.name == "accuracy"

    def compute_loss(self, output: Any, target: Any, wanted: Any) -> Tensor:
        """Compute what is made small.

        Args:
            output: what the network returned.
            target: of the batch; None where there are none.
            wanted: what the float network returned; None where it is not followed.

        Returns:
            A scalar tensor.

        Raises:
            DataError: if the targets do not fit the output.
        """
        loss = None if self.loss is None else self._compute_own_loss(output, target)
        if not self.share:
            assert loss is not None  # without a share there is a loss
            return loss
        followed = self._follow(output, wanted)
        if loss is None or self.share == 1:
            return followed
        return (1 - self.share) * loss + self.share * followed

    def _compute_own_loss(self, output: Any, target: Any) -> Tensor:
        assert self.loss is not None
        try:
            loss = self.loss(output, target)
        except InputError:
            raise
        except MISFIT as error:
            shape = tuple(getattr(target, "shape", ())) or type(target).__name__
            raise DataError(
                f"the loss {self.loss_name} cannot compare the model's output with targets of"
                f" {shape} ({_take_first_line(error)}): choose another --loss, or mend it"
            ) from error
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            raise DataError(
                f"the loss {self.loss_name} returns a {type(loss).__name__}: return a tensor with"
                " one number, or one for each sample"
            )
        return loss.mean()

    def _follow(self, output: Any, wanted: Any) -> Tensor:
        try:
            return follow(output, wanted, by=self.by, temperature=self.temperature)
        except (KeyError, IndexError, RuntimeError) as error:
            raise DataError(
                f"the float network's outputs cannot be followed by {self.by}"
                f" ({_take_first_line(error)}): choose --distill-by mse, cosine or logits"
            ) from error

    @torch.no_grad()
    def measure(self, output: Any, target: Any, wanted: Any, samples: int) -> Score:
        """Measure the metric on a batch.

        Args:
            output: what the network returned.
            target: of the batch.
            wanted: what the float network returned, where the metric compares with it.
            samples: how many the batch has.

        Returns:
            The batch's part of the score.

        Raises:
            DataError: if the metric fails on this output.
        """
        reference = wanted if self.metric.against_float else target
        try:
            values = self.metric.measure(output, reference)
            values = torch.as_tensor(values, dtype=torch.float64).detach().flatten()
        except InputError:
            raise
        except MISFIT as error:
            raise DataError(
                f"the metric {self.metric.name} cannot judge the model's output"
                f" ({_take_first_line(error)}): choose another --metric, or mend it"
            ) from error
        if len(values) != samples:  # one number for the whole batch
            values = values.mean().repeat(samples)
        return Score(
            self.metric.name,
            float(values.sum()),
            float(values.pow(2).sum()),
            samples,
            self.metric.higher_is_better,
        )

    def add(self, first: Score | None, second: Score) -> Score:
        """Add the scores of two batches.

        Args:
            first: None before the first batch.
            second: of another batch.

        Returns:
            The score of both.
        """
        if first is None:
            return second
        return Score(
            first.metric,
            first.total + second.total,
            first.squares + second.squares,
            first.samples + second.samples,
            first.higher_is_better,
        )


def choose_objective(
    loss: str | Loss,
    metric: str | Callable[[Any, Any], Any] | None,
    *,
    distillation: float,
    distill_by: str,
    temperature: float,
    has_targets: bool,
) -> Objective:
    """Choose what a training follows.

    Args:
        loss: a name in LOSSES, "distillation", or a function (output, targets) -> tensor.
        metric: a name in METRICS, a function (output, targets) -> numbers, or None for the one
            that belongs to the loss.
        distillation: share of the loss that follows the float network.
        distill_by: "logits", "mse", "cosine"; "auto" takes logits beside a cross entropy and mse
            elsewhere.
        temperature: of distill_by="logits".
        has_targets: whether the data have targets; without any, only the float network is followed.

    Returns:
        The objective.

    Raises:
        OptionError: for a name that there is not, or a metric that needs targets where none are.
    """
    name, function = _choose_loss(loss)
    if not has_targets:
        name, function = DISTILLATION, None
    if function is None:
        distillation = 1.0
    if distill_by == "auto":
        distill_by = "logits" if name == "cross_entropy" else "mse"
    return Objective(
        name,
        function,
        _choose_metric(metric, name, function, distill_by, has_targets=has_targets),
        distillation,
        distill_by,
        temperature,
    )


def name_of(choice: Any) -> str:
    """Name a loss or a metric as recipes hold it.

    Args:
        choice: a name, with hyphens or underscores, or a function.

    Returns:
        The name with underscores; of a function its own.
    """
    if isinstance(choice, str):
        return choice.replace("-", "_").lower()
    return getattr(choice, "__name__", type(choice).__name__)


def _choose_loss(loss: str | Loss) -> tuple[str, Loss | None]:
    name = name_of(loss)
    if callable(loss):
        return name, loss
    if name == DISTILLATION:
        return name, None
    if name not in LOSSES:
        known = ", ".join((*LOSSES, DISTILLATION)).replace("_", "-")
        raise OptionError(f"loss '{loss}' is unknown: use one of {known}, or FILE.py:FUNCTION")
    return name, LOSSES[name]


def _choose_metric(
    metric: Any, loss_name: str, loss: Loss | None, by: str, *, has_targets: bool
) -> Metric:
    if metric is None:
        if loss is None:
            return METRICS["agreement" if by == "logits" else "cosine"]
        if loss_name in METRIC_OF_LOSS and loss is LOSSES.get(loss_name):
            return METRICS[METRIC_OF_LOSS[loss_name]]
        return Metric("loss", loss, higher_is_better=False)
    name = name_of(metric)
    if callable(metric):
        return Metric(name, metric)
    if name not in METRICS:
        known = ", ".join(METRICS).replace("_", "-")
        raise OptionError(f"metric '{metric}' is unknown: use one of {known}, or FILE.py:FUNCTION")
    found = METRICS[name]
    if not (has_targets or found.against_float):
        raise OptionError(
            f"metric '{metric}' needs targets, and the data have none: use agreement, cosine or"
            " error, which compare with the float network"
        )
    return found


def start_from_output(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Start relevances at whatever a model returns: each value of its first tensor is as relevant
    as it is large.

    Args:
        output: what the model returned.
        target: not looked at.

    Returns:
        The tensor, and its relevance.
    """
    scores = find_scores(output)
    return scores, scores.detach()


def _take_first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]
