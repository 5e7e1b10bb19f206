"""The packed codec: entropy-coded integers that the graph itself decodes at load.

docs/packed-format.md specifies it. The way of a weight, file by file: clusters (rows that are
alike), symbols (levels to pairs), alphabets (pairs to symbols), huffman (codewords), stream (the
values in between), choices and grouping (parameters and streams of a file), bitstream (payload),
onnx_decoder (nodes and functions), encoder (all of it); back: reader (arrays out of a file) and
reference_decoder (levels).
"""

from ecqx_onnx_converters.storage.packed.clusters import (
    decode,
    encode,
    encode_all,
    stored_bytes,
)
from ecqx_onnx_converters.storage.packed.encoder import find_symbol_sequence, pack_all

__all__ = ["decode", "encode", "encode_all", "find_symbol_sequence", "pack_all", "stored_bytes"]
