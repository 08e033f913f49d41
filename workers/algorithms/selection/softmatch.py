"""SoftMatch: every row, weighted by a truncated Gaussian of the student's confidence (arXiv:2301.10921).

    q' = norm(q · u / p)  with p the moving average of q and u = 1/C                         (uniform alignment)
    μ = λ μ + (1 - λ) mean_b max q'_b       σ² = λ σ² + (1 - λ) var_b max q'_b               start at 1/C and 1
    ω_b = exp(-min(max q'_b - μ, 0)² / (2 σ² / n_sigma²))  in (0, 1], 1 from μ upwards

As a baseline of arXiv:2411.08028 it trains on the teacher's pseudo-label; the aligned q' only makes the weights.
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
    decide,
    moving_average,
    selected_weights,
)

ALIGNMENT_SLACK = 1e-6


@dataclass(frozen=True)
class SoftMatch(Rule):
    """Soft weights in place of a threshold; every row is trained on."""

    momentum: float = 0.999
    n_sigma: float = 2.0
    uniform_alignment: bool = True

    @property
    def needs_student(self) -> bool:
        """The weights follow the student on every row."""
        return True

    def initial(self, classes: int) -> State:
        """μ = 1/C, σ² = 1; p is 0 until the first batch."""
        return {
            "mean": torch.tensor(1 / classes, dtype=torch.float64),
            "variance": torch.tensor(1.0, dtype=torch.float64),
            "class_share": torch.zeros(classes, dtype=torch.float64),
        }

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Move the Gaussian by the batch, then weigh it."""
        if len(signals.student) == 0:
            return super().select(state, signals)  # No rows have no mean; the averages stay.
        student, state = self._aligned(state, signals.student.double())
        confidence = student.amax(dim=1)
        # One row has no variance; the old one stays.
        variance = confidence.var(correction=1) if len(confidence) > 1 else state["variance"]
        state = state | {
            "mean": moving_average(state["mean"], confidence.mean(), self.momentum),
            "variance": moving_average(state["variance"], variance, self.momentum),
        }
        shortfall = (confidence - state["mean"]).clamp_max(0)
        weights = torch.exp(-(shortfall**2) / (2 * state["variance"].clamp_min(1e-12) / self.n_sigma**2))
        selection = decide(
            signals.subset,
            rejected="outside_subset",
            weights=weights,
            student_threshold=state["mean"].expand(len(weights)),
            uncertainty=entropy(signals.student.double()),
        )
        return selection, state

    def loss(self, logits: Tensor, teacher: Tensor, selection: Selection) -> Tensor:
        """Scalar: the mean over the rows of ω_b CE(ŷ_b, S), divided by the rows and not by the weights."""
        return (selected_weights(selection, logits) * pseudo_label_loss(logits, teacher)).mean()

    def thresholds(self, state: State) -> dict[str, Tensor]:
        """μ, from which confidence upwards a row has full weight; the same for every class."""
        return {"student": state["mean"].expand(len(state["class_share"]))}

    def _aligned(self, state: State, student: Tensor) -> tuple[Tensor, State]:
        """Even out the classes: (B, C) probabilities, divided by how often the student has predicted each class."""
        if not self.uniform_alignment:
            return student, state
        mean = student.mean(dim=0)
        share = moving_average(state["class_share"], mean, self.momentum) if state["class_share"].any() else mean
        aligned = student * (1 / student.shape[1] + ALIGNMENT_SLACK) / (share + ALIGNMENT_SLACK)
        return aligned / aligned.sum(dim=1, keepdim=True), state | {"class_share": share}
