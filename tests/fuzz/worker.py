"""The process that reads hostile inputs: one line of JSON on stdout before and after each input.

    python -m tests.fuzz.worker READER FOLDER SEED FIRST

It goes on until it is stopped. The input lies in FOLDER while it is read, and a copy of one that
failed stays there, so that the parent can keep it whatever happens here.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import pkgutil
import random
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from ecqx_onnx.errors import EcqxError
from tests.fuzz import mutation

ADDRESS_SPACE = 6 * 2**30  # bytes, as `ulimit -v 6291456`
SECONDS_EACH = 30.0  # that one input may take
MEMORY_EACH = 2 * 10**9  # bytes of resident memory while it is read
LARGEST_FILE = 2**30  # bytes that a reader may write into one file
PLACES = ("ecqx_onnx", "ecqx_onnx_converters")


def find_readers() -> dict[str, ModuleType]:
    """The modules of `readers/` by their NAME."""
    import tests.fuzz.readers as package

    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules}


def input_path(reader: ModuleType, folder: Path) -> Path:
    """Where the input that is being read lies."""
    return folder / f"input{getattr(reader, 'SUFFIX', '.bin')}"


def kept_path(reader: ModuleType, folder: Path, number: int) -> Path:
    """Where a copy of an input lies that failed."""
    return input_path(reader, folder).with_stem(f"failed-{number}")


def make_input(reader: ModuleType, seeds: list[bytes], seed: int, number: int) -> bytes:
    """Input `number` of this reader: the seeds themselves first, then mutations."""
    if number < len(seeds):
        return seeds[number]
    source = random.Random(f"{seed} {reader.NAME} {number}")
    change = getattr(reader, "mutate", mutation.mutate)
    return change(source.choice(seeds), source)[: mutation.LARGEST_INPUT]


def read_once(reader: ModuleType, path: Path) -> tuple[str, str, str]:
    """(outcome, where, text): outcome is "read", "refused" or "failed"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
    except EcqxError as error:
        text = str(error)
        if error.exit_status not in (1, 2):
            return "failed", f"status {error.exit_status}", text
        return "refused", "", text[:300]
    except BaseException as error:  # the very thing that is looked for
        text = "".join(traceback.format_exception(error, limit=-12))
        return "failed", f"{type(error).__name__} {_place(error)}", text[-4000:]
    return "read", "", ""


def _place(error: BaseException) -> str:
    """The last line of ours that the exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(f"/{place}/" in frame.filename for place in PLACES)]
    frame = (ours or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def reset_peak() -> None:
    """Makes the kernel forget the highest resident memory so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux: the peak is of the whole process then


def peak_memory() -> int:
    """Bytes of resident memory at the highest since `reset_peak`."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Reads input after input of one reader."""
    name, folder, seed, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    faulthandler.enable()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a reader prints goes elsewhere
    reader = find_readers()[name]
    seeds = reader.make_seeds()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)

    def say(**line: Any) -> None:
        channel.write(json.dumps(line) + "\n")
        channel.flush()

    path, number = input_path(reader, folder), first
    while True:
        content = make_input(reader, seeds, seed, number)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        reset_peak()
        say(begin=number)
        started = time.monotonic()
        outcome, where, text = read_once(reader, path)
        if outcome != "read" and number < len(seeds):
            outcome, where = "failed", f"a valid input is {outcome}"
        took, peak = time.monotonic() - started, peak_memory()
        if peak > MEMORY_EACH:
            outcome, where = "failed", "more than 2 GB of resident memory"
        elif took > SECONDS_EACH:
            outcome, where = "failed", "more than 30 s"
        if outcome == "failed":
            kept_path(reader, folder, number).write_bytes(content)
        say(end=number, outcome=outcome, where=where, text=text, took=took, peak=peak)
        number += 1


if __name__ == "__main__":
    main()
