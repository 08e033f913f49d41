"""What holds for every rule: invariances, determinism, pure states, resuming, accounts that add up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.algorithms.batches import random_batches, step, walk
from workers.algorithms.selection import REASONS, RULES, Rule, Selection, Signals
from workers.algorithms.selection.llkd import LLKD

EVERY_RULE = {
    **{kind: rule() for kind, rule in RULES.items()},
    "llkd_weighted": LLKD(weighted=True),
    "llkd_paper": LLKD(student_threshold="moving_average", warm_up="none", floor=0.0),
    "llkd_freematch": LLKD(class_scaling="freematch", floor=0.5),
    "llkd_without_teacher": LLKD(use_teacher_confidence=False),
    "llkd_without_student": LLKD(use_student_uncertainty=False),
}
rules = pytest.mark.parametrize("rule", EVERY_RULE.values(), ids=EVERY_RULE.keys())


def same(mine: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(mine.double(), theirs.double(), atol=1e-6, equal_nan=True)


def same_selection(mine: Selection, theirs: Selection) -> bool:
    return all(same(value, vars(theirs)[name]) for name, value in vars(mine).items())


@rules
def test_every_row_is_accounted_for(rule: Rule) -> None:
    for selection in walk(rule, random_batches(10))[0]:
        assert selection.mask.dtype == torch.bool
        assert selection.weights.dtype == torch.float32
        assert selection.reasons.dtype == torch.int8
        assert {len(value) for value in vars(selection).values()} == {16}
        assert torch.equal(selection.reasons == REASONS.index("selected"), selection.mask)
        assert (selection.weights[~selection.mask] == 0).all()
        assert (selection.weights >= 0).all()
        known = selection.uncertainty[~selection.uncertainty.isnan()]
        assert ((known >= -1e-6) & (known <= math.log(5) + 1e-6)).all()


@rules
def test_relabelling_the_classes_changes_no_decision(rule: Rule) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    batches = random_batches(absent=1)
    mine, state = walk(rule, batches)
    theirs, other = walk(rule, [(teacher[:, order], student[:, order]) for teacher, student in batches])
    assert all(same_selection(one, two) for one, two in zip(mine, theirs, strict=True))
    for side, threshold in rule.thresholds(state).items():
        assert same(threshold[order], rule.thresholds(other)[side])


@pytest.mark.parametrize("kind", [kind for kind in EVERY_RULE if kind != "random"])
def test_the_order_within_a_batch_changes_no_decision(kind: str) -> None:
    rule, order = EVERY_RULE[kind], torch.randperm(16, generator=torch.Generator().manual_seed(3))
    batches = random_batches()
    mine, _ = walk(rule, batches)
    theirs, _ = walk(rule, [(teacher[order], student[order]) for teacher, student in batches])
    for one, two in zip(mine, theirs, strict=True):
        assert same_selection(Selection(**{name: value[order] for name, value in vars(one).items()}), two)


@rules
def test_the_same_seed_gives_the_same_selection(rule: Rule) -> None:
    batches = random_batches()
    assert all(
        same_selection(one, two) for one, two in zip(walk(rule, batches)[0], walk(rule, batches)[0], strict=True)
    )


def test_another_seed_gives_another_random_selection() -> None:
    teacher, student = random_batches(1)[0]
    masks = {tuple(step(EVERY_RULE["random"], {}, teacher, student, seed=seed)[0].mask.tolist()) for seed in range(5)}
    assert len(masks) > 1


@rules
def test_a_rule_resumed_from_its_saved_state_goes_on_bit_for_bit(rule: Rule, tmp_path: Path) -> None:
    batches = random_batches()
    _, whole = walk(rule, batches)
    _, half = walk(rule, batches[:10])
    torch.save(half, tmp_path / "state.pt")
    _, resumed = walk(rule, batches[10:], torch.load(tmp_path / "state.pt", weights_only=True))
    assert whole.keys() == resumed.keys() == rule.initial(5).keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@rules
def test_a_state_is_never_changed_in_place(rule: Rule) -> None:
    batches = random_batches(3)
    state = rule.initial(5)
    for teacher, student in batches:
        before = {key: value.clone() for key, value in state.items()}
        _, after, _ = step(rule, state, teacher, student)
        assert all(torch.equal(state[key], before[key]) for key in before)
        state = after


@rules
def test_what_the_student_says_of_rows_that_were_not_offered_is_not_looked_at(rule: Rule) -> None:
    everything = torch.ones(16, dtype=torch.bool)
    for teacher, student in random_batches(5):
        offered, state = rule.offer(rule.initial(5), teacher, everything)
        seen = offered if rule.needs_student else torch.zeros_like(offered)
        garbage = torch.where(seen[:, None], student, torch.eye(5)[torch.arange(16) % 5])
        mine, theirs = (
            rule.select(state, Signals(teacher, view, offered, everything, 0, torch.Generator().manual_seed(0)))
            for view in (student, garbage)
        )
        assert same_selection(mine[0], theirs[0])
        assert all(torch.equal(mine[1][key], theirs[1][key]) for key in mine[1])


@rules
def test_every_loss_is_a_finite_scalar_whose_gradient_reaches_the_selected_rows(rule: Rule) -> None:
    teacher, student = random_batches(1)[0]
    selection, _, _ = step(rule, rule.initial(5), teacher, student)
    logits = torch.randn(int(selection.mask.sum()), 5, requires_grad=True)
    loss = rule.loss(logits, teacher[selection.mask], selection)
    loss.backward()
    assert loss.shape == ()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad.abs().sum(1) > 0).all()


@rules
def test_thresholds_and_summary_are_there_before_the_first_batch(rule: Rule) -> None:
    state = rule.initial(5)
    assert all(threshold.shape == (5,) for threshold in rule.thresholds(state).values())
    assert all(math.isfinite(value) for value in rule.summary(state).values())


@rules
def test_a_batch_of_one_row_is_legal(rule: Rule) -> None:
    teacher, student = random_batches(1, rows=1)[0]
    selection, state, _ = step(rule, rule.initial(5), teacher, student)
    assert selection.weights.isfinite().all()
    assert all(value.isfinite().all() for value in state.values())


@rules
def test_a_batch_without_rows_is_legal_and_changes_nothing(rule: Rule) -> None:
    _, state = walk(rule, random_batches(3))
    nothing = torch.empty(0, 5)
    selection, after, _ = step(rule, state, nothing, nothing)
    assert selection.mask.shape == (0,)
    assert all(torch.equal(after[key], state[key]) for key in state)
