"""What all commands share: errors as one sentence and an exit status, progress bars, JSON."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecqx_onnx.cli.terminal import escape, escape_report, guard, make_strict_json, stderr, stdout

app = typer.Typer(
    name="ecqx-onnx",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A PyTorch model in, a tiny ONNX file out: 2-5 bit sparse weights that stock onnxruntime runs, "
    "and proof that it still says the same.\n\n"
    "[bold]quantize[/] trains, [bold]convert[/] writes the .onnx, [bold]validate[/] proves it, [bold]inspect[/] looks inside, "
    "[bold]demo[/] shows all of it.",
)
device_app = typer.Typer(
    no_args_is_help=True,
    help="The devices that `validate --device` can use: which are ready, and setup.",
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace the output file if it exists.")]

TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Unpickle MODEL. This runs its author's code.")
]


def register_command(function: Callable[..., Any]) -> Callable[..., Any]:
    """Registers a guarded command of `ecqx-onnx` itself."""
    return app.command()(guard(refuse_json_and_output(function)))


def refuse_json_and_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command that keeps stdout to the JSON, where that is asked for."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with keep_stdout_for_json() if kwargs.get("as_json") else contextlib.nullcontext():
            function(*args, **kwargs)

    return run


@app.callback(invoke_without_command=True)
def print_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from ecqx_onnx import __version__

        print(f"ecqx-onnx {__version__}")
        raise typer.Exit


@contextlib.contextmanager
def show_progress(silent: bool) -> Iterator[Callable[..., None] | None]:
    """A bar on stderr, fed with (done, total, text); None where nobody wants to see one."""
    if silent or not stderr.is_terminal:  # in a log, a bar is nothing but an empty line
        yield None
        return
    text_column = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(text_column, *columns, console=stderr, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, description=escape(text) or None)

        yield show


_json_file: ContextVar[TextIO] = ContextVar("_json_file")


@contextlib.contextmanager
def keep_stdout_for_json() -> Iterator[None]:
    """Whatever else prints, the user's own code for one, prints to stderr."""
    token = _json_file.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_file.reset(token)


def emit(result: Any, *, as_json: bool, quiet: bool) -> None:
    """Any report of ours, as JSON or as a table, or not at all."""
    from ecqx_onnx.cli.tables import as_table, to_json
    from ecqx_onnx.errors import FileError

    file = _json_file.get(sys.stdout)
    try:
        if as_json:
            print(
                json.dumps(make_strict_json(to_json(result)), indent=2, allow_nan=False),
                file=file,
                flush=True,
            )
        elif not quiet:
            stdout.print(as_table(escape_report(result)))
    except OSError as error:
        if error.errno == errno.EPIPE:  # `| head` has seen enough
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), file.fileno()
        )  # what is left in the buffer can't be written either
        raise FileError(
            f"the result can't be written to standard output: {error.strerror}; what it tells of is done"
        ) from error
