"""An audit hook that sees whether anything of a hostile file is unpickled, compiled or run.

Planted text holds PLANTED(...), planted pickles open a file with MARKER in its name.
"""

import contextlib
import io
import sys

import torch

CALL = "__import__('builtins').PLANTED('x')"
_SEEN: list[list[str]] = []


class Evil:
    """Its pickle opens a marker file for writing."""

    def __reduce__(self):
        return (open, ("/tmp/MARKER", "w"))


def torch_pickle(*, legacy=False):
    """What torch.save writes of a dict with an Evil in it."""
    buffer = io.BytesIO()
    document = {"state_dict": {"weight": Evil()}}
    torch.save(document, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _watch(event, arguments):
    if not _SEEN:
        return
    if event == "pickle.find_class":
        _SEEN[-1].append(f"unpickled {arguments}")
    if event == "compile" and "PLANTED(" in str(arguments[0]):
        _SEEN[-1].append(f"compiled {arguments[0]!r}")
    if event in ("os.system", "ctypes.dlopen"):
        _SEEN[-1].append(f"{event} {arguments}")
    if event == "open" and "MARKER" in str(arguments[0]):
        _SEEN[-1].append(f"opened {arguments[0]}")


sys.addaudithook(_watch)  # stays for good, and does nothing outside of `nothing_runs`


@contextlib.contextmanager
def nothing_runs():
    """AssertionError at the end if anything planted was built, compiled or opened inside."""
    seen = []
    _SEEN.append(seen)
    try:
        yield
    finally:
        _SEEN.pop()
    assert not seen, "; ".join(seen)
