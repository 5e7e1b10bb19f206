"""A model card: what the file is, whose quantization, how it was measured, in Markdown with YAML.

The fields at its top are those of Hugging Face's model cards (`base_model`,
`base_model_relation: quantized`): https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ecqx_onnx.errors import OptionError

CARD = "MODEL_CARD.md"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)


def check_base_model(name: str) -> None:
    """Refuse what is no name of a model.

    Args:
        name: as --card has it; "" for no card.

    Raises:
        OptionError: if it is not OWNER/MODEL or MODEL.
    """
    if name and not NAME.fullmatch(name):
        raise OptionError(
            f"--card {name!r} is no name of a model; write the float model's, such as"
            " owner/resnet20"
        )


def write_card(manifest: Mapping[str, Any], base_model: str, checks: Mapping[str, str]) -> str:
    """Write the card of a deployed model.

    Args:
        manifest: of the folder.
        base_model: name of the float model, such as "owner/resnet20".
        checks: name -> sentence of what was checked and passed.

    Returns:
        Markdown with a head of YAML. Every text of the manifest is escaped.
    """
    model, accuracy = manifest["model"], manifest["accuracy"]
    # JSON is YAML, and quotes whatever a file or a user says.
    head = {
        "base_model": base_model,
        "base_model_relation": "quantized",
        "library_name": "onnxruntime",
        "tags": ["onnx", "quantized", "ecqx-onnx"],
    }
    lines = ["---"]
    lines += [f"{name}: {json.dumps(value)}" for name, value in head.items()]
    lines += ["---", "", f"# {_escape(manifest['name'])}", ""]
    size = f"{model['bytes']:,} bytes"
    if model["float32_bytes"]:
        ratio = model["float32_bytes"] / max(1, model["bytes"])
        size += f", {ratio:.1f} times smaller than the same graph with float32 weights"
    lines += [f"`{model['file']}`, quantized from {base_model} by {manifest['tool']}: {size}.", ""]
    rows = [("runs on", manifest["runtime"]), ("sha256", model["sha256"])]
    if manifest["bits"]:
        rows.append(("bits of the widest weight", str(manifest["bits"])))
    if accuracy:
        interval = f"{100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f}"
        counted = f"{accuracy['hits']} of {accuracy['total']} samples of {accuracy['data']}"
        text = f"{100 * accuracy['share']:.2f} % (95 %: {interval}), {counted}"
        rows.append(("accuracy", text))
    for value in (*manifest["inputs"], *manifest["outputs"]):
        shape = "x".join("N" if length is None else str(length) for length in value["shape"])
        kind = "input" if value in manifest["inputs"] else "output"
        rows.append((kind, f"{value['name']}: {value['dtype']} {shape}"))
    if manifest["labels"]:
        rows.append(("classes", ", ".join(manifest["labels"][:20])))
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_escape(str(value))} |" for name, value in rows]
    lines += ["", "Checked against the model it was made of:", ""]
    lines += [f"- {name}: {_escape(sentence)}" for name, sentence in checks.items()]
    lines += ["", "Not in this card, for its author to add: intended use, limits, training data."]
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    """One line of Markdown in which nothing is markup."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)
