"""A zip archive -> a folder with files, links, pipes and huge files, for readers of folders.

A member named `NAME@link` is a symbolic link to its content, `NAME@pipe` a FIFO, `NAME@huge` a
sparse file of as many bytes as its content says, `NAME@folder` an empty folder, `NAME@loop` a link
to itself.
"""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from tests.fuzz.mutation import Random, mutate, mutate_zip, write_zip

KINDS = ("link", "pipe", "huge", "folder", "loop")
LINKS = (b"/dev/zero", b"/dev/stdin", b"/", b"..", b"/proc/self/mem", b"/etc/passwd", b"nowhere")


def unpack(archive: Path, folder: Path) -> bool:
    """Makes `folder` anew. False if the archive itself is damaged, which is no reader's matter."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as source:
            members = [(info.filename, source.read(info)) for info in source.infolist()]
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        ValueError,
        RuntimeError,
        NotImplementedError,
        EOFError,
    ):
        return False
    for name, content in members:
        parts = [part for part in Path(name.replace("\0", "")).parts if part not in ("/", "..", "")]
        if parts and all(len(part.encode()) < 256 for part in parts):
            _make(folder.joinpath(*parts), content)
    return True


def _make(path: Path, content: bytes) -> None:
    name, _, kind = path.name.rpartition("@")
    path = path.with_name(name) if kind in KINDS and name else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.exists():
            return
        if kind == "link":
            path.symlink_to(os.fsdecode(content.replace(b"\0", b"")) or "x")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "huge":
            with path.open("wb") as file:
                file.truncate(int(content or b"1"))
        else:
            path.write_bytes(content)
    except (OSError, ValueError):
        return  # the mutation asked for what no folder can hold


def mutate_folder(seed: bytes, random: Random) -> bytes:
    """A member's content is changed, or it becomes something that is no plain file."""
    if random.random() < 0.8:
        return mutate_zip(seed, random)
    members = _members(seed)
    if not members:
        return mutate(seed, random)
    at = random.randrange(len(members))
    name = members[at][0].partition("@")[0]
    kind = random.choice(KINDS)
    content = {
        "link": random.choice(LINKS),
        "huge": str(random.choice((10**6, 10**9, 10**13))).encode(),
    }
    members[at] = (f"{name}@{kind}", content.get(kind, b""))
    return write_zip(members)


def _members(data: bytes) -> list[tuple[str, bytes]]:
    import io

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as source:
            return [(info.filename, source.read(info)) for info in source.infolist()]
    except Exception:  # a damaged archive has no members
        return []
