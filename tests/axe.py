"""axe-core, which finds what people with other senses and hands stumble over, run in a page.

`python -m tests.axe` fetches it from npm into the cache beside the devices' runtimes; it is not
part of the project. https://github.com/dequelabs/axe-core
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.chromium import DESKTOP, PHONE

VERSION = "4.10.3"
INTEGRITY = (
    "sha512-Xm7bpRXnDSX2YE2YFfBk2FnF0ep6tmG7xPh8iHee8MIcrgq762Nkce856dYtJYLkuIoYZvGfTs"
    "/PbZhideTcEg=="
)
VARIANTS = [
    pytest.param(size, dark, id=f"{name}, {'dark' if dark else 'light'}")
    for name, size in (("desktop", DESKTOP), ("phone", PHONE))
    for dark in (False, True)
]
RUN = """
axe.run(document, {resultTypes: ['violations']}).then(({violations}) => violations
  .filter(({impact}) => ['serious', 'critical'].includes(impact))
  .map(({id, impact, nodes}) => {
    const parts = nodes.map((node) => node.html.slice(0, 200));
    return `${impact} ${id}: ${parts.join(' | ')}`;
  }))
"""


def find_script():
    """Where it lies once it was fetched."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ecqx-onnx"
    return cache / f"axe-core-{VERSION}.min.js"


def fetch():
    """From npm, compared with its pinned checksum."""
    script = find_script()
    script.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        command = ["npm", "pack", "--silent", f"axe-core@{VERSION}"]
        subprocess.run(command, cwd=work, check=True, timeout=300)
        archive = Path(work) / f"axe-core-{VERSION}.tgz"
        digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != INTEGRITY:
            sys.exit(f"npm gave an axe-core {VERSION} with another checksum: refused")
        with tarfile.open(archive) as tar:
            content = tar.extractfile("package/axe.min.js").read()
    partial = script.with_suffix(".part")
    partial.write_bytes(content)
    partial.rename(script)


def find_faults(tab):
    """What axe calls serious or critical in the page that is open, a line each."""
    script = find_script()
    if not script.is_file():
        pytest.skip("axe-core is not here; fetch it once with `python -m tests.axe`")
    tab.evaluate(script.read_text(encoding="utf-8") + "; 0")
    return tab.evaluate(RUN)


if __name__ == "__main__":
    fetch()
    print(find_script())
