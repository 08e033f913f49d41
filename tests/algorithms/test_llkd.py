"""LLKD against hand-computed numbers and a slow version in plain Python; its ablations, cold start and weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.algorithms.batches import distributions, random_batches, reasons, step, walk
from workers.algorithms.selection.llkd import LLKD
from workers.algorithms.selection.no_selection import NoSelection

PAPER: dict[str, Any] = {"student_threshold": "moving_average", "warm_up": "none", "floor": 0.0, "class_norm": "max"}


class SlowLLKD:
    """The paper's rule with lists and loops; `batch_level` and `floor` as options describe them."""

    def __init__(
        self, classes: int, momentum: float, scaling: str, norm: str, level: str = "moving_average", floor: float = 0.0
    ) -> None:
        self.norm, self.unit = norm, {"T": 1.0, "S": 1.0}
        self.classes, self.momentum, self.scaling = classes, momentum, scaling
        self.student_level, self.floor = level, floor
        self.level: dict[str, float | None] = {"T": None, "S": None}
        self.by_class: dict[str, list[float | None]] = {"T": [None] * classes, "S": [None] * classes}

    def threshold(self, side: str, c: int) -> float:
        own = self.by_class[side][c]
        level = self.level[side]
        assert level is not None
        return level if own is None else level * own / self.unit[side]

    def update(self, side: str, values: list[float], labels: list[int], rows: list[list[float]]) -> None:
        if not values:
            return
        mean, old = sum(values) / len(values), self.level[side]
        if old is None or (side == "S" and self.student_level == "batch_level"):
            self.level[side] = mean
        else:
            self.level[side] = self.momentum * old + (1 - self.momentum) * mean
        for c in range(self.classes):
            if self.scaling == "class_mean":
                mine = [value for value, label in zip(values, labels, strict=True) if label == c]
                if not mine:
                    continue
                new = sum(mine) / len(mine)
            elif self.scaling == "freematch":
                new = sum(row[c] for row in rows) / len(rows)
            else:
                new = 1.0
            before = self.by_class[side][c]
            self.by_class[side][c] = new if before is None else self.momentum * before + (1 - self.momentum) * new
        known = self.by_class[side]
        if self.norm == "max":
            self.unit[side] = max(value for value in known if value is not None)
        else:
            self.unit[side] = sum(known[label] or 0.0 for label in labels) / len(labels)

    def batch(self, teacher: list[list[float]], student: list[list[float]]) -> list[bool]:
        confidence = [max(row) for row in teacher]
        labels = [row.index(max(row)) for row in teacher]
        self.update("T", confidence, labels, teacher)
        accepted = [b for b, c in enumerate(labels) if confidence[b] >= self.threshold("T", c) - 1e-9]
        entropy = {b: -sum(p * math.log(p) for p in student[b] if p > 0) for b in accepted}
        self.update("S", [entropy[b] for b in accepted], [labels[b] for b in accepted], [student[b] for b in accepted])
        chosen = {b for b in accepted if entropy[b] >= self.threshold("S", labels[b]) - 1e-9}
        for b in sorted(set(accepted) - chosen, key=lambda b: -entropy[b]):
            if len(chosen) < self.floor * len(teacher):
                chosen.add(b)
        return [b in chosen for b in range(len(teacher))]


