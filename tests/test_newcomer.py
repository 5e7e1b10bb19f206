"""From a clone to a served page of a torchvision model in five commands, as a newcomer types them;
and the server that stands at their end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecqx_onnx.cli import app
from ecqx_onnx.deployment.serving import open_server
from ecqx_onnx.errors import FileError, InputError, OptionError
from ecqx_onnx.validation.devices import set_up
from tests.chromium import find_chromium, open_browser

ROOT = Path(__file__).parents[1]
# 1 and 2 are what README says; here the environment that runs the tests stands in for step 2, which
# fetches torch. Step 3 without --untrained downloads the trained weights.
COMMANDS = (
    "git clone {url} ecqx-onnx",
    "make .venv/torch",
    "{python} models/mobilenet_v3.py mobilenet_v3.pth --untrained",
    "{ecqx} convert mobilenet_v3.pth mobilenet_v3.onnx --model models/mobilenet_v3.py:untrained"
    " --bits 8",
    "{ecqx} deploy mobilenet_v3.onnx --to web mobilenet_v3_web --title MobileNetV3 --serve",
)
ADDRESS = re.compile(r"open (http://localhost:\d+/) in a browser")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "index.html").write_text("<title>here</title>")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "x.wasm").write_bytes(b"\0asm")
    return tmp_path


@contextlib.contextmanager
def running(*words, cwd=None, environment=None):
    """Yields (process, address) of a command that serves."""
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            found = ADDRESS.search(line)
            if found:
                break
        else:
            raise AssertionError("".join(said))
        yield process, found[1]
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_a_folder_is_served_with_the_types_that_browsers_want_until_ctrl_c(folder):
    command = [sys.executable, "-m", "ecqx_onnx", "serve", str(folder), "--port", "0"]
    with running(*command) as (process, url):
        for name, kind in (("", "text/html"), ("app.js", "text/javascript")):
            with urllib.request.urlopen(url + name) as answer:
                assert answer.headers["Content-Type"] == kind
        with urllib.request.urlopen(url + "x.wasm") as answer:
            assert answer.headers["Content-Type"] == "application/wasm"
            assert answer.read() == b"\0asm"
        for name in ("no.js", "../secret", "%2e%2e/secret"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(url + name)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_what_cannot_be_served_is_told_in_one_sentence(folder, tmp_path):
    with pytest.raises(FileError, match="holds no page"):
        open_server(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="--port is 70000"):
        open_server(folder, port=70000)
    with open_server(folder, port=0) as server:
        assert server.server_address[0] == "127.0.0.1"  # other machines do not see it
        with pytest.raises(InputError, match="is taken; choose another with --port"):
            open_server(folder, port=server.server_address[1])


@pytest.mark.parametrize("more", [["--to", "linux"], ["--to", "web", "--json"]])
def test_serving_goes_with_pages_only_and_is_refused_before_the_work(tmp_path, more):
    arguments = ["deploy", str(tmp_path / "none.onnx"), str(tmp_path / "out"), *more, "--serve"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "--serve is for --to web" in " ".join(done.stderr.split())


@pytest.mark.slow  # a minute
def test_five_commands_lead_from_a_clone_to_a_page_of_a_torchvision_model(tmp_path):
    find_chromium()
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, or git is not installed")
    try:
        set_up("web")
    except InputError as error:
        pytest.skip(str(error))
    assert len(COMMANDS) <= 5
    clone = tmp_path / "ecqx-onnx"
    words = {"url": ROOT, "python": sys.executable, "ecqx": f"{sys.executable} -m ecqx_onnx"}
    environment = {"PYTHONPATH": f"{clone}{os.pathsep}{clone / 'converters'}"}
    seconds = []
    for number, command in enumerate(COMMANDS[:-1]):
        if "make" in command:
            continue
        began = time.monotonic()
        subprocess.run(
            command.format(**words).split(),
            cwd=clone if number else tmp_path,
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
        )
        seconds.append(time.monotonic() - began)
    began = time.monotonic()
    last = COMMANDS[-1].format(**words).split()
    with running(*last, cwd=clone, environment=environment) as (_, url), open_browser() as tab:
        tab.open(url)
        tab.wait_until_ready()
        seconds.append(time.monotonic() - began)
        assert tab.text("h1") == "MobileNetV3"
        assert "passed" in tab.text("#verdict")
        assert tab.errors == []
    print("seconds of each:", [round(each, 1) for each in seconds], "in all", round(sum(seconds)))
