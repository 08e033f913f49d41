"""What encoder teachers learn before the student begins: a course on the same rows, from the labels or from one another.

A course is a stage of the run like any other: it counts in the job's progress, has its series and events, is saved with the
run and goes on where it was stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.options import OTHER_LEARNING_RATE, TAKD, Method, Training
from workers.reporter import Report, asking
from workers.training import shares
from workers.training.evaluation import agreement, predict_together
from workers.training.fixed_teacher import distilled
from workers.training.run import Companion, Course, HeldOut, Pool, Run
from workers.training.schedule import learning_rate, set_learning_rate
from workers.training.step import backward_and_step, evaluating, logits_by_length

POINTS_PER_COURSE = 200
"""About how many points its step series get."""


def take_courses(
    run: Run, pool: Pool, held_out: HeldOut, method: Method, training: Training, report: Report,
    save_in_time: Callable[[], None],
) -> None:  # fmt: skip
    """Train the companions that learn before the student, each to its last epoch; courses already taken are passed over.

    The companion ends with the weights of the epoch that had the highest macro-F1 on `held_out` (then accuracy). Series, by
    the course's own steps, of `teacher` and `assistant`: fine_tuning_loss/<part>; by its epochs: fine_tuning_accuracy/<part>
    and fine_tuning_macro_f1/<part>.
    """
    rows_before = 0
    for part, course in run.courses.items():
        _take(run, part, course, pool, held_out, method, training, report, save_in_time, rows_before)
        rows_before += len(pool.rows) * course.epochs


def _take(
    run: Run, part: str, course: Course, pool: Pool, held_out: HeldOut, method: Method, training: Training,
    report: Report, save_in_time: Callable[[], None], rows_before: int,
) -> None:  # fmt: skip
    companion, rows_offered = run.companions[part], len(pool.rows)
    model = companion.encoder.model
    tokens = pool.teacher_tokens or pool.tokens
    number = list(run.courses).index(part)
    total_steps = math.ceil(rows_offered / training.batch_size) * course.epochs
    point_every = max(1, total_steps // POINTS_PER_COURSE)
    peak = training.learning_rate or OTHER_LEARNING_RATE
    while course.epoch < course.epochs:
        order = pool.rows[_permutation(rows_offered, training.seed, course.epoch, number)]
        while course.position < rows_offered:
            report.check()
            batch = order[course.position : course.position + training.batch_size]
            rows = batch[~pool.barred[batch]]
            if len(rows):
                rate = course.learning_rate * learning_rate(course.step, total_steps, training) / peak
                set_learning_rate(course.optimizer, rate)
                shares.draw_anew(training.seed, 1 + number, course.step)
                logits = logits_by_length(model, tokens, rows, training)
                labels = pool.teacher[rows].argmax(dim=1).to(logits.device)
                loss = functional.cross_entropy(logits, labels)
                if course.taught_by is not None:
                    assert isinstance(method, TAKD)
                    teacher = run.companions[course.taught_by].encoder.model
                    with evaluating(teacher):
                        said = logits_by_length(teacher, tokens, rows, training)
                    share = method.distillation_share
                    loss = share * distilled(said, logits, method).mean() + (1 - share) * loss
                backward_and_step(model, course.optimizer, loss, training)
                course.loss += loss.item()
                course.losses += 1
            course.position += len(batch)
            course.step += 1
            report.progress(rows_before + course.epoch * rows_offered + course.position)
            if (course.step % point_every == 0 or course.step == total_steps) and course.losses:
                at = course.epoch + course.position / rows_offered
                report.metrics(course.step, at, {f"fine_tuning_loss/{part}": course.loss / course.losses})
                course.loss, course.losses = 0.0, 0
            save_in_time()
        _score(course, part, companion, held_out, report)
        course.epoch += 1
        course.position = 0
        wanted = course.anchors_wanted
        reached = sum(math.ceil(number * course.epochs / wanted) == course.epoch for number in range(1, wanted + 1))
        course.anchors += [_copy(model) for _ in range(reached)]
    if course.best_weights is not None:
        model.load_state_dict(course.best_weights)
        course.best_weights = None


def _score(course: Course, part: str, companion: Companion, held_out: HeldOut, report: Report) -> None:
    """Look at the held-out rows; keep the weights when they are the best so far."""
    model = companion.encoder.model
    tokens = held_out.teacher_tokens or held_out.tokens
    probabilities = predict_together(model, tokens, held_out.rows, should_stop=asking(report))
    scores = agreement(torch.from_numpy(held_out.gold), probabilities)
    epoch = course.epoch + 1
    report.metrics(course.step, float(epoch), {f"fine_tuning_{name}/{part}": value for name, value in scores.items()})
    report.event(
        "training.fine_tuned",
        f"Epoch {epoch} of {course.epochs} of the {part}'s own training: validation macro-F1 {scores['macro_f1']:.4f}.",
        part=part, epoch=epoch, scores=scores,
    )  # fmt: skip
    score = scores["macro_f1"] + 1e-6 * scores["accuracy"]
    if score > course.best_score:
        course.best_score, course.best_weights = score, _copy(model)


def _copy(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _permutation(rows: int, seed: int, epoch: int, course: int) -> NDArray[np.int64]:
    """The order of an epoch; a function of its arguments alone, so it need not be saved."""
    return np.random.Generator(np.random.PCG64([seed, epoch, 2, course])).permutation(rows)