@pytest.mark.parametrize("floor", [0.0, 0.4])
@pytest.mark.parametrize("level", ["moving_average", "batch_level"])
@pytest.mark.parametrize("norm", ["mean", "max"])
@pytest.mark.parametrize("scaling", ["class_mean", "freematch", "none"])
def test_llkd_equals_a_slow_version_of_itself_with_classes_absent(
    scaling: str, norm: str, level: str, floor: float
) -> None:
    wishes: dict[str, Any] = {"momentum": 0.8, "class_scaling": scaling, "class_norm": norm, "floor": floor}
    rule = LLKD(**wishes, student_threshold=level, warm_up="none")  # type: ignore[arg-type]
    slow = SlowLLKD(classes=5, momentum=0.8, scaling=scaling, norm=norm, level=level, floor=floor)
    state = rule.initial(5)
    for teacher, student in random_batches(20, absent=2):
        teacher, student = teacher.double(), student.double()
        selection, state, _ = step(rule, state, teacher, student)
        assert selection.mask.tolist() == slow.batch(teacher.tolist(), student.tolist())
        for side, name in (("T", "teacher"), ("S", "student")):
            expected = [slow.threshold(side, c) for c in range(5)]
            assert rule.thresholds(state)[name].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_row_is_selected_when_the_teacher_is_sure_and_the_student_is_not() -> None:
    # Mean confidence .75 accepts the rows of .9 and .8; their entropies log 2 and .325 have mean .509.
    teacher = distributions([0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6])
    student = distributions([0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5])
    rule = LLKD(**PAPER, class_scaling="none")
    selection, _, offered = step(rule, rule.initial(2), teacher, student)
    assert offered.tolist() == [True, False, True, False]
    assert selection.mask.tolist() == [True, False, False, False]
    assert reasons(selection) == ["selected", "teacher_unsure", "student_sure", "teacher_unsure"]
    assert selection.teacher_threshold.tolist() == pytest.approx([0.75] * 4)
    sure = -(0.1 * math.log(0.1) + 0.9 * math.log(0.9))
    mean = (math.log(2) + sure) / 2
    for name, expected in (("student_threshold", [mean, mean]), ("uncertainty", [math.log(2), sure])):
        values = getattr(selection, name)
        assert values[[0, 2]].tolist() == pytest.approx(expected)
        assert values[[1, 3]].isnan().all()


def test_thresholds_by_class_follow_the_mean_of_each_class() -> None:
    rule = LLKD(**PAPER, momentum=0.5)
    # Level (.9 + .7 + .8 + .6) / 4 = .75; class means .8 and .7 scale it by 1 and .875.
    everything = torch.ones(4, dtype=torch.bool)
    _, state = rule.offer(rule.initial(2), distributions([0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]), everything)
    assert rule.thresholds(state)["teacher"].tolist() == pytest.approx([0.75, 0.65625])
    # Level .5 (.75 + .7) = .725; class 0 moves to .5 (.8 + .7) = .75, class 1 does not occur and stays at .7.
    _, state = rule.offer(state, distributions([0.6, 0.4], [0.8, 0.2]), everything[:2])
    assert rule.thresholds(state)["teacher"].tolist() == pytest.approx([0.725, 0.725 * 0.7 / 0.75])


def test_the_mean_norm_puts_the_thresholds_at_the_level_on_average() -> None:
    rule = LLKD(momentum=0.5)
    # As above, but the class means .8 and .7 are divided by .75, the mean over the four rows.
    everything = torch.ones(4, dtype=torch.bool)
    _, state = rule.offer(rule.initial(2), distributions([0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]), everything)
    assert rule.thresholds(state)["teacher"].tolist() == pytest.approx([0.8, 0.7])


def test_a_class_never_seen_meets_the_unscaled_level() -> None:
    rule = LLKD(**PAPER)
    _, state = rule.offer(rule.initial(3), distributions([0.6, 0.3, 0.1], [0.8, 0.1, 0.1]), torch.ones(2).bool())
    assert rule.thresholds(state)["teacher"].tolist() == pytest.approx([0.7, 0.7, 0.7])


@pytest.mark.parametrize("confidence", [1.0, 0.9, 0.7, 1 / 3])
def test_rows_of_equal_confidence_and_uncertainty_all_tie_with_their_thresholds(confidence: float) -> None:
    row = [confidence, (1 - confidence) / 2, (1 - confidence) / 2]
    rule = LLKD(**PAPER, momentum=0.7)
    selections, _ = walk(
        rule, [(torch.tensor([row] * 7, dtype=torch.float64), distributions(*[[0.2, 0.3, 0.5]] * 7))] * 10
    )
    assert all(selection.mask.all() for selection in selections)


