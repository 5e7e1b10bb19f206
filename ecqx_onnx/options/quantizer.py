"""The options of a quantisation, as one frozen value; (parameter name) -> how that parameter is quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from ecqx_onnx.errors import OptionError


@dataclass(frozen=True)
class Band:
    """How far relevances may move the share of zeros away from plain ECQ's s: it stays in [s - keep, s + prune]."""

    keep: float = 0.1
    prune: float = 0.1


Levels = Literal["symmetric", "asymmetric"]
StepRule = Literal["auto", "percentile", "least_squares"]


Granularity = Literal["tensor", "channel"]
Gradient = Literal["plain", "absolute"]
Activations = Literal["float32", "int8"]


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised.

    bits: 2 to 8, one number or {pattern of parameter names: bits}, the last matching pattern wins ("*" for all others).
    entropy_weight: γ in [0, 1], how dear a bit is against a squared error; 0 is nearest level.
    relevance: name of a zennit composite, a Composite, or None for plain ECQ.
    start: relevance at the output: "logit", "probability", "ones" of the true class, or a function (output, target).
    refresh_every: relevances are taken anew every so many steps. relevance_memory: share of the old in the moving average.
    relevance_samples: take them on so many samples of the batch; None for all.
    rho: ρ of f(R) = ρ R^β. keep, prune: relevances may lower the share of zeros by `keep` and raise it by `prune`, no further.
    zero_floor: P_0 is at least this, so that zero is the cheapest symbol; 0 turns it off.
    size_exponent: λ = γ·δ^size_exponent·λ_max, δ below 1 for tensors smaller than the largest; 1 [ECQx] spares them most, 0 not.
    levels, step, granularity: the grid, see grid.py. step="learned" begins at "auto" and then follows the gradient (LSQ), by
    Adam on log Δ with step_rate. exclude: patterns of parameter names that stay float.
    gradient: what the background weight sees of the gradient at its level kΔ: all of it, or "absolute", |kΔ| times it (once where
    k = 0)  [Thesis].
    activations: "int8" rounds them to 8 bits while training, where `convert --activations int8` does so; see activations.py.
    """

    bits: int | Mapping[str, int] = 4
    entropy_weight: float = 0.1
    relevance: Any = "epsilon_plus_flat"
    start: Any = "logit"
    refresh_every: int = 8
    relevance_memory: float = 0.9
    relevance_samples: int | None = None
    rho: float = 2.0
    keep: float = 0.1
    prune: float = 0.1
    zero_floor: float = 0.5
    size_exponent: float = 1.0
    levels: Levels = "symmetric"
    step: StepRule | Literal["learned"] = "auto"
    step_rate: float = 1e-3
    granularity: Granularity = "tensor"
    exclude: Sequence[str] = field(default=())
    gradient: Gradient = "plain"
    activations: Activations = "float32"

    def __post_init__(self) -> None:
        steps = (*get_args(StepRule), "learned")
        for name, choices in (
            *(("levels", get_args(Levels)), ("step", steps)),
            *(("granularity", get_args(Granularity)), ("gradient", get_args(Gradient))),
            ("activations", get_args(Activations)),
        ):
            if getattr(self, name) not in choices:
                raise OptionError(
                    f"{name} '{getattr(self, name)}' is unknown: use one of {', '.join(choices)}"
                )
        for name in ("entropy_weight", "keep", "prune", "zero_floor", "size_exponent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise OptionError(f"{name} is {value}: choose a number from 0 to 1")
        if not 0 <= self.relevance_memory < 1:
            raise OptionError(
                f"relevance_memory is {self.relevance_memory}: choose a number from 0 to below 1"
            )
        if not (math.isfinite(self.rho) and self.rho > 1):
            raise OptionError(f"rho is {self.rho}: f(R) = ρ R^β needs ρ above 1")
        if not (math.isfinite(self.step_rate) and self.step_rate > 0):
            raise OptionError(
                f"step_rate is {self.step_rate}: choose a positive number, such as 0.001"
            )
        if self.relevance_samples is not None and self.relevance_samples < 1:
            raise OptionError(
                f"relevance_samples is {self.relevance_samples}: choose 1 or more, or None for the whole batch"
            )
        if self.refresh_every < 1:
            raise OptionError(f"refresh_every is {self.refresh_every}: choose 1 or more steps")
        for bits in self.bits.values() if isinstance(self.bits, Mapping) else (self.bits,):
            if not (isinstance(bits, int) and 2 <= bits <= 8):
                raise OptionError(
                    f"{bits} bits per weight is outside what the levels can hold: choose 2 to 8"
                )
        if self.relevance == "none":  # as on the command line
            object.__setattr__(self, "relevance", None)
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))

    @property
    def band(self) -> Band:
        return Band(self.keep, self.prune)

    def excluded_by(self, name: str) -> str | None:
        """The pattern that keeps this parameter float, if one does."""
        return next((pattern for pattern in self.exclude if fnmatchcase(name, pattern)), None)

    def bits_of(self, name: str) -> int | None:
        """None if no pattern matches: the parameter stays float."""
        if not isinstance(self.bits, Mapping):
            return self.bits
        matching = [bits for pattern, bits in self.bits.items() if fnmatchcase(name, pattern)]
        return matching[-1] if matching else None

    def unmatched(self, names: Sequence[str]) -> tuple[str, ...]:
        """The patterns of exclude and bits that none of these parameter names matches, each with its option."""
        patterns = [("exclude", pattern) for pattern in self.exclude]
        patterns += [
            ("bits", pattern) for pattern in (self.bits if isinstance(self.bits, Mapping) else ())
        ]
        return tuple(
            f"{option} '{p}'"
            for option, p in patterns
            if not any(fnmatchcase(name, p) for name in names)
        )

    def to_json(self) -> dict[str, Any]:
        """Numbers and strings only; a Composite or a function by its type's or its own name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["bits"] = dict(self.bits) if isinstance(self.bits, Mapping) else self.bits
        values["exclude"] = list(self.exclude)
        if not isinstance(self.relevance, str | None):
            values["relevance"] = type(self.relevance).__name__
        if callable(self.start):
            values["start"] = getattr(self.start, "__name__", type(self.start).__name__)
        return values


def make_recipe(options: Mapping[str, Any]) -> Recipe:
    """Build a recipe from options by name.

    Args:
        options: as the Quantizer takes them.

    Returns:
        The recipe.

    Raises:
        OptionError: for a name that no option has, with the nearest one; or a value that does not fit.
    """
    known = [entry.name for entry in fields(Recipe)]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise OptionError(f"the Quantizer has no option '{name}': {hint}")
    return Recipe(**options)
