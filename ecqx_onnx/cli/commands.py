"""Arguments -> one call of a room -> a table, or JSON with --json; errors -> one sentence and an exit status.

Exit status: 0 all well; 1 a check failed; 2 bad input; 70 a defect of ours; 130, 128 + signal: stopped.
Imports are inside the commands, so that --help is instant.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli import quantize_options as q
from ecqx_onnx.cli.frame import (
    Force,
    Json,
    Quiet,
    TrustPickle,
    _json_file,
    app,
    device_app,
    emit,
    refuse_json_and_output,
    register_command,
    show_progress,
)
from ecqx_onnx.cli.terminal import (
    escape,
    guard,
    process_number,
    stderr,
    stdout,
    write_what_cannot_be_encoded_as_escapes,
)
from ecqx_onnx.errors import CheckFailed, InputError, OptionError

app.add_typer(device_app, name="device")

NOT_TO_TRAIN = ("recipe", "as_json", "quiet", "debug")  # parameters of the command alone
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict",
        help="Refuse a state dict that lacks weights of the model's, or has others.",
    ),
]
MinAgreement = Annotated[
    float | None,
    typer.Option(
        help="Quantised without training: per cent of samples that must keep the float model's class (95)."
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="Quantised without training: largest relative error of an output (0.1 if no class scores)."
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(help="Quantised without training: points of accuracy that may be lost on --data."),
]


def _float_bounds(
    min_agreement: float | None, max_error: float | None, max_drop: float | None
) -> Any:
    """None where no bound is given."""
    from ecqx_onnx.validation.float_distance import FloatBounds

    if min_agreement is None and max_error is None and max_drop is None:
        return None
    return FloatBounds(min_agreement, max_error, max_drop)


def main() -> None:
    """Entry point of the ecqx-onnx command."""
    for name in ("SIGTERM", "SIGHUP"):  # so that what was started is cleaned up
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    write_what_cannot_be_encoded_as_escapes()
    app()


@register_command
def quantize(
    context: typer.Context,
    model: q.Model,
    data: q.Data,
    out: q.Out,
    recipe: q.Recipe = None,
    weights: q.Weights = None,
    mean: q.Mean = None,
    std: q.Std = None,
    validation: q.Validation = 0.1,
    augment: q.Augment = None,
    bits: q.Bits = "4",
    entropy_weight: q.EntropyWeight = 0.1,
    step: q.StepRule = "auto",
    step_rate: q.StepRate = 1e-3,
    levels: q.LevelSet = "symmetric",
    per_channel: q.PerChannel = False,
    exclude: q.Exclude = None,
    activations: q.Activations = "float32",
    gradient: q.Gradient = "plain",
    zero_floor: q.ZeroFloor = 0.5,
    size_exponent: q.SizeExponent = 1.0,
    relevance: q.Relevance = "epsilon_plus_flat",
    start: q.Start = "logit",
    refresh_every: q.Refresh = 8,
    relevance_samples: q.RelevanceSamples = None,
    relevance_memory: q.RelevanceMemory = 0.9,
    relevance_until: q.RelevanceUntil = 0.4,
    keep: q.Keep = 0.1,
    prune: q.Prune = 0.1,
    rho: q.Rho = 2.0,
    epochs: q.Epochs = 10,
    learning_rate: q.LearningRate = 1e-3,
    schedule: q.Schedule = "cosine",
    batch_size: q.BatchSize = 64,
    distillation: q.Distillation = 0.0,
    temperature: q.Temperature = 2.0,
    entropy_ramp: q.EntropyRamp = 0.0,
    precision: q.Precision = "float32",
    device: q.Device = None,
    seed: q.Seed = 0,
    strict: Strict = True,
    resume: q.Resume = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train and quantise with ECQx: levels that are near and cheap, relevance deciding what may become zero.

    Example:  ecqx-onnx quantize models/lenet5.py:lenet5 --weights fp32.pt --data mnist.npz --bits 4 --out lenet5.pt

    For integer kernels:  ecqx-onnx quantize ... --activations int8 --out m.pt && ecqx-onnx convert m.pt m.onnx --activations int8

    On several GPUs or machines:  torchrun --nproc-per-node=N -m ecqx_onnx quantize ...
    """
    from ecqx_onnx import api
    from ecqx_onnx.quantization.training import emulates_bfloat16

    options = {name: value for name, value in context.params.items() if name not in NOT_TO_TRAIN}
    options |= {"bits": q.parse_bits(bits), "exclude": tuple(exclude or ())}
    options |= {"granularity": "channel" if options.pop("per_channel") else "tensor"}
    options |= {"relevance": None if relevance == "none" else relevance}
    options |= {"mean": parse_numbers(mean, "--mean"), "std": parse_numbers(std, "--std")}
    quiet = quiet or process_number() > 0
    if precision == "bfloat16" and not quiet and emulates_bfloat16(device):
        stderr.print(
            "this processor emulates bfloat16, which takes longer than float32 does", style="yellow"
        )
    with show_progress(quiet or as_json) as progress:
        result = api.quantize(options.pop("model"), **options, progress=progress)
    emit(result, as_json=as_json and process_number() == 0, quiet=quiet)


