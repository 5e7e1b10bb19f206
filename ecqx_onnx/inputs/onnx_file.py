"""Read an .onnx file that nobody vouches for, and check what it says of itself.

Nothing is loaded into a runtime before it has passed here. Lying shapes, data cut short, paths that
leave the model's folder end in one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ecqx_onnx_converters.graph.files import lies_beside, read_external_bytes, read_proto
from ecqx_onnx_converters.graph.graph import clear_data, list_graphs
from ecqx_onnx_converters.graph.limits import may_have_size
from ecqx_onnx_converters.serialization.reading import read_metadata
from onnx import TensorProto, numpy_helper

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.inputs.claimed_work import check_claimed_work

# Sub-byte types pack several values into a byte; all others have numpy's itemsize.
SUB_BYTE_BITS: dict[int, int] = {
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
}
MOST_DIMENSIONS = 16  # numpy has 64, runtimes fewer
LONGEST_LOCATION = 255  # bytes of the name of a file of external data, folders included
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
TYPED_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """A checked model and its files.

    Attributes:
        path: of the .onnx file.
        proto: without the contents of external data.
        external: the files of external data, sorted.
        metadata: our JSON in it, empty for a foreign file.
    """

    path: Path
    proto: onnx.ModelProto
    external: tuple[Path, ...]
    metadata: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of the file and of its external data."""
        return self.path.stat().st_size + sum(path.stat().st_size for path in self.external)

    def with_data(self) -> onnx.ModelProto:
        """Read the external data in.

        Returns:
            The model with all its data: a copy, or `proto` itself if nothing of it is external.
        """
        if not self.external:
            return self.proto
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for _, tensor in list_named_tensors(proto):
            if tensor.data_location == TensorProto.EXTERNAL:
                # As long as the shape says, where no length is stated.
                content = read_external_bytes(tensor, self.path)
                clear_data(tensor)
                tensor.raw_data = content
        return proto


def read_onnx(path: Path | str) -> OnnxFile:
    """Read an .onnx file and check every tensor in it.

    Args:
        path: of the file, whoever wrote it.

    Returns:
        The model; its external data are looked at but not read.

    Raises:
        FileError: if the file is missing, damaged, lies about itself, or claims more than any real
            model does.
        ModelError: if a weight is not a number.
    """
    path = Path(path)
    proto = read_proto(path)
    if not proto.graph.output:
        raise FileError(f"{path}: holds a graph without outputs; the file is damaged or cut short")
    try:
        metadata = read_metadata(proto)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    external = set()
    for where, tensor in list_named_tensors(proto):
        _check_declaration(path, where, tensor)
        if tensor.data_location == TensorProto.EXTERNAL:
            external.add(find_external_file(path, where, tensor))
        else:
            _check_size(path, where, tensor)
            _check_numbers(path, where, tensor)
    for graph in list_graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            _check_sparse(path, sparse)
    check_claimed_work(path, proto)
    return OnnxFile(path, proto, tuple(sorted(external)), metadata)


def list_named_tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """List every tensor that is stored in a model.

    Args:
        proto: any model; subgraphs and functions are looked into.

    Yields:
        (what it is in words, tensor).
    """
    for graph in list_graphs(proto.graph):
        for tensor in graph.initializer:
            yield f"initializer '{tensor.name}'", tensor
        for sparse in graph.sparse_initializer:
            yield f"the values of sparse initializer '{sparse.values.name}'", sparse.values
            yield f"the indices of sparse initializer '{sparse.values.name}'", sparse.indices
        yield from _list_constants(graph.node)
    for function in proto.functions:
        yield from _list_constants(function.node)


