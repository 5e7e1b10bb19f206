"""Inputs that once broke a reader, or that tell readers apart, are read again."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.worker import find_readers, peak_memory, read_once, reset_peak

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SECONDS = 30
MEMORY = 2 * 10**9  # bytes, resident
ROOM = 6 * 2**30  # bytes of address space beyond what the process has
READERS = find_readers()
INPUTS = [file for name in sorted(READERS) for file in sorted((CORPUS / name).glob("*"))]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Time and address space are bounded inside."""
    claimed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (claimed + ROOM, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are set as Linux does it")
@pytest.mark.parametrize("file", INPUTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_an_input_that_once_did_harm_ends_in_a_result_or_a_sentence(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = READERS[file.parent.name]
    path = Path(shutil.copy(file, tmp_path / f"input{getattr(reader, 'SUFFIX', '.bin')}"))
    with limited():
        reset_peak()
        before = peak_memory()
        outcome, where, text = read_once(reader, path)
    assert outcome in ("read", "refused"), f"{where}\n{text}"
    assert peak_memory() - before < MEMORY


def test_every_reader_has_the_parts_that_the_harness_needs():
    for name, reader in READERS.items():
        assert name == reader.NAME
        assert callable(reader.make_seeds)
        assert callable(reader.read)
