"""A file runs on other devices and is judged as at home; devices that fail, lie or hang end in one
sentence and leave nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from ecqx_onnx.errors import FileError, InputError, ModelError, OptionError
from ecqx_onnx.inputs.onnx_file import read_onnx
from ecqx_onnx.validation import validate
from ecqx_onnx.validation.devices import DeviceTable, find_device, set_up, setup, validate_on
from ecqx_onnx.validation.devices.devices import Command, Folder, Ssh
from ecqx_onnx.validation.devices.job import Job, write_job
from tests.onnx_torch_pairs import make_pair
from tests.test_validation import some_data

RUNNER = Path(setup.__file__).parent / "runners" / "run.py"
LOCAL = Command("local", (sys.executable, str(RUNNER)))
BATCH = 32


@pytest.fixture(scope="session")
def honest_results(tmp_path_factory) -> Path:
    """What the local runner leaves for `judged`'s job: result.json and outputs."""
    folder = tmp_path_factory.mktemp("honest")

    class Keeping:
        name = "local"

        def run(self, job: Job, **options) -> None:
            LOCAL.run(job, **options)
            shutil.copytree(job.folder, folder, dirs_exist_ok=True)

    judged(Keeping(), folder)
    return folder


@dataclass(frozen=True)
class Tampering:
    """A device that leaves the honest results, to which something was done."""

    honest: Path
    tamper: Callable[[Path], None]
    name: str = "tampered"

    def run(self, job: Job, **options) -> None:
        shutil.copyfile(self.honest / "result.json", job.folder / "result.json")
        shutil.copytree(self.honest / "outputs", job.folder / "outputs")
        self.tamper(job.folder)


def judged(device, folder, **options):
    pair = make_pair()
    data = some_data(pair)
    arguments = {
        "reference": pair.reference,
        "split": data,
        "batch_size": BATCH,
        "latency_runs": 3,
        "time_limit": 120,
    }
    return validate_on(device, pair.save(folder), **(arguments | options))


def edit_result(folder: Path, **changes) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def verdict(report, name):
    return next(check for check in report.checks if check.name == name)


# node is the same runner and runtime as web.
@pytest.mark.parametrize(
    "name", ["local", pytest.param("node", marks=pytest.mark.slow), "web", "arm64"]
)
def test_every_device_gives_pytorchs_classes_and_the_report_of_home(name, tmp_path):
    try:
        device = find_device(name)
    except InputError as error:
        pytest.skip(str(error))
    report = judged(device, tmp_path)
    assert report.ok, report.failures
    assert report.device == name
    assert report.samples == 100
    assert report.agreement.share == 1.0
    assert report.onnx_accuracy.share == 0.9
    assert report.operators["Gemm"] + report.operators["FusedGemm"] == 2
    assert report.load_seconds > 0
    assert report.latency.ratio > 0
    assert (report.peak_memory is None) == (name == "arm64")
    pair = make_pair()
    home = validate(
        pair.save(tmp_path), reference=pair.reference, split=some_data(pair), latency_runs=0
    )
    assert {check.name for check in report.checks} == {check.name for check in home.checks}


