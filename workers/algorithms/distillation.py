"""How far a student is from its teacher: one value per row, from the logits of both, differentiable in both.

Shapes: `target` and `logits` (B, C); results (B,). `logits` is the side that learns in the usual case, `target` the side it
is drawn to; where the teacher is drawn to the student, the student is the target. No loss carries the factor τ²: it only
scales the gradient, which matters where the loss is mixed with another, and there the caller multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    return between_classes(wanted, given) + between_rows(wanted, given)


def between_classes(wanted: Tensor, given: Tensor) -> Tensor:
    """(B,) 1 - correlation over the classes, of each row's distribution; DIST's inter-class part."""
    return 1 - _correlation(wanted, given, dim=1)


def between_rows(wanted: Tensor, given: Tensor) -> Tensor:
    """Scalar: 1 - correlation over the batch, mean over the classes; DIST's intra-class part."""
    return 1 - _correlation(wanted, given, dim=0).mean()


def spherical(logits: Tensor, multiplier: float) -> Tensor:
    """The logits with mean 0 and standard deviation `multiplier` over the classes (SKD: Guo et al., arXiv:2010.07485).

    The spread is taken without gradient. With two classes the result is one of two points, whatever the logits, and with
    the spread's gradient nothing would reach them.
    """
    centred = logits - logits.mean(dim=-1, keepdim=True)
    spread = centred.detach().square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
    return centred / spread * multiplier


def patient(teacher: Sequence[Tensor], student: Sequence[Tensor]) -> Tensor:
    """(B,) mean squared difference of hidden states at unit length, mean over the layers (PKD: Sun et al., arXiv:1908.09355).

    teacher, student: per pair of layers (B, H); no layers, no distance.
    """
    distances = [
        (functional.normalize(theirs, dim=-1) - functional.normalize(own, dim=-1)).square().mean(dim=-1)
        for theirs, own in zip(teacher, student, strict=True)
    ]
    return torch.stack(distances).mean(dim=0) if distances else torch.zeros(())


def layer_pairs(teacher_layers: int, student_layers: int, which: str) -> list[tuple[int, int]]:
    """Which layer of the teacher each of the student's layers but the last follows: (teacher's, student's), from 1.

    `skip`: evenly spread, so 2, 4 … 10 for 12 over 6; `last`: 7 … 11. A teacher that is too shallow for `last` gives its
    first layer instead.
    """
    inner = range(1, student_layers)
    if which == "last":
        return [(max(1, teacher_layers - student_layers + layer), layer) for layer in inner]
    return [(max(1, layer * teacher_layers // student_layers), layer) for layer in inner]


def _correlation(left: Tensor, right: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along a dimension; 0 where one side does not vary."""
    return functional.cosine_similarity(
        left - left.mean(dim=dim, keepdim=True), right - right.mean(dim=dim, keepdim=True), dim=dim
    )


LOSSES: dict[str, Loss] = {"kl": kl, "ce": ce, "mse": mse, "dist": dist}
"""By the name in the option `distillation_loss`."""
