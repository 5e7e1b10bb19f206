"""Chooses the device to train on, and tells what it does slowly."""

from __future__ import annotations

import torch

from ecqx_onnx.errors import OptionError


def choose_device(wanted: str | torch.device | None, local: int) -> torch.device:
    """Choose the device to train on.

    Args:
        wanted: by name; None takes CUDA where there is one.
        local: number of this process on its machine.

    Returns:
        The device.

    Raises:
        OptionError: if it cannot be had.
    """
    if wanted is None:
        return torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(
            f"device '{wanted}' cannot be used ({reason}): use cpu, or cuda where there is one"
        ) from error
    return device


def emulates_bfloat16(device: str | torch.device | None) -> bool:
    """Tell whether products in bfloat16 take longer than in float32, for want of instructions.

    Args:
        device: as `train` takes it.

    Returns:
        True for processors that emulate them: ten times slower with AVX2 alone.
    """
    if choose_device(device, 0).type != "cpu":
        return False
    return not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
