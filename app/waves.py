"""Waves: ask the teacher about some rows, train a student on them, and ask about more only while that helps.

Pure functions: where each wave ends, and whether what the trainings so far have shown speaks for another. The moves are
lifecycle's; docs/decisions/0006 says why every wave's student starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.options import Waves


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


def reason_to_stop(history: Sequence[dict[str, Any]], wish: Waves) -> str | None:
    """Why no further wave is asked about, in a sentence; None: the next one is.

    history: of each wave so far, in order, the train rows asked about up to it (`rows`), how many of them were selected
    at least once (`selected`), the validation macro-F1 from 0 to 1 (`macro_f1`, None where nothing could be trained), and
    whether its labels were mixed otherwise than those before (`drifted`).
    """
    scored = [wave for wave in history if wave["macro_f1"] is not None]
    if len(scored) < 2 or history[-1]["macro_f1"] is None or history[-1]["drifted"]:
        return None
    last, before = scored[-1], scored[-2]
    added, asked = last["selected"] - before["selected"], last["rows"] - before["rows"]
    if max(added, 0) < wish.min_selected * asked:
        return (
            f"the last {asked} rows that were asked about added {added} to the {before['selected']} that are selected"
        )
    if len(scored) <= wish.patience:
        return None
    best_before = max(wave["macro_f1"] for wave in scored[: -wish.patience])
    best_since = max(wave["macro_f1"] for wave in scored[-wish.patience :])
    if best_since - best_before >= wish.min_gain:
        return None
    asked = last["rows"] - scored[-wish.patience - 1]["rows"]
    return f"the last {asked} rows that were asked about moved validation macro-F1 from {best_before:.4f} to {best_since:.4f}"
