"""Reads the weights of an .onnx file that `write` made: levels, what they stand for, checksums.

Nothing in the file is trusted. Leaves: a `StoredWeight` for each quantized weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from ecqx_onnx.errors import FileError
from ecqx_onnx.tensors import Codebook, QuantTensor, Scale
from ecqx_onnx_converters.dequantization.dequantization import read_meaning
from ecqx_onnx_converters.dequantization.fused import expand_call
from ecqx_onnx_converters.dequantization.integers import read_integers
from ecqx_onnx_converters.graph.files import read_external_bytes, read_proto
from ecqx_onnx_converters.graph.graph import clear_data, read_values
from ecqx_onnx_converters.graph.limits import LONGEST_NAME
from ecqx_onnx_converters.graph.uses import find_makers
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

    Attributes:
        weight: Name and axes as in the float graph; `weight.dequantize()` is what the file's graph
            computes.
        storage: Name of the codec.
        levels_name: Name of the integer tensor in the file's graph.
        value: Name that the weight's float value (or integers, where the graph reads these) has in
            the file's graph.
        nbytes: Of the integers as stored, with their decoding.
        crc_ok: Whether the levels have the checksum that the metadata states.
    """

    weight: GraphWeight
    storage: str
    levels_name: str
    value: str
    nbytes: int
    crc_ok: bool


def read_metadata(model: ModelProto) -> dict[str, Any]:
    """Read what `write` put under METADATA_KEY.

    Args:
        model: A model, whoever made it.

    Returns:
        The JSON object; empty for a file of someone else's.

    Raises:
        FileError: It can't be read.
    """
    text = _find_metadata_text(model)
    if text is None:
        return {}
    try:
        return from_text(text)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"the metadata '{METADATA_KEY}' of the ONNX file can't be read ({error}): it is"
            " damaged, or another version of ecqx-onnx wrote it; convert the model again"
        ) from error


def is_as_written(source: ModelProto | Path | str) -> bool | None:
    """Tell whether graph, parameters and metadata have the checksum that `write` put into the file.

    Args:
        source: A model with its data in it, or the path of a file whose external data lies beside
            it.

    Returns:
        None for a file that carries no such checksum: one of someone else's, or of an earlier
        version.

    Raises:
        FileError: The file can't be read.
    """
    model, path = _open_source(source)
    text = _find_metadata_text(model)
    read_metadata(model)  # an error where the metadata as a whole can't be read
    stored = None if text is None else read_checksum(text)
    if stored is None:
        return None

    def content(tensor: TensorProto) -> bytes | None:
        if path is None or tensor.data_location != TensorProto.EXTERNAL:
            return None
        return read_external_bytes(tensor, path)

    start, wanted = stored
    return compute_checksum(model, content, start=start) == wanted


def _open_source(source: ModelProto | Path | str) -> tuple[ModelProto, Path | None]:
    """A model, and its path, beside which external data lies; None for one with its data in it."""
    if isinstance(source, ModelProto):
        return source, None
    return read_proto(source), Path(source)


def _find_metadata_text(model: ModelProto) -> str | None:
    """What stands under METADATA_KEY; None for a file of someone else's."""
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return entry.value
    return None


def read_records(metadata: Mapping[str, Any]) -> tuple[Record, ...]:
    """Read the list of tensors.

    Args:
        metadata: What `read_metadata` gave.

    Returns:
        One record for each quantized weight; a FileError comes from one that can't be read.
    """
    usual = metadata.get("storage")
    return tuple(Record.of(record, usual) for record in metadata.get("tensors", []))


def read_weights(source: ModelProto | Path | str) -> tuple[StoredWeight, ...]:
    """Read every weight that the metadata lists.

    Args:
        source: A model with its data in it, or the path of a file whose external data lies beside
            it.

    Returns:
        The weights in the order of the metadata; none for a file of someone else's.

    Raises:
        FileError: The file is damaged or lies about itself.
    """
    model, path = _open_source(source)
    try:
        return _read_all(model, path)
    # A node without inputs, a name that isn't UTF-8, …
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise FileError(
            f"the weights of the ONNX file can't be read ({error}); the file is damaged"
        ) from error


def _read_all(model: ModelProto, path: Path | None) -> tuple[StoredWeight, ...]:
    """Every weight, once calls that decode and dequantize at once are two nodes each."""
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.extend(expand_call(node))
    makers = find_makers(nodes)
    contents = replace(Contents.of(model), initializers=_Initializers(model, path), makers=makers)
    users: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input[:1]:
            users.setdefault(name, []).append(node)
    return tuple(_read(record, contents, users) for record in read_records(read_metadata(model)))


