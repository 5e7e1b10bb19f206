"""One option of a verb: a dataclass field that knows its default, its limits and its help.

    @dataclass(frozen=True, kw_only=True)
    class Example:
        samples: int = option(512, "Number of samples that are used.", minimum=1)

    get_help(Example, "samples")  # 'Number of samples that are used.'
    check_limits(Example, samples=0)  # OptionError: samples is 0: choose 1 or more

The command line takes help and limits from here; tests/test_options.py holds its defaults, and
those of the Python functions, to the ones here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ecqx_onnx.errors import OptionError, UnknownOptionError

P = ParamSpec("P")
R = TypeVar("R")


class Limits(NamedTuple):
    """The smallest and largest number allowed; None where there is no limit."""

    minimum: float | None
    maximum: float | None


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """Declare an option with a default.

    Args:
        default: its value where nothing is given; immutable.
        help: one or two sentences that are complete in themselves.
        minimum: the smallest number allowed, or None.
        maximum: the largest number allowed, or None.

    Returns:
        The field of the dataclass.
    """
    metadata = {"help": help, "limits": Limits(minimum, maximum)}
    return field(default=default, metadata=metadata)


def required(help: str) -> Any:
    """Declare an option that has no default.

    Args:
        help: one or two sentences that are complete in themselves.

    Returns:
        The field of the dataclass.
    """
    return field(metadata={"help": help, "limits": Limits(None, None)})


def get_help(options: type, name: str) -> str:
    """Look up what an option says of itself.

    Args:
        options: the dataclass of a verb.
        name: the option's name.

    Returns:
        Its help, complete sentences.
    """
    text: str = _get_field(options, name).metadata["help"]
    return text


def get_limits(options: type, name: str) -> Limits:
    """Look up between which numbers an option lies.

    Args:
        options: the dataclass of a verb.
        name: the option's name.

    Returns:
        The limits, both None for an option that is no number or has none.
    """
    limits: Limits = _get_field(options, name).metadata["limits"]
    return limits


def get_defaults(options: type) -> dict[str, Any]:
    """List the defaults of a verb.

    Args:
        options: the dataclass of the verb.

    Returns:
        Default by name; options that must be given are left out.
    """
    return {entry.name: entry.default for entry in fields(options) if entry.default is not MISSING}


def check_limits(options: type, **values: Any) -> None:
    """Check that numbers lie within the limits of their options.

    Args:
        options: the dataclass of a verb.
        values: by the option's name; None and what is no number pass.

    Raises:
        OptionError: naming the first one that does not.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        minimum, maximum = get_limits(options, name)
        too_small = minimum is not None and not value >= minimum
        too_large = maximum is not None and not value <= maximum
        if too_small or too_large:
            allowed = _describe_limits(minimum, maximum)
            raise OptionError(f"{name} is {value}: choose {allowed}")


def refuse_unknown_options(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function name the nearest option where a keyword is none of its own.

    Args:
        function: with explicit keywords, without `**options`.

    Returns:
        The same function; an unknown keyword raises UnknownOptionError, which is a TypeError.
    """
    known = [name for name in inspect.signature(function).parameters if name != "self"]
    # Of a class, whose __init__ it is, the class.
    name = function.__qualname__.removesuffix(".__init__").split(".")[-1]

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        refuse_unknown(kwargs, known, who=name)
        return function(*args, **kwargs)

    return call


def refuse_unknown(given: Iterable[str], known: Iterable[str], *, who: str) -> None:
    """Check that every option given is known.

    Args:
        given: names of options.
        known: names that there are.
        who: whose options they are, for the message.

    Raises:
        UnknownOptionError: for the first that is not, with the nearest name.
    """
    names = list(known)
    for name in given:
        if name in names:
            continue
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise UnknownOptionError(f"{who} has no option '{name}': {hint}")


def _get_field(options: type, name: str) -> Field[Any]:
    by_name = {entry.name: entry for entry in fields(options)}
    return by_name[name]


def _describe_limits(minimum: float | None, maximum: float | None) -> str:
    if maximum is None:
        return f"{minimum:g} or more"
    if minimum is None:
        return f"{maximum:g} or less"
    return f"{minimum:g} to {maximum:g}"
