"""Names from files and folders, checked to be text that every file format here can hold."""

from __future__ import annotations

from ecqx_onnx.errors import DataError

LONGEST_LABEL = 1000  # characters


def check_text(text: str, what: str) -> str:
    """Checks a class's name before it enters a checkpoint, an .onnx file or a page.

    Args:
        text: the name.
        what: what an error message calls it.

    Returns:
        The name, unchanged.

    Raises:
        DataError: if it is too long, or no Unicode text, such as a file's name in another encoding.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{what} has a name that is not UTF-8: rename it") from None
    if len(text) > LONGEST_LABEL:
        raise DataError(f"{what} has a name of {len(text)} characters: use at most {LONGEST_LABEL}")
    return text
