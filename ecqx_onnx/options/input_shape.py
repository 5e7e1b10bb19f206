"""Inputs of a model as one types them: a shape, or each input by its name with shape and type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ecqx_onnx.errors import OptionError

# What a model of one float input has, without its batch; or each input with its batch.
InputShape = Sequence[int] | Mapping[str, "TypedShape"]
TYPES = ("float32", "float64", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class TypedShape:
    """One input: its shape with the batch, and its type.

    Raises:
        OptionError: for a length below 1, or a type that is not in TYPES.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in TYPES:
            raise OptionError(
                f"'{self.dtype}' is no type that an input has: use one of {', '.join(TYPES)}"
            )
        if any(length < 1 for length in self.shape):
            raise OptionError(f"the shape {self.shape} has a length below 1: use 1 or more")


def parse_input_shape(texts: Sequence[str] | None) -> InputShape | None:
    """Read --input-shape.

    Args:
        texts: ['3,32,32'], or ['ids=2,16:int64', 'mask=2,16:int64'], or None.

    Returns:
        The lengths, each from 1 to 2^31 - 1, of one sample; or each input by name, its shape with
        the batch, float32 where no type is given; None for nothing.

    Raises:
        OptionError: if one of them is neither.
    """
    if not texts:
        return None
    named = ["=" in text for text in texts]
    if len(texts) == 1 and not named[0]:
        return _parse_lengths(texts[0], "3,32,32", "without the batch")
    if not all(named):
        raise OptionError(
            f"--input-shape '{texts[named.index(False)]}' has no name beside others: give every"
            " input as NAME=2,16:int64, with its batch"
        )
    found: dict[str, TypedShape] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        lengths, _, dtype = rest.partition(":")
        if name.strip() in found or not name.strip().isidentifier():
            raise OptionError(
                f"--input-shape {text!r} names no argument of forward, or one twice: write"
                " NAME=2,16:int64"
            )
        shape = _parse_lengths(lengths, "NAME=2,16:int64", "with the batch") if lengths else ()
        found[name.strip()] = TypedShape(shape, dtype.strip() or "float32")
    return found


def _parse_lengths(text: str, sample: str, batch: str) -> tuple[int, ...]:
    lengths = []
    for part in text.split(","):
        if not (part.strip().isdecimal() and 0 < int(part) < 2**31):
            raise OptionError(
                f"--input-shape {text!r} is not a list of positive integers; write it {batch}:"
                f" {sample}"
            )
        lengths.append(int(part))
    return tuple(lengths)


def parse_dynamic(texts: Sequence[str] | None) -> dict[str, dict[int, str]] | None:
    """Read --dynamic.

    Args:
        texts: ['ids:0=batch', 'ids:1=time', 'x:0'], or ['none'], or None.

    Returns:
        {input: {axis: name}}; the first axis is called "batch" and another INPUT_AXIS where no
        name is given. Empty for 'none', where every axis is fixed; None for None.

    Raises:
        OptionError: if one of them has another form.
    """
    if not texts:
        return None
    if list(texts) == ["none"]:
        return {}
    found: dict[str, dict[int, str]] = {}
    for text in texts:
        place, _, label = text.partition("=")
        name, _, axis = place.rpartition(":")
        given = not text.endswith("=") and (not label or label.isidentifier())
        if not (name and axis.isdecimal() and len(axis) < 4 and given):
            raise OptionError(
                f"--dynamic {text!r} is not NAME:AXIS or NAME:AXIS=LABEL: write ids:0=batch"
                " ids:1=time (each behind its own --dynamic), or none"
            )
        default = "batch" if int(axis) == 0 else f"{name}_{axis}"
        found.setdefault(name, {})[int(axis)] = label or default
    return found
