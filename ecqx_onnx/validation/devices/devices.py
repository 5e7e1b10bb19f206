"""The devices by the names that users write: each can do a job, or one sentence says why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import RenderableType
from rich.text import Text

from ecqx_onnx.errors import FileError, InputError, OptionError
from ecqx_onnx.inputs.reading import turn_system_errors
from ecqx_onnx.rendering.fitted import Column, FittedTable
from ecqx_onnx.validation.devices import setup
from ecqx_onnx.validation.devices.browser import NAMES, RUNNERS, Browser
from ecqx_onnx.validation.devices.job import Job
from ecqx_onnx.validation.devices.supervision import Progress, supervise

KNOWN = "local, node, web, arm64, ssh://user@host[:port], folder:PATH"
# //user@host:port/path/of/its/python, all but the host optional; IPv6 in brackets; no host that ssh
# would take for an option
ADDRESS = re.compile(
    r"//(?P<host>(?:[^-@:/\[\]][^@:/\[\]]*@)?(?:[^-@:/\[\]][^@:/\[\]]*|\[[0-9a-fA-F:]+\]))(?::(?P<port>\d{1,5}))?(?P<python>/.*)?"
)


RESULT_FILE = re.compile(r"(\./)?(result\.json|outputs/\w[\w.-]*)")


class Device(Protocol):
    """Whatever can do a job.

    It leaves result.json and the output files in the job's folder, and nothing anywhere else.
    """

    @property
    def name(self) -> str:
        """As the user writes it."""

    def run(self, job: Job, *, time_limit: float, progress: Progress | None = None) -> Path | None:
        """Do a job.

        Args:
            job: What to do.
            time_limit: Seconds until the runner is stopped.
            progress: Called with (batches done, batches in all).

        Returns:
            Where the results lie, if not in the job's folder.

        Raises:
            InputError: The device is absent, or its runner dies or is not done in time.
        """


@dataclass(frozen=True)
class Command:
    """A runner that is a program of this machine; the job's folder is its last argument.

    Attributes:
        name: The device's.
        command: Program and arguments.
        environment: Variables besides those of this process.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, job: Job, *, time_limit: float, progress: Progress | None = None) -> None:
        """Do a job; see `Device.run`.

        Args:
            job: What to do.
            time_limit: Seconds until the runner is stopped.
            progress: Called with (batches done, batches in all).
        """
        command = (*self.command, str(job.folder))
        supervise(
            self.name,
            command,
            time_limit=time_limit,
            progress=progress,
            environment=self.environment,
        )


@dataclass(frozen=True)
class Ssh:
    """Another machine with numpy and onnxruntime for its Python.

    The job goes there, runs, and its results come back, all in one connection. Keys only: it never
    asks for a password.

    Attributes:
        host: As ssh takes it.
        options: More arguments for ssh (-p, -i).
        python: The Python to run there.
    """

    host: str
    options: tuple[str, ...] = ()
    python: str = "python3"

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"ssh://{self.host}"

    def run(self, job: Job, *, time_limit: float, progress: Progress | None = None) -> None:
        # The folder goes whatever happens: the trap runs when the runner dies, and `timeout` ends
        # one that outlives us.
        """Do a job; see `Device.run`.

        Args:
            job: What to do.
            time_limit: Seconds until the runner is stopped.
            progress: Called with (batches done, batches in all).

        Raises:
            InputError: The machine does not answer, or what came back is no archive of results.
        """
        script = (
            "set -e; d=$(mktemp -d); trap 'rm -rf \"$d\"' EXIT; trap 'exit 1' HUP INT TERM PIPE; "
            'tar xf - -C "$d"; '
            f'timeout {time_limit:.0f} {shlex.quote(self.python)} "$d/run.py" "$d" 1>&2'
            " || late=$?; "
            f'if [ "${{late:-0}}" = 124 ]; then '
            f'echo "it had not finished after {time_limit:.0f} s" >&2; fi; '
            'if [ -n "$late" ]; then exit "$late"; fi; tar cf - -C "$d" result.json outputs'
        )
        options = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *self.options)
        command = ["ssh", *options, self.host, f"sh -c {shlex.quote(script)}"]
        with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as received:
            with tarfile.open(fileobj=sent, mode="w") as archive:
                archive.add(job.folder, ".")
                archive.add(RUNNERS / "run.py", "run.py")
            sent.seek(0)
            supervise(
                self.name,
                command,
                time_limit=time_limit + 30,
                progress=progress,
                stdin=sent,
                stdout=received,
            )
            received.seek(0)
            try:
                _unpack_results(received, job.folder)
            except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
                raise InputError(
                    f"{self.name}: what came back is no archive of results ({error})"
                ) from None


def _unpack_results(received: IO[bytes], folder: Path) -> None:
    """Only result.json and files of outputs/, none of which claims more than came back."""
    room = received.seek(0, os.SEEK_END)
    received.seek(0)
    with tarfile.open(fileobj=received, mode="r:") as archive:  # nothing that is compressed
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg() or member.issparse() or not RESULT_FILE.fullmatch(member.name):
                raise ValueError(f"it holds '{member.name}'")
            room -= member.size
            if room < 0:
                raise ValueError(f"'{member.name}' claims more bytes than came")
            archive.extract(member, folder, filter="data")


