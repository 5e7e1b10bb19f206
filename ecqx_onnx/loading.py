"""MODEL as users have it -> an nn.Module: a factory in a Python file, a state dict, a .pt2 program, a trusted pickle."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.checkpoint import is_checkpoint
from ecqx_onnx.errors import FileError, ModelError, OptionError
from ecqx_onnx.preprocessing import Preprocessing
from ecqx_onnx.program import load_program
from ecqx_onnx.torch_file import is_program, load_plain
from ecqx_onnx.user_code import is_function_spec, run_file

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys under which training scripts put the state dict


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and what its file says about its input: the shape without the batch, and the preprocessing; None if nothing."""

    model: Any  # nn.Module, ExportedProgram or Quantizer
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None


def load_factory(spec: str) -> Loaded:
    """'FILE.py:FACTORY' -> what FACTORY() returns, with INPUT_SHAPE and PREPROCESSING of the file where it has them.

    Runs the user's own Python file. FileError or ModelError with the reason when that does not give an nn.Module.
    """
    if not is_function_spec(spec):
        raise OptionError(f"{spec!r} does not name a model; write FILE.py:FACTORY, for example models/lenet5.py:lenet5")
    file, _, name = spec.rpartition(":")
    own = vars(run_file(file))
    factory = own.get(name)
    if not callable(factory):
        raise FileError(f"{file} has no function '{name}': check the name in '{spec}'")
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f"{spec}() failed with {type(error).__name__}: {error}; it must work without arguments") from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{spec}() returned {type(model).__name__}, not a torch.nn.Module; return the network")
    home = vars(inspect.getmodule(factory) or object) if inspect.isclass(factory) else getattr(factory, "__globals__", {})
    names = {**home, **own}  # a factory that was imported from elsewhere: what stands beside the import comes first
    return Loaded(model, _input_shape(names.get("INPUT_SHAPE"), file), _preprocessing(names.get("PREPROCESSING"), file))


def _input_shape(shape: Any, file: str) -> tuple[int, ...] | None:
    if shape is None:
        return None
    lengths = shape if isinstance(shape, list | tuple | torch.Size) else (None,)
    if not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ModelError(f"INPUT_SHAPE in {file} is {shape!r}: write the shape of one sample, such as (3, 32, 32)")
    return tuple(lengths)


def _preprocessing(found: Any, file: str) -> Preprocessing | None:
    if found is not None and not isinstance(found, Preprocessing):
        raise ModelError(
            f"PREPROCESSING in {file} is {type(found).__name__}: write ecqx_onnx.Preprocessing('image', scale=255.0), say"
        )
    return found


def load_state(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a file: bare, or wrapped under a usual key; DataParallel's 'module.' prefix is dropped."""
    document = load_plain(path)
    return _state_of(document, path)


def apply_state(model: torch.nn.Module, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load `state` into `model`, strictly. ModelError names what is missing, left over or of another shape."""
    own = model.state_dict()
    # BatchNorm's step counter plays no part in inference, and old checkpoints lack it.
    missing = sorted(name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked"))
    extra = sorted(state.keys() - own.keys())
    shapes = [
        f"{n} is {tuple(state[n].shape)}, the model wants {tuple(own[n].shape)}"
        for n in own.keys() & state.keys()
        if own[n].shape != state[n].shape
    ]
    if missing or extra or shapes:
        parts = (
            [f"lacks {_few(missing)}"] * bool(missing)
            + [f"has {_few(extra)} too many"] * bool(extra)
            + [f"shape of {_few(sorted(shapes))}"] * bool(shapes)
        )
        raise ModelError(f"{source}: does not fit the model: {'; '.join(parts)}; name the network that it was trained in")
    model.load_state_dict(state, strict=False)


def load_model(path: str | Path, *, factory: str | None = None, trust_pickle: bool = False) -> Loaded:
    """A .pt2 program, a state dict with its factory, or a trusted pickled module."""
    path = Path(path)
    if is_program(path):
        return Loaded(load_program(path.read_bytes(), str(path)))
    if factory is not None:
        loaded = load_factory(factory)
        apply_state(loaded.model, load_state(path), path)
        loaded.model.eval()
        return loaded
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
            _state_of(document, path)
    raise ModelError(f"{path}: is a state dict, which has no network in it; add --model FILE.py:FACTORY")


def _state_of(document: Any, path: str | Path) -> dict[str, torch.Tensor]:
    if is_checkpoint(document):
        raise ModelError(
            f"{path}: is a checkpoint of ecqx-onnx, quantised already and with its network in it, where a float state dict"
            " is needed; leave --model out, or give the float weights"
        )
    if isinstance(document, dict):
        for key in WRAPPERS:
            if isinstance(document.get(key), dict):
                document = document[key]
                break
    if not isinstance(document, dict) or not document or not all(isinstance(v, torch.Tensor) for v in document.values()):
        raise ModelError(f"{path}: holds no state dict; save one with torch.save(model.state_dict(), FILE)")
    if all(str(name).startswith("module.") for name in document):
        document = {str(name).removeprefix("module."): value for name, value in document.items()}
    return {str(name): value for name, value in document.items()}


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
