"""Quantization by training; a validation split chooses the best epoch, never the test set.

Adam on all parameters, levels assigned anew after each step. An epoch's order and dropout follow
from (seed, epoch) alone, so a run that is resumed from its state file continues bit for bit as if
it had not been interrupted.

Under torchrun (`torchrun --nproc-per-node=N -m ecqx_onnx quantize ...`) each process takes every
N-th sample of each batch; gradients and relevances are averaged and summed over the processes, so
the global batch is what one process would see.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ecqx_onnx.errors import DataError, FileError, ModelError, OptionError
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.options.training import Precision, Schedule, _Setup
from ecqx_onnx.quantization.distributed import (
    copy_from_first,
    count_processes,
    find_rank,
    open_process_group,
    sum_numbers,
)
from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.quantization.state_file import StateFile

ENTROPY_EVERY = 20  # steps between two looks at the bits per weight, for the progress only


class TrainingSplit(Protocol):
    """What `train` needs of a split: see ecqx_onnx.data."""

    def __len__(self) -> int: ...
    def batches(self, batch_size: int, **options: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the samples batch by batch.

        Args:
            batch_size: samples a batch, the last may have fewer.
            options: of shuffling and augmentation.

        Returns:
            An iterator of (inputs [N, ...], labels [N]).
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


@dataclass(frozen=True)
class Progress:
    """Where a training stands: epoch from 1, step of steps in it, running loss and accuracy, zeros,
    entropy of the levels."""

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
    """One finished epoch; accuracies in [0, 1]; validation_accuracy is None without a validation
    split."""

    epoch: int
    loss: float
    accuracy: float
    validation_accuracy: float | None
    zeros: float
    bits_per_weight: float


@dataclass(frozen=True, eq=False)
class Training:
    """The outcome. best_epoch: the one whose weights the model holds now; 0 if only assigned.
    setup: the options of `train`."""

    quantizer: Quantizer
    history: tuple[EpochRecord, ...]
    best_epoch: int
    setup: Mapping[str, Any]


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
    entropy_ramp: float = 0.0,
    relevance_until: float = 0.4,
    precision: Precision = "float32",
    augment: Any = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    state_file: str | Path | None = None,
    resume: bool = False,
    **options: Any,
) -> Training:
    """Quantize a model in place by training on dataset.train; its test split is not looked at.

    Args:
        model: its weights are left on their levels.
        dataset: its `train` is a TrainingSplit.
        epochs: 0 assigns levels without training, with relevances of up to 8 batches.
        batch_size: samples a step.
        learning_rate: Adam's, for weights and all else.
        schedule: of the learning rate.
        validation: share of the training samples that chooses the best epoch; 0 takes the last.
        distillation: share of the loss that follows the float model's outputs, in [0, 1].
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
        options: those of the Quantizer (bits, entropy_weight, relevance ...).

    Returns:
        The outcome, with the Quantizer attached to the model.

    Raises:
        OptionError: an option is unknown, or out of its range.
        DataError: the data do not fit the model.
        FileError: state_file is of another training, or cannot be read or written.
    """
    setup = _Setup(
        *(
            epochs,
            batch_size,
            learning_rate,
            schedule,
            validation,
            distillation,
            temperature,
            entropy_ramp,
            precision,
            seed,
        ),
        relevance_until=relevance_until,
    )
    split = dataset.train
    if split is None or len(split) == 0:
        raise DataError("the data set has no training samples")
    kept = None if state_file is None else StateFile(state_file)
    state = (
        None if kept is None else kept.load()
    )  # without `resume`, too: it is going to be replaced
    with open_process_group() as local:
        where = _choose_device(device, local)
        example = torch.from_numpy(next(iter(split.batches(2)))[0]).to(where)
        run = _Run(model.to(where), setup, options, where, augment, progress, example)
        if epochs == 0:
            if run.quantizer.activations is not None:
                raise OptionError(
                    "activations 'int8' are trained for, and 0 epochs train nothing: calibrate "
                    "when you convert"
                )
            run.assign_only(split)
            return Training(run.quantizer, (), 0, asdict(setup))
        rest, held_out = split.divide(validation, seed=seed) if validation else (split, None)
        if resume and state is not None:
            run.restore(state)
        while len(run.history) < epochs:
            run.epoch(rest, held_out)
            if kept is not None and find_rank() == 0:
                kept.save(run.state())
        return run.finish()


class _Run:
    """One training: the model, its quantizer and optimizer, and what it has seen so far."""

    def __init__(
        self,
        model: nn.Module,
        setup: _Setup,
        options: Mapping[str, Any],
        device: torch.device,
        augment: Any,
        progress: Callable[[Progress], None] | None,
        example: Tensor,
    ) -> None:
        copy_from_first((*model.parameters(), *model.buffers()))
        self.model, self.setup, self.device, self.augment, self.progress = (
            model,
            setup,
            device,
            augment,
            progress,
        )
        self.teacher = (
            copy.deepcopy(model).eval().requires_grad_(False) if setup.distillation else None
        )
        self.quantizer = Quantizer(model, example, **options)
        if setup.entropy_ramp:
            self.quantizer.entropy_scale = 0.0
            self.quantizer.assign()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=setup.learning_rate)
        # Averages the gradients over the processes; with one process the model itself.
        self.parallel = (
            nn.parallel.DistributedDataParallel(model)
            if count_processes() > 1 and setup.epochs
            else model
        )
        self.history: list[EpochRecord] = []
        self.best: dict[str, Any] | None = None

    def batches(
        self, split: TrainingSplit, epoch: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """On the device; shuffled by (seed, epoch), in order without an epoch."""
        options: dict[str, Any] = {}
        if epoch is not None:
            options = {"shuffle": np.random.default_rng([self.setup.seed, epoch])}
            if self.augment is not None:
                options["augment"] = self.augment
        for x, y in split.batches(self.setup.batch_size, **options):
            yield torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)

    def epoch(self, split: TrainingSplit, held_out: TrainingSplit | None) -> None:
        """Train one more epoch, score it on the validation split, remember it if it is the best."""
        epoch, setup = len(self.history) + 1, self.setup
        steps = math.ceil(len(split) / setup.batch_size)
        self.model.train()
        seen = correct = 0
        total = bits = 0.0
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(
                int(np.random.SeedSequence([setup.seed, epoch, find_rank()]).generate_state(1)[0])
            )
            for step, (x, y) in enumerate(self.batches(split, epoch)):
                if len(y) < count_processes():
                    continue  # a last batch with too few samples to go round
                done = (epoch - 1 + step / steps) / setup.epochs
                for group in self.optimizer.param_groups:
                    group["lr"] = setup.learning_rate * setup.rate_scale(done)
                # Steps come to rest with the weights: a Δ that still moves when they cannot follow
                # ruins the last epochs.
                self.quantizer.step_rate_scale = setup.rate_scale(done)
                self.quantizer.entropy_scale = setup.entropy_scale(done)
                self.quantizer.relevances_rest = done >= setup.relevance_until
                loss, hits, count = self.step(x, y)
                seen, correct, total = seen + count, correct + hits, total + loss * count
                if not math.isfinite(total):
                    raise ModelError(
                        f"the loss is {total} in epoch {epoch}, step {step + 1}: lower the "
                        "learning rate"
                    )
                if self.progress is not None and find_rank() == 0:
                    bits = self.quantizer.bits_per_weight if step % ENTROPY_EVERY == 0 else bits
                    zeros = self.quantizer.zeros
                    self.progress(
                        Progress(
                            epoch,
                            setup.epochs,
                            step + 1,
                            steps,
                            total / seen,
                            correct / seen,
                            zeros,
                            bits,
                        )
                    )
        copy_from_first(
            self.model.buffers()
        )  # BatchNorm's statistics are each process's own, as are ranges
        if self.quantizer.activations is not None:
            copy_from_first(self.quantizer.activations.ranges.values())
        seen_by_all, correct_by_all, total_by_all = sum_numbers([seen, correct, total], self.device)
        score = self.accuracy(held_out) if held_out is not None else None
        loss, accuracy = total_by_all / seen_by_all, correct_by_all / seen_by_all
        self.history.append(
            EpochRecord(
                epoch, loss, accuracy, score, self.quantizer.zeros, self.quantizer.bits_per_weight
            )
        )
        if not setup.counts(epoch):
            return
        if (
            self.best is None or score is None or score >= self.best["score"]
        ):  # a tie goes to the later, longer trained epoch
            model = {
                name: value.detach().clone() for name, value in self.model.state_dict().items()
            }
            self.best = {
                "epoch": epoch,
                "score": score,
                "model": model,
                "quantizer": self.quantizer.state_dict(),
            }

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int, int]:
        """(mean loss, correct ones, samples) of this process's share of the batch."""
        share = count_processes() / len(y)
        x, y = x[find_rank() :: count_processes()], y[find_rank() :: count_processes()]
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.setup.precision == "bfloat16"
        ):
            output = self.parallel(x)
            loss = _compute_loss(output, y)
            if self.teacher is not None:
                wanted = _compute_divergence(output, self.teacher, x, self.setup.temperature)
                loss = (1 - self.setup.distillation) * loss + self.setup.distillation * wanted
        # Shares may differ by one sample: weighted so that the mean over processes is the mean over
        # the batch.
        (loss * (len(y) * share)).backward() if count_processes() > 1 else loss.backward()
        self.optimizer.step()
        self.quantizer.step(x, y)
        return float(loss.detach()), int((output.argmax(1) == y).sum()), len(y)

    @torch.no_grad()
    def accuracy(self, split: TrainingSplit) -> float:
        self.model.eval()
        return sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.batches(split)) / len(
            split
        )

    def assign_only(self, split: TrainingSplit, *, batches: int = 8) -> None:
        self.model.eval()
        for _, (x, y) in zip(range(batches), self.batches(split, epoch=0), strict=False):
            self.quantizer.observe(x, y)
        self.quantizer.assign()

    def finish(self) -> Training:
        """Back to the best epoch."""
        assert self.best is not None  # at least one epoch has run
        self.model.load_state_dict(self.best["model"])
        self.quantizer.load_state_dict(self.best["quantizer"])
        self.model.eval()
        return Training(self.quantizer, tuple(self.history), self.best["epoch"], asdict(self.setup))

    def described(self) -> dict[str, Any]:
        return {**asdict(self.setup), "recipe": self.quantizer.recipe()}

    def state(self) -> dict[str, Any]:
        return {
            "setup": self.described(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "quantizer": self.quantizer.state_dict(),
            "history": [asdict(record) for record in self.history],
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        setup = state["setup"]
        if not isinstance(setup, Mapping):
            raise FileError(
                "the training state is damaged, its setup is no table: delete it to start anew"
            )
        for key, value in self.described().items():
            then = setup.get(key, getattr(_Setup, key, None))
            if key == "recipe" and isinstance(
                then, Mapping
            ):  # an option that is newer than the state had its default
                then = {**Recipe().to_json(), **then}
            if then != value:
                raise OptionError(
                    f"the run to resume had {key} {then}, this one has {value}: give the same, or "
                    "start anew"
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.quantizer.load_state_dict(state["quantizer"])
            self.history, self.best = (
                [EpochRecord(**record) for record in state["history"]],
                state["best"],
            )
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileError(
                f"the training state does not fit this training ({reason}): delete it to start anew"
            ) from error


def _choose_device(wanted: str | torch.device | None, local: int) -> torch.device:
    """The device to train on; OptionError if it cannot be had."""
    if wanted is None:
        return torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device '{wanted}' cannot be used ({reason}): use cpu, or cuda where there is one"
        ) from error
    return device


def emulates_bfloat16(device: str | torch.device | None) -> bool:
    """Tell whether products in bfloat16 take longer than in float32, for want of instructions.

    Args:
        device: as `train` takes it.

    Returns:
        True for processors that emulate them: ten times slower with AVX2 alone.
    """
    if _choose_device(device, 0).type != "cpu":
        return False
    return not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _compute_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy. DataError if the targets do not fit the output."""
    try:
        return F.cross_entropy(output, target)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise DataError(
            f"targets of {target.dtype} {tuple(target.shape)} do not fit the model's output "
            f"{shape} "
            f"({str(error).splitlines()[0]}): training needs one class index per sample, and one "
            "output per class"
        ) from error


def _compute_divergence(
    output: Tensor, teacher: nn.Module, x: Tensor, temperature: float
) -> Tensor:
    """Hinton's distillation: T² · KL(teacher || student) at temperature T (arXiv 1503.02531)."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher(x) / temperature, dim=1)
    found = F.log_softmax(output / temperature, dim=1)
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2
