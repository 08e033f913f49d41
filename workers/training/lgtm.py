"""LGTM (Ren et al., ACL 2023, arXiv:2305.09651): the teacher is steered by each row's influence on feedback rows.

One step, with S and T the logits of student and teacher, θ the student's weights, ℓ the distillation loss:

    θ'   what the student's optimizer would make of θ with ∇θ mean ℓ_i(T, S)                    the pilot step
    v    ∇θ' CE(y, S) on a feedback batch
    I_i  d/dε ℓ_i(T, S(θ + ε v)) at ε = 0                                                       the influence of row i
    T    takes one step on its loss (`mode`), then S takes one on ℓ(T, S) with the new T, from θ

The student's forward pass serves both its gradients, the teacher makes one backward pass, the student's weights are never
written to before its own step. Where the authors' code differs, docs/methods.md says how.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from app.options import Method, TaughtByInfluence, Training
from workers.algorithms import influence as influences
from workers.algorithms.distillation import LOSSES
from workers.algorithms.influence import Difference, Tangent, Weights
from workers.algorithms.virtual_step import virtual_step
from workers.training import shares
from workers.training.run import Measured, Pool, Run
from workers.training.step import (
    Batch,
    Inputs,
    Learned,
    Lesson,
    Pair,
    auxiliary_loss,
    backward_and_step,
    evaluating,
    feedback_batch,
    logits_of,
    outputs_of,
    own_inputs,
    student_loss,
)


def lgtm_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """One step of teacher and student on the lesson's rows, with feedback at every `influence_every`-th step."""
    assert isinstance(method, TaughtByInfluence)
    assert pool.feedback is not None
    device = run.student.model.device
    feedback = None
    if lesson.step % method.influence_every == 0:
        size = method.feedback_batch_size or training.batch_size
        number = lesson.step // method.influence_every
        feedback = feedback_batch(pool.feedback, size, number, training.seed, device)
    return learn_lgtm(Pair.of(run), Batch.of(pool, lesson, device), feedback, method, training)


def learn_lgtm(
    pair: Pair, batch: Batch, feedback: tuple[Inputs, Tensor] | None, method: TaughtByInfluence, training: Training
) -> Learned:
    """The teacher's step, steered by feedback where there is some, then the student's."""
    student_logits = logits_of(pair.student, batch.student, training)
    teacher_logits = logits_of(pair.teacher, batch.teacher, training)
    figures: dict[str, float] = {}
    measured = None
    if feedback is None:
        steered = None if method.mode == "meta" else auxiliary_loss(teacher_logits, student_logits.detach(), batch.labels, method)  # fmt: skip
    else:
        direction, feedback_loss = feedback_gradient(
            pair, batch, teacher_logits, student_logits, feedback, method, training
        )
        along = along_direction(pair, batch, direction, method)
        influence, steered = teacher_loss(pair, batch, teacher_logits, student_logits, along, method)
        figures = {"feedback_loss": feedback_loss, **_summary(influence)}
        views = along.logits.softmax(dim=1), teacher_logits.detach().softmax(dim=1)
        measured = Measured(influence.cpu(), views[0].float().cpu(), views[1].float().cpu())
    if steered is not None:
        backward_and_step(pair.teacher, pair.teacher_optimizer, steered, training)
        figures["teacher_loss"] = steered.item()

    with evaluating(pair.teacher):
        taught = logits_of(pair.teacher, batch.teacher, training)
    loss = student_loss(taught, student_logits, batch.labels, method)
    backward_and_step(pair.student, pair.student_optimizer, loss, training)
    return Learned(loss.item(), figures, measured)


