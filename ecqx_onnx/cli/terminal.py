"""Make text from files harmless on a terminal, and end every command in a sentence and a status.

Names in files may hold escape sequences, line breaks, or characters that turn the direction of
writing. Reports and errors pass through `escape_report` before they are laid out, and nothing is
read as markup.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import os
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from rich.console import Console

from ecqx_onnx.errors import EcqxError, FileError, InputError, explain_missing_package
from ecqx_onnx.inputs.reading import check_name, check_regular, check_there, make_file_error
from ecqx_onnx.rendering.weights import show_all_rows

INTERRUPTED = 130  # 128 + SIGINT
UNFORESEEN = 70  # EX_SOFTWARE of sysexits.h
LONGEST_CELL = 1000  # characters of a name in a table
LONGEST_SENTENCE = 4000  # characters of an error
# Control (Cc), format (Cf: bidirectional overrides, zero-width), surrogate (Cs), line and paragraph
# separators (Zl, Zp).
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
INPUTS = (
    "model",
    "onnx_file",
    "against",
    "inputs",
    "file",
    "weights",
    "data",
    "calibration",
    "recipe",
)
OUTPUTS = ("out", "folder")
NO_MEMORY = ("can't allocate memory", "bad_alloc", "bad allocation", "unable to allocate")

stdout = Console(markup=False, emoji=False)
stderr = Console(stderr=True, markup=False, emoji=False)

Debug = Annotated[
    bool,
    typer.Option(
        "--debug", hidden=True, help="Show the traceback of an error that nobody foresaw."
    ),
]


LIST_WEIGHTS = ("quantize", "convert", "inspect", "pack", "unpack")
AllWeights = Annotated[
    bool,
    typer.Option(
        "--all", help="Show every weight; by default more than 20 are grouped by their names."
    ),
]


def escape(text: str, *, most: int = LONGEST_CELL) -> str:
    """Make every character visible.

    Args:
        text: from a file, a folder or a message about one.
        most: characters that are kept; what is beyond is counted instead.

    Returns:
        One line, without control characters, invisible ones and halves of surrogate pairs; these
        are written as Python writes them: `\\x1b`, `\\u202e`.
    """
    left_out = len(text) - most
    if left_out > 0:
        text = text[:most]
    if not text.isprintable():
        text = "".join(map(_show_character, text))
    return f"{text}… ({left_out} more characters)" if left_out > 0 else text


def _show_character(character: str) -> str:
    """The character, or the escape that Python writes for it."""
    if character in SHORT:
        return SHORT[character]
    if unicodedata.category(character) not in INVISIBLE:
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escape_report(value: Any) -> Any:
    """Escape every text in a report.

    Args:
        value: a dataclass, collection, path, text, or anything else, which stays as it is.

    Returns:
        The same value if nothing in it needs escaping, else a copy.
    """
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, PurePath):
        text = escape(str(value), most=sys.maxsize)
        return value if text == str(value) else type(value)(text)
    if isinstance(value, Mapping):
        return {escape_report(key): escape_report(entry) for key, entry in value.items()}
    if type(value) in (tuple, list, set, frozenset):
        return type(value)(escape_report(entry) for entry in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _escape_fields(value)
    return value


def _escape_fields(report: Any) -> Any:
    """A copy of the dataclass whose fields are escaped."""
    changed = copy.copy(report)
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        object.__setattr__(changed, field.name, escape_report(value))  # reports are frozen
    return changed


def make_strict_json(value: Any) -> Any:
    """Make plain values that every JSON parser reads.

    There is no NaN in them, no infinity, and no half of a surrogate pair.

    Args:
        value: dicts, lists, numbers, texts.

    Returns:
        The same with None for numbers that are not finite, and such halves written as `\\udcff`.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        found = {}
        for key, entry in value.items():
            name = make_strict_json(key) if isinstance(key, str) else key
            found[name] = make_strict_json(entry)
        return found
    if isinstance(value, list | tuple):
        return [make_strict_json(entry) for entry in value]
    return value


def print_error(message: str) -> None:
    """Print an error as one line on stderr, whatever the message holds.

    Args:
        message: one sentence, not yet escaped.
    """
    process = f" of process {process_number()}" if process_number() else ""
    line = escape(message.strip(), most=LONGEST_SENTENCE)
    stderr.print(f"error{process}:", line, style="red", highlight=False, soft_wrap=True)


