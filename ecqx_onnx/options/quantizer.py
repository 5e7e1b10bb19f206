"""The options of a quantization, as one frozen value that says how each parameter is quantized."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from ecqx_onnx.errors import OptionError
from ecqx_onnx.options.option import option


@dataclass(frozen=True)
class Band:
    """How far relevances may move the share of zeros away from the one of plain ECQ.

    With s the share that plain ECQ has, it stays in [s - keep, s + prune].

    Attributes:
        keep: band below s, a share in [0, 1].
        prune: band above s, a share in [0, 1].
    """

    keep: float = 0.1
    prune: float = 0.1


Levels = Literal["symmetric", "asymmetric"]
StepRule = Literal["auto", "percentile", "least_squares"]
Granularity = Literal["tensor", "channel"]
Gradient = Literal["plain", "absolute"]
Activations = Literal["float32", "int8"]


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized, by ECQx.

    bits may be one number, or {pattern of parameter names: bits}, of which the last matching
    pattern wins ("*" for all others). step="learned" begins at "auto" and then follows the gradient
    (LSQ), by Adam on log Δ with step_rate. size_exponent: λ = γ·δ^size_exponent·λ_max, where δ is
    below 1 for tensors smaller than the largest [ECQx]. gradient="absolute" multiplies what the
    background weight sees of the gradient at its level kΔ by ``|kΔ|``, and by one where
    k = 0 [Thesis].

    Example:
        Recipe(bits={"*": 4, "fc1.*": 2}, entropy_weight=0.2, exclude="conv1.*")

    Raises:
        OptionError: for a value outside its limits or choices.
    """

    bits: int | Mapping[str, int] = option(
        4, "Bits per level, 2 to 8; or a list of pattern=bits, the last match wins."
    )
    entropy_weight: float = option(
        0.1,
        "γ, how dear coding is against distance; 0 is nearest level.",
        minimum=0.0,
        maximum=1.0,
    )
    relevance: Any = option(
        "epsilon_plus_flat",
        "LRP composite: epsilon_plus_flat, ... or FILE.py:FUNCTION that returns one; none is plain"
        " ECQ.",
    )
    start: Any = option(
        "logit",
        "Relevance at the output: logit, probability or ones of the true class, output for each"
        " value of it, or FILE.py:FUNCTION of (output, target).",
    )
    refresh_every: int = option(8, "Take relevances anew every so many steps.", minimum=1)
    relevance_memory: float = option(
        0.9, "Share of the old relevances in their moving average, from 0 to below 1."
    )
    relevance_samples: int | None = option(
        None, "Take relevances on so many samples of the batch; default: all.", minimum=1
    )
    rho: float = option(2.0, "ρ of f(R) = ρ R^β, which scales distances by relevance; above 1.")
    keep: float = option(0.1, "Largest share of zeros that relevances may take away, from 0 to 1.")
    prune: float = option(0.1, "Largest share of extra zeros that relevances may add, from 0 to 1.")
    zero_floor: float = option(
        0.5, "Zero counts as at least this frequent, and so as cheapest; 0 turns it off."
    )
    size_exponent: float = option(
        1.0, "How far small tensors are spared the entropy weight: 1 most, 0 not."
    )
    levels: Levels = option(
        "symmetric", "Which levels there are: symmetric (2^b - 1 of them) or asymmetric (2^b)."
    )
    step: StepRule | Literal["learned"] = option(
        "auto", "The step between levels: auto, percentile, least_squares or learned."
    )
    step_rate: float = option(1e-3, "With --step learned: the learning rate of the steps.")
    granularity: Granularity = option(
        "tensor", "One step per output channel (channel) instead of one per tensor (tensor)."
    )
    exclude: Sequence[str] = option(
        (), "Pattern of parameter names that stay float; repeat for more."
    )
    gradient: Gradient = option(
        "plain", "Straight-through gradient: plain, or absolute (scaled by the size of the level)."
    )
    activations: Activations = option(
        "float32",
        "float32, or int8: round activations while training as `convert --activations int8` will,"
        " which then needs no data.",
    )

    @classmethod
    def paper(cls, **changed: Any) -> Recipe:
        """Give the options that follow the paper and its authors' code.

        Relevances only save weights from zero, so that the share of zeros lies in [s - p, s]; they
        are taken anew in every step, and remembered little. There are 2^b levels, and the step puts
        the 99.9th percentile on the outermost. What stays of ours, deliberately: relevances are
        taken on the background weights, since a weight that is quantized to zero would have none
        and could never come back; BatchNormalization keeps its place instead of being merged; and
        zero is the cheapest level.

        Args:
            **changed: options to set otherwise.

        Returns:
            The recipe.

        Example:
            Quantizer(model, **Recipe.paper(bits=2).to_json())
        """
        values: dict[str, Any] = {
            "prune": 0.0,
            "refresh_every": 1,
            "relevance_memory": 0.1,
            "levels": "asymmetric",
            "step": "percentile",
        }
        return cls(**{**values, **changed})

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        self._check_bits()
        if self.relevance == "none":  # as on the command line
            object.__setattr__(self, "relevance", None)
        if isinstance(self.exclude, str):
            object.__setattr__(self, "exclude", (self.exclude,))

    def _check_choices(self) -> None:
        choices_of = {
            "levels": get_args(Levels),
            "step": (*get_args(StepRule), "learned"),
            "granularity": get_args(Granularity),
            "gradient": get_args(Gradient),
            "activations": get_args(Activations),
        }
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(f"{name} '{value}' is unknown: use one of {', '.join(choices)}")

    def _check_numbers(self) -> None:
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
                f"relevance_samples is {self.relevance_samples}: choose 1 or more, or None for the"
                " whole batch"
            )
        if self.refresh_every < 1:
            raise OptionError(f"refresh_every is {self.refresh_every}: choose 1 or more steps")

    def _check_bits(self) -> None:
        several = self.bits.values() if isinstance(self.bits, Mapping) else (self.bits,)
        for bits in several:
            if not (isinstance(bits, int) and 2 <= bits <= 8):
                raise OptionError(
                    f"{bits} bits per weight is outside what the levels can hold: choose 2 to 8"
                )

    @property
    def band(self) -> Band:
        """How far relevances may move the share of zeros."""
        return Band(self.keep, self.prune)

    def excluded_by(self, name: str) -> str | None:
        """Find the pattern that keeps a parameter float.

        Args:
            name: of the parameter, as in the state dict.

        Returns:
            The first pattern of `exclude` that matches, or None.
        """
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return pattern
        return None

    def bits_of(self, name: str) -> int | None:
        """Look up how many bits a parameter gets.

        Args:
            name: of the parameter, as in the state dict.

        Returns:
            2 to 8; None if no pattern matches, and the parameter stays float.
        """
        if not isinstance(self.bits, Mapping):
            return self.bits
        found = None
        for pattern, bits in self.bits.items():
            if fnmatchcase(name, pattern):
                found = bits  # the last match wins
        return found

    def unmatched(self, names: Sequence[str]) -> tuple[str, ...]:
        """List the patterns of exclude and bits that match nothing.

        Args:
            names: of all parameters.

        Returns:
            Each pattern with its option: "exclude 'fc9.*'".
        """
        patterns = [("exclude", pattern) for pattern in self.exclude]
        if isinstance(self.bits, Mapping):
            patterns += [("bits", pattern) for pattern in self.bits]
        found = []
        for option_name, pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                found.append(f"{option_name} '{pattern}'")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Write the options as plain values.

        Returns:
            Option by name, numbers and strings only: a Composite or a function by its type's or its
            own name.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["bits"] = dict(self.bits) if isinstance(self.bits, Mapping) else self.bits
        values["exclude"] = list(self.exclude)
        if not isinstance(self.relevance, str | None):
            values["relevance"] = type(self.relevance).__name__
        if callable(self.start):
            values["start"] = getattr(self.start, "__name__", type(self.start).__name__)
        return values
