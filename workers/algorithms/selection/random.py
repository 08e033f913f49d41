"""Random: train on a uniformly drawn share of every batch (baseline of arXiv:2411.08028)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.algorithms.selection.rule import Rule, Selection, Signals, State, decide, first_of


@dataclass(frozen=True)
class Random(Rule):
    """ratio x B rows of each batch, rounded up or down at random so that the share is met on average."""

    ratio: float = 0.3

    def select(self, state: State, signals: Signals) -> tuple[Selection, State]:
        """Draw rows with the batch's generator."""
        rows, generator = len(signals.subset), signals.generator
        luck = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
        order = torch.randperm(rows, generator=generator, device=generator.device).to(signals.subset.device)
        return decide(first_of(order, int(self.ratio * rows + luck)), rejected="not_drawn"), state
