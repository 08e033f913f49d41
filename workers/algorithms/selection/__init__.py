"""The selection rules by kind; the kinds are those of the methods in `app/options.py`."""

from __future__ import annotations

from workers.algorithms.selection.llkd import LLKD
from workers.algorithms.selection.no_selection import NoSelection
from workers.algorithms.selection.rule import REASONS, Rule, Selection, Signals, State

__all__ = ["REASONS", "RULES", "Rule", "Selection", "Signals", "State"]

RULES: dict[str, type[Rule]] = {
    "llkd": LLKD,
    "no_selection": NoSelection,
}
