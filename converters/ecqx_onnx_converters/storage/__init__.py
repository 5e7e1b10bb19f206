"""Codecs for integer weights: each encodes int8 levels as ONNX initializers and nodes, and back.

A codec is a module with the three functions of `Storage`; registry.py lists them by name. Enters:
the int8 levels of one weight and the name that its integer tensor shall have. Leaves: a `Stored`,
or a `Refusal` with the reason. A new codec is such a module and a line in registry.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from google.protobuf.message import Message
from onnx import FunctionProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from ecqx_onnx_converters.graph.uses import find_makers
from ecqx_onnx_converters.refusal import Refusal
from ecqx_onnx_converters.targets import Target


@dataclass(frozen=True, eq=False)
class Stored:
    """One weight's levels as parts of an ONNX graph.

    Attributes:
        storage: The codec's name in registry.py.
        label: The same for the report, such as "dense INT4".
        levels: Name of the integer tensor of the weight's shape: an initializer, or the output of
            the last of `nodes`.
        type: Its TensorProto type.
        opset: The first opset that has all of this.
        initializers: Dense tensors.
        sparse_initializers: Sparse tensors.
        nodes: Nodes that decode the initializers.
        functions: Model-local functions that the nodes call, each written once per file; the writer
            sets their opset import.
        own_bytes: Bytes of the file that are this weight's own, where it shares its data with
            others; None where all parts are its own.
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
        """Bytes of the file that are this weight's own: data, names and nodes, no functions."""
        if self.own_bytes is not None:
            return self.own_bytes
        parts: list[Message] = [*self.initializers, *self.sparse_initializers, *self.nodes]
        return sum(part.ByteSize() for part in parts)


@dataclass(frozen=True, eq=False)
class Contents:
    """What decoding reads of a model: its initializers, and the node that makes each value.

    Attributes:
        initializers: Dense initializers by name.
        sparse_initializers: Sparse initializers by the name of their values.
        makers: Nodes by the name of each of their outputs.
        cache: What a codec has decoded for several tensors at once.
    """

    initializers: Mapping[str, TensorProto]
    sparse_initializers: Mapping[str, SparseTensorProto]
    makers: Mapping[str, NodeProto]
    cache: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ModelProto) -> Contents:
        """Index a model by name.

        Args:
            model: A model whose tensors hold their data.

        Returns:
            Views of the model's main graph; nothing is copied.
        """
        graph = model.graph
        return cls(
            {tensor.name: tensor for tensor in graph.initializer},
            {sparse.values.name: sparse for sparse in graph.sparse_initializer},
            find_makers(graph.node),
        )


class Storage(Protocol):
    """What each codec's module offers."""

    def encode(self, levels: np.ndarray, name: str, target: Target) -> Stored | Refusal:
        """Encode one weight.

        Args:
            levels: int8, any shape.
            name: What the integer tensor shall be called.
            target: Which element types, opsets and decoders may be used.

        Returns:
            Parts of a graph; or why this target cannot have them.
        """
        ...

    def decode(self, name: str, contents: Contents) -> np.ndarray:
        """Decode one weight; the inverse of `encode`.

        Args:
            name: The integer tensor's name, `Stored.levels`.
            contents: The model that holds it.

        Returns:
            int8 levels in the weight's shape.

        Raises:
            FileError: The file is damaged.
            KeyError: The file has no such tensor.
        """
        ...

    def stored_bytes(self, name: str, contents: Contents) -> int:
        """Count the bytes of a weight in a file.

        Args:
            name: The integer tensor's name, `Stored.levels`.
            contents: The model that holds it.

        Returns:
            What `Stored.nbytes` was when it was encoded.
        """
        ...


DOMAIN = "qx"  # of the model-local functions; short, because every call of one spells it out
MAX_WEIGHTS = 1 << 31  # of one tensor; a file that declares more is damaged
