"""`validate --device folder:PATH`: what came back from a device that is not ours."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ecqx_onnx.errors import InputError
from ecqx_onnx.validation.devices import validate_on
from ecqx_onnx.validation.devices.devices import Folder
from tests.fuzz.folders import mutate_folder, unpack
from tests.fuzz.mutation import write_zip

NAME = "device_results"
SUFFIX = ".zip"


@functools.cache
def make_model() -> Path:
    """A small .onnx file, for as long as this process lives."""
    weight = numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "weight")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], "matmul")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = Path(tempfile.mkdtemp(prefix="ecqx-fuzz-model-")) / "model.onnx"
    onnx.save(model, path)
    return path


@functools.cache
def make_seeds() -> list[bytes]:
    """The folder that an honest runner leaves, with and without what is optional."""
    folder = make_model().parent / "job"
    try:
        validate_on(Folder(folder), make_model(), latency_runs=2)
    except InputError:  # the first call leaves the job
        subprocess.run([sys.executable, "run.py", "."], cwd=folder, check=True, capture_output=True)
    files = [folder / "result.json", *sorted((folder / "outputs").iterdir())]
    members = [(str(file.relative_to(folder)), file.read_bytes()) for file in files]
    return [write_zip(members)]


def mutate(seed: bytes, source: random.Random) -> bytes:
    """result.json, the outputs, or what kind of files they are."""
    return mutate_folder(seed, source)


def read(path: Path) -> None:
    """The second call of the command, which reads the results, and prints them."""
    folder = path.parent / "results"
    if not unpack(path, folder):
        return
    (folder / "job.json").touch()
    report = validate_on(Folder(folder), make_model(), latency_runs=2)
    from ecqx_onnx.cli.tables import as_table, to_json

    as_table(report)
    to_json(report)
