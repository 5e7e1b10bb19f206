"""The real command line on devices: what it prints, its exit status, and that every bad device
leaves the machine clean."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx import api
from ecqx_onnx.checkpoint import float_model
from ecqx_onnx.cli import app
from ecqx_onnx.validation.devices import setup
from tests.test_devices import loopback  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[1]
HANGING = (
    "import os, sys, time; open(os.environ['PID_FILE'], 'w').write(str(os.getpid())); "
    "time.sleep(60)"
)
REFUSING = """import json, sys, pathlib
folder = pathlib.Path(sys.argv[-1])
job = json.loads((folder / "job.json").read_text())
error = {"stage": "load", "message": "no kernel for Cast(21)"}
result = {"version": 1, "job": job["id"], "runtime": "old runtime", "error": error}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """model.pt, out.onnx converted from it, and data.npz whose labels are the model's own
    classes."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 3)
    )
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data = (parameter / 0.05).round() * 0.05
    api.save(net, folder / "model.pt", example=torch.zeros(2, 1, 8, 8))
    api.convert(folder / "model.pt", folder / "out.onnx")
    x = np.random.default_rng(0).standard_normal((40, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        y = net(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return folder


@pytest.fixture
def arguments(files, tmp_path, monkeypatch):
    """validate's arguments; temporary files go to tmp_path/tmp, which must be empty at the end; a
    cache of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    yield [
        "validate",
        files / "out.onnx",
        "--against",
        files / "model.pt",
        "--data",
        files / "data.npz",
    ]
    assert not list((tmp_path / "tmp").iterdir())


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (
        result.exit_code,
        result.output,
        result.stderr,
        result.exception,
    )
    return result


def sentence(result) -> str:
    """The one line that an error is."""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


