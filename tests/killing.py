"""Runs a command again and again, kills it (SIGKILL) at chosen moments, and tells what it left.

    python -m tests.killing FOLDER COMMAND MOMENTS SEED [SIGNAL]

COMMAND is convert, pack, quantize or deploy. Half of the runs replace an output (--force), half
make a first one. MOMENTS is a number of random times, or 'calls' for each moment before a call that
touches the output's folder. SIGNAL is SIGKILL, or one after which nothing may be left at once.
Prints a JSON document: how many runs there were, how many were stopped, and a sentence for each
fault. Processes are forked, so that nothing is imported again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

NET = """
import torch.nn as nn
INPUT_SHAPE = (6,)
def net():
    return nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
"""
SUFFIXES = {"convert": ".onnx", "pack": ".onnx", "quantize": ".pt", "deploy": ""}


def make_inputs(folder: Path) -> None:
    """A network, data, a checkpoint, an .onnx file, and a model whose data lie beside it."""
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(120, 6)).astype(np.float32), generator.integers(0, 3, 120)
    np.savez(folder / "data.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    (folder / "net.py").write_text(NET)
    for command in (
        arguments(folder, "quantize", "model.pt"),
        ("convert", "model.pt", "model.onnx"),
    ):
        status, _ = run([*command, "--force"], folder)
        assert status == 0, (folder / "log").read_text()
    for number in (0, 1):
        status, _ = run_function(lambda folder, seed=number: write_external(folder, seed), folder)
        assert status == 0, (folder / "log").read_text()


def write_external(folder: Path, seed: int) -> None:
    """A model of two matrices that nothing packs, in a file of its own."""
    import onnx

    values = np.random.default_rng(seed).normal(size=(6, 6)).astype(np.float32)
    tensor = onnx.numpy_helper.from_array(values, "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 6]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [tensor])
    imports = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = {"save_as_external_data": True, "location": f"weights{seed}.bin", "size_threshold": 0}
    onnx.save(model, folder / f"external{seed}.onnx", **options)


def arguments(folder: Path, command: str, out: str, *, other: bool = False) -> tuple[str, ...]:
    """The command's line; `other`: with options that make another output."""
    if command == "quantize":
        fixed = ("--data", "data.npz", "--epochs", "2", "--device", "cpu", "--validation", "0")
        return ("quantize", "net.py:net", "--out", out, *fixed, "--seed", str(int(other)))
    if command == "convert":
        return ("convert", "model.pt", out, *(("--floats", "float16") if other else ()))
    if command == "pack":  # a pair of files: the model, and its data
        return ("pack", f"external{int(other)}.onnx", out)
    return ("deploy", "model.onnx", out, "--to", "android" if other else "linux")


def run(line, folder, *, after=None, by=signal.SIGKILL, before_call=None):
    """Runs a command in a process of its own. -> (exit status, seconds); -9 if it was killed.

    after: send it the signal `by` after so many seconds. before_call: kill it before so many calls
    for its output.
    """

    def command(folder):
        if before_call is not None:
            kill_before(before_call, folder / "place")
        from ecqx_onnx.cli import main

        sys.argv = ["ecqx-onnx", *map(str, line)]
        main()

    return run_function(command, folder, after=after, by=by)


def run_function(function, folder, *, after=None, by=signal.SIGKILL):
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(folder)
            function(folder)
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            import traceback

            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, by)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - start


def kill_before(number, place):
    """The process dies before its `number`th call that is about something in `place`."""
    calls = iter(range(number))

    def watch(event, details):
        if event.partition(".")[0] not in ("open", "os", "shutil", "fcntl", "ctypes"):
            return
        about = event in ("fcntl.flock", "ctypes.call_function") or any(
            isinstance(part, str | bytes | Path) and os.fsencode(place) in os.fsencode(part)
            for part in details
        )
        if about and next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def contents(path):
    """Every file under a path, or of that name with something behind it."""
    found = {}
    for part in sorted(path.rglob("*")):
        if part.is_file():
            found[part.relative_to(path).as_posix()] = part.read_bytes()
    return found


