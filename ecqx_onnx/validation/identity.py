"""Is a file the very model that it is compared with, byte for byte?

`pack` copies what it can't make smaller. A copy needs no run to prove that it says the same: not
even of a model that nothing here can run.
"""

from __future__ import annotations

from ecqx_onnx_converters.graph.files import read_external_bytes
from ecqx_onnx_converters.graph.graph import clear_data
from onnx import ModelProto, TensorProto

from ecqx_onnx.inputs.onnx_file import OnnxFile, list_named_tensors
from ecqx_onnx.validation.report import Check


def check_identity(file: OnnxFile, original: OnnxFile) -> Check | None:
    """Compare two files without running them.

    Args:
        file: The file to check.
        original: What it may be a copy of; its external data may lie in files of other names.

    Returns:
        The check "identity"; None where the two differ, which says nothing yet.
    """
    if not file.external and not original.external:
        same = file.path.read_bytes() == original.path.read_bytes()
    else:
        same = _hold_the_same(file, original)
    if not same:
        return None
    sentence = "the file is the original, byte for byte: nothing was packed, and nothing can differ"
    return Check("identity", True, None, None, sentence)


def _hold_the_same(file: OnnxFile, original: OnnxFile) -> bool:
    """Whether graphs and data are equal; one tensor of external data is read at a time."""
    mine = _clear_external(file)
    theirs = _clear_external(original)
    if mine.SerializeToString(deterministic=True) != theirs.SerializeToString(deterministic=True):
        return False
    pairs = zip(list_named_tensors(file.proto), list_named_tensors(original.proto), strict=True)
    for (_, tensor), (_, other) in pairs:
        if _read_data(file, tensor) != _read_data(original, other):
            return False
    return True


def _clear_external(file: OnnxFile) -> ModelProto:
    """A copy of the model that doesn't say where its external data lies."""
    proto = ModelProto()
    proto.CopyFrom(file.proto)
    for _, tensor in list_named_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            clear_data(tensor)
    return proto


def _read_data(file: OnnxFile, tensor: TensorProto) -> bytes:
    """The external data of a tensor; nothing for one whose data the model holds itself."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return b""
    return read_external_bytes(tensor, file.path)