def fake(tmp_path, monkeypatch, name: str, script: str) -> None:
    """A program of that name, in Python, first in PATH; with a runtime for it that looks set up."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\n{script}")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "ecqx-onnx" / f"onnxruntime-web-{setup.WEB_VERSION}").mkdir(parents=True)


def test_one_device_gives_its_report(arguments):
    report = json.loads(run(*arguments, "--device", "local", "--json").stdout)
    assert report["ok"]
    assert report["device"] == "local"
    assert report["agreement"]["share"] == report["onnx_accuracy"]["share"] == 1.0
    assert {"load_seconds", "latency_ratio", "peak_memory_bytes", "operators"} <= set(report)
    assert "Conv" in report["operators"] or "FusedConv" in report["operators"]


def test_integer_kernels_are_compared_with_the_float_model_and_judged_by_accuracy(files, tmp_path):
    from ecqx_onnx.inputs.onnx_file import read_onnx
    from ecqx_onnx.validation.judgement import choose_latency_baseline

    api.convert(
        files / "model.pt",
        tmp_path / "int8.onnx",
        activations="int8",
        calibration=str(files / "data.npz"),
    )
    arguments = [
        "validate",
        tmp_path / "int8.onnx",
        "--against",
        files / "model.pt",
        "--data",
        files / "data.npz",
    ]
    report = json.loads(run(*arguments, "--device", "local", "--json").stdout)
    assert any(name.startswith("QLinear") for name in report["operators"])
    assert report["latency_ratio"] > 0
    wanted = choose_latency_baseline(
        read_onnx(tmp_path / "int8.onnx"), None, lambda: b"the float model"
    )
    assert wanted == b"the float model"
    model = onnx.load_model_from_string(
        float_model.make_float_model(api.as_checkpoint(files / "model.pt"))
    )
    assert {node.op_type for node in model.graph.node} == {"Conv", "Relu", "Reshape", "Gemm"}


def test_several_devices_stand_in_one_table(arguments, tmp_path):
    phone = tmp_path / "phone"
    assert "python3 run.py ." in sentence(run(*arguments, "--device", f"folder:{phone}", code=2))
    subprocess.run(
        [sys.executable, "run.py", "."], cwd=phone, check=True, capture_output=True, timeout=60
    )
    both = [*arguments, "--device", "local", "--device", f"folder:{phone}"]
    assert [report["ok"] for report in json.loads(run(*both, "--json").stdout)] == [True, True]
    text = run(*both).stdout
    assert "local" in text
    assert "folder:" in text
    assert run(*both, "--quiet").stdout == ""


def test_a_wrong_output_of_one_device_exits_1_and_names_device_and_check(arguments, tmp_path):
    phone = tmp_path / "phone"
    run(*arguments, "--device", f"folder:{phone}", code=2)
    subprocess.run(
        [sys.executable, "run.py", "."], cwd=phone, check=True, capture_output=True, timeout=60
    )
    result = json.loads((phone / "result.json").read_text())
    values = np.fromfile(phone / "outputs" / "00000.0.bin", np.float32)
    values[0] += 1
    (phone / "outputs" / "00000.0.bin").write_bytes(values.tobytes())
    from ecqx_onnx.validation.devices.job import compute_sha256

    result["batches"][0][0]["sha256"] = compute_sha256(phone / "outputs" / "00000.0.bin")
    (phone / "result.json").write_text(json.dumps(result))
    failed = run(*arguments, "--device", "local", "--device", f"folder:{phone}", code=1)
    assert f"folder:{phone}: outputs: " in sentence(failed)


@pytest.mark.parametrize("device", ["web", "node", "arm64"])
def test_a_device_that_is_not_set_up_exits_2_and_says_how(arguments, device, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "node", "")
    fake_chromium = tmp_path / "bin" / "chromium"
    shutil.copy(tmp_path / "bin" / "node", fake_chromium)
    shutil.rmtree(tmp_path / "cache")
    assert f"`ecqx-onnx device setup {device}`" in sentence(
        run(*arguments, "--device", device, code=2)
    )


def test_an_absent_device_is_told_before_anything_runs(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = run(*arguments, "--device", "local", "--device", "arm64", code=2)
    assert "device setup arm64" in sentence(result)
    assert result.stdout == ""
    assert "choose one of local" in sentence(run(*arguments, "--device", "toaster", code=2))


def test_a_runner_that_dies_exits_2_and_is_quoted(arguments, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "node", "raise SystemExit('node: illegal instruction')")
    said = sentence(run(*arguments, "--device", "node", code=2))
    assert said.endswith("node: the runner died (exit status 1): node: illegal instruction")


@pytest.mark.parametrize(("device", "program"), [("node", "node"), ("web", "chromium")])
def test_a_runner_that_hangs_is_stopped_at_the_time_limit(
    arguments, device, program, tmp_path, monkeypatch
):
    fake(tmp_path, monkeypatch, program, HANGING)
    monkeypatch.setenv("PID_FILE", str(tmp_path / "pid"))
    start = time.monotonic()
    said = sentence(run(*arguments, "--device", device, "--time-limit", 1, code=2))
    assert "after 1 s" in said
    assert time.monotonic() - start < 30
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_browser_that_dies_exits_2(arguments, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "chromium", "raise SystemExit(7)")
    assert "died (exit status 7)" in sentence(run(*arguments, "--device", "web", code=2))


def test_a_result_of_another_model_exits_2(arguments, files, tmp_path):
    phone = tmp_path / "phone"
    run(*arguments, "--device", f"folder:{phone}", code=2)
    subprocess.run(
        [sys.executable, "run.py", "."], cwd=phone, check=True, capture_output=True, timeout=60
    )
    other = tmp_path / "other.onnx"
    api.convert(files / "model.pt", other, dequantize="standard")
    assert "another model (sha256" in sentence(
        run("validate", other, *arguments[2:], "--device", f"folder:{phone}", code=2)
    )


def test_an_operator_that_the_device_lacks_exits_2_and_is_named(arguments, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "node", REFUSING)
    said = sentence(run(*arguments, "--device", "node", code=2))
    assert said == "error: node: old runtime does not load the model: no kernel for Cast(21)"


def test_the_others_are_shown_where_one_fails_and_the_status_is_2(arguments, tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "node", "raise SystemExit('no memory')")
    result = run(*arguments, "--device", "node", "--device", "local", "--json", code=2)
    first, second = json.loads(result.stdout)
    assert (first["device"], first["ok"]) == ("local", True)
    assert (second["device"], second["ok"]) == ("node", False)
    assert "no memory" in sentence(result)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_stopped_command_takes_its_runner_with_it_and_leaves_nothing(
    files, number, tmp_path, monkeypatch
):
    fake(tmp_path, monkeypatch, "node", HANGING)
    (tmp_path / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "ecqx_onnx",
        "validate",
        files / "out.onnx",
        "--against",
        files / "model.pt",
    ]
    command += ["--device", "node"]
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'converters'}",
    }
    environment["PID_FILE"] = str(tmp_path / "pid")
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    finally:
        process.kill()
        process.wait()
    assert gone(int((tmp_path / "pid").read_text()))
    assert not list((tmp_path / "tmp").iterdir())


def test_a_time_limit_that_is_none_is_refused(arguments):
    run(*arguments, "--device", "local", "--time-limit", 0, code=2)


def test_the_list_tells_what_is_ready_and_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "shutil.which", lambda program: None if program == "node" else f"/usr/bin/{program}"
    )
    listed = {
        entry["device"]: entry for entry in json.loads(run("device", "list", "--json").stdout)
    }
    assert listed["local"]["ready"]
    assert "install Node.js" in listed["node"]["advice"]
    assert "ecqx-onnx device setup web" in listed["web"]["advice"]
    assert "ready" in run("device", "list").stdout
    assert run("device", "list", "--quiet").stdout == ""


def test_setup_fetches_once_checks_and_says_where(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "node", "")
    place = tmp_path / "cache" / "ecqx-onnx" / f"onnxruntime-web-{setup.WEB_VERSION}"
    assert json.loads(run("device", "setup", "node", "--json").stdout) == {
        "device": "node",
        "ready": True,
        "folder": str(place),
    }
    assert str(place) in run("device", "setup", "node").stdout
    assert "needs no setup" in sentence(run("device", "setup", "local", code=2))


def test_setup_that_fails_exits_2_with_one_sentence(tmp_path, monkeypatch):
    fake(tmp_path, monkeypatch, "npm", "raise SystemExit('npm error network')")
    shutil.rmtree(tmp_path / "cache")
    assert "npm error network" in sentence(run("device", "setup", "web", code=2))
    assert not list((tmp_path / "cache" / "ecqx-onnx").iterdir())


@pytest.mark.parametrize("command", ["setup", "list"])
def test_the_commands_of_devices_have_help_with_an_example(command):
    text = run("device", command, "--help").output
    for word in (f"ecqx-onnx device {command}", "Example", "--json", "--quiet"):
        assert word in text


def test_ssh_by_its_address_brings_the_report_back(arguments, loopback, tmp_path, monkeypatch):  # noqa: F811
    """Through a wrapper of ssh that knows the keys, as a user's ~/.ssh does; the Python there is
    named in the address."""
    real, options = shutil.which("ssh"), list(loopback.options[2:])
    fake(
        tmp_path,
        monkeypatch,
        "ssh",
        f"import os, sys; os.execv({real!r}, ['ssh', *{options!r}, *sys.argv[1:]])",
    )
    address = f"ssh://{loopback.host}:{loopback.options[1]}{sys.executable}"
    report = json.loads(run(*arguments, "--device", address, "--json").stdout)
    assert report["ok"]
    assert report["agreement"]["share"] == 1.0
    assert not list((tmp_path / "remote").iterdir())


def gone(pid: int) -> bool:
    """A zombie that init has yet to reap counts as gone."""
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()
