"""Entropy-coded integers that the graph itself decodes while a runtime loads it: docs/packed-format.md."""

from ecqx_onnx_converters.storage.packed.encoder import (
    encode,
    encode_all,
    find_symbol_sequence,
    pack_all,
)
from ecqx_onnx_converters.storage.packed.reader import decode, stored_bytes

__all__ = ["decode", "encode", "encode_all", "find_symbol_sequence", "pack_all", "stored_bytes"]
