"""(any nn.Module) -> the same module with its weights on integer levels, kept there through any training loop.

    quantizer = Quantizer(model, bits=4, entropy_weight=0.1)
    ...
    loss.backward(); optimizer.step(); quantizer.step(x, y)

The module's own parameters hold the quantised values kΔ, so its forward, the gradients and every optimizer see them; the
quantizer holds the full-precision background weights W. The update that the optimizer made at kΔ is carried over to W
(straight-through), and W's levels are assigned anew.  [ECQx, sec. 4]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.options.quantizer import Recipe, make_recipe
from ecqx_onnx.quantization.activations import ActivationRounding
from ecqx_onnx.quantization.distributed import assert_same_levels, sum_numbers, sum_over_processes
from ecqx_onnx.quantization.levels.assignment import Assignment, assign
from ecqx_onnx.quantization.levels.entropy import compute_size_factor
from ecqx_onnx.quantization.levels.grid import Grid, choose_grid, fit_step
from ecqx_onnx.quantization.levels.learned_step import StepOptimizer
from ecqx_onnx.quantization.parametrizations import find_parametrized
from ecqx_onnx.tensors import QuantTensor, Scale

QUANTIZED: tuple[type[nn.Module], ...] = (
    *(
        nn.Linear,
        nn.Bilinear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    ),
    *(nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class TensorReport:
    """One quantised weight. zeros and ecq_zeros: share of zeros, with relevances and as plain ECQ would have it. entropy: bits
    per weight. beta: the exponent of f(R) last used. rule: where its relevance comes from. warnings: what did not go as asked."""

    name: str
    shape: tuple[int, ...]
    bits: int
    zeros: float
    ecq_zeros: float
    entropy: float
    beta: float | None
    rule: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was quantised and how. left_float: (parameter, why). approximated: operators that relevance crossed by gradient times
    input, having no rule of their own. unmatched: patterns of exclude and bits that no parameter's name matches.
    relevance_failures: (weight, why it has no relevance), or ("all weights", why): what failed falls back to plain ECQ.
    parametrized: of left_float, what is computed into another weight in each forward pass."""

    tensors: tuple[TensorReport, ...]
    left_float: tuple[tuple[str, str], ...]
    approximated: tuple[str, ...]
    unmatched: tuple[str, ...] = ()
    relevance_failures: tuple[tuple[str, str], ...] = ()
    parametrized: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        unused = tuple(f"{pattern} matches no parameter" for pattern in self.unmatched)
        quantized = {tensor.name for tensor in self.tensors}
        failed = tuple(
            f"no relevances, so plain ECQ for all weights: {why}"
            if what == "all weights"
            else f"{what}: {why}"
            for what, why in self.relevance_failures
            if what not in quantized
        )
        computed = {
            why: None for name, why in self.left_float if name in self.parametrized
        }  # one for g and v
        single = tuple(
            f"{tensor.name}: {warning}" for tensor in self.tensors for warning in tensor.warnings
        )
        return unused + failed + tuple(computed) + single


@dataclass(eq=False)
class _Weight:
    """One quantised parameter and its background; everything has the parameter's shape except step."""

    name: str
    parameter: nn.Parameter
    grid: Grid
    axis: int | None
    background: Tensor
    step: Tensor
    levels: Tensor
    relevance: Tensor | None = None  # moving average of |r_w| / max |r_w|
    learner: StepOptimizer | None = None
    last: Assignment | None = None
    warnings: set[str] = field(default_factory=set)

    def quantized(self) -> Tensor:
        """kΔ in float32, exactly as QuantTensor.dequantize computes it."""
        return self.levels.float() * self.step

    def gradient_factor(self) -> Tensor:
        """|kΔ|, and 1 for k = 0: what gradient="absolute" multiplies the gradient with."""
        magnitude = self.quantized().abs_()
        return torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude)).to(
            self.parameter.dtype
        )


