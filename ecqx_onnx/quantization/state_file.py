"""The state file of a training, OUT.training, from which an interrupted run is resumed.

The file lies under a name that anybody can guess, so it is opened without following links, and
read, replaced or removed only if it is a state that this program wrote. Nothing in it is unpickled
but tensors, numbers, strings, lists and dicts.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from ecqx_onnx_converters.graph.outputs import derive_path, remove_leftovers, replace_on_success

from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.torch_file import read_plain

FORMAT = "ecqx-onnx training state"
VERSION = 1
KEYS = {"setup", "model", "optimizer", "quantizer", "history", "best"}


def state_path(out: Path) -> Path:
    """Tell where the state of a training lies.

    Args:
        out: the checkpoint that the training writes.

    Returns:
        The state file's path, beside it.
    """
    return derive_path(out, ".training")


class StateFile:
    """The state file of one training."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._known: tuple[int, ...] | None = (
            None  # what we read or wrote last, told by its place on the disk
        )

    def load(self) -> dict[str, Any] | None:
        """Read the state.

        Returns:
            The state in the file; None if there is none.

        Raises:
            FileError: if something else is there: a link, a folder, a file damaged or not ours.
        """
        remove_leftovers(self.path)
        if not os.path.lexists(self.path):
            return None
        try:
            with _open(self.path) as file:
                self._known = _identify_file(os.fstat(file.fileno()))
                state = _read(self.path, file)
        except OSError as error:
            what = error.strerror or error
            raise FileError(
                f"cannot read the training state '{self.path}' ({what}): delete it to start anew"
            ) from error
        if isinstance(state, dict):
            found = (state.get("format", FORMAT), state.get("version", VERSION))
        else:
            found = None
        if found != (FORMAT, VERSION) or not set(state) >= KEYS:
            raise FileError(
                f"'{self.path}' is no training state of this ecqx-onnx: "
                "move it away, or delete it to start anew"
            )
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the state, whole or not at all.

        Args:
            state: tensors, numbers, strings, lists and dicts, with KEYS.

        Raises:
            FileError: it cannot be written, or something else is there.
        """
        self._refuse_others()
        try:
            with replace_on_success(self.path, force=True) as temporary:
                torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)
            self._known = _identify_file(os.lstat(self.path))
        except (OSError, RuntimeError, FileError) as error:
            raise FileError(
                f"cannot write the training state '{self.path}' ({error}): "
                "free some space or choose another place"
            ) from error

    def remove(self) -> None:
        """Remove the state, if there is one.

        Raises:
            FileError: something else is there.
        """
        self._refuse_others()
        self.path.unlink(missing_ok=True)

    def _refuse_others(self) -> None:
        try:
            known = _identify_file(os.lstat(self.path))
        except OSError:
            return
        if known != self._known:
            self.load()


def _identify_file(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _open(path: Path) -> BinaryIO:
    """OSError for links and whatever is no regular file."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link, which is not followed")
    # Without O_NONBLOCK, opening a pipe would wait for its writer.
    flags = (
        os.O_RDONLY
        | getattr(os, "O_NOFOLLOW", 0)
        | getattr(os, "O_NONBLOCK", 0)
        | getattr(os, "O_BINARY", 0)
    )
    file = os.fdopen(os.open(path, flags), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def _read(path: Path, file: BinaryIO) -> Any:
    """Tensors, numbers, strings, lists and dicts. FileError if it is damaged or lies."""
    try:
        return read_plain(file, str(path))
    except FileError as error:
        raise FileError(
            f"cannot read the training state '{path}' ({error}): delete it to start anew"
        ) from error
