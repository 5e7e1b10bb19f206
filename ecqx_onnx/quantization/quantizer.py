"""The Quantizer keeps the weights of any nn.Module on integer levels through a training loop.

    quantizer = Quantizer(model, bits=4, entropy_weight=0.1)
    ...
    loss.backward(); optimizer.step(); quantizer.step(x, y)

The module's own parameters hold the quantized values kΔ, so its forward, the gradients and every
optimizer see them; the quantizer holds the full-precision background weights W. The update that the
optimizer made at kΔ is carried over to W (straight-through), and W's levels are assigned anew.
[ECQx, sec. 4]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.options.option import refuse_unknown_options
from ecqx_onnx.options.quantizer import (
    Activations,
    Gradient,
    Granularity,
    Levels,
    Recipe,
    StepRule,
)
from ecqx_onnx.quantization.activations import ActivationRounding
from ecqx_onnx.quantization.computed_weights import ComputedWeight
from ecqx_onnx.quantization.distributed import assert_same_levels, sum_numbers, sum_over_processes
from ecqx_onnx.quantization.levels.assignment import Assignment, assign
from ecqx_onnx.quantization.levels.entropy import compute_size_factor
from ecqx_onnx.quantization.levels.grid import Grid, choose_grid, fit_step
from ecqx_onnx.quantization.levels.learned_step import StepOptimizer
from ecqx_onnx.quantization.parametrizations import Parametrized, find_parametrized
from ecqx_onnx.quantization.report import Report, TensorReport
from ecqx_onnx.quantization.selection import Candidate, find_candidates
from ecqx_onnx.tensors import QuantTensor, Scale

WITHIN_CELL = 0.49  # steps from a level, within which it is the nearest


@dataclass(eq=False)
class _Weight:
    """One quantised parameter and its background; everything has the parameter's shape except
    step.

    computed: for a weight that its module computes in every forward pass; `parameter` is then the
    tensor that takes its place there.
    """

    name: str
    parameter: Tensor
    grid: Grid
    axis: int | None
    background: Tensor
    step: Tensor
    levels: Tensor
    relevance: Tensor | None = None  # moving average of |r_w| / max |r_w|
    learner: StepOptimizer | None = None
    last: Assignment | None = None
    computed: ComputedWeight | None = None
    warnings: set[str] = field(default_factory=set)
    adopted: bool = False  # whether its step was found elsewhere, see Quantizer.adopt

    def quantized(self) -> Tensor:
        """kΔ in float32, exactly as QuantTensor.dequantize computes it."""
        return self.levels.float() * self.step

    def absorb(self) -> None:
        """W takes over what the optimizer did: W += (parameter - kΔ), or W = f(g, v) anew."""
        if self.computed is not None:
            self.background = self.computed.compute_background()
        else:
            self.background += self.parameter - self.quantized()

    def gradient_factor(self) -> Tensor:
        """|kΔ|, and 1 for k = 0: what gradient="absolute" multiplies the gradient with."""
        magnitude = self.quantized().abs_()
        return torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude)).to(
            self.parameter.dtype
        )


class Quantizer:
    """Keeps the weights of a model on integer levels through any training loop.

    The module's structure is not changed: its parameters hold kΔ, the quantizer holds W.

    Example:
        quantizer = Quantizer(model, bits=4, entropy_weight=0.1)
        for x, y in batches:
            optimizer.zero_grad()
            loss_function(model(x), y).backward()
            optimizer.step()
            quantizer.step(x, y)
        print(quantizer.report())
    """

    @refuse_unknown_options
    def __init__(
        self,
        model: nn.Module,
        example: Any = None,
        *,
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
    ) -> None:
        """Attach to a model and assign its weights' first levels.

        Args:
            model: its weights are float32 or float64 and finite; changed in place.
            example: one batch as the model takes it, or a tuple or mapping of its arguments: what
                the model multiplies is then found by tracing it, as `convert(bits=...)` does.
                Without it torch's layers are taken, and what the code of a module's own forward
                multiplies.
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

        Raises:
            UnknownOptionError: for an option that there is not; it is a TypeError as well.
            OptionError: for a value that does not fit.
            ModelError: nothing can be quantized, or a weight is not finite.
        """
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
        self._attach(model, example, recipe)

    @classmethod
    def from_recipe(cls, model: nn.Module, recipe: Recipe, example: Any = None) -> Quantizer:
        """Attach to a model with options that stand in one value.

        Args:
            model: as for the Quantizer itself; changed in place.
            recipe: all its options.
            example: as for the Quantizer itself.

        Returns:
            The quantizer, attached, with its first levels assigned.
        """
        quantizer = cls.__new__(cls)
        quantizer._attach(model, example, recipe)
        return quantizer

    def _attach(self, model: nn.Module, example: Any, recipe: Recipe) -> None:
        self.options = recipe
        self.model = model
        module = _unwrap_model(model)
        self._weights, self._left_float = _choose_weights(module, self.options, example)
        # A schedule may change these between steps: γ and step_rate are multiplied by them.
        self.entropy_scale, self.step_rate_scale = 1.0, 1.0
        self.relevances_rest = False  # True: step() takes no new ones, those it has decide on
        self._steps = 0
        self._attached = True
        self._largest = max(weight.background.numel() for weight in self._weights)
        self._relevances = None
        if self.options.relevance is not None:
            from ecqx_onnx.quantization.relevance.guard import (
                GuardedRelevances,
            )  # zennit is loaded only by those who use it

            names = [weight.name for weight in self._weights]
            self._relevances = GuardedRelevances(
                module, names, composite=self.options.relevance, start=self.options.start
            )
        self.activations: ActivationRounding | None = None
        if self.options.activations == "int8" and hasattr(model, "_orig_mod"):
            raise OptionError(
                "activations='int8' cannot look into a compiled model: "
                "give the Quantizer the model itself"
            )
        if (
            self.options.activations == "int8"
        ):  # behind the relevances, which look at float activations
            self.activations = ActivationRounding(
                module, {id(weight.parameter): weight.name for weight in self._weights}
            )
        self._hooks = []
        if self.options.gradient == "absolute":
            self._hooks = [
                weight.parameter.register_hook(
                    lambda gradient, weight=weight: (
                        gradient * weight.gradient_factor().to(gradient.device)
                    )
                )
                for weight in self._weights
                if weight.computed is None
            ]
        self.assign()

    def __repr__(self) -> str:
        mean_bits = f"{self.bits_per_weight:.2f} bits per weight"
        state = "" if self._attached else ", detached"
        return (
            f"Quantizer({type(_unwrap_model(self.model)).__name__}: {len(self._weights)} weights,"
            f" {100 * self.zeros:.1f} % zeros, {mean_bits}, {self._steps} steps{state})"
        )

    @torch.no_grad()
    def step(self, inputs: Any = None, target: Any = None) -> None:
        """After optimizer.step(): carry its update over to the background weights and assign the
        levels anew.

        Args:
            inputs: the model's input, or a tuple or mapping of its arguments; for the relevances,
                not needed for relevance=None.
            target: int64 [N], the classes of the batch, or what `start` takes.

        Raises:
            OptionError: relevances need the batch; or the quantizer is detached.
            ModelError: a weight became NaN or infinite.
            DataError: the first batch's targets do not fit the model's output.
        """
        self._absorb()
        for weight in self._weights:
            if weight.learner is not None:
                gradient = weight.parameter.grad
                if gradient is not None and self._hooks:
                    gradient = gradient / weight.gradient_factor()
                weight.learner.rate = self.options.step_rate * self.step_rate_scale
                weight.step = weight.learner.step(
                    weight.name,
                    gradient,
                    weight.background,
                    weight.levels,
                    weight.step,
                    weight.grid,
                )
        refresh = self._steps % self.options.refresh_every == 0
        if self._relevances is not None and refresh and not self.relevances_rest:
            if inputs is None:
                raise OptionError(
                    "quantizer.step() needs the batch, step(x, y), to take relevances; "
                    "or use relevance=None"
                )
            self.observe(*_take_first((inputs, target), self.options.relevance_samples))
        self._steps += 1
        self.assign()
        if refresh:
            assert_same_levels([weight.levels for weight in self._weights])

    def observe(self, inputs: Any, target: Any = None) -> None:
        """Take relevances on this batch into the moving average, without assigning.

        Where they cannot be taken, the weights fall back to plain ECQ and `report()` says why.

        Args:
            inputs: the model's input, or a tuple or mapping of its arguments.
            target: int64 [N], the classes of the batch, or what `start` takes.
        """
        if self._relevances is None:
            return
        found = self._relevances(
            inputs, target, {weight.name: weight.background for weight in self._weights}
        )
        self._agree_on_failure()
        found = sum_over_processes(found, self.background())
        magnitudes = {name: r.detach().abs_() for name, r in found.items()}
        largest = (
            torch.stack([magnitude.amax() for magnitude in magnitudes.values()]).tolist()
            if magnitudes
            else []
        )
        for (name, magnitude), peak in zip(magnitudes.items(), largest, strict=True):
            self._remember(name, magnitude, peak)
        failures = dict(self._relevances.failures)
        for weight in self._weights:
            if self._relevances.failure is not None:
                weight.relevance = None
            elif weight.name in failures:
                weight.relevance = None
                weight.warnings.add(f"{failures[weight.name]}: plain ECQ")
            elif self._relevances.left_out is not None:
                weight.warnings.add(f"a batch gave it no relevance: {self._relevances.left_out}")
            elif weight.name not in magnitudes:
                weight.warnings.add("no relevance reaches it: plain ECQ")

    def _agree_on_failure(self) -> None:
        """Relevances that failed in one process are given up in all: levels must stay the same."""
        assert self._relevances is not None
        failed = self._relevances.failure is not None
        anywhere = sum_numbers([float(failed)], self._weights[0].background.device)[0]
        if anywhere and not failed:
            self._relevances.give_up("they failed in another process")

    def _remember(self, name: str, magnitude: Tensor, peak: float) -> None:
        weight = next(weight for weight in self._weights if weight.name == name)
        if peak != peak or peak == float("inf"):
            weight.warnings.add(
                f"its relevance was {peak} on a batch, which was left out: the model's outputs or "
                "this batch are not finite, or a layer divides by zero"
            )
            return
        if peak == 0:
            weight.warnings.add("its relevance was zero throughout a batch, which was left out")
            return
        R = magnitude.div_(peak)  # R = |r| / max |r|
        memory = self.options.relevance_memory
        weight.relevance = (
            R
            if weight.relevance is None
            else weight.relevance.mul_(memory).add_(R, alpha=1 - memory)
        )

    @torch.no_grad()
    def assign(self) -> None:
        """Assign every weight's level from background and relevances, and write kΔ to the
        parameters."""
        self._check_attached()
        gamma, exponent = (
            self.entropy_scale * self.options.entropy_weight,
            self.options.size_exponent,
        )
        for weight in self._weights:
            factor = compute_size_factor(weight.background.numel(), self._largest) ** exponent
            weight.last = self._assign_one(weight, gamma, gamma * factor)
            weight.levels = weight.last.levels
            weight.parameter.copy_(weight.quantized())

    def _assign_one(self, weight: _Weight, gamma: float, strength: float) -> Assignment:
        R = weight.relevance
        relevance = None if R is None else R / R.amax()
        if weight.adopted:
            # Steps that were chosen for the least error at a rate already say what a weight's
            # error costs: a bit has one price in squared steps, the same in all weights.
            return assign(
                (weight.background / weight.step).contiguous(),
                torch.ones((), device=weight.step.device),
                weight.grid,
                price=gamma,
                relevance=relevance,
                band=self.options.band,
                rho=self.options.rho,
                zero_floor=0.0,
            )
        return assign(
            weight.background,
            weight.step,
            weight.grid,
            axis=weight.axis,
            strength=strength,
            relevance=relevance,
            band=self.options.band,
            rho=self.options.rho,
            zero_floor=self.options.zero_floor,
        )

    @torch.no_grad()
    def adopt(self, tensors: Sequence[QuantTensor]) -> None:
        """Begin with levels and steps that were found elsewhere, such as by `compress`.

        The grid of each weight reaches as far as its levels do. The background W stays, moved into
        the cell of its level where it lay outside: so the levels are those given, and a price of
        bits first moves the weights that lie nearest to another level.

        Args:
            tensors: one for each quantized weight, by name. Weights that have none go on as they
                are.

        Raises:
            ModelError: if one is of no weight of this model, or of another shape.
        """
        by_name = {weight.name: weight for weight in self._weights}
        for tensor in tensors:
            weight = by_name.get(tensor.name)
            if weight is None or tuple(weight.background.shape) != tensor.shape:
                shapes = {name: tuple(w.background.shape) for name, w in by_name.items()}
                raise ModelError(
                    f"'{tensor.name}' {tensor.shape} is no quantized weight of this model, which"
                    f" has {str(shapes)[:200]}: start from a checkpoint of the same network"
                )
            if not isinstance(tensor.meaning, Scale):
                raise ModelError(
                    f"the levels of '{tensor.name}' stand for a table of values, and a grid has one"
                    " step: start from a checkpoint with steps"
                )
            device = weight.background.device
            step = torch.from_numpy(np.array(tensor.meaning.step)).to(device)
            # A level beyond those that are taken would never be near.
            lowest = min(int(tensor.levels.min(initial=0)), 0)
            highest = max(int(tensor.levels.max(initial=0)), 1)
            bits = (highest - lowest).bit_length()
            weight.grid = Grid(bits, lowest, highest)
            weight.axis = None
            if step.numel() > 1:
                weight.axis = next(axis for axis, n in enumerate(step.shape) if n > 1)
            weight.step = step.reshape(()) if step.numel() == 1 else step
            levels = torch.from_numpy(tensor.levels.copy()).to(device).float()
            lowest_value = (levels - WITHIN_CELL) * weight.step
            highest_value = (levels + WITHIN_CELL) * weight.step
            weight.background = torch.clamp(
                weight.background.float(), lowest_value, highest_value
            ).to(weight.background.dtype)
            weight.learner = None
            weight.adopted = True
        self.assign()

    def _absorb(self) -> None:
        """W += (parameter - kΔ): the optimizer's update was computed at kΔ and is applied to W."""
        self._check_attached()
        for weight in self._weights:
            device = weight.parameter.device
            if weight.background.device != device:
                weight.background, weight.step, weight.levels = (
                    tensor.to(device) for tensor in (weight.background, weight.step, weight.levels)
                )
                weight.relevance = None if weight.relevance is None else weight.relevance.to(device)
                if weight.learner is not None:
                    weight.learner.to(device)
            weight.absorb()
        sums = torch.stack([weight.background.sum() for weight in self._weights])
        if not bool(sums.isfinite().all()):
            broken = next(
                w.name
                for w, total in zip(self._weights, sums.tolist(), strict=True)
                if total - total != 0
            )
            raise ModelError(
                f"the weights of '{broken}' became NaN or infinite: the training diverges, "
                "lower the learning rate"
            )

    def _check_attached(self) -> None:
        if not self._attached:
            raise OptionError("the quantizer is detached from its model: make a new one")

    # What it knows

    def tensors(self) -> tuple[QuantTensor, ...]:
        """Give the quantized weights.

        Returns:
            One for each, under its state-dict name (a tied one under its first); int8 levels and
            float32 step as arrays of their own.
        """
        return tuple(
            QuantTensor(
                weight.name,
                weight.levels.cpu().numpy().copy(),
                Scale(weight.step.cpu().numpy().copy()),
            )
            for weight in self._weights
        )

    def background(self) -> dict[str, Tensor]:
        """Give the full-precision weights W.

        Returns:
            Name -> W, in the parameter's shape and dtype; not copies.
        """
        return {weight.name: weight.background for weight in self._weights}

    def relevances(self) -> dict[str, Tensor]:
        """Give the relevances that decide at present.

        Returns:
            Name -> R in [0, 1], of the weight's shape, for the weights that have one.
        """
        return {
            weight.name: weight.relevance / weight.relevance.amax()
            for weight in self._weights
            if weight.relevance is not None
        }

    @property
    def zeros(self) -> float:
        """Share of zeros over all quantised weights."""
        assigned = [
            (weight.last.zeros, weight.levels.numel()) for weight in self._weights if weight.last
        ]
        return sum(zeros * size for zeros, size in assigned) / sum(size for _, size in assigned)

    @property
    def bits_per_weight(self) -> float:
        """Zero-order entropy of the levels over all quantised weights, in bits."""
        tensors = self.tensors()
        return sum(tensor.entropy * tensor.size for tensor in tensors) / sum(
            tensor.size for tensor in tensors
        )

    def recipe(self) -> dict[str, Any]:
        """Give the options as JSON has them.

        Returns:
            Option -> number, string, list or dict.
        """
        return self.options.to_json()

    def report(self) -> Report:
        """Tell what was quantized and how, with what did not go as asked.

        Returns:
            A value that `print` and notebooks show as a table.
        """
        rules = self._relevances.rules if self._relevances is not None else {}
        entries = []
        for weight, tensor in zip(self._weights, self.tensors(), strict=True):
            last = weight.last
            assert last is not None  # assigned at construction
            warnings = sorted(weight.warnings)
            if not last.in_band:
                warnings.append(
                    f"no exponent in [0, 1] meets the band: zeros {last.zeros:.3f}, "
                    f"plain ECQ {last.ecq_zeros:.3f}"
                )
            if weight.relevance is None:
                rule = "none (plain ECQ)"
            else:
                rule = rules.get(weight.name, "epsilon form of the operator it is used in")
            entries.append(
                TensorReport(
                    weight.name,
                    tensor.shape,
                    weight.grid.bits,
                    last.zeros,
                    last.ecq_zeros,
                    tensor.entropy,
                    last.beta,
                    rule,
                    tuple(warnings),
                )
            )
        approximated = self._relevances.approximated if self._relevances is not None else ()
        names = [name for name, _ in _unwrap_model(self.model).named_parameters()]
        names += [weight.name for weight in self._weights if weight.computed is not None]
        failures = self._relevances.failures if self._relevances is not None else ()
        computed = {entry.name for entry in find_parametrized(_unwrap_model(self.model))}
        parametrized = tuple(
            name
            for name, reason in self._left_float
            if name in computed and "excluded" not in reason
        )
        return Report(
            tuple(entries),
            self._left_float,
            approximated,
            self.options.unmatched(names),
            failures,
            parametrized,
        )

    # Leaving and coming back

    @torch.no_grad()
    def detach(self, *, restore: bool = False) -> nn.Module:
        """Let go of the model.

        Args:
            restore: give it the background weights W back; else it keeps the quantized values.

        Returns:
            The model.
        """
        for weight in self._weights if restore else ():
            if weight.computed is not None:
                weight.computed.let_go()
            else:
                weight.parameter.copy_(weight.background)
        for hook in self._hooks:
            hook.remove()
        if self.activations is not None:
            self.activations.detach()
        self._attached = False
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Collect all that a resumed run needs besides the model's and the optimizer's state.

        Returns:
            Tensors (copies), numbers, strings and dicts, for `load_state_dict`.
        """
        return {
            "steps": self._steps,
            "relevance_failure": None if self._relevances is None else self._relevances.failure,
            "entropy_scale": self.entropy_scale,
            "activations": {} if self.activations is None else self.activations.state(),
            "weights": {
                weight.name: {
                    "background": weight.background.clone(),
                    "step": weight.step.clone(),
                    "levels": weight.levels.clone(),
                    "relevance": None if weight.relevance is None else weight.relevance.clone(),
                    "learner": None if weight.learner is None else weight.learner.state(),
                }
                for weight in self._weights
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the model's parameters get its kΔ.

        Args:
            state: as `state_dict` gave it, for the same model and recipe.

        Raises:
            ModelError: the state belongs to another model or recipe.
        """
        if set(state["weights"]) != {weight.name for weight in self._weights}:
            raise ModelError(
                "the quantizer's state has other weights than this model: "
                "use the same model, bits and exclude"
            )
        self._steps, self.entropy_scale = (
            int(state["steps"]),
            float(state.get("entropy_scale", 1.0)),
        )
        if self._relevances is not None and state.get("relevance_failure"):
            self._relevances.give_up(str(state["relevance_failure"]))
        for weight in self._weights:
            saved, device = state["weights"][weight.name], weight.parameter.device
            if (
                saved["background"].shape != weight.background.shape
                or saved["step"].shape != weight.step.shape
            ):
                raise ModelError(
                    f"the quantizer's state of '{weight.name}' has another shape: "
                    "use the same model and recipe"
                )
            weight.background, weight.step, weight.levels = (
                saved[key].to(device).clone() for key in ("background", "step", "levels")
            )
            weight.relevance = (
                None if saved["relevance"] is None else saved["relevance"].to(device).clone()
            )
            if weight.learner is not None:
                weight.learner.load(saved["learner"], device)
        if self.activations is not None:
            self.activations.load(state.get("activations", {}), self._weights[0].parameter.device)
        self.assign()


