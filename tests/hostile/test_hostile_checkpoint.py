"""Damaged, lying and malicious model files end in one sentence and exit status 2, through the real
command line."""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import api, checkpoint
from ecqx_onnx.checkpoint.document import BadDocument, read_document
from ecqx_onnx.cli import app
from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs import torch_file


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(6, 8)
        self.fc2 = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def quantized_net():
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for layer in (net.fc1, net.fc2):
            layer.weight.copy_(torch.randint(-3, 4, layer.weight.shape) * torch.tensor(0.125))
    return net


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "model.pt"
    api.save(quantized_net(), path, example=torch.zeros(1, 6))
    return path


def refused(arguments, why, *, out=None):
    """Runs the command; it must exit 2 with one sentence that says `why`, and leave nothing
    behind."""
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
    "levels of another type": (
        lambda d: [e.update(levels=e["levels"].float()) for e in first(d)],
        "not int8",
    ),
    "levels of another shape": (
        lambda d: [e.update(levels=e["levels"][:2]) for e in first(d)],
        "shape",
    ),
    "a step of NaN": (
        lambda d: [e.update(step=torch.tensor(float("nan"))) for e in first(d)],
        "not positive and finite",
    ),
    "an infinite step": (
        lambda d: [e.update(step=torch.tensor(float("inf"))) for e in first(d)],
        "not positive and finite",
    ),
    "a negative step": (
        lambda d: [e.update(step=torch.tensor(-1.0)) for e in first(d)],
        "not positive and finite",
    ),
    "a step of another shape": (
        lambda d: [e.update(step=torch.ones(5)) for e in first(d)],
        "shape",
    ),
    "a codebook too short": (
        lambda d: [(e.pop("step"), e.update(codebook=torch.ones(2))) for e in first(d)],
        "beyond its codebook",
    ),
    "a graph of random bytes": (
        lambda d: d.update(graph=torch.randint(0, 256, (500,), dtype=torch.uint8)),
        "damaged",
    ),
    "a recipe that is no JSON": (lambda d: d.update(recipe="{"), "damaged"),
    "a preprocessing that is no JSON": (lambda d: d.update(preprocessing="]"), "preprocessing"),
    "tensors that are numbers": (lambda d: d.update(tensors=[1, 2]), "damaged"),
    "a placed weight that the graph lacks": (
        lambda d: first(d)[1].update(initializer="nowhere"),
        "nowhere",
    ),
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
    with (
        zipfile.ZipFile(good) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("archive/data/999", bytes(50_000_000))
    refused(["convert", path, tmp_path / "out.onnx"], "claim", out=tmp_path / "out.onnx")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    net = quantized_net()
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
    torch.save(quantized_net().state_dict(), tmp_path / "sd.pt")
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
    refused(
        ["convert", user_file / "sd.pt", out, "--model", f"{user_file}/{factory}"], why, out=out
    )


def test_a_state_dict_of_another_network_is_refused_with_what_differs(user_file):
    torch.save(
        {"fc1.weight": torch.zeros(8, 6), "fc9.bias": torch.zeros(3)}, user_file / "other.pt"
    )
    refused(
        [
            "convert",
            user_file / "other.pt",
            user_file / "out.onnx",
            "--model",
            f"{user_file}/net.py:net",
        ],
        "fc2.weight",
        out=user_file / "out.onnx",
    )


def test_a_state_dict_alone_is_refused_with_the_way_forward(user_file):
    refused(
        ["convert", user_file / "sd.pt", user_file / "out.onnx"],
        "--model",
        out=user_file / "out.onnx",
    )


def test_a_float_model_is_refused_with_both_ways_forward(user_file):
    torch.manual_seed(1)
    torch.save(
        {k: torch.randn_like(v) for k, v in quantized_net().state_dict().items()},
        user_file / "float.pt",
    )
    arguments = [
        "convert",
        user_file / "float.pt",
        user_file / "out.onnx",
        "--model",
        f"{user_file}/net.py:net",
    ]
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
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); from ecqx_onnx.cli import main; "
        "main()"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "converters")]
        ),
    }
    result = subprocess.run(
        [sys.executable, "-c", code, "convert", good, out],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
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
    assert torch.equal(loaded.module()(x), quantized_net()(x))
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
    refused(
        ["convert", tmp_path / "broken.pt", tmp_path / "out.onnx"],
        f"broken.pt: {sentence}",
        out=tmp_path / "out.onnx",
    )


def test_a_file_without_permission_is_not_called_damaged(good, tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    refused(
        ["convert", good, tmp_path / "out.onnx"],
        "model.pt: may not be read; check its permissions",
        out=tmp_path / "out.onnx",
    )


# Every entry of the document, exchanged


NOT_PLAIN = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "on no device": lambda: torch.zeros(2, device="meta"),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "of many dimensions": lambda: torch.zeros([1] * 40),
    "repeated without end": lambda: torch.zeros(1).expand(2**40),
    "repeated in two directions": lambda: torch.zeros(1, 1, dtype=torch.int8).expand(2**20, 2**22),
}
VALUES = (None, 1, 1.5, True, "text", b"bytes", [], {}, [1], {"a": 1}, (1, 2), torch.ones(2))


def places_of(value, path=()):
    """The path of every entry of a checkpoint's document."""
    yield path
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places_of(inner, (*path, key))


def exchanged(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = exchanged(value[path[0]], path[1:], new)
    return copy


def test_every_entry_exchanged_for_every_type_is_read_or_refused(good):
    """No KeyError, AttributeError or TypeError, whatever stands where."""
    document = document_of(good)
    count = 0
    for path in list(places_of(document))[1:]:
        for value in (*VALUES, torch.zeros(1).expand(3), torch.zeros(2).to_sparse()):
            evil = exchanged(document, path, value)
            with contextlib.suppress(BadDocument, FileError):
                read_document(evil)
            count += 1
    assert count > 400


@pytest.mark.parametrize("kind", NOT_PLAIN)
@pytest.mark.parametrize("where", ["levels", "step", "state", "graph_weights", "program"])
def test_tensors_that_are_no_plain_arrays_are_refused(good, tmp_path, kind, where):
    tensor = NOT_PLAIN[kind]()

    def change(document):
        if where in ("levels", "step"):
            for entry in first(document):
                entry[where] = tensor
        elif where == "program":
            document["program"] = tensor
        else:
            name = next(iter(document[where]), "any")
            document[where][name] = tensor

    path = changed(good, tmp_path, change)
    if kind == "complex" and where == "state":  # a network may have one; its program says
        with pytest.raises(FileError, match="complex64"):
            checkpoint.load(path).module()
    else:
        refused(["inspect", path], "changed.pt")


NAMES = {
    "a megabyte long": "x" * 1_000_000,
    "empty": "",
    "with a lone surrogate": "fc\ud800",
    "with a newline": "fc\n1.weight",
    "with an escape": "fc\x1b[31m",
    "with a zero byte": "fc\0",
    "written backwards": "fc\u202e.weight",
}


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("where", ["name", "initializer", "state", "aliases", "ranges", "missing"])
def test_names_of_another_kind_are_refused(good, tmp_path, kind, where):
    name = NAMES[kind]

    def change(document):
        if where == "name":
            document["tensors"][0]["name"] = name
        elif where == "initializer":
            document["placed"][0]["initializer"] = name
        elif where == "missing":
            document["missing"].append([name, "why"])
        else:
            value = {"state": torch.ones(1), "aliases": "fc1.weight", "ranges": [0.0, 1.0]}[where]
            document.setdefault(where, {})[name] = value

    refused(["inspect", changed(good, tmp_path, change)], "name")


def test_names_as_long_as_real_ones_are_read(good, tmp_path):
    name = "encoder.layers." + "very_long_module." * 50 + "weight"
    path = changed(good, tmp_path, lambda d: d["tensors"][0].update(name=name))
    assert checkpoint.load(path).tensors[0].name == name


def test_labels_that_are_no_utf8_do_not_lose_the_training(good, tmp_path):
    def change(document):
        document.update(labels=["caf\udce9", "a\nb", "ok"], notes=["\x1b[31m"])

    path, out = changed(good, tmp_path, change), tmp_path / "out.onnx"
    assert checkpoint.load(path).labels == (r"caf\udce9", r"a\nb", "ok")
    for command in (["convert", path, out], ["inspect", path], ["inspect", out]):
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output


TEXTS = {
    "a recipe of many items": (
        lambda d: d.update(recipe='{"a": [' + "{}," * 90_000 + "{}]}"),
        "items",
    ),
    "a recipe of many bytes": (lambda d: d.update(recipe='{"a": "' + "x" * 2**21 + '"}'), "recipe"),
    "a deep recipe": (lambda d: d.update(recipe="[" * 40_000), "deep"),
    "a recipe of depth 200": (lambda d: d.update(recipe='{"a":' * 200 + "1" + "}" * 200), "deep"),
    "a recipe with a key twice": (lambda d: d.update(recipe='{"a": 1, "a": 2}'), "twice"),
    "a recipe that is a list": (lambda d: d.update(recipe="[1]"), "recipe"),
    "a recipe with a long number": (
        lambda d: d.update(recipe='{"a": ' + "9" * 9999 + "}"),
        "recipe",
    ),
    "a preprocessing of many bytes": (
        lambda d: d.update(preprocessing="[" * 10**6),
        "preprocessing",
    ),
    "samples of 16 GiB": (
        lambda d: d.update(
            preprocessing='{"version": 1, "kind": "waveform", "samples": 2147483647}'
        ),
        "samples",
    ),
    "an insight of many items": (
        lambda d: d.update(insight={"facts": "[" + "[]," * 3_000_000, "pairs": torch.zeros(3, 0)}),
        "insight",
    ),
    "an insight without its pairs": (lambda d: d.update(insight={"facts": "{}"}), "pairs"),
    "a note that is no text": (lambda d: d.update(notes=[1]), "notes"),
    "a label of a megabyte": (lambda d: d.update(labels=["x" * 10**6]), "labels"),
    "a million labels": (lambda d: d.update(labels=["x"] * 30_000), "values"),
    "an alias of nothing": (lambda d: d.update(aliases={"a": "nowhere"}), "nowhere"),
    "a weight twice": (lambda d: d["tensors"].append(d["tensors"][0]), "twice"),
    "a version that is a tensor": (lambda d: d.update(version=torch.ones(2)), "version"),
    "a version that is true": (lambda d: d.update(version=True), "version"),
    "a weight that the graph lacks": (
        lambda d: d["graph_weights"].update(nowhere=torch.ones(2, 2)),
        "nowhere",
    ),
    "levels that one list refers to without end": (
        lambda d: d.update(tensors=[d["tensors"][0]] * 30_000),
        "values",
    ),
    "a thousand weights of the same stored bytes": (
        lambda d: d.update(extra=[torch.zeros(40_000)] * 1000),
        "claim",
    ),
}


@pytest.mark.parametrize("lie", TEXTS)
def test_documents_out_of_bounds_are_refused(good, tmp_path, monkeypatch, lie):
    monkeypatch.setattr(torch_file, "MOST_VALUES", 20_000)  # the true bound takes seconds
    change, why = TEXTS[lie]
    refused(["inspect", changed(good, tmp_path, change)], why)


def test_a_program_that_wants_another_weight_is_refused(good, tmp_path):
    onnx_file = tmp_path / "out.onnx"
    assert CliRunner().invoke(app, ["convert", str(good), str(onnx_file)]).exit_code == 0
    path = changed(good, tmp_path, lambda d: d["state"].pop("fc1.bias"))
    refused(["validate", onnx_file, "--against", path], "lacks 'fc1.bias'")
    path = changed(
        good, tmp_path, lambda d: d["state"].update({"fc1.bias": torch.ones(8).double()})
    )
    refused(["validate", onnx_file, "--against", path], "float64")


# The file itself


def rewritten(good, change):
    """The archive with `change` applied to its list of (name, bytes)."""
    with zipfile.ZipFile(good) as source:
        members = [(name, source.read(name)) for name in source.namelist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of doubled names
        for name, data in change(members):
            target.writestr(name, data)
    return buffer.getvalue()


def with_pickle(opcodes):
    return lambda members: [
        (name, opcodes if name.endswith("/data.pkl") else data) for name, data in members
    ]


ARCHIVES = {
    "a member twice": (lambda members: [*members, members[0]], "twice"),
    "two folders": (lambda members: [*members, ("other/data.pkl", b"")], "folders"),
    "a path upwards": (lambda members: [*members, ("archive/../x", b"")], "path|folders"),
    "a buffer of a terabyte": (
        with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."),
        "pickled",
    ),
    "a legacy tensor of a terabyte": (
        with_pickle(b"\x80\x02ctorch\nFloatTensor\n\x8a\x06\0\0\0\0\0\x01\x85R."),
        "pickled",
    ),
    "a name off the stack": (with_pickle(b"\x80\x04\x8c\x02os\x8c\x06system\x93."), "pickled"),
    "an endless pickle": (with_pickle(b"\x80\x02" + b"N0" * 30_000 + b"N."), "values"),
    "a pickle without an end": (with_pickle(b"\x80\x02N"), "damaged"),
    "a pickle of nothing": (with_pickle(b""), "damaged"),
    "a text of a terabyte": (with_pickle(b"\x80\x04\x8d\0\0\0\0\0\x01\0\0x."), "damaged"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_torch_does_not_write_are_refused(good, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(torch_file, "MOST_OPCODES", 20_000)  # the true bound takes seconds
    change, why = ARCHIVES[kind]
    path = tmp_path / "evil.pt"
    path.write_bytes(rewritten(good, change))
    with pytest.raises(FileError, match=why):
        checkpoint.load(path)


def test_bytes_around_the_archive_are_refused(good, tmp_path):
    data = good.read_bytes()
    for evil in (b"x" * 64 + data, data + b"x" * 64, data + data):
        (tmp_path / "evil.pt").write_bytes(evil)
        with pytest.raises(FileError):
            checkpoint.load(tmp_path / "evil.pt")


@pytest.mark.parametrize("name", ["x" * 300 + ".pt", "a/" * 3000 + "x.pt", "x\0.pt", ""])
def test_paths_that_no_file_can_have_are_refused(tmp_path, name):
    for path in (name, f"{tmp_path}/{name}"):
        with pytest.raises(FileError):
            checkpoint.load(path)
