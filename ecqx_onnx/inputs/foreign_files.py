"""Tell from a file's first bytes which other tool wrote it, and what to do with it here.

Nothing in the file is run or unpickled.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD = 16  # bytes that tell formats apart


def advise_on_foreign(path: Path) -> str | None:
    """Say what the file is, if it is none that torch.save or torch.export wrote.

    Args:
        path: an existing file.

    Returns:
        What it is and what to do, to follow the file's name; None for all that may be PyTorch's.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head[4:8] == b"TFL3":
        return (
            "is a TensorFlow Lite model; write the network as .onnx (tf2onnx --tflite) and give it"
            " to `ecqx-onnx pack`"
        )
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return (
            "is a Keras or HDF5 file; write the network as .onnx (tf2onnx) and give it to"
            " `ecqx-onnx pack`"
        )
    if head[:4] == b"GGUF":
        return (
            "is a GGUF file of quantised weights, which is not read here; give the float weights of"
            " PyTorch"
        )
    if _is_protobuf_of_a_model(head):
        if head[4:5] == b"\x0a":
            return (
                "is a Core ML model; give the network that it was made from, or `convert --target"
                " coreml` for one anew"
            )
        return "holds an ONNX model by another name; name it .onnx and give it to `ecqx-onnx pack`"
    return _advise_on_archive(path)


def _is_protobuf_of_a_model(head: bytes) -> bool:
    """Whether a small version number is field 1, and field 2 follows.

    Field 2 is the producer's name in ONNX, and a description in Core ML.
    """
    return len(head) > 4 and head[0] == 0x08 and head[1] < 0x40 and head[2] == 0x12


def _advise_on_archive(path: Path) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as members:
            names = members.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None  # told by those who read it
    if names and all(name.endswith(".npy") for name in names):
        return "is an .npz of arrays and was not written by torch.save; give the model's file"
    if any(name.endswith("model.weights.h5") for name in names):
        return (
            "is a Keras model; write the network as .onnx (tf2onnx) and give it to `ecqx-onnx pack`"
        )
    if any(
        name.endswith("/constants.pkl") or "/code/" in name for name in names
    ) and not _is_program(names):
        return (
            "is a TorchScript file; take its weights out"
            " (torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')) and"
            " give them with --model FILE.py:FACTORY, or export the network with torch.export"
        )
    return None


def _is_program(names: list[str]) -> bool:
    return any(name.endswith("archive_format") or "/models/" in name for name in names)
