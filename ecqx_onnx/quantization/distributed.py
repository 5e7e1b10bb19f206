"""Keep several processes that train one model (torch.distributed) on the same levels.

Relevances are summed over the processes, and levels are those of the first. Without an initialised
process group every function here does nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from ecqx_onnx.errors import ModelError


def count_processes() -> int:
    """Count the processes that train together.

    Returns:
        1 without a process group.
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def find_rank() -> int:
    """Find which of the processes this one is.

    Returns:
        From 0; 0 without a process group.
    """
    return dist.get_rank() if count_processes() > 1 else 0


@contextmanager
def open_process_group() -> Iterator[int]:
    """Join the processes that torchrun started, if nobody has done so yet.

    Yields:
        This process's number on its machine, from 0.
    """
    joins = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield int(os.environ.get("LOCAL_RANK", 0)) if count_processes() > 1 else 0
    finally:
        if joins:
            dist.destroy_process_group()


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values.

    Args:
        tensors: written in place; the same shapes in the same order in all processes.
    """
    if count_processes() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def sum_numbers(values: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over the processes.

    Args:
        values: as many in every process.
        device: where the processes exchange them.

    Returns:
        The sums.
    """
    if count_processes() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_over_processes(
    found: Mapping[str, Tensor], shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Add up each tensor over the processes.

    Args:
        found: name -> tensor; a process may lack some.
        shapes: name -> a tensor of its shape, for every name that some process may have, in one
            order for all.

    Returns:
        Name -> sum, for every name that some process has.
    """
    if count_processes() == 1:
        return dict(found)
    reached = torch.tensor(
        [float(name in found) for name in shapes], device=next(iter(shapes.values())).device
    )
    dist.all_reduce(reached)
    summed = {}
    for (name, like), anyone in zip(shapes.items(), reached.tolist(), strict=True):
        if anyone:
            summed[name] = found[name].contiguous() if name in found else torch.zeros_like(like)
            dist.all_reduce(summed[name])
    return summed


def assert_same_levels(levels: Sequence[Tensor]) -> None:
    """Check that the processes have not drifted apart.

    Args:
        levels: int8, in one order for all processes.

    Raises:
        ModelError: this process holds other levels than another one.
    """
    if count_processes() == 1:
        return
    digest = hashlib.sha256()
    for tensor in levels:
        digest.update(tensor.cpu().numpy().tobytes())
    mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(levels[0].device)
    lowest, highest = mine.clone(), mine.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise ModelError(
            f"process {find_rank()} holds other levels than another one: every process must start "
            "from the same weights and average its gradients (DistributedDataParallel does both)"
        )
