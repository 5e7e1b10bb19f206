"""Load the network that a user names as MODEL.

It is a factory in a Python file, a state dict with its factory, a .pt2 program, or a pickled module
that the user trusts.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ecqx_onnx.checkpoint.checkpoint import is_checkpoint
from ecqx_onnx.errors import FileError, ModelError, OptionError
from ecqx_onnx.inputs.program.program import load_program
from ecqx_onnx.inputs.safetensors_file import is_safetensors, read_safetensors
from ecqx_onnx.inputs.torch_file import is_program, load_plain
from ecqx_onnx.inputs.torchvision_import import import_beside_torchvision
from ecqx_onnx.inputs.user_code import is_function_spec, run_file
from ecqx_onnx.preprocessing.preprocessing import Preprocessing

COMPILED = "_orig_mod."  # what torch.compile puts before names
DEEPEST = 4  # dicts around a state dict
# Keys under which training scripts put the state dict.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A network and what its file says about its input.

    Attributes:
        model: an nn.Module, an ExportedProgram or a Quantizer.
        input_shape: without the batch; None if nothing is said.
        example: what the network is called with; None if nothing is said.
        preprocessing: of raw samples; None if nothing is said.
        notes: what was done to the weights, a sentence each.
        labels: names of the classes; empty if nothing is said.
    """

    model: Any  # nn.Module, ExportedProgram or Quantizer
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    notes: tuple[str, ...] = ()
    example: Any = None
    labels: tuple[str, ...] = ()


def load_factory(spec: str) -> Loaded:
    """Run the user's Python file and build the network that a factory in it returns.

    Args:
        spec: "FILE.py:FACTORY".

    Returns:
        What FACTORY() returns, with INPUT_SHAPE, PREPROCESSING, LABELS and EXAMPLE (or what
        example_inputs() returns) of the file where it has them.

    Raises:
        OptionError: if `spec` is of another form.
        FileError: if the file is missing, fails, or has no such function.
        ModelError: if the factory fails or gives no nn.Module.
    """
    if not is_function_spec(spec):
        raise OptionError(
            f"{spec!r} does not name a model; write FILE.py:FACTORY, for example"
            " models/lenet5.py:lenet5"
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
    # The factory may be imported from elsewhere: what stands beside the import comes first.
    names = {**_find_home(factory), **own}
    return Loaded(
        model,
        _read_input_shape(names.get("INPUT_SHAPE"), file),
        _read_preprocessing(names.get("PREPROCESSING"), file),
        example=_read_example(names, file),
        labels=_read_labels(names.get("LABELS"), file),
    )


def _find_home(factory: Any) -> Mapping[str, Any]:
    """The names in the module that a factory was defined in."""
    if inspect.isclass(factory):
        return vars(inspect.getmodule(factory) or object)
    return getattr(factory, "__globals__", {})


def _read_input_shape(shape: Any, file: str) -> tuple[int, ...] | None:
    if shape is None:
        return None
    lengths = shape if isinstance(shape, list | tuple | torch.Size) else (None,)
    if not all(isinstance(length, int) and length > 0 for length in lengths):
        raise ModelError(
            f"INPUT_SHAPE in {file} is {shape!r}: write the shape of one sample, such as (3, 32,"
            " 32)"
        )
    return tuple(lengths)


def _read_example(names: Mapping[str, Any], file: str) -> Any:
    """EXAMPLE, or what example_inputs() returns: a tensor, or a tuple or mapping of arguments."""
    found = names.get("EXAMPLE")
    make = names.get("example_inputs")
    if found is None and callable(make):
        try:
            found = make()
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise ModelError(
                f"example_inputs() in {file} failed with {type(error).__name__}: {error}"
            ) from error
    if found is None or isinstance(found, torch.Tensor | tuple | list | Mapping):
        return found
    raise ModelError(
        f"EXAMPLE in {file} is {type(found).__name__}: write a tensor, a tuple of the forward's"
        " arguments, or {'name': tensor}"
    )


def _read_labels(found: Any, file: str) -> tuple[str, ...]:
    if found is None:
        return ()
    names = tuple(found) if isinstance(found, list | tuple) else (None,)
    if not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"LABELS in {file} is {type(found).__name__}: write the classes' names in a list,"
            " such as ['cat', 'dog']"
        )
    return names


def _read_preprocessing(found: Any, file: str) -> Preprocessing | None:
    if found is not None and not isinstance(found, Preprocessing):
        raise ModelError(
            f"PREPROCESSING in {file} is {type(found).__name__}: write"
            " ecqx_onnx.Preprocessing('image', scale=255.0), say"
        )
    return found


