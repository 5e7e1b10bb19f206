"""The job folder that a runner on any device can do, and the result that it leaves.

The folder is specified in docs/devices.md. Nothing that comes back is believed before its
checksum, type and shape fit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import OnnxFile
from ecqx_onnx.inputs.reading import open_regular, read_bytes

VERSION = 1
LATENCY_SECONDS = 10.0  # after which a runner stops measuring, however many runs it has done
LARGEST_RESULT = 2**24  # bytes of result.json; a batch takes about 200
LARGEST_OUTPUT = 2**30  # bytes of one output of one batch
MOST_DIMENSIONS = 32
LONGEST_TEXT = 1000  # characters of a name, a path or a message
MOST_OPERATORS = 10_000  # kinds
LARGEST_COUNT = 2**53  # of runs, nodes, bytes
OUTPUT_TYPES = (
    "float16", "float32", "float64", "bool",
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)  # fmt: skip
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """A job as it lies on disk.

    Attributes:
        folder: Holds job.json and all that it names.
        id: sha256 over the whole job, so that no result of another one fits.
        model_sha256: Of the model's file.
        batches: How many there are.
    """

    folder: Path
    id: str
    model_sha256: str
    batches: int


@dataclass(frozen=True)
class DeviceLatency:
    """Medians of what a device measured.

    Attributes:
        seconds: For one sample.
        runs: How many were measured.
        float_seconds: The same of the decoded float model, where the job had one.
        ratio: seconds / float_seconds, measured in pairs.
    """

    seconds: float
    runs: int
    float_seconds: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What a runner found; None where the runtime does not tell.

    Attributes:
        folder: Where the outputs lie.
        runtime: Name and version of what ran.
        batches: For each batch, what result.json says of its outputs.
        plain: Outputs of the first batch with all optimizations switched off.
        operators: Executions of each operator's type.
        load_seconds: How long loading takes.
        latency: Of one sample.
        peak_memory: Bytes.
    """

    folder: Path
    runtime: str
    batches: tuple[tuple[Mapping[str, Any], ...], ...]
    plain: tuple[np.ndarray, ...] | None
    operators: Mapping[str, int] | None
    load_seconds: float | None
    latency: DeviceLatency | None
    peak_memory: int | None

    def outputs(self) -> Iterator[tuple[np.ndarray, ...]]:
        """Read the outputs, one batch in memory at a time.

        Yields:
            The outputs of a batch.

        Raises:
            FileError: A file is not what result.json says.
        """
        for number, entries in enumerate(self.batches):
            yield tuple(
                _read_array(self.folder, entry, f"output {i} of batch {number}")
                for i, entry in enumerate(entries)
            )


def write_job(
    file: OnnxFile,
    folder: Path,
    batches: Iterable[Feed],
    single: Feed,
    *,
    decoded: bytes | None = None,
    latency_runs: int = 50,
) -> Job:
    """Write a job into a folder.

    Args:
        file: The model.
        folder: Empty, exists.
        batches: Inputs by name.
        single: One sample, for latency and operators.
        decoded: The serialized float model to compare latency with, or None.
        latency_runs: Pairs of measurements; 0 leaves latency out.

    Returns:
        The job.
    """
    (folder / "inputs").mkdir()
    external = copy_model(file, folder / "model.onnx")
    if decoded is not None:
        (folder / "twin.onnx").write_bytes(decoded)
    job: dict[str, Any] = {
        "version": VERSION,
        "model": _describe_run(folder, "model.onnx"),
        "external": [path.name for path in external],
        "twin": None if decoded is None else _describe_run(folder, "twin.onnx"),
        "batches": [
            _store_feed(folder, feed, f"{number:05d}") for number, feed in enumerate(batches)
        ],
        "single": _store_feed(folder, single, "single"),
        "latency_runs": latency_runs,
        "latency_seconds": LATENCY_SECONDS,
    }
    job["id"] = hashlib.sha256(
        json.dumps({**job, "latency_runs": 0, "twin": None}, sort_keys=True).encode()
    ).hexdigest()
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    (folder / "job.txt").write_text(_format_lines(job), encoding="utf-8")
    return Job(folder, job["id"], job["model"]["sha256"], len(job["batches"]))


