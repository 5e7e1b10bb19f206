"""Read tensors, numbers, texts, lists and dicts from files that torch.save wrote; nothing else.

torch.load(weights_only=True) runs none of the author's code, but it builds whatever is asked for:
buffers of any length, tensors that repeat one stored element a million million times. So the file
is looked at first (the zip archive's layout, the pickle's opcodes), and the tensors after it.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.archive import check_layout
from ecqx_onnx.inputs.foreign_files import advise_on_foreign
from ecqx_onnx.inputs.reading import open_regular

MOST_PICKLE_BYTES = 32 * 1024 * 1024  # a state dict of 10 000 tensors takes about 1 MB
MOST_OPCODES = 2_000_000
MOST_VALUES = 500_000  # in the lists and dicts of a file
MOST_DIMENSIONS = 16
# What tensors may take once copied, as a multiple of the file: levels are stored once and used by
# the weight and by its initializer; an expanded buffer repeats an element that is stored once.
MOST_UNFOLDING = 8
UNFOLDED_FOR_FREE = 64 * 1024 * 1024  # bytes
PICKLE_PROTOCOL = b"\x80"
LEGACY_PICKLES = 5  # magic number, version, system, object, storage keys: before torch 1.6
# Whatever a file of tensors, numbers and texts names in its pickle.
GLOBALS = re.compile(
    r"collections (OrderedDict|Counter)"
    r"|(__builtin__|builtins) set"
    r"|torch\._utils (_rebuild_tensor(_v2|_v3)?|_rebuild_parameter)"
    r"|torch(\.cuda)? (Byte|Char|Short|Int|Long|Half|Float|Double|BFloat16|Bool)Storage"
    r"|torch(\.cuda)? Complex(Float|Double)Storage"
    r"|torch\.storage (Untyped|Typed)Storage"
    r"|torch (u?int\d{1,2}|float\d{1,2}\w{0,12}|bfloat16|complex\d{2,3}|bool|Size|device)"
)
# Opcodes that make objects in other ways; torch's unpickler knows none of them.
OBJECTS = frozenset(
    ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER")
)


def find_torch_file(path: str | Path) -> Path:
    """Check that there is a file that torch may have written.

    Args:
        path: as the user named it.

    Returns:
        The same as a Path.

    Raises:
        FileError: if there is none, or it is plainly something else.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is a folder; name a file in it" if path.is_dir() else "no such file"
            raise FileError(f"{path}: {what}")
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte
        raise FileError(
            f"{path}: cannot be opened ({_find_reason(error)}); check its name"
        ) from error
    if path.suffix.lower() == ".onnx":
        raise FileError(
            f"{path}: is an .onnx file where a PyTorch model is needed; `ecqx-onnx pack` stores the"
            " weights of an .onnx file in fewer bytes, and `ecqx-onnx validate --against` takes one"
        )
    if not size:
        raise FileError(f"{path}: is empty; save it again")
    try:
        foreign = advise_on_foreign(path)
    except OSError:  # told by those who read it
        foreign = None
    if foreign is not None:
        raise FileError(f"{path}: {foreign}")
    return path


def is_program(path: str | Path) -> bool:
    """Whether the file is a .pt2 archive.

    Args:
        path: of a file that torch may have written.

    Returns:
        True by the names of its members; none is opened.

    Raises:
        FileError: if there is no such file, or it cannot be read.
    """
    path = find_torch_file(path)
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as members:
            names = members.namelist()
    except PermissionError as error:
        raise FileError(f"{path}: may not be read; check its permissions") from error
    except Exception as error:  # zipfile raises six kinds on damaged archives
        raise FileError(f"{path}: is damaged ({_find_reason(error)}); save it again") from error
    return any(name.endswith("archive_format") or "/models/" in name for name in names)


def load_plain(path: str | Path) -> Any:
    """Read what torch.save wrote, without building anything but plain values.

    Args:
        path: of the file, whoever wrote it.

    Returns:
        Tensors, numbers, texts, lists and dicts. Each tensor is dense, lies in main memory, and has
        no more elements than its file can stand for.

    Raises:
        FileError: for any other file.
    """
    path = Path(path)
    if is_program(path):
        raise FileError(
            f"{path}: is a .pt2 program, where a checkpoint or state dict is needed; `ecqx-onnx"
            " convert` takes it without --model"
        )
    with open_regular(path) as file:
        return read_plain(file, str(path))


