"""What encoder teachers learn before the student: plain training, whose best epoch, assistants and anchors come out of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional

from app import options
from tests.support import TOPICS
from tests.workers.test_resume import TRAINING, fresh
from workers.reporter import MemoryReporter
from workers.training.distill import distill
from workers.training.run import HeldOut, Pool, Run
from workers.training.schedule import learning_rate

EPOCHS = 3
State = dict[str, Tensor]


def method(kind: str, **values: object) -> options.Method:
    return TypeAdapter(options.Method).validate_python({"kind": kind, "teacher_epochs": EPOCHS, **values})


def begun(chosen: options.Method) -> tuple[Run, Pool, HeldOut]:
    """In float64, where AdamW does not turn the rounding of a gradient that is 0 into steps."""
    run, pool, held_out = fresh(chosen, dropout=0.0)
    for encoder in (run.student, *(companion.encoder for companion in run.companions.values())):
        encoder.model.double()
    return run, pool, held_out


def trained(chosen: options.Method) -> tuple[Run, MemoryReporter, list[State]]:
    """A run, its report, and the teacher as each of the student's epochs left it."""
    run, pool, held_out = begun(chosen)
    report, seen = MemoryReporter(), []

    def note(run: Run) -> None:
        seen.append(copy.deepcopy(run.companions["teacher"].encoder.model.state_dict()))

    distill(run, pool, held_out, TOPICS, chosen, TRAINING, report, on_epoch=note)
    return run, report, seen


def taught_plainly(chosen: options.Method) -> list[State]:
    """The teacher after each epoch of a loop written out."""
    run, pool, _ = begun(chosen)
    teacher, course = run.companions["teacher"].encoder.model.train(), run.courses["teacher"]
    labels, states, step = pool.teacher.argmax(dim=1), [], 0
    for epoch in range(EPOCHS):
        order = pool.rows[np.random.Generator(np.random.PCG64([0, epoch, 2, 0])).permutation(len(pool.rows))]
        for start in range(0, len(order), 8):
            rows = order[start : start + 8]
            rows = rows[~pool.barred[rows]]
            for group in course.optimizer.param_groups:
                # The teacher's own peak, on a schedule as long as its course.
                group["lr"] = 5e-4 / 5e-3 * learning_rate(step, EPOCHS * 5, TRAINING)
            functional.cross_entropy(teacher(**pool.tokens.batch(rows)).logits, labels[rows]).backward()
            torch.nn.utils.clip_grad_norm_(teacher.parameters(), TRAINING.max_grad_norm)
            course.optimizer.step()
            course.optimizer.zero_grad()
            step += 1
        states.append(copy.deepcopy(teacher.state_dict()))
    return states


def same(mine: State, theirs: State) -> bool:
    return all(torch.allclose(tensor, theirs[name], atol=1e-8) for name, tensor in mine.items())


def values(report: MemoryReporter, name: str) -> list[float]:
    return [value for found, _, _, value in report.points if found == name and value is not None]


def test_a_course_is_plain_training_and_its_best_epoch_teaches() -> None:
    chosen = method("kd", teacher={"learning_rate": 5e-4})
    _, report, seen = trained(chosen)
    after = taught_plainly(chosen)
    assert not same(after[0], after[1])
    scores = [
        macro_f1 + 1e-6 * accuracy
        for macro_f1, accuracy in zip(
            values(report, "fine_tuning_macro_f1/teacher"), values(report, "fine_tuning_accuracy/teacher"), strict=True
        )
    ]
    best = scores.index(max(scores))
    assert [same(state, after[best]) for state in seen] == [True, True]


@pytest.mark.parametrize("kind", ["prokt", "lgtm", "online", "dml"])
def test_a_teacher_that_goes_on_learning_may_take_the_course_of_one_that_does_not(kind: str) -> None:
    course = "fine_tuning_loss/teacher"
    _, report, seen = trained(method(kind, zero_heads=False, teacher={"learning_rate": 5e-4}))
    _, of_kd, rested = trained(method("kd", teacher={"learning_rate": 5e-4}))
    assert values(report, course) == values(of_kd, course) != []
    assert not same(seen[0], rested[0])
    _, together, _ = trained(method(kind, teacher_epochs=0))
    assert values(together, course) == []


@pytest.mark.parametrize(("anchors", "shown"), [(3, [1, 2]), (1, [2, 2]), (2, [1, 2])])
def test_the_student_is_shown_the_teacher_along_its_way(anchors: int, shown: list[int]) -> None:
    """By the epoch of the course, from 0, after which each of the student's two epochs finds the teacher."""
    chosen = method("rco", anchors=anchors, teacher={"learning_rate": 5e-4})
    _, _, seen = trained(chosen)
    after = taught_plainly(chosen)
    assert [[same(state, other) for other in after].index(True) for state in seen] == shown


def test_an_assistant_learns_from_the_teacher_and_from_the_labels() -> None:
    chosen = method("takd", temperature=2.0, distillation_share=0.3)
    run, pool, held_out = begun(chosen)
    assistant = copy.deepcopy(run.companions["assistant"].encoder.model)
    report = MemoryReporter()
    one_step = TRAINING.model_copy(update={"epochs": 1, "batch_size": 40})
    for course in run.courses.values():
        course.epochs = 1
    distill(run, pool, held_out, TOPICS, chosen, one_step, report)

    usable = pool.rows[~pool.barred]
    arguments, labels = pool.tokens.batch(usable), pool.teacher[usable].argmax(dim=1)
    with torch.no_grad():
        said, own = (model(**arguments).logits for model in (run.companions["teacher"].encoder.model.eval(), assistant))
    p = (said / 2).softmax(dim=1)
    divergence = (p * (p.log() - (own / 2).log_softmax(dim=1))).sum(dim=1).mean()
    expected = 0.3 * 4 * divergence + 0.7 * functional.cross_entropy(own, labels)
    assert values(report, "fine_tuning_loss/assistant") == pytest.approx([expected.item()], rel=1e-5)
