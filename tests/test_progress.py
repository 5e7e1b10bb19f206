"""The bar says what is done from the first moment on, and never stands still at the end."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from ecqx_onnx.cli import app, frame

TRAINING = "epoch 10/25  loss 0.123  accuracy 97.51%  71% zeros  1.23 bit"


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 80 columns; the text that was drawn on it so far."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, stderr=True, markup=False, emoji=False
    )
    monkeypatch.setattr(frame, "stderr", console)
    return console


def list_frames(console):
    """What stood on the line, one after the other, without colors."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]


def test_the_first_line_says_what_is_done(terminal):
    with frame.show_progress(False, "loading the network and the data"):
        pass
    assert "loading the network and the data" in list_frames(terminal)[0]


def test_share_remaining_time_and_label_are_seen_at_80_columns(terminal):
    with frame.show_progress(False) as show:
        show(40, 100, TRAINING)
    last = list_frames(terminal)[-1]
    assert len(last) <= 80
    assert "40%" in last
    assert re.search(r"(\d\d|--):(\d\d|--)", last)
    assert "epoch 10/25  loss 0.123  accuracy 97.51%" in last


def test_the_bar_goes_on_when_all_steps_are_done(terminal, monkeypatch):
    """What follows, such as writing the file, takes its time as well."""
    bars = []

    class Bar(Progress):
        def start(self):
            bars.append(self)
            super().start()

    monkeypatch.setattr(frame, "Progress", Bar)
    with frame.show_progress(False) as show:
        show(99, 100, "training")
        show(100, 100, "writing")
        (task,) = bars[0].tasks
        assert task.total is None
        assert not task.finished
        assert task.description == "writing"
        show(1, 10, "checking")
        assert bars[0].tasks[0].total == 10


def test_nothing_is_drawn_where_nobody_looks(monkeypatch):
    console = Console(file=io.StringIO(), stderr=True)
    monkeypatch.setattr(frame, "stderr", console)
    with frame.show_progress(False, "loading") as show:
        assert show is None
    assert console.file.getvalue() == ""


def test_commands_that_write_end_with_the_next_one(tmp_path):
    from tests.test_package import write_quantized_model

    model, packed = tmp_path / "a b.onnx", tmp_path / "packed.onnx"
    write_quantized_model(model)
    done = CliRunner().invoke(app, ["pack", str(model), str(packed)])
    line = done.output.strip().splitlines()[-1]
    assert line == f"next: ecqx-onnx validate {packed} --against '{model}'"
    words = line.removeprefix("next: ecqx-onnx ").replace("'", "").split(" --against ")
    arguments = ["validate", words[0].removeprefix("validate "), "--against", words[1]]
    assert CliRunner().invoke(app, arguments).exit_code == 0


def test_json_and_quiet_have_no_next_command(tmp_path):
    from tests.test_package import write_quantized_model

    write_quantized_model(tmp_path / "a.onnx")
    for option in ("--json", "--quiet"):
        arguments = ["pack", str(tmp_path / "a.onnx"), str(tmp_path / f"{option}.onnx"), option]
        assert "next:" not in CliRunner().invoke(app, arguments).output


@pytest.mark.parametrize(
    "words",
    [
        "convert missing.pt there.onnx",
        "pack missing.onnx there.onnx",
        "unpack missing.onnx there.onnx",
        "compress missing.onnx there.onnx --data x.npz",
        "compress there.pt there.onnx --data missing.npz",
        "quantize missing.py:net --data x.npz --out there.pt",
        "quantize there.pt --data missing.npz --out there.pt",
        "report missing.pt -o there.html",
        "deploy missing.onnx there --to linux",
    ],
)
def test_a_missing_input_is_told_before_an_output_that_is_in_the_way(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there.onnx", "there.pt", "there.html", "x.npz"):
        (tmp_path / name).touch()
    (tmp_path / "there").mkdir()
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2
    assert "cannot read 'missing" in done.stderr
    assert "check the path" in done.stderr


def test_an_output_that_is_in_the_way_names_the_option_that_replaces_it(tmp_path):
    from tests.test_package import write_quantized_model

    write_quantized_model(tmp_path / "a.onnx")
    (tmp_path / "there.onnx").touch()
    arguments = ["pack", str(tmp_path / "a.onnx"), str(tmp_path / "there.onnx")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "exists already; use --force" in done.stderr
