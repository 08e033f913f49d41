"""PESF-KD (Rao et al., arXiv:2205.06701): the teacher stays, and an adapter on it learns with the student."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from app.options import PESFKD, Method, Training
from workers.algorithms.distillation import kl
from workers.training.fixed_teacher import factor, mixed
from workers.training.run import Pool, Run
from workers.training.step import Batch, Learned, Lesson, Pair, evaluating, in_precision, logits_of


def pesf_kd_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of student and adapter on the lesson's rows."""
    assert isinstance(method, PESFKD)
    return learn_pesf_kd(Pair.of(run), Batch.of(pool, lesson, run.student.model.device), method, training)


def learn_pesf_kd(pair: Pair, batch: Batch, method: PESFKD, training: Training) -> Learned:
    """Both step on α τ² KL(T + adapter, S) + (1 - α) CE(y, S), the adapter also on (1 - α) CE(y, T + adapter).

    With the distance alone to learn from, the adapter would only follow the student, wherever that goes.
    """
    with evaluating(pair.teacher):
        said, pooled = _said(pair, batch, training)
    adapted = said + pair.teacher.adapter(pooled).to(said.dtype)  # type: ignore[operator]
    logits = logits_of(pair.student, batch.student, training)
    soft = factor(method) * kl(adapted, logits, method.temperature).mean()
    loss = mixed(soft, logits, batch.labels, method)
    teacher_loss = (1 - method.distillation_share) * functional.cross_entropy(adapted, batch.labels)
    (loss + teacher_loss).backward()
    for model, optimizer in ((pair.teacher, pair.teacher_optimizer), (pair.student, pair.student_optimizer)):
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item()})


def _said(pair: Pair, batch: Batch, training: Training) -> tuple[Tensor, Tensor]:
    """(B, C) the teacher's logits without its adapter, and (B, H) its last state of the first token."""
    states: list[Tensor] = []

    def forward() -> Tensor:
        output = pair.teacher(**batch.teacher, output_hidden_states=True)
        states.append(output.hidden_states[-1][:, 0])
        logits: Tensor = output.logits
        return logits

    return in_precision(forward, batch.labels.device, training), states[0]
