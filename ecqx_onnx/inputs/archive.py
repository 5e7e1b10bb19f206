"""Zip archives as torch writes them: members stored as they are, one after the other, nothing else.

Zip is forgiving: names may come twice or differ between a member and the directory, and bytes may
hide in front, behind and between. Two readers (Python's and torch's) can then see two archives in
one file. What torch itself writes leaves no room for that, so only that is accepted.
"""

from __future__ import annotations

import struct
import zipfile
from typing import BinaryIO

from ecqx_onnx.errors import FileError

MOST_MEMBERS = 200_000
LONGEST_NAME = 1024  # bytes; torch writes some 40
LOCAL_HEADER = 30  # bytes before a member's name
END_RECORD = 22  # bytes of the record that closes an archive without a comment
SYMLINK = 0o120000
KIND_OF_FILE = 0o170000


def read_members(file: BinaryIO, source: str) -> dict[str, bytes]:
    """Read a whole archive of torch's.

    Args:
        file: a seekable file, open for reading.
        source: names the file in errors.

    Returns:
        The members' bytes by their names, without the folder that all share ("archive/").

    Raises:
        FileError: if it is damaged, or not laid out as torch lays out its archives.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = check_layout(archive, file, source)
            members = {}
            for entry in entries:
                _, _, name = entry.filename.partition("/")
                members[name] = archive.read(entry)  # compares name and checksum
            return members
    except FileError:
        raise
    except Exception as error:  # zipfile raises six kinds on damaged archives
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{source}: not a readable archive ({reason}); save it again") from error


def check_layout(archive: zipfile.ZipFile, file: BinaryIO, source: str) -> list[zipfile.ZipInfo]:
    """Check that an archive is laid out as torch lays out its own, before anything is unpacked.

    Args:
        archive: opened on `file`.
        file: seekable, at any place.
        source: names the file in errors.

    Returns:
        The archive's entries in the order of their bytes.

    Raises:
        FileError: for compressed, encrypted, linked, doubled or overlapping members, several
            folders, bytes in front or behind, and sizes that the file cannot hold.
    """
    length = file.seek(0, 2)
    entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    claimed = sum(entry.file_size for entry in entries)
    if claimed > length:  # torch stores uncompressed; anything else is a bomb or a lie
        raise FileError(
            f"{source}: its parts claim {claimed} bytes, the file has {length}; save it again"
        )
    if not entries or len(entries) > MOST_MEMBERS:
        raise FileError(f"{source}: an archive of {len(entries)} parts; save it again with torch")
    _check_ends(archive, file, length, entries, source)
    folders = {entry.filename.partition("/")[0] for entry in entries}
    names = {entry.filename for entry in entries}
    if len(names) != len(entries):
        raise FileError(f"{source}: has a part twice, as torch never writes it; save it again")
    if len(folders) != 1:
        raise FileError(
            f"{source}: its parts lie in {len(folders)} folders, torch writes one; save it again"
        )
    end = 0
    for entry in entries:
        problem = _find_problem(entry)
        if entry.header_offset < end:
            problem = "overlaps another part"
        if problem is not None:
            raise FileError(
                f"{source}: its part {entry.filename[:80]!a} {problem}, as torch never writes it;"
                " save it again"
            )
        end = entry.header_offset + LOCAL_HEADER + len(entry.filename.encode()) + entry.file_size
    return entries


def _check_ends(
    archive: zipfile.ZipFile,
    file: BinaryIO,
    length: int,
    entries: list[zipfile.ZipInfo],
    source: str,
) -> None:
    """Nothing in front of the first member, nothing behind the directory, and one directory."""
    file.seek(max(length - END_RECORD, 0))
    end = file.read(END_RECORD)
    if len(end) != END_RECORD or not end.startswith(b"PK\x05\x06") or archive.comment:
        raise FileError(f"{source}: has bytes behind its end; save it again with torch")
    offset = struct.unpack_from("<I", end, 16)[0]
    is_told_elsewhere = offset == 0xFFFFFFFF  # the large archive's record tells it
    if entries[0].header_offset != 0 or (not is_told_elsewhere and offset != archive.start_dir):
        raise FileError(f"{source}: has bytes in front of its parts; save it again with torch")


def _find_problem(entry: zipfile.ZipInfo) -> str | None:
    """What is wrong with a member by its entry in the directory; None if nothing."""
    name = entry.filename
    parts = name.split("/")
    if entry.orig_filename != name or "\\" in name or len(name.encode()) > LONGEST_NAME:
        return "has a name of another kind"
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
        return "has a path of another kind"
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        return "is compressed"
    if entry.flag_bits & 1:
        return "is encrypted"
    if (entry.external_attr >> 16) & KIND_OF_FILE == SYMLINK:
        return "is a link"
    return None
