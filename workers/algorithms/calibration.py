"""How far probabilities are what they say, and one temperature that mends it (Guo et al., arXiv:1706.04599)."""

from __future__ import annotations

import torch
from torch import Tensor

COLDEST, HOTTEST = 0.05, 20.0
STEPS = 60


def fit_temperature(probabilities: Tensor, gold: Tensor) -> float:
    """The T within [0.05, 20] that minimises the log-loss of softmax(log p / T); probabilities (N, C), gold (N,) class ids.

    The loss is convex in 1/T; its slope, the mean of E[log p] under the scaled distribution less the gold's log p, is
    bisected. Rounded to four digits, so that machines which differ in the last bits agree. Raises ValueError without rows.
    """
    if len(gold) == 0:
        raise ValueError("no rows to fit a temperature to")
    logs = _logs(probabilities)
    of_gold = logs.gather(1, gold[:, None]).mean()
    low, high = torch.tensor(1 / HOTTEST).log().item(), torch.tensor(1 / COLDEST).log().item()
    for _ in range(STEPS):
        middle = (low + high) / 2
        scaled = (logs * torch.tensor(middle).exp()).softmax(dim=1)
        slope = (scaled * logs).sum(dim=1).mean() - of_gold
        low, high = (low, middle) if slope > 0 else (middle, high)
    return round(torch.tensor(-(low + high) / 2, dtype=torch.float64).exp().item(), 4)


def scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """softmax(log p / T), (N, C) float64; rows of NaN stay so."""
    return (_logs(probabilities) / temperature).softmax(dim=1)


def log_loss(probabilities: Tensor, gold: Tensor) -> float:
    """Mean of -log p(gold), in nats."""
    return -float(_logs(probabilities).gather(1, gold[:, None]).mean())


def reliability(probabilities: Tensor, gold: Tensor, bins: int = 10) -> list[tuple[int, float, float]]:
    """For each bin of confidence, from 0 up: rows, their mean confidence and their accuracy (0 where there are none).

    Bins are of equal width, open below and closed above, as in `metrics.expected_calibration_error`.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of_row = (confidence * bins).ceil().long().clamp(1, bins) - 1
    right = (predicted == gold).double()
    rows, sure, hit = (
        torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of_row, each)
        for each in (torch.ones_like(confidence), confidence, right)
    )
    return [
        (int(count), each_sure / max(count, 1), each_hit / max(count, 1))
        for count, each_sure, each_hit in zip(rows.tolist(), sure.tolist(), hit.tolist(), strict=True)
    ]


def _logs(probabilities: Tensor) -> Tensor:
    """log p in float64; a probability of 0 counts as 1e-12."""
    return probabilities.double().clamp_min(1e-12).log()
