"""One training from its first step to its best epoch, and its state between two epochs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from ecqx_onnx.errors import FileError, ModelError, OptionError
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.options.training import _Setup
from ecqx_onnx.quantization.distributed import (
    copy_from_first,
    count_processes,
    find_rank,
    sum_numbers,
)
from ecqx_onnx.quantization.objectives.evaluation import evaluate, move_to
from ecqx_onnx.quantization.objectives.objective import Objective, Score
from ecqx_onnx.quantization.objectives.values import (
    call_model,
    count_samples,
    find_scores,
    map_tensors,
    run_float,
)
from ecqx_onnx.quantization.quantizer import Quantizer
from ecqx_onnx.quantization.training.budget import Budget, RateControl
from ecqx_onnx.quantization.training.records import (
    EpochRecord,
    Progress,
    StartPoint,
    Training,
    TrainingSplit,
)

ENTROPY_EVERY = 20  # steps between two looks at the bits per weight, for the progress only


class TrainingRun:
    """One training: the model, its quantizer and optimizer, and what it has seen so far."""

    def __init__(
        self,
        model: nn.Module,
        setup: _Setup,
        objective: Objective,
        recipe: Recipe,
        device: torch.device,
        augment: Any,
        progress: Callable[[Progress], None] | None,
        example: Any,
        *,
        budget: Budget | None = None,
        start_from: StartPoint | None = None,
    ) -> None:
        """Attach a quantizer and an optimizer to the model.

        Args:
            model: on its device.
            setup: the numbers of the training.
            objective: what is made small, and what it is judged by.
            recipe: the options of the Quantizer.
            device: of the model.
            augment: of the samples, or None.
            progress: called with where the training stands, or None.
            example: some inputs on the device, which show what the model multiplies.
            budget: what the result may take; None leaves γ as the options say.
            start_from: a quantized network to go on from; the model is the float one.

        Raises:
            OptionError: if the budget cannot be reached, or start_from is of other weights.
        """
        copy_from_first((*model.parameters(), *model.buffers()))
        self.model = model
        self.setup = setup
        self.objective = objective
        self.device = device
        self.augment = augment
        self.progress = progress
        self.notes: list[str] = []
        self.teacher: nn.Module | None = None
        if objective.needs_float:
            self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        recipe = self._choose_relevance(recipe, start_from)
        self.quantizer = Quantizer.from_recipe(model, recipe, example)
        if start_from is not None:
            self._begin_at(start_from)
        self.control: RateControl | None = None
        if budget is not None:
            self.control = RateControl(self.quantizer, budget)
            if start_from is None:
                self.notes += self.control.notes
        elif setup.entropy_ramp:
            self.quantizer.entropy_scale = 0.0
            self.quantizer.assign()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=setup.learning_rate)
        # Averages the gradients over the processes; with one process the model itself.
        self.parallel: nn.Module = model
        if count_processes() > 1 and setup.epochs:
            self.parallel = nn.parallel.DistributedDataParallel(model)
        self._bits_shown = 0.0
        self.history: list[EpochRecord] = []
        self.best: dict[str, Any] | None = None

    def _begin_at(self, start: StartPoint) -> None:
        """Levels, steps and other parameters of a quantized network; the teacher stays float."""
        own = self.model.state_dict()
        quantized = {tensor.name for tensor in start.tensors}
        for name, value in start.state.items():
            fits = name in own and own[name].shape == value.shape
            if fits and name not in quantized:
                own[name].copy_(value)
        self.quantizer.adopt(start.tensors)

    def _choose_relevance(self, recipe: Recipe, start: StartPoint | None) -> Recipe:
        """The Quantizer's recipe; relevances start at the outputs where there are no classes."""
        if start is not None and recipe.relevance is not None:
            # They would move zeros by up to the band at once, and undo what was found.
            self.notes.append(
                "no relevances are taken, since training goes on from levels whose zeros were"
                " weighed already"
            )
            return replace(recipe, relevance=None)
        has_classes = self.objective.loss_name == "cross_entropy"
        if has_classes or recipe.start != "logit" or recipe.relevance is None:
            return recipe
        self.notes.append(
            f"relevances start at the outputs themselves, since --loss {self.objective.loss_name}"
            " names no class"
        )
        return replace(recipe, start="output")

    def _read(self, split: TrainingSplit, epoch: int | None = None) -> Iterator[tuple[Any, Any]]:
        """On the device; shuffled by (seed, epoch), in order without an epoch."""
        options: dict[str, Any] = {}
        if epoch is not None:
            options = {"shuffle": np.random.default_rng([self.setup.seed, epoch])}
            if self.augment is not None:
                options["augment"] = self.augment
        for x, y in split.batches(self.setup.batch_size, **options):
            yield move_to(x, self.device), move_to(y, self.device)

    def train_epoch(self, split: TrainingSplit, held_out: TrainingSplit | None) -> None:
        """Train one more epoch, score it on the validation split, remember it if it is the best.

        Args:
            split: the samples to train on.
            held_out: those that choose the best epoch, or None.

        Raises:
            ModelError: if the loss is no number any more.
        """
        epoch = len(self.history) + 1
        seen = 0
        total = 0.0
        score: Score | None = None
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            entropy = np.random.SeedSequence([self.setup.seed, epoch, find_rank()])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            steps = math.ceil(len(split) / self.setup.batch_size)
            for step, (x, y) in enumerate(self._read(split, epoch)):
                if count_samples(x) < count_processes():
                    continue  # a last batch with too few samples to go round
                self._follow_schedules(step, (epoch - 1 + step / steps) / self.setup.epochs)
                loss, found = self._step(x, y)
                seen += found.samples
                total += loss * found.samples
                score = self.objective.add(score, found)
                if not math.isfinite(total):
                    raise ModelError(
                        f"the loss is {total} in epoch {epoch}, step {step + 1}: lower the "
                        "learning rate"
                    )
                self._tell(epoch, step, steps, total / seen, score)
        # BatchNorm's statistics are each process's own, as are ranges.
        copy_from_first(self.model.buffers())
        if self.quantizer.activations is not None:
            copy_from_first(self.quantizer.activations.ranges.values())
        trained = 0.0 if score is None else score.total
        seen_by_all, score_by_all, total_by_all = sum_numbers([seen, trained, total], self.device)
        validated = None if held_out is None else self.evaluate(held_out).value
        self.history.append(
            EpochRecord(
                epoch,
                total_by_all / seen_by_all,
                score_by_all / seen_by_all,
                validated,
                self.quantizer.zeros,
                self.quantizer.bits_per_weight,
                self.objective.metric.name,
            )
        )
        self._remember(epoch, validated)

    def _follow_schedules(self, step: int, done: float) -> None:
        """done: share of the training, in [0, 1)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.learning_rate * self.setup.rate_scale(done)
        # Steps come to rest with the weights: a Δ that still moves when they cannot follow ruins
        # the last epochs.
        self.quantizer.step_rate_scale = self.setup.rate_scale(done)
        if self.control is None:
            self.quantizer.entropy_scale = self.setup.entropy_scale(done)
        else:
            self.control.follow(step, done)
        self.quantizer.relevances_rest = done >= self.setup.relevance_until

    def _tell(self, epoch: int, step: int, steps: int, loss: float, score: Score) -> None:
        if self.progress is None or find_rank() != 0:
            return
        if step % ENTROPY_EVERY == 0:
            self._bits_shown = self.quantizer.bits_per_weight
        at = Progress(
            epoch,
            self.setup.epochs,
            step + 1,
            steps,
            loss,
            score.value,
            self.quantizer.zeros,
            self._bits_shown,
            score.metric,
        )
        self.progress(at)

    def _remember(self, epoch: int, validated: float | None) -> None:
        if not self.setup.counts(epoch):
            return
        if self.control is not None and epoch < self.setup.epochs:
            return  # only the last one keeps to the budget
        if self.best is not None and validated is not None:
            sign = 1 if self.objective.metric.higher_is_better else -1
            if sign * validated < sign * self.best["score"]:
                return  # a tie goes to the later, longer trained epoch
        kept = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.best = {
            "epoch": epoch,
            "score": validated,
            "model": kept,
            "quantizer": self.quantizer.state_dict(),
        }

    def _step(self, x: Any, y: Any) -> tuple[float, Score]:
        """(mean loss, metric) of this process's share of the batch."""
        processes = count_processes()
        share = processes / count_samples(x)
        if processes > 1:
            x = map_tensors(lambda tensor: tensor[find_rank() :: processes], x)
            y = map_tensors(lambda tensor: tensor[find_rank() :: processes], y)
        samples = count_samples(x)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.setup.precision == "bfloat16"
        ):
            output = call_model(self.parallel, x)
            wanted = None if self.teacher is None else run_float(self.teacher, x)
            loss = self.objective.compute_loss(output, y, wanted)
        # Shares may differ by one sample: weighted so that the mean over processes is the mean over
        # the batch.
        (loss * (samples * share)).backward() if processes > 1 else loss.backward()
        self.optimizer.step()
        self.quantizer.step(x, self._choose_target(y, wanted))
        return float(loss.detach()), self.objective.measure(output, y, wanted, samples)

    def _choose_target(self, y: Any, wanted: Any) -> Any:
        """What relevances start from: targets, else the classes that the float network tells."""
        if y is None and self.objective.by == "logits" and self.objective.loss is None:
            return find_scores(wanted).argmax(1)
        return y

    def evaluate(self, split: TrainingSplit) -> Score:
        """Measure the metric on a split.

        Args:
            split: any samples, with targets where the metric needs them.

        Returns:
            The score.
        """
        return evaluate(
            self.model,
            split,
            self.objective,
            teacher=self.teacher,
            batch_size=self.setup.batch_size,
        )

    def assign_only(self, split: TrainingSplit, *, batches: int = 8) -> None:
        """Assign levels without training, with the relevances of some batches.

        Args:
            split: the samples.
            batches: so many at most.
        """
        self.model.eval()
        for _, (x, y) in zip(range(batches), self._read(split, epoch=0), strict=False):
            wanted = None if self.teacher is None else run_float(self.teacher, x)
            self.quantizer.observe(x, self._choose_target(y, wanted))
        self.quantizer.assign()

    def finish(self) -> Training:
        """Go back to the best epoch.

        Returns:
            The outcome of the training.
        """
        assert self.best is not None  # at least one epoch has run
        self.model.load_state_dict(self.best["model"])
        self.quantizer.load_state_dict(self.best["quantizer"])
        if self.control is not None:
            size = self.control.finish()
            self.notes.append(self.control.describe(size))
        self.model.eval()
        return Training(
            self.quantizer,
            tuple(self.history),
            self.best["epoch"],
            asdict(self.setup),
            tuple(self.notes),
            self.evaluate,
        )

    def _describe(self) -> dict[str, Any]:
        return {**asdict(self.setup), "recipe": self.quantizer.recipe()}

    def state(self) -> dict[str, Any]:
        """Collect what a resumed run needs.

        Returns:
            Tensors, numbers, texts, lists and dicts.
        """
        return {
            "setup": self._describe(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "quantizer": self.quantizer.state_dict(),
            "history": [asdict(record) for record in self.history],
            "best": self.best,
            "budget": None if self.control is None else self.control.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: as `state` gave it.

        Raises:
            OptionError: if it is of a training with other options.
            FileError: if it is damaged, or of another model.
        """
        setup = state["setup"]
        if not isinstance(setup, Mapping):
            raise FileError(
                "the training state is damaged, its setup is no table: delete it to start anew"
            )
        for key, value in self._describe().items():
            then = setup.get(key, getattr(_Setup, key, None))
            if key == "recipe" and isinstance(then, Mapping):
                # An option that is newer than the state had its default.
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
            self.history = [EpochRecord(**record) for record in state["history"]]
            self.best = state["best"]
            if self.control is not None:
                self.control.restore(state["budget"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FileError(
                f"the training state does not fit this training ({reason}): delete it to start anew"
            ) from error
