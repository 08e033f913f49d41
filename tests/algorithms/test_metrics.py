"""The metrics against hand-computed numbers, scikit-learn, and a bootstrap that really draws rows."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from workers.algorithms import metrics


def random_predictions(rows: int, classes: int, seed: int, unknown: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randint(classes, (rows,), generator=generator)
    guess = torch.randint(classes, (rows,), generator=generator)
    predicted = torch.where(torch.rand(rows, generator=generator) < 0.6, gold, guess)
    gold[torch.rand(rows, generator=generator) < unknown] = -1
    return gold, predicted


def test_accuracy_and_macro_f1_by_hand() -> None:
    # F1 of class 0: 2·1/(2 + 1); class 1: 2·1/(1 + 2); class 2 is predicted never and gold never.
    gold, predicted = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    assert metrics.accuracy(gold, predicted) == pytest.approx(2 / 3)
    assert metrics.macro_f1(gold, predicted) == pytest.approx(2 / 3)
    assert metrics.per_class_f1(gold, predicted, 3).tolist() == pytest.approx([2 / 3, 2 / 3, 0.0])


def test_a_class_the_labels_lack_is_wrong_and_a_class_of_its_own() -> None:
    gold, predicted = torch.tensor([0, -1]), torch.tensor([0, 0])
    assert metrics.accuracy(gold, predicted) == 0.5
    assert metrics.macro_f1(gold, predicted) == pytest.approx((2 / 3 + 0) / 2)


@pytest.mark.parametrize("unknown", [0.0, 0.2])
@pytest.mark.parametrize(("rows", "classes"), [(1, 3), (5, 10), (50, 2), (300, 7), (400, 150)])
def test_scores_equal_those_of_scikit_learn(rows: int, classes: int, unknown: float) -> None:
    for seed in range(5):
        gold, predicted = random_predictions(rows, classes, seed, unknown)
        assert metrics.accuracy(gold, predicted) == pytest.approx(accuracy_score(gold, predicted))
        expected = f1_score(gold, predicted, average="macro", zero_division=0)
        assert metrics.macro_f1(gold, predicted) == pytest.approx(expected)
        by_class = f1_score(gold, predicted, average=None, labels=list(range(classes)), zero_division=0)
        assert metrics.per_class_f1(gold, predicted, classes).tolist() == pytest.approx(by_class.tolist())


def test_calibration_error_by_hand() -> None:
    # Two rows at .9, one right: |.5 - .9|; two rows at .6, both right: |1 - .6|. Each half of the rows.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert metrics.expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.4)


def test_calibration_error_equals_a_slow_version_of_itself() -> None:
    probabilities = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
    gold, _ = random_predictions(500, 4, seed=1, unknown=0.1)
    confidence, predicted = probabilities.max(1)
    expected = 0.0
    for low in range(15):
        inside = [row for row in range(500) if low / 15 < float(confidence[row]) <= (low + 1) / 15]
        right = sum(int(predicted[row]) == int(gold[row]) for row in inside)
        expected += abs(right - sum(float(confidence[row]) for row in inside)) / 500
    assert metrics.expected_calibration_error(probabilities, gold) == pytest.approx(expected, abs=1e-6)


def test_a_student_right_as_often_as_it_says_is_calibrated() -> None:
    probabilities = torch.tensor([[0.75, 0.25]]).expand(4, 2)
    assert metrics.expected_calibration_error(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.0)


@pytest.mark.parametrize("statistic", ["accuracy", "macro_f1"])
def test_the_bootstrap_interval_is_that_of_drawing_rows(statistic: str) -> None:
    gold, predicted = random_predictions(300, 4, seed=2, unknown=0.05)
    score = {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1}[statistic]
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(300, (300,), generator=generator) for _ in range(2000)]
    scores = torch.tensor([score(gold[rows], predicted[rows]) for rows in drawn])
    expected = scores.quantile(torch.tensor([0.025, 0.975])).tolist()
    found = metrics.bootstrap_interval(gold, predicted, statistic, resamples=20_000)  # type: ignore[arg-type]
    assert found == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))


def test_the_interval_of_a_flawless_student_is_a_point() -> None:
    gold, _ = random_predictions(100, 3, seed=0)
    assert metrics.bootstrap_interval(gold, gold, "macro_f1") == (1.0, 1.0)


def test_a_higher_level_gives_a_wider_interval_around_the_score() -> None:
    gold, predicted = random_predictions(500, 5, seed=4)
    narrow, wide = (metrics.bootstrap_interval(gold, predicted, "accuracy", level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < metrics.accuracy(gold, predicted) < narrow[1] < wide[1]


def test_the_interval_depends_on_the_seed_and_on_nothing_else() -> None:
    gold, predicted = random_predictions(500, 5, seed=4)
    first = metrics.bootstrap_interval(gold, predicted, "macro_f1", seed=1)
    torch.rand(3)
    assert metrics.bootstrap_interval(gold, predicted, "macro_f1", seed=1) == first
    assert metrics.bootstrap_interval(gold, predicted, "macro_f1", seed=2) != first


def test_no_rows_cannot_be_scored() -> None:
    nothing = torch.empty(0, dtype=torch.long)
    for score in (
        lambda: metrics.accuracy(nothing, nothing),
        lambda: metrics.macro_f1(nothing, nothing),
        lambda: metrics.bootstrap_interval(nothing, nothing, "accuracy"),
        lambda: metrics.expected_calibration_error(torch.empty(0, 2), nothing),
    ):
        with pytest.raises(ValueError, match="no rows"):
            score()
