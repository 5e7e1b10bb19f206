"""AGENTS.md says what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from ecqx_onnx import errors
from ecqx_onnx.cli import app
from ecqx_onnx.cli.tables import to_json
from ecqx_onnx.cli.terminal import INTERRUPTED, UNFORESEEN
from tests import test_terminal_tables as reports

TEXT = (Path(__file__).parents[1] / "AGENTS.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands
KEYS = {}
for line in TEXT.splitlines():
    row = re.match(r"\| `(\w+)` \| (.+) \|$", line)
    if row:
        KEYS[row[1]] = re.findall(r"`(\w+)`", row[2].partition(";")[0])


def test_it_is_short():
    assert len(TEXT.split()) < 600


def test_every_command_and_option_that_it_names_is_there():
    block = re.search(r"```sh\n(.*?)```", TEXT, re.S)[1]
    lines = block.strip().splitlines()
    assert len(lines) == 5
    lines += [f"ecqx-onnx {line}" for line in re.findall(r"`((?:quantize|convert) [^`]+)`", TEXT)]
    for line in lines:
        command = COMMANDS[line.split()[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"--[\w-]+", line):
            assert option in known, line


def test_exit_statuses_are_those_of_the_program():
    statuses = set(map(int, re.findall(r"^\| (\d+) \|", TEXT, re.M)))
    assert statuses == {
        0,
        errors.CheckFailed.exit_status,
        errors.InputError.exit_status,
        UNFORESEEN,
        INTERRUPTED,
    }


@pytest.mark.parametrize("name", [name for name in KEYS if name != "doctor"])
def test_the_keys_of_the_json_are_there(name):
    document = to_json(reports.REPORTS[name]())
    assert set(KEYS[name]) <= set(document)


def test_the_keys_of_the_doctor_are_there():
    document = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert set(KEYS["doctor"]) <= set(document)


def test_a_check_has_the_fields_that_it_names():
    check = to_json(reports.make_validation())["checks"][0]
    named = re.search(r"A check is `\{([^}]+)\}`", TEXT)[1]
    assert [word.strip() for word in named.split(",")] == list(check)


def test_public_verbs_of_python_are_there():
    import ecqx_onnx

    line = next(line for line in TEXT.splitlines() if line.startswith("- Python:"))
    for name in re.findall(r"`(?:ecqx_onnx\.)?(\w+)`", line):
        assert callable(getattr(ecqx_onnx, name))
