"""What every selection rule is: which rows of a batch does the student train on, and with which loss.

For each batch the training loop calls `offer` (which rows need the student's view), runs the student without gradients
over those, calls `select`, and takes one step on `loss` over the selected rows. `offer` is always called, also for a rule
that never looks at the student, because a rule may keep statistics of the teacher there. All memory of a rule is its
State: tensors on the device of the signals, saved and restored with the job. No call changes a state in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.algorithms import losses

State = dict[str, Tensor]

REASONS: tuple[str, ...] = (
    "selected",
    "teacher_unsure",
    "student_sure",
    "not_drawn",
    "outside_subset",
    "student_unsure",
    "already_known",
)


@dataclass(frozen=True)
class Signals:
    """What is known about a batch of B rows over C labels before the step."""

    teacher: Tensor
    """(B, C) the teacher's distribution over the labels; rows sum to 1."""
    student: Tensor
    """(B, C) the student's softmax in eval mode, without gradient; only rows that were offered mean something."""
    offered: Tensor
    """(B,) bool: the rows that were sent through the student, as `offer` returned them."""
    subset: Tensor
    """(B,) bool: the rows that `prepare` kept."""
    epoch: int
    """0-based."""
    generator: torch.Generator


@dataclass(frozen=True)
class Selection:
    """What a rule decided about a batch of B rows, and why."""

    mask: Tensor
    """(B,) bool: train on these rows. May be empty; the loop then skips the step."""
    weights: Tensor
    """(B,) float32: 1 where unweighted, 0 outside the mask."""
    reasons: Tensor
    """(B,) int8: index into REASONS."""
    teacher_threshold: Tensor
    """(B,) float32: the threshold each row met, NaN where there is none."""
    student_threshold: Tensor
    """(B,) float32."""
    uncertainty: Tensor
    """(B,) float32: the student's entropy in nats, NaN where it was not computed."""


class Rule:
    """Train on every row of the subset, each with the same weight; the base that every rule refines.

    Subclasses are frozen dataclasses whose fields are the options of the same kind in `app/options.py`.
    """

    @property
    def needs_student(self) -> bool:
        """False: `select` does not look at the student, so the loop leaves out the pass without gradients."""
        return False

    def initial(self, classes: int) -> State:
        """The memory before the first batch."""
        return {}

    def prepare(self, teacher: Tensor) -> Tensor:
        """Once, before training: (N, C) distributions of all rows -> (N,) bool, the rows to train on at all."""
        return torch.ones(len(teacher), dtype=torch.bool, device=teacher.device)

    def offer(self, state: State, teacher: Tensor, subset: Tensor) -> tuple[Tensor, State]:
        """(B, C) distributions and (B,) bool subset -> (B,) bool, the rows that need the student's view, and new state."""
        return subset, state

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Decide about one batch."""
        return decide(signals.subset, rejected="outside_subset"), state

    def loss(self, logits: Tensor, teacher: Tensor, selection: Selection) -> Tensor:
        """Scalar: pseudo-label cross-entropy, averaged over the selected rows by their weights.

        logits and teacher are (S, C), the selected rows in batch order; selection is the whole batch's.
        """
        return losses.weighted_mean(losses.pseudo_label_loss(logits, teacher), selected_weights(selection, logits))

    def thresholds(self, state: State) -> dict[str, Tensor]:
        """The present thresholds per class, (C,) each, under "teacher" and "student"; those the rule has."""
        return {}

    def summary(self, state: State) -> dict[str, float]:
        """Small facts for the log."""
        return {}


def decide(
    mask: Tensor,
    *,
    rejected: str | Tensor,
    weights: Tensor | None = None,
    teacher_threshold: Tensor | None = None,
    student_threshold: Tensor | None = None,
    uncertainty: Tensor | None = None,
) -> Selection:
    """The Selection for a (B,) bool mask. `rejected` is the reason for the other rows: one name, or (B,) indices."""
    if isinstance(rejected, str):
        rejected = torch.full_like(mask, REASONS.index(rejected), dtype=torch.int8)
    missing = torch.full(mask.shape, torch.nan, device=mask.device)
    return Selection(
        mask=mask,
        weights=mask.float() if weights is None else torch.where(mask, weights.float(), 0.0),
        reasons=torch.where(mask, 0, rejected).to(torch.int8),
        teacher_threshold=missing if teacher_threshold is None else teacher_threshold.float(),
        student_threshold=missing if student_threshold is None else student_threshold.float(),
        uncertainty=missing if uncertainty is None else uncertainty.float(),
    )


def selected_weights(selection: Selection, logits: Tensor) -> Tensor:
    """(S,) weights of the selected rows, in the type and on the device of the logits."""
    return selection.weights[selection.mask].to(logits)


def moving_average(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """λ old + (1 - λ) new."""
    return momentum * old + (1 - momentum) * new


def max_norm(values: Tensor) -> Tensor:
    """a(c) / max_c' a(c'), (C,) -> (C,): how far each class has come, relative to the most advanced one."""
    return values / values.max().clamp_min(1e-12)


def at_least(values: Tensor, thresholds: Tensor) -> Tensor:
    """values >= thresholds, where a difference that only rounding can have made counts as equal.

    A teacher that is equally sure of all rows has a threshold equal to its confidence; summing order must not decide.
    """
    return values >= thresholds - 1e-9


def first_of(order: Tensor, count: int) -> Tensor:
    """(B,) permutation -> (B,) bool, true for the rows at its first `count` places."""
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[:count]] = True
    return mask


def share_of(rows: int, ratio: float) -> int:
    """ratio x rows to the nearest row, but never none of some."""
    return min(rows, max(1, round(ratio * rows)))
