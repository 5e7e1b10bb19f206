"""Drives the entropy weight γ while training, so that the written file ends at a budget of bytes.

γ is the price of a bit. Dual ascent (Boyd & Vandenberghe 2004, sec. 5): as long as the levels take
more than they may, the price rises; where they take less, it falls. What they may take falls from
what they take at first to the budget over the first half of the training, so that the network mends
as it is pruned. At the end γ is set once more, by bisection against the real file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ecqx_onnx.errors import OptionError
from ecqx_onnx.quantization.quantizer import Quantizer

EVERY = 10  # steps between two looks at the rate
ASCENT = 0.6  # how much log γ rises where the file is larger than it may be by its own size
RAMP = 0.5  # share of the training over which the rate falls to the budget
LEAST_GAMMA = 1e-6
MOST_GAMMA = 4.0  # above 1, so that small tensors, which are spared, can be zero as well
FIRST_SHARE = 0.3  # of the price that would meet the budget at once
BISECTIONS = 12
TRIES = 5  # real files that are written at the end at most
TOLERANCE = 0.005  # of the budget: near enough below it


@dataclass(frozen=True)
class Budget:
    """How large the result may be, and how its size is measured.

    Attributes:
        limit: bytes of the whole file; bits a weight of the coded levels, where `write` is None.
        code: quantizer -> bytes (or bits a weight) that its levels take when they are packed.
        write: quantizer -> bytes of the whole file that is written from it.
        shown: as the user gave it, for sentences.
    """

    limit: float
    code: Callable[[Quantizer], float]
    write: Callable[[Quantizer], int] | None
    shown: str

    def show(self, size: float) -> str:
        """Show a size in the budget's unit.

        Args:
            size: bytes, or bits a weight.

        Returns:
            Such as "51,200 bytes".
        """
        return f"{size:.3f} bits a weight" if self.write is None else f"{size:,.0f} bytes"


class RateControl:
    """Sets a quantizer's γ so that its levels meet a budget."""

    def __init__(self, quantizer: Quantizer, budget: Budget) -> None:
        """Measure the file once, and refuse a budget that cannot be met.

        Args:
            quantizer: attached to the network as it is before the training.
            budget: what may be taken.

        Raises:
            OptionError: if the graph alone is larger, or the levels at the highest price.
        """
        self._quantizer = quantizer
        self._budget = budget
        self._weight = quantizer.options.entropy_weight or 1e-3
        self.notes: list[str] = []
        self._rest = 0.0  # bytes of the file beside the levels
        self._ratio = 1.0  # packed bytes against entropy
        # 1. The cheapest levels there are.
        least = self._calibrate_at(MOST_GAMMA)
        if least > budget.limit:
            raise OptionError(
                f"{budget.shown} cannot be reached: the graph, what stays float and the sparsest"
                f" levels take {budget.show(least)}; allow more, or quantize more of the network"
            )
        # 2. The dearest: the nearest level each. What the file takes beside the levels differs.
        self._start = self._calibrate_at(0.0)
        if self._start < 0.98 * budget.limit:
            self.notes.append(
                f"the nearest levels take {budget.show(self._start)}, within {budget.shown}: more"
                " --bits would use what is left"
            )
        # 3. The price to begin with: a part of what would meet the budget at once.
        self.gamma = FIRST_SHARE * self._bisect()
        self._set_gamma(self.gamma)

    def _set_gamma(self, gamma: float) -> None:
        self._quantizer.entropy_scale = gamma / self._weight
        self._quantizer.assign()

    def _calibrate_ratio(self) -> None:
        entropy = max(1.0, self._count_entropy_bytes())
        self._ratio = self._budget.code(self._quantizer) / entropy

    def _count_entropy_bytes(self) -> float:
        tensors = self._quantizer.tensors()
        return sum(tensor.entropy * tensor.size for tensor in tensors) / 8

    def estimate(self) -> float:
        """Estimate the size of the result from the entropy of the levels.

        Returns:
            Bytes.
        """
        return self._rest + self._ratio * self._count_entropy_bytes()

    def follow(self, step: int, done: float) -> None:
        """Set γ for the next steps.

        Args:
            step: of the epoch, from 0; at its first the estimate is calibrated by a real file.
            done: share of the training, in [0, 1].
        """
        if step == 0:
            self._calibrate_at(self.gamma)
            self._calibrate_ratio()
        if step % EVERY == 0:
            allowed = self._allow(done)
            excess = (self.estimate() - allowed) / allowed
            rise = ASCENT * max(-0.5, min(0.5, excess))
            self.gamma = min(MOST_GAMMA, max(LEAST_GAMMA, self.gamma * math.exp(rise)))
        self._quantizer.entropy_scale = self.gamma / self._weight

    def _allow(self, done: float) -> float:
        """Bytes that are allowed at this share of the training: falls to the budget."""
        limit = self._budget.limit
        if self._start <= limit or done >= RAMP:
            return limit
        share = done / RAMP
        return float(math.exp((1 - share) * math.log(self._start) + share * math.log(limit)))

    def finish(self) -> float:
        """Set γ so that the file that is written keeps to the budget.

        Returns:
            Bytes of the result, or bits a weight.

        Raises:
            OptionError: if no γ keeps to it, which the first look already refuses.
        """
        limit = self._budget.limit
        self._calibrate_at(self.gamma)
        best: tuple[float, float] | None = None  # (size, γ)
        for _ in range(TRIES):
            gamma = self._bisect()
            size = self._calibrate_at(gamma)
            if size <= limit and (best is None or size > best[0]):
                best = (size, gamma)
            if limit * (1 - TOLERANCE) <= size <= limit:
                break
        if best is None:
            # The estimate may hop between two storages: as dear as can be, then.
            size = self._calibrate_at(MOST_GAMMA)
            if size > limit:
                raise OptionError(
                    f"{self._budget.shown} is missed, {self._budget.show(size)} at the highest"
                    " entropy weight: allow more"
                )
            best = (size, MOST_GAMMA)
        self.gamma = best[1]
        self._set_gamma(self.gamma)
        return best[0]

    def _calibrate_at(self, gamma: float) -> float:
        """The real size at γ; what the file takes beside the levels is learned from it."""
        self._set_gamma(gamma)
        coded = self._budget.code(self._quantizer)
        if self._budget.write is None:
            return coded
        size = float(self._budget.write(self._quantizer))
        self._rest = size - coded
        return size

    def _bisect(self) -> float:
        """The lowest γ at which the levels, measured by the encoder, keep to the budget."""
        limit = self._budget.limit
        low, high = LEAST_GAMMA, MOST_GAMMA
        for gamma in (low, *[0.0] * BISECTIONS):
            middle = gamma or math.sqrt(low * high)
            self._set_gamma(middle)
            size = self._rest + self._budget.code(self._quantizer)
            if size > limit:
                low = middle
                continue
            high = middle
            if size >= limit * (1 - TOLERANCE) or middle == LEAST_GAMMA:
                break
        return high

    def describe(self, size: float) -> str:
        """Say how the budget was met.

        Args:
            size: bytes of the result.

        Returns:
            A sentence.
        """
        return (
            f"{self._budget.show(size)} within {self._budget.shown}, by an entropy weight of"
            f" {self.gamma:.3g}"
        )

    def state(self) -> dict[str, Any]:
        """Collect what a resumed training needs.

        Returns:
            Numbers.
        """
        return {
            "gamma": self.gamma,
            "ratio": self._ratio,
            "rest": self._rest,
            "start": self._start,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: as `state` gave it.
        """
        self.gamma = float(state["gamma"])
        self._ratio = float(state["ratio"])
        self._rest = float(state["rest"])
        self._start = float(state["start"])
