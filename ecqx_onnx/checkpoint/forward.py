"""A module's forward as ONNX can have it: tensors in by name, tensors out by name.

Enters what users call their models with: a tensor, a tuple, a mapping of arguments, lists of
tensors, numbers and flags among them. What is no tensor is fixed. Out come tensors: the entries of
a dict, a dataclass or a ModelOutput under their names; None and what is no tensor is left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ecqx_onnx.errors import ModelError

Example = Any  # Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a forward is called with, its tensors apart.

    Attributes:
        tensors: in the order of the forward's parameters, each a tensor of its own.
        names: one each, for what is not simply passed by position; else None.
        leaves: all values, with None where a tensor belongs.
        spec: what `leaves` were flattened from: (args, kwargs).
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...] | None
    leaves: tuple[Any, ...]
    spec: TreeSpec

    def replace_tensors(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The call with other tensors.

        Args:
            tensors: as many as there are, in their order.

        Returns:
            (args, kwargs).
        """
        given = iter(tensors)
        is_tensor = self._places()
        values = [
            next(given) if here else leaf for here, leaf in zip(is_tensor, self.leaves, strict=True)
        ]
        args, kwargs = tree_unflatten(values, self.spec)
        return args, kwargs

    def _places(self) -> list[bool]:
        return [leaf is _PLACE for leaf in self.leaves]


class _Place:
    """Stands for a tensor among values that are fixed."""


_PLACE = _Place()


def divide_arguments(model: torch.nn.Module, example: Example) -> Arguments:
    """Divide what a model is called with into tensors and what is fixed.

    Args:
        model: whose forward is called.
        example: a tensor, a tuple of arguments, or a mapping of arguments by name.

    Returns:
        The arguments; floats of the tensors in the model's own type, no two sharing memory.

    Raises:
        ModelError: a name is none of the forward's, or there is no tensor.
    """
    if isinstance(example, Mapping):
        args, kwargs = (), _sort_by_signature(model, example)
    else:
        args = tuple(example) if isinstance(example, list | tuple) else (example,)
        kwargs = {}
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise ModelError("the example holds no tensor: give the model's input, or a tuple of them")
    is_plain = not kwargs and len(args) == len(tensors) == len(leaves)
    names = None if is_plain else _name_tensors(model, args, kwargs)
    places = tuple(_PLACE if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Arguments(_separate(tensors, model), names, places, spec)


def _sort_by_signature(model: torch.nn.Module, example: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments in the order of the forward's parameters."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in example:
        if name not in parameters and not takes_any:
            known = ", ".join(list(parameters)[:12])
            raise ModelError(
                f"the model's forward has no argument '{name}' that the example names: it has"
                f" {known}"
            )
    first = {name: example[name] for name in parameters if name in example}
    return {**first, **{name: value for name, value in example.items() if name not in first}}


def _name_tensors(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """A name for each tensor: of its argument, numbered where that holds several."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.items()
    own = [name for name, parameter in parameters if parameter.kind in kinds]
    positional = [own[i] if i < len(own) else f"input_{i}" for i in range(len(args))]
    found: list[str] = []
    for name, value in (*zip(positional, args, strict=True), *kwargs.items()):
        count = sum(isinstance(leaf, Tensor) for leaf in tree_flatten(value)[0])
        names = [name] if isinstance(value, Tensor) else [f"{name}_{i}" for i in range(count)]
        found += names
    return tuple(found)


def _separate(tensors: Sequence[Tensor], model: torch.nn.Module) -> tuple[Tensor, ...]:
    """Tensors of their own: the tracer takes arguments that share memory for one input."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    wanted = next(iter(types)) if len(types) == 1 else None
    separate = tuple(tensor.detach().clone() for tensor in tensors)
    if wanted is None:
        return separate
    return tuple(x.to(wanted) if x.is_floating_point() else x for x in separate)


@dataclass(eq=False)
class Told:
    """What an adapted forward had to leave out, as sentences."""

    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each."""
        return tuple(
            f"the output '{name}' is a {kind}, no tensor: the file leaves it out"
            for name, kind in self.left_out.items()
        )


@contextlib.contextmanager
def adapt_forward(model: torch.nn.Module, arguments: Arguments) -> Iterator[Told]:
    """Let a model's forward take and return tensors, in the model itself, for a while.

    Args:
        model: its `forward` is replaced, and given back.
        arguments: what it is called with.

    Yields:
        What was left out of its outputs, known once it has run.
    """
    own = vars(model).get("forward")  # of the instance, not of its class
    forward = model.forward
    told = Told()

    @functools.wraps(forward)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        if arguments.names is not None:
            args, kwargs = arguments.replace_tensors(given)
        return _arrange_outputs(forward(*args, **kwargs), given, told)

    if arguments.names is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in arguments.names]
        adapted.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    try:
        model.forward = adapted
    except (AttributeError, RuntimeError, TypeError):  # TorchScript keeps its forward
        yield told
        return
    try:
        yield told
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _arrange_outputs(value: Any, given: Sequence[Any], told: Told) -> Any:
    """Outputs as the exporter takes them; an input that is returned is a copy of it."""
    if isinstance(value, Tensor):
        return value.clone() if any(value is one for one in given) else value
    named = _name_entries(value)
    if named is not None:
        found: dict[str, Tensor] = {}
        for name, entry in named.items():
            _collect(name, entry, found, told)
        return {name: _arrange_outputs(entry, given, told) for name, entry in found.items()}
    if isinstance(value, list | tuple):
        kept = [entry for entry in value if entry is not None]
        arranged = [_arrange_outputs(entry, given, told) for entry in kept]
        return arranged if isinstance(value, list) else tuple(arranged)
    return value


def _name_entries(value: Any) -> dict[str, Any] | None:
    """The entries of what has named ones: a mapping, a dataclass, a namedtuple."""
    if isinstance(value, Mapping):
        return {str(name): entry for name, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    return None


def _collect(name: str, value: Any, found: dict[str, Tensor], told: Told) -> None:
    """Put each tensor of an output into `found`, numbered or named after its place."""
    if isinstance(value, Tensor):
        found[name] = value
        return
    entries = _name_entries(value)
    if entries is None and isinstance(value, list | tuple):
        entries = {str(place): entry for place, entry in enumerate(value)}
    if entries is not None:
        for inner, entry in entries.items():
            _collect(f"{name}_{inner}", entry, found, told)
    elif value is not None:
        told.left_out[name] = type(value).__name__
