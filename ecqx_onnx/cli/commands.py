"""The commands that look at files, write folders and pages, show the demo and set up devices."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ecqx_onnx.cli.arguments import (
    Factory,
    Force,
    InputShape,
    Json,
    Quiet,
    Strict,
    TrustPickle,
    make_argument,
    make_option,
    parse_names,
)
from ecqx_onnx.cli.frame import (
    device_app,
    emit,
    print_json,
    refuse_json_and_output,
    register_command,
    show_progress,
    suggest,
)
from ecqx_onnx.cli.terminal import escape, guard, stdout
from ecqx_onnx.errors import CheckFailed, OptionError
from ecqx_onnx.options.deploy import DeployOptions
from ecqx_onnx.options.input_shape import parse_input_shape


@register_command
def inspect(
    file: Annotated[Path, typer.Argument(help="An .onnx file or a checkpoint of ours.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what is in a file: bits, zeros, entropy and bytes of each weight, and every other byte.

    Example:  ecqx-onnx inspect lenet5.onnx
    """
    from ecqx_onnx.inspection import inspect as inspect_file

    emit(inspect_file(file), as_json=as_json, quiet=quiet)


@register_command
def targets(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the runtimes that `convert --target` writes for, and what the file of each can hold.

    Example:  ecqx-onnx targets
    """
    from ecqx_onnx.cli.tables import TargetTable

    emit(TargetTable(), as_json=as_json, quiet=quiet)


def _deploy_option(name: str) -> Any:
    return make_option(DeployOptions, name)


@register_command
def deploy(
    onnx_file: Annotated[Path, make_argument(DeployOptions, "onnx_file", metavar="FILE.onnx")],
    folder: Annotated[Path, make_argument(DeployOptions, "folder", metavar="DIR")],
    to: Annotated[str, _deploy_option("to")],
    against: Annotated[Path | None, _deploy_option("against")] = None,
    data: Annotated[str | None, _deploy_option("data")] = None,
    factory: Factory = None,
    input_shape: InputShape = None,
    labels: Annotated[str | None, _deploy_option("labels")] = None,
    title: Annotated[str, _deploy_option("title")] = "",
    webgpu: Annotated[bool, _deploy_option("webgpu")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="For the web: serve the folder at once, until Ctrl-C.")
    ] = False,
    card: Annotated[str, _deploy_option("card")] = "",
    samples: Annotated[int | None, _deploy_option("samples")] = None,
    strict: Strict = True,
    trust_pickle: TrustPickle = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a folder that is ready to use on a platform, once the model in it is validated.

    In it: model, manifest, golden outputs, a runner that checks itself against them, README.

    Example:  ecqx-onnx deploy lenet5.onnx --to web lenet5_web --against lenet5.pt --data mnist.npz
    """
    from ecqx_onnx import api

    if serve and (to != "web" or as_json):
        raise OptionError("--serve is for --to web, and not together with --json; leave it out")
    with show_progress(quiet or as_json, "validating the file") as progress:
        result = api.deploy(
            onnx_file,
            folder,
            to=to,
            against=against,
            data=data,
            factory=factory,
            input_shape=parse_input_shape(input_shape),
            samples=samples,
            labels=parse_names(labels),
            title=title,
            webgpu=webgpu,
            card=card,
            strict=strict,
            trust_pickle=trust_pickle,
            force=force,
            progress=progress,
        )
    emit(result, as_json=as_json, quiet=quiet)
    if serve:
        _serve(folder, 0)
    elif to == "web":
        suggest("serve", folder, as_json=as_json, quiet=quiet)


@register_command
def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of `ecqx-onnx deploy --to web`.")
    ],
    port: Annotated[
        int, typer.Option(help="The port to listen on; 0 takes any that is free.")
    ] = 8000,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a deployed page to the browsers of this machine, until Ctrl-C.

    Example:  ecqx-onnx serve lenet5_web
    """
    _serve(folder, port, as_json=as_json, quiet=quiet)


def _serve(folder: Path, port: int, *, as_json: bool = False, quiet: bool = False) -> None:
    """Say where the page is, and serve it until Ctrl-C, which is how this ends well."""
    from ecqx_onnx.deployment.serving import open_server

    with open_server(folder, port=port) as server:
        if as_json:
            print_json({"folder": str(folder), "url": server.url})
        elif not quiet:
            words = f"open {server.url} in a browser; Ctrl-C ends it"
            stdout.print(escape(words), soft_wrap=True, highlight=False)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@register_command
def report(
    model: Annotated[Path, typer.Argument(metavar="MODEL.pt", help="A checkpoint of ours.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML page to write.")] = Path(
        "report.html"
    ),
    onnx_file: Annotated[
        Path | None,
        typer.Option(
            "--onnx",
            metavar="FILE.onnx",
            help="The file converted from it; by default the one of its name beside it.",
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about a trained model: levels, relevance against magnitude, curves, warnings.

    Example:  ecqx-onnx report lenet5.pt -o report.html
    """
    from ecqx_onnx.reporting import write_report

    emit(write_report(model, out, onnx_file=onnx_file, force=force), as_json=as_json, quiet=quiet)


@register_command
def demo(
    folder: Annotated[
        Path, typer.Option(help="Where the checkpoint and the .onnx file go.")
    ] = Path("demo"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small CNN on handwritten digits, quantise, convert and validate it.

    No download, about a minute.

    Example:  ecqx-onnx demo
    """
    from ecqx_onnx.demo.demo import run_demo

    with show_progress(quiet or as_json, "making the network and the data") as progress:
        result = run_demo(folder, force=force, progress=progress)
    emit(result, as_json=as_json, quiet=quiet)
    model = folder / "model"
    given = ("--against", f"{model}.pt", "--data", "sklearn:digits")
    following = ("deploy", f"{model}.onnx", "--to", "web", folder / "web", *given)
    suggest(*following, as_json=as_json, quiet=quiet)
    if not result.ok:
        raise CheckFailed(
            "the converted model does not say the same as PyTorch; the table shows which check"
            " failed"
        )


@register_command
def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show versions, devices that are ready, what is missing, and the command that brings it.

    Exit status 1 if a package is missing that every command needs.

    Example:  ecqx-onnx doctor
    """
    from ecqx_onnx.doctor import examine

    found = examine()
    emit(found, as_json=as_json, quiet=quiet)
    if not found.ok:
        names = ", ".join(package.name for package in found.broken)
        raise CheckFailed(f"missing or too old: {names}; the commands above bring them")


@device_app.command("setup")
@guard
@refuse_json_and_output
def device_setup(
    device: Annotated[str, typer.Argument(help="The device: web, node or arm64; or webgpu.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a device's runtime into ~/.cache/ecqx-onnx, without root. Delete it there to undo.

    Example:  ecqx-onnx device setup arm64
    """
    from ecqx_onnx.validation.devices import find_device, set_up

    with show_progress(quiet or as_json, "looking what is there") as progress:
        folder = set_up(device, progress=progress)
    if device != "webgpu":  # a part of folders for the web, and no device
        find_device(device)
    if as_json:
        print_json({"device": device, "ready": True, "folder": str(folder)})
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