def try_moment(folder, command, old, new, *, force, **moment):
    """One kill and the next run. -> (whether it was killed, sentences on what was wrong)."""
    place, out = folder / "place", f"out{SUFFIXES[command]}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in (old if force else {}).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    line = (*arguments(folder, command, f"{place}/{out}"), *(["--force"] if force else []))
    status, _ = run(line, folder, **moment)
    faults = []
    killed = moment.get("by", signal.SIGKILL) == signal.SIGKILL
    if killed and status not in (0, -9):  # other signals may come before they are heeded
        faults.append(f"status {status} when it was to be killed: {(folder / 'log').read_text()}")
    seen = {name: content for name, content in contents(place).items() if is_output(name, out)}
    allowed = [old if force else {}, new]
    if command == "pack":  # between two renames; the next run takes it back, see test_outputs.py
        allowed.append({**allowed[0], f"{out}.data": new[f"{out}.data"]})
    if seen not in allowed:
        faults.append(f"after the kill: {sorted(seen)} is neither the old nor the new output")
    hidden = [str(path) for path in place.rglob(".*")] + our_temporaries(folder)
    if hidden and not killed:
        faults.append(f"after the signal: {hidden}")
    again, _ = run(line, folder)
    if again != 0 and (force or "exists already" not in (folder / "log").read_text()):
        faults.append(f"status {again} of the next run: {(folder / 'log').read_text()}")
    left = contents(place)
    if left != new and not (again == 2 and set(left) == {f"{out}.training", *new}):
        faults.append(f"after the next run: {sorted(left)}, expected {sorted(new)}")
    if hidden := [str(path) for path in place.rglob(".*")]:
        faults.append(f"after the next run: {hidden}")
    if ours := our_temporaries(folder):
        faults.append(f"temporaries after the next run: {ours}")
    return status != 0, faults


def our_temporaries(folder):
    """What lies in the system's place for temporaries, where torch has a cache, too."""
    return [name for name in os.listdir(folder / "tmp") if "ecqx" in name]


def is_output(name, out):
    """Whether a file is the output or one of its parts: no temporary, no state of a training."""
    return not name.startswith(".") and not name.endswith(".training")


def try_moments(
    folder: Path, command: str, moments: str, seed: int, by: signal.Signals = signal.SIGKILL
) -> dict[str, object]:
    """See the module's first lines."""
    import ecqx_onnx.cli
    import ecqx_onnx.quantization.training
    import ecqx_onnx.sources.to_checkpoint
    import ecqx_onnx.validation
    import ecqx_onnx.verbs.convert
    import ecqx_onnx.verbs.deploy
    import ecqx_onnx.verbs.pack
    import ecqx_onnx.verbs.quantize  # noqa: F401 - loaded once, before the runs are forked

    (folder / "tmp").mkdir()
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "tmp")
    make_inputs(folder)
    outputs, seconds = [], 0.0
    for other in (True, False):
        (folder / "place").mkdir()
        line = arguments(folder, command, f"place/out{SUFFIXES[command]}", other=other)
        status, seconds = run(line, folder)
        assert status == 0, (folder / "log").read_text()
        outputs.append(contents(folder / "place"))
        shutil.rmtree(folder / "place")
    old, new = outputs
    generator = random.Random(seed)
    runs, killed, faults = 0, 0, []
    limit = 10_000 if moments == "calls" else int(moments)
    for number in range(limit):
        force = number % 2 == 0
        moment = {"after": generator.uniform(0, 1.1 * seconds), "by": by}
        if moments == "calls":
            moment = {"before_call": number // 2}
        was_killed, found = try_moment(folder, command, old, new, force=force, **moment)
        runs, killed = runs + 1, killed + was_killed
        faults += [f"{moment}, force {force}: {fault}" for fault in found]
        print(f"{runs} runs, {killed} stopped, {len(faults)} faults", file=sys.stderr)
        if moments == "calls" and not was_killed and not force:
            break
    return {"runs": runs, "killed": killed, "seconds": seconds, "faults": faults}


if __name__ == "__main__":
    folder, command, moments, seed, *by = sys.argv[1:]
    by = [signal.Signals[name] for name in by]
    print(json.dumps(try_moments(Path(folder).resolve(), command, moments, int(seed), *by)))
