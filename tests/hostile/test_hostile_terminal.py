"""Names of strangers on a terminal: shown, never obeyed; no encoding breaks a command that is
done."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from ecqx_onnx.cli import app, frame, main, terminal
from ecqx_onnx.cli import terminal as terminal_module
from ecqx_onnx.cli.frame import emit
from ecqx_onnx.cli.terminal import escape, escape_report, make_strict_json

CHECKPOINT = Path(__file__).parents[2] / "models" / "lenet_300_100_mnist_2bit.pt"
HOSTILE = {
    "markup that closes nothing": "[/x]",
    "markup that would vanish": "[conv]",
    "markup that colors": "[red]w[/red]",
    "a link": "[link=http://x]w[/link]",
    "an emoji code": ":smile:",
    "an escape": "\x1b[31mred",
    "a title of the window": "\x1b]0;owned\x07",
    "an eight-bit escape": "\x9b31m",
    "a line break": "w\nerror: all is lost",
    "a carriage return": "w\rAll 9 checks passed.",
    "backspaces": "evil\b\b\b\bgood",
    "a bidirectional override": "w\u202egpj.exe",
    "an isolate": "w\u2066x\u2069",
    "a line separator": "a\u2028b",
    "zero width": "a\u200bb",
}


def has_only_what_shows(text: str) -> bool:
    return all(c == "\n" or unicodedata.category(c) not in terminal.INVISIBLE for c in text)


def model_named(path: Path, name: str) -> Path:
    """An .onnx file with a weight, a node, an input, an operator's domain and a producer of that
    name."""
    weight = numpy_helper.from_array(np.eye(40, dtype=np.float32), name)
    x, y = (
        helper.make_tensor_value_info(key, TensorProto.FLOAT, [1, 40]) for key in (name + "x", "y")
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", [name + "x", name], ["y"], name)], name, [x], [y], [weight]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name=name
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_an_onnx_file_reach_the_terminal_as_text(tmp_path, name):
    file = model_named(tmp_path / "model.onnx", name)
    result = CliRunner().invoke(app, ["inspect", str(file)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert has_only_what_shows(result.output)
    shown = result.stdout.replace("\n", "").replace(" ", "")
    assert escape(name).replace(" ", "") in shown
    as_json = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert name in [row["name"] for row in json.loads(as_json.stdout)["float"]]


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_in_refusals_stay_on_their_line(tmp_path, name):
    file = model_named(tmp_path / "model.onnx", name)
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out.onnx")])
    assert result.exit_code == 2
    np.savez(tmp_path / "x.npz", **{"other": np.zeros(3)})
    command = [
        "validate",
        str(file),
        "--against",
        shutil.copy(file, tmp_path / "b.onnx"),
        "--inputs",
        str(tmp_path / "x.npz"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert escape(name) in result.stderr
    assert result.stderr.count("\n") == 1
    assert has_only_what_shows(result.stderr)


@pytest.mark.parametrize("name", ["[/x]", "[conv]"])
def test_weights_whose_names_are_markup_are_converted_and_shown(tmp_path, name):
    code = (
        "import torch\nINPUT_SHAPE = (40,)\n"
        "def net():\n"
        "    network = torch.nn.Sequential()\n"
        f"    network.add_module({name!r}, torch.nn.Linear(40, 30))\n"
        "    return network\n"
    )
    (tmp_path / "net.py").write_text(code)
    network = torch.nn.Sequential()
    network.add_module(name, torch.nn.Linear(40, 30))
    torch.save(network.state_dict(), tmp_path / "float.pt")
    command = [
        "convert",
        f"{tmp_path}/float.pt",
        f"{tmp_path}/out.onnx",
        "--model",
        f"{tmp_path}/net.py:net",
        "--bits",
        "4",
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"{name}.weight" in result.stdout.replace("\n", "")


def test_a_name_of_a_million_characters_is_cut_short_and_counted():
    assert escape("w" * 1_000_000) == "w" * 1000 + "… (999000 more characters)"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("café 日本 😀 γ", "café 日本 😀 γ"),
        ("tab\there", "tab\\there"),
        ("\x1b[0m", "\\x1b[0m"),
        ("\u202e", "\\u202e"),
        ("\udcff", "\\udcff"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_only_what_does_not_show_is_escaped(text, shown):
    assert escape(text) == shown


@dataclass(frozen=True)
class Report:
    path: Path
    names: tuple[str, ...]
    counts: dict[str, int]
    values: np.ndarray
    inner: Report | None = None

    def render(self):
        table = Table(title=str(self.path))
        table.add_column(self.names[0])
        table.add_row(*self.names)
        return table if self.inner is None else Text(str(self.inner.path))


def test_a_report_is_escaped_to_its_depths_and_itself_stays_as_it_is():
    inner = Report(Path("a\x1b"), ("\n",), {"\x07": 1}, np.zeros(2))
    report = Report(Path("fine"), ("x",), {"y": 2}, np.ones(2), inner)
    shown = escape_report(report)
    assert (str(shown.inner.path), shown.inner.names, shown.inner.counts) == (
        "a\\x1b",
        ("\\n",),
        {"\\x07": 1},
    )
    assert shown.inner.values is inner.values
    assert str(inner.path) == "a\x1b"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "utf-8"])
def test_a_terminal_of_another_encoding_breaks_nothing(encoding, tmp_path, monkeypatch):
    file = shutil.copy(CHECKPOINT, tmp_path / "model_\U0001f600_é_[x].pt")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["ecqx-onnx", "inspect", str(file)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
        monkeypatch.setattr(
            sys, "argv", ["ecqx-onnx", "inspect", str(tmp_path / "none_\U0001f600.onnx")]
        )
        with pytest.raises(SystemExit) as refused:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (ended.value.code, refused.value.code) == (0, 2)
    said = []
    for stream in streams:
        stream.flush()
        said.append(stream.buffer.getvalue().decode(encoding))
    assert ("\U0001f600" in said[1]) == (encoding == "utf-8")
    assert ("\\U0001f600" in said[1]) == (encoding != "utf-8")
    assert "checkpoint" in said[0]


def test_a_path_that_is_not_utf8_is_shown_and_its_json_is_read_by_everyone(tmp_path):
    name = "caf\udce9.pt"
    try:
        shutil.copy(CHECKPOINT, tmp_path / name)
    except OSError:
        pytest.skip("this file system has only names in UTF-8")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "caf\\udce9.pt" in result.stdout.replace("\n", "")
    found = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / name), "--json"]).stdout)
    assert found["file"].endswith("caf\\udce9.pt")
    found["file"].encode("utf-8")


@pytest.mark.parametrize(
    "command", [("convert", CHECKPOINT, "{}"), ("inspect", "{}"), ("pack", "{}", "out.onnx")]
)
def test_an_onnx_file_whose_path_is_not_utf8_is_refused_before_work_is_done(tmp_path, command):
    path = tmp_path / "caf\udce9.onnx"
    result = CliRunner().invoke(app, [str(part).format(path) for part in command])
    assert result.exit_code == 2
    assert (
        "caf\\udce9.onnx' is not UTF-8, and ONNX's libraries open no other names" in result.stderr
    )


def test_json_has_no_values_that_other_parsers_refuse(capsys):
    class Odd:
        def to_json(self):
            values = [float("nan"), float("inf"), -0.0, 1e300, 2**70]
            return {
                "values": values,
                "\ud800": ("\udfff", {"deep": float("-inf")}),
                3: None,
                "fine": "é\x1b",
            }

    emit(Odd(), as_json=True, quiet=False)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {
        "values": [None, None, -0.0, 1e300, 2**70],
        "\\ud800": ["\\udfff", {"deep": None}],
        "3": None,
        "fine": "é\x1b",
    }
    assert make_strict_json(True) is True


def test_what_a_progress_bar_says_is_no_markup(monkeypatch):
    said = []
    monkeypatch.setattr(type(terminal_module.stderr), "is_terminal", property(lambda console: True))
    monkeypatch.setattr(
        Progress, "update", lambda bar, task, **fields: said.append(fields["description"])
    )
    with frame.show_progress(False) as show:
        show(1, 2, "[/x] \x1b[31m\n")
        show(1, 2)
    assert said == ["[/x] \\x1b[31m\\n", None]
