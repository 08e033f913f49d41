"""Which of two classifiers is better, and how sure that is: paired bootstrap, average ranks, mean and deviation.

Classes are ids; a class that occurs in the gold labels and nowhere else counts like any other, as in scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is None."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def average_ranks(scores: Sequence[Sequence[float]]) -> list[float]:
    """`scores[block][entry]`, higher is better -> each entry's rank, 1 the best, averaged over the blocks.

    Entries that tie share the mean of their places, as in Friedman's test.
    """
    ranks = np.zeros(len(scores[0]))
    for block in scores:
        values = np.asarray(block)
        ranks += (values[:, None] < values).sum(axis=1) + ((values[:, None] == values).sum(axis=1) + 1) / 2
    return [float(rank) for rank in ranks / len(scores)]


def paired_bootstrap(
    gold: Ids, first: Sequence[Ids], second: Sequence[Ids], *, resamples: int = RESAMPLES, level: float = LEVEL,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """(difference, low, high) of `second` minus `first`, for accuracy and macro_f1.

    gold (N,): true classes; first, second: the answers (N,) of each seed's run. In every resample the same rows are drawn
    for all runs (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"), and the differences of
    the means over the seeds are taken. low and high are percentiles, `level` of the resamples between them.

    Rows with the same gold class and the same answers of every run are drawn together, as counts of a multinomial.
    """
    columns = np.stack([gold, *first, *second])
    patterns, counts = np.unique(columns, axis=1, return_counts=True)
    rows = int(counts.sum())
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = np.vstack([counts, random.multinomial(rows, counts / rows, size=resamples)]).astype(np.float64)
    truth, runs = patterns[0], patterns[1:]
    values = {"accuracy": [_accuracy(truth, run, drawn) for run in runs]}
    values["macro_f1"] = [_macro_f1(truth, run, drawn) for run in runs]
    outcome = {}
    for name, scores in values.items():
        difference = np.mean(scores[len(first) :], axis=0) - np.mean(scores[: len(first)], axis=0)
        tail = (1 - level) / 2
        low, high = np.quantile(difference[1:], [tail, 1 - tail])
        outcome[name] = (float(difference[0]), float(low), float(high))
    return outcome


def _accuracy(truth: Ids, answers: Ids, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,) classes of K kinds of rows, (R, K) how often each is drawn -> (R,)."""
    return drawn @ (truth == answers) / drawn.sum(axis=1)


def _macro_f1(truth: Ids, answers: Ids, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """As `_accuracy`: the mean of 2 TP / (gold + predicted) over the classes that occur in a draw."""
    total, occurring = np.zeros(len(drawn)), np.zeros(len(drawn))
    for label in np.union1d(truth, answers):
        is_gold, is_answer = truth == label, answers == label
        right = drawn @ (is_gold & is_answer)
        either = drawn @ is_gold + drawn @ is_answer
        total += np.divide(2 * right, either, out=np.zeros(len(drawn)), where=either > 0)
        occurring += either > 0
    return total / occurring