def test_each_batch_is_counted_and_the_last_may_be_smaller(tmp_path):
    seen = []
    judged(
        "local", tmp_path, progress=lambda done, total: seen.append((done, total)), latency_runs=0
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_without_data_synthetic_inputs_travel(tmp_path):
    report = judged("local", tmp_path, split=None)
    assert report.ok
    assert report.samples == 4


def test_a_wrong_output_of_the_device_is_a_failed_check(honest_results, tmp_path):
    def shift(folder):
        result = json.loads((folder / "result.json").read_text())
        entry = result["batches"][1][0]
        values = np.fromfile(folder / entry["file"], np.float32)
        values[3] += 0.01
        entry["sha256"] = write(folder / entry["file"], values)
        edit_result(folder, batches=result["batches"])

    report = judged(Tampering(honest_results, shift), tmp_path)
    assert [check.name for check in report.failures] == ["outputs"]


def test_a_device_whose_optimisations_change_the_result_fails(honest_results, tmp_path):
    def shift(folder):
        plain = json.loads((folder / "result.json").read_text())["plain"]
        values = np.fromfile(folder / plain[0]["file"], np.float32)
        values[0] += 0.01
        plain[0]["sha256"] = write(folder / plain[0]["file"], values)
        edit_result(folder, plain=plain)

    assert (
        verdict(judged(Tampering(honest_results, shift), tmp_path), "optimisation").passed is False
    )


def test_a_device_that_rounds_activations_fails(honest_results, tmp_path):
    report = judged(
        Tampering(honest_results, lambda folder: edit_result(folder, operators={"MatMulNBits": 1})),
        tmp_path,
    )
    assert "SILENTLY" in verdict(report, "operators").sentence


def write(path: Path, values: np.ndarray) -> str:
    from ecqx_onnx.validation.devices.job import compute_sha256

    path.write_bytes(values.tobytes())
    return compute_sha256(path)


def first_output(**changes):
    def change(folder):
        batches = json.loads((folder / "result.json").read_text())["batches"]
        batches[0][0] |= changes
        edit_result(folder, batches=batches)

    return change


@pytest.mark.parametrize(
    ("tamper", "sentence"),
    [
        (lambda folder: edit_result(folder, model_sha256="0" * 64), "another model"),
        (lambda folder: edit_result(folder, job="0" * 64), "another job"),
        (lambda folder: edit_result(folder, version=99), "format version 1"),
        (lambda folder: edit_result(folder, batches=[]), "0 batches of 4"),
        (lambda folder: edit_result(folder, batches=7), "damaged"),
        (lambda folder: edit_result(folder, latency={"seconds": "fast"}), "damaged"),
        (lambda folder: edit_result(folder, operators=["Conv"]), "damaged"),
        (lambda folder: (folder / "result.json").write_text("{"), "no result of a runner"),
        (lambda folder: (folder / "result.json").write_text("[]"), "format version"),
        (lambda folder: (folder / "result.json").unlink(), "left no result.json"),
        (lambda folder: (folder / "outputs" / "00000.0.bin").unlink(), "cannot be read"),
        (lambda folder: (folder / "outputs" / "00000.0.bin").write_bytes(b"short"), "cut short"),
        (first_output(file="../../../etc/passwd"), "outside"),
        (first_output(file="/etc/passwd"), "outside"),
        (first_output(shape=[1, 2]), "which is not"),
        (first_output(shape=[BATCH * 5]), "the graph declares"),
        (first_output(shape=[-BATCH, -5]), "which is not"),
        (first_output(shape=[2**40, 2**40]), "which is not"),
        (first_output(shape="many"), "not described"),
        (
            lambda folder: (folder / "result.json").write_bytes(b" " * (2**26 + 1)),
            "more than a runner writes",
        ),
        (first_output(dtype="int32"), "the graph declares"),
        (first_output(dtype="object"), "which is not"),
        (first_output(dtype="nonsense"), "not described"),
    ],
)
def test_results_that_lie_are_refused_in_one_sentence(honest_results, tamper, sentence, tmp_path):
    with pytest.raises(FileError, match=sentence) as error:
        judged(Tampering(honest_results, tamper), tmp_path)
    assert "\n" not in str(error.value)


def test_an_operator_that_the_device_does_not_have_is_named(honest_results, tmp_path):
    refusal = {
        "stage": "load",
        "message": "Could not find an implementation for Cast(21) node with name ''",
    }
    with pytest.raises(ModelError, match=r"does not load the model: .*Cast\(21\)"):
        judged(
            Tampering(honest_results, lambda folder: edit_result(folder, error=refusal)), tmp_path
        )


def test_the_runners_report_an_operator_that_is_missing(tmp_path):
    pair = make_pair()
    path = pair.save(tmp_path)
    file = read_onnx(path)
    for device in ("local", "node"):
        try:
            found = find_device(device)
        except InputError:
            continue
        folder = tmp_path / device
        folder.mkdir()
        x = {pair.model.graph.input[0].name: np.zeros((2, 8), np.float32)}
        job = write_job(file, folder, [x], x, latency_runs=0)
        broken = read_onnx(path).proto
        broken.graph.node.append(
            helper.make_node("NoSuch", [broken.graph.output[0].name], ["unused"], domain="nowhere")
        )
        broken.opset_import.append(helper.make_opsetid("nowhere", 1))
        (folder / "model.onnx").write_bytes(broken.SerializeToString())
        found.run(job, time_limit=60)
        error = json.loads((folder / "result.json").read_text())["error"]
        assert error["stage"] == "load"
        assert "NoSuch" in error["message"]


def test_a_runner_that_dies_is_quoted(tmp_path):
    dying = Command("dying", (sys.executable, "-c", "raise SystemExit('no onnxruntime here')"))
    with pytest.raises(
        InputError, match=r"dying: the runner died \(exit status 1\): no onnxruntime here"
    ):
        judged(dying, tmp_path)


def test_a_runner_that_hangs_is_stopped_with_its_children(tmp_path):
    mark = tmp_path / "child"
    child = f"echo $$ > {mark}; sleep 60"
    hanging = Command(
        "hanging",
        (sys.executable, "-c", f"import subprocess; subprocess.run(['sh', '-c', {child!r}])"),
    )
    start = time.monotonic()
    with pytest.raises(InputError, match="had not finished after 2 s"):
        judged(hanging, tmp_path, time_limit=2)
    assert time.monotonic() - start < 20
    with pytest.raises(ProcessLookupError):
        alive(int(mark.read_text()))


def alive(pid: int) -> None:
    """ProcessLookupError once it is gone; a zombie that init has yet to reap counts as gone."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists() or "State:\tZ" in status.read_text():
        raise ProcessLookupError
    os.kill(pid, 0)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    judged("local", tmp_path)
    with pytest.raises(InputError):
        judged(Command("dying", ("false",)), tmp_path)
    with pytest.raises(InputError, match="cannot be started"):
        judged(Command("absent", ("/no/such/program",)), tmp_path)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "lokal",
        "local:x",
        "ssh:host",
        "ssh://",
        "ssh://-oProxyCommand=id",
        "ssh://h:x",
        "folder:",
        "",
        "web:8080",
    ],
)
def test_a_name_that_is_no_device_is_refused_with_those_that_are(name):
    with pytest.raises(OptionError, match="choose one of local, node, web"):
        find_device(name)


@pytest.mark.parametrize("name", ["web", "node", "arm64"])
def test_a_device_that_is_not_set_up_says_how(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    with pytest.raises(InputError, match=f"{name}: .* `ecqx-onnx device setup"):
        find_device(name)


def test_a_missing_browser_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(InputError, match="apt-get install chromium"):
        find_device("web")


def test_a_setup_that_fails_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="setup needs 'npm'"):
        set_up("web")
    assert not list((tmp_path / "ecqx-onnx").iterdir())
    with pytest.raises(OptionError, match="web, node, webgpu, arm64"):
        set_up("toaster")


def test_a_runtime_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\necho evil > onnxruntime-web-{setup.WEB_VERSION}.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match="another checksum"):
        set_up("web")
    assert not list((tmp_path / "cache" / "ecqx-onnx").iterdir())


def test_a_folder_is_carried_to_the_device_and_back(tmp_path):
    device = Folder(tmp_path / "phone")
    with pytest.raises(InputError, match=r"python3 run\.py \."):
        judged(device, tmp_path)
    subprocess.run(
        [sys.executable, "run.py", "."],
        cwd=tmp_path / "phone",
        check=True,
        capture_output=True,
        timeout=60,
    )
    report = judged(device, tmp_path)
    assert report.ok
    assert report.agreement.share == 1.0
    with pytest.raises(FileError, match="another job"):  # the same model on other data
        judged(device, tmp_path, batch_size=16)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(OptionError, match="other things than a job"):
        judged(Folder(other), tmp_path)


def test_several_devices_stand_side_by_side(honest_results, tmp_path):
    good = judged("local", tmp_path)
    bad = judged(
        Tampering(honest_results, lambda folder: edit_result(folder, operators={"MatMulNBits": 1})),
        tmp_path,
    )
    table = DeviceTable((good, bad))
    assert not table.ok
    assert [check.name for check in table.failures] == ["operators"]
    assert [entry["device"] for entry in table.to_json()] == ["local", "tampered"]
    json.dumps(table.to_json(), allow_nan=False)

    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the test
    console.print(table.render())
    text = console.export_text()
    console.file.close()
    assert "tampered: operators" in text
    assert "100.00 % of 100" in text


def test_a_device_without_a_result_stands_in_the_table_and_makes_it_red(honest_results, tmp_path):
    from ecqx_onnx.validation.devices import Trouble

    good = judged(Tampering(honest_results, lambda folder: None), tmp_path)
    table = DeviceTable((good,), (Trouble("web", "web: the page died"),))
    assert good.ok
    assert not table.ok
    assert table.to_json()[1] == {"device": "web", "ok": False, "error": "web: the page died"}


@pytest.mark.parametrize(
    ("name", "host", "port", "python"),
    [
        ("ssh://me@board", "me@board", (), "python3"),
        ("ssh://Board/", "Board", (), "python3"),
        ("ssh://me@board:2222", "me@board", ("-p", "2222"), "python3"),
        (
            "ssh://me@[::1]:2222/opt/venv/bin/python",
            "me@::1",
            ("-p", "2222"),
            "/opt/venv/bin/python",
        ),
        ("ssh://[fe80::1]", "fe80::1", (), "python3"),
    ],
)
def test_an_address_is_a_host_a_port_and_a_python(name, host, port, python, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    device = find_device(name)
    assert (device.host, device.options, device.python) == (host, port, python)


@pytest.fixture
def loopback(tmp_path):
    """An sshd of our own on loopback, as the current user, with its temporary files under
    tmp_path/remote."""
    server = shutil.which("sshd") or next(
        (p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None
    )
    if server is None or shutil.which("ssh") is None:
        pytest.skip("there is no OpenSSH server on this machine")
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key)], check=True
        )
    (home / "authorized").write_bytes((home / "user.pub").read_bytes())
    (tmp_path / "remote").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile "
        f"{home}/authorized\nStrictModes no\n"
        "UsePAM no\nPidFile none\nPermitRootLogin prohibit-password\nSetEnv "
        f"TMPDIR={tmp_path}/remote\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when root starts it
    process = subprocess.Popen([server, "-D", "-E", str(home / "log"), "-f", str(home / "config")])
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            pytest.skip(f"sshd does not start here: {(home / 'log').read_text().strip()[-200:]}")
        user = subprocess.run(
            ["id", "-un"], capture_output=True, text=True, check=True
        ).stdout.strip()
        known = (
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            f"UserKnownHostsFile={home}/known",
            "-o",
            "LogLevel=ERROR",
        )
        yield Ssh(
            f"{user}@127.0.0.1",
            ("-p", str(port), "-i", str(home / "user"), *known),
            python=sys.executable,
        )
    finally:
        process.kill()
        process.wait()


def test_ssh_runs_there_brings_results_back_and_leaves_the_device_clean(loopback, tmp_path):
    report = judged(loopback, tmp_path)
    assert report.ok
    assert report.device.startswith("ssh://")
    assert report.agreement.share == 1.0
    assert not list((tmp_path / "remote").iterdir())


def test_ssh_to_a_machine_without_python_or_beyond_its_time_leaves_it_clean(loopback, tmp_path):
    with pytest.raises(InputError, match="died"):
        judged(Ssh(loopback.host, loopback.options, python="/no/python"), tmp_path)
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    with pytest.raises(InputError, match="had not finished after 1 s"):
        judged(Ssh(loopback.host, loopback.options, python=str(slow)), tmp_path, time_limit=1)
    assert not list((tmp_path / "remote").iterdir())


def test_a_host_that_cannot_be_reached_is_one_sentence(tmp_path):
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh on this machine")
    with pytest.raises(InputError, match=r"ssh://nobody@127\.0\.0\.1: the runner died"):
        judged(Ssh("nobody@127.0.0.1", ("-p", "1")), tmp_path)
