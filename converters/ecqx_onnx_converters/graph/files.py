"""Reading and writing .onnx files, with external data beside them where it must be.

A file that is written is there whole or not at all. Nothing is allocated on a file's word: sizes
that a file declares are compared with its real length first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

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
    """Reads a model and checks what it claims; external data is left where it is.

    Args:
        path: An .onnx file of at most 2 GB.

    Returns:
        The parsed model, within the limits of `limits.check_model`.

    Raises:
        FileError: If the file cannot be read or is no ONNX model, and says what it is instead.
    """
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


def lies_beside(model: Path, location: str) -> bool:
    """Tells whether a model's external data may be opened where the model says that it lies.

    What the file names has to lie in the model's own folder, links followed. Where the model itself
    is a link into a folder of blobs, as in Hugging Face's cache, data that is linked into that same
    folder counts as its own: whoever made the one link made the other.

    Args:
        model: Path of the .onnx file.
        location: As the file states it.

    Returns:
        False for absolute paths and for what leads out of these folders.

    Raises:
        OSError: If the links can't be followed.
        RuntimeError: For links in a circle, up to Python 3.12.
    """
    if not location or PureWindowsPath(location).is_absolute() or Path(location).is_absolute():
        return False
    named = model.parent / location
    target = named.resolve()
    if model.parent.resolve() in target.parents:
        return True
    if ".." in Path(location).parts or not (model.is_symlink() and named.is_symlink()):
        return False
    return target.parent == model.resolve().parent


def read_external_bytes(tensor: TensorProto, model: Path) -> bytes:
    """Reads the raw data of a tensor that lies in a file beside the model.

    Args:
        tensor: Its declaration, whose external_data says where the data lies.
        model: Path of the .onnx file; data that does not lie beside it is not opened.

    Returns:
        The bytes, little-endian, exactly as many as dims and type need.

    Raises:
        FileError: For a file elsewhere, a wrong length, and a file that cannot be read.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = model.parent / location
    if not lies_beside(model, location):
        raise FileError(
            f"the data of tensor '{tensor.name}' lies in '{location}', outside the model's folder; "
            "it is not opened"
        )
    try:
        needed = (math.prod(tensor.dims) * count_bits(tensor.data_type) + 7) // 8
        offset = int(entries.get("offset", 0))
        length = int(entries.get("length", needed))
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


def read_external_values(tensor: TensorProto, model: Path) -> np.ndarray:
    """Reads the values of a tensor that lies in a file beside the model.

    Args:
        tensor: Its declaration, of a type that numpy has.
        model: Path of the .onnx file.

    Returns:
        An array of the declared shape and type.

    Raises:
        FileError: As `read_external_bytes`.
    """
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    stored = np.frombuffer(read_external_bytes(tensor, model), dtype.newbyteorder("<"))
    return stored.astype(dtype, copy=False).reshape(tensor.dims)


def count_bits(kind: int) -> int:
    """Counts the bits of one element.

    Args:
        kind: A TensorProto.DataType.

    Returns:
        2 or 4 for the packed integer types, else 8 times the size in numpy.

    Raises:
        KeyError: For a type that ONNX does not know.
    """
    known = kind in TensorProto.DataType.values()
    name = TensorProto.DataType.Name(kind) if known else ""
    if name.endswith(("INT4", "INT2")):
        return int(name[-1])
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize * 8)


def find_data_path(path: Path) -> Path:
    """Derives where the external data of a model lies.

    Args:
        path: The .onnx file.

    Returns:
        The path of the companion, in the same folder.
    """
    return derive_path(path, ".data")


@contextmanager
def replace_model(path: Path, *, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """Replaces an .onnx file and the external data beside it, which go and come together.

    Args:
        path: The .onnx file to write.
        force: Whether files that are in the way may be replaced.
        sources: Files that are read; none of them is replaced.

    Returns:
        A context that gives the path to write to, as `outputs.replace_on_success`.

    Raises:
        FileError: If something is in the way, or the disk refuses.
    """
    data = find_data_path(path)
    superseded = []
    if force and _refers_to(path, data.name):
        superseded.append(data)
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
    entries = itertools.chain.from_iterable(tensor.external_data for tensor in tensors)
    return any(entry.value == location for entry in entries)


def write_proto(
    model: ModelProto, payloads: Mapping[str, np.ndarray], path: Path, *, external: bool
) -> None:
    """Writes a model, and uses it up: data is moved into or out of it.

    Args:
        model: The structure; initializers may lack their data.
        payloads: Values of the initializers that `model` declares without data, by name.
        path: The .onnx file; nothing guards what is there, so give a temporary one.
        external: Whether tensors of more than INLINE bytes go to `<path>.data`, one at a time.
    """
    if not external:
        for tensor in model.graph.initializer:
            if tensor.name in payloads:
                tensor.raw_data = to_little_endian(payloads[tensor.name])
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    with open(find_data_path(path), "wb") as data:
        for tensor in model.graph.initializer:
            content = tensor.raw_data
            if tensor.name in payloads:
                content = to_little_endian(payloads[tensor.name])
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
    """Serializes values as TensorProto.raw_data holds them.

    Args:
        values: An array of any shape and type.

    Returns:
        Its bytes, row-major and little-endian.
    """
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).tobytes()
