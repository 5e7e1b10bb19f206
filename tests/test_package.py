"""The package: a base install without torch, a wheel that says what it is, other systems."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ecqx_onnx
from ecqx_onnx.errors import EXTRAS, MissingPackageError, explain_missing_package
from setup import make_long_description

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = ("torch", "torchvision", "zennit", "onnxscript")
LENET = ROOT / "models/lenet5_mnist_4bit.pt"

WITHOUT = """
    import sys

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {names!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

    sys.meta_path.insert(0, Missing())
    from ecqx_onnx.cli import main

    sys.argv = ["ecqx-onnx", *sys.argv[1:]]
    main()
"""


def run_without(names, *arguments, cwd):
    """The command line in an interpreter in which these packages cannot be imported."""
    code = textwrap.dedent(WITHOUT.format(names=names))
    path = os.pathsep.join([str(ROOT), str(ROOT / "converters")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def list_packages(requirements):
    return [re.split(r"[\s\[<>=;]", requirement)[0] for requirement in requirements]


def write_quantized_model(path):
    """One MatMul whose weight is dequantized from INT8 that is mostly zero."""
    generator = np.random.default_rng(0)
    levels = generator.integers(-7, 8, (64, 32)).astype(np.int8)
    levels[generator.random(levels.shape) < 0.7] = 0
    nodes = [
        helper.make_node("DequantizeLinear", ["levels", "step"], ["weight"]),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])]
    values = [
        numpy_helper.from_array(levels, "levels"),
        numpy_helper.from_array(np.float32(0.01), "step"),
    ]
    graph = helper.make_graph(nodes, "one_layer", inputs, outputs, values)
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)


# --- a base install without torch


def test_the_base_install_needs_no_torch_and_an_extra_brings_it():
    base = list_packages(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    assert not set(TORCH) & set(base)
    assert set(list_packages(extras["torch"])) == set(TORCH)
    for name in ("demo", "test", "lint"):
        assert set(extras[name]) & {"ecqx-onnx[torch]", "ecqx-onnx[demo]"}, name


def test_every_package_of_the_table_comes_with_the_extra_that_it_names():
    extras = PROJECT["optional-dependencies"]
    for package, extra in EXTRAS.items():
        name = {"sklearn": "scikit-learn"}.get(package, package)
        assert name in list_packages(extras[extra])


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", LENET, "out.onnx"],
        ["inspect", LENET],
        ["report", LENET],
        ["quantize", ROOT / "models/lenet5.py:lenet5", "--data", "x.npz", "--out", "out.pt"],
        ["demo"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_that_needs_torch_says_in_one_sentence_what_brings_it(arguments, tmp_path):
    done = run_without(TORCH, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert "needs torch" in lines[0]
    assert "pip install 'ecqx-onnx[torch]'" in lines[0]
    assert not (tmp_path / "out.onnx").exists()


def test_the_demo_without_scikit_learn_says_what_brings_it(tmp_path):
    done = run_without(("sklearn",), "demo", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs scikit-learn" in done.stderr
    assert "'ecqx-onnx[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_public_name_that_needs_torch_says_what_brings_it(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(ecqx_onnx, "import_module", fail)
    with pytest.raises(MissingPackageError, match=r"Quantizer needs torch.*ecqx-onnx\[torch\]"):
        _ = ecqx_onnx.Quantizer
    assert issubclass(MissingPackageError, ImportError)


def test_a_module_of_ours_that_is_missing_is_no_missing_extra():
    own = ModuleNotFoundError("No module named 'ecqx_onnx.nowhere'", name="ecqx_onnx.nowhere")
    assert explain_missing_package(own, "convert") is None
    broken = ImportError("cannot import name 'x' from 'torch'", name="torch")
    assert explain_missing_package(broken, "convert") is None


# --- what the wheel says of itself


def test_classifiers_name_what_was_tested_and_no_more():
    systems = [line for line in PROJECT["classifiers"] if line.startswith("Operating System")]
    pythons = [line for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert systems == ["Operating System :: POSIX :: Linux"]
    assert pythons == ["Programming Language :: Python :: 3.11"]


def test_the_version_is_one():
    assert PROJECT["version"] == ecqx_onnx.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == ecqx_onnx.__version__


def test_relative_links_of_the_readme_are_made_absolute():
    text = "[a](docs/a.md), ![p](docs/p.png), [b](https://b.org/), [`c`](#c)"
    absolute = make_long_description(text, "https://example.org/blob/main/")
    assert "[a](https://example.org/blob/main/docs/a.md)" in absolute
    assert "![p](https://example.org/blob/main/docs/p.png)" in absolute
    assert "[b](https://b.org/)" in absolute
    assert "[`c`](#c)" in absolute


def test_without_an_address_no_relative_link_is_left():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = make_long_description(readme, "")
    assert not re.search(r"\]\((?!https?://|#)", text)


# --- Python 3.12 to 3.14, macOS and Windows, by stubs: nothing of ours ran there


def test_a_system_without_a_process_library_or_malloc_trim_trims_nothing(monkeypatch):
    from ecqx_onnx.runtime import runner

    def refuse(name):  # Windows
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    for stub in (refuse, lambda name: object()):  # macOS has no malloc_trim
        monkeypatch.setattr(runner.ctypes, "CDLL", stub)
        runner.trim_heap()


def test_a_runner_is_stopped_where_there_are_no_process_groups(monkeypatch):
    from ecqx_onnx.validation.devices.supervision import stop

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.delattr(os, "killpg")
    stop(process)
    assert process.returncode == -signal.SIGKILL


def test_chromium_keeps_its_sandbox_where_there_is_no_root(monkeypatch):
    from ecqx_onnx.validation.devices import browser

    monkeypatch.delattr(os, "geteuid")
    assert not browser._is_root()


def test_files_are_written_whole_and_nothing_stays_where_open_files_cannot_be_removed(
    monkeypatch, tmp_path
):
    """Windows: no fcntl, no O_NOFOLLOW, and an open file keeps its name."""
    from ecqx_onnx_converters.graph import moves, outputs

    held = set()
    real_open, real_close, real_unlink = os.open, os.close, os.unlink

    def open_and_hold(path, *arguments, **options):
        number = real_open(path, *arguments, **options)
        if str(path).endswith("lock"):
            held.add(number)
        return number

    def close(number):
        held.discard(number)
        real_close(number)

    def unlink(path, *arguments, **options):
        if held and str(path).endswith("lock"):
            raise PermissionError(13, "The process cannot access the file", str(path))
        real_unlink(path, *arguments, **options)

    monkeypatch.setattr(outputs, "fcntl", None)
    monkeypatch.setattr(outputs, "NO_FOLLOW", 0)
    monkeypatch.setattr(moves, "NO_FOLLOW", 0)
    monkeypatch.setattr(moves.sys, "platform", "win32")
    monkeypatch.setattr(os, "open", open_and_hold)
    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "unlink", unlink)
    target = tmp_path / "out.onnx"
    with outputs.replace_on_success(target, force=False) as new:
        new.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_signals_that_a_system_lacks_are_passed_over(monkeypatch):
    from ecqx_onnx.cli import frame

    set_up = []
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_up.append(number))
    monkeypatch.setattr(frame, "app", lambda: None)
    monkeypatch.setattr(frame, "write_what_cannot_be_encoded_as_escapes", lambda: None)
    frame.main()
    assert set_up == [signal.SIGTERM]


def test_names_that_newer_pythons_took_away_are_not_used():
    """Of 3.12 to 3.14: modules and functions that are gone there."""
    gone = re.compile(
        r"\b(?:import (?:imp|distutils|asyncore|cgi|crypt|pipes|telnetlib|uu|xdrlib)\b"
        r"|pkgutil\.(?:find_loader|get_loader)|ast\.(?:Num|Str|NameConstant|Bytes)\b"
        r"|asyncio\.get_event_loop\(|datetime\.utcnow|locale\.getdefaultlocale"
        r"|onerror=)"
    )
    for base in (ROOT / "ecqx_onnx", ROOT / "converters"):
        for path in base.rglob("*.py"):
            assert not gone.search(path.read_text(encoding="utf-8")), path


# --- built, checked and installed


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    for package in ("build", "twine"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[release]'")
    folder = tmp_path_factory.mktemp("dist")
    # A copy, as setuptools writes beside what it builds.
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("git, which knows the files of the project, is not there")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if not (ROOT / name).is_file():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "dist"


@pytest.mark.slow
def test_sdist_and_wheel_pass_twine(built):
    files = sorted(map(str, built.iterdir()))
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_its_notice_and_no_tests(built):
    wheel = next(built.glob("*.whl"))
    with zipfile.ZipFile(wheel) as members:
        names = members.namelist()
        metadata = next(name for name in names if name.endswith("METADATA"))
        text = members.read(metadata).decode()
    assert any(name.endswith("licenses/NOTICE") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "setup"))]
    assert not re.search(r"\]\((?!https?://|#)", text)


@pytest.mark.slow
def test_a_clean_environment_without_torch_runs_the_wheel(built, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    wheel = next(built.glob("*.whl"))
    constraints = ROOT / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel]
    done = subprocess.run(install, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    listing = [python, "-m", "pip", "list", "--format", "freeze"]
    listed = subprocess.run(listing, capture_output=True, text=True, env=environment).stdout
    assert "ecqx-onnx" in listed
    assert not set(TORCH) & {line.partition("=")[0] for line in listed.splitlines()}
    write_quantized_model(tmp_path / "foreign.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(200, 64)))
    program = tmp_path / "venv/bin/ecqx-onnx"
    for arguments in (
        "--version",
        "targets",
        "doctor",
        "inspect foreign.onnx",
        "pack foreign.onnx packed.onnx",
        "inspect packed.onnx",
        "validate packed.onnx --against foreign.onnx",
        "validate packed.onnx",
        "unpack packed.onnx floats.onnx --float",
        "compress floats.onnx small.onnx --data x.npz --max-error 0.3",
    ):
        done = subprocess.run(
            [program, *arguments.split()],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr[-600:]}"
