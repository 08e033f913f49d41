"""Temperature and reliability."""

from __future__ import annotations

import pytest
import torch

from workers.algorithms import calibration
from workers.algorithms.metrics import expected_calibration_error


def overconfident(rows: int, sharpness: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Distributions raised to a power after the true labels were drawn from them."""
    draw = torch.Generator().manual_seed(0)
    honest = (2 * torch.randn(rows, 4, generator=draw, dtype=torch.float64)).softmax(dim=1)
    gold = torch.multinomial(honest, 1, generator=draw)[:, 0]
    return honest.pow(sharpness) / honest.pow(sharpness).sum(dim=1, keepdim=True), gold


def test_the_temperature_by_hand() -> None:
    # Sure at odds of 9, right in 3 of 4 rows, odds of 3: log 9 / T = log 3.
    probabilities = torch.tensor([[0.9, 0.1]] * 4)
    assert calibration.fit_temperature(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx(2.0, abs=1e-4)
    torch.testing.assert_close(
        calibration.scaled(probabilities, 2.0)[:, 0], torch.full((4,), 0.75, dtype=torch.float64)
    )


def test_the_temperature_is_the_one_a_slow_search_finds() -> None:
    probabilities, gold = overconfident(500, 2.5)
    grid = torch.linspace(0.5, 5, 451).tolist()
    searched = min(grid, key=lambda each: calibration.log_loss(calibration.scaled(probabilities, each), gold))
    assert calibration.fit_temperature(probabilities, gold) == pytest.approx(searched, abs=0.01)


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 3.0])
def test_scaling_makes_confidence_honest_and_keeps_the_labels(sharpness: float) -> None:
    probabilities, gold = overconfident(4000, sharpness)
    temperature = calibration.fit_temperature(probabilities, gold)
    assert temperature == pytest.approx(sharpness, rel=0.1)
    after = calibration.scaled(probabilities, temperature)
    assert expected_calibration_error(after, gold) < 0.03
    assert (after.argmax(dim=1) == probabilities.argmax(dim=1)).all()


def test_a_teacher_that_is_always_right_gets_the_coldest_temperature() -> None:
    assert calibration.fit_temperature(torch.tensor([[0.9, 0.1]] * 3), torch.zeros(3, dtype=torch.long)) == 0.05


def test_reliability_by_hand() -> None:
    probabilities = torch.tensor([[0.65, 0.35], [0.7, 0.3], [0.05, 0.95]])
    bins = calibration.reliability(probabilities, torch.tensor([0, 1, 1]))
    assert [bin for bin in bins if bin[0]] == [(2, pytest.approx(0.675), 0.5), (1, pytest.approx(0.95), 1.0)]
    assert bins[6][0] == 2


def test_no_rows_are_no_temperature() -> None:
    with pytest.raises(ValueError, match="no rows"):
        calibration.fit_temperature(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
