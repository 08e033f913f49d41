"""ProKT (Shi et al., ICLR 2021): the teacher learns the labels while it is held near the student, then teaches."""

from __future__ import annotations

from app.options import Method, TaughtTogether, Training
from workers.training.run import Pool, Run
from workers.training.step import (
    Batch,
    Learned,
    Lesson,
    Pair,
    auxiliary_loss,
    backward_and_step,
    evaluating,
    logits_of,
    student_loss,
)


def prokt_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of teacher and student on the lesson's rows."""
    assert isinstance(method, TaughtTogether)
    return learn_prokt(Pair.of(run), Batch.of(pool, lesson, run.student.model.device), method, training)


def learn_prokt(pair: Pair, batch: Batch, method: TaughtTogether, training: Training) -> Learned:
    """The teacher's step on λ ℓ(S, T) + (1 - λ) CE(y, T), then the student's on α ℓ(T, S) + (1 - α) CE(y, S)."""
    with evaluating(pair.student):
        student_view = logits_of(pair.student, batch.student, training)
    teacher_logits = logits_of(pair.teacher, batch.teacher, training)
    teacher_loss = auxiliary_loss(teacher_logits, student_view, batch.labels, method)
    backward_and_step(pair.teacher, pair.teacher_optimizer, teacher_loss, training)

    with evaluating(pair.teacher):
        taught = logits_of(pair.teacher, batch.teacher, training)
    loss = student_loss(taught, logits_of(pair.student, batch.student, training), batch.labels, method)
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item()})