@register_command
def convert(
    model: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of ours, a .pt2 program, a state dict (with --model), or a pickled module."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE.py:FACTORY", help="The network of a state dict."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one input without the batch: 3,32,32. Only where FILE.py has no INPUT_SHAPE."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            min=2, max=8, help="Quantise a float model to so many bits, without training."
        ),
    ] = None,
    entropy_weight: Annotated[
        float, typer.Option(min=0.0, help="With --bits: how dear coding is against distance.")
    ] = 0.0,
    include: Annotated[
        list[str] | None,
        typer.Option(help="With --bits: pattern of more parameter names to quantise."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="With --bits: pattern of parameter names that stay float."),
    ] = None,
    storage: Annotated[
        str,
        typer.Option(
            help="auto, dense, sparse or packed: how integers lie in the file. auto: fewest bytes."
        ),
    ] = "auto",
    dequantize: Annotated[
        str, typer.Option(help="auto, folded (float speed) or standard (DequantizeLinear).")
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(help="The runtime that must load the file; `ecqx-onnx targets` lists them."),
    ] = "onnxruntime",
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset; by default the lowest that holds the weights.")
    ] = None,
    activations: Annotated[
        str,
        typer.Option(
            help="float32, or int8: integer kernels. Often twice as fast on CPUs with 8 bit products, slower for some small "
            "networks; `ecqx-onnx validate` measures it."
        ),
    ] = "float32",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="With --activations int8: data that their ranges come from, as for quantize. "
            "Not needed where the checkpoint was trained with --activations int8.",
        ),
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(help="minmax, percentile or entropy, as onnxruntime does them.")
    ] = "minmax",
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="Use so many of the training samples.")
    ] = 512,
    floats: Annotated[
        str,
        typer.Option(
            help="float32, or float16: steps per channel, biases, whatever stays float, rounded, in half the bytes."
        ),
    ] = "float32",
    data: Annotated[
        str | None,
        typer.Option(
            help="With --bits: data on which the result is compared with the float model; else random."
        ),
    ] = None,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    max_drop: MaxDrop = None,
    strict: Strict = True,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the .onnx file: integer weights, and the nodes that turn them into floats.

    Example:  ecqx-onnx convert lenet5.pt lenet5.onnx
    """
    from ecqx_onnx import api

    report = api.convert(
        model,
        out,
        factory=factory,
        input_shape=parse_shape(input_shape),
        bits=bits,
        entropy_weight=entropy_weight,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        storage=storage,
        dequantize=dequantize,
        target=target,
        opset=opset,
        activations=activations,
        calibration=calibration,
        calibration_method=calibration_method,
        calibration_samples=calibration_samples,
        floats=floats,
        data=data,
        float_bounds=_float_bounds(min_agreement, max_error, max_drop),
        strict=strict,
        trust_pickle=trust_pickle,
        force=force,
    )
    emit(report, as_json=as_json, quiet=quiet)


@register_command
def validate(
    onnx_file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    against: Annotated[
        Path | None,
        typer.Option(
            help="What it was made from: the checkpoint (or state dict, .pt2) that was converted, or the .onnx that was packed. "
            "Without it and without --data: is the file whole?"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled data for accuracy: as for quantize. Without it, random inputs are compared."
        ),
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Against an .onnx file: an .npz with one array per model input, instead of --data."
        ),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE.py:FACTORY", help="The network of a state dict."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="With --model: shape of one input without the batch, where FILE.py has no INPUT_SHAPE."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Use only so many samples of the test split.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Run the file there: local, node, web, arm64, ssh://user@host[:port] or folder:PATH; several give one table."
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(min=1.0, help="With --device: seconds until its runner is stopped.")
    ] = 1800.0,
    min_agreement: MinAgreement = None,
    max_error: MaxError = None,
    max_drop: MaxDrop = None,
    strict: Strict = True,
    trust_pickle: TrustPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the .onnx file beside PyTorch, or beside the .onnx file that it was packed from, and check that both say the same.

    Exit status 1 if not.

    Example:  ecqx-onnx validate lenet5.onnx --against lenet5.pt --data mnist.npz --device local --device web

    Of a packed file:  ecqx-onnx validate packed.onnx --against model-int8.onnx

    Is a file whole, by its own checksums:  ecqx-onnx validate lenet5.onnx
    """
    from ecqx_onnx import api

    if device and inputs is not None:
        raise OptionError(
            "--inputs are for a validation against an .onnx file, on this machine: leave --device out"
        )
    if device:
        with show_progress(quiet or as_json) as progress:
            table = api.validate_on(
                device,
                onnx_file,
                against=against,
                data=data,
                factory=factory,
                input_shape=parse_shape(input_shape),
                samples=samples,
                float_bounds=_float_bounds(min_agreement, max_error, max_drop),
                strict=strict,
                batch_size=batch_size,
                time_limit=time_limit,
                trust_pickle=trust_pickle,
                progress=progress,
            )
        _emit_devices(table, as_json=as_json, quiet=quiet)
        return
    if against is None and data is None:
        report = check_whole_file(onnx_file, inputs=inputs, factory=factory)
    else:
        from ecqx_onnx.validation.equivalence import load_inputs

        with show_progress(quiet or as_json) as progress:
            report = api.validate(
                onnx_file,
                against=against,
                data=data,
                inputs=None if inputs is None else load_inputs(inputs),
                factory=factory,
                input_shape=parse_shape(input_shape),
                samples=samples,
                float_bounds=_float_bounds(min_agreement, max_error, max_drop),
                strict=strict,
                batch_size=batch_size,
                trust_pickle=trust_pickle,
                progress=progress,
            )
    emit(report, as_json=as_json, quiet=quiet)
    if not report.ok:
        raise CheckFailed("; ".join(f"{check.name}: {check.sentence}" for check in report.failures))


