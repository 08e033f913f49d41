"""Temperature, threshold and coverage: by hand, and against slow, obvious versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from workers.algorithms.abstention import (
    LEAST_KEPT,
    coverage_curve,
    fit_temperature,
    soften,
    threshold_for,
)


def test_softening_undoes_a_softmax_with_another_temperature() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    softened = soften(logits.softmax(dim=1), 2.5)
    assert torch.allclose(softened, (logits / 2.5).softmax(dim=1), atol=1e-12)


def test_the_temperature_that_made_the_rows_overconfident_is_found() -> None:
    luck = torch.Generator().manual_seed(1)
    logits = torch.randn(20_000, 3, generator=luck, dtype=torch.float64) * 2
    gold = torch.multinomial(logits.softmax(dim=1), 1, generator=luck).squeeze(1)
    assert fit_temperature((3 * logits).softmax(dim=1), gold) == pytest.approx(3, rel=0.05)
    assert fit_temperature((logits / 2).softmax(dim=1), gold) == pytest.approx(0.5, rel=0.05)


def test_the_temperature_is_the_best_on_a_grid() -> None:
    luck = torch.Generator().manual_seed(2)
    probabilities = torch.randn(40, 5, generator=luck, dtype=torch.float64).softmax(dim=1)
    gold = torch.randint(5, (40,), generator=luck)
    targets = torch.full((40, 5), (1 / 42) / 4, dtype=torch.float64)
    targets[torch.arange(40), gold] = 1 - 1 / 42

    def loss(temperature: float) -> float:
        return float(-(targets * soften(probabilities, temperature).log()).sum(dim=1).mean())

    found = fit_temperature(probabilities, gold)
    assert loss(found) <= min(loss(1 / inverse) for inverse in np.linspace(0.05, 20, 4000)) + 1e-9


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_few_rows_that_are_all_right_do_not_make_the_student_certain(rows: int) -> None:
    probabilities = tensor([[0.9, 0.1]]).repeat(rows, 1)
    temperature = fit_temperature(probabilities, torch.zeros(rows, dtype=torch.long))
    assert math.isfinite(temperature)
    assert soften(tensor([[0.9, 0.1]]), temperature)[0, 0] < 0.99


def test_the_threshold_keeps_as_many_rows_as_the_target_allows() -> None:
    confidence = tensor([0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92, 0.91, 0.90, 0.6, 0.5])
    right = tensor([True] * 9 + [False, True, False])
    assert threshold_for(confidence, right, 0.9) == pytest.approx((0.6 + 0.5) / 2), "10 of 11 are right"
    assert threshold_for(confidence, right, 0.8) == 0.0, "10 of 12 are right"
    assert threshold_for(confidence, right, 0.95) is None, "9 of 9 would be, but that is too few to tell"


def test_rows_of_equal_confidence_are_kept_or_left_together() -> None:
    confidence = tensor([0.9] * 10 + [0.5] * 10)
    right = tensor([True] * 15 + [False] * 5)
    assert threshold_for(confidence, right, 0.8) == pytest.approx(0.7)


def slow_threshold(confidence: list[float], right: list[bool], target: float) -> int:
    """How many rows the best threshold keeps, by trying each; 0: none will do."""
    best = 0
    for limit in confidence:
        kept = [ok for value, ok in zip(confidence, right, strict=True) if value >= limit]
        if len(kept) >= min(LEAST_KEPT, len(confidence)) and sum(kept) / len(kept) >= target:
            best = max(best, len(kept))
    return best


@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=40), st.sampled_from([0.5, 0.75, 0.9])
)
def test_the_threshold_keeps_what_trying_every_one_finds(rows: list[tuple[int, bool]], target: float) -> None:
    confidence, right = [value / 16 for value, _ in rows], [ok for _, ok in rows]
    found = threshold_for(tensor(confidence, dtype=torch.float64), tensor(right), target)
    kept = 0 if found is None else sum(value >= found for value in confidence)
    assert kept == slow_threshold(confidence, right, target)


def test_the_curve_tells_what_the_surest_rows_and_the_teacher_are_worth() -> None:
    confidence = tensor([0.5, 0.9, 0.7, 0.8])
    right = tensor([False, True, False, True])
    teacher = tensor([True, False, True, False])
    points = coverage_curve(confidence, right, teacher)
    assert [point["coverage"] for point in points] == [0.25, 0.5, 0.75, 1.0]
    assert [point["threshold"] for point in points] == pytest.approx([0.9, 0.8, 0.7, 0.5])
    assert [point["accuracy"] for point in points] == pytest.approx([1, 1, 2 / 3, 0.5])
    assert [point["with_teacher"] for point in points] == pytest.approx([0.75, 1, 0.75, 0.5])
    assert all(point["with_teacher"] is None for point in coverage_curve(confidence, right))
