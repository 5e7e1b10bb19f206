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
from ecqx_onnx.options.quantizer import Recipe
from ecqx_onnx.options.training import PAPER_TRAINING

PAPER = "paper"  # --recipe paper
LARGEST_JSON = 100_000  # bytes; ours have some hundreds
# Bytes; tomllib takes time that grows with the square of a dotted key's length.
LARGEST_TOML = 10_000
# What one run does, not how.
NOT_IN_RECIPES = {"recipe", "out", "resume", "force", "as_json", "quiet", "debug", "all_weights"}
# What a checkpoint tells beside the options; of start_from, the name without its folder.
NOT_REPLAYED = ("best_epoch", "trained", "score", "start_from")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read options from a file.

    Args:
        path: a .json or .toml file of options, or a checkpoint (.pt), whose metadata have them; or
            "paper", for the options of the paper.

    Returns:
        Value by the option's name.

    Raises:
        FileError: if it can't be read, or holds something else.
    """
    if str(path) == PAPER:
        return {**Recipe.paper().to_json(), **PAPER_TRAINING}
    if path.suffix == ".pt":
        from ecqx_onnx.checkpoint import load

        found = dict(load(path).recipe)
        found.pop("data", None)  # its name, not where it lies
        return _drop_not_replayed(found)
    try:
        if path.suffix == ".toml":
            found = tomllib.loads(read_bytes(path, most=LARGEST_TOML).decode("utf-8"))
        else:
            found = json.loads(read_bytes(path, most=LARGEST_JSON).decode("utf-8"))
    except (FileError, ValueError, RecursionError) as error:
        why = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise FileError(
            f"{path} is no recipe ({why}): give a .json or .toml file of options, or a checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise FileError(
            f"{path} is no recipe, it holds a {type(found).__name__}: write options by name"
        )
    return _drop_not_replayed(found)


def _drop_not_replayed(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in found.items() if name not in NOT_REPLAYED}
    budget = kept.pop("budget", None)
    return kept | (budget if isinstance(budget, dict) else {})


def write_as_typed(name: str, value: Any) -> Any:
    """Write a recipe's value as it would be typed.

    Args:
        name: of the option.
        value: as the recipe has it.

    Returns:
        Text where the command line takes text, else the value.
    """
    if name == "relevance" and value is None:
        return "none"
    if name == "bits" and isinstance(value, Mapping):
        return ",".join(f"{pattern}={bits}" for pattern, bits in value.items())
    if name in ("mean", "std") and isinstance(value, list):
        return ",".join(map(str, value))
    return value


def take_recipe(context: typer.Context, path: Path | None) -> Path | None:
    """Make what the recipe says the default of every option that is not typed.

    Args:
        context: of the command; its default_map is extended.
        path: what --recipe was given, or None.

    Returns:
        The path, as callbacks of options do.
    """
    if path is None:
        return None
    with turn_errors_into_exit(f"reading the recipe {path}"):
        if str(path) != PAPER:
            check_regular(path)
        given = convert_types(context, path, read_recipe(path))
        context.default_map = {**(context.default_map or {}), **given}
    return path


def convert_types(context: typer.Context, path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Give a recipe's values the types that their options have.

    Args:
        context: of the command, which has the options.
        path: of the recipe, for messages.
        found: value by name, as read.

    Returns:
        The values that are not None, each of its option's type.

    Raises:
        FileError: naming the first that is no option of quantize, or doesn't fit.
    """
    options = {}
    for parameter in context.command.params:
        if parameter.param_type_name == "option":
            options[parameter.name] = parameter
    if "granularity" in found:
        found["per_channel"] = found.pop("granularity") == "channel"
    unknown = sorted(found.keys() - (options.keys() - NOT_IN_RECIPES))
    if unknown:
        raise FileError(
            f"{path} has '{unknown[0]}', which is no option of quantize; remove it or correct its"
            " name"
        )
    given = {}
    for name, value in found.items():
        typed = write_as_typed(name, value)
        if typed is not None:
            given[name] = typed
    for name, value in given.items():
        try:
            options[name].process_value(context, value)
        except (typer.BadParameter, TypeError, ValueError, OverflowError, RecursionError) as error:
            why = getattr(error, "message", None) or error
            raise FileError(
                f"{path} has a value for '{name}' that cannot be used ({why}); correct it"
            ) from error
    return given
