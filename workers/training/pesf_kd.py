"""PESF-KD (Rao et al., arXiv:2205.06701): the teacher stays, and an adapter on it learns with the student."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from app.options import PESFKD, Method, Training
from workers.algorithms.distillation import kl
from workers.training.fixed_teacher import factor, mixed
from workers.training.run import Pool, Run
from workers.training.step import Batch, Inputs, Learned, Lesson, Pair, clip_and_step, evaluating, logits_of, outputs_of


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
    (added,) = outputs_of(lambda part: (pair.teacher.adapter(part["pooled"]),), {"pooled": pooled}, training)  # type: ignore[operator]
    adapted = said + added.to(said.dtype)
    logits = logits_of(pair.student, batch.student, training)
    soft = factor(method) * kl(adapted, logits, method.temperature).mean()
    loss = mixed(soft, logits, batch.labels, method)
    teacher_loss = (1 - method.distillation_share) * functional.cross_entropy(adapted, batch.labels)
    (loss + teacher_loss).backward()
    for model, optimizer in ((pair.teacher, pair.teacher_optimizer), (pair.student, pair.student_optimizer)):
        clip_and_step(model, optimizer, training)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item()})


def _said(pair: Pair, batch: Batch, training: Training) -> tuple[Tensor, Tensor]:
    """(B, C) the teacher's logits without its adapter, and (B, H) its last state of the first token."""

    def forward(part: Inputs) -> tuple[Tensor, ...]:
        output = pair.teacher(**part, output_hidden_states=True)
        return output.logits, output.hidden_states[-1][:, 0]

    said, pooled = outputs_of(forward, batch.teacher, training)
    return said, pooled