def check_whole_file(onnx_file: Path, *, inputs: Path | None, factory: str | None) -> Any:
    """The report on a file in itself."""
    from ecqx_onnx.validation import check_file

    if inputs is not None or factory is not None:
        option = "--inputs" if factory is None else "--model"
        raise OptionError(
            f"{option} says how to run what the file is compared with: say what that is with --against"
        )
    return check_file(onnx_file)


@register_command
def inspect(
    file: Annotated[Path, typer.Argument(help="An .onnx file or a checkpoint of ours.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a file: each weight's bits, zeros, entropy and bytes, and where every byte of the file goes.

    Example:  ecqx-onnx inspect lenet5.onnx
    """
    from ecqx_onnx.inspection import inspect as look

    emit(look(file), as_json=as_json, quiet=quiet)


@register_command
def targets(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the runtimes that `convert --target` writes for, and what the file of each can hold.

    Example:  ecqx-onnx targets
    """
    from ecqx_onnx.cli.tables import TargetTable

    emit(TargetTable(), as_json=as_json, quiet=quiet)


@register_command
def pack(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.onnx", help="Any model with quantised weights, whoever made it."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    storage: Annotated[
        str, typer.Option(help="auto, dense, sparse or packed: how integers lie in the file.")
    ] = "auto",
    dequantize: Annotated[
        str, typer.Option(help="auto, folded (float speed) or standard (DequantizeLinear).")
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="The runtime that must load the file.")
    ] = "onnxruntime",
    opset: Annotated[int | None, typer.Option(help="Highest ONNX opset to write.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="An .npz with one array per model input, for the check. Without it, random ones."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Run both models and write nothing if they differ."
        ),
    ] = True,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store the quantised weights of someone else's model in fewer bytes, losslessly, and check the outputs against it.

    Takes DequantizeLinear, QDQ, QCDQ, QONNX, QLinear and Integer operators, and float weights that lie on few values.

    Example:  ecqx-onnx pack model-int8.onnx packed.onnx
    """
    from ecqx_onnx.validation.equivalence import load_inputs
    from ecqx_onnx.verbs import pack as packing

    report = packing.pack(
        model,
        out,
        storage=storage,
        dequantize=dequantize,
        target=target,
        opset=opset,
        check=check,
        inputs=None if inputs is None else load_inputs(inputs),
        force=force,
    )
    emit(report, as_json=as_json, quiet=quiet)


@register_command
def unpack(
    model: Annotated[
        Path, typer.Argument(metavar="PACKED.onnx", help="A file that convert or pack has written.")
    ],
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    floats: Annotated[
        bool, typer.Option("--float", help="Plain float32 weights instead of integers.")
    ] = False,
    dequantize: Annotated[
        str, typer.Option(help="auto, folded or standard (DequantizeLinear).")
    ] = "auto",
    target: Annotated[
        str, typer.Option(help="Who must load the file; qdq: tools that want standard operators.")
    ] = "qdq",
    opset: Annotated[int | None, typer.Option(help="Highest ONNX opset to write.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write dense integers and DequantizeLinear, for tools that cannot decode or fold. Every weight's checksum is verified.

    Example:  ecqx-onnx unpack packed.onnx dense.onnx
    """
    from ecqx_onnx.verbs import pack as packing

    report = packing.unpack(
        model, out, floats=floats, dequantize=dequantize, target=target, opset=opset, force=force
    )
    emit(report, as_json=as_json, quiet=quiet)


@register_command
def deploy(
    onnx_file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="The platform: web, android, ios or linux.")],
    against: Annotated[
        Path | None,
        typer.Option(
            help="The PyTorch side, for a validation and a tolerance that is derived from it."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Labelled data for golden inputs and the expected accuracy: as for quantize."
        ),
    ] = None,
    factory: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE.py:FACTORY", help="The network of a state dict."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="With --model: shape of one input without the batch, where FILE.py has no INPUT_SHAPE."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="The classes' names with commas, instead of those in the file."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Use only so many samples of the test split.")
    ] = None,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a folder that is ready to use: model, manifest, golden outputs, a runner that checks itself against them, README.

    Example:  ecqx-onnx deploy lenet5.onnx --to web lenet5_web --against lenet5.pt --data mnist.npz
    """
    from ecqx_onnx import api

    with show_progress(quiet or as_json) as progress:
        result = api.deploy(
            onnx_file,
            folder,
            to=to,
            against=against,
            data=data,
            factory=factory,
            input_shape=parse_shape(input_shape),
            samples=samples,
            labels=tuple(part.strip() for part in labels.split(",")) if labels else (),
            trust_pickle=trust_pickle,
            force=force,
            progress=progress,
        )
    emit(result, as_json=as_json, quiet=quiet)


@register_command
def report(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt", help="A checkpoint of ours.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page to look at: each weight's levels, zeros and entropy, relevance against magnitude, training curves, warnings.

    Example:  ecqx-onnx report lenet5.pt -o report.html
    """
    from ecqx_onnx.reporting import write_report

    emit(write_report(model, out, force=force), as_json=as_json, quiet=quiet)