def _format_lines(job: Mapping[str, Any]) -> str:
    """What a runner needs of job.json, for runners that have no JSON: fields between tabs."""
    rows = [
        ("# the same as job.json; docs/devices.md says what each row means",),
        ("id", job["id"]),
    ]
    rows.append(("latency_runs", str(job["latency_runs"])))
    for kind, entries in [
        *(("input", batch) for batch in job["batches"]),
        ("single", job["single"]),
    ]:
        rows += [("batch",)] if kind == "input" else []
        rows += [
            (kind, e["file"], e["dtype"], "x".join(map(str, e["shape"])), e["sha256"])
            for e in entries
        ]
    return "".join("\t".join(row) + "\n" for row in rows)


def read_result(job: Job, device: str, *, folder: Path | None = None) -> Result:
    """Reads what a runner found; every field is checked before anything else sees it.

    Args:
        job: the job that was to be done.
        device: its name, for messages.
        folder: where result.json and the outputs lie, if not in the job's own folder.

    Returns:
        The result.

    Raises:
        FileError: if it is missing, damaged, larger than a runner writes, or of another model or
            job.
        ModelError: if the runtime refused the model.
    """
    folder = job.folder if folder is None else folder
    path = folder / "result.json"
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        raise FileError(
            f"{device}: the runner left no result.json; it was stopped or could not write to its "
            "folder"
        ) from None
    except OSError as error:
        raise FileError(
            f"{path}: is no result of a runner ({error.strerror}); run the job again"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise FileError(
            f"{path}: is no result of a runner but a link, a folder or a pipe; run the job again"
        )
    if status.st_size > LARGEST_RESULT:
        raise FileError(
            f"{path}: has {status.st_size} bytes, more than a runner writes; run the job again"
        )
    try:
        raw = json.loads(read_bytes(path, most=LARGEST_RESULT).decode("utf-8"))
    except (FileError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: is no result of a runner ({error}); run the job again") from None
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        raise FileError(
            f"{path}: is no result of format version {VERSION}; use the runner that came with the "
            "job"
        )
    # The model first: this sentence is the one that tells what went wrong.
    found = raw.get("model_sha256")
    if found is not None and found != job.model_sha256:
        raise FileError(
            f"{path}: is the result of another model (sha256 {str(found)[:12]}…, this file has "
            f"{job.model_sha256[:12]}…); "
            "run the job again with this one"
        )
    if raw.get("job") != job.id:
        raise FileError(
            f"{path}: is the result of another job, with other data or batches; run this one"
        )
    if raw.get("error"):
        _refuse_result(device, raw)
    try:
        return _parse_result(job, folder, raw)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FileError(
            f"{path}: is damaged ({type(error).__name__}: {error}); run the job again"
        ) from None


def _refuse_result(device: str, raw: Mapping[str, Any]) -> None:
    from ecqx_onnx.runtime.sessions import shorten_reason

    error = raw["error"] if isinstance(raw["error"], dict) else {"message": raw["error"]}
    if error.get("stage") == "load":
        does = "does not load the model"
    else:
        does = "fails while running the model"
    runtime = str(raw.get("runtime", "the runtime"))[:LONGEST_TEXT]
    message = str(error.get("message"))[:LONGEST_TEXT]
    raise ModelError(f"{device}: {runtime} {does}: {shorten_reason(Exception(message))}")


def _parse_result(job: Job, folder: Path, raw: Mapping[str, Any]) -> Result:
    """ValueError or TypeError for a field that no runner writes so."""
    batches = _list(raw["batches"], "batches")
    if len(batches) != job.batches:
        raise ValueError(f"{len(batches)} batches of {job.batches}")
    outputs = []
    for batch in batches:
        outputs.append(tuple(dict(entry) for entry in _list(batch, "a batch")))
    plain = raw.get("plain")
    if plain is not None:
        entries = _list(plain, "plain")
        plain = tuple(_read_array(folder, entry, "an unoptimised output") for entry in entries)
    peak_memory = raw.get("peak_memory")
    if peak_memory is not None:
        peak_memory = _count(peak_memory, "peak_memory")
    return Result(
        folder=folder,
        runtime=_read_text(raw["runtime"], "runtime"),
        batches=tuple(outputs),
        plain=plain,
        operators=_read_operators(raw.get("operators")),
        load_seconds=_read_seconds(raw.get("load_seconds"), "load_seconds"),
        latency=_read_latency(raw.get("latency")),
        peak_memory=peak_memory,
    )


def _read_operators(value: Any) -> dict[str, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_OPERATORS:
        raise ValueError("operators is no object of counts")
    return {
        _read_text(name, "an operator"): _count(count, "a count of operators")
        for name, count in value.items()
    }


def _read_latency(value: Any) -> DeviceLatency | None:
    if value is None:
        return None
    seconds, runs = _read_seconds(value["seconds"], "seconds"), _count(value["runs"], "runs")
    if seconds is None:
        raise ValueError("latency without seconds")
    compared = (_read_seconds(value.get(name), name) for name in ("float_seconds", "ratio"))
    return DeviceLatency(seconds, runs, *compared)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{what} is no list")
    return value


def _read_text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise TypeError(f"{what} is no text of at most {LONGEST_TEXT} characters")
    return value


def _count(value: Any, what: str) -> int:
    if type(value) not in (int, float) or not 0 <= value <= LARGEST_COUNT or value != int(value):
        raise ValueError(f"{what} is no count")
    return int(value)


def _read_seconds(value: Any, what: str) -> float | None:
    """A finite number of at least 0, or None."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= LARGEST_COUNT:
        raise ValueError(f"{what} is no number of at least 0")
    return float(value)


def _describe_run(folder: Path, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "sha256": compute_sha256(folder / name),
        "bytes": (folder / name).stat().st_size,
    }


def _store_feed(folder: Path, feed: Feed, stem: str) -> list[dict[str, Any]]:
    entries = []
    for number, (name, array) in enumerate(feed.items()):
        file = f"inputs/{stem}.{number}.bin"
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        (folder / file).write_bytes(data)
        sha = hashlib.sha256(data).hexdigest()
        entries.append(
            {
                "name": name,
                "file": file,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "sha256": sha,
            }
        )
    return entries


def _read_array(folder: Path, entry: Mapping[str, Any], what: str) -> np.ndarray:
    """An output as result.json describes it.

    Its size and checksum are compared before it is read into memory.
    """
    result = folder / "result.json"
    try:
        text, shape = _read_text(entry["file"], "file"), tuple(_list(entry["shape"], "shape"))
        kind = _read_text(entry["dtype"], "dtype")
        if any(type(length) is not int for length in shape):
            raise TypeError("a length is no integer")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FileError(
            f"{result}: {what} is not described as file, dtype and shape ({error})"
        ) from None
    counts = list(shape)
    if min(counts, default=0) < 0 or max(counts, default=0) > LARGEST_COUNT:
        raise FileError(
            f"{result}: {what} claims the shape {str(counts)[:100]}, which is not one; run the "
            "job again"
        )
    if kind not in OUTPUT_TYPES or len(counts) > MOST_DIMENSIONS:
        found = f"'{kind[:20]}' in {len(counts)} dimensions"
        raise FileError(
            f"{result}: {what} is {found}, which is not described in docs/devices.md; run the job "
            "again"
        )
    name, dtype = PurePosixPath(text), np.dtype(kind)
    if name.is_absolute() or ".." in name.parts or "\0" in text:
        raise FileError(
            f"{result}: {what} points to '{name}', outside of the job's folder: refused"
        )
    claimed = math.prod(counts) * dtype.itemsize
    if claimed >= LARGEST_OUTPUT:
        raise FileError(
            f"{result}: {what} claims {claimed} bytes, which is not below {LARGEST_OUTPUT}: use a "
            "smaller batch size"
        )
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # Python 3.11 says so of links that lead in a circle
        raise FileError(
            f"{path}: {what} cannot be found behind its links; bring the file back from the "
            "device too"
        ) from None
    if not inside:
        raise FileError(
            f"{path}: {what} lies behind a link that leaves the results' folder: refused"
        )
    try:
        file = open_regular(path)
    except FileError as error:
        raise FileError(
            f"{path}: {what} cannot be read ({error}); bring it back from the device too"
        ) from None
    with file:
        present = os.fstat(file.fileno()).st_size
        fits = present == claimed
        data = file.read(claimed) if fits else b""
    if not fits and present <= LARGEST_OUTPUT and compute_sha256(path) == entry.get("sha256"):
        raise FileError(
            f"{path}: {what} holds {present} bytes, which is not {dtype} of shape {counts}"
        )
    if not fits or hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise FileError(
            f"{path}: {what} was changed or cut short after the runner wrote it (sha256); run the "
            "job again"
        )
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(counts).astype(dtype, copy=False)


def compute_sha256(path: Path) -> str:
    """Compute a file's checksum.

    Args:
        path: The file.

    Returns:
        sha256 in hexadecimal digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
