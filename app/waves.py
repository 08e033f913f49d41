"""Waves: ask the teacher about some rows, train a student on them, and ask about more only while that helps.

Pure functions: where each wave ends, how long its student trains, and whether what the trainings so far have shown speaks
for another. The moves are lifecycle's; docs/decisions/0006 says why every wave's student starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.options import Waves

CERTAINTY = 0.9
"""That a wave has gained less than `min_gain`, before no further wave is asked about."""


def ends(rows: int, wish: Waves | None) -> list[int]:
    """Where each wave of `rows` train rows ends, counted from the first row; without a wish there is one wave.

    What would be left for a wave smaller than the first joins the one before it.
    """
    if wish is None:
        return [rows]
    found: list[int] = []
    end, size = 0, float(wish.rows)
    while end < rows:
        end, size = end + round(size), size * wish.growth
        if rows - end < wish.rows:
            end = rows
        found.append(end)
    return found


def stretched(epochs: int, asked: int, rows: int, wish: Waves | None) -> int:
    """In how many epochs `asked` of the train rows take as many steps as all `rows` in `epochs`, as far as is wished.

    Without it a student of few rows is short of steps, and its score hides how little more labels would add.
    """
    return epochs if wish is None else round(epochs * min(rows / asked, wish.max_stretch))


def reason_to_stop(history: Sequence[dict[str, Any]], wish: Waves) -> str | None:
    """Why no further wave is asked about, in a sentence; None: the next one is.

    history: of each wave so far, in order, the train rows asked about up to it (`rows`), the validation macro-F1 from 0
    to 1 (`macro_f1`, None where nothing could be trained), what it gained at most, with CERTAINTY, over the wave
    before that has a score (`gain_at_most`, None where there is none, or its student is at chance), and whether its labels were mixed otherwise than
    those before (`drifted`).
    """
    last = history[-1]
    if last["gain_at_most"] is None or last["gain_at_most"] >= wish.min_gain or last["drifted"]:
        return None
    before = [wave for wave in history[:-1] if wave["macro_f1"] is not None][-1]
    return (
        f"the last {last['rows'] - before['rows']} rows that were asked about moved validation macro-F1 from "
        f"{before['macro_f1']:.4f} to {last['macro_f1']:.4f}, by at most {last['gain_at_most']:.4f} with {CERTAINTY:.0%} certainty"
    )
