"""Copy an .onnx file, with its external data in one file whose name we choose.

A name that a stranger's model states may be that of a file which its user needs, or which a program
beside it runs.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ecqx_onnx_converters.graph.files import ALIGNMENT, find_data_path
from onnx import ModelProto, TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.onnx_file import OnnxFile, count_stored_bytes, find_external_file

BLOCK = 1 << 20  # bytes that are copied at once


@dataclass(frozen=True)
class _Piece:
    """Bytes `start` to `stop` of a data file, from byte `place` on in the copy."""

    start: int
    stop: int
    place: int


def copy_model(file: OnnxFile, path: Path) -> tuple[Path, ...]:
    """Write a model to `path`, and its external data, where it has some, to `<path>.data`.

    A model without external data is copied byte for byte; in another one locations are rewritten.

    Args:
        file: the model, checked.
        path: a place where nothing is.

    Returns:
        The files beside `path` that were written: none or one.

    Raises:
        FileError: if the model's data cannot be read, or are not where it says.
    """
    proto = ModelProto()
    proto.CopyFrom(file.proto)
    found: list[tuple[TensorProto, Path]] = []
    for tensor in _list_external_tensors(proto):
        source = find_external_file(file.path, f"tensor '{tensor.name}'", tensor)
        found.append((tensor, source))
    if not found:
        shutil.copyfile(file.path, path)
        return ()
    needed: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for tensor, source in found:
        start = _read_offset(tensor)
        needed[source].append((start, start + count_stored_bytes(tensor)))
    data = find_data_path(path)
    pieces = {}
    with open(data, "xb") as out:
        for source, ranges in needed.items():
            pieces[source] = _copy_ranges(source, ranges, out)
    for tensor, source in found:
        _set_location(tensor, data.name, pieces[source])
    copied = proto.SerializeToString(deterministic=True)
    with open(path, "xb") as out:
        out.write(copied)
    return (data,)


def _list_external_tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor in the model, wherever it stands, whose data lie in another file."""
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL:
            yield message
        return
    for field, value in message.ListFields():
        if (
            field.message_type is None
            or field.message_type.full_name == "onnx.StringStringEntryProto"
        ):
            continue
        for part in value if field.is_repeated else [value]:
            yield from _list_external_tensors(part)


def _read_offset(tensor: TensorProto) -> int:
    """Where a tensor's data begin in their file, in bytes."""
    return int({entry.key: entry.value for entry in tensor.external_data}.get("offset", "0"))


def _copy_ranges(source: Path, ranges: Iterable[tuple[int, int]], out: BinaryIO) -> list[_Piece]:
    """Append what is needed of `source`, each byte once, however many tensors share it.

    Places within pages stay what they were, so that runtimes can map them.
    """
    pieces = []
    try:
        with open(source, "rb") as file:
            for start, stop in _merge_ranges(ranges):
                place = out.tell() + (start - out.tell()) % ALIGNMENT
                out.write(bytes(place - out.tell()))
                file.seek(start)
                for position in range(start, stop, BLOCK):
                    block = file.read(min(BLOCK, stop - position))
                    if len(block) != min(BLOCK, stop - position):
                        raise FileError(
                            f"'{source}' has got shorter while it was read; leave it alone and"
                            " repeat this"
                        )
                    out.write(block)
                pieces.append(_Piece(start, stop, place))
    except OSError as error:
        if error.filename is None:  # of writing
            raise
        raise FileError(
            f"cannot read '{source}', the model's data: {error.strerror}; check its permissions"
        ) from error
    return pieces


def _merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Overlapping ranges, and those less than a page apart, as one."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if united and start <= united[-1][1] + ALIGNMENT:
            united[-1] = (united[-1][0], max(stop, united[-1][1]))
        else:
            united.append((start, stop))
    return united


def _set_location(tensor: TensorProto, location: str, pieces: list[_Piece]) -> None:
    """Let a tensor's data lie where its bytes were copied to."""
    start = _read_offset(tensor)
    length = count_stored_bytes(tensor)
    holders = [piece for piece in pieces if piece.start <= start and start + length <= piece.stop]
    piece = holders[0]  # ranges were united: exactly one
    entries = {entry.key: entry.value for entry in tensor.external_data}
    entries["location"] = location
    entries["offset"] = str(piece.place + start - piece.start)
    entries["length"] = str(length)
    tensor.ClearField("external_data")
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
