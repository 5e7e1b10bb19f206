"""Open files that somebody else filled: no pipe, no device, nothing endless.

What the operating system refuses becomes an error of ours here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from ecqx_onnx.errors import FileError

Function = TypeVar("Function", bound=Callable)

ADVICE = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "it is a folder; name a file",
    errno.EACCES: "check its permissions, and those of the folders above it",
    errno.EPERM: "check its permissions, and those of the folders above it",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "its links lead in a circle; name a file",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room on the disk",
    errno.EFBIG: "the file system or a limit of the shell does not allow files so large",
    errno.EIO: "the disk may be failing; copy the file elsewhere and try again",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOMEM: "free some memory",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENXIO: "it is no regular file; name another",
}
# Windows has no pipes in folders, and reads text unless told otherwise.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def make_file_error(error: OSError) -> FileError:
    """Say what the operating system refused: which file, its reason, what to do.

    Args:
        error: as the operating system raised it.

    Returns:
        An error of exit status 2, to be raised from `error`.
    """
    name = error.filename if error.filename2 is None else error.filename2
    where = "" if name is None or isinstance(name, int) else f"'{os.fsdecode(name)}': "
    reason = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    reason = reason or type(error).__name__
    advice = ADVICE.get(error.errno or 0, "check the file and the disk that it lies on")
    return FileError(f"{where}the system says '{reason}'; {advice}")


@contextlib.contextmanager
def turn_system_errors() -> Iterator[None]:
    """Raise whatever the operating system refuses inside as a FileError.

    Yields:
        Nothing.

    Raises:
        FileError: in place of an OSError; a broken pipe of our own output passes.
    """
    try:
        yield
    except BrokenPipeError:  # who reads our output has seen enough: no matter of files
        raise
    except OSError as error:
        raise make_file_error(error) from error


def with_file_errors(function: Function) -> Function:
    """Decorate a function so that it raises FileError where the operating system refuses something.

    Args:
        function: any.

    Returns:
        A function with the same arguments and result.
    """

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> object:
        with turn_system_errors():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def check_name(path: Path | str) -> None:
    """Refuse an .onnx file whose path is not UTF-8: onnx and onnxruntime cannot open it.

    Args:
        path: of a file; names without .onnx pass.

    Raises:
        FileError: for such a name.
    """
    if Path(path).suffix != ".onnx":
        return
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError:
        raise FileError(
            f"'{path}' is not UTF-8, and ONNX's libraries open no other names; rename the file or"
            " folder"
            " (or set a locale in UTF-8)"
        ) from None


def check_regular(path: Path | str) -> None:
    """Refuse a pipe, a device or a socket, which a reader would wait for or never finish.

    Args:
        path: what does not exist, or cannot be looked at, passes: opening it tells more.

    Raises:
        FileError: for such a file.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    kind = KINDS.get(stat.S_IFMT(mode))
    if kind is not None and not stat.S_ISDIR(mode):
        raise FileError(
            f"'{path}' is {kind}, not a regular file; copy what it gives into a file first"
        )


def check_there(path: Path | str) -> None:
    """Refuse an input that is missing, before anything is said about the output.

    Args:
        path: of a file or folder; of FILE.py:NAME the file; what else has a colon passes.

    Raises:
        FileError: if there is nothing.
    """
    file, colon, _ = str(path).partition(":")
    if colon and not file.endswith(".py"):
        return
    try:
        os.stat(file)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileError(f"cannot read '{file}': {error.strerror}; check the path") from None
    except (OSError, ValueError):  # opening it tells more
        return


def open_regular(path: Path | str, *, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting for a pipe.

    Args:
        path: of the file; links are followed.
        most: bytes that it may have.

    Returns:
        The file, open in binary mode; close it.

    Raises:
        FileError: if it is no regular file, is larger than `most`, or cannot be opened.
    """
    with turn_system_errors():
        try:
            descriptor = os.open(path, FLAGS)
        except ValueError as error:  # a name with a zero byte
            raise FileError(
                f"{os.fspath(path)!r} can be no file's name ({error}); check the path"
            ) from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
                raise FileError(f"'{path}' is {kind}, not a regular file; name a file")
            if most is not None and status.st_size > most:
                raise FileError(
                    f"'{path}' has {status.st_size} bytes, and at most {most} are read; is it the"
                    " right file?"
                )
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise


def read_bytes(path: Path | str, *, most: int) -> bytes:
    """Read a regular file whole.

    Args:
        path: of the file; links are followed.
        most: bytes that it may have.

    Returns:
        What it holds.

    Raises:
        FileError: if it is no regular file, or has more bytes.
    """
    with open_regular(path, most=most) as file, turn_system_errors():
        content = file.read(most + 1)
    if len(content) > most:  # it grew since
        raise FileError(
            f"'{path}' has more than {most} bytes, the most that are read; is it the right file?"
        )
    return content
