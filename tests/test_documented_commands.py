"""Every command block of README.md and docs/ is run as a reader would type it.

A block that cannot be run has a reason in a comment before it, `<!-- not run: ... -->`, and stands
in the list below, which must be the list of those reasons.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from ecqx_onnx.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "AGENTS.md"]
PAGES += [ROOT / "benchmarks/MEASURED.md"]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>[\w{}-]*)\n(?P<text>.*?)^```$", re.M | re.S
)
NAMED = re.compile(r"`(\w+\.py)`:\s*$")
PROGRAMS = ("ecqx-onnx", "python", "python3", "make", "pip", "torchrun", "cd", "npm", "apt-get")
WRITES = re.compile(r"ecqx-onnx (convert|pack|unpack|compress|quantize|deploy|report)\b")
SLOW = ("squeezenet", "models/digits_cnn.py")
NOT_RUN = {
    "README.md": [
        "makes .venv, which .ci/run does",
        "downloads packages; tests/test_package.py installs the wheel in a clean environment",
    ],
    "docs/browser.md": [
        "downloads onnxruntime-web with npm, 33 MB; tests/test_deploy.py runs it where it was"
        " fetched",
        "needs Chromium; tests/test_devices.py runs it where there is one",
    ],
    "docs/deploy.md": [
        "downloads torch and trained weights; tests/test_newcomer.py runs it with random ones"
    ],
    "docs/devices.md": ["downloads 222 MB; tests/test_devices.py runs what was set up"],
    "docs/integer-kernels.md": ["takes half an hour and a data set that is a download"],
    "docs/linux.md": ["needs a machine behind ssh; tests/test_devices.py has a stand-in for ssh"],
    "benchmarks/MEASURED.md": ["needs MNIST, which is a download"],
}


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    language: str
    text: str
    mark: str
    file: str  # which it is to be written to; "" if it is run

    @property
    def reason(self):
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else ""

    @property
    def is_tested_elsewhere(self):
        return self.mark.startswith("tested: ")

    @property
    def is_slow(self):
        return any(word in self.text for word in SLOW) or self.file == "nets.py"


def read_blocks(page):
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in BLOCK.finditer(text):
        before = NAMED.search(text[: found.start()].rstrip())
        blocks.append(
            Block(
                str(page.relative_to(ROOT)),
                found["language"],
                found["text"],
                found["mark"] or "",
                before[1] if before and found["language"] == "python" else "",
            )
        )
    return blocks


BLOCKS = {str(page.relative_to(ROOT)): read_blocks(page) for page in PAGES if page.is_file()}


def test_blocks_that_are_not_run_have_the_reasons_that_are_listed():
    found = {}
    for page, blocks in BLOCKS.items():
        reasons = [block.reason for block in blocks if block.reason]
        if reasons:
            found[page] = reasons
    assert found == NOT_RUN


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_with_commands_is_a_block_of_the_shell(page):
    for block in BLOCKS[page]:
        if block.language in ("sh", "python", "text"):
            continue
        for line in block.text.splitlines():
            word = line.split()[0] if line.split() else ""
            assert word not in PROGRAMS, f"{page}: {line} stands in a block without `sh`"
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    assert not re.search(r"^    (ecqx-onnx|make|pip) ", text, re.M), page


@pytest.mark.parametrize("page", BLOCKS)
def test_the_program_has_one_spelling(page):
    for block in BLOCKS[page]:
        assert not re.search(r"\.venv/bin/(?!activate)", block.text), page
        assert "python -m ecqx_onnx" not in block.text, page


def write_files(folder):
    """What a reader has: a float model, samples, PyTorch code and weights, others' int8 model."""
    from sklearn.datasets import load_digits

    from ecqx_onnx.checkpoint.export import export
    from tests.test_package import write_quantized_model

    digits = load_digits()
    pixels = digits.images[:, None].astype(np.float32) / 16
    parts = {"x_train": pixels[:1400], "x_test": pixels[1400:]}
    labels = {"y_train": digits.target[:1400], "y_test": digits.target[1400:]}
    np.savez(folder / "samples.npz", **parts, **labels)
    np.savez(folder / "data.npz", **parts, **labels)
    np.savez(folder / "other.npz", x=parts["x_test"], y=labels["y_test"])
    code = (
        "from torch import nn\n\nINPUT_SHAPE = (1, 8, 8)\n\n\ndef net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))\n"
    )
    (folder / "net.py").write_text(code)
    names = {}
    exec(code, names)
    torch.manual_seed(0)
    network = names["net"]()
    inputs, targets = torch.from_numpy(parts["x_train"]), torch.from_numpy(labels["y_train"])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    network.eval()
    torch.save(network.state_dict(), folder / "fp32.pt")
    graph = export(network, torch.zeros(2, 1, 8, 8)).graph
    onnx.save(graph.to_model(), folder / "model.onnx")
    write_quantized_model(folder / "model-int8.onnx")
    (folder / "models").symlink_to(ROOT / "models")
    quiet = ("--quiet",)
    options = ("--weights", "fp32.pt", "--data", "data.npz", "--bits", "4", "--epochs", "1")
    run_program("quantize", "net.py:net", *options, "--out", "model.pt", *quiet, folder=folder)
    run_program("convert", "model.pt", "out.onnx", *quiet, folder=folder)


