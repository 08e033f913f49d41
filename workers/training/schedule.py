"""The learning rate, step by step: the shape that student and encoder teachers share."""

from __future__ import annotations

import torch

from app.options import OTHER_LEARNING_RATE, Training


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of all its parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """Linear warm-up to the peak over `warmup_ratio` of the steps, then linear decay to 0 at the end."""
    peak = training.learning_rate or OTHER_LEARNING_RATE
    warm_up = training.warmup_ratio * total_steps
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    return peak * (total_steps - step) / max(1.0, total_steps - warm_up)