def test_a_uniform_teacher_has_the_threshold_one_over_classes_and_a_one_hot_teacher_one() -> None:
    rule = LLKD(**PAPER)
    for teacher, expected in ((torch.full((8, 4), 0.25), 0.25), (torch.eye(4), 1.0)):
        _, state = rule.offer(rule.initial(4), teacher, torch.ones(len(teacher)).bool())
        assert rule.thresholds(state)["teacher"].tolist() == pytest.approx([expected] * 4)


def test_one_hot_students_have_no_uncertainty_and_stay_finite() -> None:
    rule = LLKD(**PAPER)
    selection, state, _ = step(rule, rule.initial(3), torch.eye(3), torch.eye(3))
    assert selection.uncertainty.tolist() == [0, 0, 0]
    assert rule.thresholds(state)["student"].isfinite().all()
    assert selection.mask.all()


def test_the_paper_mask_is_both_tests_at_once() -> None:
    rule = LLKD(**PAPER)
    state = rule.initial(5)
    for teacher, student in random_batches():
        selection, state, _ = step(rule, state, teacher, student)
        confidence, labels = teacher.double().max(1)
        sure = confidence >= rule.thresholds(state)["teacher"][labels]
        unsure = torch.special.entr(student.double()).sum(1) >= rule.thresholds(state)["student"][labels]
        assert torch.equal(selection.mask, sure & unsure)


def test_without_student_uncertainty_the_teacher_alone_selects_and_the_student_is_not_asked() -> None:
    alone, both = LLKD(use_student_uncertainty=False, class_norm="max"), LLKD(**PAPER)
    assert not alone.needs_student
    state, other = alone.initial(5), both.initial(5)
    for teacher, student in random_batches():
        selection, state, _ = step(alone, state, teacher, student)
        accepted, other = both.offer(other, teacher, torch.ones(len(teacher)).bool())
        assert torch.equal(selection.mask, accepted)
        assert selection.uncertainty.isnan().all()
    assert set(alone.thresholds(state)) == {"teacher"}


def test_without_teacher_confidence_the_student_alone_selects_among_all_rows() -> None:
    rule = LLKD(**PAPER, use_teacher_confidence=False, class_scaling="none", momentum=0.0)
    for teacher, student in random_batches():
        selection, state, offered = step(rule, rule.initial(5), teacher, student)
        uncertainty = torch.special.entr(student.double()).sum(1)
        assert offered.all()
        assert torch.equal(selection.mask, uncertainty >= uncertainty.mean())
        assert set(rule.thresholds(state)) == {"student"}


def test_without_both_tests_llkd_is_no_selection() -> None:
    rule = LLKD(use_teacher_confidence=False, use_student_uncertainty=False)
    (teacher, student), logits = random_batches(1)[0], torch.randn(16, 5)
    mine, _, _ = step(rule, rule.initial(5), teacher, student)
    all_rows, _, _ = step(NoSelection(), {}, teacher, student)
    assert mine.mask.all()
    assert rule.loss(logits, teacher, mine) == NoSelection().loss(logits, teacher, all_rows)


def frozen(rule: LLKD, teacher_level: float, student_level: float) -> dict[str, Tensor]:
    levels = {"teacher_level": teacher_level, "student_level": student_level}
    seen = {"teacher_seen": torch.ones(5).bool(), "student_seen": torch.ones(5).bool()}
    ones = {"teacher_class": torch.ones(5).double(), "student_class": torch.ones(5).double()}
    return rule.initial(5) | seen | ones | {key: torch.tensor(level).double() for key, level in levels.items()}


def test_thresholds_of_zero_select_every_row_and_an_unreachable_one_none() -> None:
    rule = LLKD(**PAPER, momentum=1 - 1e-12, class_scaling="none")
    teacher, student = random_batches(1)[0]
    assert step(rule, frozen(rule, 0, 0), teacher, student)[0].mask.all()
    nothing, _, offered = step(rule, frozen(rule, 9, 0), teacher, student)
    assert not offered.any()
    assert not nothing.mask.any()
    assert set(reasons(nothing)) == {"teacher_unsure"}
    assert set(reasons(step(rule, frozen(rule, 0, 9), teacher, student)[0])) == {"student_sure"}


