"""What was written, weight by weight, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ecqx_onnx_converters.matching.matching import Missing
from ecqx_onnx_converters.passes.integer_nodes import FloatNode
from ecqx_onnx_converters.planning.plan import Kept


@dataclass(frozen=True)
class WrittenTensor:
    """One weight as it lies in the file. nbytes: integers and their decoding, step or codebook; tied weights count their integers
    once, with the first. entropy: bits per weight; zeros: share in [0, 1]."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    bits: int
    zeros: float
    entropy: float
    storage: str
    dequantization: str
    nbytes: int
    rescaled: bool
    reason: str


@dataclass(frozen=True)
class WriteReport:
    """nbytes: of all files. kept: float weights; missing: quantised tensors that the graph doesn't have.

    notes: what the target's own tools say of the file, a sentence each.
    kernels: operator -> how many of its nodes run on integers. stays: the nodes that don't; both empty for float activations.
    """

    path: Path
    nbytes: int
    opset: int
    target: str
    tensors: tuple[WrittenTensor, ...]
    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...] = ()
    kernels: Mapping[str, int] = field(default_factory=dict)
    stays: tuple[FloatNode, ...] = ()
