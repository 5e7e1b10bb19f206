"""MODEL as users have it -> an nn.Module: a factory in a Python file, a state dict, a .pt2 program, a trusted pickle."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.checkpoint.checkpoint import is_checkpoint
from ecqx_onnx.errors import FileError, ModelError, OptionError
from ecqx_onnx.inputs.program.program import load_program
from ecqx_onnx.inputs.safetensors_file import is_safetensors, read_safetensors
from ecqx_onnx.inputs.torch_file import is_program, load_plain
from ecqx_onnx.inputs.user_code import is_function_spec, run_file
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

COMPILED = "_orig_mod."  # what torch.compile puts before names
DEEPEST = 4  # dicts around a state dict
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "weights",
)  # keys under which training scripts put the state dict


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and what its file says about its input: the shape without the batch, and the preprocessing; None if nothing.

    notes: what was done to the weights, a sentence each.
    """

    model: Any  # nn.Module, ExportedProgram or Quantizer
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()


def load_factory(spec: str) -> Loaded:
    """'FILE.py:FACTORY' -> what FACTORY() returns, with INPUT_SHAPE and PREPROCESSING of the file where it has them.

    Runs the user's own Python file. FileError or ModelError with the reason when that does not give an nn.Module.
    """
    if not is_function_spec(spec):
        raise OptionError(
            f"{spec!r} does not name a model; write FILE.py:FACTORY, for example models/lenet5.py:lenet5"
        )
    file, _, name = spec.rpartition(":")
    own = vars(run_file(file))
    factory = own.get(name)
    if not callable(factory):
        raise FileError(f"{file} has no function '{name}': check the name in '{spec}'")
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(
            f"{spec}() failed with {type(error).__name__}: {error}; it must work without arguments"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(
            f"{spec}() returned {type(model).__name__}, not a torch.nn.Module; return the network"
        )
    home = (
        vars(inspect.getmodule(factory) or object)
        if inspect.isclass(factory)
        else getattr(factory, "__globals__", {})
    )
    names = {
        **home,
        **own,
    }  # a factory that was imported from elsewhere: what stands beside the import comes first
    return Loaded(
        model,
        read_input_shape(names.get("INPUT_SHAPE"), file),
        read_preprocessing(names.get("PREPROCESSING"), file),
    )


def read_input_shape(shape: Any, file: str) -> tuple[int, ...] | None:
    if shape is None:
        return None
    lengths = shape if isinstance(shape, list | tuple | torch.Size) else (None,)
    if not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ModelError(
            f"INPUT_SHAPE in {file} is {shape!r}: write the shape of one sample, such as (3, 32, 32)"
        )
    return tuple(lengths)


def read_preprocessing(found: Any, file: str) -> Preprocessing | None:
    if found is not None and not isinstance(found, Preprocessing):
        raise ModelError(
            f"PREPROCESSING in {file} is {type(found).__name__}: write ecqx_onnx.Preprocessing('image', scale=255.0), say"
        )
    return found


def load_state(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a file or a Hugging Face folder: bare, or wrapped in dicts of any name."""
    if is_safetensors(Path(path)):
        return read_safetensors(Path(path))
    return find_state(load_plain(path), path)


def apply_state(
    model: torch.nn.Module,
    state: dict[str, torch.Tensor],
    source: str | Path,
    *,
    strict: bool = True,
) -> tuple[str, ...]:
    """Load `state` into `model`.

    Args:
        model: is changed.
        state: its keys may have a prefix that the model's lack ("model.", "module.", "_orig_mod.", any that all share).
        source: what error messages call it.
        strict: False leaves what is missing as the model has it, and leaves out what is too many.

    Returns:
        Sentences on what was stripped, and on what was missing or left out.

    Raises:
        ModelError: names what is missing, left over or of another shape.
    """
    own = model.state_dict()
    state, notes = _without_prefix(state, set(own))
    # BatchNorm's step counter plays no part in inference, and old checkpoints lack it.
    missing = sorted(
        name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked")
    )
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{n} is {tuple(state[n].shape)}, the model wants {tuple(own[n].shape)}"
        for n in own.keys() & state.keys()
        if own[n].shape != state[n].shape
    ]
    parts = (
        [f"lacks {show_few(missing)}"] * bool(missing)
        + [f"has {show_few(extra)} too many"] * bool(extra)
        + [f"shape of {show_few(sorted(shapes))}"] * bool(shapes)
    )
    if shapes or (parts and strict) or len(missing) == len(own):
        advice = "name the network that it was trained in"
        if parts and not shapes and len(missing) < len(own):
            advice += ", or add --no-strict if what is missing or too many plays no part"
        raise ModelError(f"{source}: does not fit the model: {'; '.join(parts)}; {advice}")
    if parts:
        notes = (
            *notes,
            f"{Path(source).name} does not fit the model exactly and was taken all the same: {'; '.join(parts)}",
        )
    model.load_state_dict(state, strict=False)
    return notes


def _without_prefix(
    state: dict[str, torch.Tensor], wanted: set[str]
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The state by the model's names, as far as prefixes stand between them."""
    if any(COMPILED in name for name in state) and not any(COMPILED in name for name in wanted):
        state = {name.replace(COMPILED, ""): value for name, value in state.items()}
    stripped = ""
    while state and not wanted & state.keys():
        prefix = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(prefix) and name != prefix for name in state):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
        stripped += prefix
    return state, (
        f"the prefix '{stripped}' that all weights had was left out",
    ) if stripped else ()


def load_model(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False, strict: bool = True
) -> Loaded:
    """A .pt2 program, a state dict with its factory, or a trusted pickled module. strict: see apply_state."""
    path = Path(path)
    if is_safetensors(path) and factory is None:
        raise ModelError(
            f"{path}: holds weights, which have no network in them; add --model FILE.py:FACTORY"
        )
    if not is_safetensors(path) and is_program(path):
        return Loaded(load_program(path.read_bytes(), str(path)))
    if factory is not None:
        loaded = load_factory(factory)
        notes = apply_state(loaded.model, load_state(path), path, strict=strict)
        loaded.model.eval()
        return replace(loaded, notes=notes)
    if trust_pickle:
        try:
            model = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # unpickling runs the author's code, which may raise anything
            raise FileError(
                f"{path}: cannot be unpickled ({type(error).__name__}: {error}); run this where its modules can be imported"
            ) from error
        if isinstance(model, torch.nn.Module):
            return Loaded(model.eval())
    else:
        document = load_plain(path)  # says it better when the file is damaged or a pickle
        if not is_checkpoint(document):
            find_state(document, path)
    raise ModelError(
        f"{path}: is a state dict, which has no network in it; add --model FILE.py:FACTORY"
    )


def find_state(document: Any, path: str | Path) -> dict[str, torch.Tensor]:
    if is_checkpoint(document):
        raise ModelError(
            f"{path}: is a checkpoint of ecqx-onnx, quantised already and with its network in it, where a float state dict"
            " is needed; leave --model out, or give the float weights"
        )
    state = _innermost(document)
    if state is None:
        raise ModelError(
            f"{path}: holds no state dict; save one with torch.save(model.state_dict(), FILE)"
        )
    return {str(name): value for name, value in state.items()}


def _innermost(document: Any, depth: int = 0) -> dict[Any, torch.Tensor] | None:
    """The state dict in nested dicts: under a usual key first, else under the one key that holds such; None if there is none."""
    if not isinstance(document, dict) or not document or depth > DEEPEST:
        return None
    if all(isinstance(value, torch.Tensor) for value in document.values()):
        return document
    usual = [key for key in WRAPPERS if isinstance(document.get(key), dict)]
    others = [key for key in document if key not in usual]
    for keys in (usual, others):
        found = [
            state for key in keys if (state := _innermost(document[key], depth + 1)) is not None
        ]
        if found and (keys is usual or len(found) == 1):
            return found[0]
    return None


def show_few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
