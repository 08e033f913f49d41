"""Who does what: which rows train, which give feedback, which choose the checkpoint. No text is in two of these sets.

A text is known by its group: the rows of one and the same text, or, where methods take feedback from rows of their own, of
near-duplicates too (near_duplicates.py). Whole groups are assigned, by the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.training.near_duplicates import groups_of

Rows = NDArray[np.int64]
Groups = Mapping[str, Rows]
"""By split of the job: (N,) the group of each of its rows."""


@dataclass(frozen=True)
class Splits:
    """Row numbers, ascending."""

    train: Rows
    """The train rows to offer, barred ones too."""
    barred: NDArray[np.bool_]
    """(N,) of all train rows: the text is also in the validation or test set, so a score would prove nothing."""
    validation: Rows
    """Of the validation set where there is one, else of the train set."""
    feedback: Rows
    """Of the set that was asked for; empty where none was."""


def exact_groups(names: Mapping[str, Sequence[Hashable]]) -> Groups:
    """The groups of rows that have the same name: the same text, or the same pair."""
    known: dict[Hashable, int] = {}
    return {
        split: np.array([known.setdefault(name, len(known)) for name in entries], np.int64)
        for split, entries in names.items()
    }


def near_groups(texts: Mapping[str, Sequence[str]], progress: Callable[[int], None]) -> Groups:
    """The groups of rows whose texts say almost the same, over all splits."""
    together = groups_of([text for entries in texts.values() for text in entries], progress=progress)
    ends = np.cumsum([len(entries) for entries in texts.values()])
    return dict(zip(texts, np.split(together, ends[:-1]), strict=True))


def choose(
    groups: Groups, labeled: Rows, validation: Rows | None, *, seed: int, validation_share: float,
    feedback_share: float = 0.0, feedback_from: str = "train",
) -> Splits:  # fmt: skip
    """Assign the rows.

    groups: of `train`, and of `validation` and `test` where there are any. labeled: the train rows with a label.
    validation: the rows of the validation set with a label; None without such a set, and then `validation_share` of the
    usable train rows is held back. feedback_share: of the usable train rows, or of the validation rows.
    """
    train = groups["train"]
    held_out = [groups[split] for split in groups if split != "train"]
    barred = np.isin(train, np.concatenate(held_out)) if held_out else np.zeros(len(train), bool)
    if validation is not None:
        tested = groups.get("test", np.zeros(0, np.int64))
        validation = validation[~np.isin(groups["validation"][validation], tested)]
    else:
        luck = np.random.Generator(np.random.PCG64(seed))
        held_back = _some_groups(train, labeled[~barred[labeled]], validation_share, luck, len(labeled))
        validation, labeled = _apart(train, labeled, held_back)
    feedback = np.zeros(0, np.int64)
    if feedback_share:
        luck = np.random.Generator(np.random.PCG64([seed, 2]))
        if feedback_from == "validation":
            chosen = _some_groups(groups["validation"], validation, feedback_share, luck, len(validation))
            feedback, validation = _apart(groups["validation"], validation, chosen)
        else:
            usable = labeled[~barred[labeled]]
            chosen = _some_groups(train, usable, feedback_share, luck, len(usable))
            feedback, labeled = _apart(train, labeled, chosen)
    return Splits(labeled, barred, validation, feedback)


def _some_groups(groups: Rows, rows: Rows, share: float, luck: np.random.Generator, total: int) -> Rows:
    """The groups of so many of the rows, drawn at random, that they make `share` of `total`; one row at least stays out."""
    count = min(max(1, round(share * total)), max(0, total - 1))
    return np.unique(groups[luck.permutation(rows)[:count]])


def _apart(groups: Rows, rows: Rows, chosen: Rows) -> tuple[Rows, Rows]:
    """The rows of the chosen groups, and the others."""
    inside = np.isin(groups[rows], chosen)
    return rows[inside], rows[~inside]
