"""Moves of files and folders that happen at one instant, and flushing what was written.

Where a file system has no hard links, or a system no exchange of names, the next best is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
# How file systems without hard links refuse one.
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK, errno.EXDEV}
NOT_EXCHANGED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
AT_FDCWD = -100  # linux/fcntl.h
RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_EXCHANGE = 2


def list_entries(folder: Path) -> list[Path]:
    """Lists what lies in a part of a temporary folder.

    Args:
        folder: It may not have been made yet.

    Returns:
        Paths in no order; none if there is no such folder.
    """
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def is_same_file(one: Path, other: Path, *, follow: bool = False) -> bool:
    """Tells whether two names are of one file.

    Args:
        one: A path.
        other: Another.
        follow: Whether a link counts as what it leads to.

    Returns:
        False, too, where one is missing or no name.
    """
    look = os.stat if follow else os.lstat
    try:
        return os.path.samestat(look(one), look(other))
    except (OSError, ValueError):
        return False


def link_to_free(new: Path, final: Path) -> None:
    """Gives a file a name that is free; of several processes one wins.

    Args:
        new: The file; without hard links it moves.
        final: The name that it gets.

    Raises:
        FileExistsError: If there is something.
    """
    try:
        os.link(new, final)
        return
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
    os.close(os.open(final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW))
    try:
        os.replace(new, final)
    except BaseException:
        os.unlink(final)
        raise


def link_over(new: Path, final: Path, between: Path) -> None:
    """Replaces a file by another, which keeps its old name, by which it can be told.

    Args:
        new: The file; without hard links it moves.
        final: The name that it gets.
        between: A free name on the way, on the same file system.
    """
    try:
        os.link(new, between)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(new, final)
    else:
        os.replace(between, final)


def keep_second_name(final: Path, old: Path) -> None:
    """Gives what is to be replaced a second name; links are kept as links.

    Args:
        final: The file or link; without hard links it moves.
        old: The second name, which is free.
    """
    try:
        os.link(final, old, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LINKS:
            raise
        os.rename(final, old)


def _renameat2(one: Path, other: Path, flags: int) -> bool:
    """Linux's rename with flags. False where it cannot be had; OSError as of a rename."""
    if not sys.platform.startswith("linux"):
        return False
    call: Any = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_EXCHANGED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def exchange_names(one: Path, other: Path) -> bool:
    """Lets two files or folders change places at one instant.

    Args:
        one: A path.
        other: Another, on the same file system.

    Returns:
        False where the system cannot do that; nothing has changed then.

    Raises:
        OSError: As of a rename.
    """
    return _renameat2(one, other, RENAME_EXCHANGE)


def rename_to_free(one: Path, other: Path) -> None:
    """Renames a file or folder to a name that is free; of several processes one wins.

    Args:
        one: The file or folder.
        other: The name that it gets.

    Raises:
        FileExistsError: If there is something.
    """
    if _renameat2(one, other, RENAME_NOREPLACE):
        return
    if os.path.lexists(other):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other))
    try:
        os.rename(one, other)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other)) from error
        raise


def flush_file(path: Path) -> None:
    """Brings to the disk what gets its name next: no empty files after a loss of power.

    Args:
        path: A file, or a folder with all that is in it; links are passed over.
    """
    if path.is_symlink():
        return
    if path.is_dir():
        for part in path.iterdir():
            flush_file(part)
        flush_folder(path)
        return
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can do that.

    Args:
        folder: The folder.
    """
    with contextlib.suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
