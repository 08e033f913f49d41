"""UNIXKD: in every batch, keep the rows the student is most uncertain of (arXiv:2012.09413).

The original mixes images with mixup before training on them; text cannot be mixed, so this is its selector alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.algorithms.losses import entropy
from workers.algorithms.selection.rule import Rule, Selection, Signals, State, decide, first_of, share_of


@dataclass(frozen=True)
class UNIXKD(Rule):
    """The ratio x B rows with the highest student entropy, to the nearest row."""

    ratio: float = 0.5

    @property
    def needs_student(self) -> bool:
        """Every row is ranked by the student."""
        return True

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Rank by entropy; of equal rows the earlier ones are kept."""
        uncertainty = entropy(signals.student.double())
        order = uncertainty.argsort(descending=True, stable=True)
        mask = first_of(order, share_of(len(order), self.ratio))
        return decide(mask, rejected="student_sure", uncertainty=uncertainty), state