@dataclass(frozen=True)
class Record:
    """One entry of the metadata's list of tensors, with its types checked.

    Attributes:
        name: The weight's, before the writer shortened names.
        value: Name of its float value (or integers) in the file's graph; "" where it has none.
        storage: Name of the codec.
        levels: Name of its integer tensor; "" where one call decodes and dequantizes.
        sources: Parameters that it was made of.
        transposed: Whether it is stored in the transpose of its own axes.
        integers: Whether the graph reads integers, not floats.
        crc32: Checksum of its levels as stored.
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
        """Check one row of the list.

        Args:
            record: JSON, as `writer.build` describes it.
            usual: The file's usual storage, as JSON.

        Returns:
            The row with its types checked.

        Raises:
            FileError: It is not such a row, or its storage is unknown.
        """
        try:
            # 1. Zeros at the end of a row are left out.
            name, crc, value, *rest = record
            columns: list[Any] = [*rest, *[0] * (4 - len(rest))]
            levels, layout, storage, sources = columns
            levels = "" if levels == 0 else levels
            storage = storage or usual
            # 2. Types and lengths.
            texts = (name, storage, levels, value, *(sources or [name]))
            all_texts = all(isinstance(text, str) for text in texts)
            known = layout in (0, 1, 2) and rest[:1] != [""]
            if not all_texts or type(crc) is not int or not known:
                raise ValueError("a name is no text, the checksum no number, or the layout unknown")
            if max(map(len, texts)) > LONGEST_NAME:
                raise ValueError(f"a name has more than {LONGEST_NAME} characters")
        except (TypeError, ValueError) as error:
            raise FileError(
                f"the metadata of the ONNX file describes a tensor wrongly ({error});"
                " the file is damaged"
            ) from error
        if storage not in STORAGES:
            raise FileError(
                f"weight '{name}' has storage '{storage}', which this version can't read;"
                " update ecqx-onnx"
            )
        return cls(
            name=name,
            value=value,
            storage=storage,
            levels=levels,
            sources=tuple(sources or [name]),
            transposed=layout == 1,
            integers=layout == 2,
            crc32=crc,
        )


def _read(record: Record, contents: Contents, users: Mapping[str, list[NodeProto]]) -> StoredWeight:
    """One weight. users: the nodes that read each value as their first input."""
    # 1. Its levels.
    if not record.levels:
        record = replace(record, levels=_find_levels(record, contents))
    try:
        levels = STORAGES[record.storage].decode(record.levels, contents)
    except KeyError as error:
        raise FileError(
            f"the integers '{record.levels}' of weight '{record.name}' aren't in the file; some"
            " tool has folded or renamed them: convert the model again, and simplify it before, not"
            " after"
        ) from error
    if record.integers:
        return _read_integers(record, levels, contents)
    # 2. What they stand for, by the node that dequantizes them.
    node = _find_dequantization(record, contents, users)
    inputs = node.input[1:]
    if node.op_type == "DequantizeLinear":
        inputs = node.input[1:2]  # its zero point is always zero
    constants = {}
    for name in inputs:
        if name in contents.initializers:
            constants[name] = _read_floats(contents.initializers[name])
    meaning, factor = read_meaning(node, constants, levels.ndim)
    _check_fit(record.name, levels, meaning, factor)
    # 3. In the weight's own axes.
    tensor = QuantTensor(record.name, levels, meaning)
    permutation = _find_permutation(record, contents, levels.ndim)
    if permutation is not None:
        tensor = tensor.transpose(permutation)
        if factor is not None and factor.ndim:
            factor = factor.transpose(permutation)
    weight = GraphWeight(record.name, tensor, record.sources, factor)
    return _make_stored(record, weight, levels, contents)


def _check_fit(
    name: str, levels: np.ndarray, meaning: Scale | Codebook, factor: np.ndarray | None
) -> None:
    """FileError unless step and factor broadcast to the levels, and all levels have a centroid."""
    step = meaning.step if isinstance(meaning, Scale) else None
    try:
        for part in (step, factor):
            if part is not None and np.broadcast_shapes(part.shape, levels.shape) != levels.shape:
                raise ValueError("a constant is larger than the weight")
        if isinstance(meaning, Codebook) and levels.size:
            meaning.values[[int(levels.min()), int(levels.max())]]
    except (ValueError, IndexError) as error:
        raise FileError(
            f"the levels of '{name}', {list(levels.shape)}, don't fit what dequantises them"
            f" ({error})"
        ) from error


def _make_stored(
    record: Record, weight: GraphWeight, levels: np.ndarray, contents: Contents
) -> StoredWeight:
    """levels: as stored, in whose order the checksum is."""
    return StoredWeight(
        weight=weight,
        storage=record.storage,
        levels_name=record.levels,
        value=record.value,
        nbytes=STORAGES[record.storage].stored_bytes(record.levels, contents),
        crc_ok=compute_levels_crc(levels) == record.crc32,
    )


def _find_levels(record: Record, contents: Contents) -> str:
    """What the call that makes the record's value dequantizes."""
    node = _find_maker(record, contents)
    if node is None or node.domain != DOMAIN or not node.input:
        raise FileError(
            f"nothing decodes weight '{record.name}' in the ONNX file; some tool has folded or"
            " rewritten it: convert the model again, and simplify it before, not after"
        )
    return node.input[0]


