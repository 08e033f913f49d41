"""The losses of the methods: pure functions, one value per row, so that a rule decides how rows are weighed and averaged.

Shapes: `logits` (S, C) of the student with gradient, `teacher` (S, C) distributions over the labels, results (S,) in nats
on the device of the logits; the teacher's may be another one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def entropy(probabilities: Tensor) -> Tensor:
    """-sum_c p(c) log p(c) of each row, (..., C) -> (...,), in [0, log C]; an impossible class adds nothing."""
    return torch.special.entr(probabilities).sum(dim=-1)


def pseudo_label_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """CE(ŷ, S) against the teacher's most likely label."""
    return functional.cross_entropy(logits, teacher.argmax(dim=-1).to(logits.device), reduction="none")


def soft_label_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """CE(T, S) against the whole distribution, both sides softened by the temperature τ; no τ² factor."""
    return functional.cross_entropy(logits / temperature, soften(teacher, temperature).to(logits), reduction="none")


def kd(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """τ² KL(T || S), both softened (Hinton et al., arXiv:1503.02531); 0 exactly where the two agree.

    The factor τ² keeps the size of the gradient when the temperature changes.
    """
    divergence = soft_label_loss(logits, teacher, temperature) - entropy(soften(teacher, temperature)).to(logits)
    return temperature**2 * divergence


def cckd_l(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """λ CE(T, S) + (1 - λ) CE(ŷ, S), the loss form of CCKD (arXiv:2107.06993).

    λ is the probability the teacher gives the label; with pseudo-labels that is its confidence, untempered.
    """
    confidence = teacher.amax(dim=-1).to(logits)
    soft = soft_label_loss(logits, teacher, temperature)
    return confidence * soft + (1 - confidence) * pseudo_label_loss(logits, teacher)


def cckd_t(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """CE(λ T + (1 - λ) onehot(ŷ), S), the target form of CCKD: teacher and student softened, the label not."""
    confidence, labels = teacher.max(dim=-1, keepdim=True)
    label = torch.zeros_like(teacher).scatter(-1, labels, 1.0)
    target = confidence * soften(teacher, temperature) + (1 - confidence) * label
    return functional.cross_entropy(logits / temperature, target.to(logits), reduction="none")


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(z / τ) where only softmax(z) is known: p^(1/τ), normalised. Impossible classes stay impossible."""
    return torch.softmax(probabilities.log() / temperature, dim=-1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum(w v) / sum(w) over the rows, a scalar; it does not change when all weights are scaled."""
    return (weights * values).sum() / weights.sum()
