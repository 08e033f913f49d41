"""LGTM's step written out as its authors' code runs it: the measure of ours, in results (tests) and in time (lgtm_step.py).

Copies of the student and of its moments, one parameter at a time, the influence's gradient by two further passes of the
teacher forth and back, the student's weights moved there and back. Only the pilot step is that of the optimizer in use,
torch's AdamW, and gradients are clipped like ours; both models need dropout 0 for equal results.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional

from app.options import TaughtByInfluence, Training
from workers.training.step import Batch, Inputs, Pair


def divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """KL between the softened distributions, mean over the batch."""
    return functional.kl_div(
        (logits / temperature).log_softmax(dim=1), (target / temperature).softmax(dim=1), reduction="batchmean"
    )


def plain_step(
    pair: Pair, batch: Batch, feedback: tuple[Inputs, Tensor], method: TaughtByInfluence, training: Training
) -> list[Tensor]:
    """One step of teacher and student; the teacher's gradient before clipping, by parameter."""
    student, teacher, tau = pair.student, pair.teacher, method.temperature
    share, teacher_share = method.distillation_share, method.teacher_distillation_share

    def loss_of_student(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        distilled = divergence(teacher_logits.detach(), student_logits, tau)
        return share * distilled + (1 - share) * functional.cross_entropy(student_logits, batch.labels)

    def loss_of_teacher(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        distilled = divergence(student_logits.detach(), teacher_logits, tau)
        return teacher_share * distilled + (1 - teacher_share) * functional.cross_entropy(teacher_logits, batch.labels)

    # Both models on the batch.
    teacher_logits = teacher(**batch.teacher).logits
    student_logits = student(**batch.student).logits
    slopes = torch.autograd.grad(loss_of_student(teacher_logits, student_logits), list(student.parameters()))
    auxiliary = torch.autograd.grad(loss_of_teacher(teacher_logits, student_logits), list(teacher.parameters()))

    # The pilot student: a copy, moved by a copy of the optimizer's memory.
    norm = torch.sqrt(torch.stack([slope.square().sum() for slope in slopes]).sum())
    shrink = min(1.0, training.max_grad_norm / (norm.item() + 1e-6))
    pilot = copy.deepcopy(student)
    memory = copy.deepcopy(pair.student_optimizer.state)
    by_parameter = dict(zip(student.parameters(), slopes, strict=True))
    place = dict(zip(student.parameters(), pilot.parameters(), strict=True))
    kept = dict(zip(pair.student_optimizer.state, memory.values(), strict=True))
    for group in pair.student_optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            slope = by_parameter[parameter] * shrink
            state = kept.get(parameter, {})
            step = int(state["step"]) + 1 if state else 1
            first = state["exp_avg"] if state else torch.zeros_like(slope)
            second = state["exp_avg_sq"] if state else torch.zeros_like(slope)
            first = beta1 * first + (1 - beta1) * slope
            second = beta2 * second + (1 - beta2) * slope * slope
            with torch.no_grad():
                target = place[parameter]
                target.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = second.sqrt() / math.sqrt(1 - beta2**step) + group["eps"]
                target.sub_(group["lr"] / (1 - beta1**step) * first / denominator)

    # Its gradient on the feedback rows.
    arguments, labels = feedback
    loss = functional.cross_entropy(pilot(**arguments).logits, labels)
    direction = torch.autograd.grad(loss, list(pilot.parameters()))

    # The influence's gradient: the student a little ahead, a little behind, and back.
    teacher.eval()
    student.eval()
    length = torch.sqrt(torch.stack([entry.square().sum() for entry in direction]).sum())
    radius = method.finite_difference_radius / length
    _move(student, direction, radius)
    ahead = torch.autograd.grad(
        loss_of_teacher(teacher(**batch.teacher).logits, student(**batch.student).logits), list(teacher.parameters())
    )
    _move(student, direction, -2 * radius)
    behind = torch.autograd.grad(
        loss_of_teacher(teacher(**batch.teacher).logits, student(**batch.student).logits), list(teacher.parameters())
    )
    _move(student, direction, radius)

    # The teacher's step, then the student's with the new teacher.
    rate = method.influence_scale * pair.teacher_optimizer.param_groups[0]["lr"]
    gradient = []
    for parameter, own, plus, minus in zip(teacher.parameters(), auxiliary, ahead, behind, strict=True):
        parameter.grad = own - rate * (plus - minus) / (2 * radius)
        gradient.append(parameter.grad.clone())
    torch.nn.utils.clip_grad_norm_(teacher.parameters(), training.max_grad_norm)
    pair.teacher_optimizer.step()
    pair.teacher_optimizer.zero_grad()
    with torch.no_grad():
        taught = teacher(**batch.teacher).logits
    student.train()
    loss_of_student(taught, student(**batch.student).logits).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), training.max_grad_norm)
    pair.student_optimizer.step()
    pair.student_optimizer.zero_grad()
    teacher.train()
    return gradient


def _move(model: torch.nn.Module, direction: tuple[Tensor, ...], radius: Tensor) -> None:
    with torch.no_grad():
        for parameter, entry in zip(model.parameters(), direction, strict=True):
            parameter.add_(radius * entry)
