"""Read the options of a training from a recipe file or a checkpoint."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from ecqx_onnx.cli.terminal import turn_errors_into_exit
from ecqx_onnx.errors import FileError
from ecqx_onnx.inputs.reading import check_regular, read_bytes

LARGEST_JSON = 100_000  # bytes; ours have some hundreds
LARGEST_TOML = (
    10_000  # bytes; tomllib takes time that grows with the square of a dotted key's length
)
NOT_IN_RECIPES = {
    "recipe",
    "out",
    "resume",
    "force",
    "as_json",
    "quiet",
    "debug",
}  # what one run does, not how
NOT_REPLAYED = ("best_epoch", "trained")  # what a checkpoint tells beside the options


def read_recipe(path: Path) -> dict[str, Any]:
    """Options by name, from a .json or .toml file or the metadata of a checkpoint (.pt)."""
    if path.suffix == ".pt":
        from ecqx_onnx.checkpoint import load

        found = dict(load(path).recipe)
        found.pop("data", None)  # its name, not where it lies
        return {name: value for name, value in found.items() if name not in NOT_REPLAYED}
    try:
        is_toml = path.suffix == ".toml"
        text = read_bytes(path, most=LARGEST_TOML if is_toml else LARGEST_JSON).decode("utf-8")
        found = tomllib.loads(text) if is_toml else json.loads(text)
    except (FileError, ValueError, RecursionError) as error:
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise FileError(
            f"{path} is no recipe ({why}): give a .json or .toml file of options, or a checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise FileError(
            f"{path} is no recipe, it holds a {type(found).__name__}: write options by name"
        )
    return {name: value for name, value in found.items() if name not in NOT_REPLAYED}


def as_text(name: str, value: Any) -> Any:
    """A recipe's value as it would be typed."""
    if name == "relevance" and value is None:
        return "none"
    if name == "bits" and isinstance(value, Mapping):
        return ",".join(f"{pattern}={bits}" for pattern, bits in value.items())
    if name in ("mean", "std") and isinstance(value, list):
        return ",".join(map(str, value))
    return value


def take_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """What the recipe says becomes the default of every option that is not typed."""
    if path is None:
        return None
    with turn_errors_into_exit(f"reading the recipe {path}"):
        check_regular(path)
        given = convert_types(context, path, read_recipe(path))
        context.default_map = {**(context.default_map or {}), **given}
    return path


def convert_types(context: typer.Context, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The recipe's values as options, each of the type that its option has. FileError naming the first that is not."""
    options = {
        parameter.name: parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option"
    }
    if "granularity" in found:
        found["per_channel"] = found.pop("granularity") == "channel"
    unknown = sorted(found.keys() - (options.keys() - NOT_IN_RECIPES))
    if unknown:
        raise FileError(
            f"{path} has '{unknown[0]}', which is no option of quantize; remove it or correct its name"
        )
    texts = {name: as_text(name, value) for name, value in found.items()}
    given = {name: value for name, value in texts.items() if value is not None}
    for name, value in given.items():
        try:
            options[name].process_value(context, value)
        except (typer.BadParameter, TypeError, ValueError, OverflowError, RecursionError) as error:
            why = getattr(error, "message", None) or error
            raise FileError(
                f"{path} has a value for '{name}' that cannot be used ({why}); correct it"
            ) from error
    return given
