"""How far another float32 implementation of a model may lie from its exact result.

The limit is derived from the model and the data, not chosen. The reference runs in float32 (y32)
and in float64 (y64). float64 rounds 2^29 times finer, so y64 stands for the exact result, and

    e = max |y32 - y64|        is what one float32 implementation of this network loses to rounding.

onnxruntime computes the same sums in another order and with other kernels. For sums of n terms in
L parallel lanes the rounding grows like sqrt(n / L); between one lane and sixteen (AVX-512) that
is a factor of 4. A further factor of 2 covers the spread of a maximum from one draw to the next
and polynomial exp, tanh and erf. Where the sums are so short that y32 happens to be exact, a few
roundings of the result remain: 4 units in the last place of the largest output. Hence

    |onnx - y64| <= 8·e + 4·ulp(max |y64|).

A weight that is off by one level, or a scale by 1e-3, moves outputs by 1e-3 to 1e-1 of their size:
about a thousand bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ecqx_onnx.validation.outputs.metrics import find_largest_difference

ORDER_FACTOR = 8.0  # other order of summation (4) and spread of maxima (2), see above
FINAL_ULPS = 4.0
# Without float64: 2^10 roundings of the largest output or of 1, 1.2e-4 of it.
FALLBACK_ULPS = 1024.0


@dataclass(frozen=True)
class Bound:
    """The limit for one output, and what it was derived from.

    Attributes:
        rounding: e of the formula above, or None where no float64 result could be had.
        ulp: Unit in the last place of the largest output.
        runs: float32 implementations between the two results: 1 unless the comparison goes by way
            of others (floats.py).
    """

    rounding: float | None
    ulp: float
    runs: int = 1

    @property
    def limit(self) -> float:
        """The largest absolute difference that rounding explains."""
        if self.rounding is None:
            once = FALLBACK_ULPS * self.ulp
        else:
            once = ORDER_FACTOR * self.rounding + FINAL_ULPS * self.ulp
        return self.runs * once

    @property
    def formula(self) -> str:
        """How the limit comes about, in words and numbers."""
        if self.rounding is None:
            once = (
                f"{FALLBACK_ULPS:.0f} ulp of the largest output or of 1, as no float64 result "
                "could be had"
            )
        else:
            once = (
                f"{ORDER_FACTOR:.0f} x {self.rounding:.2e} (float32 rounding of PyTorch) + "
                f"{FINAL_ULPS:.0f} ulp"
            )
        return once if self.runs == 1 else f"{self.runs} x ({once})"

    def widen(self, other: Bound) -> Bound:
        """Find the bound for both sets of inputs.

        Args:
            other: The bound of the same output on other inputs.

        Returns:
            The larger rounding and ulp; no rounding where either has none.
        """
        known = self.rounding is not None and other.rounding is not None
        return Bound(
            max(self.rounding or 0.0, other.rounding or 0.0) if known else None,
            max(self.ulp, other.ulp),
            self.runs,
        )


def derive_bound(output: np.ndarray, exact: np.ndarray | None, *, runs: int = 1) -> Bound:
    """Derive how far another implementation of an output may lie from the exact one.

    Args:
        output: y32, PyTorch's output, any shape. One that is not of floats must be equal: bound 0.
        exact: y64 in the same shape, or None where no float64 result could be had.
        runs: float32 implementations between the two results.

    Returns:
        The bound.
    """
    if not np.issubdtype(output.dtype, np.floating):
        return Bound(0.0, 0.0)
    # Without a measured rounding, values of order one inside the network are all that can be
    # assumed.
    finite = np.abs(output[np.isfinite(output)])
    ulp = float(np.spacing(finite.max(initial=1.0 if exact is None else 0.0).astype(output.dtype)))
    return Bound(None if exact is None else find_largest_difference(output, exact), ulp, runs)
