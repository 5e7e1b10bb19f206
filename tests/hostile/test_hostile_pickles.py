"""A pickle planted wherever a file is accepted: refused in one sentence, and never built."""

import io
import pickle
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.errors import EcqxError
from ecqx_onnx.validation.devices import validate_on
from ecqx_onnx.validation.devices.devices import Folder
from tests.fuzz.readers import device_results
from tests.onnx_graphs import product, quantized
from tests.watching import CALL, Evil, nothing_runs, torch_pickle

NETWORK = "import torch\nINPUT_SHAPE = (6,)\ndef net():\n    return torch.nn.Linear(6, 3)\n"


def object_npy():
    """A .npy file of Python objects, which numpy stores as a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def plain_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def safetensors(header):
    return struct.pack("<Q", len(header)) + header + bytes(72)


PLANTED = {
    "pickle 0": pickle.dumps(Evil(), 0),
    "pickle 2": pickle.dumps({"weight": Evil()}, 2),
    "pickle 5": pickle.dumps({"weight": Evil()}, 5),
    "torch zip": torch_pickle(),
    "torch legacy": torch_pickle(legacy=True),
    "numpy objects": object_npy(),
    "npz of objects": npz(x=object_npy(), y=object_npy()),
    "safetensors": safetensors(
        b'{"weight": {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]}}'
    ),
    "safetensors with a pickle": safetensors(pickle.dumps(Evil(), 2)),
    "text": CALL.encode(),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a network's file, its good state dict, data, a checkpoint and .onnx files."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "net.py").write_text(NETWORK)
    torch.manual_seed(0)
    network = torch.nn.Linear(6, 3).eval()
    with torch.no_grad():
        network.weight.copy_(torch.randint(-3, 4, (3, 6)) * 0.125)
    torch.save(network.state_dict(), folder / "good.pt")
    api.save(network, folder / "model.pt", example=torch.zeros(1, 6))
    x, y = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32), np.arange(12) % 3
    np.savez(folder / "data.npz", x=x, y=y)
    onnx.save(product("MatMul", quantized("W", (6, 3))), folder / "model.onnx")
    return folder


def refused(*arguments, out=None, in_one_sentence=True):
    with nothing_runs():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert "Traceback" not in result.output
    if in_one_sentence:
        assert result.stderr.startswith("error: "), result.stderr
        assert "\n" not in result.stderr.strip()
    assert out is None or not out.exists()


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("suffix", [".pt", ".pt2", ".pth", ".safetensors", ".ckpt", ".onnx"])
def test_as_a_model(place, tmp_path, kind, suffix):
    evil, out = tmp_path / f"evil{suffix}", tmp_path / "out.onnx"
    evil.write_bytes(PLANTED[kind])
    refused("convert", evil, out, out=out)
    refused("convert", evil, out, "--model", f"{place}/net.py:net", out=out)
    refused("inspect", evil)
    refused("validate", place / "model.onnx", "--against", evil)


@pytest.mark.parametrize("kind", PLANTED)
def test_as_an_onnx_file(place, tmp_path, kind):
    evil = tmp_path / "evil.onnx"
    evil.write_bytes(PLANTED[kind])
    refused("pack", evil, tmp_path / "out.onnx", out=tmp_path / "out.onnx")
    refused("validate", evil, "--against", place / "model.pt")


@pytest.mark.parametrize("kind", [kind for kind in PLANTED if kind != "text"])
def test_as_data(place, tmp_path, kind):
    evil = tmp_path / "evil.npz"
    evil.write_bytes(PLANTED[kind])
    refused("validate", place / "model.onnx", "--against", place / "model.onnx", "--data", evil)
    refused("validate", place / "model.onnx", "--against", place / "model.onnx", "--inputs", evil)


@pytest.mark.parametrize("member", ["x", "y", "labels", "is_test"])
def test_as_an_array_among_good_ones(place, tmp_path, member):
    good = {"x": plain_npy(np.zeros((4, 6), np.float32)), "y": plain_npy(np.arange(4) % 2)}
    (tmp_path / "evil.npz").write_bytes(npz(**{**good, member: object_npy()}))
    out = tmp_path / "out.pt"
    train = ("quantize", f"{place}/net.py:net", "--data", tmp_path / "evil.npz", "--out", out)
    refused(*train, "--epochs", 1, out=out)


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_as_a_recipe(place, tmp_path, kind, suffix):
    evil, out = tmp_path / f"evil{suffix}", tmp_path / "out.pt"
    evil.write_bytes(PLANTED[kind])
    train = ("quantize", f"{place}/net.py:net", "--data", place / "data.npz", "--out", out)
    refused(*train, "--recipe", evil, out=out, in_one_sentence=False)


@pytest.mark.parametrize("kind", PLANTED)
def test_as_the_state_of_a_training(place, tmp_path, kind):
    out = tmp_path / "out.pt"
    (tmp_path / "out.pt.training").write_bytes(PLANTED[kind])
    train = ("quantize", f"{place}/net.py:net", "--data", place / "data.npz", "--out", out)
    refused(*train, "--epochs", 1, "--resume", out=out)


@pytest.fixture(scope="module")
def results():
    """The folder that an honest runner leaves, as (name, content)."""
    with zipfile.ZipFile(io.BytesIO(device_results.make_seeds()[0])) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("kind", PLANTED)
def test_as_a_result_of_a_device(results, tmp_path, kind):
    for place in results:
        folder = tmp_path / place.replace("/", "-")
        for name, content in {**results, place: PLANTED[kind]}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / "job.json").touch()
        with nothing_runs(), pytest.raises(EcqxError) as caught:
            validate_on(Folder(folder), device_results.make_model(), latency_runs=2)
        assert "\n" not in str(caught.value)


KEYS = ("format", "tensors", "state", "program", "graph", "recipe", "labels", "insight", "extra")


@pytest.mark.parametrize("key", KEYS)
def test_as_an_entry_of_a_checkpoint(place, tmp_path, key):
    document = torch.load(place / "model.pt", weights_only=True)
    document[key] = Evil()
    torch.save(document, tmp_path / "evil.pt")
    refused("convert", tmp_path / "evil.pt", tmp_path / "out.onnx", out=tmp_path / "out.onnx")
    refused("inspect", tmp_path / "evil.pt")


def test_as_the_program_of_a_checkpoint(place, tmp_path):
    command = ["convert", f"{place}/model.pt", f"{tmp_path}/a.onnx"]
    assert CliRunner().invoke(app, command).exit_code == 0
    for planted in PLANTED.values():
        document = torch.load(place / "model.pt", weights_only=True)
        document["program"] = torch.frombuffer(bytearray(planted), dtype=torch.uint8)
        torch.save(document, tmp_path / "evil.pt")
        refused("validate", tmp_path / "a.onnx", "--against", tmp_path / "evil.pt")


def test_as_the_sample_inputs_of_a_program_nothing_opens_it(place, tmp_path):
    """The first of the ways that were seen to run code; the program itself is whole."""
    document = torch.load(place / "model.pt", weights_only=True)
    buffer = io.BytesIO()
    archive = document["program"].numpy().tobytes()
    with zipfile.ZipFile(io.BytesIO(archive)) as source, zipfile.ZipFile(buffer, "w") as target:
        for name in source.namelist():
            is_inputs = name.endswith("sample_inputs/model.pt")
            target.writestr(name, torch_pickle() if is_inputs else source.read(name))
    document["program"] = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    torch.save(document, tmp_path / "evil.pt")
    command = ["convert", f"{place}/model.pt", f"{tmp_path}/a.onnx"]
    assert CliRunner().invoke(app, command).exit_code == 0
    command = ["validate", f"{tmp_path}/a.onnx", "--against", f"{tmp_path}/evil.pt"]
    with nothing_runs():
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
