"""Quantize the weights of a float model without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from ecqx_onnx.errors import ModelError, OptionError
from ecqx_onnx.quantization.weights import MATRIX_PRODUCTS, Weight
from ecqx_onnx.recognition.recognition import NotRecognized, recognize
from ecqx_onnx.tensors import QuantTensor


@dataclass(frozen=True)
class _Chosen:
    """How a float model's weights become quantised: the options of `convert`."""

    bits: int | None
    entropy_weight: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    allow_float: bool

    def check(self, names: Sequence[str]) -> None:
        """OptionError for a pattern that matches nothing."""
        for option, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise OptionError(
                        f"--{option} '{pattern}' matches no parameter; the first is '{next(iter(names), '')}'"
                    )

    def included(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.include)

    def excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)


def find_quantized_tensors(
    state: Mapping[str, torch.Tensor], weights: Mapping[str, Weight], chosen: _Chosen
) -> tuple[QuantTensor, ...]:
    """The quantised weights of a state dict: recognised, or quantised here when `bits` says so. ModelError for a float model.

    weights: what the network multiplies, see `find_weights`. With `bits` nothing else is looked at; without, whatever lies on few
    values is recognised, since that loses nothing.
    """
    chosen.check(list(state))
    multiplied = {state[name].data_ptr(): weight for name, weight in weights.items()}
    seen: set[int] = set()
    found: list[QuantTensor] = []
    refusals: list[NotRecognized] = []
    unused: list[str] = []
    for name, value in state.items():
        if (
            not value.is_floating_point()
            or value.ndim < 2
            or not value.numel()
            or value.data_ptr() in seen
        ):
            continue
        if chosen.excluded(name):
            continue
        seen.add(value.data_ptr())
        weight = multiplied.get(value.data_ptr())
        used = weight is not None or chosen.included(name)
        if chosen.bits and not used:
            unused.append(name)
            continue
        values = value.detach().cpu().float().numpy()
        if not np.isfinite(values).all():
            if not used:
                continue
            raise ModelError(
                f"the weight {name!r} holds NaN or infinite values; train it again or repair it before converting"
            )
        result = recognize(name, values)
        if isinstance(result, NotRecognized) and chosen.bits:
            axis = weight.axis if weight is not None and weight.operator in MATRIX_PRODUCTS else 0
            result = quantize_weight(
                name, value.detach().cpu().float(), chosen.bits, chosen.entropy_weight, axis=axis
            )
        if isinstance(result, QuantTensor):
            found.append(result)
        else:
            refusals.append(result)
    if not found and not chosen.allow_float:
        if chosen.bits and unused:
            raise ModelError(
                f"no operator multiplies '{unused[0]}' or another parameter, so there is no weight to quantise; name what you"
                " want quantised with --include"
            )
        if chosen.bits and chosen.exclude:
            raise OptionError(
                f"--exclude {' '.join(chosen.exclude)} leaves no weight to quantise; exclude fewer"
            )
        if not refusals:
            raise ModelError(
                "the model has no weight of two or more dimensions, so there is nothing to quantise; give another"
            )
        first = f" ({refusals[0].name}: {refusals[0].reason})"
        raise ModelError(
            f"the model's weights are float, none lies on few values{first}; "
            "train with `ecqx-onnx quantize`, or add --bits 4 to quantise without training"
        )
    return tuple(found)


def quantize_weight(
    name: str, weight: torch.Tensor, bits: int, entropy_weight: float, *, axis: int = 0
) -> QuantTensor:
    """axis: of the output channels, which have a step each from 6 bits on."""
    from ecqx_onnx.quantization.levels.assignment import assign
    from ecqx_onnx.quantization.levels.grid import choose_grid, fit_step
    from ecqx_onnx.quantization.levels.rounding import round_to_cancel
    from ecqx_onnx.tensors import Scale

    grid = choose_grid(weight, bits)
    # So many levels need neither the percentile rule's clipping, for which training would have to make up, nor one step for all
    # channels, which small ones pay for; and a step per channel is what BatchNorm leaves anyway.
    channel: int | None = axis if bits >= 6 else None
    if channel is not None:
        others = tuple(place for place in range(weight.ndim) if place != axis)
        largest = weight.abs().amax(others, keepdim=True)
        smallest = torch.finfo(torch.float32).tiny
        step = torch.where(
            largest > 0, (largest / max(grid.highest, -grid.lowest)).clamp(min=smallest), 1.0
        )
    else:
        step = fit_step(weight, grid)
    if entropy_weight:
        levels = assign(weight, step, grid, axis=channel, strength=entropy_weight).levels
    else:
        levels = round_to_cancel(weight, step, grid)
    return QuantTensor(name, levels.numpy(), Scale(step.numpy()))
