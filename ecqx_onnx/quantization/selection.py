"""Which weights of a module the Quantizer quantizes, and why each other parameter stays float.

With an example the model is traced, and `weights.find_weights` decides: the rule of `convert
--bits`. Without one, or where torch cannot trace the model, its structure decides: the weights of
torch's layers, and what the code of a module's own forward multiplies. A weight that is computed in
every forward pass (weight_norm) stands there under its own name, W = f(g, v).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ecqx_onnx.quantization.forward_code import find_multiplied
from ecqx_onnx.quantization.operators import find_tensors
from ecqx_onnx.quantization.parametrizations import (
    Parametrized,
    compute_effective_weight,
    copy_module,
    find_parametrized,
    merge_parametrizations,
)
from ecqx_onnx.quantization.weights import Weight, find_weights

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *TRANSPOSED,
    *EMBEDDINGS,
    *(nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
)
CACHING = (nn.RNNBase,)  # their kernels read a list of weights that is made once
NO_WEIGHT = "bias, norm or scalar"
MAX_NORM = "an embedding with max_norm rescales its weight in every forward pass"


@dataclass(frozen=True, eq=False)
class Candidate:
    """One parameter, or one weight that is computed of others in every forward pass.

    Attributes:
        name: of the parameter in the state dict, or "layer.weight" of a computed weight.
        value: the parameter, or the computed weight as it is now.
        computed: who computes it; None for a parameter.
        axis: of its output channels.
        reason: why it stays float; None if it is a weight.
    """

    name: str
    value: Tensor
    computed: Parametrized | None
    axis: int
    reason: str | None


def find_candidates(model: nn.Module, example: Any = None) -> tuple[Candidate, ...]:
    """Look at every parameter of a model; nothing of the model changes.

    Args:
        model: any module.
        example: a batch as the model takes it, a tuple or mapping of its arguments; or None.

    Returns:
        One candidate for each parameter, in the order of the modules; a tied parameter is met
        once, first name first. What computed weights are computed from is left out.
    """
    traced = None
    if example is not None and _is_in_doubt(model):
        traced = _trace_weights(model, example)
    computed = {entry.name: entry for entry in find_parametrized(model)}
    sources: set[str] = set()
    for entry in computed.values():
        sources.update(entry.sources)
    multiplied = dict(_find_in_code(model))
    found: list[Candidate] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for short, value in module.named_parameters(recurse=False):
            name = f"{prefix}.{short}" if prefix else short
            if id(value) in seen or name in sources:
                continue
            seen.add(id(value))
            names = [name] if traced is None else _list_names(model, value)
            is_known = _is_layers_weight(module, short)
            axis, reason = _judge(names, module, value, traced, multiplied, is_known)
            found.append(Candidate(name, value, None, axis, reason))
        for entry in computed.values():
            if entry.layer == prefix:
                value = compute_effective_weight(model, entry)
                is_known = _is_layers_weight(module, entry.tensor)
                axis, reason = _judge([entry.name], module, value, traced, multiplied, is_known)
                if isinstance(module, CACHING):
                    reason = reason or entry.advice
                found.append(Candidate(entry.name, value, entry, axis, reason))
    return tuple(found)


def _judge(
    names: Sequence[str],
    module: nn.Module,
    value: Tensor,
    traced: Mapping[str, Weight] | None,
    multiplied: Mapping[int | str, int],
    is_known: bool,
) -> tuple[int, str | None]:
    """(axis of the output channels, why it stays float or None) for one parameter or weight."""
    kind = type(module).__name__
    axis = 1 if isinstance(module, TRANSPOSED + EMBEDDINGS) else 0
    if value.ndim < 2 or not value.is_floating_point():
        return axis, NO_WEIGHT
    if not value.numel():
        return axis, "empty"
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return axis, MAX_NORM
    if traced is not None:
        weight = next((traced[name] for name in names if name in traced), None)
        if weight is None and is_known and not isinstance(module, EMBEDDINGS):
            return axis, None  # computed with in a way that the trace does not follow
        if weight is None:
            return axis, f"parameter of {kind} that no operator multiplies on the example"
        return (axis if is_known else weight.axis), None
    if is_known:
        return axis, None
    in_code = multiplied.get(id(value), multiplied.get(names[0]))
    is_gain = value.numel() == max(value.shape)  # one number for each channel
    if in_code is not None and not is_gain:
        return in_code % value.ndim, None
    return axis, (
        f"parameter of {kind} whose code does not show that it is multiplied: if it is, give"
        " Quantizer(model, example=x), which traces it"
    )


def _is_in_doubt(model: nn.Module) -> bool:
    """Whether structure alone may be wrong: a table may hold positions, a matrix anything."""
    for module in model.modules():
        if isinstance(module, EMBEDDINGS):
            return True
        for short, value in module.named_parameters(recurse=False):
            if value.ndim >= 2 and not _is_layers_weight(module, short):
                return True
    return False


def _is_layers_weight(module: nn.Module, short: str) -> bool:
    """Whether torch's layer multiplies this parameter; a subclass may have gains beside it."""
    named = short == "weight" or short.startswith("weight_") or short.endswith("proj_weight")
    return isinstance(module, LAYERS) and named


def _list_names(model: nn.Module, value: Tensor) -> list[str]:
    """All names of a tied parameter."""
    named = model.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter is value]


def _find_in_code(model: nn.Module) -> Iterator[tuple[int | str, int]]:
    """(id of a parameter, or name of a computed weight; axis) for what forward code multiplies."""
    for prefix, module in model.named_modules():
        for path, axis in find_multiplied(module).items():
            try:
                value: Any = _follow(module, path)
            except AttributeError:  # a subclass may have dropped it
                continue
            if isinstance(value, nn.ParameterList | nn.ParameterDict):
                entries = value.values() if isinstance(value, nn.ParameterDict) else value
                yield from ((id(entry), axis) for entry in entries)
            elif isinstance(value, nn.Parameter):
                yield id(value), axis
            elif isinstance(value, Tensor):
                yield (f"{prefix}.{path}" if prefix else path), axis


def _follow(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        parametrized = nn.utils.parametrize.is_parametrized(value, part)
        # A parametrized weight is not computed just to see that it is one.
        value = torch.empty(0) if parametrized else getattr(value, part)
    return value


def _trace_weights(model: nn.Module, example: Any) -> Mapping[str, Weight] | None:
    """The weights that a trace finds; None where torch cannot trace the model."""
    try:
        copy = copy_module(model).eval()
        merge_parametrizations(copy)
        args, kwargs = _make_arguments(copy, example)
        copy.forward = _give_tensors_only(copy.forward)
        with _silence(), torch.no_grad():
            program = torch.export.export(copy, args, kwargs)
        return find_weights(program)
    except Exception:  # the network is anybody's, and torch raises anything
        return None


def _give_tensors_only(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward without what a trace cannot return, such as a cache beside the logits."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
            output = list(vars(output).values())
        return tuple(find_tensors(output))

    return call


def _make_arguments(model: nn.Module, example: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, on the model's device, no two sharing memory."""
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device

    def separate(value: Any) -> Any:
        return value.detach().clone().to(device) if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return (), {name: separate(value) for name, value in example.items()}
    several = example if isinstance(example, list | tuple) else (example,)
    return tuple(separate(value) for value in several), {}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """torch's tracer warns of its own internals; none of it is for our users."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
