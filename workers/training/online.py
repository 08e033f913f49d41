"""Online distillation: teacher and student learn the labels and each other in the same step, from before either moved."""

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
    logits_of,
    student_loss,
)


def online_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of teacher and student on the lesson's rows."""
    assert isinstance(method, TaughtTogether)
    return learn_online(Pair.of(run), Batch.of(pool, lesson, run.student.model.device), method, training)


def learn_online(pair: Pair, batch: Batch, method: TaughtTogether, training: Training) -> Learned:
    """T steps on λ ℓ(S, T) + (1 - λ) CE(y, T), S on α ℓ(T, S) + (1 - α) CE(y, S); each sees the other with dropout."""
    student_logits = logits_of(pair.student, batch.student, training)
    teacher_logits = logits_of(pair.teacher, batch.teacher, training)
    teacher_loss = auxiliary_loss(teacher_logits, student_logits.detach(), batch.labels, method)
    loss = student_loss(teacher_logits.detach(), student_logits, batch.labels, method)
    backward_and_step(pair.teacher, pair.teacher_optimizer, teacher_loss, training)
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item()})
