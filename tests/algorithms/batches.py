"""Random batches of signals, and the walk of a rule through them, as the training loop does it."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.algorithms.selection import REASONS, Rule, Selection, Signals, State


def distributions(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def random_batches(
    count: int = 20, rows: int = 16, classes: int = 5, seed: int = 0, absent: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """(teacher, student) pairs; the student agrees with the teacher now and then; the last `absent` classes are rare."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for step in range(count):
        teacher_logits = 2 * torch.randn(rows, classes, generator=generator)
        if absent and step % 3:
            teacher_logits[:, -absent:] -= 50
        student_logits = 0.5 * teacher_logits.clamp_min(-5) + torch.randn(rows, classes, generator=generator)
        batches.append((teacher_logits.softmax(1), student_logits.softmax(1)))
    return batches


def step(
    rule: Rule, state: State, teacher: Tensor, student: Tensor, epoch: int = 0, seed: int = 0
) -> tuple[Selection, State, Tensor]:
    """One batch: offer, hide the rows that were not offered, select."""
    subset = torch.ones(len(teacher), dtype=torch.bool)
    offered, state = rule.offer(state, teacher, subset)
    hidden = torch.full_like(student, 1 / student.shape[1])
    seen = torch.where(offered[:, None], student, hidden) if rule.needs_student else hidden
    generator = torch.Generator().manual_seed(seed)
    selection, state = rule.select(state, Signals(teacher, seen, offered, subset, epoch, generator))
    return selection, state, offered


def walk(rule: Rule, batches: list[tuple[Tensor, Tensor]], state: State | None = None) -> tuple[list[Selection], State]:
    state = rule.initial(batches[0][0].shape[1]) if state is None else state
    selections = []
    for number, (teacher, student) in enumerate(batches):
        selection, state, _ = step(rule, state, teacher, student, epoch=number // 5, seed=number)
        selections.append(selection)
    return selections, state


def reasons(selection: Selection) -> list[str]:
    return [REASONS[index] for index in selection.reasons.tolist()]
