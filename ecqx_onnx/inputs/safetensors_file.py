"""Read weights from a .safetensors file, or from a folder that Hugging Face's tools wrote.

The format: 8 bytes of length, a JSON object of that length with dtype, shape and place of each
tensor, then the bytes of all. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.reading import open_regular

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
MOST_SHARDS = 10_000
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def is_safetensors(path: Path) -> bool:
    """Whether the file, or the folder's weights, are in this format.

    Args:
        path: of a file or folder; it may be missing.

    Returns:
        True if the folder has weights of that name, or the file begins as the format does.
    """
    if path.is_dir():
        return (path / WEIGHTS).is_file() or (path / INDEX).is_file()
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and 2 <= length <= path.stat().st_size - 8


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file, or all weights of a folder.

    Args:
        path: for which `is_safetensors` is true.

    Returns:
        The state dict: tensors in main memory by their names.

    Raises:
        FileError: if it is not what it says.
    """
    if not path.is_dir():
        return _read_file(path)
    if (path / WEIGHTS).is_file():
        return _read_file(path / WEIGHTS)
    state: dict[str, torch.Tensor] = {}
    for name in _list_shards(path / INDEX):
        state.update(_read_file(path / name))
    return state


def _list_shards(index: Path) -> list[str]:
    """The files beside an index that hold the weights."""
    try:
        with open_regular(index, most=LONGEST_HEADER) as file:
            places = json.loads(file.read())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{index} is no index of weights ({error}): download the folder again"
        ) from error
    if len(names) > MOST_SHARDS or not all(
        isinstance(name, str) and Path(name).name == name for name in names
    ):
        raise FileError(
            f"{index} names files outside its folder, or too many: download the folder again"
        )
    return names


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, path.stat().st_size - 8):
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
            data = bytearray(file.read())
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        entries = {str(name): entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _read_tensor(name, entry, data) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, RecursionError, RuntimeError, OverflowError) as error:
        raise FileError(
            f"{path} cannot be read as safetensors ({error}): download or save it again"
        ) from error


def _read_tensor(name: str, entry: Any, data: bytearray) -> torch.Tensor:
    dtype = TYPES[entry["dtype"]]
    shape = entry["shape"]
    start, end = entry["data_offsets"]
    numbers = (*shape, start, end)
    if not all(type(number) is int and number >= 0 for number in numbers) or end > len(data):
        raise ValueError(f"'{name}' lies outside the file")
    count = math.prod(shape)
    if end - start != count * dtype.itemsize:
        raise ValueError(f"'{name}' claims the shape {shape} in {end - start} bytes")
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return (
        torch.frombuffer(data, dtype=torch.uint8, count=end - start, offset=start)
        .clone()
        .view(dtype)
        .reshape(shape)
    )