def feedback_gradient(
    pair: Pair, batch: Batch, teacher_logits: Tensor, student_logits: Tensor, feedback: tuple[Inputs, Tensor],
    method: TaughtByInfluence, training: Training,
) -> tuple[Weights, float]:  # fmt: skip
    """v by parameter name, taken at the pilot student, and the feedback loss there. Keeps the graph of `student_logits`."""
    parameters = list(pair.student.parameters())
    pilot_loss = student_loss(teacher_logits.detach(), student_logits, batch.labels, method)
    slopes = shares.add_up(torch.autograd.grad(pilot_loss, parameters, retain_graph=True))
    shrink = (training.max_grad_norm / (torch.nn.utils.get_total_norm(slopes) + 1e-6)).clamp(
        max=1.0
    )  # as clip_grad_norm_
    slopes = torch._foreach_mul(slopes, shrink)
    pilot = virtual_step(pair.student_optimizer, dict(zip(parameters, slopes, strict=True)))
    weights = {name: pilot[parameter].requires_grad_() for name, parameter in pair.student.named_parameters()}

    arguments, labels = feedback
    (logits,) = outputs_of(lambda part: (functional_call(pair.student, weights, (), part).logits,), arguments, training)
    loss = functional.cross_entropy(logits, labels)
    direction = shares.add_up(torch.autograd.grad(loss, list(weights.values())))
    return dict(zip(weights, direction, strict=True)), loss.item()


def along_direction(pair: Pair, batch: Batch, direction: Weights, method: TaughtByInfluence) -> Tangent | Difference:
    """How the student's logits on the batch change as its weights move along v; always in float32."""
    weights = {name: parameter.detach() for name, parameter in pair.student.named_parameters()}
    mine, rows = own_inputs(batch.student), len(batch.labels)

    def forward(moved: Weights) -> Tensor:
        logits: Tensor = functional_call(pair.student, dict(moved), (), mine).logits
        return logits

    with nullcontext() if method.influence_dropout else evaluating(pair.student):
        if method.influence == "exact":
            along = influences.exact(forward, weights, direction)
            return Tangent(shares.gather(along.logits, rows), shares.gather(along.velocity, rows))
        apart = influences.finite_difference(forward, weights, direction, method.finite_difference_radius)
        return Difference(shares.gather(apart.ahead, rows), shares.gather(apart.behind, rows), apart.width)


def teacher_loss(
    pair: Pair, batch: Batch, teacher_logits: Tensor, student_logits: Tensor, along: Tangent | Difference,
    method: TaughtByInfluence,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B,) influences without gradient, and the teacher's loss, a scalar with gradient.

    official: L_aux - s η_T d/dε L_aux(S(θ + ε v)), which is L_aux with its soft target moved by -s η_T dp_S
    weighted: L_aux + mean_i clip(s I_i) ℓ_i(T, S)
    meta:     -s η_S α mean_i I_i, the gradient of the feedback loss after a step of plain gradient descent
    """
    distance = LOSSES[method.distillation_loss]
    influence = along.derivative(lambda moved: distance(teacher_logits, moved, method.temperature))
    weights = influence.detach()
    if method.mode == "meta":
        rate = pair.student_optimizer.param_groups[0]["lr"]
        return weights, -method.influence_scale * rate * method.distillation_share * influence.mean()
    auxiliary = auxiliary_loss(teacher_logits, student_logits.detach(), batch.labels, method)
    if method.mode == "weighted":
        clipped = (method.influence_scale * weights).clamp(-method.influence_clip, method.influence_clip)
        distances = distance(teacher_logits, student_logits.detach(), method.temperature)
        return weights, auxiliary + (clipped * distances).mean()
    rate = pair.teacher_optimizer.param_groups[0]["lr"]
    pull = along.derivative(lambda moved: distance(moved, teacher_logits, method.temperature)).mean()
    return weights, auxiliary - method.influence_scale * rate * method.teacher_distillation_share * pull


def _summary(influence: Tensor) -> dict[str, float]:
    """The step's influences in five numbers."""
    low, middle, high = influence.quantile(
        torch.tensor([0.1, 0.5, 0.9], device=influence.device, dtype=influence.dtype)
    ).tolist()
    return {
        "influence_mean": influence.mean().item(),
        "influence_p10": low,
        "influence_p50": middle,
        "influence_p90": high,
        "influence_negative": (influence < 0).double().mean().item(),
    }
