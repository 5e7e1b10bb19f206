"""Look up versions of packages and programs, and which devices are ready; nothing is imported.

Versions come from the packages' metadata, so that a look takes a second even where torch is there.
"""

from __future__ import annotations

import platform
import re
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from ecqx_onnx.rendering import Shown
from ecqx_onnx.rendering.fitted import Column, FactTable, FittedTable
from ecqx_onnx.validation.devices import check_readiness

BASE = "every command"
TORCH = "models of PyTorch: quantize, convert, report, deploy, validate against them"
# (distribution, oldest version as pyproject.toml has it, extra that brings it, what for)
PACKAGES = (
    ("onnx", "1.20", "", BASE),
    ("onnxruntime", "1.24", "", BASE),
    ("onnx-graphsurgeon", "0.6", "", BASE),
    ("numpy", "1.26", "", BASE),
    ("typer", "0.20", "", BASE),
    ("rich", "14", "", BASE),
    ("pillow", "10", "", "data sets of images"),
    ("torch", "2.13", "torch", TORCH),
    ("onnxscript", "0.7.2", "torch", TORCH),
    ("zennit", "0.5.1", "torch", "training with relevances"),
    ("torchvision", "0.28", "torch", "training with relevances"),
    ("scikit-learn", "1.5", "demo", "demo, --data sklearn:digits"),
)
# (program, others that do as well, Debian's package, what for)
PROGRAMS = (
    ("npm", (), "npm", "deploy --to web, device setup web: fetches onnxruntime-web once"),
    ("node", (), "nodejs", "validate --device node"),
    ("chromium", ("google-chrome", "chrome"), "chromium", "validate --device web"),
    ("g++", ("clang++",), "g++", "the C++ runner of deploy --to linux"),
    ("ssh", (), "openssh-client", "validate --device ssh://..."),
)
TESTED = "Linux x86-64 with Python 3.11"


@dataclass(frozen=True)
class Finding:
    """One package or program.

    Attributes:
        name: its name.
        version: that is installed; "" if it is missing or does not tell.
        asked: the oldest version that will do; "" for programs.
        ready: whether it can be used.
        needed_for: what for.
        command: that brings it; "" if it is ready.
    """

    name: str
    version: str
    asked: str
    ready: bool
    needed_for: str
    command: str

    def to_json(self) -> dict[str, Any]:
        """Write it as plain values.

        Returns:
            Its fields.
        """
        return {
            "name": self.name,
            "version": self.version or None,
            "oldest": self.asked or None,
            "ready": self.ready,
            "needed_for": self.needed_for,
            "command": self.command or None,
        }


@dataclass(frozen=True)
class Examination(Shown):
    """What `ecqx-onnx doctor` found.

    Attributes:
        facts: (what, value) of this program, Python and machine.
        packages: Python packages.
        programs: of the system.
        devices: (name, what is missing or "") of the kinds that `validate --device` knows.
    """

    facts: tuple[tuple[str, str], ...]
    packages: tuple[Finding, ...]
    programs: tuple[Finding, ...]
    devices: tuple[tuple[str, str], ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """Packages without which no command works."""
        found = []
        for package in self.packages:
            if package.needed_for == BASE and not package.ready:
                found.append(package)
        return tuple(found)

    @property
    def missing(self) -> tuple[Finding, ...]:
        """Whatever is missing, too old included."""
        return tuple(item for item in (*self.packages, *self.programs) if not item.ready)

    @property
    def ok(self) -> bool:
        """Whether the base install is whole."""
        return not self.broken

    def to_json(self) -> dict[str, Any]:
        """Write it as plain values.

        Returns:
            Facts, packages, programs, devices; the commands that bring what is missing.
        """
        return {
            "ok": self.ok,
            "facts": dict(self.facts),
            "packages": [item.to_json() for item in self.packages],
            "programs": [item.to_json() for item in self.programs],
            "devices": [
                {"device": name, "ready": not advice, "advice": advice or None}
                for name, advice in self.devices
            ],
            "commands": self._list_commands(),
        }

    def render(self) -> RenderableType:
        """Draw it.

        Returns:
            Facts, a table of packages, programs and devices, and the commands at the end.
        """
        columns = (
            Column(""),
            Column("what", "name"),
            Column("version"),
            Column("at least", drop=2),
            Column("for", "prose", drop=1),
        )
        rows = []
        for item in (*self.packages, *self.programs):
            mark = Text("ok", style="green") if item.ready else Text("missing", style="yellow")
            if item.version and not item.ready:
                mark = Text("old", style="red")
            rows.append((mark, item.name, item.version, item.asked, item.needed_for))
        for name, advice in self.devices:
            mark = Text("ready", style="green") if not advice else Text("not yet", style="yellow")
            rows.append((mark, f"device {name}", "", "", advice))
        lines: list[RenderableType] = [FactTable(self.facts), FittedTable(columns, rows)]
        commands = self._list_commands()
        if commands:
            lines.append(Text("What is missing comes with:"))
            lines += [Text(f"  {command}") for command in commands]
        else:
            lines.append(Text("Nothing is missing.", style="bold green"))
        return Group(*lines)

    def _list_commands(self) -> list[str]:
        commands = [item.command for item in self.missing]
        for _, advice in self.devices:
            commands += re.findall(r"`(ecqx-onnx [^`]+)`", advice)
        return list(dict.fromkeys(commands))


def examine() -> Examination:
    """Look at this machine.

    Returns:
        What is there and what is missing.
    """
    from ecqx_onnx import __version__

    python = platform.python_version()
    system = f"{platform.system()} {platform.machine()}"
    facts = [
        ("ecqx-onnx", __version__),
        ("Python", f"{python}, {sys.executable}"),
        ("system", system),
    ]
    is_tested = system in ("Linux x86_64", "Linux AMD64") and python.startswith("3.11.")
    if not is_tested:
        facts.append(("note", f"tested on {TESTED} only"))
    programs = []
    for name, others, package, purpose in PROGRAMS:
        found = any(map(shutil.which, (name, *others)))
        command = "" if found else f"apt-get install {package}"
        programs.append(Finding(name, "", "", found, purpose, command))
    devices = []
    for device in check_readiness().devices:
        if "://" not in device.name and ":" not in device.name:  # what the user has elsewhere
            devices.append((device.name, device.advice))
    return Examination(
        facts=tuple(facts),
        packages=tuple(_find_package(*package) for package in PACKAGES),
        programs=tuple(programs),
        devices=tuple(devices),
    )


def _find_package(name: str, oldest: str, extra: str, purpose: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = ""
    ready = bool(version) and compare_versions(version, oldest) >= 0
    what = f"'ecqx-onnx[{extra}]'" if extra else f"'{name}>={oldest}'"
    command = "" if ready else f"python -m pip install --upgrade {what}"
    return Finding(name, version, oldest, ready, purpose, command)


def compare_versions(one: str, other: str) -> int:
    """Compare the numbers of two versions; what follows them, such as "+cpu", does not count.

    Args:
        one: such as "2.13.0+cpu".
        other: such as "2.13".

    Returns:
        -1, 0 or 1, as `one` is older, of the same age or newer.
    """

    def read_numbers(text: str) -> list[int]:
        found = re.match(r"\d+(?:\.\d+)*", text)
        numbers = [int(part) for part in found[0].split(".")] if found else []
        while numbers and numbers[-1] == 0:
            numbers.pop()
        return numbers

    first, second = read_numbers(one), read_numbers(other)
    return (first > second) - (first < second)
