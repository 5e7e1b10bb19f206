"""Quantization by training; a validation split chooses the best epoch, never the test set.

Adam on all parameters, levels assigned anew after each step. An epoch's order and dropout follow
from (seed, epoch) alone, so a run that is resumed from its state file continues bit for bit as if
it had not been interrupted.

Under torchrun (`torchrun --nproc-per-node=N -m ecqx_onnx quantize ...`) each process takes every
N-th sample of each batch; gradients and relevances are averaged and summed over the processes, so
the global batch is what one process would see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from ecqx_onnx.errors import DataError, OptionError
from ecqx_onnx.options.option import refuse_unknown_options
from ecqx_onnx.options.quantizer import (
    Activations,
    Gradient,
    Granularity,
    Levels,
    Recipe,
    StepRule,
)
from ecqx_onnx.options.training import DistillBy, Precision, Schedule, _Setup
from ecqx_onnx.quantization.distributed import find_rank, open_process_group
from ecqx_onnx.quantization.objectives.evaluation import move_to
from ecqx_onnx.quantization.objectives.objective import choose_objective, name_of
from ecqx_onnx.quantization.state_file import StateFile
from ecqx_onnx.quantization.training.budget import Budget
from ecqx_onnx.quantization.training.devices import choose_device
from ecqx_onnx.quantization.training.records import Progress, StartPoint, Training
from ecqx_onnx.quantization.training.run import TrainingRun


@refuse_unknown_options
def train(
    model: nn.Module,
    dataset: Any,
    *,
    loss: str | Callable[[Any, Any], Any] = "cross_entropy",
    metric: str | Callable[[Any, Any], Any] | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float | None = None,
    schedule: Schedule = "cosine",
    validation: float = 0.1,
    distillation: float = 0.0,
    distill_by: DistillBy = "auto",
    temperature: float = 2.0,
    entropy_ramp: float = 0.0,
    relevance_until: float = 0.4,
    precision: Precision = "float32",
    augment: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    state_file: str | Path | None = None,
    resume: bool = False,
    bits: int | Mapping[str, int] = 4,
    entropy_weight: float = 0.1,
    relevance: Any = "epsilon_plus_flat",
    start: Any = "logit",
    refresh_every: int = 8,
    relevance_memory: float = 0.9,
    relevance_samples: int | None = None,
    rho: float = 2.0,
    keep: float = 0.1,
    prune: float = 0.1,
    zero_floor: float = 0.5,
    size_exponent: float = 1.0,
    levels: Levels = "symmetric",
    step: StepRule | Literal["learned"] = "auto",
    step_rate: float = 1e-3,
    granularity: Granularity = "tensor",
    exclude: str | Sequence[str] = (),
    gradient: Gradient = "plain",
    activations: Activations = "float32",
    budget: Budget | None = None,
    start_from: StartPoint | None = None,
) -> Training:
    """Quantize a model in place by training on dataset.train; its test split is not looked at.

    Args:
        model: its weights are left on their levels.
        dataset: its `train` is a TrainingSplit.
        loss: "cross_entropy", "bce", "mse", "l1", "dice", "distillation" (the float network's
            outputs alone), or a function of (what the model returns, targets).
        metric: what chooses the best epoch: "accuracy", "label_accuracy", "mse", "l1", "dice",
            "iou", "agreement", "cosine", "error", or a function (output, targets) that returns one
            number a sample, where more is better; by default the one that belongs to the loss.
        epochs: 0 assigns levels without training, with relevances of up to 8 batches.
        batch_size: samples a step.
        learning_rate: Adam's, for weights and all else; None for 1e-3, and 1e-4 with start_from.
        schedule: of the learning rate.
        validation: share of the training samples that chooses the best epoch; 0 takes the last.
        distillation: share of the loss that follows the float model's outputs, in [0, 1]; without
            targets it is 1.
        distill_by: how they are followed: "logits", "mse" or "cosine"; "auto" takes logits beside
            a cross entropy, else mse.
        temperature: of the distillation's softmax.
        entropy_ramp: share of the training over which γ rises from 0 to its value; an epoch before
            that is never the best.
        relevance_until: share of the training after which no new relevances are taken, so that the
            weights settle on their levels.
        precision: "bfloat16" runs the forward passes under torch.autocast, in about half the time
            for convolutions where the processor has it (`emulates_bfloat16`); weights and levels
            stay exact.
        augment: called with a batch of inputs and a random generator, while training only.
        device: where to train; by default CUDA where there is one.
        seed: of shuffling, splits and augmentation.
        progress: called with where the training stands.
        state_file: written after each epoch.
        resume: go on from state_file.
        bits: 2 to 8, for all weights or as {pattern of parameter names: bits}, where the last
            matching pattern wins and what none matches stays float.
        entropy_weight: γ in [0, 1], how dear a bit is against a squared error; 0 is the
            nearest level.  [ECQx, sec. 4]
        relevance: name of a zennit composite, a Composite, or None for plain ECQ.
        start: relevance at the output: "logit", "probability" or "ones" of the true class,
            "output" for each value of it, or a function (output, target) -> relevance.
        refresh_every: steps between two relevances, 1 or more.
        relevance_memory: share of the old in the moving average, in [0, 1).
        relevance_samples: take relevances on so many samples of a batch; None for all.
        rho: ρ of f(R) = ρ R^β, above 1.
        keep: by how much relevances may lower the share of zeros, in [0, 1].
        prune: by how much they may raise it, in [0, 1].
        zero_floor: P_0 is at least this, in [0, 1], so that zero is the cheapest symbol.
        size_exponent: λ = γ·δ^size_exponent·λ_max, in [0, 1]; 1 spares small tensors most.
        levels: "symmetric", 2^b - 1 of them, or "asymmetric", 2^b.
        step: how Δ is found: "auto", "percentile", "least_squares", or "learned" by gradient.
        step_rate: learning rate of log Δ where step="learned", above 0.
        granularity: one Δ per "tensor" or per output "channel".
        exclude: patterns of parameter names that stay float.
        gradient: "plain", or "absolute" for |kΔ| times the gradient.  [Thesis]
        activations: "float32", or "int8" to round them while training.
        budget: bytes that the result must keep to; γ is then driven by it, and the last epoch is
            kept.
        start_from: a quantized network of the same parameters to go on from, as `compress` found
            it; `model` is the float one, which distillation follows.

    Returns:
        The outcome, with the Quantizer attached to the model.

    Raises:
        OptionError: an option is unknown, or out of its range.
        DataError: the data do not fit the model.
        FileError: state_file is of another training, or cannot be read or written.

    Example:
        train(model, dataset, loss="mse", bits=3, relevance=None, epochs=5)
    """
    if learning_rate is None:
        # A compressed network is near its best: larger steps first lead away from there.
        learning_rate = 1e-3 if start_from is None else 1e-4
    setup = _Setup(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        validation=validation,
        distillation=distillation,
        temperature=temperature,
        entropy_ramp=entropy_ramp,
        precision=precision,
        seed=seed,
        relevance_until=relevance_until,
        loss=name_of(loss),
        metric=None if metric is None else name_of(metric),
        distill_by=distill_by,
        budget=None if budget is None else budget.shown,
    )
    recipe = Recipe(
        bits=bits,
        entropy_weight=entropy_weight,
        relevance=relevance,
        start=start,
        refresh_every=refresh_every,
        relevance_memory=relevance_memory,
        relevance_samples=relevance_samples,
        rho=rho,
        keep=keep,
        prune=prune,
        zero_floor=zero_floor,
        size_exponent=size_exponent,
        levels=levels,
        step=step,
        step_rate=step_rate,
        granularity=granularity,
        exclude=exclude,
        gradient=gradient,
        activations=activations,
    )
    if budget is not None and epochs == 0:
        raise OptionError(
            "a budget is kept by training, and 0 epochs train nothing: `ecqx-onnx compress` needs"
            " no training"
        )
    split = dataset.train
    if split is None or len(split) == 0:
        raise DataError("the data set has no training samples")
    objective = choose_objective(
        loss,
        metric,
        distillation=distillation,
        distill_by=distill_by,
        temperature=temperature,
        has_targets=getattr(split, "has_targets", True),
    )
    kept = None if state_file is None else StateFile(state_file)
    # Without `resume`, too: the file is going to be replaced.
    state = None if kept is None else kept.load()
    with open_process_group() as local:
        where = choose_device(device, local)
        example = move_to(next(iter(split.batches(2)))[0], where)
        run = TrainingRun(
            *(model.to(where), setup, objective, recipe, where, augment, progress, example),
            budget=budget if epochs else None,
            start_from=start_from,
        )
        if epochs == 0:
            if run.quantizer.activations is not None:
                raise OptionError(
                    "activations 'int8' are trained for, and 0 epochs train nothing: calibrate "
                    "when you convert"
                )
            run.assign_only(split)
            return Training(run.quantizer, (), 0, asdict(setup), tuple(run.notes), run.evaluate)
        rest, held_out = split.divide(validation, seed=seed) if validation else (split, None)
        if resume and state is not None:
            run.restore(state)
        while len(run.history) < epochs:
            run.train_epoch(rest, held_out)
            if kept is not None and find_rank() == 0:
                kept.save(run.state())
        return run.finish()