def read_plain(file: BinaryIO, source: str) -> Any:
    """Read what torch.save wrote from an open file, as `load_plain` does.

    Args:
        file: seekable, at any place.
        source: names the file in errors.

    Returns:
        The same plain values.

    Raises:
        FileError: if it holds anything but plain values.
    """
    length = file.seek(0, 2)
    file.seek(0)
    try:
        _look_at(file, source)
        file.seek(0)
        document = torch.load(file, map_location="cpu", weights_only=True)
    except FileError:
        raise
    except PermissionError as error:
        raise FileError(f"{source}: may not be read; check its permissions") from error
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "WeightsUnpickler" in str(error):
            raise _make_pickled_error(source) from error
        raise _make_damaged_error(source) from error
    except Exception as error:  # torch raises ten kinds on damaged files
        raise _make_damaged_error(source) from error
    _check_tensors(document, source, length)
    return document


def _look_at(file: BinaryIO, source: str) -> None:
    """The archive's layout and checksums, and what its pickle would build."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if file.read(1) != PICKLE_PROTOCOL:  # torch names the protocol, which comes first
            raise _make_damaged_error(source)
        file.seek(0)
        for _ in range(LEGACY_PICKLES):
            _check_pickle(file, source)
        return
    with zipfile.ZipFile(file) as members:
        entries = check_layout(members, file, source)
        if (broken := members.testzip()) is not None:  # torch.load doesn't look at checksums
            raise FileError(
                f"{source}: is damaged: its part {broken[:80]!r} doesn't have its checksum; save it"
                " again"
            )
        pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _make_damaged_error(source)
        if pickles[0].file_size > MOST_PICKLE_BYTES:
            raise FileError(
                f"{source}: has {pickles[0].file_size} bytes beside its tensors, more than"
                f" {MOST_PICKLE_BYTES}; save a state dict"
            )
        with members.open(pickles[0]) as stream:
            _check_pickle(stream, source)


def _check_pickle(stream: Any, source: str) -> None:
    """Read the opcodes of one pickle, and refuse those that make other objects."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MOST_OPCODES:
            raise FileError(f"{source}: has more than {MOST_OPCODES} values; save a state dict")
        is_other = opcode.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument))
        if is_other or opcode.name in OBJECTS:
            raise _make_pickled_error(source)


def _check_tensors(document: Any, source: str, stored: int) -> None:
    """Every tensor is dense, and all together stand for about as many bytes as are stored."""
    allowed = MOST_UNFOLDING * stored + UNFOLDED_FOR_FREE
    unfolded = 0
    for tensor in _list_tensors(document, source):
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_quantized or tensor.ndim > MOST_DIMENSIONS:
            raise FileError(
                f"{source}: holds a tensor that is no plain array in main memory; save dense"
                " tensors"
            )
        unfolded += tensor.numel() * tensor.element_size()
        if unfolded > allowed:
            raise FileError(
                f"{source}: its tensors claim more than {allowed} bytes, the file has {stored};"
                " save contiguous tensors"
            )


def _list_tensors(document: Any, source: str) -> Iterator[torch.Tensor]:
    """Every tensor, as often as the document refers to it."""
    pending = [document]
    seen = 0
    while pending:
        value = pending.pop()
        seen += 1
        if seen + len(pending) > MOST_VALUES:
            raise FileError(f"{source}: has more than {MOST_VALUES} values; save a state dict")
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            pending.extend(value.values())
        elif isinstance(value, list | tuple):
            pending.extend(value)


def _make_pickled_error(source: str) -> FileError:
    return FileError(
        f"{source}: holds pickled Python objects, not only tensors (or is damaged); save a state"
        " dict, or give `ecqx-onnx convert` --trust-pickle if you trust its author"
    )


def _make_damaged_error(source: str) -> FileError:
    return FileError(f"{source}: is damaged or was not written by torch.save; save it again")


def _find_reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
