"""Fetch a device's runtime once, from npm, Debian and PyPI, into a cache. Needs no root.

The cache is $XDG_CACHE_HOME/ecqx-onnx (~/.cache/ecqx-onnx); deleting a folder in it undoes its
setup. The system is left as it is.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ecqx_onnx.errors import InputError, OptionError

WEB_VERSION = "1.30.0"
WEB_INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rK"
    "Y3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
WEB_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# onnxruntime-web's build for GPUs; which of its WebAssembly programs it loads, its module says.
WEBGPU_FILES = (
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
ARM64_ONNXRUNTIME = "1.32.0"
ARM64_NUMPY = "2.4.6"
# What Python and onnxruntime need of Debian; the rest of Python's dependencies apt finds itself.
ARM64_PACKAGES = ("python3", "libstdc++6")
# onnxruntime reads these before it is imported and crashes without them; the text is a
# Cortex-A72's.
CPUINFO = "".join(
    f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU "
    "implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n"
    for core in range(4)
)
PROGRAM_LIMIT = 900  # seconds for one download

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done now)."""


def _find_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecqx-onnx"


def set_up(device: str, *, progress: Progress | None = None) -> Path:
    """Fetch what a device needs, unless it is there.

    Args:
        device: "web", "node", "webgpu" (for folders of `deploy`) or "arm64".
        progress: Called with (steps done, steps in all, what is being done now).

    Returns:
        The folder it lies in.

    Raises:
        OptionError: The device needs no setup, or is none.
        InputError: Something could not be fetched.
    """
    makers: Mapping[str, tuple[Path, Callable[[Path, Progress], None]]] = {
        "web": (_find_web_folder(), _fetch_web),
        "node": (_find_web_folder(), _fetch_web),
        "webgpu": (_find_webgpu_folder(), _fetch_webgpu),
        "arm64": (_find_arm64_folder(), _fetch_arm64),
    }
    if device not in makers:
        raise OptionError(
            f"the device '{device}' needs no setup, or is none; `device setup` knows "
            f"{', '.join(makers)}"
        )
    folder, fetch = makers[device]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Under its final name only when complete: an interrupted setup leaves nothing that looks
        # like one.
        with tempfile.TemporaryDirectory(prefix="setup-", dir=folder.parent) as temporary:
            fetch(Path(temporary) / "new", progress or _show_nothing)
            (Path(temporary) / "new").rename(folder)
    return folder


def _show_nothing(done: int, total: int, doing: str) -> None:
    """Nobody wants to see it."""


def find_web_runtime(device: str) -> Path:
    """Find onnxruntime-web.

    Args:
        device: "web" or "node", for the message.

    Returns:
        Its folder.

    Raises:
        InputError: It was not set up.
    """
    return _require_folder(device, _find_web_folder())


