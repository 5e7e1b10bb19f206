"""A valid input -> one that is slightly or badly wrong: bytes, JSON and zip archives."""

from __future__ import annotations

import io
import json
import random as random_module
import re
import zipfile
from collections.abc import Callable
from typing import Any

Random = random_module.Random
Mutator = Callable[[bytes, Random], bytes]

LARGEST_INPUT = 4_000_000  # bytes; larger ones only slow the search down
DEEP = 100_000
INTEGERS = (
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63)),
)
STRINGS = (
    *("", " ", "a", "..", "../x", "/etc/passwd", "a/b", "a\\b", "x\0y", "line\nline", "\x1b[31m"),
    *(
        "[/x]",
        "[conv]",
        "[bold]",
        "\u202e",
        "\ud800",
        "\U0001f600",
        "%s",
        "{}",
        "${x}",
        "__class__",
    ),
    *("float32", "int64", "<f4", "|O", "NaN", "inf", "1e999", "-0", "٣", "a" * 300, "a" * 70_000),
)
NUMBER = re.compile(rb"-?\d+(\.\d+)?")


def mutate(seed: bytes, random: Random) -> bytes:
    """One to four changes of a kind that suits the input."""
    data = seed
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = _suitable(data, random)(data, random)
    return data[:LARGEST_INPUT]


def _suitable(data: bytes, random: Random) -> Mutator:
    if data[:2] == b"PK" and random.random() < 0.7:
        return mutate_zip
    if data[:1] in (b"{", b"[") and random.random() < 0.7:
        return mutate_json
    if b"\0" not in data[:200] and random.random() < 0.5:
        return mutate_text
    return mutate_bytes


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """A change that knows nothing of the format."""
    if not data:
        return random.randbytes(random.randrange(64))
    at = random.randrange(len(data))
    if random.random() < 0.5:  # where most formats keep what they say about themselves
        at = random.randrange(min(len(data), 256))
    end = min(len(data), at + random.choice((1, 2, 4, 8, 64, 1024)))
    kind = random.randrange(8)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF))]) + data[at + 1 :]
    if kind == 2:
        width = random.choice((2, 4, 8))
        number = random.choice(INTEGERS) % 2 ** (8 * width)
        order = random.choice(("little", "big"))
        return data[:at] + number.to_bytes(width, order) + data[at + width :]  # type: ignore[arg-type]
    if kind == 3:
        return data[:at] + random.randbytes(random.randrange(1, 32)) + data[at:]
    if kind == 4:
        return data[:at] + data[end:]
    if kind == 5:
        return data[:at] + data[at:end] * random.choice((2, 3, 100)) + data[end:]
    if kind == 6:
        return data[:at]
    return data[:at] + random.randbytes(end - at) + data[end:]


def mutate_text(data: bytes, random: Random) -> bytes:
    """Numbers become extreme ones, words hostile ones, brackets deep, lines are lost or doubled."""
    kind = random.randrange(5)
    if kind == 0:
        return _replace_match(NUMBER, data, str(random.choice(INTEGERS)).encode(), random)
    if kind == 1:
        word = random.choice(STRINGS).encode("utf-8", "surrogatepass")
        return _replace_match(re.compile(rb"\w+"), data, word, random)
    if kind == 2:
        at = random.randrange(len(data) + 1)
        bracket = random.choice((b"[", b"{", b"(", b"[[", b'{"a":', b"-", b'"', b"."))
        return data[:at] + bracket * random.choice((1, 50, 2000, DEEP)) + data[at:]
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    if kind == 3:
        lines[at : at + 1] = []
    else:
        lines[at:at] = [lines[at]] * random.choice((1, 1000))
    return b"\n".join(lines)


def _replace_match(pattern: re.Pattern[bytes], data: bytes, new: bytes, random: Random) -> bytes:
    matches = list(pattern.finditer(data))
    if not matches:
        return mutate_bytes(data, random)
    match = random.choice(matches)
    return data[: match.start()] + new + data[match.end() :]


def mutate_json(data: bytes, random: Random) -> bytes:
    """One value of the document becomes another, is lost, is doubled or becomes deep."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    if random.random() < 0.05:
        depth = random.choice((50, 2000, DEEP))
        return b"[" * depth + data + b"]" * depth
    return json.dumps(mutate_value(document, random)).encode()


def mutate_value(value: Any, random: Random) -> Any:
    """A tree of dicts, lists and plain values with one place of it changed."""
    inside = random.random() < 0.8
    if isinstance(value, dict) and value and inside:
        key = random.choice(list(value))
        kind = random.randrange(8)
        if kind == 0:
            return {name: entry for name, entry in value.items() if name != key}
        if kind == 1:
            return {**value, random.choice(STRINGS): value[key]}
        return {**value, key: mutate_value(value[key], random)}
    if isinstance(value, list) and value and inside:
        at = random.randrange(len(value))
        kind = random.randrange(8)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return value[:at] + [value[at]] * random.choice((2, 1000)) + value[at:]
        return [*value[:at], mutate_value(value[at], random), *value[at + 1 :]]
    return any_value(random)


def any_value(random: Random) -> Any:
    """A value of any type that JSON knows, extreme ones preferred."""
    choices: tuple[Any, ...] = (
        *(None, True, False, [], {}, [[]], [None], {"": None}, 0.5, -1e300, 1e-300),
        *(float("nan"), float("inf"), 10**400, random.choice(INTEGERS), random.choice(STRINGS)),
        *([random.choice(INTEGERS)] * 3, {random.choice(STRINGS): random.choice(INTEGERS)}),
    )
    return random.choice(choices)


def mutate_zip(data: bytes, random: Random, member: Mutator = mutate) -> bytes:
    """One member is changed by `member`, renamed, lost, doubled, or made a bomb."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError):
        return mutate_bytes(data, random)
    except Exception:  # zlib.error, lzma's: the archive was damaged by an earlier change
        return mutate_bytes(data, random)
    if not members:
        return mutate_bytes(data, random)
    at = random.randrange(len(members))
    name, content = members[at]
    kind = random.randrange(10)
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append((name, content))
    elif kind == 2:
        members.append((random.choice(STRINGS).replace("\0", "") or "x", content))
    elif kind == 3:
        members[at] = (name, content + bytes(random.choice((1, 1000, 50_000_000))))
    else:
        members[at] = (name, member(content, random))
    stored = random.random() < 0.5
    return write_zip(members, stored=stored)


def write_zip(members: list[tuple[str, bytes]], *, stored: bool = True) -> bytes:
    """An archive of these (name, content), names doubled or not."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(
                name.encode("utf-8", "replace")[:60_000].decode("utf-8", "ignore")
            )
            info.compress_type = method
            archive.fp.seek(archive.start_dir)  # type: ignore[union-attr]
            archive.NameToInfo.pop(info.filename, None)  # so that no warning tells of doubled names
            archive.writestr(info, content, compresslevel=1)
    return buffer.getvalue()