@register_command
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where the checkpoint and the .onnx file go.")
    ] = Path("demo"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small CNN on handwritten digits, quantise, convert and validate it. No download, about a minute.

    Example:  ecqx-onnx demo
    """
    from ecqx_onnx.demo.demo import run_demo

    with show_progress(quiet or as_json) as progress:
        result = run_demo(folder, force=force, progress=progress)
    emit(result, as_json=as_json, quiet=quiet)
    if not result.ok:
        raise CheckFailed(
            "the converted model does not say the same as PyTorch; the table shows which check failed"
        )


def _emit_devices(table: Any, *, as_json: bool, quiet: bool) -> None:
    """One device as its report, several side by side; then the status: 2 if one gave no result, 1 if a check failed."""
    single = len(table.reports) == 1 and not table.troubles
    if table.reports:
        emit(table.reports[0] if single else table, as_json=as_json, quiet=quiet)
    if table.troubles:
        raise InputError("; ".join(trouble.sentence for trouble in table.troubles))
    if not table.ok:
        named = ((report.device, check) for report in table.reports for check in report.failures)
        raise CheckFailed(
            "; ".join(f"{device}: {check.name}: {check.sentence}" for device, check in named)
        )


@device_app.command("setup")
@guard
@refuse_json_and_output
def device_setup(
    device: Annotated[str, typer.Argument(help="web, node or arm64.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a device's runtime into ~/.cache/ecqx-onnx, without root. Delete it there to undo.

    Example:  ecqx-onnx device setup arm64
    """
    from ecqx_onnx.validation.devices import find_device, set_up

    with show_progress(quiet or as_json) as progress:
        folder = set_up(device, progress=progress)
    find_device(device)
    if as_json:
        print(
            json.dumps({"device": device, "ready": True, "folder": str(folder)}),
            file=_json_file.get(),
        )
    elif not quiet:
        stdout.print(escape(f"{device} is ready: {folder}"), soft_wrap=True, highlight=False)


@device_app.command("list")
@guard
@refuse_json_and_output
def device_list(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show the devices, which of them are ready on this machine, and what the others need.

    Example:  ecqx-onnx device list
    """
    from ecqx_onnx.validation.devices import check_readiness

    emit(check_readiness(), as_json=as_json, quiet=quiet)


def parse_numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(
            f"{option} {text!r} is not a list of numbers; write one value, or one per channel with commas: 0.49,0.48,0.45"
        ) from None


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 0 < int(part) < 2**31 for part in parts):
        raise OptionError(
            f"--input-shape {text!r} is not a list of positive integers; write it without the batch: 3,32,32"
        )
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    main()
