"""The training loop of every method, from top to bottom: offer, look, select, step; note why; save; score.

Two parts of it are the method's own. Its rule chooses the rows of a batch (workers/algorithms/selection); its step learns
from them (STEPS): the student alone from the labels, or student and encoder teacher together. An encoder teacher that learns
before the student does so in a course of its own (courses.py), ahead of the first offer. Everything the loop remembers
is in Run, so a run that is saved and restored ends in the same weights, bit for bit on the CPU, as one never disturbed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.options import OTHER_LEARNING_RATE, Method, Training
from workers.algorithms.selection.rule import Signals, State
from workers.reporter import Report, Stopped, asking
from workers.training import shares
from workers.training.courses import take_courses
from workers.training.dml import dml_step
from workers.training.evaluation import PredictionStopped, agreement, predict_together
from workers.training.fixed_teacher import fixed_teacher_step
from workers.training.lgtm import lgtm_step
from workers.training.meta_distill import meta_distill_step
from workers.training.online import online_step
from workers.training.pesf_kd import pesf_kd_step
from workers.training.prokt import prokt_step
from workers.training.run import EpochCount, HeldOut, Interval, Pool, Progress, Run, make_rule
from workers.training.schedule import learning_rate, set_learning_rate
from workers.training.step import Learned, Lesson, Step, backward_and_step, logits_by_length

POINTS_PER_RUN = 200
"""About how many points a step series gets."""
STARVED = 0.01
"""An epoch that selects a smaller share of its rows than this gets a warning: thresholds that lag do so unnoticed."""


def distill(
    run: Run,
    pool: Pool,
    held_out: HeldOut,
    labels: list[str],
    method: Method,
    training: Training,
    report: Report,
    *,
    save: Callable[[Run], None] = lambda run: None,
    save_every_seconds: float = math.inf,
    on_epoch: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Train to the last epoch and leave the best weights in the student.

    Best is the highest macro-F1 on `held_out` (then accuracy), looked at after every epoch. `save` is called every
    `save_every_seconds` and before Stopped leaves; LeaseLost leaves at once. Metric series by step: train_loss,
    learning_rate, seen and selected (totals so far), ratio, class_ratio/<label>, threshold_teacher/<label>,
    threshold_student/<label>, and what rule and step say of themselves; by epoch: epoch_ratio, validation_accuracy,
    validation_macro_f1, validation_loss, and with an encoder teacher that learns beside the student its accuracy and
    macro-F1 on the same rows; and what take_courses tells.
    """
    rule, model, progress = make_rule(method), run.student.model, run.progress
    learn, bf16 = STEPS.get(method.kind, supervised_step), training.precision == "bf16"
    peak = training.learning_rate or OTHER_LEARNING_RATE
    rows_offered = len(pool.rows)
    steps_per_epoch = math.ceil(rows_offered / training.batch_size)
    total_steps = steps_per_epoch * training.epochs
    point_every = max(1, total_steps // POINTS_PER_RUN)
    subset = torch.zeros(len(pool.tokens), dtype=torch.bool)
    usable = pool.rows[~pool.barred[pool.rows]]
    subset[usable] = rule.prepare(pool.teacher[usable])
    rows_before = rows_offered * sum(course.epochs for course in run.courses.values())
    report.phase("training", rows_before + rows_offered * training.epochs)
    saved_at = began = time.monotonic()
    seconds_before = progress.seconds
    model.train()
    for companion in run.companions.values():
        companion.encoder.model.train()

    def save_now() -> None:
        nonlocal saved_at
        progress.seconds = seconds_before + time.monotonic() - began
        # A point before the saved step is never made again, so it must be on record before the step is.
        report.flush()
        save(run)
        saved_at = time.monotonic()

    def save_in_time() -> None:
        if time.monotonic() - saved_at > save_every_seconds:
            save_now()

    try:
        take_courses(run, pool, held_out, method, training, report, save_in_time)
        while progress.epoch < training.epochs:
            order = pool.rows[_permutation(rows_offered, training.seed, progress.epoch)]
            if not progress.counts or progress.counts[-1].epoch != progress.epoch + 1:
                progress.counts.append(EpochCount(progress.epoch + 1))
            count = progress.counts[-1]
            while progress.position < rows_offered:
                report.check()
                batch = order[progress.position : progress.position + training.batch_size]
                rows = batch[~pool.barred[batch]]
                teacher = pool.teacher[rows]
                offered, rule_state = rule.offer(run.rule_state, teacher, subset[rows])

                student_view = torch.full_like(teacher, 1.0 / len(labels))
                if rule.needs_student and offered.any():
                    asked = rows[offered.numpy()]
                    # A large batch takes long: a stop is noticed within it, and leaves the run as it was before the step.
                    student_view[offered] = predict_together(
                        model, pool.tokens, asked, bf16=bf16, should_stop=asking(report)
                    )

                signals = Signals(teacher, student_view, offered, subset[rows], progress.epoch, run.generator)
                selection, run.rule_state = rule.select(rule_state, signals)

                rate = learning_rate(progress.step, total_steps, training)
                if selection.mask.any():
                    set_learning_rate(run.optimizer, rate)
                    for companion in run.companions.values():
                        set_learning_rate(companion.optimizer, companion.learning_rate * rate / peak)
                    chosen = rows[selection.mask.numpy()]
                    lesson = Lesson(chosen, teacher[selection.mask], selection, rule, progress.step)
                    shares.draw_anew(training.seed, 0, progress.step)
                    learned = learn(run, pool, method, training, lesson)
                    progress.interval.loss += learned.loss
                    progress.interval.steps += 1
                    progress.interval.note(learned.figures)
                    if learned.measured is not None:
                        run.ledger.note_influence(chosen, learned.measured, progress.epoch, training.epochs)

                run.ledger.note(rows, selection)
                run.ledger.bar(batch[pool.barred[batch]])
                _count(progress.interval, count, pool.teacher[batch], teacher[selection.mask])
                progress.position += len(batch)
                progress.step += 1
                report.progress(rows_before + progress.epoch * rows_offered + progress.position)
                if progress.step % point_every == 0 or progress.step == total_steps:
                    _report_interval(report, progress, rule, run.rule_state, labels, rate, rows_offered)
                save_in_time()

            _score_epoch(run, held_out, report)
            progress.epoch += 1
            progress.position = 0
            progress.seconds = seconds_before + time.monotonic() - began
            on_epoch(run)
    except (Stopped, PredictionStopped):
        save_now()
        raise Stopped from None
    if run.best_weights is not None:
        model.load_state_dict(run.best_weights)
    model.eval()
    report.flush()
    return run


def supervised_step(run: Run, pool: Pool, method: Method, training: Training, lesson: Lesson) -> Learned:
    """The student alone learns from the labels, by the loss of the rule that chose the rows."""
    logits = logits_by_length(run.student.model, pool.tokens, lesson.rows, training)
    loss = lesson.rule.loss(logits, lesson.teacher, lesson.selection)
    backward_and_step(run.student.model, run.optimizer, loss, training)
    return Learned(loss.item())


STEPS: dict[str, Step] = {
    "online": online_step,
    "dml": dml_step,
    "prokt": prokt_step,
    "lgtm": lgtm_step,
    "llkd_lgtm": lgtm_step,
    "kd": fixed_teacher_step,
    "skd": fixed_teacher_step,
    "dist": fixed_teacher_step,
    "pkd": fixed_teacher_step,
    "takd": fixed_teacher_step,
    "rco": fixed_teacher_step,
    "pesf_kd": pesf_kd_step,
    "meta_distill": meta_distill_step,
}
"""How the methods learn that do more than `supervised_step`, by kind."""


def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch; a function of seed and epoch alone, so it need not be saved."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def _count(interval: Interval, count: EpochCount, seen: Tensor, selected: Tensor) -> None:
    """Take in a batch: the teacher's distributions, (B, C) of its rows, barred ones too, and (S, C) of those selected."""
    count.seen += len(seen)
    count.selected += len(selected)
    interval.seen += len(seen)
    interval.selected += len(selected)
    classes = seen.shape[1]
    for totals, distributions in ((interval.class_seen, seen), (interval.class_selected, selected)):
        by_class = torch.bincount(distributions.argmax(dim=1), minlength=classes).tolist()
        totals[:] = [before + now for before, now in zip(totals or [0] * classes, by_class, strict=True)]


def _report_interval(
    report: Report, progress: Progress, rule: Any, state: State, labels: list[str], rate: float, rows_per_epoch: int
) -> None:
    interval, figures = progress.interval, progress.selection()
    values: dict[str, float | None] = {
        "learning_rate": rate,
        "seen": figures["seen"],
        "selected": figures["selected"],
        "ratio": interval.selected / interval.seen if interval.seen else None,
        "train_loss": interval.loss / interval.steps if interval.steps else None,
    }
    for label, seen, selected in zip(labels, interval.class_seen, interval.class_selected, strict=True):
        values[f"class_ratio/{label}"] = selected / seen if seen else None
    for side, thresholds in rule.thresholds(state).items():
        values.update(
            {f"threshold_{side}/{label}": value for label, value in zip(labels, thresholds.tolist(), strict=True)}
        )
    values.update(rule.summary(state))
    values.update(interval.means())
    report.metrics(progress.step, progress.epoch + progress.position / rows_per_epoch, values)
    report.selection(figures)
    progress.interval = Interval()


def _score_epoch(run: Run, held_out: HeldOut, report: Report) -> None:
    """Look at the held-out rows; keep the weights when they are the best so far."""

    should_stop = asking(report)
    progress, model = run.progress, run.student.model
    probabilities = predict_together(model, held_out.tokens, held_out.rows, should_stop=should_stop)
    gold = torch.from_numpy(held_out.gold)
    scores = {f"validation_{name}": value for name, value in agreement(gold, probabilities).items()}
    figures: dict[str, float | None] = {**scores, "validation_loss": _cross_entropy(gold, probabilities)}
    if (companion := run.companions.get("teacher")) is not None and companion.learns:
        tokens = held_out.teacher_tokens or held_out.tokens
        probabilities = predict_together(companion.encoder.model, tokens, held_out.rows, should_stop=should_stop)
        figures |= {f"encoder_teacher_{name}": value for name, value in agreement(gold, probabilities).items()}
    count = progress.counts[-1]
    epoch = progress.epoch + 1
    report.metrics(progress.step, float(epoch), {**figures, "epoch_ratio": count.selected / count.seen})
    report.selection(progress.selection())
    report.event(
        "training.epoch",
        f"Epoch {epoch}: {count.selected} of {count.seen} rows selected, validation macro-F1 {scores['validation_macro_f1']:.4f}.",
        count=asdict(count), scores=figures,
    )  # fmt: skip
    if count.selected < STARVED * count.seen:
        report.event(
            "training.starved", level="warning", count=asdict(count),
            message=f"Epoch {epoch}: only {count.selected} of {count.seen} rows were selected; the student has next to nothing to learn from.",
        )  # fmt: skip
    score = scores["validation_macro_f1"] + 1e-6 * scores["validation_accuracy"]
    if score > progress.best_score:
        progress.best_score, progress.best_epoch, progress.best_step = score, float(epoch), progress.step
        progress.best_metrics = scores
        run.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _cross_entropy(gold: Tensor, probabilities: Tensor) -> float | None:
    """In nats, over the rows of a class the student can name; None when there is none."""
    named = gold < probabilities.shape[1]
    if not named.any():
        return None
    return float(functional.nll_loss(probabilities[named].clamp_min(1e-12).log(), gold[named]))