class Quantizer:
    """Attaches to `model`; options: see Recipe. The module's structure is not changed.

    ModelError if nothing can be quantised or a weight is not finite; OptionError for options that do not fit.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        self.options = make_recipe(options)
        self.model = model
        module = unwrap_model(model)
        self._weights, self._left_float = _choose_weights(module, self.options)
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
                "activations='int8' cannot look into a compiled model: give the Quantizer the model itself"
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
            ]
        self.assign()

    @torch.no_grad()
    def step(self, inputs: Any = None, target: Any = None) -> None:
        """After optimizer.step(): carry its update over to the background weights and assign the levels anew.

        inputs, target: the batch, for the relevances: the model's input (or a tuple or mapping of its arguments) and the
        classes. Not needed for relevance=None.
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
                    "quantizer.step() needs the batch, step(x, y), to take relevances; or use relevance=None"
                )
            self.observe(*take_first((inputs, target), self.options.relevance_samples))
        self._steps += 1
        self.assign()
        if refresh:
            assert_same_levels([weight.levels for weight in self._weights])

    def observe(self, inputs: Any, target: Any = None) -> None:
        """Take relevances on this batch into the moving average, without assigning.

        Where they cannot be taken, the weights fall back to plain ECQ and `report()` says why.
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
                f"its relevance was {peak} on a batch, which was left out: the model's outputs or this batch are not finite, or "
                "a layer divides by zero"
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
        """Assign every weight's level from background and relevances, and write kΔ to the parameters."""
        self._check_attached()
        gamma, exponent = (
            self.entropy_scale * self.options.entropy_weight,
            self.options.size_exponent,
        )
        for weight in self._weights:
            R = weight.relevance
            weight.last = assign(
                weight.background,
                weight.step,
                weight.grid,
                axis=weight.axis,
                strength=gamma
                * compute_size_factor(weight.background.numel(), self._largest) ** exponent,
                relevance=None if R is None else R / R.amax(),
                band=self.options.band,
                rho=self.options.rho,
                zero_floor=self.options.zero_floor,
            )
            weight.levels = weight.last.levels
            weight.parameter.copy_(weight.quantized())

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
            weight.background += weight.parameter - weight.quantized()
        sums = torch.stack([weight.background.sum() for weight in self._weights])
        if not bool(sums.isfinite().all()):
            broken = next(
                w.name
                for w, total in zip(self._weights, sums.tolist(), strict=True)
                if total - total != 0
            )
            raise ModelError(
                f"the weights of '{broken}' became NaN or infinite: the training diverges, lower the learning rate"
            )

    def _check_attached(self) -> None:
        if not self._attached:
            raise OptionError("the quantizer is detached from its model: make a new one")

    # What it knows

    def tensors(self) -> tuple[QuantTensor, ...]:
        """The quantised weights under their state-dict names (a tied one under its first); levels and step on the CPU."""
        return tuple(
            QuantTensor(
                weight.name,
                weight.levels.cpu().numpy().copy(),
                Scale(weight.step.cpu().numpy().copy()),
            )
            for weight in self._weights
        )

    def background(self) -> dict[str, Tensor]:
        """The full-precision weights W by name (not copies)."""
        return {weight.name: weight.background for weight in self._weights}

    def relevances(self) -> dict[str, Tensor]:
        """R in [0, 1] by name, for the weights that have one."""
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
        """The options, JSON-able."""
        return self.options.to_json()

    def report(self) -> Report:
        rules = self._relevances.rules if self._relevances is not None else {}
        entries = []
        for weight, tensor in zip(self._weights, self.tensors(), strict=True):
            last = weight.last
            assert last is not None  # assigned at construction
            warnings = sorted(weight.warnings)
            if not last.in_band:
                warnings.append(
                    f"no exponent in [0, 1] meets the band: zeros {last.zeros:.3f}, plain ECQ {last.ecq_zeros:.3f}"
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
        names = [name for name, _ in unwrap_model(self.model).named_parameters()]
        failures = self._relevances.failures if self._relevances is not None else ()
        sources = {
            source
            for entry in find_parametrized(unwrap_model(self.model))
            for source in entry.sources
        }
        parametrized = tuple(
            name
            for name, reason in self._left_float
            if name in sources and "excluded" not in reason
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
        """Let go of the model: it keeps the quantised values, or gets the background weights back with restore=True."""
        for weight in self._weights if restore else ():
            weight.parameter.copy_(weight.background)
        for hook in self._hooks:
            hook.remove()
        if self.activations is not None:
            self.activations.detach()
        self._attached = False
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides the model's and the optimizer's state."""
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
        """ModelError if the state belongs to another model or recipe."""
        if set(state["weights"]) != {weight.name for weight in self._weights}:
            raise ModelError(
                "the quantizer's state has other weights than this model: use the same model, bits and exclude"
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
                    f"the quantizer's state of '{weight.name}' has another shape: use the same model and recipe"
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


def take_first(value: Any, samples: int | None) -> Any:
    """The first samples of each tensor in a batch."""
    if samples is None:
        return value
    if isinstance(value, Tensor):
        return value[:samples]
    if isinstance(value, Mapping):
        return {key: take_first(item, samples) for key, item in value.items()}
    return (
        type(value)(take_first(item, samples) for item in value)
        if isinstance(value, (tuple, list))
        else value
    )


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's module inside torch.compile's and DistributedDataParallel's wrappers: names are those of its state dict."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _choose_weights(
    model: nn.Module, recipe: Recipe
) -> tuple[list[_Weight], tuple[tuple[str, str], ...]]:
    """The parameters to quantise, and (name, reason) of those that stay float. A tied parameter is met once, first name first."""
    chosen: list[_Weight] = []
    left: list[tuple[str, str]] = []
    seen: set[int] = set()
    computed = {
        source: entry.advice for entry in find_parametrized(model) for source in entry.sources
    }
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{short}" if prefix else short
            reason = find_reason_to_leave(name, module, parameter, recipe, computed.get(name))
            if reason:
                left.append((name, reason))
            else:
                chosen.append(attach_hook(name, module, parameter, recipe))
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left[:3])
        raise ModelError(
            f"the model has no weight that can be quantised ({why or 'it has no parameters'})"
        )
    return chosen, tuple(left)


def find_reason_to_leave(
    name: str, module: nn.Module, parameter: nn.Parameter, recipe: Recipe, computed: str | None
) -> str | None:
    """computed: what to do about a parameter that a weight is computed from in each forward pass."""
    pattern = recipe.excluded_by(name)
    if pattern:
        return f"excluded by '{pattern}'"
    if computed is not None:
        return computed
    if parameter.ndim < 2:
        return "bias, norm or scalar"
    if not isinstance(module, QUANTIZED):
        return f"parameter of {type(module).__name__}, which is no layer with a known weight"
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return "an embedding with max_norm rescales its weight in every forward pass"
    if recipe.bits_of(name) is None:
        return "no pattern in bits matches it"
    if parameter.numel() == 0:
        return "empty"
    return None


def attach_hook(name: str, module: nn.Module, parameter: nn.Parameter, recipe: Recipe) -> _Weight:
    if parameter.dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"the weight '{name}' is {parameter.dtype}, which cannot hold kΔ exactly: keep the model in float32 "
            "(torch.autocast gives the speed of half precision), or exclude it"
        )
    if not bool(parameter.detach().isfinite().all()):
        raise ModelError(
            f"the weight '{name}' holds NaN or infinite values: train it again or repair it first"
        )
    bits = recipe.bits_of(name)
    assert bits is not None  # looked at before
    background = parameter.detach().clone()
    grid = choose_grid(background, bits, levels=recipe.levels)
    axis = None
    if recipe.granularity == "channel":
        # Transposed convolutions have their output channels second; an embedding's rows are looked up, its columns are scaled.
        axis = 1 if isinstance(module, TRANSPOSED + EMBEDDINGS) else 0
    learned = recipe.step == "learned"
    step = fit_step(
        background, grid, axis=axis, rule="auto" if recipe.step == "learned" else recipe.step
    )
    levels = torch.zeros(background.shape, dtype=torch.int8, device=background.device)
    learner = StepOptimizer(step, recipe.step_rate) if learned else None
    return _Weight(name, parameter, grid, axis, background, step, levels, learner=learner)
