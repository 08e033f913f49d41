"""Deep mutual learning (Zhang et al., CVPR 2018): two peers learn the labels and each other, one after the other."""

from __future__ import annotations

import torch

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


def dml_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of both peers on the lesson's rows."""
    assert isinstance(method, TaughtTogether)
    return learn_dml(Pair.of(run), Batch.of(pool, lesson, run.student.model.device), method, training)


def learn_dml(pair: Pair, batch: Batch, method: TaughtTogether, training: Training) -> Learned:
    """The teacher steps first; the student then learns from what the teacher says after its step."""
    student_logits = logits_of(pair.student, batch.student, training)
    teacher_logits = logits_of(pair.teacher, batch.teacher, training)
    teacher_loss = auxiliary_loss(teacher_logits, student_logits.detach(), batch.labels, method)
    backward_and_step(pair.teacher, pair.teacher_optimizer, teacher_loss, training)
    with torch.no_grad():
        moved = logits_of(pair.teacher, batch.teacher, training)
    loss = student_loss(moved, student_logits, batch.labels, method)
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item()})
