"""The parts of a folder's manifest: what runners read of files, golden cases, inputs and outputs.

manifest.json holds everything; golden.txt holds the same in lines, for runners without a JSON
parser. Arrays lie beside them as raw little-endian bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ecqx_onnx.deployment.golden import Case
from ecqx_onnx.errors import ModelError
from ecqx_onnx.preprocessing.spectrum import Spectrum
from ecqx_onnx.runtime.sessions import NUMPY_TYPES


def describe_file(path: Path) -> dict[str, Any]:
    """Describe a file that lies in the folder.

    Args:
        path: of the file.

    Returns:
        Its name, checksum and size, as the manifest holds them.
    """
    with path.open("rb") as copy:
        digest = hashlib.file_digest(copy, "sha256").hexdigest()
    return {"file": path.name, "sha256": digest, "bytes": path.stat().st_size}


def describe_node(node: Any) -> dict[str, Any]:
    """Describe an input or output of the graph.

    Args:
        node: as onnxruntime's sessions list them.

    Returns:
        Its name, numpy's name of its type, and its shape, as the manifest holds them; None is a
        free length.

    Raises:
        ModelError: for types that runners cannot be given.
    """
    dtype = np.dtype(NUMPY_TYPES.get(node.type, np.object_))
    if dtype.hasobject:  # texts and sequences are no bytes of a fixed width
        raise ModelError(
            f"'{node.name}' has type {node.type}, for which no golden values can be made"
        )
    shape = [length if isinstance(length, int) else None for length in node.shape]
    return {"name": node.name, "dtype": dtype.name, "shape": shape}


def store_case(
    folder: Path, number: int, case: Case, inputs: Sequence[str], outputs: Sequence[str]
) -> dict[str, Any]:
    """Write a golden case's arrays to files.

    Args:
        folder: the deployment's folder; the files go into its folder golden/.
        number: of the case, from 0.
        case: the arrays.
        inputs: names of the model's inputs.
        outputs: names of the model's outputs.

    Returns:
        What the manifest says of the files.
    """
    stem = f"golden/{number:02d}"
    raw = None
    if case.raw is not None:
        raw = _store_array(folder, f"{stem}.raw.bin", "raw", case.raw)
    return {
        "raw": raw,
        "inputs": _store_arrays(folder, f"{stem}.input", inputs, case.inputs),
        "outputs": _store_arrays(folder, f"{stem}.output", outputs, case.outputs),
        "labels": list(case.labels),
    }


def _store_arrays(
    folder: Path, stem: str, names: Sequence[str], arrays: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    entries = []
    for i, array in enumerate(arrays):
        entries.append(_store_array(folder, f"{stem}{i}.bin", names[i], array))
    return entries


def _store_array(folder: Path, file: str, name: str, array: np.ndarray) -> dict[str, Any]:
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    return {
        "name": name,
        "file": file,
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "sha256": digest,
    }


def format_lines(manifest: dict[str, Any]) -> str:
    """Write what a runner without a JSON parser needs of the manifest.

    Args:
        manifest: all of it.

    Returns:
        Lines of fields between tabs; white space within a field is a single space.
    """
    lines = []
    for row in (*_list_model_rows(manifest), *_list_preprocessing_rows(manifest)):
        lines.append(_format_row(row))
    for case in manifest["golden"]["cases"]:
        for row in _list_case_rows(case):
            lines.append(_format_row(row))
    return "".join(lines)


def _format_row(row: Sequence[Any]) -> str:
    return "\t".join(" ".join(str(field).split()) for field in row) + "\n"


def _list_model_rows(manifest: dict[str, Any]) -> Iterator[Sequence[Any]]:
    model = manifest["model"]
    yield ["# manifest.json in lines"]
    yield ["model", model["file"], model["bytes"], model["float32_bytes"] or 0, model["sha256"]]
    for entry in manifest["external"]:
        yield ["external", entry["file"], entry["sha256"]]
    for entry in manifest["inputs"]:
        yield ["input", entry["name"]]
    for entry in manifest["outputs"]:
        yield ["output", entry["name"], repr(entry["tolerance"]), repr(entry["raw_tolerance"])]
    yield ["preprocessing_tolerance", repr(manifest["golden"]["preprocessing_tolerance"])]
    for label in manifest["labels"]:
        yield ["label", label]


def _list_preprocessing_rows(manifest: dict[str, Any]) -> Iterator[Sequence[Any]]:
    preprocessing = manifest["preprocessing"]
    if preprocessing:
        yield ["kind", preprocessing["kind"]]
        yield ["scale", repr(preprocessing["scale"])]
        for key in ("mean", "std"):
            if preprocessing[key]:
                yield [key, *map(repr, preprocessing[key])]
        spectrum = preprocessing["spectrum"]
        if spectrum:
            yield ["spectrum", *(spectrum[field.name] for field in fields(Spectrum))]
    if manifest["raw"]:
        yield ["raw", _format_shape(manifest["raw"]["shape"])]


def _list_case_rows(case: dict[str, Any]) -> Iterator[Sequence[Any]]:
    yield ["case"]
    raw = [case["raw"]] if case["raw"] else []
    for kind, entries in (("raw", raw), ("input", case["inputs"]), ("output", case["outputs"])):
        for entry in entries:
            shape = _format_shape(entry["shape"])
            yield [f"golden_{kind}", entry["file"], entry["dtype"], shape, entry["sha256"]]


def _format_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
