"""Reads hostile inputs for a while, reader by reader, and tells which of them ended badly."""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from tests.fuzz.worker import MEMORY_EACH, SECONDS_EACH, find_readers, input_path, kept_path

START = 300.0  # seconds until a worker has its imports and seeds
KEPT = 30  # inputs kept of one reader; the same failure is kept once
FOUND = Path(__file__).parent / "found"
ROOT = Path(__file__).parents[2]


@dataclass
class Score:
    """What became of one reader's inputs."""

    name: str
    inputs: int = 0
    refused: int = 0
    read: int = 0
    failures: int = 0
    slowest: float = 0.0
    peak: int = 0
    kinds: dict[str, int] = field(default_factory=dict)


def main() -> int:
    """Returns the exit status: 1 if any input failed."""
    readers = find_readers()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other mutations")
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(readers))
    options = parser.parse_args()
    if unknown := [name for name in options.readers if name not in readers]:
        parser.error(f"there is no reader '{unknown[0]}'; there are {', '.join(readers)}")
    scores = []
    for name in options.readers or readers:
        score = fuzz(readers[name], seconds=options.seconds, seed=options.seed)
        scores.append(score)
        print_row(score, heading=len(scores) == 1)
    failures = sum(score.failures for score in scores)
    print(f"{sum(score.inputs for score in scores)} inputs, {failures} failures")
    if failures:
        print(f"the inputs that failed lie in {FOUND}")
    return 1 if failures else 0


def print_row(score: Score, *, heading: bool) -> None:
    """One line of the table, and one for each kind of failure."""
    if heading:
        print(
            f"{'reader':<16}{'inputs':>8}{'refused':>9}{'read':>8}{'failures':>10}{'slowest':>10}{'memory':>9}"
        )
    counts = f"{score.inputs:>8}{score.refused:>9}{score.read:>8}{score.failures:>10}"
    print(f"{score.name:<16}{counts}{score.slowest:>8.1f} s{score.peak / 1e6:>6.0f} MB", flush=True)
    for kind, count in sorted(score.kinds.items()):
        print(f"    {count} x {kind}", flush=True)


def fuzz(reader: ModuleType, *, seconds: float, seed: int) -> Score:
    """One reader for `seconds`, in processes that are replaced when they die."""
    score, first = Score(reader.NAME), 0
    folder = Path(tempfile.mkdtemp(prefix="ecqx-fuzz-"))
    try:
        remaining = seconds
        while remaining > 0:
            first, spent = _one_process(reader, folder, seed, first, remaining, score)
            remaining -= max(spent, 0.5)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return score


def _one_process(
    reader: ModuleType, folder: Path, seed: int, first: int, seconds: float, score: Score
) -> tuple[int, float]:
    """(number of the next input, seconds spent reading)."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.worker",
        reader.NAME,
        str(folder),
        str(seed),
        str(first),
    ]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    log = (folder.parent / f"{folder.name}.log").open("w+b")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=ROOT,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    pending, number, reading = b"", first, False
    began = time.monotonic()
    deadline, started = began + START, 0.0
    trouble = ""
    try:
        while not trouble:
            now = time.monotonic()
            if started and now - started > seconds and not reading:
                break
            if started and now - started > seconds + SECONDS_EACH:
                break
            if now > deadline:
                trouble = "more than 30 s" if reading else "the worker does not start"
            elif reading and _resident(process.pid) > MEMORY_EACH:
                trouble = "more than 2 GB of resident memory"
            elif selector.select(0.1):
                chunk = process.stdout.read()
                if not chunk:
                    trouble = f"the process died ({process.wait()})"
                pending += chunk or b""
            *lines, pending = pending.split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "begin" in said:
                    started = started or time.monotonic()
                    number, reading = said["begin"], True
                    deadline = time.monotonic() + SECONDS_EACH
                else:
                    number, reading = said["end"] + 1, False
                    deadline = time.monotonic() + START
                    _count(reader, folder, seed, score, said)
        if trouble:
            log.seek(0)
            last = log.read()[-2000:].decode("utf-8", "replace")
            _fail(input_path(reader, folder), reader, seed, number, score, trouble, last)
            score.inputs += 1
            number += 1
    finally:
        process.kill()
        process.wait()
        log.close()
        Path(log.name).unlink(missing_ok=True)
    return number, time.monotonic() - (started or began)


def _count(reader: ModuleType, folder: Path, seed: int, score: Score, said: dict) -> None:
    """One input is done, and its file may hold the next one by now."""
    score.inputs += 1
    score.slowest = max(score.slowest, said["took"])
    score.peak = max(score.peak, said["peak"])
    if said["outcome"] == "failed":
        file = kept_path(reader, folder, said["end"])
        _fail(file, reader, seed, said["end"], score, said["where"], said["text"])
        file.unlink()
    elif said["outcome"] == "refused":
        score.refused += 1
    else:
        score.read += 1


def _fail(
    file: Path, reader: ModuleType, seed: int, number: int, score: Score, where: str, text: str
) -> None:
    """Counts the failure and keeps the first input of its kind."""
    score.failures += 1
    known = where in score.kinds
    score.kinds[where] = score.kinds.get(where, 0) + 1
    if known or len(score.kinds) > KEPT:
        return
    kept = FOUND / reader.NAME
    kept.mkdir(parents=True, exist_ok=True)
    if file.exists():  # else the worker died before its first input
        shutil.copyfile(file, kept / f"{seed}-{number}{file.suffix}")
    note = kept / f"{seed}-{number}.txt"
    note.write_text(f"{where}\n\n{text}", encoding="utf-8", errors="backslashreplace")


def _resident(process: int) -> int:
    """Bytes of resident memory of a process now; 0 where that cannot be told."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
