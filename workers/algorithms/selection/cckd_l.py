"""CCKD_L: every row, its loss shared between teacher and label by the teacher's confidence (arXiv:2107.06993)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.algorithms import losses
from workers.algorithms.selection.rule import Rule, Selection


@dataclass(frozen=True)
class CCKDL(Rule):
    """λ CE(T, S) + (1 - λ) CE(ŷ, S) with λ = max_c p_T(c)."""

    temperature: float = 1.0

    def loss(self, logits: Tensor, teacher: Tensor, selection: Selection) -> Tensor:
        """Scalar, the mean over the rows."""
        return losses.cckd_l(logits, teacher, self.temperature).mean()
