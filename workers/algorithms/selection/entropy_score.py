"""Entropy Score: once, before training, keep the rows with the lowest teacher entropy (arXiv:2206.02914)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.algorithms.losses import entropy
from workers.algorithms.selection.rule import Rule, first_of, share_of


@dataclass(frozen=True)
class EntropyScore(Rule):
    """Train on the ratio x N rows the teacher is surest of, to the nearest row, in every epoch."""

    ratio: float = 0.5

    def prepare(self, teacher: Tensor) -> Tensor:
        """(N, C) -> (N,) bool.

        Ties are broken by a fixed shuffle: a teacher that only gives labels is equally sure of every row, and dataset
        order would then drop whole classes of a dataset that is sorted by class.
        """
        shuffled = torch.randperm(len(teacher), generator=torch.Generator().manual_seed(0)).to(teacher.device)
        order = shuffled[entropy(teacher.double())[shuffled].argsort(stable=True)]
        return first_of(order, share_of(len(order), self.ratio))
