"""Each baseline: one case by hand, one comparison with a slow version in plain Python."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional

from tests.algorithms.batches import distributions, random_batches, reasons, step, walk
from workers.algorithms.selection import Signals
from workers.algorithms.selection.cckd_l import CCKDL
from workers.algorithms.selection.cckd_t_reg import CCKDTReg
from workers.algorithms.selection.entropy_score import EntropyScore
from workers.algorithms.selection.freematch import FreeMatch
from workers.algorithms.selection.no_selection import NoSelection
from workers.algorithms.selection.random import Random
from workers.algorithms.selection.softmatch import SoftMatch
from workers.algorithms.selection.unixkd import UNIXKD


def slow_entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


# --- no_selection ---------------------------------------------------------------------------------------------------


def test_no_selection_trains_on_every_row_with_the_mean_cross_entropy() -> None:
    teacher = distributions([0.9, 0.1], [0.3, 0.7])
    selection, _, _ = step(NoSelection(), {}, teacher, teacher)
    assert selection.mask.all()
    loss = NoSelection().loss(distributions([0.0, 0.0], [1.0, 0.0]), teacher, selection)
    assert float(loss) == pytest.approx((math.log(2) + math.log(1 + math.e)) / 2)


# --- random ---------------------------------------------------------------------------------------------------------


def test_random_keeps_the_ratio_exactly_where_it_is_a_whole_number_of_rows() -> None:
    teacher = torch.full((20, 2), 0.5)
    for seed in range(20):
        selection, _, _ = step(Random(ratio=0.3), {}, teacher, teacher, seed=seed)
        assert int(selection.mask.sum()) == 6
        assert reasons(selection).count("not_drawn") == 14


def test_random_meets_the_ratio_on_average_and_every_row_equally_often() -> None:
    teacher, rule, draws = torch.full((7, 2), 0.5), Random(ratio=0.3), 2000
    masks = torch.stack([step(rule, {}, teacher, teacher, seed=seed)[0].mask for seed in range(draws)])
    assert set(masks.sum(1).tolist()) == {2, 3}
    error = math.sqrt(0.3 * 0.7 / draws)
    assert (masks.float().mean(0) - 0.3).abs().max() < 4.5 * error


# --- freematch ------------------------------------------------------------------------------------------------------


def test_freematch_by_hand() -> None:
    # Mean confidence .7, so τ = .5·.5 + .5·.7 = .6; mean probabilities (.6, .4), so p = (.55, .45): thresholds .6 and .6·9/11.
    student = distributions([0.9, 0.1], [0.3, 0.7], [0.68, 0.32], [0.52, 0.48])
    rule = FreeMatch(momentum=0.5)
    selection, state, _ = step(rule, rule.initial(2), torch.full((4, 2), 0.5), student)
    assert rule.thresholds(state)["student"].tolist() == pytest.approx([0.6, 0.6 * 9 / 11])
    assert reasons(selection) == ["selected", "selected", "selected", "student_unsure"]
    assert selection.student_threshold.tolist() == pytest.approx([0.6, 0.6 * 9 / 11, 0.6, 0.6])


def test_freematch_equals_a_slow_version_of_itself() -> None:
    rule, classes = FreeMatch(momentum=0.9), 5
    state, level, share = rule.initial(classes), 1 / classes, [1 / classes] * classes
    for teacher, student in random_batches(absent=2):
        teacher, student = teacher.double(), student.double()
        selection, state, _ = step(rule, state, teacher, student)
        rows = student.tolist()
        level = 0.9 * level + 0.1 * sum(max(row) for row in rows) / len(rows)
        share = [0.9 * share[c] + 0.1 * sum(row[c] for row in rows) / len(rows) for c in range(classes)]
        thresholds = [level * value / max(share) for value in share]
        assert selection.mask.tolist() == [max(row) >= thresholds[row.index(max(row))] for row in rows]
        assert rule.thresholds(state)["student"].tolist() == pytest.approx(thresholds, abs=1e-12)


def test_freematch_keeps_rows_that_tie_with_their_threshold() -> None:
    rule = FreeMatch(momentum=0.7)
    same = distributions(*[[1 / 3, 1 / 3, 1 / 3]] * 7)
    assert all(selection.mask.all() for selection in walk(rule, [(same, same)] * 10)[0])


def test_freematch_divides_by_the_whole_batch() -> None:
    rule, logits = FreeMatch(momentum=0.0), torch.randn(16, 5)
    teacher, student = random_batches(1)[0]
    selection, _, _ = step(rule, rule.initial(5), teacher, student)
    assert 0 < selection.mask.sum() < 16
    chosen = selection.mask.nonzero().flatten().tolist()
    expected = sum(float(-logits[b].log_softmax(0)[teacher[b].argmax()]) for b in chosen) / 16
    assert float(rule.loss(logits[chosen], teacher[chosen], selection)) == pytest.approx(expected, rel=1e-5)


# --- softmatch ------------------------------------------------------------------------------------------------------


def test_softmatch_by_hand() -> None:
    # Confidences .9 and .5: mean .7, unbiased variance .08; with λ = 0 these are μ and σ². ω = exp(-.2²/(2·.08/4)) = 1/e.
    rule = SoftMatch(momentum=0.0, uniform_alignment=False)
    student = distributions([0.9, 0.1], [0.5, 0.5])
    selection, state, _ = step(rule, rule.initial(2), student, student)
    assert selection.weights.tolist() == pytest.approx([1.0, math.exp(-1)])
    assert selection.mask.all()
    assert rule.thresholds(state)["student"].tolist() == pytest.approx([0.7, 0.7])
    loss = rule.loss(torch.zeros(2, 2), student, selection)
    assert float(loss) == pytest.approx(math.log(2) * (1 + math.exp(-1)) / 2)


@pytest.mark.parametrize("alignment", [False, True])
def test_softmatch_equals_a_slow_version_of_itself(alignment: bool) -> None:
    rule, classes, m = SoftMatch(momentum=0.9, uniform_alignment=alignment), 5, 0.9
    state = rule.initial(classes)
    mean, variance, share = 1 / classes, 1.0, None
    for teacher, student in random_batches(absent=2):
        teacher, student = teacher.double(), student.double()
        selection, state, _ = step(rule, state, teacher, student)
        rows = student.tolist()
        if alignment:
            now = [sum(row[c] for row in rows) / len(rows) for c in range(classes)]
            share = now if share is None else [m * old + (1 - m) * new for old, new in zip(share, now, strict=True)]
            scaled = [[q * (1 / classes + 1e-6) / (p + 1e-6) for q, p in zip(row, share, strict=True)] for row in rows]
            rows = [[value / sum(row) for value in row] for row in scaled]
        tops = [max(row) for row in rows]
        average = sum(tops) / len(tops)
        mean = m * mean + (1 - m) * average
        variance = m * variance + (1 - m) * sum((top - average) ** 2 for top in tops) / (len(tops) - 1)
        expected = [math.exp(-(min(top - mean, 0.0) ** 2) / (2 * variance / 4)) for top in tops]
        assert selection.weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_softmatch_survives_a_batch_of_one_row_and_a_batch_without_variance() -> None:
    rule = SoftMatch(momentum=0.0)
    row = distributions([0.7, 0.3])
    one, state, _ = step(rule, rule.initial(2), row, row)
    assert float(state["variance"]) == 1.0
    same, _, _ = step(rule, state, row.expand(4, 2), row.expand(4, 2))
    assert one.weights.tolist() == [1.0]
    assert same.weights.tolist() == pytest.approx([1.0] * 4)


# --- cckd -----------------------------------------------------------------------------------------------------------


def test_cckd_l_trains_on_every_row_with_the_mean_of_its_losses() -> None:
    teacher, logits = distributions([1.0, 0.0], [0.5, 0.5]), distributions([0.0, 0.0], [2.0, 0.0])
    selection, _, _ = step(CCKDL(), {}, teacher, teacher)
    assert selection.mask.all()
    # Row 1: log 2. Row 2: half of CE(T, S) and half of CE(label 0, S).
    low, high = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    expected = (math.log(2) + 0.5 * (low + high) / 2 + 0.5 * low) / 2
    assert float(CCKDL().loss(logits, teacher, selection)) == pytest.approx(expected)


def test_cckd_t_reg_by_hand() -> None:
    # Bound 1 - exp(-.2·2) = .330: margins .8 (right), .2 (right), .8 (wrong).
    teacher = distributions([0.9, 0.1], [0.9, 0.1], [0.2, 0.8])
    student = distributions([0.9, 0.1], [0.6, 0.4], [0.9, 0.1])
    selection, _, _ = step(CCKDTReg(alpha=0.2), {}, teacher, student, epoch=2)
    assert reasons(selection) == ["already_known", "selected", "selected"]
    assert selection.student_threshold.tolist() == pytest.approx([1 - math.exp(-0.4)] * 3)


def test_cckd_t_reg_keeps_exactly_the_misclassified_rows_in_the_first_epoch() -> None:
    for teacher, student in random_batches():
        selection, _, _ = step(CCKDTReg(), {}, teacher, student, epoch=0)
        assert torch.equal(selection.mask, teacher.argmax(1) != student.argmax(1))
    undecided_but_right = distributions([0.5, 0.5])
    assert not step(CCKDTReg(), {}, undecided_but_right, undecided_but_right, epoch=0)[0].mask.any()


def test_cckd_t_reg_equals_a_slow_version_of_itself() -> None:
    rule = CCKDTReg(alpha=0.3)
    for epoch, (teacher, student) in enumerate(random_batches()):
        selection, _, _ = step(rule, {}, teacher, student, epoch=epoch)
        expected = []
        for taught, known in zip(teacher.tolist(), student.tolist(), strict=True):
            first, second = sorted(known, reverse=True)[:2]
            wrong = known.index(first) != taught.index(max(taught))
            expected.append(wrong or first - second < 1 - math.exp(-0.3 * epoch))
        assert selection.mask.tolist() == expected


def test_cckd_t_reg_averages_over_the_selected_rows() -> None:
    rule, logits = CCKDTReg(), torch.randn(16, 5)
    teacher, student = random_batches(1)[0]
    selection, _, _ = step(rule, {}, teacher, student)
    confidence, labels = teacher.max(1, keepdim=True)
    target = confidence * teacher + (1 - confidence) * functional.one_hot(labels[:, 0], 5)
    per_row = -(target * logits.log_softmax(1)).sum(1)
    loss = rule.loss(logits[selection.mask], teacher[selection.mask], selection)
    assert float(loss) == pytest.approx(float(per_row[selection.mask].mean()), rel=1e-5)


# --- entropy_score --------------------------------------------------------------------------------------------------


def test_entropy_score_by_hand() -> None:
    teacher = distributions([0.5, 0.5], [1.0, 0.0], [0.7, 0.3], [0.1, 0.9])
    assert EntropyScore(ratio=0.5).prepare(teacher).tolist() == [False, True, False, True]


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_entropy_score_equals_a_slow_version_of_itself(ratio: float) -> None:
    teacher = torch.cat([teacher for teacher, _ in random_batches()])
    order = sorted(range(len(teacher)), key=lambda row: slow_entropy(teacher[row].tolist()))
    kept = set(order[: round(ratio * len(order))])
    assert EntropyScore(ratio=ratio).prepare(teacher).tolist() == [row in kept for row in range(len(teacher))]


def test_a_higher_ratio_keeps_all_that_a_lower_one_keeps() -> None:
    teacher = random_batches(1, rows=200)[0][0]
    subsets = [EntropyScore(ratio=ratio / 10).prepare(teacher) for ratio in range(1, 11)]
    assert all(not (few & ~more).any() for few, more in itertools.pairwise(subsets))


def test_entropy_score_drops_no_class_of_a_sorted_dataset_whose_teacher_is_always_sure() -> None:
    labels = torch.arange(4).repeat_interleave(100)
    kept = EntropyScore(ratio=0.25).prepare(torch.eye(4)[labels])
    assert torch.bincount(labels[kept]).min() > 10


def test_entropy_score_trains_on_its_subset_alone() -> None:
    teacher = distributions([0.5, 0.5], [1.0, 0.0])
    rule = EntropyScore(ratio=0.5)
    subset = rule.prepare(teacher)
    offered, state = rule.offer({}, teacher, subset)
    assert torch.equal(offered, subset)
    selection, _ = rule.select(state, Signals(teacher, teacher, offered, subset, 0, torch.Generator()))
    assert reasons(selection) == ["outside_subset", "selected"]


# --- unixkd ---------------------------------------------------------------------------------------------------------


def test_unixkd_by_hand() -> None:
    student = distributions([0.5, 0.5], [1.0, 0.0], [0.7, 0.3], [0.1, 0.9])
    selection, _, _ = step(UNIXKD(ratio=0.5), {}, student, student)
    assert reasons(selection) == ["selected", "student_sure", "selected", "student_sure"]
    assert float(selection.uncertainty[0]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_unixkd_keeps_exactly_the_highest_entropies(ratio: float) -> None:
    count = max(1, round(ratio * 16))
    for teacher, student in random_batches():
        selection, _, _ = step(UNIXKD(ratio=ratio), {}, teacher, student)
        order = sorted(range(16), key=lambda row: -slow_entropy(student[row].tolist()))
        assert selection.mask.nonzero().flatten().tolist() == sorted(order[:count])


def test_unixkd_keeps_its_ratio_when_all_rows_tie() -> None:
    student = torch.full((10, 4), 0.25)
    assert step(UNIXKD(ratio=0.3), {}, student, student)[0].mask.sum() == 3
