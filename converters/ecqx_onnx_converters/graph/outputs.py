"""Where results are written: under a temporary name first, then moved, whole or not at all.

What is being written lies in a folder of its own beside its place, whose name derives from the
output's and ends in random digits:

    .NAME.RANDOM.ecqx-onnx/
        lock      locked while the process that writes lives
        new/      what is written, under its final names
        old/      what stood there before, until the output itself has taken its name
        gone/     what belonged to the replaced output alone, and goes with it

Files take their place by a hard link or a rename, companions first, the output last: with it the
whole counts as written. Who finds such a folder unlocked (its process was killed) brings the move
to an end, forward if the output itself is in place and back otherwise, and removes the folder. A
file is told to be ours by its inode, so nothing else is ever taken back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.moves import (
    NO_FOLLOW,
    NO_LINKS,
    exchange_names,
    flush_file,
    flush_folder,
    is_same_file,
    keep_second_name,
    link_over,
    link_to_free,
    list_entries,
    rename_to_free,
)

try:
    import fcntl
except ImportError:  # Windows: nothing tells whether a writer lives, so nothing is swept there
    fcntl = None  # type: ignore[assignment]

NAME_LIMIT = 255  # bytes of one name, on every file system in use
SUFFIX = ".ecqx-onnx"
RANDOM_BYTES = 6
# What follows the output's name in a temporary one.
RANDOM_NAME = re.compile(rb"\.[0-9a-f]{12}\.ecqx-onnx")
TEMPORARY_NAME = "ecqx-onnx"  # of folders in the system's place for temporaries
# Temporary folders of this process; on some network file systems a lock does not tell itself.
ALIVE: set[Path] = set()


def derive_path(path: Path, suffix: str) -> Path:
    """The path of a companion of `path`: its name and `suffix`.

    Args:
        path: the output.
        suffix: ASCII, such as '.data'.

    Returns:
        A path in the same folder. A name that would get longer than NAME_LIMIT is cut, and a
        checksum of it put in.
    """
    beginning = _cut(os.fsencode(path.name), len(suffix))
    return path.with_name(os.fsdecode(beginning + suffix.encode()))


def _cut(name: bytes, room: int) -> bytes:
    """`name` if `room` more bytes fit behind it; else its beginning and a checksum of it."""
    if len(name) + room <= NAME_LIMIT:
        return name
    mark = b"~" + hashlib.sha256(name).hexdigest()[:12].encode()
    beginning = name[: NAME_LIMIT - room - len(mark)]
    return beginning.decode("utf-8", "ignore").encode() + mark


def check_output(path: Path | str, *, force: bool, source: object = None) -> None:
    """Refuses a place where nothing may be written; removes what killed processes left there.

    Args:
        path: the file to write.
        force: whether a file, or a link, that is there may be replaced. A link is replaced itself,
            never what it leads to.
        source: what is read, if that is a path.

    Raises:
        FileError: for a folder, a device, a link that leads nowhere or a file that is there
            (without `force`), the `source`, a place in no folder, and a name that no file can have.
    """
    path = Path(path)
    try:
        check_name_and_folder(path)
        remove_leftovers(path)
        if path.is_dir():
            raise FileError(f"{path}: is a folder; name a file in it")
        if path.exists() and not path.is_file():
            raise FileError(
                f"{path}: is no regular file, so it is not replaced; choose another name"
            )
        if isinstance(source, str | Path) and is_same_file(path, Path(source), follow=True):
            raise FileError(f"{path}: is what is read: choose another name, so that it is not lost")
        if path.is_symlink() and not path.exists() and not force:
            raise FileError(
                f"{path}: is a link to {os.readlink(path)}, which does not exist; use --force to "
                "replace the link"
            )
        if path.exists() and not force:
            raise FileError(f"{path}: exists already; use --force to replace it")
    except OSError as error:
        raise FileError(
            f"cannot write '{path}': {error.strerror or error}; choose another place"
        ) from error


def check_name_and_folder(path: Path) -> None:
    """Refuses a name that no file can have, and a place in no folder.

    Args:
        path: Of a file or folder to be written.

    Raises:
        FileError: For both of them.
        OSError: If it cannot be told.
    """
    if "\0" in str(path):
        raise FileError(
            f"{str(path)!r}: has a zero character in it, which no file name can have; choose "
            "another name"
        )
    length = len(os.fsencode(path.name))
    if length > NAME_LIMIT:
        raise FileError(
            f"{path}: a name can have {NAME_LIMIT} bytes, and this one has {length}; choose a "
            "shorter one"
        )
    try:
        found = os.stat(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(
            f"{path}: the folder {path.parent} does not exist; create it first"
        ) from None
    if not stat.S_ISDIR(found.st_mode):
        raise FileError(f"{path}: {path.parent} is a file, not a folder; choose another place")


@contextmanager
def replace_on_success(
    path: Path,
    *,
    force: bool,
    beside: Sequence[Path] = (),
    superseded: Sequence[Path] = (),
    sources: Sequence[Path] = (),
) -> Iterator[Path]:
    """Gives a path to write to; what is there takes its place if the block ends well, else
    vanishes.

    A block that writes nothing at that path changes nothing.

    Args:
        path: the output.
        force: whether files that are in the way may be replaced.
        beside: companions in the same folder, which the block may write beside the path that it is
            given, under their names.
        superseded: files that belong to the replaced output alone; they go when the new one is
            in place.
        sources: files that are read; none of them is replaced, whatever `force` says.

    Returns:
        A context that gives the path to write to.

    Raises:
        FileError: if something is in the way (see check_output), or the disk refuses. Then all is
            as it was.
    """
    check_output(path, force=force)
    for companion in beside:
        if companion.parent != path.parent:
            raise ValueError(f"{companion} does not lie beside {path}")
    names = [companion.name for companion in beside] + [path.name]
    with put_errors_in_words(path) as left, open_temporary(path, left) as place:
        yield place.new / path.name
        written = [name for name in names if os.path.lexists(place.new / name)]
        try:
            place.commit(written, force, superseded, sources)
        finally:
            place.settle()


@contextmanager
def replace_folder_on_success(
    folder: Path, *, check: Callable[[], None], force: bool
) -> Iterator[Path]:
    """Gives an empty folder, which takes its place when the block ends well, else vanishes.

    Args:
        folder: the output.
        check: raises FileError if what is at `folder` may not be replaced; called before, and again
            right before the move.
        force: whether `folder` may exist.

    Returns:
        A context that gives the empty folder to fill.

    Raises:
        FileError: as `check` does, or if the disk refuses. Then all is as it was.
    """
    check()
    with put_errors_in_words(folder) as left, open_temporary(folder, left) as place:
        new = place.new / folder.name
        os.mkdir(new)
        yield new
        flush_file(new)
        check()
        try:
            if not force or not os.path.lexists(folder):
                rename_to_free(new, folder)
            elif not exchange_names(new, folder):
                os.rename(folder, place.folder / "old" / folder.name)
                rename_to_free(new, folder)
        except FileExistsError:
            raise make_taken_error(folder) from None
        finally:
            place.settle()


@contextmanager
def open_temporary_folder() -> Iterator[Path]:
    """Opens a folder in the system's place for temporaries; those of killed processes go first.

    Returns:
        A context that gives an empty folder, and removes it at the end.
    """
    path = Path(tempfile.gettempdir()) / TEMPORARY_NAME
    remove_leftovers(path)
    with open_temporary(path, []) as place:
        yield place.new


def remove_leftovers(path: Path) -> None:
    """Ends the moves that killed processes had begun for an output, and removes their temporaries.

    Args:
        path: The output.
    """
    if fcntl is None:
        return
    prefix = make_prefix(path)
    try:
        names = [os.fsencode(entry) for entry in os.listdir(path.parent)]
    except OSError:  # a folder may be written to and not listed
        return
    for name in names:
        if name.startswith(prefix) and RANDOM_NAME.fullmatch(name, len(prefix)):
            _remove_leftover(path, path.with_name(os.fsdecode(name)))


def make_prefix(path: Path) -> bytes:
    """Makes the beginning that names of temporaries for an output share.

    Args:
        path: The output.

    Returns:
        Bytes of a name, short enough for what follows them.
    """
    room = 2 * RANDOM_BYTES + 1 + len(SUFFIX)
    return b"." + _cut(os.fsencode(path.name), room + 1)


def _remove_leftover(path: Path, folder: Path) -> None:
    """Ends the move in `folder` if its lock is free, and removes it."""
    if folder in ALIVE:
        return
    with contextlib.suppress(OSError):
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        try:
            lock = os.open(folder / "lock", os.O_RDWR | NO_FOLLOW)
        except FileNotFoundError:
            # Killed before it was locked; if it is just being made, its process makes another.
            os.rmdir(folder)
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _Place(path, folder, lock).settle()
            _remove(folder)
        finally:
            os.close(lock)


@dataclass(frozen=True)
class _Place:
    """A temporary folder whose lock this process holds."""

    path: Path
    folder: Path
    lock: int

    @property
    def new(self) -> Path:
        return self.folder / "new"

    def commit(
        self, names: Sequence[str], force: bool, superseded: Sequence[Path], sources: Sequence[Path]
    ) -> None:
        """Moves the files `names` of new/ into place; the last one is the output itself."""
        if self.path.name not in names:
            return
        for name in names:
            final = self.path.with_name(name)
            check_output(final, force=force)
            if any(is_same_file(final, source, follow=True) for source in sources):
                raise FileError(
                    f"{final}: is what is read: choose another name, so that it is not lost"
                )
            flush_file(self.new / name)
        without_links = self._mark_superseded(names, superseded, sources)
        try:
            for name in names:
                self._place(name, force, alone=len(names) == 1)
        except BaseException as error:
            for name in names[:-1]:
                if not os.path.lexists(self.new / name):  # it was moved, for want of hard links
                    os.replace(self.path.with_name(name), self.new / name)
            if isinstance(error, FileExistsError):
                raise make_taken_error(self.path.with_name(name)) from None
            raise
        for other in without_links:
            other.unlink(missing_ok=True)
        flush_folder(self.path.parent)

    def _mark_superseded(
        self, names: Sequence[str], superseded: Sequence[Path], sources: Sequence[Path]
    ) -> list[Path]:
        """Gives files that are to go a second name in gone/; returns those that can have none."""
        without_links = []
        for other in superseded:
            is_read = any(is_same_file(other, source, follow=True) for source in sources)
            if is_read or other.name in names:
                continue
            if other.is_symlink() or not other.is_file():
                continue
            try:
                os.link(other, self.folder / "gone" / other.name)
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                without_links.append(other)
        return without_links

    def _place(self, name: str, force: bool, *, alone: bool) -> None:
        """Moves one file of new/ into place; what it replaces is kept in old/ until all have."""
        new = self.new / name
        old = self.folder / "old" / name
        final = self.path.with_name(name)
        if not force:
            link_to_free(new, final)
        elif alone:
            os.replace(new, final)
        else:
            if os.path.lexists(final):
                keep_second_name(final, old)
            link_over(new, final, self.folder / "placed")

    def settle(self) -> None:
        """Ends a move: forward if the output has its name (or nothing was moved), else back."""
        output = self.new / self.path.name
        if not os.path.lexists(output) or is_same_file(output, self.path):
            for part in list_entries(self.folder / "gone"):
                if is_same_file(part, self.path.with_name(part.name)):
                    self.path.with_name(part.name).unlink()
        else:
            for part in list_entries(self.new):
                final = self.path.with_name(part.name)
                old = self.folder / "old" / part.name
                if part.name == self.path.name or not is_same_file(part, final):
                    continue
                if os.path.lexists(old):
                    os.replace(old, final)
                else:
                    final.unlink()
        for old in list_entries(self.folder / "old"):
            final = self.path.with_name(old.name)
            if not os.path.lexists(final):
                rename_to_free(old, final)


@contextmanager
def put_errors_in_words(path: Path) -> Iterator[list[Path]]:
    """Turns OSErrors into a FileError.

    Args:
        path: The output, for the sentence.

    Returns:
        A context that gives a list, to which what could not be removed is to be added.

    Raises:
        FileError: For an OSError in the block; names what was left behind.
    """
    left: list[Path] = []
    try:
        yield left
    except OSError as error:
        what = "nothing was left behind"
        if left:
            what = f"'{left[0]}' is left and can be deleted"
        raise FileError(f"cannot write '{path}': {error.strerror or error}; {what}") from error


@contextmanager
def open_temporary(path: Path, left: list[Path]) -> Iterator[_Place]:
    """Opens a locked temporary folder for an output.

    Args:
        path: The output, in whose folder it lies.
        left: The folder is added if it could not be removed.

    Returns:
        A context that gives the folder, and removes it at the end.
    """
    folder: Path | None = None
    lock: int | None = None
    try:
        while lock is None:
            ending = f".{secrets.token_hex(RANDOM_BYTES)}{SUFFIX}"
            folder = path.with_name(os.fsdecode(make_prefix(path)) + ending)
            ALIVE.add(folder)
            lock = _make(folder)
        assert folder is not None
        yield _Place(path, folder, lock)
    finally:
        if lock is not None and fcntl is None:  # Windows removes no file that is open
            os.close(lock)
            lock = None
        if folder is not None:
            try:
                _remove(folder)
            except BaseException:  # a signal that came right now
                _remove(folder)
                raise
            if os.path.lexists(folder):
                left.append(folder)
            ALIVE.discard(folder)
        if lock is not None:
            os.close(lock)


def _make(folder: Path) -> int | None:
    """The lock of a fresh temporary folder; None if another process took it for a leftover."""
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        return None
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o600)
    except (FileExistsError, FileNotFoundError):
        if not folder.parent.is_dir():
            raise
        return None
    try:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                return None
            except OSError:  # a file system without locks: there leftovers are not removed either
                pass
        for part in ("new", "old", "gone"):
            os.mkdir(folder / part, 0o700)
    except FileNotFoundError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _remove(folder: Path) -> None:
    """Removes a temporary folder, the lock last: by it one can tell whose the rest is."""
    for part in ("new", "old", "gone", "placed"):
        if os.path.islink(folder / part) or os.path.isfile(folder / part):
            with contextlib.suppress(OSError):
                os.unlink(folder / part)
        shutil.rmtree(folder / part, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def make_taken_error(path: Path) -> FileError:
    """Makes the error for a name that another process has taken meanwhile.

    Args:
        path: The output.

    Returns:
        The error, to be raised.
    """
    return FileError(
        f"{path}: exists already, another process has just written it; use --force to replace it"
    )
