"""Copies a platform's templates into a folder, with the manifest's values filled into the texts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from ecqx_onnx.deployment.platforms import Platform
from ecqx_onnx.validation.devices.setup import WEB_FILES, WEBGPU_FILES, set_up

TEXT = (".md", ".txt")  # templates that are filled in, with Markdown around the values
MARKUP = (".html", ".xml")  # the same with HTML or XML around them
SETTINGS = (".properties", ".pbxproj")  # of Gradle and Xcode: the version of onnxruntime


def copy_templates(
    platform: Platform, folder: Path, manifest: Mapping[str, Any], notes: Sequence[str]
) -> None:
    """Copy the runner, the sample project and the README into a folder.

    Args:
        platform: whose templates they are.
        folder: where they go, under the same names.
        manifest: the folder's manifest.
        notes: what a user should know, one sentence each.
    """
    values = _make_values(manifest, notes)
    title = manifest["name"]
    markup = {"title": escape(title), "app_name": escape(_quote_android(title), quote=False)}
    for name in platform.templates:
        source = platform.folder / name
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in TEXT:
            text = Template(source.read_text(encoding="utf-8")).substitute(values)
            target.write_text(text, encoding="utf-8")
        elif source.suffix in MARKUP:
            text = Template(source.read_text(encoding="utf-8")).safe_substitute(markup)
            target.write_text(text, encoding="utf-8")
        elif source.suffix in SETTINGS:  # Xcode's own $(NAME) stays
            text = Template(source.read_text(encoding="utf-8")).safe_substitute(values)
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(source, target)


def copy_web_runtime(folder: Path, *, webgpu: bool) -> None:
    """Copy onnxruntime-web into a folder, its modules named .js.

    Many servers, stock nginx among them, send .mjs as no script, and browsers then refuse it.

    Args:
        folder: which gets runtime/.
        webgpu: copy the runtime for GPUs as well.

    Raises:
        InputError: if the runtime has to be fetched first and cannot be.
    """
    (folder / "runtime").mkdir()
    sources = {"web": WEB_FILES}
    if webgpu:
        sources["webgpu"] = WEBGPU_FILES
    for device, names in sources.items():
        for name in names:
            target = folder / "runtime" / name.replace(".mjs", ".js")
            shutil.copyfile(set_up(device) / name, target)


def _make_values(manifest: Mapping[str, Any], notes: Sequence[str]) -> dict[str, str]:
    """What the texts name, quoted for Markdown."""
    tolerances = []
    for output in manifest["outputs"]:
        name = _quote_markdown(output["name"])
        tolerances.append(f"- {name}: {output['tolerance']:.3g}, {output['tolerance_from']}")
    return {
        "name": _quote_markdown(manifest["name"]),
        "tool": manifest["tool"],
        "runtime": manifest["runtime"],
        "least": manifest["runtime"].split()[1],
        "made_with": manifest["made_with"],
        "bytes": f"{manifest['model']['bytes']:,}",
        "sha256": manifest["model"]["sha256"],
        "accuracy": _describe_accuracy(manifest["accuracy"]),
        "cases": str(len(manifest["golden"]["cases"])),
        "tolerances": "\n".join(tolerances),
        "notes": "".join(f"\n- Note: {note}." for note in notes),
    }


def _describe_accuracy(found: dict[str, Any] | None) -> str:
    """The accuracy in the README's words, whose sentence begins before them."""
    if not found:
        return "was not measured (no data was given)"
    share = f"{100 * found['share']:.2f} %"
    interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}, 95 % interval"
    return f"{share} ({interval}, {found['total']} samples of {_quote_markdown(found['data'])})"


def _quote_android(text: str) -> str:
    """As a string resource of Android, whose own marks are escaped."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace('"', '\\"')
    return f"\\{escaped}" if escaped[:1] in ("@", "?") else escaped


def _quote_markdown(text: str) -> str:
    """As Markdown code, whatever it holds."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
