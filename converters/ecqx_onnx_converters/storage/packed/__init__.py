"""Levels near their entropy, inside a plain ONNX file whose own graph decodes them. docs/packed-format.md specifies the bits.

pack_smallest(tensors) -> Packed; functions([Packed, ...]) and nodes(Packed, names) write its decoder; unpack(Packed) is
the reference decoder.
"""

from ecqx_onnx_converters.storage.packed.codec import Packed, pack, pack_smallest, unpack
from ecqx_onnx_converters.storage.packed.decoder import DOMAIN, functions, nodes

__all__ = ["DOMAIN", "Packed", "functions", "nodes", "pack", "pack_smallest", "unpack"]
