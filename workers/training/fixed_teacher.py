"""Two-stage distillation: the student learns from an encoder that has learned before and no longer does.

    the student's loss:  α soft(T, S) + (1 - α) CE(y, S)          α is `distillation_share`

`kd`, `takd` and `rco` differ in who T is: the teacher, an assistant that learned from it, or the teacher as it was along its
way. `skd`, `dist` and `pkd` differ in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from app.options import DIST, PKD, RCO, SKD, Method, Softened, SoftenedByDistance, TeacherFirst, Training
from workers.algorithms import distillation
from workers.training.run import Pool, Run
from workers.training.step import (
    Batch,
    Inputs,
    Learned,
    Lesson,
    Pair,
    backward_and_step,
    evaluating,
    logits_of,
    outputs_of,
)


def fixed_teacher_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of the student on the lesson's rows."""
    assert isinstance(method, TeacherFirst)
    pair = Pair.of(run, "assistant" if "assistant" in run.companions else "teacher")
    if isinstance(method, RCO):
        course = run.courses["teacher"]
        number = anchor_of(run.progress.epoch, training.epochs, len(course.anchors))
        if number != course.shown:
            pair.teacher.load_state_dict(course.anchors[number])
            course.shown = number
    batch = Batch.of(pool, lesson, run.student.model.device)
    return learn_from_fixed(pair, batch, method, training)


def learn_from_fixed(pair: Pair, batch: Batch, method: TeacherFirst, training: Training) -> Learned:
    """The student's step on its loss; the teacher answers without dropout."""
    loss = _LOSSES.get(method.kind, distance_loss)(pair, batch, method, training)  # type: ignore[attr-defined]
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item())


def anchor_of(epoch: int, epochs: int, anchors: int) -> int:
    """Which anchor the student learns from in an epoch, all from 0: each for an equal time, and the last in the last epoch."""
    return math.ceil((epoch + 1) * anchors / epochs) - 1


def distilled(teacher: Tensor, student: Tensor, method: TeacherFirst) -> Tensor:
    """(B,) distance of the student's logits to the teacher's by `distillation_loss`; for `kl` and `ce` times τ² if asked."""
    assert isinstance(method, SoftenedByDistance)
    distances = distillation.LOSSES[method.distillation_loss](teacher, student, method.temperature)
    return factor(method) * distances if method.distillation_loss in ("kl", "ce") else distances


def factor(method: Softened) -> float:
    """τ², or 1 where the option is off."""
    return method.temperature**2 if method.temperature_squared else 1.0


def mixed(soft: Tensor, student_logits: Tensor, labels: Tensor, method: TeacherFirst) -> Tensor:
    """α soft + (1 - α) CE(y, S); soft is a scalar."""
    share = method.distillation_share
    return share * soft + (1 - share) * functional.cross_entropy(student_logits, labels)


def distance_loss(pair: Pair, batch: Batch, method: TeacherFirst, training: Training) -> Tensor:
    """`kd`, `takd`, `rco`: the distance is chosen by `distillation_loss`."""
    with evaluating(pair.teacher):
        said = logits_of(pair.teacher, batch.teacher, training)
    logits = logits_of(pair.student, batch.student, training)
    return mixed(distilled(said, logits, method).mean(), logits, batch.labels, method)


def skd_loss(pair: Pair, batch: Batch, method: TeacherFirst, training: Training) -> Tensor:
    """τ² KL of the logits brought to one sphere; the label's cross-entropy is of the student's logits there, too."""
    assert isinstance(method, SKD)
    with evaluating(pair.teacher):
        said = logits_of(pair.teacher, batch.teacher, training)
    logits = distillation.spherical(logits_of(pair.student, batch.student, training), method.multiplier)
    soft = distillation.kl(distillation.spherical(said, method.multiplier), logits, method.temperature).mean()
    return mixed(factor(method) * soft, logits, batch.labels, method)


def dist_loss(pair: Pair, batch: Batch, method: TeacherFirst, training: Training) -> Tensor:
    """β (1 - correlation over the classes) + γ (1 - correlation over the batch)."""
    assert isinstance(method, DIST)
    with evaluating(pair.teacher):
        said = logits_of(pair.teacher, batch.teacher, training)
    logits = logits_of(pair.student, batch.student, training)
    wanted, given = ((side / method.temperature).softmax(dim=1) for side in (said, logits))
    soft = method.row_weight * distillation.between_classes(wanted, given).mean()
    soft = soft + method.class_weight * distillation.between_rows(wanted, given)
    return mixed(soft, logits, batch.labels, method)


def pkd_loss(pair: Pair, batch: Batch, method: TeacherFirst, training: Training) -> Tensor:
    """τ² KL and the labels as in `kd`, plus `hidden_weight` times the distance of the first token's states."""
    assert isinstance(method, PKD)
    with evaluating(pair.teacher):
        said, theirs = _with_states(pair.teacher, batch.teacher, training)
    logits, own = _with_states(pair.student, batch.student, training)
    pairs = distillation.layer_pairs(len(theirs) - 1, len(own) - 1, method.layers)
    inner = distillation.patient([theirs[layer] for layer, _ in pairs], [own[layer] for _, layer in pairs]).mean()
    soft = factor(method) * distillation.kl(said, logits, method.temperature).mean()
    return mixed(soft, logits, batch.labels, method) + method.hidden_weight * inner


_LOSSES: dict[str, Callable[[Pair, Batch, TeacherFirst, Training], Tensor]] = {
    "skd": skd_loss,
    "dist": dist_loss,
    "pkd": pkd_loss,
}
"""Of the kinds whose loss is their own."""


def _with_states(model: nn.Module, arguments: Inputs, training: Training) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(B, C) logits, and (B, H) states of the first token: of the embeddings, then of every layer."""

    def forward(part: Inputs) -> tuple[Tensor, ...]:
        output = model(**part, output_hidden_states=True)
        return output.logits, *(state[:, 0] for state in output.hidden_states)

    logits, *states = outputs_of(forward, arguments, training)
    return logits, tuple(states)
