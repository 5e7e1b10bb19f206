"""Arguments of commands: options of the verbs written for typer, and texts read as values."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ecqx_onnx.errors import OptionError
from ecqx_onnx.options import shared
from ecqx_onnx.options.option import get_help, get_limits

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Force = Annotated[bool, typer.Option("--force", "-f", help=shared.FORCE)]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help=shared.TRUST_PICKLE)]
Strict = Annotated[bool, typer.Option("--strict/--no-strict", help=shared.STRICT)]
Factory = Annotated[
    str | None, typer.Option("--model", metavar="FILE.py:FACTORY", help=shared.FACTORY)
]
InputShape = Annotated[list[str] | None, typer.Option(metavar="SHAPE", help=shared.INPUT_SHAPE)]
MinAgreement = Annotated[float | None, typer.Option(help=shared.MIN_AGREEMENT)]
MaxError = Annotated[float | None, typer.Option(help=shared.MAX_ERROR)]
MaxDrop = Annotated[float | None, typer.Option(help=shared.MAX_DROP)]


def make_option(
    options: type,
    name: str,
    *flags: str,
    panel: str | None = None,
    metavar: str | None = None,
) -> Any:
    """Make an option of the command line from the one of a verb.

    Args:
        options: the verb's dataclass, which has the help and the limits.
        name: the option's name in it.
        flags: how it is written, such as "--lr"; by default as its name.
        panel: heading in the command's help under which it stands.
        metavar: what stands for its value in the help.

    Returns:
        What typer wants in `Annotated`.
    """
    limits = get_limits(options, name)
    return typer.Option(
        *flags,
        help=get_help(options, name),
        min=limits.minimum,
        max=limits.maximum,
        metavar=metavar,
        rich_help_panel=panel,
    )


def make_argument(options: type, name: str, *, metavar: str | None = None) -> Any:
    """Make a positional argument of the command line from the option of a verb.

    Args:
        options: the verb's dataclass, which has the help.
        name: the option's name in it.
        metavar: what stands for its value in the help.

    Returns:
        What typer wants in `Annotated`.
    """
    return typer.Argument(help=get_help(options, name), metavar=metavar)


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """Read a list of numbers.

    Args:
        text: '0.49,0.48,0.45', or None.
        option: which one it was given to, for the message.

    Returns:
        The numbers; None for None.

    Raises:
        OptionError: if one of them is none.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(
            f"{option} {text!r} is not a list of numbers; write one value, or one per channel with"
            " commas: 0.49,0.48,0.45"
        ) from None


def parse_bits(text: str) -> int | dict[str, int]:
    """Read how many bits weights get.

    Args:
        text: '4', or '*=4,fc1.*=2'.

    Returns:
        4, or {'*': 4, 'fc1.*': 2}.

    Raises:
        OptionError: if it is neither.
    """
    if text.strip().isdecimal():
        return int(text)
    found = {}
    for part in text.split(","):
        pattern, _, bits = part.rpartition("=")
        if not (pattern.strip() and bits.strip().isdecimal()):
            raise OptionError(
                f"--bits '{text}' is neither a number nor a list of pattern=bits: write 4, or"
                " '*=4,fc1.*=2'"
            )
        found[pattern.strip()] = int(bits)
    return found


def parse_names(text: str | None) -> tuple[str, ...]:
    """Read names with commas between them.

    Args:
        text: 'cat, dog', or None.

    Returns:
        ('cat', 'dog'); () for None.
    """
    if not text:
        return ()
    return tuple(part.strip() for part in text.split(","))
