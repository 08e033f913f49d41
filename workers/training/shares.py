"""The rows of a step, shared out over the processes of one training: each computes its own, and all know the results.

Every process holds the same weights and goes through the same batches. A result per row, such as the logits, is computed in
shares and gathered: a process then has everybody's values, with the gradient of its own. All that follows from them, such as
thresholds, selection, influence, and losses that couple rows, is computed from the whole batch, alike in every process. The
gradient of a loss over the whole batch is the sum of what the processes find of it. In a training of one process everything
here hands back what it was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed
from torch.nn import Parameter


def processes() -> int:
    """How many train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 is the one that holds the job."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def own(rows: int) -> NDArray[np.int64]:
    """The places of this process's share of so many rows, 1 or more: dealt in turn, the same number to each process.

    Where they do not come out even, the first rows are dealt a second time, and `gather` drops the second result.
    """
    each = math.ceil(rows / processes())
    return np.arange(rank(), rank() + each * processes(), processes()) % rows


def gather(mine: Tensor, rows: int) -> Tensor:
    """(rows, …) of everybody, in the order of the rows, from the (share, …) of each; with the gradient of its own."""
    if processes() == 1:
        return mine
    from accelerate.utils import gather as gather_all

    shares = list(gather_all(mine.detach()).chunk(processes()))
    shares[rank()] = mine
    return torch.stack(shares, dim=1).flatten(0, 1)[:rows]


def add_up(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor's sum over the processes, by one exchange; they are all of one type."""
    if processes() == 1:
        return tuple(tensors)
    from accelerate.utils import reduce

    total = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), reduction="sum")
    parts = total.split([tensor.numel() for tensor in tensors])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True))


def add_up_gradients(parameters: Iterable[Parameter]) -> None:
    """Put the sum over the processes where the gradients are."""
    if processes() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient, total in zip(gradients, add_up(gradients), strict=True):
        gradient.copy_(total)


def draw_anew(seed: int, stage: int, step: int) -> None:
    """Let the other processes draw their dropout of a step by its number, so that nothing of theirs need be saved.

    The process that holds the job goes on with its own random state, which is saved with the run.
    """
    if rank() > 0:
        torch.manual_seed(int(np.random.SeedSequence([seed, stage, step, rank()]).generate_state(1)[0]))
