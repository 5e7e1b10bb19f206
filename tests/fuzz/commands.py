"""A command line -> our command in this process; its refusal as an error, anything worse as a
failure."""

from __future__ import annotations

import traceback
from typing import Any

from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.errors import CheckFailed, EcqxError, InputError


class BadEnd(Exception):  # noqa: N818 - what a fuzzer looks for
    """A command ended as no command should."""


def run_command(*arguments: Any) -> str:
    """stdout of `ecqx-onnx ARGUMENTS`.

    Raises:
        InputError: it ended with status 2. CheckFailed: with status 1.
        BadEnd: it ended with any other status, with a traceback, or in more lines than one.
    """
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = result.exception
    if error is not None and not isinstance(error, SystemExit | EcqxError):
        frames = "".join(traceback.format_exception(error))
        raise BadEnd(f"{type(error).__name__}: {str(error)[:200]}\n{frames}") from error
    if result.exit_code == 0:
        return result.stdout
    said = result.stderr.strip()
    if result.exit_code not in (1, 2) or "Traceback" in said or "\n" in said:
        raise BadEnd(f"status {result.exit_code}: {said[-2000:]}")
    if result.exit_code == 1:
        raise CheckFailed(said)
    raise InputError(said)