def _find_maker(record: Record, contents: Contents) -> NodeProto | None:
    """The node that makes the record's value, in front of a Transpose if there is one."""
    node = contents.makers.get(record.value)
    if node is not None and node.op_type == "Transpose" and node.input:
        node = contents.makers.get(node.input[0])
    return node


def _find_permutation(record: Record, contents: Contents, rank: int) -> tuple[int, ...] | None:
    """By which the stored axes become the weight's; None where they are."""
    node = contents.makers.get(record.value)
    if node is not None and node.op_type == "Transpose":
        permutation: tuple[int, ...] = ()
        for attribute in node.attribute:
            if attribute.name == "perm":
                permutation = tuple(attribute.ints)
                break
        if sorted(permutation) != list(range(rank)):
            raise FileError(
                f"weight '{record.name}' is transposed by {list(permutation)};"
                " the ONNX file is damaged"
            )
        return permutation
    return (1, 0) if record.transposed else None


def _read_integers(record: Record, levels: np.ndarray, contents: Contents) -> StoredWeight:
    """A weight that the graph reads as integers: its levels plus an offset."""
    node = contents.makers.get(record.value)
    if node is None or not node.input or node.input[0] != record.levels:
        raise FileError(
            f"nothing makes the integers of '{record.name}' in the ONNX file; some tool has"
            " rewritten it: pack it again"
        )
    constants = []
    for name in node.input[1:]:
        if name in contents.initializers:
            constants.append(read_values(contents.initializers[name]))
    form = read_integers(node, constants, levels.ndim)
    tensor = QuantTensor(record.name, levels, Scale(np.ones((), np.float32)))
    weight = GraphWeight(record.name, tensor, record.sources, integers=form)
    return _make_stored(record, weight, levels, contents)


def _find_dequantization(
    record: Record, contents: Contents, users: Mapping[str, list[NodeProto]]
) -> NodeProto:
    """The node that dequantizes the record's levels into its value.

    For an embedding: into the gathered rows.
    """
    # 1. Upwards from the value: a call of ours, or DequantizeLinear, behind a Cast or not.
    node = _find_maker(record, contents)
    if node is not None:
        is_linear = node.op_type == "DequantizeLinear"
        cast = contents.makers.get(node.input[0]) if is_linear else None
        if cast is not None and cast.op_type == "Cast" and cast.input[0] == record.levels:
            return node
        if node.input[0] == record.levels and (node.domain == DOMAIN or is_linear):
            return node
    # 2. Downwards from the levels, through what only moves them.
    reached = set()
    queue = [record.levels]
    while queue:
        for user in users.get(queue.pop(), []):
            if user.op_type in ("DequantizeLinear", "Mul"):  # Mul: of an embedding's rows
                return user
            if user.op_type in ("Cast", "Gather") and user.output[0] not in reached:
                reached.add(user.output[0])
                queue.append(user.output[0])
    raise FileError(
        f"nothing dequantises weight '{record.name}' in the ONNX file; some tool has rewritten it:"
        " convert the model again"
    )


def _read_floats(tensor: TensorProto) -> np.ndarray:
    """float32, of a float32 or float16 initializer."""
    if tensor.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise FileError(
            f"'{tensor.name}' should be float32 or float16 and has type {tensor.data_type};"
            " the ONNX file is damaged"
        )
    return read_values(tensor).astype(np.float32)


class _Initializers(dict[str, TensorProto]):
    """By name; external data is read when a tensor is asked for."""

    def __init__(self, model: ModelProto, path: Path | None) -> None:
        super().__init__({tensor.name: tensor for tensor in model.graph.initializer})
        self.path = path

    def __getitem__(self, name: str) -> TensorProto:
        tensor = super().__getitem__(name)
        if self.path is not None and tensor.data_location == TensorProto.EXTERNAL:
            content = read_external_bytes(tensor, self.path)
            clear_data(tensor)
            tensor.raw_data = content
        return tensor
