"""How a weight's integers lie in the file: one module per way, each with the same three functions.

    encode(levels, name, target) -> Stored | Refusal       levels: int8, any shape; name: what the integer tensor shall be called
    decode(name, contents) -> int8 levels                  the inverse; FileError for a damaged file, KeyError for an absent one
    stored_bytes(name, contents) -> int                    what encode's Stored.nbytes was

A new way is a module with these functions and a line in registry.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message
from onnx import FunctionProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.targets import Target


@dataclass(frozen=True, eq=False)
class Stored:
    """One weight's levels as parts of an ONNX graph.

    label: for the report, such as "dense INT4".
    levels: name of the integer tensor of the weight's shape: an initializer, or the output of the last of `nodes`.
    type: its TensorProto type.
    opset: the first opset that has all of this.
    functions: model-local functions that the nodes call, each written once per file; their opset import is set by the writer.
    """

    storage: str
    label: str
    levels: str
    type: int
    opset: int
    initializers: tuple[TensorProto, ...] = ()
    sparse_initializers: tuple[SparseTensorProto, ...] = ()
    nodes: tuple[NodeProto, ...] = ()
    functions: tuple[FunctionProto, ...] = ()
    own_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the file that are this weight's own: data, names and nodes, or `own_bytes` where it shares its data with
        others. Functions are shared and not counted."""
        if self.own_bytes is not None:
            return self.own_bytes
        parts: list[Message] = [*self.initializers, *self.sparse_initializers, *self.nodes]
        return sum(part.ByteSize() for part in parts)


@dataclass(frozen=True, eq=False)
class Contents:
    """A model's initializers and value makers by name, for decoding. cache: what a storage has decoded for several tensors."""

    initializers: Mapping[str, TensorProto]
    sparse_initializers: Mapping[str, SparseTensorProto]
    makers: Mapping[str, NodeProto]
    cache: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelProto) -> Contents:
        return cls(
            {tensor.name: tensor for tensor in model.graph.initializer},
            {sparse.values.name: sparse for sparse in model.graph.sparse_initializer},
            {output: node for node in model.graph.node for output in node.output},
        )


class Storage(Protocol):
    """What a module of this package offers."""

    def encode(self, levels: np.ndarray, name: str, target: Target) -> Stored | Refusal: ...
    def decode(self, name: str, contents: Contents) -> np.ndarray: ...
    def stored_bytes(self, name: str, contents: Contents) -> int: ...


DOMAIN = "qx"  # of the model-local functions; every call of one spells it out
MAX_WEIGHTS = 1 << 31  # of one tensor; a file that declares more is damaged
