"""Damaged, lying and malicious model files end in one sentence and exit status 2, through the real command line."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import api, checkpoint
from ecqx_onnx.cli import app


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(6, 8)
        self.fc2 = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def quantised_net():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for layer in (net.fc1, net.fc2):
            layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape) * torch.tensor(0.125))
    return net


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.pt"
    api.save(quantised_net(), path, example=torch.zeros(1, 6))
    return path


def refused(arguments, why, *, out=None):
    """Runs the command; it must exit 2 with one sentence that says `why`, and leave nothing behind."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    message = result.stderr.strip()
    assert message.startswith("error: "), message
    assert why in message
    assert "Traceback" not in message
    if out is not None:
        assert not out.exists()
        assert not list(out.parent.glob(f".{out.name}*"))


def document_of(path):
    return torch.load(path, weights_only=True)


def changed(good, tmp_path, change):
    document = document_of(good)
    change(document)
    path = tmp_path / "changed.pt"
    torch.save(document, path)
    return path


BYTES = {
    "empty": b"",
    "random bytes": np.random.default_rng(0).bytes(5000),
    "text": b"this is no model\n" * 50,
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "an old pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", BYTES)
def test_files_that_are_no_model_are_refused(kind, tmp_path):
    path, out = tmp_path / "model.pt", tmp_path / "out.onnx"
    path.write_bytes(BYTES[kind])
    refused(["convert", path, out], "model.pt", out=out)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.999])
def test_truncated_checkpoints_are_refused(good, tmp_path, share):
    path, out = tmp_path / "model.pt", tmp_path / "out.onnx"
    data = good.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refused(["convert", path, out], "model.pt", out=out)


@pytest.mark.parametrize(
    "key",
    [
        "version",
        "tensors",
        "state",
        "aliases",
        "program",
        "graph",
        "graph_weights",
        "placed",
        "recipe",
        "preprocessing",
        "labels",
    ],
)
def test_checkpoints_without_a_key_are_refused(good, tmp_path, key):
    path = changed(good, tmp_path, lambda document: document.pop(key))
    refused(["convert", path, tmp_path / "out.onnx"], key, out=tmp_path / "out.onnx")


def first(document):
    return document["tensors"][0], document["placed"][0]


