"""The codecs by the names that files and options give them."""

from collections.abc import Mapping

from ecqx_onnx_converters.storage import Storage, dense, packed, sparse

STORAGES: Mapping[str, Storage] = {"dense": dense, "sparse": sparse, "packed": packed}
