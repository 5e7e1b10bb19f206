"""Count what a PyTorch model classifies right, and which class it takes for which."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ecqx_onnx.validation.outputs.metrics import Proportion
from ecqx_onnx.validation.outputs.plausibility import MOST_CLASSES, Confusion

if TYPE_CHECKING:
    import torch


def accuracy(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Proportion:
    """Count the samples that the model classifies right.

    Args:
        model: gives scores [N, C]; it is put into evaluation mode.
        split: samples and their classes, see `ecqx_onnx.data.Split`.
        batch_size: samples that run at once.

    Returns:
        Hits of the number of samples.
    """
    right = 0
    for scores, classes in _run_model(model, split, batch_size):
        right += int((scores.argmax(1).cpu().numpy() == classes).sum())
    return Proportion(right, len(split))


def confuse(model: torch.nn.Module, split: Any, *, batch_size: int = 256) -> Confusion | None:
    """Count which class of the split the model takes for which.

    Args:
        model: gives scores; it is put into evaluation mode.
        split: samples and their classes, see `ecqx_onnx.data.Split`.
        batch_size: samples that run at once.

    Returns:
        The counts; None where the scores are not [N, C], or for more classes than can be counted in
        pairs.
    """
    found: Confusion | None = None
    for scores, classes in _run_model(model, split, batch_size):
        if scores.ndim != 2 or scores.shape[1] > MOST_CLASSES:
            return None
        counted = Confusion.count(classes, scores.argmax(1).cpu().numpy(), scores.shape[1])
        found = counted if found is None else found + counted
    return found


def _run_model(
    model: torch.nn.Module, split: Any, batch_size: int
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """(outputs, classes) of each batch, in order; outputs lie where the model does."""
    import torch

    with contextlib.suppress(NotImplementedError):  # an exported program has no other mode
        model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for x, classes in split.batches(batch_size):
        with torch.no_grad():
            scores = model(torch.from_numpy(x).to(device))
        yield scores, classes
