"""How far probabilities are what they say. The temperature that mends it is `abstention.fit_temperature`."""

from __future__ import annotations

import torch
from torch import Tensor


def log_loss(probabilities: Tensor, gold: Tensor) -> float:
    """Mean of -log p(gold), in nats; probabilities (N, C), gold (N,) class ids. A probability of 0 counts as 1e-12."""
    return -float(probabilities.double().gather(1, gold[:, None]).clamp_min(1e-12).log().mean())


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
