"""Run a runner's command to its end, or stop it and all its children and say why."""

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
    """Run a command and listen to how far it is.

    The runner tells it as lines `3/40`: on its error stream if its output goes to `stdout`, else on
    either.

    Args:
        device: Its name, for messages.
        command: Program and arguments.
        time_limit: Seconds until it is stopped.
        progress: Called with (batches done, batches in all).
        environment: Variables besides those of this process.
        stdin: What it reads; nothing by default.
        stdout: Where its output goes; by default it is listened to.

    Raises:
        InputError: The command is missing, dies, or is not done in time.
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
        if process.returncode < 0:
            how = f"signal {-process.returncode}"
        else:
            how = f"exit status {process.returncode}"
        raise InputError(f"{device}: the runner died ({how}): {_find_last_words(said)}")


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop a process and all that it started.

    Args:
        process: Started in a session of its own.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows, where its children cannot be reached by a session
            process.kill()
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
