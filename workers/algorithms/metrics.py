"""How good predictions are: accuracy, macro-F1, F1 per class, calibration, and bootstrap intervals.

`gold` and `predicted` are (N,) class ids. Gold may hold ids that the student cannot predict (such as -1, "a class the
labels lack"): such a row is wrong, and its id is a class of its own in macro-F1, as in scikit-learn.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def accuracy(gold: Tensor, predicted: Tensor) -> float:
    """Share of rows predicted right."""
    return float(_accuracy(*_counts(gold, predicted)))


def macro_f1(gold: Tensor, predicted: Tensor) -> float:
    """Mean F1 over the classes that occur in gold or predicted; scikit-learn's f1_score(average="macro", zero_division=0)."""
    return float(_macro_f1(*_counts(gold, predicted)))


def per_class_f1(gold: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """(classes,) float64 F1 of the classes 0..classes-1; 0 for a class that occurs nowhere."""
    ids = torch.arange(classes, device=gold.device)[:, None]
    is_gold, is_predicted = ids == gold, ids == predicted
    right = (is_gold & is_predicted).sum(dim=1).double()
    return _f1(right, is_gold.sum(dim=1).double(), is_predicted.sum(dim=1).double())


def expected_calibration_error(probabilities: Tensor, gold: Tensor, bins: int = 15) -> float:
    """Mean |accuracy - confidence| over equal-width bins of confidence, weighted by rows (Guo et al., arXiv:1706.04599).

    probabilities (N, C), gold (N,); bins are open below and closed above: (0, 1/bins], ..., (1 - 1/bins, 1].
    """
    _require_rows(gold)
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of_row = (confidence * bins).ceil().long().clamp(1, bins) - 1
    surplus = (predicted == gold).double() - confidence
    per_bin = torch.zeros(bins, dtype=torch.float64, device=gold.device).index_add(0, bin_of_row, surplus)
    return float(per_bin.abs().sum() / len(gold))


def bootstrap_interval(
    gold: Tensor,
    predicted: Tensor,
    statistic: Literal["accuracy", "macro_f1"],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic when rows are drawn anew with replacement; (low, high).

    Both statistics depend on rows only through how often each (gold, predicted) pair occurs, so the pairs' counts are
    drawn from their multinomial instead of the rows: the cost does not grow with the number of rows.
    """
    _require_rows(gold)
    pairs, counts = torch.stack([gold, predicted]).cpu().unique(dim=1, return_counts=True)
    drawn = _multinomial(counts, resamples, torch.Generator().manual_seed(seed))
    ids, dense = pairs.unique(return_inverse=True)
    totals = torch.zeros(3, resamples, len(ids), dtype=torch.float64)
    hit = pairs[0] == pairs[1]
    totals[0].index_add_(1, dense[0][hit], drawn[:, hit])
    totals[1].index_add_(1, dense[0], drawn)
    totals[2].index_add_(1, dense[1], drawn)
    values = {"accuracy": _accuracy, "macro_f1": _macro_f1}[statistic](*totals)
    tail = (1 - level) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _counts(gold: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per class that occurs, (K,) each: rows predicted right, rows of the class, rows predicted as the class."""
    _require_rows(gold)
    ids, dense = torch.stack([gold, predicted]).unique(return_inverse=True)
    right = dense[0][gold == predicted]
    counts = [torch.bincount(each, minlength=len(ids)).double() for each in (right, dense[0], dense[1])]
    return counts[0], counts[1], counts[2]


def _accuracy(right: Tensor, gold: Tensor, predicted: Tensor) -> Tensor:
    """(..., K) counts -> (...,)."""
    return right.sum(dim=-1) / gold.sum(dim=-1)


def _macro_f1(right: Tensor, gold: Tensor, predicted: Tensor) -> Tensor:
    """(..., K) counts -> (...,), the mean over the classes that occur."""
    return _f1(right, gold, predicted).sum(dim=-1) / (gold + predicted > 0).sum(dim=-1)


def _f1(right: Tensor, gold: Tensor, predicted: Tensor) -> Tensor:
    """2 TP / (gold + predicted), 0 for a class that does not occur; precision and recall need not be defined."""
    return 2 * right / (gold + predicted).clamp_min(1)


def _multinomial(counts: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """(M,) counts of N rows -> (draws, M): N rows drawn with replacement, `draws` times.

    Cell by cell: each takes a binomial share of the rows that the cells before it left.
    """
    left = torch.full((draws,), float(counts.sum()), dtype=torch.float64)
    weight_left = counts.flip(0).cumsum(0).flip(0)
    drawn = torch.empty(len(counts), draws, dtype=torch.float64)
    for cell, share in enumerate((counts / weight_left).tolist()):
        drawn[cell] = torch.binomial(left, torch.full_like(left, share), generator=generator)
        left = left - drawn[cell]
    return drawn.T


def _require_rows(gold: Tensor) -> None:
    if len(gold) == 0:
        raise ValueError("no rows to score")
