"""Writes the reference of the command line and of Python's public names from the program itself.

The pages are named in .gitignore: they are made anew whenever the documentation is built.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer.main

import ecqx_onnx
from ecqx_onnx.cli import app


def write_pages(folder: Path) -> None:
    """Write cli.md and python.md.

    Args:
        folder: it is made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("cli.md", describe_commands()), ("python.md", describe_names())):
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def describe_commands() -> str:
    """Describe every command with its arguments and options.

    Returns:
        A page of Markdown.
    """
    parts = ["# Command line", ""]
    parts += ["Generated from the program; `ecqx-onnx COMMAND --help` says the same.", ""]
    group = typer.main.get_command(app)
    for name, command in list_commands(group):
        parts += [f"## {name}", "", escape_markdown(inspect.cleandoc(command.help or "")), ""]
        parts += ["| argument or option | what it does | default |", "|---|---|---|"]
        for parameter in command.params:
            if getattr(parameter, "hidden", False) or parameter.name == "help":
                continue
            words = [*parameter.opts, *parameter.secondary_opts]
            if parameter.param_type_name == "argument":
                words = [parameter.metavar or str(parameter.name).upper()]
            flags = " ".join(f"`{word}`" for word in words)
            text = escape_markdown(getattr(parameter, "help", "") or "").replace("\n", " ")
            parts.append(f"| {flags} | {text} | {describe_default(parameter)} |")
        parts.append("")
    return "\n".join(parts)


def list_commands(group: Any, before: str = "") -> list[tuple[str, Any]]:
    """List commands and those of groups inside.

    Args:
        group: of click.
        before: name of the group.

    Returns:
        (name as it is typed behind `ecqx-onnx`, command) of each.
    """
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += list_commands(command, f"{name} ")
        else:
            found.append((f"{before}{name}", command))
    return found


def describe_default(parameter: Any) -> str:
    """Write the default as it would be typed.

    Args:
        parameter: of click.

    Returns:
        Markdown; "" where there is none.
    """
    if parameter.required:
        return "required"
    value = parameter.default
    is_plain = isinstance(value, str | int | float | Path) and not isinstance(value, bool)
    return f"`{value}`" if is_plain and str(value) else ""


def escape_markdown(text: str) -> str:
    """Keep what a help text says from being read as Markdown.

    Args:
        text: the help, perhaps with rich's markup.

    Returns:
        Markdown.
    """
    text = re.sub(r"\[/?(?:bold|dim|italic)?\]", "", text)
    return re.sub(r"([*_<>|\[\]#])", r"\\\1", text)


def describe_names() -> str:
    """Describe every public name of the package.

    Returns:
        A page of Markdown with autodoc directives.
    """
    parts = ["# Python", "", "Every public name of `ecqx_onnx`, from its docstring.", ""]
    for name in ecqx_onnx.__all__:
        value = getattr(ecqx_onnx, name)
        if isinstance(value, str):
            continue
        parts += [f"## {name}", "", "```{eval-rst}"]
        if inspect.isclass(value):
            parts += [f".. autoclass:: ecqx_onnx.{name}", "   :members:"]
        else:
            parts.append(f".. autofunction:: ecqx_onnx.{name}")
        parts += ["```", ""]
    return "\n".join(parts)
