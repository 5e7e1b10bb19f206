"""JSON out of a file that nobody vouches for: parsed only when small, shallow and unambiguous."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64  # lists and objects inside each other


class BadJson(ValueError):  # noqa: N818 - says what the text is
    """The bytes are no JSON that we read; the message says why, without naming the file."""


def parse_json(
    data: bytes | str, *, most_bytes: int, most_items: int, with_nan: bool = False
) -> Any:
    """Parse JSON within bounds that are checked before any object is built.

    Args:
        data: UTF-8, or text.
        most_bytes: the longest text that is looked at.
        most_items: bound of values, counted by brackets and commas (each costs some 60 bytes).
        with_nan: NaN and infinities are read as well, which Python writes into its JSON.

    Returns:
        dicts, lists, strings, numbers, booleans and None. No object has a key twice; no number is
        NaN or infinite unless asked for.

    Raises:
        BadJson: for anything else.
    """
    if len(data) > most_bytes:
        raise BadJson(f"it has {len(data)} bytes, more than {most_bytes}")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError:
        raise BadJson("it is not UTF-8") from None
    items = text.count(",") + text.count("[") + text.count("{")
    if items > most_items:
        raise BadJson(f"it has {items} items, more than {most_items}")
    try:
        document = json.loads(
            text,
            object_pairs_hook=_refuse_double_keys,
            parse_constant=float if with_nan else _refuse_constant,
        )
    except BadJson:
        raise
    except RecursionError:
        raise BadJson(f"it is nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise BadJson(str(error).splitlines()[0][:200]) from None
    if _is_deeper(document, DEEPEST):
        raise BadJson(f"it is nested more than {DEEPEST} deep")
    return document


def _refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in found if names.count(name) > 1)
        raise BadJson(f"an object has {double[:40]!r} twice")
    return found


def _refuse_constant(name: str) -> float:
    raise BadJson(f"{name} is no number in JSON")


def _is_deeper(document: Any, limit: int) -> bool:
    level: list[Any] = [document]
    for _ in range(limit + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        if not inner:
            return False
        level = inner
    return True
