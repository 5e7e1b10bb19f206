"""What the operating system refuses, and what nobody foresaw: one sentence, a status, nothing left
behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecqx_onnx import inspection
from ecqx_onnx.cli import app
from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.reading import make_file_error, turn_system_errors

MODELS = Path(__file__).parents[2] / "models"
CHECKPOINT = MODELS / "lenet_300_100_mnist_2bit.pt"
NETWORK = f"{MODELS}/lenet_300_100.py:lenet_300_100"
READ = {
    "inspect": ("inspect", "{}"),
    "convert": ("convert", "{}", "{tmp}/out.onnx"),
    "validate": ("validate", "{}", "--against", CHECKPOINT),
    "against": ("validate", "{onnx}", "--against", "{}"),
    "inputs": ("validate", "{onnx}", "--against", "{onnx}", "--inputs", "{}"),
    "deploy": ("deploy", "{}", "{tmp}/web", "--to", "web"),
    "report": ("report", "{}", "-o", "{tmp}/page.html"),
    "pack": ("pack", "{}", "{tmp}/out.onnx"),
    "unpack": ("unpack", "{}", "{tmp}/out.onnx"),
    "data": ("quantize", NETWORK, "--data", "{}", "--out", "{tmp}/out.pt"),
    "weights": (
        "quantize",
        NETWORK,
        "--data",
        "sklearn:digits",
        "--weights",
        "{}",
        "--out",
        "{tmp}/out.pt",
    ),
    "recipe": (
        "quantize",
        NETWORK,
        "--data",
        "sklearn:digits",
        "--recipe",
        "{}",
        "--out",
        "{tmp}/out.pt",
    ),
    "device": ("validate", "{onnx}", "--against", CHECKPOINT, "--device", "folder:{}"),
}
ENDINGS = {
    "inputs": ".npz",
    "data": ".npz",
    "recipe": ".toml",
    "report": ".pt",
    "convert": ".pt",
    "weights": ".pt",
    "device": "",
}


def run(command, path, tmp, onnx, *, code=2):
    arguments = [str(part).format(path, tmp=tmp, onnx=onnx) for part in READ[command]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Errno" not in message
    return message


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    assert CliRunner().invoke(app, ["convert", str(CHECKPOINT), str(path)]).exit_code == 0
    return path


@pytest.fixture
def place(tmp_path):
    """A folder for outputs that stays empty, and one for what is read."""
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    yield tmp_path
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", READ)
def test_a_name_that_is_too_long_is_told(command, place, onnx):
    name = "n" * 300 + ENDINGS.get(command, ".onnx")
    run(command, place / "in" / name, place / "out", onnx)


@pytest.mark.parametrize("command", READ)
def test_a_link_that_leads_to_itself_is_told(command, place, onnx):
    loop = place / "in" / f"loop{ENDINGS.get(command, '.onnx')}"
    loop.symlink_to(loop.name)
    run(command, loop, place / "out", onnx)


@pytest.mark.parametrize("command", READ)
def test_a_file_where_a_folder_is_meant_is_told(command, place, onnx):
    (place / "in" / "file").write_text("x")
    run(
        command,
        place / "in" / "file" / f"model{ENDINGS.get(command, '.onnx')}",
        place / "out",
        onnx,
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
@pytest.mark.parametrize("command", READ)
def test_a_pipe_is_not_waited_for(command, place, onnx):
    pipe = place / "in" / f"pipe{ENDINGS.get(command, '.onnx')}"
    os.mkfifo(pipe)
    run(command, pipe, place / "out", onnx)


@pytest.mark.parametrize("command", READ)
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_told(command, what, place, onnx):
    file = place / "in" / f"model{ENDINGS.get(command, '.onnx')}"
    file.mkdir() if command == "device" else file.write_text("x")
    closed = file if what == "file" else file.parent
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may read everything")
        assert "ermission" in run(command, file, place / "out", onnx)
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize(
    "code", [errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE, errno.EINVAL]
)
def test_every_refusal_of_the_system_says_which_file_and_what_to_do(code, place, onnx, monkeypatch):
    def refuse(path):
        raise OSError(code, os.strerror(code), "secret\x1b[31m.onnx")

    monkeypatch.setattr(inspection, "inspect", refuse)
    message = run("inspect", onnx, place / "out", onnx)
    assert f"'secret\\x1b[31m.onnx': the system says '{os.strerror(code)}'; " in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        OSError("words alone"),
        OSError(5, None),
        OSError(5, "why", 3),
        OSError(5, "why", b"a\xff"),
    ],
)
def test_an_odd_refusal_of_the_system_is_a_sentence_too(error):
    message = str(make_file_error(error))
    assert "the system says '" in message
    assert "; " in message
    assert "None" not in message


def test_a_reader_that_has_seen_enough_is_no_error_of_files():
    with pytest.raises(BrokenPipeError), turn_system_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    with pytest.raises(FileError), turn_system_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "x")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux only")
def test_a_folder_in_which_nothing_can_be_made_is_told_and_not_tried_for_ever(onnx):
    command = ["convert", str(CHECKPOINT), "/proc/out.onnx"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert "cannot write '/proc/out.onnx'" in result.stderr


# The net


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a\nb\x1b[2J"),
        RecursionError("too deep"),
        AttributeError("none"),
        EOFError(),
        SystemError("x"),
    ],
)
def test_what_nobody_foresaw_is_one_sentence_and_status_70(error, place, onnx, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.setattr(inspection, "inspect", fail)
    message = run("inspect", onnx, place / "out", onnx, code=70)
    assert (
        f"inspect of '{onnx}' failed in a way that nobody foresaw ({type(error).__name__}: "
        in message
    )
    assert "--debug shows where; please report it" in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_runs_out_is_called_so(error, place, onnx, monkeypatch):
    def fail(path):
        raise error

    monkeypatch.setattr(inspection, "inspect", fail)
    assert "memory ran out during inspect" in run("inspect", onnx, place / "out", onnx, code=2)


def test_debug_shows_where_it_happened(onnx, monkeypatch):
    def fail(path):
        raise KeyError("a\x1b[2Jb")

    monkeypatch.setattr(inspection, "inspect", fail)
    result = CliRunner().invoke(app, ["inspect", str(onnx), "--debug"])
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert ", in fail" in result.stderr
    assert "\x1b" not in result.stderr


def test_debug_is_no_option_of_a_training_and_of_no_recipe(tmp_path):
    (tmp_path / "r.toml").write_text("debug = true")
    command = [
        "quantize",
        NETWORK,
        "--data",
        "d.npz",
        "--out",
        f"{tmp_path}/m.pt",
        "--recipe",
        f"{tmp_path}/r.toml",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "has 'debug', which is no option of quantize" in result.stderr


# Recipes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bits = ", "is no recipe"),
        ("[" * 9_000, "is no recipe"),
        ("a = " + "[" * 9_000, "is no recipe"),
        ("a" + ".a" * 20_000 + " = 1", "is no recipe"),
        ("epochs = " + "9" * 5000, "is no recipe"),
        ("#" * 10_001, "at most 10000 are read"),
        ("epochs = 'many'", "has a value for 'epochs' that cannot be used"),
        ("epochs = -1", "has a value for 'epochs' that cannot be used"),
        ("epochs = 1e400", "has a value for 'epochs' that cannot be used"),
        ("epochs = [1, 2]", "has a value for 'epochs' that cannot be used"),
        ("'e\\npochs' = 1", "is no option of quantize"),
        ('"a\\u001b[2J" = 1', "is no option of quantize"),
        ("out = 'elsewhere.pt'", "has 'out', which is no option of quantize"),
        ("force = true", "has 'force', which is no option of quantize"),
        ("\ufeff\0", "is no recipe"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence(tmp_path, text, says):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text, encoding="utf-8")
    command = [
        "quantize",
        NETWORK,
        "--data",
        "none.npz",
        "--out",
        f"{tmp_path}/m.pt",
        "--recipe",
        str(recipe),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "\x1b" not in result.stderr
    assert says in result.stderr


def test_a_recipe_in_another_encoding_is_one_sentence(tmp_path):
    (tmp_path / "r.json").write_bytes(b'{"caf\xe9": 1}')
    command = [
        "quantize",
        NETWORK,
        "--data",
        "none.npz",
        "--out",
        f"{tmp_path}/m.pt",
        "--recipe",
        f"{tmp_path}/r.json",
    ]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "is no recipe" in result.stderr


def test_a_class_of_another_encoding_is_refused_before_a_training_is_begun(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"data", b"caf\xe9")
    try:
        os.makedirs(name)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    result = CliRunner().invoke(
        app, ["quantize", NETWORK, "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/m.pt"]
    )
    assert result.exit_code == 2
    assert "not UTF-8: rename it" in result.stderr
    shutil.rmtree(tmp_path / "data")
    assert not list(tmp_path.iterdir())
