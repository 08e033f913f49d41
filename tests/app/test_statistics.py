"""Bootstrap, ranks and deviations against scikit-learn, scipy and a slow, obvious version."""

from __future__ import annotations

import statistics as standard

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import accuracy_score, f1_score

from app.statistics import average_ranks, paired_bootstrap, spread

SCORES = {
    "accuracy": accuracy_score,
    "macro_f1": lambda gold, answers: f1_score(gold, answers, average="macro", zero_division=0),
}


def runs(rows: int, quality: list[float], seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Gold classes, and answers of runs that are right with the given probabilities."""
    luck = np.random.default_rng(seed)
    gold = luck.choice(4, rows, p=[0.5, 0.3, 0.15, 0.05])
    return gold, [np.where(luck.random(rows) < share, gold, luck.integers(0, 4, rows)) for share in quality]


def plain_macro_f1(gold: np.ndarray, answers: np.ndarray) -> float:
    """The mean of 2 TP / (gold + predicted); scikit-learn's takes milliseconds a call."""
    classes = set(gold) | set(answers)
    return sum(
        2 * ((gold == c) & (answers == c)).sum() / ((gold == c).sum() + (answers == c).sum()) for c in classes
    ) / len(classes)


def test_the_difference_is_that_of_the_mean_scores() -> None:
    gold, (a, b, c, d) = runs(200, [0.5, 0.6, 0.7, 0.8], 1)
    outcome = paired_bootstrap(gold, [a, b], [c, d])
    for name, score in SCORES.items():
        expected = np.mean([score(gold, c), score(gold, d)]) - np.mean([score(gold, a), score(gold, b)])
        assert outcome[name][0] == pytest.approx(expected, abs=1e-12)
        assert outcome[name][1] < outcome[name][0] < outcome[name][2]


def test_the_interval_is_that_of_drawing_rows_one_by_one() -> None:
    gold, (a, b) = runs(150, [0.55, 0.75], 2)
    outcome = paired_bootstrap(gold, [a], [b], resamples=4000)
    luck = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in SCORES}
    for _ in range(2000):
        rows = luck.integers(0, len(gold), len(gold))
        drawn["accuracy"].append((gold[rows] == b[rows]).mean() - (gold[rows] == a[rows]).mean())
        drawn["macro_f1"].append(plain_macro_f1(gold[rows], b[rows]) - plain_macro_f1(gold[rows], a[rows]))
    for name, (_, low, high) in outcome.items():
        width = high - low
        assert np.quantile(drawn[name], [0.025, 0.975]) == pytest.approx([low, high], abs=0.12 * width), name


def test_the_same_rows_are_drawn_for_both_so_equal_answers_never_differ() -> None:
    gold, (a,) = runs(80, [0.5], 3)
    assert paired_bootstrap(gold, [a], [a.copy()]) == {"accuracy": (0, 0, 0), "macro_f1": (0, 0, 0)}


def test_pairing_makes_the_interval_narrower_than_that_of_strangers() -> None:
    gold, (a, _) = runs(300, [0.7, 0.7], 4)
    nearly = a.copy()
    nearly[:6] = gold[:6]
    stranger = runs(300, [0.7, 0.72], 5)[1][1]
    paired, unpaired = (paired_bootstrap(gold, [a], [b])["accuracy"] for b in (nearly, stranger))
    assert paired[2] - paired[1] < 0.5 * (unpaired[2] - unpaired[1])


def test_a_gold_class_that_nobody_can_answer_counts_as_a_class() -> None:
    gold, answers = np.array([0, 1, 7, 7]), np.array([0, 1, 1, 0])
    outcome = paired_bootstrap(gold, [answers], [np.array([0, 1, 1, 1])])
    first, second = (SCORES["macro_f1"](gold, each) for each in (answers, [0, 1, 1, 1]))
    assert outcome["macro_f1"][0] == pytest.approx(second - first, abs=1e-12)


def test_ranks_share_the_mean_of_tied_places() -> None:
    scores = [[0.9, 0.7, 0.9, 0.1], [0.2, 0.8, 0.3, 0.5]]
    expected = np.mean([rankdata([-score for score in block]) for block in scores], axis=0)
    assert average_ranks(scores) == expected.tolist()
    assert average_ranks(scores)[:2] == [(1.5 + 4) / 2, (3 + 1) / 2]


def test_the_deviation_is_that_of_a_sample() -> None:
    assert spread([0.5]) == (0.5, None)
    values = [0.1, 0.4, 0.6]
    assert spread(values) == pytest.approx((standard.mean(values), standard.stdev(values)))
