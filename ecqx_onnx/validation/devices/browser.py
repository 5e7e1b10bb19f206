"""A device that is a headless Chromium: a page runs the job there with onnxruntime-web."""

from __future__ import annotations

import http.server
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any

from ecqx_onnx.errors import InputError
from ecqx_onnx.validation.devices.job import Job
from ecqx_onnx.validation.devices.supervision import AT, Progress, stop

RUNNERS = Path(__file__).parent / "runners"
NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-dev-shm-usage",  # /dev/shm is tiny in containers
)
TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@dataclass(frozen=True)
class Browser:
    """A browser of this machine.

    Attributes:
        name: The device's.
        program: The browser's path.
        runtime: The folder with onnxruntime-web's files.
    """

    name: str
    program: str
    runtime: Path

    def run(self, job: Job, *, time_limit: float, progress: Progress | None = None) -> None:
        """Run a job in a page; result.json and outputs are left in the job's folder.

        Args:
            job: What to do.
            time_limit: Seconds until the page is closed.
            progress: Called with (batches done, batches in all).

        Raises:
            InputError: The browser does not get that far.
        """
        (job.folder / "outputs").mkdir(exist_ok=True)
        with (
            _Server(job.folder, self.runtime, progress) as server,
            tempfile.TemporaryDirectory(prefix="ecqx-onnx-", ignore_cleanup_errors=True) as profile,
        ):
            # Chromium's own sandbox cannot be had by root; what runs here is our page and the
            # user's model.
            flags = [
                *FLAGS,
                f"--user-data-dir={profile}",
                *(["--no-sandbox"] if _is_root() else []),
            ]
            log = Path(profile) / "log"
            with log.open("wb") as said:
                process = subprocess.Popen(
                    [self.program, *flags, server.url],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                )
            try:
                self._wait(process, server, time_limit)
            finally:
                stop(process)

    def _wait(self, process: subprocess.Popen[Any], server: _Server, time_limit: float) -> None:
        end = time.monotonic() + time_limit
        while not server.ended.wait(0.1):
            if process.poll() is not None:
                raise InputError(
                    f"{self.name}: {self.program} died (exit status {process.returncode}) before "
                    "the job was done"
                )
            if time.monotonic() > end:
                raise InputError(
                    f"{self.name}: the page was closed, as it had not finished after "
                    f"{time_limit:g} s"
                )
        if server.died:
            raise InputError(f"{self.name}: the page died: {server.died[:300]}")


def _is_root() -> bool:
    """Windows has no such user."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


class _Server(http.server.ThreadingHTTPServer):
    """Serves page, runner, runtime and job, and takes outputs, for whoever knows the token in the
    path. Loopback only."""

    daemon_threads = True

    def __init__(self, job: Path, runtime: Path, progress: Progress | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/{self.token}/page.html"
        self.job, self.runtime, self.progress = job, runtime, progress
        self.ended, self.died = threading.Event(), ""

    def __enter__(self) -> _Server:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks off is the browser's business, and its end is watched
        elsewhere."""

    def locate(self, path: str) -> tuple[str, Path] | None:
        """(which folder, file) of a path; None if it is nothing of ours."""
        parts = PurePosixPath(path.partition("?")[0]).parts
        if len(parts) < 3 or parts[1] != self.token or ".." in parts:
            return None
        if parts[2:] == ("page.html",):
            return "page", RUNNERS / "page.html"
        folders = {"runner": RUNNERS, "runtime": self.runtime, "job": self.job}
        if parts[2] in folders and len(parts) > 3:
            return (parts[2], folders[parts[2]].joinpath(*parts[3:]))
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.server.locate(self.path)
        if found is None or not found[1].is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with found[1].open("rb") as file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", TYPES.get(found[1].suffix, "application/octet-stream"))
            self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            shutil.copyfileobj(file, self.wfile)

    def do_PUT(self) -> None:
        found = self.server.locate(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if found is None or found[0] != "job":
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        name = found[1].relative_to(self.server.job).as_posix()
        at = AT.fullmatch(body.decode("utf-8", "replace")) if name == "progress" else None
        if at and self.server.progress:
            self.server.progress(int(at[1]), int(at[2]))
        if name == "died":
            self.server.died = body.decode("utf-8", "replace")
        elif name.startswith("outputs/") or name == "result.json":
            found[1].write_bytes(body)
        elif name != "progress":
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        self.send_response(HTTPStatus.NO_CONTENT)
        self.end_headers()
        if name in ("result.json", "died"):
            self.server.ended.set()

    def log_message(self, *args: Any) -> None:
        """Nothing: the report tells what matters."""
