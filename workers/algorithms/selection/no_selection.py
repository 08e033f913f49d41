"""No selection: train on every pseudo-labeled row (No_DS in arXiv:2411.08028)."""

from __future__ import annotations

from dataclasses import dataclass

from workers.algorithms.selection.rule import Rule


@dataclass(frozen=True)
class NoSelection(Rule):
    """Every row, equally weighted; this is what Rule does when nothing is refined."""
