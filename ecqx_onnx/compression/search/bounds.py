"""What a compressed file must keep to: bytes, bits, lost points, agreement, error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ecqx_onnx.compression.search.quality import Quality
from ecqx_onnx.errors import OptionError

UNITS: Mapping[str, int] = {
    "": 1, "b": 1, "k": 1000, "kb": 1000, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
}  # fmt: skip
DEFAULT_AGREEMENT = 99.0  # percent, where no bound is given and the model tells classes apart
DEFAULT_ERROR = 0.05


@dataclass(frozen=True)
class Bounds:
    """What a file must keep to; None where there is no such bound.

    Attributes:
        max_bytes: of the whole file.
        bits_per_weight: coded bits per quantized weight.
        max_drop: percentage points of top-1 accuracy.
        min_agreement: percent.
        max_error: share, the largest over outputs.
        chosen: whether the user gave none and these are the defaults.
    """

    max_bytes: int | None = None
    bits_per_weight: float | None = None
    max_drop: float | None = None
    min_agreement: float | None = None
    max_error: float | None = None
    chosen: bool = False

    @property
    def limits_size(self) -> bool:
        """Whether bytes or bits are bounded."""
        return self.max_bytes is not None or self.bits_per_weight is not None

    @property
    def limits_quality(self) -> bool:
        """Whether drop, agreement or error are bounded."""
        return any(
            value is not None for value in (self.max_drop, self.min_agreement, self.max_error)
        )

    def with_defaults(self, *, has_classes: bool) -> Bounds:
        """Fill in the default bound where the user gave none.

        Args:
            has_classes: whether an output holds class scores, so that agreement can be bounded.

        Returns:
            These bounds, or new ones with the default.
        """
        if self.limits_size or self.limits_quality:
            return self
        if has_classes:
            return replace(self, min_agreement=DEFAULT_AGREEMENT, chosen=True)
        return replace(self, max_error=DEFAULT_ERROR, chosen=True)

    def misses(self, quality: Quality, nbytes: int, bits: float) -> tuple[str, ...]:
        """List the bounds that don't hold.

        Args:
            quality: against the float model, measured.
            nbytes: of the file.
            bits: coded bits per weight.

        Returns:
            A clause for each, none if all hold.
        """
        found = []
        if self.max_bytes is not None and nbytes > self.max_bytes:
            found.append(f"{nbytes:,} bytes, and {self.max_bytes:,} are allowed")
        if self.bits_per_weight is not None and bits > self.bits_per_weight:
            found.append(f"{bits:.3f} bits a weight, and {self.bits_per_weight:g} are allowed")
        return (*found, *self.quality_misses(quality))

    def quality_misses(self, quality: Quality) -> tuple[str, ...]:
        """List the quality bounds that don't hold.

        Args:
            quality: against the float model, measured.

        Returns:
            A clause for each, none if all hold.
        """
        found = []
        drop = quality.drop
        if self.max_drop is not None and drop is not None and drop > self.max_drop + 1e-9:
            found.append(f"{drop:.2f} points are lost, and {self.max_drop:g} are allowed")
        if self.min_agreement is not None and quality.agreement is not None:
            share = 100 * quality.agreement.share
            if share < self.min_agreement:
                found.append(f"{share:.2f} % agree, and {self.min_agreement:g} % are wanted")
        if self.max_error is not None and not quality.error <= self.max_error:
            found.append(f"an error of {quality.error:.4f}, and {self.max_error:g} is allowed")
        return tuple(found)

    @property
    def words(self) -> str:
        """The bounds in words."""
        parts = []
        if self.max_bytes is not None:
            parts.append(f"at most {self.max_bytes:,} bytes")
        if self.bits_per_weight is not None:
            parts.append(f"at most {self.bits_per_weight:g} coded bits a weight")
        if self.max_drop is not None:
            parts.append(f"at most {self.max_drop:g} points of accuracy lost")
        if self.min_agreement is not None:
            parts.append(f"agreement of at least {self.min_agreement:g} %")
        if self.max_error is not None:
            parts.append(f"an error of at most {self.max_error:g}")
        return ", ".join(parts) + (" (no bound was given: the default)" if self.chosen else "")


def make_bounds(
    max_bytes: int | str | None = None,
    bits_per_weight: float | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    max_error: float | None = None,
) -> Bounds:
    """Check the bounds that a user gives.

    Args:
        max_bytes: of the file, at least 1; a number or text such as "70k".
        bits_per_weight: coded bits, 0.05 to 16.
        max_drop: percentage points of accuracy that may be lost, 0 to 100.
        min_agreement: percent of samples with the same class, 1 to 100 (1 itself is taken for a
            share).
        max_error: relative error of the outputs, 1e-6 to 1.

    Returns:
        The bounds; None where nothing was given.

    Raises:
        OptionError: one makes no sense; the message says what to write.
    """
    _check_range("--bits-per-weight", bits_per_weight, 0.05, 16.0, "such as 2.5")
    _check_range("--max-drop", max_drop, 0.0, 100.0, "percentage points, such as 0.5")
    _check_range("--max-error", max_error, 1e-6, 1.0, "a share, such as 0.05")
    if min_agreement is not None and 0 < min_agreement <= 1:
        raise OptionError(
            f"--min-agreement {min_agreement:g} is in percent: write {100 * min_agreement:g}"
        )
    _check_range("--min-agreement", min_agreement, 1.0, 100.0, "percent, such as 98")
    size = parse_bytes(max_bytes) if isinstance(max_bytes, str) else max_bytes
    if size is not None and size < 1:
        raise OptionError(f"--max-bytes {size} leaves no room for a file: give more, such as 70k")
    return Bounds(size, bits_per_weight, max_drop, min_agreement, max_error)


def _check_range(option: str, value: float | None, least: float, most: float, example: str) -> None:
    if value is not None and not (math.isfinite(value) and least <= value <= most):
        raise OptionError(f"{option} {value:g} is not between {least:g} and {most:g}: {example}")


def parse_bytes(text: str) -> int:
    """Read a number of bytes with or without its unit.

    Args:
        text: such as "70k" (70,000), "1.5M", "64KiB" or "1MiB".

    Returns:
        Bytes, rounded down.

    Raises:
        OptionError: it is anything else.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match.group(2).lower() not in UNITS:
        raise OptionError(f"--max-bytes '{text}' is no number of bytes: write 70k, 1.5M or 64KiB")
    return int(float(match.group(1)) * UNITS[match.group(2).lower()])
