"""The command `ecqx-onnx quantize`.

A parameter has the name that its option has in `ecqx_onnx.quantize`, in a recipe file and in a
checkpoint's metadata; the exceptions are `model` (factory) and `per_channel` (granularity).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli.arguments import (
    Force,
    Json,
    Quiet,
    Strict,
    make_argument,
    make_option,
    parse_bits,
    parse_numbers,
)
from ecqx_onnx.cli.frame import emit, register_command, show_progress, suggest
from ecqx_onnx.cli.recipe_file import take_recipe
from ecqx_onnx.cli.terminal import process_number, stderr
from ecqx_onnx.options.quantize import QuantizeOptions

DATA = "Data"
LEVELS = "Levels"
RELEVANCE = "Relevance"
TRAINING = "Training"
OUTPUT = "Output"
# Parameters of the command alone.
NOT_TO_TRAIN = ("recipe", "as_json", "quiet", "debug", "all_weights")

Model = Annotated[str, make_argument(QuantizeOptions, "factory", metavar="FILE.py:FACTORY")]
Recipe = Annotated[
    Path | None,
    typer.Option(
        is_eager=True,
        callback=take_recipe,
        help="Options from a .json or .toml file, from a checkpoint to repeat, or paper: the"
        " paper's own.",
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


def _option(name: str, panel: str, *flags: str) -> Any:
    return make_option(QuantizeOptions, name, *flags, panel=panel)


@register_command
def quantize(
    context: typer.Context,
    model: Model,
    data: Annotated[str, _option("data", DATA)],
    out: Annotated[Path, _option("out", OUTPUT)],
    recipe: Recipe = None,
    weights: Annotated[Path | None, _option("weights", DATA)] = None,
    mean: Annotated[str | None, _option("mean", DATA)] = None,
    std: Annotated[str | None, _option("std", DATA)] = None,
    start_from: Annotated[Path | None, _option("start_from", DATA, "--from")] = None,
    validation: Annotated[float, _option("validation", DATA)] = 0.1,
    augment: Annotated[str | None, _option("augment", DATA)] = None,
    bits: Annotated[str, _option("bits", LEVELS)] = "4",
    entropy_weight: Annotated[float, _option("entropy_weight", LEVELS)] = 0.1,
    step: Annotated[str, _option("step", LEVELS)] = "auto",
    step_rate: Annotated[float, _option("step_rate", LEVELS)] = 1e-3,
    levels: Annotated[str, _option("levels", LEVELS)] = "symmetric",
    per_channel: PerChannel = False,
    exclude: Annotated[list[str] | None, _option("exclude", LEVELS)] = None,
    activations: Annotated[str, _option("activations", LEVELS)] = "float32",
    gradient: Annotated[str, _option("gradient", LEVELS)] = "plain",
    zero_floor: Annotated[float, _option("zero_floor", LEVELS)] = 0.5,
    size_exponent: Annotated[float, _option("size_exponent", LEVELS)] = 1.0,
    relevance: Annotated[str, _option("relevance", RELEVANCE)] = "epsilon_plus_flat",
    start: Annotated[str, _option("start", RELEVANCE)] = "logit",
    refresh_every: Annotated[int, _option("refresh_every", RELEVANCE, "--refresh")] = 8,
    relevance_samples: Annotated[int | None, _option("relevance_samples", RELEVANCE)] = None,
    relevance_memory: Annotated[float, _option("relevance_memory", RELEVANCE)] = 0.9,
    relevance_until: Annotated[float, _option("relevance_until", RELEVANCE)] = 0.4,
    keep: Annotated[float, _option("keep", RELEVANCE)] = 0.1,
    prune: Annotated[float, _option("prune", RELEVANCE)] = 0.1,
    rho: Annotated[float, _option("rho", RELEVANCE)] = 2.0,
    loss: Annotated[str, _option("loss", TRAINING)] = "cross_entropy",
    metric: Annotated[str | None, _option("metric", TRAINING)] = None,
    epochs: Annotated[int, _option("epochs", TRAINING)] = 10,
    learning_rate: Annotated[float | None, _option("learning_rate", TRAINING, "--lr")] = None,
    schedule: Annotated[str, _option("schedule", TRAINING)] = "cosine",
    batch_size: Annotated[int, _option("batch_size", TRAINING)] = 64,
    distillation: Annotated[float, _option("distillation", TRAINING)] = 0.0,
    distill_by: Annotated[str, _option("distill_by", TRAINING)] = "auto",
    temperature: Annotated[float, _option("temperature", TRAINING)] = 2.0,
    entropy_ramp: Annotated[float, _option("entropy_ramp", TRAINING)] = 0.0,
    max_bytes: Annotated[str | None, _option("max_bytes", TRAINING)] = None,
    bits_per_weight: Annotated[float | None, _option("bits_per_weight", TRAINING)] = None,
    precision: Annotated[str, _option("precision", TRAINING)] = "float32",
    device: Annotated[str | None, _option("device", TRAINING)] = None,
    seed: Annotated[int, _option("seed", TRAINING)] = 0,
    strict: Strict = True,
    resume: Annotated[bool, _option("resume", OUTPUT, "--resume")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and quantise with ECQx: near and cheap levels; relevance decides what may become zero.

    Example:  ecqx-onnx quantize net.py:net --weights fp32.pt --data mnist.npz --out net.pt

    Other tasks:  ecqx-onnx quantize net.py:net --data pairs.npz --loss mse --out net.pt ...

    To a budget, after compress:  ecqx-onnx quantize net.py:net --weights fp32.pt --from small.pt
    --data images.npz --loss distillation --max-bytes 52k --epochs 5 --out net.pt

    For integer kernels:  ecqx-onnx quantize ... --activations int8 --out net.pt

    and then:  ecqx-onnx convert net.pt net.onnx --activations int8

    On several GPUs or machines:  torchrun --nproc-per-node=N -m ecqx_onnx quantize ...
    """
    from ecqx_onnx import api
    from ecqx_onnx.quantization.training import emulates_bfloat16

    options = {name: value for name, value in context.params.items() if name not in NOT_TO_TRAIN}
    options["bits"] = parse_bits(bits)
    options["exclude"] = tuple(exclude or ())
    options["granularity"] = "channel" if options.pop("per_channel") else "tensor"
    options["relevance"] = None if relevance == "none" else relevance
    options["mean"] = parse_numbers(mean, "--mean")
    options["std"] = parse_numbers(std, "--std")
    # Under torchrun the first process speaks for all.
    quiet = quiet or process_number() > 0
    if precision == "bfloat16" and not quiet and emulates_bfloat16(device):
        stderr.print(
            "this processor emulates bfloat16, which takes longer than float32 does", style="yellow"
        )
    with show_progress(quiet or as_json, "loading the network and the data") as progress:
        result = api.quantize(options.pop("model"), **options, progress=progress)
    emit(result, as_json=as_json and process_number() == 0, quiet=quiet)
    onnx_file = Path(result.path).with_suffix(".onnx")
    suggest("convert", result.path, onnx_file, as_json=as_json, quiet=quiet)
