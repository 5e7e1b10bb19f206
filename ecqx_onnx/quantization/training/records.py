"""What a training takes and tells: its data, its progress, its epochs and its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ecqx_onnx.quantization.objectives.objective import Score
from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.tensors import QuantTensor


class TrainingSplit(Protocol):
    """What `train` needs of a split: see ecqx_onnx.data."""

    def __len__(self) -> int: ...
    def batches(self, batch_size: int, **options: Any) -> Iterator[tuple[Any, Any]]:
        """Yield the samples batch by batch.

        Args:
            batch_size: samples a batch, the last may have fewer.
            options: of shuffling and augmentation.

        Returns:
            An iterator of (inputs, targets): an array [N, ...], or a tuple or dict of them, as the
            model takes them; targets likewise, or None.
        """
        ...

    def divide(self, fraction: float, *, seed: int = 0) -> tuple[Any, Any]:
        """Divide the samples at random.

        Args:
            fraction: the second part's share, in (0, 1).
            seed: of the draw.

        Returns:
            Two splits that share no sample.
        """
        ...


@dataclass(frozen=True, eq=False)
class StartPoint:
    """Where a training begins that goes on from a quantized network.

    Attributes:
        tensors: levels and steps of its weights.
        state: the other entries of its state dict, such as corrected biases.
    """

    tensors: tuple[QuantTensor, ...]
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        epoch: from 1.
        epochs: of the whole training.
        step: of the epoch, from 1.
        steps: of an epoch.
        loss: mean over the epoch so far.
        accuracy: the metric's mean over the epoch so far: for classifiers the share that is right.
        zeros: share of zeros.
        bits_per_weight: entropy of the levels.
        metric: name of the metric.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    zeros: float
    bits_per_weight: float
    metric: str = "accuracy"


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch.

    Attributes:
        epoch: from 1.
        loss: mean over the training samples.
        accuracy: the metric's mean over them: for classifiers the share that is right.
        validation_accuracy: the metric's mean over the validation split; None without one.
        zeros: share of zeros.
        bits_per_weight: entropy of the levels.
        metric: name of the metric.
    """

    epoch: int
    loss: float
    accuracy: float
    validation_accuracy: float | None
    zeros: float
    bits_per_weight: float
    metric: str = "accuracy"


@dataclass(frozen=True, eq=False)
class Training:
    """The outcome of a training.

    Attributes:
        quantizer: attached to the trained model.
        history: one record an epoch.
        best_epoch: the one whose weights the model holds now; 0 if only assigned.
        setup: the options of `train`.
        notes: what a user should know, one sentence each.
        evaluate: measures the metric on any split, with the weights that the model holds then.
    """

    quantizer: Quantizer
    history: tuple[EpochRecord, ...]
    best_epoch: int
    setup: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    evaluate: Callable[[Any], Score] | None = None
