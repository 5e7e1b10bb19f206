"""Where results are to be written: nothing that the user still needs is overwritten, whatever
--force says."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from ecqx_onnx_converters.graph.outputs import replace_on_success
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.cli import app
from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.model_copy import copy_model
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.verbs.pack import pack
from tests.test_packing import CASES

MODELS = Path(__file__).parents[2] / "models"


def refused(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, (result.output, result.stderr, result.exception)
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copy(MODELS / "lenet_300_100_mnist_2bit.pt", tmp_path / "model.pt"))


@pytest.mark.parametrize("command", [("convert", "{0}", "{1}"), ("report", "{0}", "-o", "{1}")])
def test_a_checkpoint_is_never_replaced_by_what_is_made_of_it(checkpoint, command):
    before = checkpoint.read_bytes()
    for same in (checkpoint, checkpoint.parent / "." / "sub" / ".." / "model.pt"):
        (checkpoint.parent / "sub").mkdir(exist_ok=True)
        message = refused(*(part.format(checkpoint, same) for part in command), "--force")
        assert "is what is read: choose another name" in message
        assert checkpoint.read_bytes() == before


def test_float_weights_are_never_replaced_by_the_checkpoint_that_is_trained_from_them(checkpoint):
    before = checkpoint.read_bytes()
    network = f"{MODELS}/lenet_300_100.py:lenet_300_100"
    message = refused(
        "quantize",
        network,
        "--weights",
        checkpoint,
        "--data",
        "sklearn:digits",
        "--out",
        checkpoint,
        "--force",
    )
    assert "is what is read" in message
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_an_onnx_file_is_never_replaced_by_its_other_storage(command, tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    file = tmp_path / ("original.onnx" if command == "pack" else "packed.onnx")
    before = file.read_bytes()
    assert "is what is read: choose another name" in refused(command, file, file, "--force")
    assert file.read_bytes() == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_folder_is_called_a_folder(checkpoint, tmp_path, force):
    (tmp_path / "folder").mkdir()
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    for command in (("convert", checkpoint), ("pack", tmp_path / "original.onnx")):
        assert "is a folder; name a file" in refused(*command, tmp_path / "folder", *force)
    assert "is a folder; name a file" in refused(
        "report", checkpoint, "-o", tmp_path / "folder", *force
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(FileError, match="is no regular file"),
        replace_on_success(tmp_path / "pipe", force=True),
    ):
        raise AssertionError("nothing may be written")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["out.ort", "out.pt", "out"])
def test_no_onnx_file_gets_the_name_of_another_format(checkpoint, name, tmp_path):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    for command in (
        ("convert", checkpoint),
        ("pack", tmp_path / "original.onnx"),
        ("unpack", tmp_path / "packed.onnx"),
    ):
        assert f"loads .onnx files; name it {tmp_path / 'out.onnx'}" in refused(
            *command, tmp_path / name
        )
    assert not (tmp_path / name).exists()


def test_a_phones_file_gets_no_other_name(checkpoint, tmp_path):
    message = refused(
        "convert", checkpoint, tmp_path / "out.onnx", "--target", "onnxruntime-mobile"
    )
    assert f"'onnxruntime-mobile' loads .ort files; name it {tmp_path / 'out.ort'}" in message


def test_a_checkpoint_is_not_named_like_an_onnx_file(tmp_path):
    network = f"{MODELS}/lenet_300_100.py:lenet_300_100"
    message = refused("quantize", network, "--data", "no.npz", "--out", tmp_path / "out.onnx")
    assert f"is a checkpoint, not an .onnx file; name it {tmp_path / 'out.pt'}" in message


def test_a_folder_that_is_missing_is_told_before_anything_is_read(tmp_path):
    out = tmp_path / "no" / "out.onnx"
    for command in (
        ("convert", "no.pt", out),
        ("pack", "no.onnx", out),
        ("unpack", "no.onnx", out),
        ("report", "no.pt", "-o", out),
    ):
        assert f"the folder {out.parent} does not exist; create it first" in refused(*command)


@pytest.mark.parametrize("place", ["file", "file/demo"])
def test_the_demo_makes_no_folder_of_a_file(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    assert "cannot be made a folder" in refused("demo", "--folder", tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("option", ["--storage", "--dequantize"])
def test_pack_knows_its_options_for_a_file_that_it_copies_too(tmp_path, option):
    onnx.save(CASES["int8"].model, tmp_path / "original.onnx")
    pack(tmp_path / "original.onnx", tmp_path / "packed.onnx")
    assert "there is no" in refused(
        "pack", tmp_path / "packed.onnx", tmp_path / "again.onnx", option, "misspelt"
    )
    assert not (tmp_path / "again.onnx").exists()


def test_a_folder_with_too_few_labels_is_not_deployed(checkpoint, tmp_path):
    assert (
        CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "m.onnx")]).exit_code
        == 0
    )
    message = refused(
        "deploy", tmp_path / "m.onnx", tmp_path / "web", "--to", "linux", "--labels", "cat,dog"
    )
    assert "--labels names 2 classes, and the model tells 10 apart" in message
    assert not (tmp_path / "web").exists()


def files(folder):
    """What lies in a folder, hidden files too."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def done(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result


