"""A headless Chromium that tests click, type into, photograph and listen to, through its pipe.

Chromium's own protocol, JSON between null bytes on two pipes, needs no package:
https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from ecqx_onnx.validation.devices.browser import FLAGS, NAMES
from ecqx_onnx.validation.devices.supervision import stop

DESKTOP = (1280, 900)
PHONE = (390, 844)
FAKE_MEDIA = (
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",  # grants what the page asks for
    "--autoplay-policy=no-user-gesture-required",
)


def find_chromium():
    """Its path; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("Chromium is not installed")
    return program


class Tab:
    """The only tab of a Chromium of its own."""

    def __init__(self, process, to_browser, from_browser):
        self.process, self.to_browser, self.from_browser = process, to_browser, from_browser
        self.buffer, self.number, self.session = b"", 0, None
        self.errors = []  # what the page printed as errors or threw
        self.targets = []
        (page,) = [t for t in self.wait_for_targets() if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def wait_for_targets(self):
        for _ in range(100):
            targets = self.call("Target.getTargets")["targetInfos"]
            if any(target["type"] == "page" for target in targets):
                return targets
            time.sleep(0.05)
        raise AssertionError("Chromium opened no tab")

    def call(self, method, *, limit=60, **parameters):
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + limit
        while True:
            answer = self.read(end, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.note(answer)

    def read(self, end, what):
        while b"\0" not in self.buffer:
            left = end - time.monotonic()
            assert left > 0, f"Chromium did not answer {what} in time"
            if select.select([self.from_browser], [], [], left)[0]:
                part = os.read(self.from_browser, 1 << 20)
                assert part, "Chromium died"
                self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            thrown = details.get("exception", {}).get("description")
            self.errors.append(thrown or details["text"])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def open(self, url):
        self.call("Page.navigate", url=url)

    def evaluate(self, expression, *, limit=60):
        """The value of an expression in the page; promises are waited for."""
        found = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
            limit=limit,
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression, limit=40):
        """Until an expression is true in the page."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):  # between two pages there is no context
                if self.evaluate(f"Boolean({expression})", limit=limit):
                    return
            time.sleep(0.05)
        seen = self.evaluate("document.body.innerText")
        raise AssertionError(f"not within {limit} s: {expression}; the page says: {seen[:1500]}")

    def wait_until_ready(self):
        self.wait("['ready', 'failed'].includes(document.documentElement.dataset.state)")
        state = self.evaluate("document.documentElement.dataset.state")
        assert state == "ready", self.text("body")

    def text(self, selector):
        """What a person sees of an element; '' where it is hidden."""
        quoted = json.dumps(selector)
        return self.evaluate(
            f"(e => e && e.checkVisibility() ? e.innerText : '')(document.querySelector({quoted}))"
        )

    def box(self, selector):
        """left, top, width, height in the window."""
        quoted = json.dumps(selector)
        return self.evaluate(
            f"(r => [r.left, r.top, r.width, r.height])"
            f"(document.querySelector({quoted}).getBoundingClientRect())"
        )

    def click(self, selector):
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def choose_file(self, selector, path):
        """As a person does in the dialog."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key, *, code=None, times=1, text=""):
        keys = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        number = keys.get(key, {" ": 32, "Delete": 46, "Enter": 13, "Escape": 27}.get(key, 0))
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=code or key,
                    windowsVirtualKeyCode=number,
                    text=text if kind == "keyDown" else "",
                )

    def set_window(self, size, *, dark=False):
        width, height = size
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def photograph(self, path, *, whole=True):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def open_browser(*flags, size=DESKTOP, dark=False):
    """Yields a Tab; the browser and its profile are gone afterwards."""
    program = find_chromium()
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        words = [program, *FLAGS, "--no-sandbox", f"--user-data-dir={profile}"]
        words += ["--remote-debugging-pipe", *flags, "about:blank"]
        # Under numbers that none of the two can take from the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (from_us, to_us)]
        start = f"import os, sys; os.dup2({ends[0]}, 3); os.dup2({ends[1]}, 4); "
        start += "os.execv(sys.argv[1], sys.argv[1:])"
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", start, *words],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (from_us, to_us, *ends):
            os.close(end)
        try:
            tab = Tab(process, to_browser, from_browser)
            tab.set_window(size, dark=dark)
            yield tab
        finally:
            stop(process)
            os.close(to_browser)
            os.close(from_browser)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A plain static file server, with what a test wants otherwise.

    headers: sent with every file. types: content types by suffix, instead of Python's.
    stalls: names of files whose answer never comes.
    """

    headers_of_all: ClassVar[dict[str, str]] = {}
    types: ClassVar[dict[str, str]] = {}
    stalls: ClassVar[tuple[str, ...]] = ()

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        if self.path.split("?")[0].endswith(self.stalls or ("\0",)):
            self.server.closing.wait(120)
            return
        super().do_GET()

    def guess_type(self, path):
        return self.types.get(Path(path).suffix) or super().guess_type(path)

    def end_headers(self):
        for name, value in self.headers_of_all.items():
            self.send_header(name, value)
        super().end_headers()


@contextlib.contextmanager
def serve(folder, *, headers=None, types=None, stalls=()):
    """Yields the address of a folder."""
    settings = {"headers_of_all": headers or {}, "types": types or {}, "stalls": tuple(stalls)}
    handler = type("Handler", (Quiet,), settings)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    server.daemon_threads = True
    server.closing = threading.Event()
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
