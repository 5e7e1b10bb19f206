"""Slow: written files load and say the same in every onnxruntime that their target promises, old
and new side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ecqx_onnx_converters.targets import find_target

import ecqx_onnx
from ecqx_onnx import api
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.validation.devices.job import read_result, write_job

pytestmark = pytest.mark.slow

RUNNER = Path(ecqx_onnx.__file__).parent / "validation" / "devices" / "runners" / "run.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ecqx-onnx" / "runtimes"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"
# Oldest numpy that runs with each: onnxruntime before 1.19 was compiled against numpy 1.
RUNTIMES = {
    "1.17.3": ("onnxruntime==1.17.3", "numpy==1.26.4"),
    "1.20.1": ("onnxruntime==1.20.1", "numpy==1.26.4"),
    "1.23.2": ("onnxruntime==1.23.2", "numpy==1.26.4"),
    "1.24.1": ("onnxruntime==1.24.1", "numpy==1.26.4"),
    "current": (),
}
# The last of every minor version that pip still has, of which one is loaded by few tests.
MINORS = {
    "1.17.3": ("onnxruntime==1.17.3", "numpy==1.26.4"),
    "1.18.1": ("onnxruntime==1.18.1", "numpy==1.26.4"),
    "1.19.2": ("onnxruntime==1.19.2", "numpy==1.26.4"),
    "1.20.1": ("onnxruntime==1.20.1", "numpy==1.26.4"),
    "1.21.1": ("onnxruntime==1.21.1", "numpy==1.26.4"),
    "1.22.1": ("onnxruntime==1.22.1", "numpy==1.26.4"),
    "1.23.2": ("onnxruntime==1.23.2", "numpy==1.26.4"),
    "1.24.4": ("onnxruntime==1.24.4", "numpy==1.26.4"),
    "1.25.1": ("onnxruntime==1.25.1", "numpy==1.26.4"),
    "1.26.0": ("onnxruntime==1.26.0", "numpy==1.26.4"),
    "1.27.0": ("onnxruntime==1.27.0", "numpy==1.26.4"),
    "1.28.0": ("onnxruntime==1.28.0", "numpy==1.26.4"),
    "1.29.0": ("onnxruntime==1.29.0", "numpy==1.26.4"),
    "1.30.0": ("onnxruntime==1.30.0", "numpy==1.26.4"),
    "1.31.1": ("onnxruntime==1.31.1", "numpy==1.26.4"),
    "current": (),
}
TARGETS = {
    "onnxruntime": ("1.24.1", "current"),
    "onnxruntime-1.17": tuple(RUNTIMES),
    "coreml": tuple(RUNTIMES),
    "nnapi": tuple(RUNTIMES),
    "qdq": ("1.20.1", "1.23.2", "1.24.1", "current"),
}
BATCH = 5
# Sums here have at most 256 terms; two float32 orders of summation differ by at most 2^-24 of a few
# times that.
FLOAT32_SUMS = 256 * 2.0**-24


class Net(torch.nn.Module):
    """Every kind of weight: 4D with BatchNorm behind it, depthwise, matrix, embedding with a
    Reshape behind it, LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, groups=8)
        self.fc1 = torch.nn.Linear(8 * 6 * 6, 40)
        self.table = torch.nn.Embedding(2, 40)
        self.mix = torch.nn.Linear(4 * 40, 40)
        self.lstm = torch.nn.LSTM(40, 12, batch_first=True)
        self.fc2 = torch.nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.conv(x))))).flatten(1)
        x = torch.relu(self.fc1(x))
        x = x + self.mix(self.table((x[:, :4] > 0).long()).flatten(1))
        return self.fc2(self.lstm(x.reshape(-1, 1, 40))[0][:, -1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    net = Net().eval()
    path = tmp_path_factory.mktemp("net") / "net.pt"
    source = api.as_checkpoint(net, example=torch.zeros(2, 1, 8, 8), bits=4, entropy_weight=0.1)
    from ecqx_onnx.checkpoint import save

    save(source, path)
    return path


@pytest.fixture(scope="module")
def environment(request) -> dict[str, str]:
    """The variables under which this Python imports the runtime of the parameter."""
    packages = (RUNTIMES | MINORS)[request.param]
    if not packages:
        return dict(os.environ)
    folder = CACHE / f"onnxruntime-{request.param}-{PYTHON}"
    if not (folder / ".complete").exists():
        options = ["--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        command = [sys.executable, "-m", "pip", "install", *options, *packages]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(
                f"pip cannot install onnxruntime {request.param} here: "
                f"{done.stderr.strip().splitlines()[-1]}"
            )
        (folder / ".complete").touch()
    return {**os.environ, "PYTHONPATH": str(folder)}


def combinations():
    for target, runtimes in TARGETS.items():
        for storage in ("dense", "sparse", "packed"):
            for dequantize in ("folded", "standard"):
                # Cast takes INT4 from 1.23 on; "qdq" promises standard DequantizeLinear, and that
                # 1.20 has for INT4.
                able = [
                    name
                    for name in runtimes
                    if (target, dequantize, name) != ("qdq", "folded", "1.20.1")
                ]
                yield from (pytest.param(name, target, storage, dequantize) for name in able)


@pytest.mark.parametrize(
    ("environment", "target", "storage", "dequantize"),
    list(combinations()),
    indirect=["environment"],
)
def test_a_file_says_the_same_in_every_runtime_of_its_target(
    environment, target, storage, dequantize, checkpoint, tmp_path
):
    from ecqx_onnx.errors import OptionError

    try:
        api.convert(
            checkpoint, tmp_path / "net.onnx", target=target, storage=storage, dequantize=dequantize
        )
    except OptionError as error:
        pytest.skip(f"the target does not take it: {error}")
    batch = 1 if find_target(target).one_sample else BATCH
    x = np.random.default_rng(0).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    (tmp_path / "job").mkdir()
    file = read_onnx(tmp_path / "net.onnx")
    name = file.proto.graph.input[0].name
    job = write_job(file, tmp_path / "job", [{name: x}], {name: x[:1]}, latency_runs=0)
    subprocess.run(
        [sys.executable, str(RUNNER), str(job.folder)],
        env=environment,
        timeout=120,
        check=True,
        capture_output=True,
    )
    result = read_result(job, "this runtime")
    with torch.no_grad():
        expected = api.as_checkpoint(checkpoint).module()(torch.from_numpy(x)).numpy()
    for outputs in (next(result.outputs()), result.plain):
        assert np.abs(outputs[0] - expected).max() <= FLOAT32_SUMS * max(
            1.0, np.abs(expected).max()
        )
    if dequantize == "folded":  # no node that decodes weights is left at run time
        decoding = {
            "DequantizeLinear",
            "BitShift",
            "BitwiseAnd",
            "ScatterElements",
            "CumSum",
            "GatherElements",
            "Unpack",
            "Scan",
        }
        assert not decoding & set(result.operators), json.dumps(result.operators)


@pytest.mark.parametrize("environment", list(MINORS), indirect=True)
def test_stages_of_decoding_fold_in_every_runtime(environment, checkpoint, tmp_path, monkeypatch):
    from ecqx_onnx_converters.storage.packed import stages

    monkeypatch.setattr(stages, "STAGED_FROM", 1)
    monkeypatch.setattr(stages, "STAGE_BYTES", 1)
    monkeypatch.setattr(stages, "SLICED_FROM", 1 << 10)
    test_a_file_says_the_same_in_every_runtime_of_its_target(
        environment, "onnxruntime-1.17", "packed", "folded", checkpoint, tmp_path
    )
    assert "Scan" in {node.op_type for node in read_onnx(tmp_path / "net.onnx").proto.graph.node}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("environment", list(RUNTIMES), indirect=True)
def test_streams_of_several_contexts_fold_in_every_runtime(
    environment, compact, checkpoint, tmp_path, monkeypatch
):
    """Which a network as small as this would not have of its own."""
    from ecqx_onnx_converters.storage.packed import choices, grouping

    monkeypatch.setattr(grouping, "CONTEXTS_BYTES", -(1 << 20))
    monkeypatch.setattr(grouping, "STREAM_BYTES", -(1 << 20))
    monkeypatch.setattr(choices, "COMPACT_BELOW", 1 << 20 if compact else 0)
    test_a_file_says_the_same_in_every_runtime_of_its_target(
        environment, "onnxruntime-1.17", "packed", "folded", checkpoint, tmp_path
    )
    decoders = [
        node for node in read_onnx(tmp_path / "net.onnx").proto.graph.node if node.op_type == "D"
    ]
    assert len(decoders) > 1
    assert {len(node.input) for node in decoders} == {11 if compact else 12}


@pytest.mark.parametrize("environment", list(RUNTIMES), indirect=True)
def test_an_ort_file_says_the_same_in_old_runtimes_too(environment, checkpoint, tmp_path):
    """It promises only runtimes that are not older than the one that converts; those from 1.17 load
    it as well."""
    api.convert(checkpoint, tmp_path / "net.ort", target="onnxruntime-mobile")
    x = np.random.default_rng(0).standard_normal((BATCH, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import numpy, onnxruntime; s = onnxruntime.InferenceSession('net.ort'); "
        "numpy.save('y.npy', s.run(None, {s.get_inputs()[0].name: numpy.load('x.npy')})[0])"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        timeout=120,
        check=True,
        capture_output=True,
    )
    with torch.no_grad():
        expected = api.as_checkpoint(checkpoint).module()(torch.from_numpy(x)).numpy()
    assert np.abs(np.load(tmp_path / "y.npy") - expected).max() <= FLOAT32_SUMS * max(
        1.0, np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("environment", "target"),
    [pytest.param(name, target) for target in ("onnxruntime-1.17", "qdq") for name in RUNTIMES],
    indirect=["environment"],
)
def test_quantised_activations_run_on_integer_kernels_in_old_runtimes_too(
    environment, target, tmp_path
):
    """Both write opset 18 with INT8 levels here, which 1.17 reads."""
    from ecqx_onnx.data import Dataset
    from ecqx_onnx.preprocessing import Preprocessing

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 5),
    ).eval()
    x = np.random.default_rng(0).standard_normal((BATCH, 1, 8, 8)).astype(np.float32)
    data = Dataset.from_arrays(
        "x", {"x": x, "y": np.arange(BATCH) % 5}, preprocessing=Preprocessing("array")
    )
    source = api.as_checkpoint(net, example=torch.zeros(2, 1, 8, 8), bits=4)
    api.convert(source, tmp_path / "net.onnx", target=target, activations="int8", calibration=data)
    (tmp_path / "job").mkdir()
    file = read_onnx(tmp_path / "net.onnx")
    name = file.proto.graph.input[0].name
    job = write_job(file, tmp_path / "job", [{name: x}], {name: x[:1]}, latency_runs=0)
    subprocess.run(
        [sys.executable, str(RUNNER), str(job.folder)],
        env=environment,
        timeout=120,
        check=True,
        capture_output=True,
    )
    result = read_result(job, "this runtime")
    assert {"QLinearConv", "QGemm"} <= set(result.operators)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "DequantizeLinear"} & set(
        result.operators
    )
    from ecqx_onnx.runtime.sessions import open_session, run

    expected = run(open_session(tmp_path / "net.onnx"), (x,))[0]
    # The same integers in every version; float32 rounds the scale of the last sums alone.
    np.testing.assert_allclose(next(result.outputs())[0], expected, rtol=1e-5, atol=1e-5)