EIGHT_BYTES = np.array([1.5, -2.5], np.float32).tobytes()


def a_stranger(path, *locations, offset=0):
    """A model that adds vectors of two floats, whose data lie in files of these names; nothing of
    it can be packed."""
    nodes, tensors, value = [], [], "x"
    for number, location in enumerate(locations):
        tensor = onnx.TensorProto(name=f"w{number}", data_type=onnx.TensorProto.FLOAT, dims=[2])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        if offset:
            tensor.external_data.add(key="offset", value=str(offset))
        tensors.append(tensor)
        nodes.append(onnx.helper.make_node("Add", [value, f"w{number}"], [f"y{number}"]))
        value = f"y{number}"
    inputs = [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])]
    outputs = [onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, [2])]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    imports = [onnx.helper.make_opsetid("", 17)]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    )
    for location in locations:
        (path.parent / location).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / location).write_bytes(bytes(offset) + EIGHT_BYTES)
    return path


def outcome(path):
    from ecqx_onnx.runtime.sessions import open_session, run

    return run(open_session(path), [np.zeros(2, np.float32)])[0].tolist()


LOCATIONS = [
    ".bashrc",
    "json.py",
    "deep/.ssh/authorized_keys",
    "out.onnx",
    "model.onnx.data",
    "manifest.json",
    "out.onnx.data",
]


