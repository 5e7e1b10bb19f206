"""Under `ulimit -v` of 6 GB each command that opens a file ends in words, however large it says to
be."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import onnx
import pytest
import torch

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
GIGABYTE = 1 << 30
LIMIT = 6 * GIGABYTE  # of address space
SECONDS = 120  # of processor time
NET = """
import torch.nn as nn
INPUT_SHAPE = (6,)
def net():
    return nn.Sequential(nn.Linear(6, 3))
"""


def limit():
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def run(*arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'converters'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "ecqx_onnx", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, preexec_fn=limit, cwd="/"
    )


def ends_in_words(result):
    """Refused, in one sentence: no traceback, no defect of ours, no signal."""
    assert result.returncode in (1, 2), result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: "), result.stderr[-2000:]
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr[-2000:]


def hole(path, nbytes):
    """A file of zeros that takes no place."""
    with path.open("wb") as file:
        file.truncate(nbytes)
    return path


def holes(nbytes):
    return lambda path: hole(path, nbytes)


def graph_of(tensor):
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    length = tensor.dims[0]
    ends = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", length]) for n in "xy"
    ]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [tensor])
    imports = [onnx.helper.make_opsetid("", 17)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)


def large_data_beside(path):
    """One matrix of 16 GB in a file of holes."""
    side = 1 << 16
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[side, side])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    path.write_bytes(graph_of(tensor).SerializeToString())
    return hole(path.with_name("w.bin"), 4 * side * side)


def large_inside(path):
    """One matrix of 1.6 GB in the file itself, which is made of holes: its bytes come last."""
    side = 20_000
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[side, side])
    model = graph_of(tensor)
    model.graph.ClearField("initializer")
    # Protobuf: a field that comes again is merged, and a repeated one gets longer.
    content = 4 * side * side
    head = tensor.SerializeToString() + bytes([9 << 3 | 2]) + varint(content)  # raw_data
    head = bytes([5 << 3 | 2]) + varint(len(head) + content) + head  # of the initializer
    head = bytes([7 << 3 | 2]) + varint(len(head) + content) + head  # of the graph
    path.write_bytes(model.SerializeToString() + head)
    os.truncate(path, path.stat().st_size + content)


def varint(number):
    """Protobuf's: seven bits a byte, the lowest first."""
    parts = []
    while number >= 128:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def large_state(path):
    """A state dict whose one tensor claims 2^40 entries, all of them one number."""
    torch.save({"0.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, path)


def large_storage(path):
    """A state dict of 12 GB, nothing of it on the disk but holes."""
    torch.save({"0.weight": torch.zeros(4)}, path)
    with path.open("r+b") as file:
        file.truncate(12 * GIGABYTE)


def large_array(path):
    """An .npz whose arrays claim 4.66 TiB."""
    header = (
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (640000000000, 2)}".ljust(117) + b"\n"
    )
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", array)


FILES = {
    "hole.onnx": holes(50 * GIGABYTE),
    "almost.onnx": holes(2 * GIGABYTE - 2),
    "beside.onnx": large_data_beside,
    "inside.onnx": large_inside,
    "hole.pt": holes(50 * GIGABYTE),
    "hole.pt2": holes(50 * GIGABYTE),
    "strides.pt": large_state,
    "storage.pt": large_storage,
    "hole.npz": holes(50 * GIGABYTE),
    "array.npz": large_array,
}
COMMANDS = {
    "inspect": (".onnx", ".pt"),
    "pack": (".onnx",),
    "unpack": (".onnx",),
    "validate": (".onnx",),
    "validate against": (".pt", ".pt2", ".onnx"),
    "validate inputs": (".npz",),
    "convert": (".pt", ".pt2", ".onnx"),
    "quantize weights": (".pt",),
    "quantize data": (".npz",),
    "deploy": (".onnx",),
    "deploy against": (".pt",),
    "report": (".pt",),
}
CASES = [
    (command, name)
    for command, suffixes in COMMANDS.items()
    for name in FILES
    if name.endswith(tuple(f"{suffix}" for suffix in suffixes)) and Path(name).suffix in suffixes
]
# Large, but whole and honest: these may also be done.
HONEST = {("pack", "beside.onnx"), ("pack", "inside.onnx"), ("inspect", "inside.onnx")}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with a checkpoint, its .onnx file and a network."""
    folder = tmp_path_factory.mktemp("good")
    checkpoint = MODELS / "lenet_300_100_mnist_2bit.pt"
    assert run("convert", checkpoint, folder / "model.onnx").returncode == 0
    (folder / "model.pt").symlink_to(checkpoint)
    (folder / "net.py").write_text(NET)
    return folder


def line(command, file, good, folder):
    network = f"{good / 'net.py'}:net"
    return {
        "inspect": ("inspect", file),
        "pack": ("pack", file, folder / "out.onnx"),
        "unpack": ("unpack", file, folder / "out.onnx"),
        "validate": ("validate", file, "--against", good / "model.pt"),
        "validate against": ("validate", good / "model.onnx", "--against", file),
        "validate inputs": (
            *("validate", good / "model.onnx", "--against", good / "model.onnx"),
            *("--inputs", file),
        ),
        "convert": ("convert", file, folder / "out.onnx", "--bits", 4),
        "quantize weights": (
            *("quantize", network, "--weights", file),
            *("--data", "sklearn:digits", "--out", folder / "out.pt"),
        ),
        "quantize data": ("quantize", network, "--data", file, "--out", folder / "out.pt"),
        "deploy": ("deploy", file, folder / "out", "--to", "linux"),
        "deploy against": (
            *("deploy", good / "model.onnx", folder / "out", "--to", "linux"),
            *("--against", file),
        ),
        "report": ("report", file, "-o", folder / "out.html"),
    }[command]


def test_what_opens_no_file_works():
    assert run("targets").returncode == 0


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_large_or_hostile_file_ends_in_words(command, name, good, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    FILES[name](tmp_path / "in" / name)
    result = run(*line(command, tmp_path / "in" / name, good, tmp_path / "out"))
    if result.returncode == 0 and (command, name) in HONEST:
        return
    ends_in_words(result)
    assert list((tmp_path / "out").iterdir()) == []
