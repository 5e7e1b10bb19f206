"""An .onnx file that `write` made -> the levels of its weights and what they stand for, checked against their CRC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from ecqx_onnx_converters.dequantization.dequantization import read_integers, read_meaning
from ecqx_onnx_converters.dequantization.fused import expand_call
from ecqx_onnx_converters.graph.files import read_external_bytes, read_proto
from ecqx_onnx_converters.graph.graph import clear_data, read_values
from ecqx_onnx_converters.graph.limits import LONGEST_NAME
from ecqx_onnx_converters.matching.matching import GraphWeight
from ecqx_onnx_converters.serialization.checksum import compute_checksum
from ecqx_onnx_converters.serialization.metadata import (
    METADATA_KEY,
    compute_levels_crc,
    from_text,
    read_checksum,
)
from ecqx_onnx_converters.storage import DOMAIN, Contents
from ecqx_onnx_converters.storage.registry import STORAGES


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """One weight of a written file.

    weight: name and layout as in the float graph; `weight.dequantize()` is what the file's graph computes.
    value: name that the weight's float value (or integers, where the graph reads these) has in the file's graph.
    nbytes: of the integers as stored, with their decoding.
    crc_ok: the levels have the checksum that the metadata states.
    """

    weight: GraphWeight
    storage: str
    levels_name: str
    value: str
    nbytes: int
    crc_ok: bool


def read_metadata(model: ModelProto) -> dict[str, Any]:
    """What `write` put under METADATA_KEY; empty for a file of someone else's. FileError when it can't be read."""
    text = find_metadata_text(model)
    if text is None:
        return {}
    try:
        return from_text(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"the metadata '{METADATA_KEY}' of the ONNX file can't be read ({error}): it is damaged, or another version of"
            " ecqx-onnx wrote it; convert the model again"
        ) from error


def is_as_written(source: ModelProto | Path | str) -> bool | None:
    """Whether graph, parameters and metadata have the checksum that `write` put into the file.

    Args:
        source: A model with its data in it, or the path of a file whose external data lies beside it.

    Returns:
        None for a file that carries no such checksum: one of someone else's, or of an earlier version.

    Raises:
        FileError: The file can't be read.
    """
    model = source if isinstance(source, ModelProto) else read_proto(source)
    folder = None if isinstance(source, ModelProto) else Path(source).parent
    text = find_metadata_text(model)
    read_metadata(model)
    stored = None if text is None else read_checksum(text)
    if stored is None:
        return None

    def content(tensor: TensorProto) -> bytes | None:
        elsewhere = folder is not None and tensor.data_location == TensorProto.EXTERNAL
        return read_external_bytes(tensor, folder) if elsewhere and folder is not None else None

    start, wanted = stored
    return compute_checksum(model, content, start=start) == wanted


def find_metadata_text(model: ModelProto) -> str | None:
    return next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)


def read_records(metadata: Mapping[str, Any]) -> tuple[Record, ...]:
    """The list of tensors in what `read_metadata` gave; FileError for one that can't be read."""
    return tuple(
        Record.of(record, metadata.get("storage")) for record in metadata.get("tensors", [])
    )


