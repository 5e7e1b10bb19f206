"""(model, data set, recipe) -> the model quantised by training, best epoch by a validation split, never by the test set.

Adam on all parameters, levels assigned anew after each step. An epoch's order and dropout follow from (seed, epoch) alone, so a
run that is resumed from its state file continues bit for bit as if it had not been interrupted.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ecqx_onnx.errors import DataError, FileError, ModelError, OptionError
from ecqx_onnx.quantization.quantizer import Quantizer

Schedule = Literal["cosine", "constant"]
ENTROPY_EVERY = 20  # steps between two looks at the bits per weight, for the progress only


class TrainingSplit(Protocol):
    """What `train` needs of a split: see ecqx_onnx.data."""

    def __len__(self) -> int: ...
    def batches(self, batch_size: int, **options: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...
    def divide(self, fraction: float, *, seed: int = 0) -> tuple[Any, Any]: ...


@dataclass(frozen=True)
class Progress:
    """Where a training stands: epoch from 1, step of steps in it, running loss and accuracy, zeros, entropy of the levels."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    zeros: float
    bits_per_weight: float


@dataclass(frozen=True)
class EpochRecord:
    """One finished epoch; accuracies in [0, 1]; validation_accuracy is None without a validation split."""

    epoch: int
    loss: float
    accuracy: float
    validation_accuracy: float | None
    zeros: float
    bits_per_weight: float


@dataclass(frozen=True, eq=False)
class Training:
    """The outcome. best_epoch: the one whose weights the model holds now; 0 if only assigned."""

    quantizer: Quantizer
    history: tuple[EpochRecord, ...]
    best_epoch: int


