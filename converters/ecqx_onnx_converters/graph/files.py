"""ModelProto <-> files: one .onnx, with external data beside it where one protobuf can't hold it;
whole or not at all.

Nothing is allocated on a file's word: sizes that a file declares are compared with its real length
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx_converters.graph.limits import check_model
from ecqx_onnx_converters.graph.outputs import derive_path, replace_on_success

PROTOBUF_LIMIT = (1 << 31) - 1  # bytes of one serialized message
INLINE = 1024  # bytes; smaller tensors stay in the .onnx even when the rest is external
ALIGNMENT = 4096  # of external data: pages, so that runtimes can map it


def read_proto(path: Path | str) -> ModelProto:
    """The model, external data left where it is. FileError for anything that is no ONNX model."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > PROTOBUF_LIMIT:
            raise FileError(
                f"'{path}' has {size} bytes, more than the 2 GB that an ONNX file can have; is it "
                "an ONNX model?"
            )
        data = path.read_bytes()
    except OSError as error:
        raise FileError(
            f"cannot read '{path}': {error.strerror or error}; check the path"
        ) from error
    if data[4:8] == b"ORTM":  # the identifier of a flatbuffer
        raise FileError(
            f"'{path}' is in onnxruntime's own format (.ort), not ONNX; give the .onnx of the same "
            "model"
        )
    if data[:4] == b"PK\x03\x04":
        raise FileError(
            f"'{path}' is not an ONNX model but a zip archive, as PyTorch's files are;"
            " give an .onnx file, which `ecqx-onnx convert` makes of it"
        )
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, UnicodeDecodeError, ValueError) as error:
        raise FileError(
            f"'{path}' is not an ONNX model ({error or 'cannot be parsed'}); it may be damaged or "
            "truncated"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise FileError(
            f"'{path}' is not an ONNX model (it has no graph or imports no operators); it may be "
            "damaged or empty"
        )
    check_model(path, model)
    return model


def read_external_bytes(tensor: TensorProto, folder: Path) -> bytes:
    """The raw data of a tensor that lies in a file beside the model. FileError for files elsewhere
    and for wrong lengths."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    if (
        not location
        or Path(location).is_absolute()
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise FileError(
            f"the data of tensor '{tensor.name}' lies in '{location}', outside the model's folder; "
            "it is not opened"
        )
    try:
        needed = (math.prod(tensor.dims) * count_bits(tensor.data_type) + 7) // 8
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
        available = path.stat().st_size
        if length != needed or min(offset, *tensor.dims, 0) < 0 or offset + length > available:
            raise FileError(
                f"tensor '{tensor.name}' needs {needed} bytes at {offset} of '{path}' ({available} "
                f"bytes) and declares {length};"
                " the two files don't belong together or are damaged"
            )
        with open(path, "rb") as data:
            data.seek(offset)
            return data.read(length)
    except (KeyError, ValueError) as error:
        raise FileError(
            f"tensor '{tensor.name}' describes its external data wrongly ({error}); the model is "
            "damaged"
        ) from error
    except OSError as error:
        why = error.strerror or error
        raise FileError(
            f"cannot read '{path}', the data of tensor '{tensor.name}': {why}; keep both files "
            "together"
        ) from error


def read_external_values(tensor: TensorProto, folder: Path) -> np.ndarray:
    """The same as an array; for types that numpy has."""
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return (
        np.frombuffer(read_external_bytes(tensor, folder), dtype.newbyteorder("<"))
        .astype(dtype, copy=False)
        .reshape(tensor.dims)
    )


def count_bits(kind: int) -> int:
    """Bits of one element; KeyError for an unknown type."""
    name = TensorProto.DataType.Name(kind) if kind in TensorProto.DataType.values() else ""
    if name.endswith(("INT4", "INT2")):
        return int(name[-1])
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize * 8)


def find_data_path(path: Path) -> Path:
    """Where the external data of the model at `path` lies."""
    return derive_path(path, ".data")


@contextmanager
def replace_model(path: Path, *, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """As `outputs.replace_on_success`, for an .onnx file and the external data beside it, which go
    and come together."""
    data = find_data_path(path)
    superseded = [data] if force and _refers_to(path, data.name) else []
    with replace_on_success(
        path, force=force, beside=[data], superseded=superseded, sources=sources
    ) as temporary:
        yield temporary


def _refers_to(path: Path, location: str) -> bool:
    """Whether an older model at `path` keeps tensors in the file of that name beside it."""
    if path.is_symlink() or not path.is_file() or not path.with_name(location).is_file():
        return False
    try:
        tensors = read_proto(path).graph.initializer
    except FileError:
        return False
    return any(entry.value == location for tensor in tensors for entry in tensor.external_data)


def write_proto(
    model: ModelProto, payloads: Mapping[str, np.ndarray], path: Path, *, external: bool
) -> None:
    """Writes the model; `payloads` are the values of initializers that `model` declares without
    data. With `external`, tensors of more than INLINE bytes go to `<path>.data`, one at a time. The
    model is used up: data is moved into or out of it."""
    if not external:
        for tensor in model.graph.initializer:
            if tensor.name in payloads:
                tensor.raw_data = to_little_endian(payloads[tensor.name])
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    with open(find_data_path(path), "wb") as data:
        for tensor in model.graph.initializer:
            content = (
                to_little_endian(payloads[tensor.name])
                if tensor.name in payloads
                else tensor.raw_data
            )
            if len(content) <= INLINE:
                if tensor.name in payloads:
                    tensor.raw_data = content
                continue
            data.write(bytes(-data.tell() % ALIGNMENT))
            where = {
                "location": find_data_path(path).name,
                "offset": str(data.tell()),
                "length": str(len(content)),
            }
            data.write(content)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in where.items():
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def to_little_endian(values: np.ndarray) -> bytes:
    """What TensorProto.raw_data holds: row-major, little-endian."""
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False)).tobytes()