def find_arm64_command() -> tuple[tuple[str, ...], Mapping[str, str]]:
    """Find the emulated Python.

    Returns:
        Its command and environment variables.

    Raises:
        InputError: It was not set up.
    """
    folder = _require_folder("arm64", _find_arm64_folder())
    root = folder / "root"
    python = root / "usr" / "bin" / "python3"
    command = (str(folder / "qemu-aarch64"), "-L", str(root), str(python.resolve()))
    environment = {
        "PYTHONPATH": str(folder / "site"),
        "PYTHONHOME": str(root / "usr"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "ECQX_ONNX_EMULATED": "1",
    }
    return command, environment


def _require_folder(device: str, folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"{device}: is not set up on this machine; run `ecqx-onnx device setup {device}` once"
        )
    return folder


def _find_web_folder() -> Path:
    return _find_cache() / f"onnxruntime-web-{WEB_VERSION}"


def _find_webgpu_folder() -> Path:
    return _find_cache() / f"onnxruntime-web-{WEB_VERSION}-webgpu"


def _find_arm64_folder() -> Path:
    return _find_cache() / f"arm64-onnxruntime-{ARM64_ONNXRUNTIME}"


def _fetch_web(folder: Path, progress: Progress) -> None:
    _fetch_from_npm(folder, progress, WEB_FILES)


def _fetch_webgpu(folder: Path, progress: Progress) -> None:
    _fetch_from_npm(folder, progress, WEBGPU_FILES)


def _fetch_from_npm(folder: Path, progress: Progress, files: Sequence[str]) -> None:
    work = folder.parent
    progress(0, 1, f"fetching onnxruntime-web {WEB_VERSION} from npm, 33 MB")
    _run_program("web", ["npm", "pack", "--silent", f"onnxruntime-web@{WEB_VERSION}"], work)
    archive = work / f"onnxruntime-web-{WEB_VERSION}.tgz"
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != WEB_INTEGRITY:
        raise InputError(
            f"web: npm gave an onnxruntime-web {WEB_VERSION} with another checksum "
            f"({found[:20]}…): refused"
        )
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for name in files:
            member = tar.extractfile(f"package/dist/{name}")
            assert member is not None
            with member, (folder / name).open("wb") as out:
                shutil.copyfileobj(member, out)


def _fetch_arm64(folder: Path, progress: Progress) -> None:
    """An arm64 Debian's Python unpacked under root/, the wheels under site/, and a static qemu
    beside them."""
    if sys.platform != "linux" or shutil.which("apt-get") is None:
        raise InputError(
            "arm64: is set up from Debian's packages, so it needs Debian or Ubuntu on Linux"
        )
    work, root = folder.parent, folder / "root"
    for place in (work / "debs", work / "wheels", root, folder / "site"):
        place.mkdir(parents=True)
    progress(0, 4, "fetching the emulator; all of arm64 takes 222 MB on disk")
    _run_program("arm64", ["apt-get", "download", "qemu-user-static"], work)
    (emulator,) = work.glob("qemu-user-static_*.deb")
    _run_program("arm64", ["dpkg-deb", "-x", str(emulator), "qemu"], work)
    shutil.copy2(work / "qemu" / "usr" / "bin" / "qemu-aarch64-static", folder / "qemu-aarch64")
    progress(1, 4, "fetching Python for arm64")
    _download_arm64_debs(work)
    progress(2, 4, "unpacking Python")
    for deb in sorted((work / "debs").glob("*.deb")):
        _run_program("arm64", ["dpkg-deb", "-x", str(deb), str(root)], work)
    wheels = [f"onnxruntime=={ARM64_ONNXRUNTIME}", f"numpy=={ARM64_NUMPY}"]
    version = next(
        path.name.removeprefix("python") for path in (root / "usr" / "bin").glob("python3.[0-9]*")
    )
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (27, 28)] + [
        "--platform=manylinux2014_aarch64"
    ]
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={version}",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *options,
        *platforms,
        "--target",
        str(folder / "site"),
        *wheels,
    ]
    progress(3, 4, f"fetching onnxruntime {ARM64_ONNXRUNTIME}")
    _run_program("arm64", command, work)
    for name, text in {"possible": "0-3\n", "present": "0-3\n"}.items():
        place = root / "sys" / "devices" / "system" / "cpu" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(CPUINFO)


def _download_arm64_debs(work: Path) -> None:
    """apt's own resolver, as on an empty arm64 machine, with all of its state in `work`."""
    state, archives = work / "apt", work / "debs"
    for place in (state / "lists" / "partial", archives / "partial"):
        place.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Dir::State": str(state),
        "Dir::State::status": str(state / "status"),
        "Dir::State::lists": str(state / "lists"),
        "Dir::Cache": str(state),
        "Dir::Cache::archives": str(archives),
        "Debug::NoLocking": "1",
    }
    options = []
    for key, value in settings.items():
        options += ["-o", f"{key}={value}"]
    _run_program("arm64", ["apt-get", *options, "--quiet=2", "update"], work)
    install = [
        "install",
        "--yes",
        "--quiet=2",
        "--download-only",
        "--no-install-recommends",
        *ARM64_PACKAGES,
    ]
    _run_program("arm64", ["apt-get", *options, *install], work)


def _run_program(device: str, command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=PROGRAM_LIMIT, check=False
        )
    except FileNotFoundError:
        raise InputError(
            f"{device}: setup needs '{command[0]}', which this machine does not have; install it "
            "first"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{device}: '{command[0]}' did not finish within {PROGRAM_LIMIT} s; is the network "
            "there?"
        ) from None
    if done.returncode:
        words = ["no reason given", *(done.stderr or done.stdout).strip().splitlines()]
        raise InputError(f"{device}: setup failed in '{' '.join(command[:3])}': {words[-1][:300]}")