def load_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict.

    Args:
        path: of a file, or of a folder that Hugging Face's tools wrote. The state dict may be
            wrapped in dicts, by any name.

    Returns:
        Tensors by their names.
    """
    if is_safetensors(Path(path)):
        return read_safetensors(Path(path))
    return _find_state(load_plain(path), path)


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
        state: its keys may have a prefix that the model's lack ("model.", "module.", "_orig_mod.",
            any that all share).
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
    shapes = []
    for name in own.keys() & state.keys():
        found = tuple(state[name].shape)
        wanted = tuple(own[name].shape)
        if found != wanted:
            shapes.append(f"{name} is {found}, the model wants {wanted}")
    parts = []
    if missing:
        parts.append(f"lacks {_show_few(missing)}")
    if extra:
        parts.append(f"has {_show_few(extra)} too many")
    if shapes:
        parts.append(f"shape of {_show_few(sorted(shapes))}")
    if shapes or (parts and strict) or len(missing) == len(own):
        advice = "name the network that it was trained in"
        if parts and not shapes and len(missing) < len(own):
            advice += ", or add --no-strict if what is missing or too many plays no part"
        raise ModelError(f"{source}: does not fit the model: {'; '.join(parts)}; {advice}")
    if parts:
        notes = (
            *notes,
            f"{Path(source).name} does not fit the model exactly and was taken all the same:"
            f" {'; '.join(parts)}",
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
    if not stripped:
        return state, ()
    return state, (f"the prefix '{stripped}' that all weights had was left out",)


def load_model(
    path: str | Path, *, factory: str | None = None, trust_pickle: bool = False, strict: bool = True
) -> Loaded:
    """Load a network from a file that holds it or its weights.

    Args:
        path: of a .pt2 program, a state dict, or a pickled module.
        factory: "FILE.py:FACTORY" of the network that a state dict belongs to.
        trust_pickle: unpickle the file, which runs its author's code.
        strict: see `apply_state`.

    Returns:
        The network, in evaluation mode if it is a module.

    Raises:
        FileError: if the file is missing, damaged or of another kind.
        ModelError: if there is no network in it, or the weights do not fit the factory's.
    """
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
            with _import_from_here():
                model = import_beside_torchvision(
                    lambda: torch.load(path, map_location="cpu", weights_only=False)
                )
        except Exception as error:  # unpickling runs the author's code, which may raise anything
            raise FileError(
                f"{path}: cannot be unpickled ({type(error).__name__}: {error});"
                f" {_advise_on_pickle(error)}"
            ) from error
        if isinstance(model, torch.nn.Module):
            return Loaded(model.eval())
    else:
        document = load_plain(path)  # says it better when the file is damaged or a pickle
        if not is_checkpoint(document):
            _find_state(document, path)
    raise ModelError(
        f"{path}: is a state dict, which has no network in it; add --model FILE.py:FACTORY"
    )


@contextlib.contextmanager
def _import_from_here() -> Iterator[None]:
    """The current folder is importable, as for a script that lies there."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _advise_on_pickle(error: Exception) -> str:
    if "__main__" in str(error):
        return (
            "the script that saved it defined the class itself: save model.state_dict() there and"
            " name the class with --model FILE.py:CLASS"
        )
    return "run this in a folder from which its modules can be imported"


def _find_state(document: Any, path: str | Path) -> dict[str, torch.Tensor]:
    if is_checkpoint(document):
        raise ModelError(
            f"{path}: is a checkpoint of ecqx-onnx, quantised already and with its network in it,"
            " where a float state dict"
            " is needed; leave --model out, or give the float weights"
        )
    state = _find_innermost(document)
    if state is None:
        raise ModelError(
            f"{path}: holds no state dict; save one with torch.save(model.state_dict(), FILE)"
        )
    return {str(name): value for name, value in state.items()}


def _find_innermost(document: Any, depth: int = 0) -> dict[Any, torch.Tensor] | None:
    """The state dict in nested dicts; None if there is none.

    It lies under a usual key, else under the one key that holds such.
    """
    if not isinstance(document, dict) or not document or depth > DEEPEST:
        return None
    if all(isinstance(value, torch.Tensor) for value in document.values()):
        return document
    usual = [key for key in WRAPPERS if isinstance(document.get(key), dict)]
    others = [key for key in document if key not in usual]
    for keys in (usual, others):
        inner = [_find_innermost(document[key], depth + 1) for key in keys]
        found = [state for state in inner if state is not None]
        if found and (keys is usual or len(found) == 1):
            return found[0]
    return None


def _show_few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