def _take_first(value: Any, samples: int | None) -> Any:
    """The first samples of each tensor in a batch."""
    if samples is None:
        return value
    if isinstance(value, Tensor):
        return value[:samples]
    if isinstance(value, Mapping):
        return {key: _take_first(item, samples) for key, item in value.items()}
    return (
        type(value)(_take_first(item, samples) for item in value)
        if isinstance(value, (tuple, list))
        else value
    )


def _unwrap_model(model: nn.Module) -> nn.Module:
    """Take off the wrappers of torch.compile and DistributedDataParallel.

    Args:
        model: wrapped or not.

    Returns:
        The user's module, in which names are those of its own state dict.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _choose_weights(
    model: nn.Module, recipe: Recipe, example: Any
) -> tuple[list[_Weight], tuple[tuple[str, str], ...]]:
    """The weights to quantize, and (name, reason) of the parameters that stay float.

    A tied parameter is met once, first name first.
    """
    chosen: list[_Weight] = []
    left: list[tuple[str, str]] = []
    for candidate in find_candidates(model, example):
        reason = _find_reason_to_leave(candidate, recipe)
        if reason:
            left.append((candidate.name, reason))
        else:
            chosen.append(_make_weight(model, candidate, recipe))
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left[:3])
        raise ModelError(
            f"the model has no weight that can be quantised ({why or 'it has no parameters'})"
        )
    return chosen, tuple(left)


def _find_reason_to_leave(candidate: Candidate, recipe: Recipe) -> str | None:
    pattern = recipe.excluded_by(candidate.name)
    if pattern:
        return f"excluded by '{pattern}'"
    if candidate.reason is not None:
        return candidate.reason
    if candidate.computed is not None and recipe.activations == "int8":
        return candidate.computed.advice
    if recipe.bits_of(candidate.name) is None:
        return "no pattern in bits matches it"
    return None


def _make_weight(model: nn.Module, candidate: Candidate, recipe: Recipe) -> _Weight:
    name, parameter = candidate.name, candidate.value
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the weight '{name}' is {parameter.dtype}, which cannot hold kΔ exactly: "
            "keep the model in float32 (torch.autocast gives the speed of half precision), "
            "or exclude it"
        )
    if not bool(parameter.detach().isfinite().all()):
        raise ModelError(
            f"the weight '{name}' holds NaN or infinite values: train it again or repair it first"
        )
    bits = recipe.bits_of(name)
    assert bits is not None  # looked at before
    background = parameter.detach().clone()
    grid = choose_grid(background, bits, levels=recipe.levels)
    axis = candidate.axis if recipe.granularity == "channel" else None
    learned = recipe.step == "learned"
    step = fit_step(
        background, grid, axis=axis, rule="auto" if recipe.step == "learned" else recipe.step
    )
    levels = torch.zeros(background.shape, dtype=torch.int8, device=background.device)
    learner = StepOptimizer(step, recipe.step_rate) if learned else None
    weight = _Weight(name, parameter, grid, axis, background, step, levels, learner=learner)
    if candidate.computed is not None:
        _hold_computed(weight, model, candidate.computed, recipe)
    return weight


def _hold_computed(weight: _Weight, model: nn.Module, entry: Parametrized, recipe: Recipe) -> None:
    """The module goes on with kΔ in place of the weight that it computes."""
    computed = ComputedWeight(model, entry, absolute=recipe.gradient == "absolute")
    weight.computed, weight.parameter = computed, computed.on_levels.quantized
    if weight.learner is not None:
        weight.learner = None
        weight.warnings.add(f"{entry.kind} computes it, so its step is not learned: fitted once")
