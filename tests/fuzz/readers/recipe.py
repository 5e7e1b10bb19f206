"""`quantize --recipe FILE.toml` (and .json): the options, up to where training would begin."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from ecqx_onnx.errors import InputError
from tests.fuzz.commands import run_command
from tests.fuzz.mutation import mutate_json, mutate_text

NAME = "recipe"
SUFFIX = ".toml"
NETWORK = "import torch\nINPUT_SHAPE = (4,)\ndef net():\n    return torch.nn.Linear(4, 3)\n"


def make_seeds() -> list[bytes]:
    """Options of every type."""
    toml = (
        'bits = 3\nentropy_weight = 0.2\nrelevance = "none"\nepochs = 0\nexclude = ["bias*"]\n'
        'granularity = "channel"\nlevels = "symmetric"\nmean = [0.1]\nstd = [0.5]\n'
        "validation = 0.0\nrho = 2.0\nkeep = 0.1\n"
    )
    nested = 'epochs = 0\nrelevance = "none"\nvalidation = 0.0\n[bits]\n"*" = 4\n"weight" = 2\n'
    listed = '{"bits": 4, "relevance": null, "epochs": 0, "exclude": ["bias*"], "validation": 0.0}'
    return [toml.encode(), nested.encode(), listed.encode()]


def mutate(seed: bytes, source: random.Random) -> bytes:
    """As text, or as JSON."""
    return (mutate_json if seed[:1] == b"{" and source.random() < 0.5 else mutate_text)(
        seed, source
    )


def read(path: Path) -> None:
    """The data do not exist, so that a recipe that is taken ends in the sentence about them."""
    folder = path.parent
    (folder / "net.py").write_text(NETWORK, encoding="utf-8")
    if path.read_bytes()[:1] == b"{":
        path = Path(shutil.copyfile(path, folder / "recipe.json"))
    model, data = f"{folder / 'net.py'}:net", folder / "none.npz"
    out = folder / "out.pt"
    arguments = ("quantize", model, "--data", data, "--out", out, "--recipe", path, "--force")
    try:
        run_command(*arguments)
    except InputError as error:
        if "none.npz" not in str(error):
            raise
    finally:
        assert not out.exists()