LIES = {
    "a version of the future": (lambda d: d.update(version=99), "version 99"),
    "levels of another type": (lambda d: [e.update(levels=e["levels"].float()) for e in first(d)], "not int8"),
    "levels of another shape": (lambda d: [e.update(levels=e["levels"][:2]) for e in first(d)], "shape"),
    "a step of NaN": (lambda d: [e.update(step=torch.tensor(float("nan"))) for e in first(d)], "not positive and finite"),
    "an infinite step": (lambda d: [e.update(step=torch.tensor(float("inf"))) for e in first(d)], "not positive and finite"),
    "a negative step": (lambda d: [e.update(step=torch.tensor(-1.0)) for e in first(d)], "not positive and finite"),
    "a step of another shape": (lambda d: [e.update(step=torch.ones(5)) for e in first(d)], "shape"),
    "a codebook too short": (
        lambda d: [(e.pop("step"), e.update(codebook=torch.ones(2))) for e in first(d)],
        "beyond its codebook",
    ),
    "a graph of random bytes": (lambda d: d.update(graph=torch.randint(0, 256, (500,), dtype=torch.uint8)), "damaged"),
    "a recipe that is no JSON": (lambda d: d.update(recipe="{"), "damaged"),
    "a preprocessing that is no JSON": (lambda d: d.update(preprocessing="]"), "preprocessing"),
    "tensors that are numbers": (lambda d: d.update(tensors=[1, 2]), "damaged"),
    "a placed weight that the graph lacks": (lambda d: first(d)[1].update(initializer="nowhere"), "nowhere"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_checkpoints_are_refused(good, tmp_path, lie):
    change, why = LIES[lie]
    path = changed(good, tmp_path, change)
    refused(["convert", path, tmp_path / "out.onnx"], why, out=tmp_path / "out.onnx")


def test_a_damaged_program_is_refused_when_pytorch_is_to_run(good, tmp_path):
    onnx_file = tmp_path / "out.onnx"
    assert CliRunner().invoke(app, ["convert", str(good), str(onnx_file)]).exit_code == 0
    path = changed(good, tmp_path, lambda d: d.update(program=d["program"][:100]))
    refused(["validate", onnx_file, "--against", path], "program")


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_pickled_object_is_never_unpickled(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {"w": Evil(str(marker))}}, path)
    refused(["convert", path, tmp_path / "out.onnx"], "pickled", out=tmp_path / "out.onnx")
    assert not marker.exists()


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(good, tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/data/999", bytes(50_000_000))
    refused(["convert", path, tmp_path / "out.onnx"], "claim", out=tmp_path / "out.onnx")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net = quantised_net()
    with torch.no_grad():
        net.fc1.weight[0, 0] = value
    torch.save(net.state_dict(), tmp_path / "sd.pt")
    (tmp_path / "net.py").write_text(NET_FILE)
    refused(
        ["convert", tmp_path / "sd.pt", tmp_path / "out.onnx", "--model", f"{tmp_path}/net.py:net"],
        "fc1.weight",
        out=tmp_path / "out.onnx",
    )


NET_FILE = """
import torch
INPUT_SHAPE = (6,)
def net():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = torch.nn.Linear(6, 8)
            self.fc2 = torch.nn.Linear(8, 3)
        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x)))
    return Net()
def broken():
    raise RuntimeError("no luck")
def number():
    return 7
"""


@pytest.fixture
def user_file(tmp_path):
    (tmp_path / "net.py").write_text(NET_FILE)
    torch.save(quantised_net().state_dict(), tmp_path / "sd.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        ("net.py:nothing", "nothing"),
        ("net.py:broken", "no luck"),
        ("net.py:number", "int"),
        ("missing.py:net", "missing.py"),
        ("net.py", "FILE.py:FACTORY"),
        ("bad.py:net", "bad.py"),
    ],
)
def test_factories_that_give_no_network_are_refused(user_file, factory, why):
    (user_file / "bad.py").write_text("def net(:\n")
    out = user_file / "out.onnx"
    refused(["convert", user_file / "sd.pt", out, "--model", f"{user_file}/{factory}"], why, out=out)


def test_a_state_dict_of_another_network_is_refused_with_what_differs(user_file):
    torch.save({"fc1.weight": torch.zeros(8, 6), "fc9.bias": torch.zeros(3)}, user_file / "other.pt")
    refused(
        ["convert", user_file / "other.pt", user_file / "out.onnx", "--model", f"{user_file}/net.py:net"],
        "fc2.weight",
        out=user_file / "out.onnx",
    )


def test_a_state_dict_alone_is_refused_with_the_way_forward(user_file):
    refused(["convert", user_file / "sd.pt", user_file / "out.onnx"], "--model", out=user_file / "out.onnx")


def test_a_float_model_is_refused_with_both_ways_forward(user_file):
    torch.manual_seed(1)
    torch.save({k: torch.randn_like(v) for k, v in quantised_net().state_dict().items()}, user_file / "float.pt")
    arguments = ["convert", user_file / "float.pt", user_file / "out.onnx", "--model", f"{user_file}/net.py:net"]
    refused(arguments, "--bits", out=user_file / "out.onnx")
    refused(arguments, "ecqx-onnx quantize", out=user_file / "out.onnx")


def test_an_existing_file_is_only_replaced_with_force(good, tmp_path):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"mine")
    refused(["convert", good, out], "--force")
    assert out.read_bytes() == b"mine"
    assert CliRunner().invoke(app, ["convert", str(good), str(out), "--force"]).exit_code == 0
    assert out.read_bytes() != b"mine"


@pytest.mark.parametrize(("where", "why"), [("no/such/folder/out.onnx", "folder"), ("", "")])
def test_a_place_that_cannot_be_written_is_refused(good, tmp_path, where, why):
    refused(["convert", good, tmp_path / where], why)


def test_a_full_disk_leaves_nothing_behind(good, tmp_path):
    """A file size limit makes every write fail as a full disk does."""
    out = tmp_path / "out.onnx"
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); from ecqx_onnx.cli import main; main()"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "converters")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", code, "convert", good, out], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "cannot" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--target", "toaster"], "toaster"),
        (["--storage", "shelf"], "shelf"),
        (["--dequantize", "never"], "never"),
        (["--opset", "7"], "7"),
        (["--opset", "99"], "99"),
    ],
)
def test_options_that_do_not_exist_are_refused_with_their_value(good, tmp_path, options, why):
    refused(["convert", good, tmp_path / "out.onnx", *options], why, out=tmp_path / "out.onnx")


def test_the_checkpoint_itself_is_good(good):
    loaded = checkpoint.load(good)
    x = torch.randn(4, 6)
    assert torch.equal(loaded.module()(x), quantised_net()(x))
    assert io.BytesIO(good.read_bytes()).read(2) == b"PK"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (lambda whole: b"", "is empty; save it again"),
        (lambda whole: whole[:2000], "is damaged or was not written by torch.save; save it again"),
    ],
)
def test_a_broken_file_is_told_without_the_names_of_exceptions(good, tmp_path, content, sentence):
    (tmp_path / "broken.pt").write_bytes(content(good.read_bytes()))
    refused(["convert", tmp_path / "broken.pt", tmp_path / "out.onnx"], f"broken.pt: {sentence}", out=tmp_path / "out.onnx")


def test_a_file_without_permission_is_not_called_damaged(good, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    refused(
        ["convert", good, tmp_path / "out.onnx"], "model.pt: may not be read; check its permissions", out=tmp_path / "out.onnx"
    )