def process_number() -> int:
    """Look up which of torchrun's processes this is: the first one speaks for all.

    Returns:
        Its rank; 0 without torchrun.
    """
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def turn_errors_into_exit(doing: str, *, debug: bool = False) -> Iterator[None]:
    """End the command with one sentence on stderr and an exit status, whatever is raised inside.

    Args:
        doing: what is being done, for the sentence about what nobody foresaw.
        debug: print the traceback too.

    Yields:
        Nothing.

    Raises:
        typer.Exit: with the exit status, if anything was raised.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except EcqxError as error:
        print_error(str(error))
        status = error.exit_status
    except KeyboardInterrupt:
        stderr.print("stopped", style="red")
        status = INTERRUPTED
    except OSError as error:
        print_error(str(make_file_error(error)))
        status = FileError.exit_status
    except ImportError as error:
        missing = explain_missing_package(error, doing)
        if debug:
            traceback.print_exc(file=_EscapedFile())
        print_error(str(missing or _describe_unforeseen(doing, error, debug=debug)))
        status = UNFORESEEN if missing is None else missing.exit_status
    except Exception as error:  # the net: what arrives here is a defect of ours
        if debug:
            traceback.print_exc(file=_EscapedFile())
        print_error(_describe_unforeseen(doing, error, debug=debug))
        status = InputError.exit_status if _is_out_of_memory(error) else UNFORESEEN
    else:
        return
    raise typer.Exit(status) from None


def _describe_unforeseen(doing: str, error: Exception, *, debug: bool) -> str:
    """One sentence about a defect of ours, or about a machine that is too small."""
    message = escape(str(error), most=300)
    if _is_out_of_memory(error):
        return f"memory ran out during {doing}; close other programs, or use a machine with more"
    where = "" if debug else "--debug shows where; "
    return (
        f"{doing} failed in a way that nobody foresaw ({type(error).__name__}: {message});"
        f" {where}please report it as docs/security.md says; nothing was left behind"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the machine is too small for what was given: nothing that nobody foresaw."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY)


class _EscapedFile:
    """stderr for tracebacks, whose last line may hold text from a file."""

    def write(self, text: str) -> None:
        lines = text.split("\n")
        sys.stderr.write("\n".join(escape(line, most=LONGEST_SENTENCE) for line in lines))


def guard(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command end in words, and give it the option --debug.

    Args:
        function: the command, as typer takes it.

    Returns:
        The same with one more parameter (see `turn_errors_into_exit`), and --all where weights
        are listed.
    """
    name = function.__name__.replace("_", " ")

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, all_weights: bool = False, **kwargs: Any) -> None:
        doing = _describe_command(name, kwargs)
        with show_all_rows(all_weights), turn_errors_into_exit(doing, debug=debug):
            for parameter in (*INPUTS, *OUTPUTS):
                value = kwargs.get(parameter)
                if isinstance(value, str | Path):
                    check_name(value)
            for parameter in INPUTS:
                value = kwargs.get(parameter)
                if isinstance(value, str | Path):
                    check_regular(value)
                    if _is_in_the_way(kwargs):  # that comes after what is to be read
                        check_there(value)
            function(*args, **kwargs)

    # typer does not evaluate what is set below.
    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter(
        "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
    )
    parameters = [*signature.parameters.values(), option]
    if name in LIST_WEIGHTS:
        every = inspect.Parameter(
            "all_weights", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AllWeights
        )
        parameters.append(every)
    for parameter in parameters:
        for about in getattr(parameter.annotation, "__metadata__", ()):
            about.readable = False  # typer would show a file without permission in a box of usage
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _is_in_the_way(arguments: Mapping[str, Any]) -> bool:
    """An output exists, and nobody allowed to replace it."""
    outputs = [arguments[name] for name in OUTPUTS if arguments.get(name) is not None]
    return not arguments.get("force") and any(map(os.path.lexists, outputs))


def _describe_command(name: str, arguments: Mapping[str, Any]) -> str:
    """'inspect of model.onnx'"""
    for parameter in INPUTS:
        if arguments.get(parameter) is not None:
            return f"{name} of '{arguments[parameter]}'"
    return name


def write_what_cannot_be_encoded_as_escapes() -> None:
    """Write escapes for characters that a terminal of another encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
