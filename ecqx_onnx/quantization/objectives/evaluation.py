"""Measures a metric of a network on a split, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ecqx_onnx.quantization.objectives.objective import Objective, Score
from ecqx_onnx.quantization.objectives.values import call_model, count_samples, run_float


def move_to(value: Any, device: torch.device) -> Any:
    """Bring a batch to a device.

    Args:
        value: an array or a tensor, or mappings, tuples and lists of them; other values stay.
        device: where to.

    Returns:
        The same structure, with tensors.
    """
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value).to(device)
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: move_to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(move_to(item, device) for item in value)
    return value


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Any,
    objective: Objective,
    *,
    teacher: nn.Module | None = None,
    batch_size: int = 64,
) -> Score:
    """Measure a metric on a split.

    Args:
        model: it is put into evaluation mode.
        split: samples, with targets where the metric compares with them.
        objective: its metric is measured.
        teacher: the float network, for metrics that compare with it.
        batch_size: samples that run at once.

    Returns:
        The score.
    """
    model.eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    score: Score | None = None
    for batch in split.batches(batch_size):
        x, y = move_to(batch[0], device), move_to(batch[1], device)
        wanted = None
        if objective.metric.against_float and teacher is not None:
            wanted = run_float(teacher, x)
        found = objective.measure(call_model(model, x), y, wanted, count_samples(x))
        score = objective.add(score, found)
    assert score is not None  # a split has samples
    return score
