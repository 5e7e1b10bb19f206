"""`ecqx-onnx doctor` says what is there, what is missing and the command that brings it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.doctor import examination, examine

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def find(items, name):
    return next(item for item in items if item.name == name)


@pytest.fixture
def without(monkeypatch):
    """A function that makes distributions vanish."""
    real = metadata.version

    def hide(*names, versions=None):
        def look_up(name):
            if name in names:
                raise metadata.PackageNotFoundError(name)
            return (versions or {}).get(name) or real(name)

        monkeypatch.setattr(examination.metadata, "version", look_up)

    return hide


def test_oldest_versions_and_extras_are_those_of_the_package():
    listed = {}
    for extra, requirements in {
        "": PROJECT["dependencies"],
        "torch": PROJECT["optional-dependencies"]["torch"],
        "demo": PROJECT["optional-dependencies"]["demo"],
    }.items():
        for requirement in requirements:
            found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
            if found and found[1] != "matplotlib":  # of benchmarks/plot_results.py
                listed[found[1]] = (found[2], extra)
    assert {name: (oldest, extra) for name, oldest, extra, _ in examination.PACKAGES} == listed


def test_a_missing_extra_names_the_command_that_brings_it(without):
    without("torch", "zennit", "scikit-learn")
    found = examine()
    assert found.ok
    commands = found.to_json()["commands"]
    assert commands.count("python -m pip install --upgrade 'ecqx-onnx[torch]'") == 1
    assert "python -m pip install --upgrade 'ecqx-onnx[demo]'" in commands
    assert "missing" in str(found)


def test_a_package_that_is_too_old_is_told_as_such(without):
    without(versions={"onnxruntime": "1.9.0"})
    found = examine()
    assert not found.ok
    assert not find(found.packages, "onnxruntime").ready
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "missing or too old: onnxruntime" in result.stderr
    assert re.search(r"\bold\b", result.output)


@pytest.mark.parametrize(
    ("one", "other", "order"),
    [
        ("2.13.0+cpu", "2.13", 0),
        ("2.13.1", "2.13", 1),
        ("1.9", "1.24", -1),
        ("10", "9.9", 1),
        ("2.0rc1", "2.0", 0),
    ],
)
def test_versions_are_compared_by_their_numbers(one, other, order):
    assert examination.compare_versions(one, other) == order
    assert examination.compare_versions(other, one) == -order


def test_an_untested_system_is_named_as_such(monkeypatch):
    assert "note" not in dict(examine().facts) or sys.version_info[:2] != (3, 11)
    monkeypatch.setattr(examination.platform, "system", lambda: "Darwin")
    assert "tested on Linux" in dict(examine().facts)["note"]


def test_programs_that_are_missing_name_debians_package(monkeypatch):
    monkeypatch.setattr(examination.shutil, "which", lambda name: None)
    commands = examine().to_json()["commands"]
    assert "apt-get install chromium" in commands


def test_json_has_facts_packages_programs_devices_and_commands():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert set(found) == {"ok", "facts", "packages", "programs", "devices", "commands"}
    row = {"name", "version", "oldest", "ready", "needed_for", "command"}
    assert all(set(item) == row for item in found["packages"] + found["programs"])
    assert {device["device"] for device in found["devices"]} >= {"local", "web", "arm64"}


def test_the_doctor_imports_neither_torch_nor_onnxruntime():
    code = (
        "import sys; from ecqx_onnx.doctor import examine; examine();"
        " sys.exit(any(name in sys.modules for name in ('torch', 'zennit')))"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    environment = {**os.environ, "PYTHONPATH": path}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("command", [["targets"], ["device", "list"]])
def test_commands_that_look_up_do_not_import_torch(command):
    code = (
        "import sys; from ecqx_onnx.cli import app\n"
        f"try: app({command!r})\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0


def run_program(*arguments, **variables):
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    command = [sys.executable, "-c", "from ecqx_onnx.cli import main; main()", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_no_color_takes_the_colors_away():
    colored = run_program("doctor", FORCE_COLOR="1", NO_COLOR="")
    plain = run_program("doctor", FORCE_COLOR="1", NO_COLOR="1")
    color = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
    assert color.search(colored.stdout)
    assert not color.search(plain.stdout)


def test_the_shell_completes_commands():
    program = {"_PYTHON__C_COMPLETE": "complete_bash"}
    words = {"COMP_WORDS": "ecqx-onnx ins", "COMP_CWORD": "1"}
    code = (
        "import sys; sys.argv = ['ecqx-onnx']; from ecqx_onnx.cli import app;"
        " app(prog_name='ecqx-onnx')"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    environment = {**os.environ, "PYTHONPATH": path, **words, **program}
    environment["_ECQX_ONNX_COMPLETE"] = "complete_bash"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["inspect"]
