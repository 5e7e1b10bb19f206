"""A runner's command -> it ran to its end, or it and its children are gone and one sentence says why."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from ecqx_onnx.errors import InputError

Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""

AT = re.compile(r"(\d+)/(\d+)")


def supervise(
    device: str,
    command: Sequence[str],
    *,
    time_limit: float,
    progress: Progress | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: IO[bytes] | None = None,
    stdout: IO[bytes] | None = None,
) -> None:
    """The runner tells how far it is, as lines `3/40`, on its error stream if its output goes to `stdout`, else on either.

    InputError if the command is missing, dies, or is not done after `time_limit` seconds.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.PIPE if stdout else subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # so that its children can be stopped with it
        )
    except OSError as error:
        raise InputError(f"{device}: '{command[0]}' cannot be started ({error.strerror})") from None
    said: deque[str] = deque(maxlen=20)
    stream = process.stderr if stdout else process.stdout
    assert stream is not None
    listener = threading.Thread(target=_listen, args=(stream, said, progress), daemon=True)
    listener.start()
    try:
        process.wait(time_limit)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{device}: the runner was stopped, as it had not finished after {time_limit:g} s"
        ) from None
    finally:
        stop(process)
        listener.join(5)
    if process.returncode:
        how = (
            f"signal {-process.returncode}"
            if process.returncode < 0
            else f"exit status {process.returncode}"
        )
        raise InputError(f"{device}: the runner died ({how}): {_find_last_words(said)}")


def stop(process: subprocess.Popen[Any]) -> None:
    """The process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _find_last_words(said: Sequence[str]) -> str:
    """The last line that was said, which is where interpreters put the reason."""
    return said[-1][:300] if said else "it said nothing"


def _listen(stream: IO[bytes], said: deque[str], progress: Progress | None) -> None:
    with stream:
        for raw in stream:
            line = raw.decode("utf-8", "replace").strip()
            at = AT.fullmatch(line)
            if at and progress:
                progress(int(at[1]), int(at[2]))
            elif line and not at:
                said.append(line)
