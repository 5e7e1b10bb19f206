"""A web server for one folder of `deploy --to web`, for whoever sits at this machine."""

from __future__ import annotations

import errno
import functools
import http.server
from pathlib import Path
from typing import Any

from ecqx_onnx.errors import FileError, InputError, OptionError

PORT = 8000
HOST = "127.0.0.1"  # of this machine only
TYPES = {
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
    ".html": "text/html",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".md": "text/plain; charset=utf-8",
}


class FolderServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder on this machine's own address, which is not seen from others."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int) -> None:
        """Begin to listen.

        Args:
            folder: with index.html.
            port: to listen on; 0 takes any that is free.
        """
        super().__init__((HOST, port), functools.partial(_Handler, directory=str(folder)))

    @property
    def url(self) -> str:
        """Where a browser finds the folder."""
        return f"http://localhost:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a browser that breaks off a download is no fault.

        Args:
            request: the connection.
            client_address: of the browser.
        """


class _Handler(http.server.SimpleHTTPRequestHandler):
    def guess_type(self, path: Any) -> str:
        """By our own table, as the operating system's may call scripts text/plain."""
        return TYPES.get(Path(path).suffix.lower(), "application/octet-stream")

    def end_headers(self) -> None:
        """A folder that is deployed again is seen at the next reload."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *arguments: Any) -> None:
        """Nothing: the browser shows what matters."""


def check_port(port: int) -> None:
    """Refuse numbers that are no port.

    Args:
        port: 0 for any, to 65535.

    Raises:
        OptionError: if it is none.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port is {port}: choose 0 (any that is free) to 65535")


def open_server(folder: Path | str, *, port: int = PORT) -> FolderServer:
    """Begin to serve a folder; `serve_forever` of the result answers.

    Args:
        folder: that `deploy --to web` wrote.
        port: to listen on; 0 takes any that is free.

    Returns:
        The server, listening on this machine's own address only.

    Raises:
        FileError: if there is no page in the folder.
        InputError: if the port is taken.
        OptionError: if there is no such port.
    """
    check_port(port)
    folder = Path(folder)
    if not (folder / "index.html").is_file():
        raise FileError(
            f"'{folder}' holds no page to serve; give a folder of `ecqx-onnx deploy --to web`"
        )
    try:
        return FolderServer(folder, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise InputError(f"port {port} cannot be served on: {error.strerror}") from error
        taken = "is taken" if error.errno == errno.EADDRINUSE else "is not for this user"
        raise InputError(f"port {port} {taken}; choose another with --port, 0 for any") from error
