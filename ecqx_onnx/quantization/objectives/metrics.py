"""Metrics by name: what a training is judged by, one number a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ecqx_onnx.errors import DataError
from ecqx_onnx.quantization.objectives.losses import IGNORED, split_into_masks
from ecqx_onnx.quantization.objectives.values import (
    align,
    find_scores,
    list_tensors,
    move_classes_second,
)


@dataclass(frozen=True)
class Metric:
    """A number that says how good outputs are.

    Attributes:
        name: as options and tables show it.
        measure: (output, reference) -> one number a sample, [N].
        higher_is_better: whether more of it is better.
        against_float: whether the reference is the float network's output; else the targets.
    """

    name: str
    measure: Callable[[Any, Any], Tensor]
    higher_is_better: bool = True
    against_float: bool = False


def measure_accuracy(output: Any, target: Tensor) -> Tensor:
    """Measure the share of right classes in each sample.

    Args:
        output: class scores [N, C, ...] or [N, ..., C].
        target: classes [N, ...]; -100 is left out; or shares of the classes [N, C].

    Returns:
        [N], in [0, 1]: 0 or 1 where a sample has one class.
    """
    scores = find_scores(output)
    if target.is_floating_point():
        target = target.argmax(1)
    scores = move_classes_second(scores, target)
    counted = (target != IGNORED).reshape(len(target), -1)
    right = (scores.argmax(1) == target).reshape(len(target), -1) & counted
    return right.sum(1) / counted.sum(1).clamp(min=1)


def measure_label_accuracy(output: Any, target: Tensor) -> Tensor:
    """Measure the share of labels that are told right, yes above a logit of zero.

    Args:
        output: logits.
        target: 0 or 1 for each.

    Returns:
        [N], in [0, 1].
    """
    scores, wanted = align(find_scores(output), target)
    right = (scores > 0) == (wanted > 0.5)
    return right.reshape(len(right), -1).float().mean(1)


def measure_mse(output: Any, target: Tensor) -> Tensor:
    """Measure the mean squared error of each sample.

    Args:
        output: values.
        target: as many values.

    Returns:
        [N].
    """
    scores, wanted = align(find_scores(output), target)
    return (scores - wanted).pow(2).reshape(len(scores), -1).mean(1)


def measure_l1(output: Any, target: Tensor) -> Tensor:
    """Measure the mean absolute error of each sample.

    Args:
        output: values.
        target: as many values.

    Returns:
        [N].
    """
    scores, wanted = align(find_scores(output), target)
    return (scores - wanted).abs().reshape(len(scores), -1).mean(1)


def measure_dice(output: Any, target: Tensor) -> Tensor:
    """Measure the Dice coefficient of the masks that are found, 2|A∩B| / (|A| + |B|).

    Args:
        output: logits of masks or of classes.
        target: masks or classes.

    Returns:
        [N], in [0, 1], the mean over classes; 1 where both masks are empty.
    """
    share, wanted = split_into_masks(find_scores(output), target)
    found = _choose_masks(share)
    both = (found * wanted).sum(-1)
    sizes = found.sum(-1) + wanted.sum(-1)
    return ((2 * both + 1e-9) / (sizes + 1e-9)).mean(1)


def measure_iou(output: Any, target: Tensor) -> Tensor:
    """Measure the intersection over union of the masks that are found.

    Args:
        output: logits of masks or of classes.
        target: masks or classes.

    Returns:
        [N], in [0, 1], the mean over the classes that are there or are found.
    """
    share, wanted = split_into_masks(find_scores(output), target)
    found = _choose_masks(share)
    both = (found * wanted).sum(-1)
    union = found.sum(-1) + wanted.sum(-1) - both
    there = union > 0
    return (both / union.clamp(min=1)).sum(1) / there.sum(1).clamp(min=1)


def _choose_masks(share: Tensor) -> Tensor:
    """0 or 1 for each class and position, of shares [N, classes, positions]."""
    if share.shape[1] == 1:
        return (share > 0.5).float()
    return F.one_hot(share.argmax(1), share.shape[1]).movedim(-1, 1).float()


def measure_agreement(output: Any, wanted: Any) -> Tensor:
    """Tell whether the highest score is the float network's, too.

    Args:
        output: class scores [N, C, ...].
        wanted: the float network's.

    Returns:
        [N], in [0, 1].

    Raises:
        DataError: if the output has no axis of classes.
    """
    scores = find_scores(output)
    if scores.ndim < 2:
        raise DataError(
            f"the model's output {tuple(scores.shape)} has no axis of classes: choose --metric"
            " cosine or error"
        )
    same = scores.argmax(1) == find_scores(wanted).argmax(1)
    return same.reshape(len(same), -1).float().mean(1)


def measure_cosine(output: Any, wanted: Any) -> Tensor:
    """Measure the cosine between the outputs and the float network's.

    Args:
        output: of the trained network.
        wanted: of the float network.

    Returns:
        [N], of the output where it is smallest in the mean.
    """
    named = list_tensors(wanted)
    found = []
    for name, tensor in list_tensors(output).items():
        aim = named[name].to(tensor.dtype)
        found.append(F.cosine_similarity(tensor.flatten(1), aim.flatten(1)))
    return min(found, key=lambda cosines: float(cosines.mean()))


def measure_error(output: Any, wanted: Any) -> Tensor:
    """Measure ||y - y'|| / ||y|| of each sample, y being the float network's output.

    Args:
        output: of the trained network.
        wanted: of the float network.

    Returns:
        [N], of the output where it is largest in the mean.
    """
    named = list_tensors(wanted)
    found = []
    for name, tensor in list_tensors(output).items():
        aim = named[name].to(tensor.dtype).flatten(1)
        found.append((tensor.flatten(1) - aim).norm(dim=1) / aim.norm(dim=1).clamp(min=1e-30))
    return max(found, key=lambda errors: float(errors.mean()))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", measure_accuracy),
        Metric("label_accuracy", measure_label_accuracy),
        Metric("mse", measure_mse, higher_is_better=False),
        Metric("l1", measure_l1, higher_is_better=False),
        Metric("dice", measure_dice),
        Metric("iou", measure_iou),
        Metric("agreement", measure_agreement, against_float=True),
        Metric("cosine", measure_cosine, against_float=True),
        Metric("error", measure_error, higher_is_better=False, against_float=True),
    )
}
