"""The documentation builds strictly: dead links and undocumented public names are failures."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer.main

import ecqx_onnx
from ecqx_onnx.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATED = ("reference/cli", "reference/python")


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_entries():
    """Pages that the index names."""
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    entries = []
    for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.S):
        lines = [line.strip() for line in block.splitlines()]
        entries += [line for line in lines if line and not line.startswith(":")]
    return entries


def test_every_page_stands_in_the_index():
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
    pages |= {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.ipynb")}
    pages = {page for page in pages if not page.startswith("_build")} - {"index"}
    assert pages | set(GENERATED) == set(list_entries())


def test_the_reference_has_every_command_and_option(generate):
    text = generate.describe_commands()
    group = typer.main.get_command(app)
    for name, command in generate.list_commands(group):
        assert f"\n## {name}\n" in text
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and not getattr(parameter, "hidden", False):
                    assert option == "--help" or f"`{option}`" in section, (name, option)


def test_the_reference_has_every_public_name(generate):
    text = generate.describe_names()
    for name in ecqx_onnx.__all__:
        value = getattr(ecqx_onnx, name)
        if not isinstance(value, str):
            assert f"\n## {name}\n" in text
            assert inspect.getdoc(value), name


def test_notebooks_are_kept_without_outputs():
    notebooks = list((DOCS / "notebooks").glob("*.ipynb"))
    assert len(notebooks) == 2
    for path in notebooks:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), path
            assert cell.get("execution_count") is None, path


def build(docs, out, *options):
    for package in ("sphinx", "furo", "myst_nb"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", *options]
    return subprocess.run([*command, str(docs), str(out)], capture_output=True, text=True)


def copy_docs(folder):
    """The documentation beside the same files, so that pages can be changed."""
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("_build"))
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    return folder / "docs"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_notebooks_run(tmp_path):
    done = build(DOCS, tmp_path / "site", "-d", str(tmp_path / "doctrees"))
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    pages = [f"{entry}.html" for entry in GENERATED] + ["index.html", "search.html"]
    assert all((site / page).is_file() for page in pages)
    notebook = (site / "notebooks/compress.html").read_text(encoding="utf-8")
    assert "times smaller" in notebook  # the output of a cell
    assert "data-theme" in (site / "index.html").read_text(encoding="utf-8")  # light and dark


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[x](nowhere.md)", "nowhere"),
        ("[x](../nowhere.md)", "dead link to ../nowhere.md"),
        ("[x](#nowhere)", "nowhere"),
        ("{py:func}`ecqx_onnx.nowhere`", "reference target not found"),
    ],
)
def test_a_dead_link_fails_the_build(tmp_path, change, said):
    docs = copy_docs(tmp_path)
    with (docs / "start.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{change}\n")
    done = build(docs, tmp_path / "site", "-D", "nb_execution_mode=off")
    assert done.returncode != 0
    assert said in done.stderr


@pytest.mark.slow
def test_a_public_name_without_a_docstring_fails_the_build(tmp_path):
    docs = copy_docs(tmp_path)
    with (docs / "conf.py").open("a", encoding="utf-8") as page:
        page.write("\necqx_onnx.pack.__doc__ = None\necqx_onnx.pack.__wrapped__.__doc__ = None\n")
    done = build(docs, tmp_path / "site", "-D", "nb_execution_mode=off")
    assert done.returncode != 0
    assert "has no docstring" in done.stderr
