"""How far a student is from its teacher: one value per row, from the logits of both, differentiable in both.

Shapes: `target` and `logits` (B, C); results (B,). `logits` is the side that learns in the usual case, `target` the side it
is drawn to; where the teacher is drawn to the student, the student is the target. No loss carries the factor τ²: it only
scales the gradient, which matters where the loss is mixed with another, and there the caller multiplies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor, float], Tensor]


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(target || logits), both softened by τ (Hinton et al., arXiv:1503.02531); 0 exactly where the two agree."""
    wanted = torch.log_softmax(target / temperature, dim=-1)
    return (wanted.exp() * (wanted - torch.log_softmax(logits / temperature, dim=-1))).sum(dim=-1)


def ce(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """CE(target, logits), both softened by τ: `kl` plus the target's entropy, so only the target's gradient differs."""
    wanted = torch.softmax(target / temperature, dim=-1)
    return -(wanted * torch.log_softmax(logits / temperature, dim=-1)).sum(dim=-1)


def mse(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the classes of the squared difference of the logits; τ has no part in it."""
    return (target - logits).square().mean(dim=-1)


def dist(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST (Huang et al., arXiv:2205.10536): 1 - correlation over the classes, plus 1 - correlation over the batch.

    The second part, the mean over the classes, is one number for the whole batch and is added to every row, so the mean
    over the rows is the loss of the paper with β = γ = 1. Both sides are softened by τ.
    """
    wanted = torch.softmax(target / temperature, dim=-1)
    given = torch.softmax(logits / temperature, dim=-1)
    return (1 - _correlation(wanted, given, dim=1)) + (1 - _correlation(wanted, given, dim=0).mean())


def _correlation(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension; 0 where one side does not vary."""
    return functional.cosine_similarity(
        left - left.mean(dim=dim, keepdim=True), right - right.mean(dim=dim, keepdim=True), dim=dim
    )


LOSSES: dict[str, Loss] = {"kl": kl, "ce": ce, "mse": mse, "dist": dist}
"""By the name in the option `distillation_loss`."""