@dataclass(frozen=True)
class Folder:
    """A folder that is carried to the device and back.

    The first call leaves the job in it, the next one reads the results.
    """

    path: Path

    @property
    def name(self) -> str:
        """As the user writes it."""
        return f"folder:{self.path}"

    def run(self, job: Job, *, time_limit: float, progress: Progress | None = None) -> Path | None:
        """Read the results, or leave the job where there are none.

        Args:
            job: What to do.
            time_limit: Not used: a person does it.
            progress: Not used.

        Returns:
            The folder with the results.

        Raises:
            InputError: There are no results yet; the job was written.
            OptionError: The folder holds other things.
        """
        if os.path.lexists(self.path / "result.json"):
            return self.path  # read where they are: copies of endless files would fill the disk
        with turn_system_errors():
            if (
                self.path.exists()
                and any(self.path.iterdir())
                and not (self.path / "job.json").is_file()
            ):
                raise OptionError(f"{self.path}: holds other things than a job; name a new folder")
            _refuse_link(self.path / "run.py")
            _copy_job(job.folder, self.path)
            shutil.copyfile(RUNNERS / "run.py", self.path / "run.py")
        raise InputError(
            f"{self.name}: holds no result.json yet, so the job was written there; do it on the "
            "device "
            "(`python3 run.py .` in that folder, or a runner of your own), bring the folder "
            "back, and repeat this command"
        )


def _copy_job(source: Path, folder: Path) -> None:
    """FileError for a link in the way: what is written stays in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        _refuse_link(target)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            shutil.copyfile(path, target)


def _refuse_link(target: Path) -> None:
    if target.is_symlink():
        raise FileError(
            f"'{target}' is a link, and a job is written into files of its own; name a new folder"
        )


def find_device(name: str) -> Device:
    """Find a device by its name.

    Args:
        name: One of those in KNOWN.

    Returns:
        The device.

    Raises:
        OptionError: The name is none.
        InputError: This machine does not have the device; the sentence says what to install.
    """
    kind, _, rest = name.partition(":")
    match kind:
        case "local" if name == kind:
            return Command("local", (sys.executable, str(RUNNERS / "run.py")))
        case "node" if name == kind:
            node = _find_program("node", ("node",), "install Node.js 18 or newer")
            return Command(
                "node", (node, str(RUNNERS / "run.mjs"), str(setup.find_web_runtime("node")))
            )
        case "web" if name == kind:
            chromium = _find_program(
                "web", NAMES, "install Chromium (Debian: apt-get install chromium)"
            )
            return Browser("web", chromium, setup.find_web_runtime("web"))
        case "arm64" if name == kind:
            command, environment = setup.find_arm64_command()
            return Command("arm64", (*command, str(RUNNERS / "run.py")), environment)
        case "ssh" if address := ADDRESS.fullmatch(rest):
            _find_program("ssh", ("ssh",), "install an OpenSSH client")
            # ssh takes IPv6 without the brackets of URLs.
            host = address["host"].replace("[", "").replace("]", "")
            python = address["python"] if (address["python"] or "/") != "/" else "python3"
            return Ssh(host, ("-p", address["port"]) if address["port"] else (), python=python)
        case "folder" if rest:
            return Folder(Path(rest))
    raise OptionError(f"there is no device '{name}'; choose one of {KNOWN}")


@dataclass(frozen=True)
class Readiness:
    """Whether this machine has a device.

    Attributes:
        name: The device's.
        runs: What it runs.
        advice: What is missing, or "".
    """

    name: str
    runs: str
    advice: str

    @property
    def ready(self) -> bool:
        """Whether nothing is missing."""
        return not self.advice


@dataclass(frozen=True)
class DeviceList:
    """Every kind of device, and whether it can be used here."""

    devices: tuple[Readiness, ...]

    def render(self) -> RenderableType:
        """Draw the list for a terminal.

        Returns:
            A table with a row for each device.
        """
        columns = (Column("device"), Column("runs", "prose"), Column("here", "prose"))
        rows = []
        for device in self.devices:
            here = Text("ready", style="green")
            if not device.ready:
                here = Text(device.advice, style="yellow")
            rows.append((device.name, device.runs, here))
        return FittedTable(columns, rows)

    def to_json(self) -> list[dict[str, Any]]:
        """Describe the list in JSON values.

        Returns:
            device, runs, ready and advice of each.
        """
        return [
            {"device": d.name, "runs": d.runs, "ready": d.ready, "advice": d.advice}
            for d in self.devices
        ]


def check_readiness() -> DeviceList:
    """Ask every kind of device what it needs before it can be used here.

    Returns:
        The list.
    """
    runs = {
        "local": "onnxruntime of this Python, in a process of its own",
        "node": f"onnxruntime-web {setup.WEB_VERSION} in Node.js",
        "web": f"onnxruntime-web {setup.WEB_VERSION} in headless Chromium",
        "arm64": f"onnxruntime {setup.ARM64_ONNXRUNTIME} for aarch64, emulated",
        "ssh://user@host": "onnxruntime of the python3 there",
        "folder:PATH": "whatever does the job in the folder",
    }
    return DeviceList(
        tuple(Readiness(name, what, _find_advice(name)) for name, what in runs.items())
    )


def _find_advice(name: str) -> str:
    try:
        find_device(name)
    except InputError as error:
        return str(error).removeprefix(f"{name}: ")
    return ""


def _find_program(device: str, names: tuple[str, ...], advice: str) -> str:
    for name in names:
        if found := shutil.which(name):
            return found
    raise InputError(f"{device}: there is no {names[0]} on this machine; {advice}")
