"""Runs the job in a folder (docs/devices.md) on the device, and writes result.json there.

Needs numpy and onnxruntime only.

    python3 run.py FOLDER

It is self-contained and written for any Python from 3.8 and onnxruntime from 1.15, because it
travels to machines that have nothing of this project. Exit status 0 if result.json was written,
even if that says that the runtime refused the model.
"""

import collections
import ctypes
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

# onnxruntime 1.32 leaves a device id and a database in the home folder and reports its use. It
# reads this at import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime

VERSION = 1
WARM_UPS = 2
# seconds: faster models run several times per measurement, so that the clock does not matter
SHORTEST = 1e-3
LOADS = 3


def main(folder):
    (folder / "outputs").mkdir(exist_ok=True)
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    result = {"version": VERSION, "job": job["id"], "runtime": runtime()}
    stage = "load"
    try:
        model = folder / job["model"]["file"]
        result["model_sha256"] = sha256(model)
        before = reset_peak()
        session = load(model)
        trim_heap()
        stage = "run"
        batches = []
        for number, entries in enumerate(job["batches"]):
            outputs = run(session, folder, entries)
            batches.append(
                [
                    store(folder, f"outputs/{number:05d}.{i}.bin", array)
                    for i, array in enumerate(outputs)
                ]
            )
            if number == 0:
                result["peak_memory"] = peak(before)
            print(f"{number + 1}/{len(job['batches'])}", flush=True)
        result["batches"] = batches
        del session
        plain = run(load(model, optimised=False), folder, job["batches"][0])
        result["plain"] = [
            store(folder, f"outputs/plain.{i}.bin", array) for i, array in enumerate(plain)
        ]
        result["operators"] = executed_operators(model, folder, job["single"])
        result["load_seconds"] = median([seconds(lambda: load(model)) for _ in range(LOADS)])
        result["latency"] = latency(folder, job, model)
    except Exception as error:  # whatever the runtime throws is the result of this run
        result["error"] = {
            "stage": stage,
            "message": " ".join(str(error).split())[:1000] or type(error).__name__,
        }
    partial = folder / "result.json.part"
    partial.write_text(json.dumps(result), encoding="utf-8")
    os.replace(partial, folder / "result.json")


def runtime():
    machine = platform.machine() + (", emulated" if emulated() else "")
    return (
        f"onnxruntime {onnxruntime.__version__}, CPUExecutionProvider, {platform.system()} "
        f"{machine}"
    )


def emulated():
    return os.environ.get("ECQX_ONNX_EMULATED") == "1"


def trim_heap():
    """Give back what loading has left free in the heap, where the C library has a call for it."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def load(model, optimised=True, profile=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run(session, folder, entries):
    return session.run(None, read(folder, entries))


def read(folder, entries):
    """Each entry: name, file, dtype, shape. The file holds the values in C order, little-endian."""
    arrays = {}
    for entry in entries:
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        arrays[entry["name"]] = np.fromfile(str(folder / entry["file"]), dtype).reshape(
            entry["shape"]
        )
    return arrays


def store(folder, name, array):
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    (folder / name).write_bytes(data)
    sha = hashlib.sha256(data).hexdigest()
    return {"file": name, "dtype": array.dtype.name, "shape": list(array.shape), "sha256": sha}


def executed_operators(model, folder, entries):
    with tempfile.TemporaryDirectory() as temporary:
        session = load(model, profile=os.path.join(temporary, "profile"))
        run(session, folder, entries)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    names = [event["args"].get("op_name") for event in events if event.get("cat") == "Node"]
    return dict(collections.Counter(name for name in names if name))


def latency(folder, job, model):
    """Medians of one sample on one thread, the model and its float twin in turn."""
    if not job["latency_runs"]:
        return None
    inputs = read(folder, job["single"])
    sessions = [load(model)] + ([load(folder / job["twin"]["file"])] if job["twin"] else [])
    for session in sessions:
        for _ in range(WARM_UPS):
            session.run(None, inputs)
    fastest = min(repeated(session, inputs, 1) for session in sessions)
    inner = max(1, round(SHORTEST / max(1e-6, fastest)))
    times: list = []
    end = time.perf_counter() + job["latency_seconds"]
    while len(times) < job["latency_runs"] and (not times or time.perf_counter() < end):
        order = list(enumerate(sessions))
        pair = {
            i: repeated(session, inputs, inner)
            for i, session in (order if len(times) % 2 == 0 else order[::-1])
        }
        times.append([pair[i] for i in range(len(sessions))])
    found = {"seconds": median([pair[0] for pair in times]), "runs": len(times)}
    if job["twin"]:
        found["float_seconds"] = median([pair[1] for pair in times])
        found["ratio"] = median([pair[0] / pair[1] for pair in times])
    return found


def repeated(session, inputs, count):
    return seconds(lambda: [session.run(None, inputs) for _ in range(count)]) / count


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median(values):
    return float(np.median(values))


def sha256(path):
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def reset_peak():
    """Resident bytes now, the kernel's high-water mark set back to it. None where that cannot be
    had (not Linux, emulated)."""
    if emulated():
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")
    except (OSError, IndexError):
        return None


def peak(before):
    """How many bytes the process grew at its peak since `reset_peak`."""
    return None if before is None else max(0, status("VmHWM") - before)


def status(field):
    return 1024 * int(re.findall(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