def test_nothing_offered_leaves_the_students_averages_alone() -> None:
    rule = LLKD(momentum=1 - 1e-12)
    state = frozen(rule, 9, 0.5)
    after = step(rule, state, *random_batches(1)[0])[1]
    assert all(torch.equal(after[key], state[key]) for key in state if key.startswith(("student", "agree", "warm")))


# --- cold start -----------------------------------------------------------------------------------------------------


def kappa(labels: list[int], predicted: list[int]) -> float:
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(labels, predicted))


def test_warm_up_selects_by_the_teacher_alone_until_kappa_is_high_enough() -> None:
    rule = LLKD(warm_up_agreement=0.3, momentum=0.9)
    state, average, warming = rule.initial(5), 0.0, True
    for teacher, student in random_batches(30):
        selection, state, offered = step(rule, state, teacher, student)
        if warming:
            found = kappa(teacher.argmax(1)[offered].tolist(), student.argmax(1)[offered].tolist())
            average = 0.9 * average + 0.1 * found
            warming = average <= 0.3
        assert rule.summary(state) == {"warming_up": float(warming), "agreement": pytest.approx(average)}
        assert torch.equal(selection.mask, offered) == warming
        assert selection.student_threshold.isnan().all() == warming
    assert not warming


def test_a_student_that_always_says_the_same_never_ends_the_warm_up() -> None:
    rule = LLKD(warm_up_agreement=0.0)
    batches = [(teacher, torch.eye(5)[torch.zeros(16).long()]) for teacher, _ in random_batches(40)]
    _, state = walk(rule, batches)
    assert rule.summary(state) == {"warming_up": 1.0, "agreement": pytest.approx(0.0)}


def test_one_class_in_the_batch_tells_nothing_about_agreement() -> None:
    rule = LLKD(use_teacher_confidence=False)
    same = distributions(*[[0.9, 0.1]] * 4)
    assert rule.summary(step(rule, rule.initial(2), same, same)[1])["agreement"] == 0


def test_the_batch_level_threshold_follows_a_student_whose_entropy_falls_and_the_moving_average_lags() -> None:
    teacher = distributions(*[[0.9, 0.1]] * 16)
    spread = torch.linspace(-1, 1, 16)

    def falling(number: int) -> Tensor:
        return torch.stack([0.3 * number + spread, torch.zeros(16)], 1).softmax(1)

    share: dict[str, list[float]] = {}
    for level, momentum in itertools.product(("batch_level", "moving_average"), (0.5, 0.9, 0.99, 0.999)):
        rule = LLKD(student_threshold=level, momentum=momentum, warm_up="none", floor=0.0)  # type: ignore[arg-type]
        selections, _ = walk(rule, [(teacher, falling(number)) for number in range(20)])
        chosen = sum(int(selection.mask.sum()) for selection in selections[5:])
        share.setdefault(level, []).append(chosen / (15 * 16))
    assert share["moving_average"] == sorted(share["moving_average"], reverse=True)
    assert share["moving_average"][0] > 0.2
    assert max(share["moving_average"][2:]) < 0.01
    assert all(0.3 < found < 0.6 for found in share["batch_level"])


@pytest.mark.parametrize("scaling", ["class_mean", "freematch", "none"])
def test_the_mean_norm_on_the_level_of_the_batch_never_starves(scaling: str) -> None:
    # The thresholds of a batch then have the mean of its uncertainties, so some row reaches its own.
    rule = LLKD(class_scaling=scaling, warm_up="none", floor=0.0)  # type: ignore[arg-type]
    state = rule.initial(5)
    for number, (teacher, student) in enumerate(random_batches(60, absent=2)):
        sharper = (student.log() * (1 + number)).softmax(1)
        selection, state, offered = step(rule, state, teacher, sharper)
        assert selection.mask.any() == offered.any()
        met = selection.student_threshold[offered].double().mean()
        assert float(met) == pytest.approx(float(selection.uncertainty[offered].mean()), abs=1e-6)