def train(
    model: nn.Module,
    dataset: Any,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    schedule: Schedule = "cosine",
    validation: float = 0.1,
    distillation: float = 0.0,
    temperature: float = 2.0,
    augment: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    state_file: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Training:
    """Quantise `model` in place by training on dataset.train. Its test split is not looked at.

    options: those of the Quantizer (bits, entropy_weight, relevance ...). validation: share of the training samples that chooses
    the best epoch, 0 to take the last. distillation: share of the loss that follows the float model's outputs. epochs=0 assigns
    levels without training, with relevances of up to 8 batches. state_file: written after each epoch; resume: go on from it.
    """
    if epochs < 0 or batch_size < 1 or not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise OptionError(f"epochs {epochs}, batch size {batch_size}, learning rate {learning_rate}: need >= 0, >= 1, >= 0")
    if not 0 <= validation < 1 or not 0 <= distillation <= 1:
        raise OptionError(f"validation {validation} and distillation {distillation} are shares: below 1, up to 1")
    split = dataset.train
    if split is None or len(split) == 0:
        raise DataError("the data set has no training samples")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device)
    run = _Run(model, batch_size, device, seed, augment)
    rest, held_out = split.divide(validation, seed=seed) if validation and epochs else (split, None)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if distillation else None
    quantizer = Quantizer(model, **options)
    if epochs == 0:
        run.assign_only(quantizer, split)
        return Training(quantizer, (), 0)

    steps = math.ceil(len(rest) / batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    history: list[EpochRecord] = []
    best: dict[str, Any] | None = None
    if resume and state_file is not None and Path(state_file).exists():
        state = _read_state(state_file)
        run.check_same(state, epochs, learning_rate, schedule, quantizer)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        quantizer.load_state_dict(state["quantizer"])
        history, best = [EpochRecord(**record) for record in state["history"]], state["best"]

    for epoch in range(len(history) + 1, epochs + 1):
        loss, accuracy = run.epoch(
            quantizer,
            optimizer,
            rest,
            epoch,
            epochs,
            steps,
            schedule,
            learning_rate,
            teacher,
            distillation,
            temperature,
            progress,
        )
        score = run.accuracy(held_out) if held_out is not None else None
        history.append(EpochRecord(epoch, loss, accuracy, score, quantizer.zeros, quantizer.bits_per_weight))
        if best is None or score is None or score >= best["score"]:  # a tie goes to the later, longer trained epoch
            best = {"epoch": epoch, "score": score, "model": _copied(model.state_dict()), "quantizer": quantizer.state_dict()}
        if state_file is not None:
            state = {
                "setup": run.setup(epochs, learning_rate, schedule, quantizer),
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "quantizer": quantizer.state_dict(),
                "history": [asdict(record) for record in history],
                "best": best,
            }
            _write_state(state, state_file)
    assert best is not None
    model.load_state_dict(best["model"])
    quantizer.load_state_dict(best["quantizer"])
    model.eval()
    return Training(quantizer, tuple(history), best["epoch"])


class _Run:
    """What stays the same throughout one training."""

    def __init__(self, model: nn.Module, batch_size: int, device: torch.device, seed: int, augment: Any) -> None:
        self.model, self.batch_size, self.device, self.seed, self.augment = model, batch_size, device, seed, augment

    def batches(self, split: TrainingSplit, epoch: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device; shuffled by (seed, epoch), in order without an epoch."""
        options: dict[str, Any] = {}
        if epoch is not None:
            options = {"shuffle": np.random.default_rng([self.seed, epoch])}
            if self.augment is not None:
                options["augment"] = self.augment
        for x, y in split.batches(self.batch_size, **options):
            yield torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)

    def epoch(
        self,
        quantizer: Quantizer,
        optimizer: torch.optim.Optimizer,
        split: TrainingSplit,
        epoch: int,
        epochs: int,
        steps: int,
        schedule: Schedule,
        learning_rate: float,
        teacher: nn.Module | None,
        distillation: float,
        temperature: float,
        progress: Callable[[Progress], None] | None,
    ) -> tuple[float, float]:
        """(mean loss, accuracy) over the epoch's training batches."""
        self.model.train()
        seen = correct = 0
        total = bits = 0.0
        forked = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=forked):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]))
            for step, (x, y) in enumerate(self.batches(split, epoch)):
                done = (epoch - 1 + step / steps) / epochs
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * ((1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1.0)
                optimizer.zero_grad(set_to_none=True)
                output = self.model(x)
                loss = F.cross_entropy(output, y)
                if teacher is not None:
                    loss = (1 - distillation) * loss + distillation * _divergence(output, teacher, x, temperature)
                loss.backward()
                optimizer.step()
                quantizer.step(x, y)
                seen, correct = seen + len(y), correct + int((output.argmax(1) == y).sum())
                total += float(loss.detach()) * len(y)
                if not math.isfinite(total):
                    raise ModelError(f"the loss is {total} in epoch {epoch}, step {step + 1}: lower the learning rate")
                if progress is not None:
                    bits = quantizer.bits_per_weight if step % ENTROPY_EVERY == 0 else bits
                    progress(Progress(epoch, epochs, step + 1, steps, total / seen, correct / seen, quantizer.zeros, bits))
        return total / seen, correct / seen

    @torch.no_grad()
    def accuracy(self, split: TrainingSplit) -> float:
        self.model.eval()
        return sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.batches(split)) / len(split)

    def assign_only(self, quantizer: Quantizer, split: TrainingSplit, *, batches: int = 8) -> None:
        self.model.eval()
        for _, (x, y) in zip(range(batches), self.batches(split, epoch=0), strict=False):
            quantizer.observe(x, y)
        quantizer.assign()

    def setup(self, epochs: int, learning_rate: float, schedule: str, quantizer: Quantizer) -> dict[str, Any]:
        return {
            "epochs": epochs,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "recipe": quantizer.recipe(),
        }

    def check_same(self, state: Mapping[str, Any], epochs: int, rate: float, schedule: str, quantizer: Quantizer) -> None:
        now, then = self.setup(epochs, rate, schedule, quantizer), state["setup"]
        for key, value in now.items():
            if then.get(key) != value:
                raise OptionError(
                    f"the run to resume had {key} {then.get(key)}, this one has {value}: give the same, or start anew"
                )


def _divergence(output: Tensor, teacher: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """Hinton's distillation: T² · KL(teacher || student) at temperature T (arXiv 1503.02531)."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x) / temperature, dim=1)
    found = F.log_softmax(output / temperature, dim=1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _write_state(state: dict[str, Any], path: str | Path) -> None:
    """Whole or not at all: written beside it, then moved."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(state, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise FileError(f"cannot write the training state '{path}' ({error}): free some space or choose another place") from error


def _read_state(path: str | Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise FileError(f"cannot read the training state '{path}' ({error}): delete it to start anew") from error
    if not isinstance(state, dict) or not {"setup", "model", "optimizer", "quantizer", "history", "best"} <= set(state):
        raise FileError(f"'{path}' is no training state: delete it to start anew")
    return state
