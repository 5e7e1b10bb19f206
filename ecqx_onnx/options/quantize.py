"""The options of `quantize`: those of the levels (`Recipe`), of the training, and of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecqx_onnx.options import shared
from ecqx_onnx.options.option import option, required
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.options.training import DistillBy, Precision, Schedule


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Recipe):
    """A network, data to train it on, and how its weights come to lie on few levels."""

    factory: str = required("A function (or class) that returns the network.")
    data: str = required(
        "Training data: .npz, a folder per class, sklearn:digits, or FILE.py:FUNCTION. Without"
        " targets, training follows the float network's outputs."
    )
    out: str | Path = required("The checkpoint to write.")
    weights: str | Path | None = option(
        None, "The trained float state dict. Without it, training starts from scratch."
    )
    mean: Sequence[float] | None = option(
        None,
        "Normalisation: the mean that is subtracted from the input, one value or one per channel,"
        " with commas.",
    )
    std: Sequence[float] | None = option(
        None,
        "Normalisation: the standard deviation that the input is divided by, one value or one per"
        " channel, with commas.",
    )
    validation: float = option(
        0.1,
        "Share of the training samples that chooses the best epoch; 0 takes the last.",
        minimum=0.0,
    )
    augment: Any = option(
        None,
        "Augmentation of the training samples: crop_and_flip, shift_images, shift_audio or"
        " FILE.py:FUNCTION.",
    )
    relevance_until: float = option(
        0.4,
        "Share of the training after which no new relevances are taken, so that weights settle.",
    )
    loss: Any = option(
        "cross_entropy",
        "What training makes small: cross-entropy, bce (several yes or no), mse, l1, dice,"
        " distillation (the float network's outputs), or FILE.py:FUNCTION of (output, targets).",
    )
    metric: Any = option(
        None,
        "What chooses the best epoch: accuracy, label-accuracy, mse, l1, dice, iou, agreement,"
        " cosine, error, or FILE.py:FUNCTION of (output, targets); default: the loss's own.",
    )
    epochs: int = option(
        10,
        "Number of passes over the training samples; 0 assigns levels without training.",
        minimum=0,
    )
    learning_rate: float | None = option(
        None, "Adam's learning rate; default: 0.001, and 0.0001 with --from.", minimum=0.0
    )
    schedule: Schedule = option("cosine", "How the learning rate falls: cosine or constant.")
    batch_size: int = option(64, "Number of samples in a training step.", minimum=1)
    distillation: float = option(0.0, "Share of the loss that follows the float network's outputs.")
    distill_by: DistillBy = option(
        "auto",
        "How the float network's outputs are followed: logits, mse, cosine or auto (logits beside"
        " cross-entropy, else mse).",
    )
    temperature: float = option(2.0, "Softmax temperature of the distillation loss.")
    entropy_ramp: float = option(
        0.0, "Share of the training over which the entropy weight rises from 0."
    )
    precision: Precision = option(
        "float32", "Type of the forward passes: float32, or bfloat16, faster on some devices."
    )
    device: str | None = option(
        None, "Where training runs: cpu, cuda, cuda:1 ...; default: cuda where there is one."
    )
    max_bytes: int | str | None = option(
        None,
        "Most bytes of the .onnx file that convert makes: 40k, 1.5M; the entropy weight follows"
        " while training.",
    )
    bits_per_weight: float | None = option(
        None, "Most coded bits for each quantized weight, instead of --max-bytes.", minimum=0.01
    )
    start_from: str | Path | None = option(
        None,
        "Go on from a checkpoint of `compress --checkpoint`; --weights are the float network's.",
    )
    seed: int = option(0, "Seed of all random choices: same seed, same bytes.")
    strict: bool = option(True, shared.STRICT)
    resume: bool = option(False, "Go on where an interrupted run with the same OUT stopped.")
    force: bool = option(False, shared.FORCE)
