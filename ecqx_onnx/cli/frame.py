"""What all commands share: how they are registered, progress bars, tables and JSON on stdout.

Exit status: 0 all well; 1 a check failed; 2 bad input; 70 a defect of ours; 130 interrupted;
128 + signal: stopped by it.
Imports of what is heavy are inside the commands, so that --help is instant.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from ecqx_onnx.cli.terminal import (
    escape,
    escape_report,
    guard,
    make_strict_json,
    stderr,
    stdout,
    write_what_cannot_be_encoded_as_escapes,
)

app = typer.Typer(
    name="ecqx-onnx",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A PyTorch model in, a tiny ONNX file out: 2-5 bit sparse weights that stock onnxruntime"
    " runs, and proof that it still says the same.\n\n"
    "[bold]quantize[/] trains, [bold]convert[/] writes the .onnx, [bold]validate[/] proves it,"
    " [bold]inspect[/] looks inside, [bold]demo[/] shows all of it, [bold]doctor[/] says what is"
    " missing.",
)
device_app = typer.Typer(
    no_args_is_help=True,
    help="The devices that `validate --device` can use: which are ready, and setup.",
)
app.add_typer(device_app, name="device")


def main() -> None:
    """Entry point of the ecqx-onnx command."""
    for name in ("SIGTERM", "SIGHUP"):  # so that what was started is cleaned up
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    write_what_cannot_be_encoded_as_escapes()
    app()


def register_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a guarded command of `ecqx-onnx` itself.

    Args:
        function: the command, as typer takes it; its name is the command's.

    Returns:
        The same, guarded: it ends in words, and keeps stdout to the JSON.
    """
    return app.command()(guard(refuse_json_and_output(function)))


def refuse_json_and_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command keep stdout to the JSON, where that is asked for.

    Args:
        function: the command; with as_json=True nothing but JSON may reach stdout.

    Returns:
        The same command.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with keep_stdout_for_json() if kwargs.get("as_json") else contextlib.nullcontext():
            function(*args, **kwargs)

    return run


@app.callback(invoke_without_command=True)
def _print_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:  # a docstring would take the place of the help above
    if version:
        from ecqx_onnx import __version__

        print(f"ecqx-onnx {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def show_progress(silent: bool, first: str = "") -> Iterator[Callable[..., None] | None]:
    """Show a bar on stderr while something runs: it moves, and says what is done, all the time.

    Args:
        silent: show nothing.
        first: what is done until the first report.

    Yields:
        A function of (done, total, text) that moves the bar; None where nobody wants to see one.
    """
    if silent or not stderr.is_terminal:  # in a log, a bar is nothing but an empty line
        yield None
        return
    columns = (
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        TimeRemainingColumn(compact=True),
        # The last column, as it alone is cut where the terminal is narrow.
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
    )
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(escape(first) or "starting", total=None)

        def show(done: int, total: int, text: str = "") -> None:
            nonlocal task
            description = escape(text) or None
            if done >= total:  # what goes on now, such as writing the file, has no known length
                last = bar.tasks[0].description
                bar.remove_task(task)
                task = bar.add_task(description or last, total=None)
            else:
                bar.update(task, completed=done, total=total, description=description)

        yield show


_json_file: ContextVar[TextIO] = ContextVar("_json_file")


@contextlib.contextmanager
def keep_stdout_for_json() -> Iterator[None]:
    """Send to stderr whatever else prints, the user's own code for one.

    Yields:
        Nothing; inside, `print_json` alone reaches stdout.
    """
    token = _json_file.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_file.reset(token)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout.

    Args:
        value: dicts, lists, numbers, texts.
    """
    text = json.dumps(make_strict_json(value), indent=2, allow_nan=False)
    print(text, file=_json_file.get(sys.stdout), flush=True)


def suggest(*arguments: object, as_json: bool, quiet: bool) -> None:
    """Say which command one would type next.

    Args:
        arguments: of `ecqx-onnx`; what the user has to fill in is in capitals.
        as_json: then nothing is said.
        quiet: likewise.
    """
    if as_json or quiet:
        return
    words = []
    for argument in arguments:
        text = str(argument)
        words.append(text if text.isupper() else shlex.quote(text))
    line = escape(f"next: ecqx-onnx {' '.join(words)}")
    stdout.print(line, style="dim", soft_wrap=True, highlight=False)


def emit(result: Any, *, as_json: bool, quiet: bool) -> None:
    """Show any report of ours.

    Args:
        result: the report.
        as_json: as JSON instead of a table.
        quiet: not at all; JSON that is asked for is printed all the same.

    Raises:
        FileError: if standard output can't be written.
    """
    from ecqx_onnx.cli.tables import as_table, to_json
    from ecqx_onnx.errors import FileError

    try:
        if as_json:
            print_json(to_json(result))
        elif not quiet:
            stdout.print(as_table(escape_report(result)))
    except OSError as error:
        if error.errno == errno.EPIPE:  # `| head` has seen enough
            raise
        # What is left in the buffer can't be written either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _json_file.get(sys.stdout).fileno())
        raise FileError(
            f"the result can't be written to standard output: {error.strerror}; what it tells of is"
            " done"
        ) from error
