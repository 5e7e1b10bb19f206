"""Count what files take on the wire, where a server compresses what it sends with brotli.

A packed file is compressed already, and gains little; what it replaces may gain much.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# Bytes up to which files are compressed as well as brotli can, which takes 2 s a megabyte; larger
# ones take its last quality but two, at 20 MB/s, and the largest are not measured.
BEST_UP_TO = 4 << 20
MEASURED_UP_TO = 64 << 20
BEST, FASTER = 11, 9


@dataclass(frozen=True)
class WireSizes:
    """Bytes of files under brotli.

    Attributes:
        written: Of the file that was written; None where it was not measured.
        original: Of the file that it replaces; None where there is none, or it was not measured.
    """

    written: int | None = None
    original: int | None = None

    @property
    def sentences(self) -> tuple[str, ...]:
        """What a user should know of it: one sentence, or none."""
        if self.written is None:
            return ()
        if self.original is None:
            return (f"under brotli it takes {self.written:,} bytes",)
        sentence = f"under brotli it takes {self.written:,} bytes, the original {self.original:,}"
        if self.written > self.original:
            sentence += (
                ": where a server compresses files, the original is the smaller one on the wire"
            )
        return (sentence,)


NOT_MEASURED = WireSizes()


def measure_wire(written: Path, original: Path | None = None) -> WireSizes:
    """Count the bytes of files under brotli.

    Args:
        written: a file that was written.
        original: what it replaces, if anything.

    Returns:
        Nothing measured without the library, or where the written file is larger than
        MEASURED_UP_TO bytes.
    """
    if written.stat().st_size > MEASURED_UP_TO:
        return NOT_MEASURED
    return WireSizes(
        written=_count_compressed(written),
        original=None if original is None else _count_compressed(original),
    )


def _count_compressed(path: Path) -> int | None:
    brotli = _import_brotli()
    if brotli is None or path.stat().st_size > MEASURED_UP_TO:
        return None
    content = path.read_bytes()
    quality = BEST if len(content) <= BEST_UP_TO else FASTER
    return len(brotli.compress(content, quality=quality, lgwin=24))


def _import_brotli() -> ModuleType | None:
    """The library, if it is installed: it is an optional extra."""
    try:
        return importlib.import_module("brotli")
    except ImportError:
        return None
