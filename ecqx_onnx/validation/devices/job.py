"""(.onnx file, batches) -> a job folder that a runner on any device can do; its result.json -> a checked Result.

The folder is specified in docs/devices.md. Nothing that comes back is believed before its checksum, type and shape fit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ecqx_onnx.errors import FileError, ModelError
from ecqx_onnx.model_copy import copy_model
from ecqx_onnx.onnx_file import OnnxFile

VERSION = 1
LATENCY_SECONDS = 10.0  # after which a runner stops measuring, however many runs it has done
LARGEST_RESULT = 2**26  # bytes of result.json; a batch takes about 200
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Job:
    """folder: holds job.json and all that it names. id: sha256 over the whole job, so that no result of another one fits."""

    folder: Path
    id: str
    model_sha256: str
    batches: int


@dataclass(frozen=True)
class DeviceLatency:
    """Medians in seconds; float_seconds and ratio where the job had a float twin."""

    seconds: float
    runs: int
    float_seconds: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """What a runner found. operators, load_seconds, latency, peak_memory: None where the runtime does not tell.

    plain: outputs of the first batch with all optimisations switched off, or None.
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
        """The outputs of each batch, one batch in memory at a time. FileError if a file is not what result.json says."""
        for number, entries in enumerate(self.batches):
            yield tuple(_array(self.folder, entry, f"output {i} of batch {number}") for i, entry in enumerate(entries))


def write_job(
    file: OnnxFile, folder: Path, batches: Iterable[Feed], single: Feed, *, twin: bytes | None = None, latency_runs: int = 50
) -> Job:
    """folder: empty, exists. single: one sample, for latency and operators. twin: the float model to compare latency with."""
    (folder / "inputs").mkdir()
    external = copy_model(file, folder / "model.onnx")
    if twin is not None:
        (folder / "twin.onnx").write_bytes(twin)
    job: dict[str, Any] = {
        "version": VERSION,
        "model": _described(folder, "model.onnx"),
        "external": [path.name for path in external],
        "twin": None if twin is None else _described(folder, "twin.onnx"),
        "batches": [_stored(folder, feed, f"{number:05d}") for number, feed in enumerate(batches)],
        "single": _stored(folder, single, "single"),
        "latency_runs": latency_runs,
        "latency_seconds": LATENCY_SECONDS,
    }
    job["id"] = hashlib.sha256(json.dumps({**job, "latency_runs": 0, "twin": None}, sort_keys=True).encode()).hexdigest()
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    (folder / "job.txt").write_text(_as_lines(job), encoding="utf-8")
    return Job(folder, job["id"], job["model"]["sha256"], len(job["batches"]))


def _as_lines(job: Mapping[str, Any]) -> str:
    """What a runner needs of job.json, for runners that have no JSON: fields between tabs."""
    rows = [("# the same as job.json; docs/devices.md says what each row means",), ("id", job["id"])]
    rows.append(("latency_runs", str(job["latency_runs"])))
    for kind, entries in [*(("input", batch) for batch in job["batches"]), ("single", job["single"])]:
        rows += [("batch",)] if kind == "input" else []
        rows += [(kind, e["file"], e["dtype"], "x".join(map(str, e["shape"])), e["sha256"]) for e in entries]
    return "".join("\t".join(row) + "\n" for row in rows)


def read_result(job: Job, device: str) -> Result:
    """The runner's result, believed. FileError if it is missing, damaged or of another model or job; ModelError if the
    runtime refused the model."""
    path = job.folder / "result.json"
    try:
        if path.stat().st_size > LARGEST_RESULT:
            raise FileError(f"{path}: has {path.stat().st_size} bytes, more than a runner writes; run the job again")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{device}: the runner left no result.json; it was stopped or could not write to its folder") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: is no result of a runner ({error}); run the job again") from None
    if not isinstance(raw, dict) or raw.get("version") != VERSION:
        raise FileError(f"{path}: is no result of format version {VERSION}; use the runner that came with the job")
    # The model first: this sentence is the one that tells what went wrong.
    found = raw.get("model_sha256")
    if found is not None and found != job.model_sha256:
        raise FileError(
            f"{path}: is the result of another model (sha256 {str(found)[:12]}…, this file has {job.model_sha256[:12]}…); "
            "run the job again with this one"
        )
    if raw.get("job") != job.id:
        raise FileError(f"{path}: is the result of another job, with other data or batches; run this one")
    if raw.get("error"):
        _refuse(device, raw)
    try:
        return _result(job, raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{path}: is damaged ({type(error).__name__}: {error}); run the job again") from None


def _refuse(device: str, raw: Mapping[str, Any]) -> None:
    from ecqx_onnx.validation.sessions import reason

    error = raw["error"] if isinstance(raw["error"], dict) else {"message": raw["error"]}
    does = "does not load the model" if error.get("stage") == "load" else "fails while running the model"
    raise ModelError(f"{device}: {raw.get('runtime', 'the runtime')} {does}: {reason(Exception(error.get('message')))}")


def _result(job: Job, raw: Mapping[str, Any]) -> Result:
    plain = raw.get("plain")
    if len(raw["batches"]) != job.batches:
        raise ValueError(f"{len(raw['batches'])} batches of {job.batches}")
    latency, operators = raw.get("latency"), raw.get("operators")
    return Result(
        folder=job.folder,
        runtime=str(raw["runtime"]),
        batches=tuple(tuple(dict(entry) for entry in batch) for batch in raw["batches"]),
        plain=None if plain is None else tuple(_array(job.folder, entry, "an unoptimised output") for entry in plain),
        operators=None if operators is None else {str(name): int(count) for name, count in operators.items()},
        load_seconds=_float(raw.get("load_seconds")),
        latency=None
        if latency is None
        else DeviceLatency(
            float(latency["seconds"]), int(latency["runs"]), _float(latency.get("float_seconds")), _float(latency.get("ratio"))
        ),
        peak_memory=None if raw.get("peak_memory") is None else int(raw["peak_memory"]),
    )


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _described(folder: Path, name: str) -> dict[str, Any]:
    return {"file": name, "sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}


def _stored(folder: Path, feed: Feed, stem: str) -> list[dict[str, Any]]:
    entries = []
    for number, (name, array) in enumerate(feed.items()):
        file = f"inputs/{stem}.{number}.bin"
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
        (folder / file).write_bytes(data)
        sha = hashlib.sha256(data).hexdigest()
        entries.append({"name": name, "file": file, "dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha})
    return entries


def _array(folder: Path, entry: Mapping[str, Any], what: str) -> np.ndarray:
    try:
        name, shape, dtype = PurePosixPath(entry["file"]), tuple(map(int, entry["shape"])), np.dtype(entry["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{folder / 'result.json'}: {what} is not described as file, dtype and shape ({error})") from None
    if name.is_absolute() or ".." in name.parts:
        raise FileError(f"{folder / 'result.json'}: {what} points to '{name}', outside of the job's folder: refused")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise FileError(f"{folder / name}: {what} cannot be read ({error.strerror}); bring it back from the device too") from None
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise FileError(f"{folder / name}: {what} was changed or cut short after the runner wrote it (sha256); run the job again")
    if dtype.hasobject or min(shape, default=0) < 0 or len(data) != math.prod(shape) * dtype.itemsize:
        raise FileError(f"{folder / name}: {what} holds {len(data)} bytes, which is not {dtype} of shape {list(shape)}")
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape).astype(dtype, copy=False)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
