"""A path to write -> the file whole, or nothing: written beside the target, renamed when complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ecqx_onnx.errors import FileError


@contextmanager
def new_file(path: str | Path, *, force: bool) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    FileError if `path` exists (without force), its folder does not, or the disk refuses.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files for the owner only
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error}); free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def refuse_existing(path: Path, *, force: bool) -> None:
    """FileError if something is in the way. Called before long work too, so that it does not end in a refusal."""
    if path.is_dir():
        raise FileError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileError(f"{path}: the folder {path.parent} does not exist; create it first")
    if path.exists() and not force:
        raise FileError(f"{path}: exists already; use --force to replace it")
