"""The options of `ecqx-onnx quantize`, in the panels of its help; --recipe FILE -> their defaults.

A parameter has the name that the option has in `quantize.quantize`, in a recipe file and in a checkpoint's metadata.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ecqx_onnx.cli.recipe_file import take_recipe
from ecqx_onnx.errors import OptionError


def parse_bits(text: str) -> int | dict[str, int]:
    """'4' -> 4; '*=4,fc1.*=2' -> {'*': 4, 'fc1.*': 2}."""
    if text.strip().isdecimal():
        return int(text)
    pairs = [part.rpartition("=") for part in text.split(",")]
    if not all(pattern.strip() and bits.strip().isdecimal() for pattern, _, bits in pairs):
        raise OptionError(
            f"--bits '{text}' is neither a number nor a list of pattern=bits: write 4, or '*=4,fc1.*=2'"
        )
    return {pattern.strip(): int(bits) for pattern, _, bits in pairs}


DATA, LEVELS, RELEVANCE, TRAINING, OUTPUT = "Data", "Levels", "Relevance", "Training", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="FILE.py:FACTORY", help="A function (or class) that returns the network."
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=take_recipe,
        help="Options from a .json or .toml file, or from a checkpoint to repeat.",
    ),
]

Data = Annotated[
    str,
    typer.Option(
        help="Training data: .npz, a folder per class, sklearn:digits, or FILE.py:FUNCTION.",
        rich_help_panel=DATA,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="The trained float state dict. Without it, training starts from scratch.",
        rich_help_panel=DATA,
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Normalisation: one value or one per channel, with commas.", rich_help_panel=DATA
    ),
]
Std = Annotated[
    str | None, typer.Option(help="Its standard deviation, likewise.", rich_help_panel=DATA)
]
Validation = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Share of the training samples that chooses the best epoch; 0 takes the last.",
        rich_help_panel=DATA,
    ),
]
Augment = Annotated[
    str | None,
    typer.Option(
        help="crop_and_flip, shift_images, shift_audio or FILE.py:FUNCTION; training only.",
        rich_help_panel=DATA,
    ),
]

Bits = Annotated[
    str,
    typer.Option(
        help="Bits per level, 2 to 8; or a list of pattern=bits, the last match wins.",
        rich_help_panel=LEVELS,
    ),
]
EntropyWeight = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="γ, how dear coding is against distance; 0 is nearest level.",
        rich_help_panel=LEVELS,
    ),
]
StepRule = Annotated[
    str,
    typer.Option(
        help="The step between levels: auto, percentile, least_squares or learned.",
        rich_help_panel=LEVELS,
    ),
]
StepRate = Annotated[
    float, typer.Option(help="With --step learned: its learning rate.", rich_help_panel=LEVELS)
]
LevelSet = Annotated[
    str,
    typer.Option(
        help="symmetric (2^b - 1 levels) or asymmetric (2^b of them).", rich_help_panel=LEVELS
    ),
]
PerChannel = Annotated[
    bool,
    typer.Option(
        "--per-channel",
        help="One step per output channel instead of one per tensor.",
        rich_help_panel=LEVELS,
    ),
]
Gradient = Annotated[
    str,
    typer.Option(
        help="Straight-through gradient: plain, or absolute (scaled by the size of the level).",
        rich_help_panel=LEVELS,
    ),
]
Activations = Annotated[
    str,
    typer.Option(
        help="float32, or int8: round activations while training as `convert --activations int8` will, which then needs no data.",
        rich_help_panel=LEVELS,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        help="Pattern of parameter names that stay float; repeat for more.", rich_help_panel=LEVELS
    ),
]
ZeroFloor = Annotated[
    float,
    typer.Option(
        help="Zero counts as at least this frequent, and so as cheapest.", rich_help_panel=LEVELS
    ),
]
SizeExponent = Annotated[
    float,
    typer.Option(
        help="How far small tensors are spared the entropy weight: 1 most, 0 not.",
        rich_help_panel=LEVELS,
    ),
]

Relevance = Annotated[
    str,
    typer.Option(
        help="LRP composite: epsilon_plus_flat, ... or FILE.py:FUNCTION that returns one; none is plain ECQ.",
        rich_help_panel=RELEVANCE,
    ),
]
Start = Annotated[
    str,
    typer.Option(
        help="Relevance at the output: logit, probability or ones of the true class, or FILE.py:FUNCTION of (output, target).",
        rich_help_panel=RELEVANCE,
    ),
]
Refresh = Annotated[
    int,
    typer.Option(
        "--refresh",
        min=1,
        help="Take relevances anew every so many steps.",
        rich_help_panel=RELEVANCE,
    ),
]
RelevanceSamples = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Take them on so many samples of the batch; default: all.",
        rich_help_panel=RELEVANCE,
    ),
]
RelevanceMemory = Annotated[
    float, typer.Option(help="Share of the old in their moving average.", rich_help_panel=RELEVANCE)
]
RelevanceUntil = Annotated[
    float,
    typer.Option(
        help="Share of the training after which no new ones are taken, so that weights settle.",
        rich_help_panel=RELEVANCE,
    ),
]
Keep = Annotated[
    float,
    typer.Option(
        help="Relevances may lower the share of zeros by this much, no further.",
        rich_help_panel=RELEVANCE,
    ),
]
Prune = Annotated[float, typer.Option(help="And raise it by this much.", rich_help_panel=RELEVANCE)]
Rho = Annotated[float, typer.Option(help="ρ of f(R) = ρ R^β, above 1.", rich_help_panel=RELEVANCE)]

Epochs = Annotated[
    int, typer.Option(min=0, help="0 assigns levels without training.", rich_help_panel=TRAINING)
]
LearningRate = Annotated[
    float, typer.Option("--lr", min=0.0, help="Adam's learning rate.", rich_help_panel=TRAINING)
]
Schedule = Annotated[
    str, typer.Option(help="Of the learning rate: cosine or constant.", rich_help_panel=TRAINING)
]
BatchSize = Annotated[int, typer.Option(min=1, rich_help_panel=TRAINING)]
Distillation = Annotated[
    float,
    typer.Option(
        help="Share of the loss that follows the float network's outputs.", rich_help_panel=TRAINING
    ),
]
Temperature = Annotated[float, typer.Option(help="Of the distillation.", rich_help_panel=TRAINING)]
EntropyRamp = Annotated[
    float,
    typer.Option(
        help="Share of the training over which the entropy weight rises from 0.",
        rich_help_panel=TRAINING,
    ),
]
Precision = Annotated[
    str, typer.Option(help="float32; bfloat16 is faster on some devices.", rich_help_panel=TRAINING)
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1 ...; default: cuda where there is one.", rich_help_panel=TRAINING
    ),
]
Seed = Annotated[int, typer.Option(help="Same seed, same bytes.", rich_help_panel=TRAINING)]

Out = Annotated[Path, typer.Option(help="The checkpoint to write.", rich_help_panel=OUTPUT)]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on where an interrupted run with the same OUT stopped.",
        rich_help_panel=OUTPUT,
    ),
]
