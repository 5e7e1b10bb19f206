"""Ends runs and loads of onnxruntime that take longer than any real model needs.

A file of 200 bytes can ask for a loop of 2^62 steps. onnxruntime looks between two operators, and
in each step of a loop, whether it is to stop: one thread of ours tells it so when the time is over.
A single operator is not interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator

from ecqx_onnx.errors import ModelError

LONGEST_RUN = 300.0  # seconds of one batch; a large network needs some tens
LONGEST_LOAD = 600.0  # seconds of one session
PERIOD = 0.25  # seconds between two looks


class _Watchdog:
    """One thread for all runs that are going on; it ends when there is none.

    A timer for each run would cost more than the run of a small network.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys = itertools.count()
        self._pending: dict[int, tuple[float, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None

    def add(self, seconds: float, stop: Callable[[], None]) -> int:
        """Have `stop` called once the seconds are over; the key takes it back."""
        key = next(self._keys)
        with self._lock:
            self._pending[key] = (time.monotonic() + seconds, stop)
            # In a process that was forked since, the thread is not alive.
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, daemon=True)
                self._thread.start()
        return key

    def remove(self, key: int) -> bool:
        """Whether the time was not over yet."""
        with self._lock:
            return self._pending.pop(key, None) is not None

    def _watch(self) -> None:
        while True:
            time.sleep(PERIOD)
            with self._lock:
                if not self._pending:
                    self._thread = None
                    return
                now = time.monotonic()
                over = [key for key, (end, _) in self._pending.items() if end <= now]
                stops = [self._pending.pop(key)[1] for key in over]
            for stop in stops:
                stop()


_WATCHDOG = _Watchdog()


@contextlib.contextmanager
def limit_time(what: str, seconds: float, stop: Callable[[], None]) -> Iterator[None]:
    """Stop what runs inside after some time.

    Args:
        what: what it does, for the sentence: "running the model".
        seconds: how long it may take.
        stop: makes it raise an error soon; called from another thread, at most once.

    Yields:
        Nothing; what runs inside the block is watched.

    Raises:
        ModelError: if it was stopped, in place of whatever error it raised then.
    """
    key = _WATCHDOG.add(seconds, stop)
    over = False
    try:
        yield
    except Exception:
        over = not _WATCHDOG.remove(key)
        if not over:
            raise
    else:
        _WATCHDOG.remove(key)  # done at the last moment is done
    if over:
        raise ModelError(
            f"{what} took more than {seconds:g} seconds and was stopped; check the model for loops"
            " that do not end, or give smaller batches"
        )
