"""FreeMatch: keep the rows the student is confident of, by thresholds that follow its learning (arXiv:2205.07246).

    τ = λ τ + (1 - λ) mean_b max q_b        p(c) = λ p(c) + (1 - λ) mean_b q_b(c)        both start at 1/C
    selected  <=>  max q_b >= MaxNorm(p)(argmax q_b) · τ

As a baseline of arXiv:2411.08028 it trains on the teacher's pseudo-label. The fairness loss of the original, which
steers the student's own labels away from collapse, is left out: the labels here are the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.algorithms.losses import entropy, pseudo_label_loss
from workers.algorithms.selection.rule import (
    Rule,
    Selection,
    Signals,
    State,
    at_least,
    decide,
    max_norm,
    moving_average,
    selected_weights,
)


@dataclass(frozen=True)
class FreeMatch(Rule):
    """Self-adaptive thresholding on the student's confidence."""

    momentum: float = 0.999

    @property
    def needs_student(self) -> bool:
        """The thresholds follow the student on every row."""
        return True

    def initial(self, classes: int) -> State:
        """τ = 1/C and p(c) = 1/C."""
        uniform = torch.full((classes,), 1 / classes, dtype=torch.float64)
        return {"level": uniform[0].clone(), "class_share": uniform}

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Move the thresholds by the batch, then judge it; the class of a row is the student's own."""
        if len(signals.student) == 0:
            return super().select(state, signals)  # No rows have no mean; the averages stay.
        student = signals.student.double()
        confidence, predicted = student.max(dim=1)
        state = {
            "level": moving_average(state["level"], confidence.mean(), self.momentum),
            "class_share": moving_average(state["class_share"], student.mean(dim=0), self.momentum),
        }
        threshold = self.thresholds(state)["student"][predicted]
        selection = decide(
            at_least(confidence, threshold),
            rejected="student_unsure",
            student_threshold=threshold,
            uncertainty=entropy(student),
        )
        return selection, state

    def loss(self, logits: Tensor, teacher: Tensor, selection: Selection) -> Tensor:
        """Scalar: the sum over the selected rows, divided by the rows of the whole batch, as FreeMatch does."""
        return (selected_weights(selection, logits) * pseudo_label_loss(logits, teacher)).sum() / len(selection.mask)

    def thresholds(self, state: State) -> dict[str, Tensor]:
        """On the student's confidence."""
        return {"student": state["level"] * max_norm(state["class_share"])}
