"""Losses by name: what a training makes small, given a model's output and the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ecqx_onnx.errors import DataError
from ecqx_onnx.quantization.objectives.values import (
    align,
    find_scores,
    list_tensors,
    move_classes_second,
)

Loss = Callable[[Any, Any], Tensor]
"""(output, targets) -> a scalar tensor."""
IGNORED = -100  # the class index that torch's cross entropy leaves out, such as padding


def cross_entropy(output: Any, target: Any) -> Tensor:
    """Compute the cross entropy of class scores.

    Args:
        output: scores [N, C, ...] or [N, ..., C].
        target: class indices [N, ...], where -100 is left out; or shares of the classes, in the
            scores' shape.

    Returns:
        The mean over samples and positions, a scalar.

    Raises:
        DataError: if the targets do not fit the output.
    """
    scores = find_scores(output)
    wanted = _require_tensor(target)
    if wanted.is_floating_point():
        if wanted.shape == scores.shape and scores.ndim >= 2:
            return F.cross_entropy(scores, wanted)
        raise DataError(
            f"targets of {wanted.dtype} {tuple(wanted.shape)} do not fit the model's output"
            f" {tuple(scores.shape)}, since cross-entropy needs class indices: choose --loss mse,"
            " l1 or bce for values, or save classes as int64"
        )
    scores = move_classes_second(scores, wanted)
    _check_classes(wanted, scores.shape[1])
    return F.cross_entropy(scores, wanted.long(), ignore_index=IGNORED)


def bce(output: Any, target: Any) -> Tensor:
    """Compute the binary cross entropy of logits: each output is a yes or no of its own.

    Args:
        output: logits, any shape.
        target: 0 to 1 for each of them.

    Returns:
        The mean, a scalar.

    Raises:
        DataError: if the targets do not fit the output, or lie outside [0, 1].
    """
    scores, wanted = align(find_scores(output), _require_tensor(target))
    if wanted.numel() and not 0 <= float(wanted.min()) <= float(wanted.max()) <= 1:
        raise DataError(
            f"targets run from {float(wanted.min()):g} to {float(wanted.max()):g}, and bce needs"
            " values from 0 to 1: choose --loss mse for other values"
        )
    return F.binary_cross_entropy_with_logits(scores, wanted)


def mse(output: Any, target: Any) -> Tensor:
    """Compute the mean squared error.

    Args:
        output: values, any shape.
        target: as many values.

    Returns:
        The mean, a scalar.

    Raises:
        DataError: if the targets do not fit the output.
    """
    return F.mse_loss(*align(find_scores(output), _require_tensor(target)))


def l1(output: Any, target: Any) -> Tensor:
    """Compute the mean absolute error.

    Args:
        output: values, any shape.
        target: as many values.

    Returns:
        The mean, a scalar.

    Raises:
        DataError: if the targets do not fit the output.
    """
    return F.l1_loss(*align(find_scores(output), _require_tensor(target)))


def dice(output: Any, target: Any) -> Tensor:
    """Compute the soft Dice loss of a segmentation, 1 - 2|A∩B| / (|A| + |B|) (Milletari 2016).

    Args:
        output: logits [N, C, ...] of classes, or [N, 1, ...] and [N, ...] of one mask.
        target: class indices [N, ...]; or 0 and 1 in the output's shape.

    Returns:
        The mean over samples and classes, a scalar.

    Raises:
        DataError: if the targets do not fit the output.
    """
    share, wanted = split_into_masks(find_scores(output), _require_tensor(target))
    both = (share * wanted).sum(-1)
    sizes = share.sum(-1) + wanted.sum(-1)
    return 1 - ((2 * both + 1) / (sizes + 1)).mean()  # 1: an empty mask found empty is right


def split_into_masks(scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Write scores and targets of a segmentation as one mask a class.

    Args:
        scores: logits [N, C, ...], or of one mask.
        target: class indices [N, ...], or 0 and 1 for each score.

    Returns:
        (shares in [0, 1], 0 or 1), both [N, classes, positions].

    Raises:
        DataError: if the targets do not fit the scores.
    """
    is_several = scores.ndim >= 3 and scores.shape[1] > 1
    if is_several and target.shape == (scores.shape[0], *scores.shape[2:]):
        _check_classes(target, scores.shape[1])
        share = scores.softmax(1).flatten(2)
        seen = (target != IGNORED).flatten(1).unsqueeze(1)
        classes = target.long().clamp(min=0).flatten(1).unsqueeze(1)
        wanted = torch.zeros_like(share).scatter_(1, classes, 1.0)
        return share * seen, wanted * seen
    scores, wanted = align(scores, target)
    if scores.ndim < 2:
        scores, wanted = scores[:, None], wanted[:, None]
    masks = (len(scores), scores.shape[1] if is_several else 1, -1)
    return scores.sigmoid().reshape(masks), wanted.reshape(masks)


def follow(output: Any, wanted: Any, *, by: str, temperature: float = 2.0) -> Tensor:
    """Compute how far a network's outputs are from those of the float network: distillation.

    Args:
        output: of the network in training.
        wanted: of the float network.
        by: "logits", T² KL(float || trained) of softmaxes at temperature T, over axis 1 (Hinton
            et al. 2015, arXiv 1503.02531); "mse", the squared error as a share of the float
            outputs' mean square; or "cosine", one minus the cosine of each sample. The last two
            are averaged over all outputs.
        temperature: T.

    Returns:
        A scalar.
    """
    if by == "logits":
        log_wanted = F.log_softmax(find_scores(wanted).detach() / temperature, dim=1)
        log_found = F.log_softmax(find_scores(output) / temperature, dim=1)
        divergence = F.kl_div(log_found, log_wanted, reduction="batchmean", log_target=True)
        return divergence * temperature**2
    named = list_tensors(wanted)
    terms = []
    for name, tensor in list_tensors(output).items():
        aim = named[name].detach().to(tensor.dtype)
        if by == "cosine":
            terms.append(1 - F.cosine_similarity(tensor.flatten(1), aim.flatten(1)).mean())
        else:
            power = aim.pow(2).mean().clamp(min=torch.finfo(aim.dtype).tiny)
            terms.append(F.mse_loss(tensor, aim) / power)
    return torch.stack(terms).mean()


def _require_tensor(target: Any) -> Tensor:
    if isinstance(target, Tensor):
        return target
    if target is None:
        raise DataError(
            "the data have no targets: add them, or train on the float network's outputs with"
            " --loss distillation"
        )
    raise DataError(
        f"the targets are a {type(target).__name__}, which only a loss of your own can read: give"
        " --loss FILE.py:FUNCTION"
    )


def _check_classes(target: Tensor, classes: int) -> None:
    counted = target[target != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < classes:
        raise DataError(
            f"targets from {int(counted.min())} to {int(counted.max())} do not fit the model's"
            f" output of {classes} classes: number them from 0, or use a model with more outputs"
        )


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "l1": l1,
    "dice": dice,
}
