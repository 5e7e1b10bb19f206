"""Quantize the weights of a float model without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from ecqx_onnx.errors import InputError, ModelError, OptionError
from ecqx_onnx.quantization.levels.grid import Grid
from ecqx_onnx.quantization.weights import LOOKUPS, MATRIX_PRODUCTS, Weight
from ecqx_onnx.recognition.recognition import NotRecognized, recognize
from ecqx_onnx.tensors import QuantTensor

MANY_BITS = 6  # from here on, steps need no clipping and always go by channel
FEW_BITS = 3  # up to here, channels of convolutions have steps of their own, too
LONG_CHANNEL = 64  # weights that pay for a step of their own at fewer bits
PERCENTILE_FROM = 1000  # weights of a channel, of which a percentile leaves one out


@dataclass(frozen=True)
class WeightSelection:
    """Which of a float model's weights become quantized, and how: the options of `convert`.

    Attributes:
        bits: 2 to 8; None only recognizes weights that lie on few values.
        entropy_weight: lambda of ECQ: how much shorter code counts against exactness.
        include: patterns of names that are quantized whatever reads them.
        exclude: patterns of names that stay float.
        allow_float: a model none of whose weights is quantized is no error.
    """

    bits: int | None
    entropy_weight: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    allow_float: bool

    def check(self, names: Sequence[str]) -> None:
        """Check that every pattern matches something.

        Args:
            names: of the model's parameters.

        Raises:
            OptionError: for a pattern that matches none.
        """
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise OptionError(
                        f"--{option} '{pattern}' matches no parameter; the first is"
                        f" '{next(iter(names), '')}'"
                    )

    def is_included(self, name: str) -> bool:
        """Whether --include names a parameter.

        Args:
            name: of the parameter.

        Returns:
            True if a pattern matches it.
        """
        return any(fnmatchcase(name, pattern) for pattern in self.include)

    def is_excluded(self, name: str) -> bool:
        """Whether --exclude names a parameter.

        Args:
            name: of the parameter.

        Returns:
            True if a pattern matches it.
        """
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


def find_quantized_tensors(
    state: Mapping[str, torch.Tensor], weights: Mapping[str, Weight], chosen: WeightSelection
) -> tuple[QuantTensor, ...]:
    """Recognize the quantized weights of a state dict, or quantize them here where `bits` says so.

    With `bits` nothing but what the network multiplies is looked at; without, whatever lies on few
    values is recognized, since that loses nothing.

    Args:
        state: of the model.
        weights: what the network multiplies, see `find_weights`.
        chosen: the options.

    Returns:
        The quantized weights.

    Raises:
        ModelError: if there is none, or a weight is NaN or infinite.
        OptionError: for a pattern that matches nothing, or leaves nothing.
    """
    chosen.check(list(state))
    multiplied = {state[name].data_ptr(): weight for name, weight in weights.items()}
    seen: set[int] = set()
    found: list[QuantTensor] = []
    refusals: list[NotRecognized] = []
    unused: list[str] = []
    for name, value in state.items():
        is_matrix = value.is_floating_point() and value.ndim >= 2 and value.numel() > 0
        if not is_matrix or value.data_ptr() in seen or chosen.is_excluded(name):
            continue
        seen.add(value.data_ptr())
        weight = multiplied.get(value.data_ptr())
        used = weight is not None or chosen.is_included(name)
        if chosen.bits and not used:
            unused.append(name)
            continue
        values = value.detach().cpu().float().numpy()
        if not np.isfinite(values).all():
            if not used:
                continue
            raise ModelError(
                f"the weight {name!r} holds NaN or infinite values; train it again or repair it"
                " before converting"
            )
        result = recognize(name, values)
        if isinstance(result, NotRecognized) and chosen.bits:
            axis = 0
            if weight is not None and weight.operator in MATRIX_PRODUCTS:
                axis = weight.axis
            floats = value.detach().cpu().float()
            result = _quantize_weight(
                name,
                floats,
                chosen.bits,
                chosen.entropy_weight,
                axis=axis,
                is_summed=weight is None or _is_summed(weight),
            )
        if isinstance(result, QuantTensor):
            found.append(result)
        else:
            refusals.append(result)
    if not found and not chosen.allow_float:
        raise _explain_nothing(chosen, refusals, unused)
    return tuple(found)


def _explain_nothing(
    chosen: WeightSelection, refusals: Sequence[NotRecognized], unused: Sequence[str]
) -> InputError:
    """Why no weight is quantized, and what to do."""
    if chosen.bits and unused:
        return ModelError(
            f"no operator multiplies '{unused[0]}' or another parameter, so there is no weight"
            " to quantise; name what you want quantised with --include"
        )
    if chosen.bits and chosen.exclude:
        return OptionError(
            f"--exclude {' '.join(chosen.exclude)} leaves no weight to quantise; exclude fewer"
        )
    if not refusals:
        return ModelError(
            "the model has no weight of two or more dimensions, so there is nothing to"
            " quantise; give another"
        )
    first = f" ({refusals[0].name}: {refusals[0].reason})"
    return ModelError(
        f"the model's weights are float, none lies on few values{first}; "
        "train with `ecqx-onnx quantize`, or add --bits 4 to quantise without training"
    )


def _quantize_weight(
    name: str, weight: torch.Tensor, bits: int, entropy_weight: float, *, axis: int, is_summed: bool
) -> QuantTensor:
    """Quantize a weight without training.

    `axis` is that of the output channels; `is_summed` says that one channel is one output's sum.
    """
    from ecqx_onnx.quantization.levels.assignment import assign
    from ecqx_onnx.quantization.levels.grid import choose_grid
    from ecqx_onnx.quantization.levels.rounding import round_to_cancel
    from ecqx_onnx.tensors import Scale

    grid = choose_grid(weight, bits)
    channel = _choose_channel_axis(weight, bits, axis, is_summed=is_summed)
    step = _choose_step(weight, grid, channel)
    if entropy_weight:
        levels = assign(weight, step, grid, axis=channel, strength=entropy_weight).levels
    else:
        levels = round_to_cancel(weight, step, grid)
    return QuantTensor(name, levels.numpy(), Scale(step.numpy()))


def _is_summed(weight: Weight) -> bool:
    """Whether the weights of one index along axis 0, or of `axis`, make one output."""
    return weight.operator not in LOOKUPS and not weight.operator.startswith("conv_transpose")


def _choose_channel_axis(
    weight: torch.Tensor, bits: int, axis: int, *, is_summed: bool
) -> int | None:
    """The axis along which steps differ, None for one step.

    Measured at equal bytes (benchmarks/results/2026-12-01-compress.md): one step for all channels
    is what ruins a transformer; a channel of few weights does not pay for a step of its own at few
    bits.
    """
    entries = weight.numel() // weight.shape[axis]
    if bits >= MANY_BITS:
        return axis
    pays = weight.ndim == 2 or bits <= FEW_BITS
    return axis if pays and entries >= LONG_CHANNEL and is_summed else None


def _choose_step(weight: torch.Tensor, grid: Grid, channel: int | None) -> torch.Tensor:
    """Steps without clipping, where errors are to cancel or levels are many; else by least squares.

    A matrix of a transformer has single weights far outside, for which the whole channel would pay.
    """
    from ecqx_onnx.quantization.levels.grid import fit_step

    if channel is None:
        return fit_step(weight, grid)
    if grid.bits < MANY_BITS and weight.ndim == 2:
        return fit_step(weight, grid, axis=channel, rule="least_squares")
    others = tuple(place for place in range(weight.ndim) if place != channel)
    largest = weight.abs().amax(others, keepdim=True)
    if grid.bits < MANY_BITS and weight.numel() // weight.shape[channel] >= PERCENTILE_FROM:
        return fit_step(weight, grid, axis=channel, rule="percentile")
    smallest = torch.finfo(torch.float32).tiny
    # The largest entry of a channel becomes its highest level; channels of zeros may have any.
    fitted = (largest / max(grid.highest, -grid.lowest)).clamp(min=smallest)
    return torch.where(largest > 0, fitted, 1.0)
