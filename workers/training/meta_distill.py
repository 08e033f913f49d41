"""Meta distillation (Zhou et al., ACL 2022, arXiv:2106.04570): the teacher steps so that the student's step helps feedback.

    θ'   θ - η ∇θ L(T, S),  with L = α ℓ(T, S) + (1 - α) CE(y, S)         the pilot student, by plain gradient descent
    T    takes one step on CE(y, S(θ')) of a feedback batch, through θ'
    S    takes one on L with the new T, from θ

The teacher's gradient is -η d/dT < ∇θ L , v >, with v the feedback gradient at θ'. The product is a derivative of L along v,
so one forward-mode pass of the student and one backward pass of the teacher give it exactly, without second derivatives of
the student.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from app.options import MetaDistill, Method, Training
from workers.algorithms import influence
from workers.algorithms.influence import Tangent, Weights
from workers.training import shares
from workers.training.fixed_teacher import distance_loss, distilled, mixed
from workers.training.run import Pool, Run
from workers.training.step import (
    Batch,
    Inputs,
    Learned,
    Lesson,
    Pair,
    backward_and_step,
    feedback_batch,
    logits_of,
    outputs_of,
    own_inputs,
    without_dropout,
)


def meta_distill_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of teacher and student on the lesson's rows, with the next feedback rows."""
    assert isinstance(method, MetaDistill)
    assert pool.feedback is not None
    device = run.student.model.device
    size = method.feedback_batch_size or training.batch_size
    feedback = feedback_batch(pool.feedback, size, lesson.step, training.seed, device)
    return learn_meta_distill(Pair.of(run), Batch.of(pool, lesson, device), feedback, method, training)


def learn_meta_distill(
    pair: Pair, batch: Batch, feedback: tuple[Inputs, Tensor], method: MetaDistill, training: Training
) -> Learned:
    """The teacher's step, then the student's."""
    # So that pilot and derivative are of one function.
    with without_dropout(pair.teacher, pair.student):
        teacher_loss, feedback_loss = meta_loss(pair, batch, feedback, method, training)
        backward_and_step(pair.teacher, pair.teacher_optimizer, teacher_loss, training)
    loss = distance_loss(pair, batch, method, training)
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item(), {"teacher_loss": teacher_loss.item(), "feedback_loss": feedback_loss})


def meta_loss(
    pair: Pair, batch: Batch, feedback: tuple[Inputs, Tensor], method: MetaDistill, training: Training
) -> tuple[Tensor, float]:
    """A scalar whose gradient in the teacher is, divided by η, that of the feedback loss at the pilot student; and that loss.

    Divided, since η is of the size that AdamW's eps would swallow; to its step the scale is all one. Both models are to be
    without dropout.
    """
    said = logits_of(pair.teacher, batch.teacher, training)
    logits = logits_of(pair.student, batch.student, training)
    parameters = dict(pair.student.named_parameters())
    pilot_loss = mixed(distilled(said.detach(), logits, method).mean(), logits, batch.labels, method)
    slopes = shares.add_up(torch.autograd.grad(pilot_loss, list(parameters.values())))
    rate = method.pilot_learning_rate or pair.student_optimizer.param_groups[0]["lr"]
    moved = torch._foreach_add([tensor.detach() for tensor in parameters.values()], slopes, alpha=-rate)
    pilot = {name: tensor.requires_grad_() for name, tensor in zip(parameters, moved, strict=True)}

    arguments, labels = feedback
    (answers,) = outputs_of(lambda part: (functional_call(pair.student, pilot, (), part).logits,), arguments, training)
    feedback_loss = functional.cross_entropy(answers, labels)
    direction = shares.add_up(torch.autograd.grad(feedback_loss, list(pilot.values())))
    mine, rows = own_inputs(batch.student), len(batch.labels)

    def forward(weights: Weights) -> Tensor:
        result: Tensor = functional_call(pair.student, dict(weights), (), mine).logits
        return result

    here = {name: tensor.detach() for name, tensor in parameters.items()}
    share = influence.exact(forward, here, dict(zip(parameters, direction, strict=True)))
    along = Tangent(shares.gather(share.logits, rows), shares.gather(share.velocity, rows))
    gains = along.derivative(lambda student: distilled(said, student, method))
    return -method.distillation_share * gains.mean(), feedback_loss.item()
