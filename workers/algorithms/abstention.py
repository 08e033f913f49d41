"""When a classifier should abstain: its temperature, the threshold for a target accuracy, and coverage against accuracy.

N rows, C classes. Selective classification as in El-Yaniv and Wiener 2010; temperature as in Guo et al., arXiv:1706.04599.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

LEAST_KEPT = 10
"""An accuracy over fewer kept rows proves too little to set a threshold by."""
LOWEST, HIGHEST = 0.05, 20.0
"""Of inverse temperatures."""
POINTS = 20
SMALLEST = 1e-30


class Point(TypedDict):
    """What happens when only the surest rows are answered."""

    coverage: float
    """Share of rows that are kept."""
    threshold: float
    """The least confidence among them."""
    accuracy: float
    """Of the kept rows."""
    with_teacher: float | None
    """Of all rows, when the teacher answers those that are not kept; None where it is not known."""


def soften(probabilities: Tensor, temperature: float) -> Tensor:
    """(N, C) softmax(logits / temperature), from softmax(logits); float64."""
    return (probabilities.double().clamp_min(SMALLEST).log() / temperature).softmax(dim=1)


def fit_temperature(probabilities: Tensor, gold: Tensor) -> float:
    """The temperature with the least cross-entropy on rows of known class; 1 where there is no row.

    probabilities (N, C), gold (N,). The classes are smoothed by 1 / (N + 2), as Platt does, so that a few rows that are
    all right do not make the classifier certain. Cross-entropy is convex in the inverse temperature: golden section.
    """
    rows, classes = probabilities.shape
    if rows == 0:
        return 1.0
    scores = probabilities.double().clamp_min(SMALLEST).log()
    doubt = 1 / (rows + 2)
    targets = torch.full_like(scores, doubt / max(1, classes - 1))
    targets[torch.arange(rows), gold] = 1 - doubt

    def loss(inverse: float) -> float:
        return float(-(targets * (inverse * scores).log_softmax(dim=1)).sum(dim=1).mean())

    low, high = LOWEST, HIGHEST
    golden = (5**0.5 - 1) / 2
    for _ in range(60):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2 / (low + high)


def threshold_for(confidence: Tensor, right: Tensor, target: float) -> float | None:
    """The lowest threshold at which the rows at or above it are right in at least `target`; 0 keeps every row.

    confidence (N,), right (N,) bool. At least LEAST_KEPT rows must be kept, or all where there are fewer. The threshold
    lies halfway to the next row below. None where no threshold will do.
    """
    accuracy, kept, order = _cuts(confidence, right)
    enough = (accuracy >= target) & (kept >= min(LEAST_KEPT, len(confidence)))
    if not enough.any():
        return None
    last = int(enough.nonzero().max())
    if int(kept[last]) == len(confidence):
        return 0.0
    return float((order[kept[last] - 1] + order[kept[last]]) / 2)


def _cuts(confidence: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Accuracy and number of rows kept, for each place where the order can be cut, and the confidences from the top."""
    order, places = confidence.double().sort(descending=True, stable=True)
    kept = torch.arange(1, len(order) + 1)
    accuracy = right[places].double().cumsum(0) / kept
    is_last_of_its_value = torch.ones(len(order), dtype=torch.bool)
    is_last_of_its_value[:-1] = order[:-1] > order[1:]
    return accuracy[is_last_of_its_value], kept[is_last_of_its_value], order


def coverage_curve(confidence: Tensor, right: Tensor, teacher_right: Tensor | None = None) -> list[Point]:
    """What is gained by answering only the surest rows, at POINTS shares of coverage up to all of them.

    confidence (N,), right (N,) bool, teacher_right (N,) bool.
    """
    order, places = confidence.double().sort(descending=True, stable=True)
    right = right[places].double()
    teacher = None if teacher_right is None else teacher_right[places].double()
    points: list[Point] = []
    for count in sorted({max(1, round(len(order) * step / POINTS)) for step in range(1, POINTS + 1)}):
        mixed = None if teacher is None else float(torch.cat([right[:count], teacher[count:]]).mean())
        points.append(
            {
                "coverage": count / len(order), "threshold": float(order[count - 1]),
                "accuracy": float(right[:count].mean()), "with_teacher": mixed,
            }
        )  # fmt: skip
    return points
