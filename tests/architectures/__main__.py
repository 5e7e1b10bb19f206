"""`python -m tests.architectures [PATTERN ...]`: try them and print the table in Markdown."""

from __future__ import annotations

import sys
import tempfile
import traceback
from fnmatch import fnmatch
from pathlib import Path

import torch

from tests.architectures.catalogue import ENTRIES
from tests.architectures.trial import HEADING, Row, try_entry, write_row


def main(patterns: list[str]) -> int:
    """Print each row as it comes."""
    torch.set_num_threads(1)
    print(HEADING, flush=True)
    rows = []
    for entry in ENTRIES:
        if patterns and not any(fnmatch(entry.name, pattern) for pattern in patterns):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = try_entry(entry, Path(folder))
            except Exception as error:
                traceback.print_exc()
                row = Row(entry.name, entry.family, trouble=(f"TRACEBACK {error!r:.200}",))
        rows.append(row)
        print(write_row(row), flush=True)
    good = sum(not row.trouble for row in rows)
    print(f"\n{len(rows)} architectures: {good} ok, {len(rows) - good} not")
    return int(good < len(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