def count_stored_bytes(tensor: TensorProto) -> int:
    """Count the bytes that a tensor's shape and type ask for.

    Args:
        tensor: of a known type that is no text; lengths of at least 0.

    Returns:
        The number of bytes, those of sub-byte types packed.
    """
    count = math.prod(tensor.dims)
    if tensor.data_type in SUB_BYTE_BITS:
        return -(-count * SUB_BYTE_BITS[tensor.data_type] // 8)
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _list_constants(nodes: Any) -> Iterator[tuple[str, TensorProto]]:
    """Tensors in the nodes' attributes, with what they are in words."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield (
                    f"attribute '{attribute.name}' of node '{node.name or node.op_type}'",
                    attribute.t,
                )


def _check_declaration(path: Path, where: str, tensor: TensorProto) -> None:
    """Type and shape, before anything is reckoned with them."""
    if any(length < 0 for length in tensor.dims):
        raise FileError(
            f"{path}: {where} has the shape {list(tensor.dims)[:9]}, and no length can be negative"
        )
    if len(tensor.dims) > MOST_DIMENSIONS:
        raise FileError(
            f"{path}: {where} has {len(tensor.dims)} dimensions, more than {MOST_DIMENSIONS}; the"
            " file is damaged"
        )
    is_known = tensor.data_type in TensorProto.DataType.values()
    if not is_known or tensor.data_type == TensorProto.UNDEFINED:
        raise FileError(
            f"{path}: {where} has data type {tensor.data_type}, which ONNX does not know"
        )


def _check_size(path: Path, where: str, tensor: TensorProto) -> None:
    count = math.prod(tensor.dims)
    needed = count
    if tensor.data_type == TensorProto.STRING:
        found = len(tensor.string_data)
        unit = "strings"
    elif tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
        needed = count_stored_bytes(tensor)
        unit = "bytes"
    else:
        found = len(getattr(tensor, TYPED_FIELDS.get(tensor.data_type, "int32_data")))
        unit = "values"
        if tensor.data_type in SUB_BYTE_BITS:  # an entry holds a byte of them
            needed = count_stored_bytes(tensor)
    if found != needed:
        raise FileError(
            f"{path}: {where} claims the shape {list(tensor.dims)}, {needed} {unit}, but the file"
            f" holds {found}"
        )


def _check_numbers(path: Path, where: str, tensor: TensorProto) -> None:
    if tensor.data_type in FLOATS:
        values = numpy_helper.to_array(tensor).astype(np.float32, copy=False)
        bad = int(np.count_nonzero(np.isnan(values)))
        if bad:
            raise ModelError(
                f"{path}: {where} holds {bad} values that are no numbers (NaN): train or save the"
                " model again"
            )


def _check_sparse(path: Path, sparse: onnx.SparseTensorProto) -> None:
    where = f"{path}: sparse initializer '{sparse.values.name}'"
    size = math.prod(sparse.dims)
    if min(sparse.dims, default=0) < 0 or len(sparse.dims) > MOST_DIMENSIONS:
        raise FileError(
            f"{where} has the shape {list(sparse.dims)[:9]}, and no tensor can; the file is damaged"
        )
    if not may_have_size(size, math.prod(sparse.values.dims)):
        raise FileError(
            f"{where} claims the shape {list(sparse.dims)} for {math.prod(sparse.values.dims)}"
            " values: damaged"
        )
    # One linear index per value: the form that onnxruntime reads.
    if list(sparse.indices.dims) != list(sparse.values.dims):
        raise FileError(
            f"{where} has {list(sparse.values.dims)} values but {list(sparse.indices.dims)} indices"
        )
    if sparse.indices.data_type != TensorProto.INT64:
        raise FileError(
            f"{where} has indices of ONNX data type {sparse.indices.data_type}, INT64 is needed"
        )
    indices = numpy_helper.to_array(sparse.indices)
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        wrong = int(indices.min() if indices.min() < 0 else indices.max())
        raise FileError(
            f"{where} has index {wrong}, outside of its {size} values (shape {list(sparse.dims)})"
        )


def find_external_file(path: Path, where: str, tensor: TensorProto) -> Path:
    """Find the file that holds a tensor's data.

    Args:
        path: of the model.
        where: names the tensor in errors.
        tensor: one with external data.

    Returns:
        The file: beside the model (see `lies_beside`), there, and long enough.

    Raises:
        FileError: if there is no such file.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if tensor.data_type == TensorProto.STRING:
        raise FileError(
            f"{path}: {where} is text in external data, which ONNX does not have; the file is"
            " damaged"
        )
    if "\0" in location or len(location.encode()) > LONGEST_LOCATION:
        raise FileError(
            f"{path}: {where} has external data at {location[:40]!r}, which no file can be called"
        )
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(count_stored_bytes(tensor))))
    except ValueError:
        raise FileError(
            f"{path}: {where} has external data whose offset or length is not a number"
        ) from None
    try:
        inside = lies_beside(path, location)
        there = inside and (path.parent / location).is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
        raise FileError(
            f"{path}: {where} lies in '{location}', which cannot be opened ({error})"
        ) from error
    if not inside:
        raise FileError(
            f"{path}: {where} points to external data at '{location}', outside of the model's"
            " folder: refused; copy the data there if you trust the file"
        )
    file = path.parent / location
    if not there:
        raise FileError(
            f"{path}: {where} lies in '{location}', which is missing: keep that file beside the"
            " model"
        )
    if offset < 0 or length != count_stored_bytes(tensor):
        raise FileError(
            f"{path}: {where} claims {length} bytes of external data at offset {offset}, but its"
            f" shape {list(tensor.dims)} "
            f"takes {count_stored_bytes(tensor)}"
        )
    if offset + length > file.stat().st_size:
        raise FileError(
            f"{path}: {where} needs bytes {offset} to {offset + length} of '{location}', which has"
            f" only {file.stat().st_size}"
        )
    return file
