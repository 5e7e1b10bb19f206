"""Storage name -> the module that has it."""

from collections.abc import Mapping

from ecqx_onnx_converters.storage import Storage, dense, sparse

STORAGES: Mapping[str, Storage] = {"dense": dense, "sparse": sparse}
