"""How far probabilities are what they say."""

from __future__ import annotations

import pytest
import torch

from workers.algorithms import calibration


def test_reliability_by_hand() -> None:
    probabilities = torch.tensor([[0.65, 0.35], [0.7, 0.3], [0.05, 0.95]])
    bins = calibration.reliability(probabilities, torch.tensor([0, 1, 1]))
    assert [bin for bin in bins if bin[0]] == [(2, pytest.approx(0.675), 0.5), (1, pytest.approx(0.95), 1.0)]
    assert bins[6][0] == 2


def test_the_log_loss_by_hand() -> None:
    probabilities = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    expected = (-torch.tensor(0.25).log() - torch.tensor(1e-12, dtype=torch.float64).log()) / 2
    assert calibration.log_loss(probabilities, torch.tensor([0, 1])) == pytest.approx(expected.item())