def read_weights(source: ModelProto | Path | str) -> tuple[StoredWeight, ...]:
    """Every weight that the metadata lists; none for a file of someone else's. FileError for a file that is damaged or lies."""
    model = source if isinstance(source, ModelProto) else read_proto(source)
    folder = None if isinstance(source, ModelProto) else Path(source).parent
    try:
        return _read_all(model, folder)
    except (
        IndexError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:  # a node without inputs, a name that isn't UTF-8, …
        raise FileError(
            f"the weights of the ONNX file can't be read ({error}); the file is damaged"
        ) from error


def _read_all(model: ModelProto, folder: Path | None) -> tuple[StoredWeight, ...]:
    nodes = [part for node in model.graph.node for part in expand_call(node)]
    makers = {output: node for node in nodes for output in node.output}
    contents = replace(Contents.of(model), initializers=_Initializers(model, folder), makers=makers)
    users: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input[:1]:
            users.setdefault(name, []).append(node)
    return tuple(_read(record, contents, users) for record in read_records(read_metadata(model)))


@dataclass(frozen=True)
class Record:
    """One entry of the metadata's list of tensors, with its types checked; writer._record says what each is.

    levels: empty where one call decodes and dequantises.
    """

    name: str
    value: str
    storage: str
    levels: str
    sources: tuple[str, ...]
    transposed: bool
    integers: bool
    crc32: int

    @classmethod
    def of(cls, record: Any, usual: Any) -> Record:
        try:
            name, crc, value, *rest = record
            levels, layout, storage, sources = (*rest, 0, 0, 0, 0)[:4] if len(rest) <= 4 else rest
            levels, storage = "" if levels == 0 else levels, storage or usual
            texts = (name, storage, levels, value, *(sources or [name]))
            known = layout in (0, 1, 2) and rest[:1] != [""]
            if (
                not all(isinstance(text, str) for text in texts)
                or type(crc) is not int
                or not known
            ):
                raise ValueError("a name is no text, the checksum no number, or the layout unknown")
            if max(map(len, texts)) > LONGEST_NAME:
                raise ValueError(f"a name has more than {LONGEST_NAME} characters")
        except (TypeError, ValueError) as error:
            raise FileError(
                f"the metadata of the ONNX file describes a tensor wrongly ({error}); the file is damaged"
            ) from error
        parsed = cls(
            name, value, storage, levels, tuple(sources or [name]), layout == 1, layout == 2, crc
        )
        if parsed.storage not in STORAGES:
            raise FileError(
                f"weight '{name}' has storage '{parsed.storage}', which this version can't read; update ecqx-onnx"
            )
        return parsed


def _read(record: Record, contents: Contents, users: Mapping[str, list[NodeProto]]) -> StoredWeight:
    record = record if record.levels else replace(record, levels=find_levels(record, contents))
    try:
        levels = STORAGES[record.storage].decode(record.levels, contents)
    except KeyError as error:
        raise FileError(
            f"the integers '{record.levels}' of weight '{record.name}' aren't in the file; some tool has folded or renamed them:"
            " convert the model again, and simplify it before, not after"
        ) from error
    if record.integers:
        return _read_integers(record, levels, contents)
    node = find_dequantization(record, contents, users)
    read = (
        node.input[1:2] if node.op_type == "DequantizeLinear" else node.input[1:]
    )  # its zero point is always zero
    constants = {
        name: read_floats(contents.initializers[name])
        for name in read
        if name in contents.initializers
    }
    meaning, factor = read_meaning(node, constants, levels.ndim)
    try:
        for part in (meaning.step if isinstance(meaning, Scale) else None, factor):
            if part is not None and np.broadcast_shapes(part.shape, levels.shape) != levels.shape:
                raise ValueError("a constant is larger than the weight")
        if isinstance(meaning, Codebook) and levels.size:
            meaning.values[[int(levels.min()), int(levels.max())]]
    except (ValueError, IndexError) as error:
        raise FileError(
            f"the levels of '{record.name}', {list(levels.shape)}, don't fit what dequantises them ({error})"
        ) from error
    tensor = QuantTensor(record.name, levels, meaning)
    crc_ok = compute_levels_crc(levels) == record.crc32
    order = find_permutation(record, contents, levels.ndim)
    if order is not None:
        tensor, factor = (
            tensor.transpose(order),
            factor if factor is None or factor.ndim == 0 else factor.transpose(order),
        )
    weight = GraphWeight(record.name, tensor, record.sources, factor)
    nbytes = STORAGES[record.storage].stored_bytes(record.levels, contents)
    return StoredWeight(weight, record.storage, record.levels, record.value, nbytes, crc_ok)


def find_levels(record: Record, contents: Contents) -> str:
    """What the call that makes the record's value dequantises."""
    node = find_maker(record, contents)
    if node is None or node.domain != DOMAIN or not node.input:
        raise FileError(
            f"nothing decodes weight '{record.name}' in the ONNX file; some tool has folded or rewritten it: convert the model"
            " again, and simplify it before, not after"
        )
    return node.input[0]


def find_maker(record: Record, contents: Contents) -> NodeProto | None:
    """Of the record's value, behind a Transpose if there is one."""
    node = contents.makers.get(record.value)
    if node is not None and node.op_type == "Transpose" and node.input:
        node = contents.makers.get(node.input[0])
    return node


def find_permutation(record: Record, contents: Contents, rank: int) -> tuple[int, ...] | None:
    """How the stored axes are turned to get the weight's."""
    node = contents.makers.get(record.value)
    if node is not None and node.op_type == "Transpose":
        turned = next(
            (tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), ()
        )
        if sorted(turned) != list(range(rank)):
            raise FileError(
                f"weight '{record.name}' is transposed by {list(turned)}; the ONNX file is damaged"
            )
        return turned
    return (1, 0) if record.transposed else None


def _read_integers(record: Record, levels: np.ndarray, contents: Contents) -> StoredWeight:
    node = contents.makers.get(record.value)
    if node is None or not node.input or node.input[0] != record.levels:
        raise FileError(
            f"nothing makes the integers of '{record.name}' in the ONNX file; some tool has rewritten it: pack it again"
        )
    offsets = [
        read_values(contents.initializers[name])
        for name in node.input[1:]
        if name in contents.initializers
    ]
    form = read_integers(node, offsets[0] if len(offsets) == 1 else None)
    tensor = QuantTensor(record.name, levels, Scale(np.ones((), np.float32)))
    weight = GraphWeight(record.name, tensor, record.sources, integers=form)
    nbytes = STORAGES[record.storage].stored_bytes(record.levels, contents)
    crc_ok = compute_levels_crc(levels) == record.crc32
    return StoredWeight(weight, record.storage, record.levels, record.value, nbytes, crc_ok)


def find_dequantization(
    record: Record, contents: Contents, users: Mapping[str, list[NodeProto]]
) -> NodeProto:
    """The node that dequantises the record's levels into its value, or, for an embedding, into the gathered rows."""
    node = find_maker(record, contents)
    cast = (
        contents.makers.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear"
        else None
    )
    if (
        node is not None
        and cast is not None
        and cast.op_type == "Cast"
        and cast.input[0] == record.levels
    ):
        return node
    if (
        node is not None
        and node.input[0] == record.levels
        and (node.domain == DOMAIN or node.op_type == "DequantizeLinear")
    ):
        return node
    reached, queue = set(), [record.levels]
    while queue:
        for user in users.get(queue.pop(), []):
            if user.op_type in ("DequantizeLinear", "Mul"):  # Mul: of an embedding's rows
                return user
            if user.op_type in ("Cast", "Gather") and user.output[0] not in reached:
                reached.add(user.output[0])
                queue.append(user.output[0])
    raise FileError(
        f"nothing dequantises weight '{record.name}' in the ONNX file; some tool has rewritten it: convert the model again"
    )


def read_floats(tensor: TensorProto) -> np.ndarray:
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise FileError(
            f"'{tensor.name}' should be float32 or float16 and has type {tensor.data_type}; the ONNX file is damaged"
        )
    return read_values(tensor).astype(np.float32)


class _Initializers(dict[str, TensorProto]):
    """By name; external data is read when a tensor is asked for."""

    def __init__(self, model: ModelProto, folder: Path | None) -> None:
        super().__init__({tensor.name: tensor for tensor in model.graph.initializer})
        self.folder = folder

    def __getitem__(self, name: str) -> TensorProto:
        tensor = super().__getitem__(name)
        if self.folder is not None and tensor.data_location == TensorProto.EXTERNAL:
            content = read_external_bytes(tensor, self.folder)
            clear_data(tensor)
            tensor.raw_data = content
        return tensor