@pytest.mark.parametrize("force", [(), ("--force",)])
@pytest.mark.parametrize("location", LOCATIONS)
def test_no_file_gets_the_name_that_a_model_states_for_its_data(location, force, tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", location)
    home = tmp_path / "home"
    for name in (".bashrc", "json.py", "deep/.ssh/authorized_keys"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine")
    before = files(home)
    done("pack", model, home / "out.onnx", *force)
    after = files(home)
    assert {name: content for name, content in after.items() if name in before} == before
    assert sorted(after.keys() - before.keys()) == ["out.onnx", "out.onnx.data"]
    assert outcome(home / "out.onnx") == [1.5, -2.5]


def test_data_in_several_files_are_put_into_one_and_each_byte_once(tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", "a", "a", "b", "a", offset=10_000)
    pack(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size < 2 * 4096 + 4096
    assert outcome(tmp_path / "out.onnx") == [6.0, -10.0]
    locations = {entry.value for tensor in read_onnx(tmp_path / "out.onnx").proto.graph.initializer
                 for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    assert locations == {"out.onnx.data"}


def test_a_copy_takes_no_more_than_what_it_is_made_of(tmp_path):
    """A hundred tensors that overlap in one file."""
    model = a_stranger(tmp_path / "model.onnx", *["data"] * 100, offset=1)
    proto = onnx.load(model, load_external_data=False)
    for number, tensor in enumerate(proto.graph.initializer):
        tensor.dims[:] = [1000]
        tensor.external_data[1].value = str(4 * number)
    model.write_bytes(proto.SerializeToString())
    (tmp_path / "data").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "copy").mkdir()
    copy_model(read_onnx(model), tmp_path / "copy" / "out.onnx")
    assert (tmp_path / "copy" / "out.onnx.data").stat().st_size <= 256 * 40
    originals = onnx.load(model).graph.initializer
    copies = onnx.load(tmp_path / "copy" / "out.onnx").graph.initializer
    for old, new in zip(originals, copies, strict=True):
        assert old.raw_data[:4000] == new.raw_data


def test_external_data_of_a_constant_or_of_a_branch_get_our_name_too(tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", ".bashrc")
    proto = onnx.load(model, load_external_data=False)
    constant = onnx.helper.make_node("Constant", [], ["c"], value=proto.graph.initializer[0])
    inner = onnx.helper.make_graph([], "inner", [], [], [proto.graph.initializer[0]])
    inner.output.append(onnx.helper.make_tensor_value_info("w0", onnx.TensorProto.FLOAT, [2]))
    proto.graph.node.insert(0, constant)
    proto.graph.node[1].input[1] = "c"
    proto.graph.node.append(
        onnx.helper.make_node("If", ["k"], ["z"], then_branch=inner, else_branch=inner)
    )
    del proto.graph.initializer[:]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "k"))
    model.write_bytes(proto.SerializeToString())
    copy_model(read_onnx(model), tmp_path / "out.onnx")
    assert b".bashrc" not in (tmp_path / "out.onnx").read_bytes()
    assert sorted(files(tmp_path)) == [
        "out.onnx",
        "out.onnx.data",
        "there/.bashrc",
        "there/model.onnx",
    ]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_called_like_the_outputs_data_is_replaced_only_with_force(force, tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", "w.bin")
    (tmp_path / "out.onnx.data").write_text("mine")
    if force:
        done("pack", model, tmp_path / "out.onnx", *force)
        assert (tmp_path / "out.onnx.data").read_bytes() == EIGHT_BYTES
    else:
        assert f"{tmp_path / 'out.onnx.data'}: exists already" in refused(
            "pack", model, tmp_path / "out.onnx"
        )
        assert files(tmp_path).keys() == {"out.onnx.data", "there/model.onnx", "there/w.bin"}
        assert (tmp_path / "out.onnx.data").read_text() == "mine"


def test_the_models_own_data_are_never_replaced_by_those_of_its_copy(tmp_path):
    model = a_stranger(tmp_path / "model.onnx", "out.onnx.data")
    before = files(tmp_path)
    for force in ((), ("--force",)):
        message = refused("pack", model, tmp_path / "out.onnx", *force)
        assert "out.onnx.data: is what is read" in message or "exists already" in message
        assert files(tmp_path) == before


def test_a_link_called_like_the_outputs_data_is_replaced_and_not_followed(tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", "w.bin")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out.onnx.data").symlink_to(tmp_path / "precious")
    assert "exists already" in refused("pack", model, tmp_path / "out.onnx")
    done("pack", model, tmp_path / "out.onnx", "--force")
    assert not (tmp_path / "out.onnx.data").is_symlink()
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_copy_that_fails_half_way_leaves_both_files_as_they_were(tmp_path, monkeypatch):
    model = a_stranger(tmp_path / "there" / "model.onnx", "w.bin")
    (tmp_path / "out.onnx").write_text("old model")
    (tmp_path / "out.onnx.data").write_text("old data")
    before, real = files(tmp_path), os.replace

    def fails(source, target):
        if str(target).endswith("out.onnx"):
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    assert "Input/output error; nothing was left behind" in refused(
        "pack", model, tmp_path / "out.onnx", "--force"
    )
    assert files(tmp_path) == before


def test_data_that_cannot_be_read_are_not_called_a_fault_of_writing(tmp_path, monkeypatch):
    model = read_onnx(a_stranger(tmp_path / "there" / "model.onnx", "w.bin"))
    real = open

    def forbidden(path, *mode, **options):
        if str(path).endswith("w.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *mode, **options)

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(
        FileError, match=r"cannot read '.*w\.bin', the model's data: Permission denied"
    ):
        copy_model(model, tmp_path / "out.onnx")


@pytest.mark.parametrize("location", ["json.py", "manifest.json", "run.py", "golden/00.input0.bin"])
def test_no_program_beside_a_deployed_model_comes_from_its_author(location, tmp_path):
    model = a_stranger(tmp_path / "there" / "model.onnx", location)
    api.deploy(model, tmp_path / "folder", to="linux")
    manifest = json.loads((tmp_path / "folder" / "manifest.json").read_text())
    assert [entry["file"] for entry in manifest["external"]] == ["model.onnx.data"]
    assert (tmp_path / "folder" / "model.onnx.data").read_bytes() == EIGHT_BYTES
    assert EIGHT_BYTES not in [
        content for name, content in files(tmp_path / "folder").items() if name.endswith(".py")
    ]
    assert outcome(tmp_path / "folder" / "model.onnx") == [1.5, -2.5]


def test_no_program_in_a_devices_job_comes_from_the_models_author(tmp_path):
    from ecqx_onnx.validation.devices.job import write_job

    model = a_stranger(tmp_path / "there" / "model.onnx", "json.py")
    (tmp_path / "job").mkdir()
    feed = {"x": np.zeros(2, np.float32)}
    write_job(read_onnx(model), tmp_path / "job", iter([feed]), feed)
    assert not (tmp_path / "job" / "json.py").exists()
    assert json.loads((tmp_path / "job" / "job.json").read_text())["external"] == [
        "model.onnx.data"
    ]
    assert outcome(tmp_path / "job" / "model.onnx") == [1.5, -2.5]


NET = """
import torch.nn as nn
INPUT_SHAPE = (6,)
def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a network, data for it, a checkpoint and an .onnx file of it."""
    folder = tmp_path_factory.mktemp("small")
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(60, 6)).astype(np.float32), generator.integers(0, 3, 60)
    np.savez(folder / "data.npz", x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
    (folder / "net.py").write_text(NET)
    done(*quantizing(folder, folder / "model.pt"))
    done("convert", folder / "model.pt", folder / "model.onnx")
    return folder


def quantizing(small, out, *options):
    fixed = (
        "--data",
        small / "data.npz",
        "--epochs",
        2,
        "--device",
        "cpu",
        "--validation",
        0,
        "--quiet",
    )
    return ("quantize", f"{small / 'net.py'}:net", "--out", out, *fixed, *options)


def writing(small, command, out):
    """Each command that writes one output."""
    return {
        "quantize": quantizing(small, out),
        "convert": ("convert", small / "model.pt", out),
        "pack": ("pack", small / "model.onnx", out),
        "unpack": ("unpack", small / "model.onnx", out),
        "report": ("report", small / "model.pt", "-o", out),
        "deploy": ("deploy", small / "model.onnx", out, "--to", "linux"),
    }[command]


SUFFIXES = {
    "quantize": ".pt",
    "convert": ".onnx",
    "pack": ".onnx",
    "unpack": ".onnx",
    "report": ".html",
    "deploy": "",
}
COMMANDS = [pytest.param(name, suffix, id=name) for name, suffix in SUFFIXES.items()]


@pytest.mark.parametrize(
    "kind", ["link", "dangling link", "text", "state dict", "pickle", "folder", "pipe"]
)
@pytest.mark.parametrize("options", [(), ("--resume",), ("--force",), ("--epochs", 0)])
def test_what_is_called_like_the_state_of_a_training_and_is_none_stays(
    kind, options, small, tmp_path
):
    state, precious = tmp_path / "model.pt.training", tmp_path / "precious"
    precious.write_text("mine")
    marker = tmp_path / "marker"
    make = {
        "link": lambda: state.symlink_to(precious),
        "dangling link": lambda: state.symlink_to(tmp_path / "nowhere"),
        "text": lambda: state.write_text("mine"),
        "state dict": lambda: torch.save({"w": torch.zeros(2)}, state),
        "pickle": lambda: torch.save(Marks(str(marker)), state),
        "folder": state.mkdir,
        "pipe": lambda: os.mkfifo(state),
    }
    make[kind]()
    before, found = files(tmp_path), os.lstat(state)
    message = refused(*quantizing(small, tmp_path / "model.pt", *options))
    assert "training state" in message
    assert "delete it to start anew" in message
    assert os.lstat(state) == found
    assert files(tmp_path) == before


class Marks:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_state_of_ours_with_foreign_parts_is_refused(small, tmp_path):
    state = tmp_path / "model.pt.training"
    table = dict.fromkeys(("setup", "model", "optimizer", "quantizer", "history", "best"))
    for changes in (
        {},
        {"format": "another"},
        {"version": 9},
        {"setup": {"epochs": 2}},
        {"setup": 3},
    ):
        torch.save({**table, **changes}, state)
        before = state.read_bytes()
        refused(*quantizing(small, tmp_path / "model.pt", "--resume"))
        assert state.read_bytes() == before


def test_files_whose_names_a_training_used_to_take_stay(small, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "model.pt.training.partial").symlink_to(tmp_path / "precious")
    done(*quantizing(small, tmp_path / "model.pt"))
    assert sorted(files(tmp_path)) == ["model.pt", "model.pt.training.partial", "precious"]
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("length", [243, 255])
@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_long_names_work(command, suffix, length, small, tmp_path):
    out = tmp_path / ("n" * (length - len(suffix)) + suffix)
    done(*writing(small, command, out))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_names_that_are_too_long_are_refused(command, suffix, small, tmp_path):
    out = tmp_path / ("n" * (256 - len(suffix)) + suffix)
    assert "a name can have 255 bytes, and this one has 256" in refused(
        *writing(small, command, out)
    )
    assert "File name too long" in refused(
        *writing(small, command, tmp_path / ("n" * 300) / f"out{suffix}")
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_a_link_to_nowhere_is_no_output(command, suffix, small, tmp_path):
    out = tmp_path / f"out{suffix}"
    out.symlink_to(tmp_path / "nowhere")
    assert "link" in refused(*writing(small, command, out))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.is_symlink()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_force_replaces_a_link_and_not_what_it_leads_to(command, suffix, there, small, tmp_path):
    out, precious = tmp_path / f"out{suffix}", tmp_path / "precious"
    if there and command == "deploy":
        precious.mkdir()
    elif there:
        precious.write_text("mine")
    out.symlink_to(precious)
    done(*writing(small, command, out), "--force")
    assert not out.is_symlink()
    assert precious.exists() == there
    assert (
        list(precious.iterdir()) == []
        if command == "deploy" and there
        else not there or precious.read_text() == "mine"
    )


@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_a_file_where_a_folder_is_meant_is_told(command, suffix, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file, not a folder" in refused(
        *writing(small, command, tmp_path / "file" / f"out{suffix}")
    )
    assert "does not exist" in refused(
        *writing(small, command, tmp_path / "file" / "deep" / f"out{suffix}")
    )
    assert files(tmp_path) == {"file": b"mine"}


@contextlib.contextmanager
def files_of_at_most(nbytes):
    """As on a full disk: no file gets longer."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_a_full_disk_leaves_what_was_there(command, suffix, old, small, tmp_path):
    out = tmp_path / f"out{suffix}"
    if old and command == "deploy":
        out.mkdir()
        (out / "manifest.json").write_text('{"format": "ecqx-onnx deployment"}')
    elif old:
        out.write_text("old")
    before = files(tmp_path)
    with files_of_at_most(600):
        message = refused(*writing(small, command, out), "--force")
    assert "cannot" in message
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ([out.name] if old else [])


@pytest.mark.parametrize(("command", "suffix"), COMMANDS)
def test_a_folder_that_may_not_be_written_to_is_told(command, suffix, small, tmp_path, monkeypatch):
    real = os.mkdir

    def forbidden(path, *mode, **options):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *mode, **options)

    monkeypatch.setattr(os, "mkdir", forbidden)
    message = refused(*writing(small, command, tmp_path / f"out{suffix}"))
    assert "cannot write" in message
    assert "Permission denied" in message
    assert list(tmp_path.iterdir()) == []


def test_a_phones_configuration_is_replaced_only_with_force(small, tmp_path):
    other = tmp_path / "out.required_operators_and_types.config"
    other.write_text("mine")
    command = (
        "convert",
        small / "model.pt",
        tmp_path / "out.ort",
        "--target",
        "onnxruntime-mobile",
    )
    assert f"{other}: exists already" in refused(*command)
    assert files(tmp_path) == {other.name: b"mine"}
    done(*command, "--force")
    assert other.read_text() != "mine"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_deploy_makes_no_folder_of_what_is_none(small, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("mine")
    for name in ("pipe", "file"):
        for force in ((), ("--force",)):
            assert "is a file, not a folder" in refused(
                "deploy", small / "model.onnx", tmp_path / name, "--to", "linux", *force
            )
    assert (tmp_path / "file").read_text() == "mine"


def test_a_devices_runner_is_not_written_through_a_link(small, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "job.json").write_text("{}")
    (tmp_path / "job" / "run.py").symlink_to(tmp_path / "precious")
    command = (
        "validate",
        small / "model.onnx",
        "--against",
        small / "model.pt",
        "--device",
        f"folder:{tmp_path / 'job'}",
    )
    assert "is a link" in refused(*command)
    assert (tmp_path / "precious").read_text() == "mine"
