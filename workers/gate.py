"""The smoke gate: is this teacher worth asking about all the rows? Judged on the first few, before the rest is paid for.

A teacher is turned away only on evidence: when it says the very same of every text, or when its answers on validation
rows rule out that it agrees with the true labels more than by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from app.lifecycle import WorkFailed

TRAIN_ROWS = 16
VALIDATION_ROWS = 256
SAME = 1e-6
"""Distributions that differ by less, everywhere, are the same."""
MIN_TEXTS = 4
"""Fewer different texts prove nothing about whether a teacher tells texts apart."""
MIN_KAPPA = 0.1
"""Chance-corrected agreement (Cohen 1960) that a teacher must be able to have."""
DOUBT = 0.05
"""It is turned away when what was seen, or less, is less probable than this at MIN_KAPPA."""


class Useless(WorkFailed):
    """The teacher does not pass; `evidence` holds the figures."""

    def __init__(self, message: str, evidence: dict[str, Any]) -> None:
        super().__init__("teacher_useless", message)
        self.evidence = evidence


def refuse_a_constant(probabilities: NDArray[np.float32], texts: Sequence[str], errors: Sequence[str]) -> None:
    """Raises Useless when all N distributions (N, C) are the same though the texts differ, WorkFailed when there is none.

    Rows of NaN were not labeled; `errors` tells why. Distributions with all mass on one label are no evidence: a teacher
    that gives labels without confidence says the same of all rows of one class.
    """
    answered = ~np.isnan(probabilities[:, 0])
    if not answered.any():
        raise WorkFailed(
            "nothing_labeled", f"The teacher labeled none of the first {len(texts)} rows. First reason: {errors[0]}"
        )
    said = probabilities[answered]
    different = len({text for text, known in zip(texts, answered, strict=True) if known})
    if different < MIN_TEXTS or said.max() > 1 - SAME or np.ptp(said, axis=0).max() > SAME:
        return
    raise Useless(
        f"The teacher says the same of {different} different texts (confidence {said[0].max():.4f} each time); there is "
        "nothing to learn from. Describe the labels more clearly, give examples, or choose another teacher.",
        {"rows": len(said), "different_texts": different, "confidence": float(said[0].max())},
    )


def agreement(predicted: NDArray[np.int64], gold: NDArray[np.int64], classes: int) -> dict[str, Any]:
    """How far N predictions agree with the true classes, (N,) each, beside chance and beside a teacher of MIN_KAPPA.

    chance: agreement of two who label at random, each with its own shares of the classes. kappa: (accuracy - chance) /
    (1 - chance). p_value: probability of as many hits or more by chance; small, the teacher beats chance. p_if_useful:
    probability of at most as many hits when the true kappa is MIN_KAPPA; small, the teacher is no use.
    """
    rows = len(gold)
    hits = int((predicted == gold).sum())
    shares = [np.bincount(each, minlength=classes) / rows for each in (predicted, gold)]
    chance = float((shares[0] * shares[1]).sum())
    return {
        "validation_rows": rows,
        "hits": hits,
        "accuracy": hits / rows,
        "chance": chance,
        "kappa": (hits / rows - chance) / (1 - chance) if chance < 1 else None,
        "p_value": float(binom.sf(hits - 1, rows, chance)),
        "p_if_useful": float(binom.cdf(hits, rows, chance + MIN_KAPPA * (1 - chance))),
    }


def refuse_a_guesser(seen: dict[str, Any]) -> None:
    """Raises Useless when the figures of `agreement` leave less than DOUBT that the teacher beats chance."""
    if seen["kappa"] is None or seen["p_if_useful"] >= DOUBT:
        return
    raise Useless(
        f"The teacher does not beat chance: it is right on {seen['hits']} of {seen['validation_rows']} validation rows "
        f"({seen['accuracy']:.1%}), and chance alone gives {seen['chance']:.1%}. Describe the labels more clearly, give "
        "examples, or choose another teacher; labeling.smoke_gate = false labels all the same.",
        seen,
    )
