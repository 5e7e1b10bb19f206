"""Save exported programs (.pt2), and load those of strangers without running a line of theirs.

`torch.export.load` is no sandbox: it unpickles members, looks operators up below `torch`, lets
sympy evaluate sizes, and runs Python source made of the names in the file. So torch never sees the
file. Its members are read as zip and JSON and accepted only if torch.export.save writes them:

    archive_format, archive_version, byteorder         fixed bytes
    .data/version, .data/serialization_id              digits
    models/model.json                                  rebuilt by `schema`
    data/weights/model_weights_config.json             rebuilt by `schema`
    data/weights/weight_<n>                            raw elements, as many as the config claims
    data/constants/model_constants_config.json, data/constants/tensor_<n>       likewise
    data/sample_inputs/model.pt                        never opened, left out

A new archive is written from the checked values, and torch loads that one.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.inputs.archive import read_members
from ecqx_onnx.inputs.bounded_json import BadJson
from ecqx_onnx.inputs.program.schema import (
    ELEMENT_BYTES,
    Payload,
    UnknownField,
    find_torch_version,
    read_payloads,
    read_program,
)

MODEL = "models/model.json"
WEIGHTS = "data/weights/"
CONSTANTS = "data/constants/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"
CONSTANTS_CONFIG = f"{CONSTANTS}model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
# Members with fixed bytes; torch 2.13 writes these.
FIXED = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
# Members that say nothing of the network.
DIGITS = {
    ".data/version": re.compile(rb"\d{1,4}\n?"),
    ".data/serialization_id": re.compile(rb"\d{1,60}"),
}
AUTHORS_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
# Elements that a tensor repeats (stride 0) are not stored; this bounds what they unfold to.
MOST_UNFOLDING = 8
UNFOLDED_FOR_FREE = 64 * 1024 * 1024  # bytes


def save_program(program: torch.export.ExportedProgram) -> bytes:
    """Write a program as a .pt2 archive.

    Args:
        program: its nodes lose their stack traces, which hold the author's paths.

    Returns:
        The archive's bytes.
    """
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in AUTHORS_NOTES:
                    node.meta.pop(key, None)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Blanked weights are one stored zero each: meant so.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, buffer)
    return buffer.getvalue()


def load_program(
    archive: bytes, source: str, *, weights_are_blank: bool = False
) -> torch.export.ExportedProgram:
    """Load the program in a .pt2 archive.

    Args:
        archive: the file's bytes.
        source: names the file in errors.
        weights_are_blank: each weight is one stored element that stands for a whole tensor, as in
            checkpoints of ours; the caller compares the shapes and puts the weights in.

    Returns:
        The program, without sample inputs and guards.

    Raises:
        FileError: if it is damaged, of another torch's layout, or has anything in it that
            torch.export does not write for a network.
    """
    members = read_members(io.BytesIO(archive), source)
    rebuilt = _rebuild(members, source, weights_are_blank)
    try:
        with _silence_torch():
            program = torch.export.load(io.BytesIO(rebuilt))
    except Exception as error:  # torch raises anything from KeyError to RuntimeError
        raise FileError(
            f"{source}: torch.export cannot load this program ({_take_first_line(error)}); export"
            " it again"
        ) from error
    program._guards_code = []  # strings for exec(); the inputs are ours, no guard is needed
    return program


def run_module(program: torch.export.ExportedProgram) -> torch.nn.Module:
    """Make a callable module of a program, without its guards.

    Args:
        program: as `load_program` gives it, or of torch.export.

    Returns:
        The module; it computes what the program does.

    Raises:
        ModelError: if its parts do not fit each other.
    """
    try:
        with _silence_torch():
            return program.module(check_guards=False)
    except Exception as error:  # torch raises anything from KeyError to SyntaxError
        raise ModelError(
            f"the exported program cannot be run ({_take_first_line(error)}); export it again"
        ) from error


def _rebuild(members: Mapping[str, bytes], source: str, weights_are_blank: bool) -> bytes:
    """A new archive from the checked members. FileError if one is of another kind."""
    _check_names(members, source)
    try:
        document = read_program(members[MODEL])
    except (BadJson, UnknownField) as error:
        by = _tell_writer(members)
        raise FileError(
            f"{source}: {MODEL}: {error}; it was written by {by}, and programs of torch 2.13 with"
            " plain tensors are read: export it again"
        ) from None
    buffer = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(buffer)
    writer.set_min_version(6)
    tensors: list[Payload] = []
    for folder, config_name, prefix in (
        (WEIGHTS, WEIGHTS_CONFIG, "weight_"),
        (CONSTANTS, CONSTANTS_CONFIG, "tensor_"),
    ):
        try:
            config, payloads = read_payloads(members[config_name], prefix)
        except (BadJson, UnknownField) as error:
            raise FileError(f"{source}: {config_name}: {error}; export it again") from None
        _check_payloads(payloads, members, folder, source)
        tensors.extend(payloads.values())
        for path in sorted({payload.path for payload in payloads.values()}):
            data = members[folder + path]
            writer.write_record(folder + path, data, len(data))
        _write_json(writer, config_name, config)
    if not weights_are_blank:
        _check_unfolding(tensors, sum(map(len, members.values())), source)
    _write_json(writer, MODEL, document)
    writer.write_record(SAMPLE_INPUTS, b"", 0)
    for name, data in FIXED.items():
        if name != "byteorder":  # torch's writer adds that one
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return buffer.getvalue()


def _check_names(members: Mapping[str, bytes], source: str) -> None:
    """Every member is one that torch.export.save writes, and none of those is missing."""
    if not any(name.startswith("models/") for name in members):
        raise FileError(
            f"{source}: no exported program in it (no models/*.json); save it with"
            " torch.export.save"
        )
    version = members.get("archive_version")
    if version is not None and version != FIXED["archive_version"]:
        by = _tell_writer(members)
        raise FileError(
            f"{source}: its layout is version {version[:20]!a}, written by {by}; programs of"
            " torch 2.13 are read (layout 0): export it again"
        )
    for name in (MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG, *FIXED):
        if name not in members:
            raise FileError(
                f"{source}: its part {name} is missing, which torch.export.save of torch 2.13"
                " writes; export it again"
            )
    for name, data in FIXED.items():
        if members[name] != data:
            raise FileError(
                f"{source}: its part {name} is {members[name][:20]!a} where {data!r} is read;"
                " export it again"
            )
    for name, data in members.items():
        if name in (MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG, SAMPLE_INPUTS) or name in FIXED:
            continue
        if name in DIGITS and DIGITS[name].fullmatch(data):
            continue
        if re.fullmatch(r"data/(weights/weight|constants/tensor)_\d{1,9}", name, re.ASCII):
            continue
        raise FileError(
            f"{source}: its part {name[:80]!a} is none that torch.export.save writes for a network"
            " of plain tensors (a pickled object, another layout or native code); export it again"
        )


def _check_payloads(
    payloads: Mapping[str, Payload], members: Mapping[str, bytes], folder: str, source: str
) -> None:
    """Every tensor lies within its member's bytes, and every member belongs to a tensor."""
    dtypes: dict[str, int] = {}
    for name, payload in payloads.items():
        data = members.get(folder + payload.path)
        if data is None:
            raise FileError(
                f"{source}: the tensor {name[:80]!a} lies in {payload.path}, which is missing;"
                " export it again"
            )
        element = ELEMENT_BYTES[payload.dtype]
        fits = payload.bytes_needed <= len(data) and len(data) % element == 0
        if not fits or dtypes.setdefault(payload.path, payload.dtype) != payload.dtype:
            raise FileError(
                f"{source}: the tensor {name[:80]!a} claims {payload.bytes_needed} bytes in"
                " elements"
                f" of {element}, its part {payload.path} has {len(data)}; export it again"
            )
    prefix = re.compile(re.escape(folder) + r"[a-z]+_\d+", re.ASCII)
    for name in members:
        if prefix.fullmatch(name) and name.removeprefix(folder) not in dtypes:
            raise FileError(f"{source}: its part {name} belongs to no tensor; export it again")


def _check_unfolding(tensors: list[Payload], stored: int, source: str) -> None:
    """A tensor may repeat its elements (stride 0), but not to fill the memory."""
    unfolded = sum(tensor.bytes_unfolded for tensor in tensors)
    if unfolded > MOST_UNFOLDING * stored + UNFOLDED_FOR_FREE:
        raise FileError(
            f"{source}: its tensors claim {unfolded} bytes, the file has {stored}; export"
            " contiguous tensors"
        )


def _tell_writer(members: Mapping[str, bytes]) -> str:
    version = find_torch_version(members.get(MODEL, b""))
    return "another torch" if version is None else f"torch {version}"


def _write_json(writer: Any, name: str, document: Any) -> None:
    data = json.dumps(document).encode()
    writer.write_record(name, data, len(data))


@contextlib.contextmanager
def _silence_torch() -> Iterator[None]:
    """torch logs the traceback of what it could not load; our error says it in a sentence."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _take_first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