def run_program(*arguments, folder):
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner(env={"COLUMNS": "80"}).invoke(app, list(arguments))
    finally:
        os.chdir(before)
    assert done.exit_code == 0, f"{arguments}: {done.output[-800:]} {done.stderr[-800:]}"
    return done.output


def run_shell(block, folder):
    """The output of the block's lines."""
    shown = []
    text = block.text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "ecqx-onnx" and "&&" not in words:
            shown.append(run_program(*words[1:], folder=folder))
            continue
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-e", "-c", line],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
        assert done.returncode == 0, f"{line}: {done.stdout[-500:]} {done.stderr[-500:]}"
        shown.append(done.stdout)
    return "\n".join(shown)


def run_block(block, folder):
    if block.file:
        (folder / block.file).write_text(block.text)
        return ""
    if block.language == "sh":
        return run_shell(block, folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(block.text, block.page, "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)
    return ""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    folder = tmp_path_factory.mktemp("reader")
    write_files(folder)
    return folder


def copy_files(files, folder):
    shutil.copytree(files, folder, dirs_exist_ok=True, symlinks=True)


def has_blocks(page, *, slow):
    for block in BLOCKS[page]:
        runs = block.language in ("sh", "python") and not block.reason
        if runs and not block.is_tested_elsewhere and block.is_slow == slow:
            return True
    return False


@pytest.mark.parametrize("page", [page for page in BLOCKS if has_blocks(page, slow=False)])
def test_the_commands_of_a_page_run_as_printed(page, files, tmp_path):
    copy_files(files, tmp_path)
    for block in BLOCKS[page]:
        if block.language not in ("sh", "python") or block.reason or block.is_tested_elsewhere:
            continue
        if not block.is_slow and not block.file:
            # Files of the run before are in the way where a page makes the same file twice.
            run_block(with_force(block, tmp_path), tmp_path)


def with_force(block, folder):
    """The block as a reader runs it who has files of these names already."""
    if block.language != "sh":
        return block
    lines = []
    for line in block.text.splitlines():
        writes = re.match(
            r"ecqx-onnx (convert|pack|unpack|compress|quantize|deploy|report)\b", line
        )
        command, mark, comment = line.partition(" #")
        lines.append(f"{command} --force{mark}{comment}" if writes else line)
    return Block(block.page, "sh", "\n".join(lines) + "\n", block.mark, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in BLOCKS if has_blocks(page, slow=True)])
def test_the_slow_commands_of_a_page_run_as_printed(page, files, tmp_path):
    from ecqx_onnx.quantization.relevance.zennit_import import import_zennit

    import_zennit()  # beside a CPU-only torch, PyPI's torchvision does not import by itself
    copy_files(files, tmp_path)
    images = np.random.default_rng(0).random((160, 3, 64, 64), np.float32)
    np.savez(tmp_path / "photos.npz", x=images)
    for block in BLOCKS[page]:
        if block.language in ("sh", "python") and block.is_slow and not block.reason:
            run_block(with_force(block, tmp_path), tmp_path)


def hide_numbers(line):
    """Numbers depend on the processor; words and the table do not."""
    line = re.sub(r"[\d,]*\.?\d+(e-?\d+)?", "#", line)
    return re.sub(r"\s+", " ", line).strip()


def test_the_output_in_the_readme_is_what_the_commands_print(files, tmp_path):
    copy_files(files, tmp_path)
    page = BLOCKS["README.md"]
    commands = next(block for block in page if "compress model.onnx" in block.text)
    printed = run_shell(with_force(commands, tmp_path), tmp_path)
    lines = {hide_numbers(line) for line in printed.splitlines()}
    outputs = [block for block in page if block.language == "text"]
    assert len(outputs) == 3
    for block in outputs:
        for line in block.text.splitlines():
            shown = hide_numbers(line)
            if "weight" in shown and shown[0] in "│┃":  # columns depend on lengths of names
                parts = [part.strip() for part in shown.strip("│┃ ").split(shown[0])]
                words = {part for part in parts if re.search("[a-z]{3}", part)} - {"packed"}
                assert any(all(word in other for word in words) for other in lines), line
                continue
            assert shown in lines, line


def test_the_readme_is_short():
    text = re.sub(r"```.*?```|<!--.*?-->", "", PAGES[0].read_text(encoding="utf-8"), flags=re.S)
    prose = [line for line in text.splitlines() if not line.startswith(("|", "#", "!"))]
    words = sum(len(line.split()) for line in prose)
    assert words <= 700


def test_the_readme_says_the_test_command_that_ci_runs():
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert ci == "make test"
    assert re.search(r"^make test ", PAGES[0].read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("word", ["ECQ", "ECQx", "relevance", "folded", "packed"])
def test_words_of_the_field_are_explained_where_they_stand_first(word):
    text = PAGES[0].read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    first = re.search(rf"(?<![\w/.-])\*?{word}\b", text)
    assert text[first.start()] == "*", text[first.start() - 60 : first.end() + 60]


def test_links_of_the_pages_lead_to_files():
    for page in PAGES:
        if not page.is_file():
            continue
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)\s#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
