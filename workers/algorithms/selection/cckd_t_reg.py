"""CCKD_T+Reg: confidence-conditioned targets, and skip what the student already knows (arXiv:2107.06993)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.algorithms import losses
from workers.algorithms.selection.rule import Rule, Selection, Signals, State, decide


@dataclass(frozen=True)
class CCKDTReg(Rule):
    """Targets λ T + (1 - λ) onehot(ŷ); a row is skipped once the student gives ŷ by a margin that grows by epoch."""

    temperature: float = 1.0
    alpha: float = 0.01

    @property
    def needs_student(self) -> bool:
        """Every row is asked."""
        return True

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Keep rows with argmax p_S != ŷ or p_S(1st) - p_S(2nd) < 1 - exp(-alpha epoch); the first epoch keeps errors only.

        The threshold on record is that bound of the margin.
        """
        student = signals.student.double()
        top = student.topk(2, dim=1)
        margin = top.values[:, 0] - top.values[:, 1]
        bound = torch.full_like(margin, 1 - math.exp(-self.alpha * signals.epoch))
        mask = (top.indices[:, 0] != signals.teacher.argmax(dim=1)) | (margin < bound)
        uncertainty = losses.entropy(student)
        return decide(mask, rejected="already_known", student_threshold=bound, uncertainty=uncertainty), state

    def loss(self, logits: Tensor, teacher: Tensor, selection: Selection) -> Tensor:
        """Scalar, the mean over the selected rows."""
        return losses.cckd_t(logits, teacher, self.temperature).mean()
