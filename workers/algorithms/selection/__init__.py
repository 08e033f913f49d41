"""The selection rules by kind; the kinds are those of the methods in `app/options.py`."""

from __future__ import annotations

from workers.algorithms.selection.cckd_l import CCKDL
from workers.algorithms.selection.cckd_t_reg import CCKDTReg
from workers.algorithms.selection.entropy_score import EntropyScore
from workers.algorithms.selection.freematch import FreeMatch
from workers.algorithms.selection.llkd import LLKD
from workers.algorithms.selection.no_selection import NoSelection
from workers.algorithms.selection.random import Random
from workers.algorithms.selection.rule import REASONS, Rule, Selection, Signals, State
from workers.algorithms.selection.softmatch import SoftMatch
from workers.algorithms.selection.unixkd import UNIXKD

__all__ = ["REASONS", "RULES", "Rule", "Selection", "Signals", "State"]

RULES: dict[str, type[Rule]] = {
    "llkd": LLKD,
    "no_selection": NoSelection,
    "random": Random,
    "freematch": FreeMatch,
    "softmatch": SoftMatch,
    "cckd_l": CCKDL,
    "cckd_t_reg": CCKDTReg,
    "entropy_score": EntropyScore,
    "unixkd": UNIXKD,
}