@pytest.mark.parametrize("floor", [0.05, 0.25, 0.3, 1.0])
def test_the_floor_takes_the_most_uncertain_rows_the_teacher_accepts(floor: float) -> None:
    starving = LLKD(momentum=1 - 1e-12, student_threshold="moving_average", warm_up="none", floor=floor)
    for teacher, student in random_batches():
        selection, _, offered = step(starving, frozen(starving, 0.7, 9), teacher, student)
        expected = min(math.ceil(floor * 16), int(offered.sum()))
        assert int(selection.mask.sum()) == expected
        assert not (selection.mask & ~offered).any()
        left_out = selection.uncertainty[offered & ~selection.mask]
        assert all(kept >= left_out.max() for kept in selection.uncertainty[selection.mask] if len(left_out))


def test_the_floor_adds_to_what_the_thresholds_select_and_takes_nothing_away() -> None:
    with_floor, without = LLKD(floor=0.4, warm_up="none"), LLKD(floor=0.0, warm_up="none")
    for mine, theirs in zip(*(walk(rule, random_batches())[0] for rule in (with_floor, without)), strict=True):
        assert not (theirs.mask & ~mine.mask).any()


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_confidence_times_uncertainty_with_mean_one_over_the_selected_rows() -> None:
    rule = LLKD(weighted=True)
    for teacher, student in random_batches():
        selection, _, _ = step(rule, rule.initial(5), teacher, student)
        importance = teacher.amax(1) * torch.special.entr(student).sum(1)
        ratio = (selection.weights / importance)[selection.mask]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio))
        assert float(selection.weights[selection.mask].mean()) == pytest.approx(1)
        assert (selection.weights[~selection.mask] == 0).all()


def test_the_weighted_loss_is_the_weighted_mean_by_hand() -> None:
    rule = LLKD(weighted=True, warm_up="none", floor=1.0, use_teacher_confidence=False)
    teacher, student = distributions([0.9, 0.1], [0.6, 0.4]), distributions([0.5, 0.5], [0.2, 0.8])
    selection, _, _ = step(rule, rule.initial(2), teacher, student)
    first, second = 0.9 * math.log(2), -0.6 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    loss = rule.loss(distributions([0.0, 0.0], [1.0, 0.0]), teacher, selection)
    expected = (first * math.log(2) + second * math.log(1 + math.exp(-1))) / (first + second)
    assert float(loss) == pytest.approx(expected)


def test_weights_that_are_all_equal_give_the_unweighted_loss() -> None:
    teacher = distributions(*[[0.8, 0.1, 0.1]] * 6)
    student, logits = distributions(*[[0.2, 0.3, 0.5]] * 6), torch.randn(6, 3)
    weighted, plain = LLKD(weighted=True), LLKD()
    mine = weighted.loss(logits, teacher, step(weighted, weighted.initial(3), teacher, student)[0])
    assert float(mine) == pytest.approx(
        float(plain.loss(logits, teacher, step(plain, plain.initial(3), teacher, student)[0]))
    )


def test_students_without_any_uncertainty_are_weighted_equally() -> None:
    rule = LLKD(weighted=True)
    selection, _, _ = step(rule, rule.initial(3), torch.eye(3), torch.eye(3))
    assert selection.weights.tolist() == [1, 1, 1]


def test_every_combination_of_options_keeps_its_accounts() -> None:
    choices = itertools.product((False, True), (False, True), (False, True), ("auto", "none"), (0.0, 0.05))
    for weighted, use_teacher, use_student, warm_up, floor in choices:
        rule = LLKD(weighted, use_teacher, use_student, warm_up=warm_up, floor=floor)  # type: ignore[arg-type]
        for selection in walk(rule, random_batches(5))[0]:
            assert torch.equal(selection.reasons == 0, selection.mask)
            assert torch.equal(selection.weights > 0, selection.mask)
