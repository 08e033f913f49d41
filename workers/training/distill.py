"""The training loop of every selection rule, from top to bottom: offer, look, select, step; note why; save; score.

The rules themselves are pure and live in workers/algorithms/selection. Everything the loop remembers is in Progress,
so a run that is saved and restored ends in the same weights, bit for bit on the CPU, as one never disturbed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.options import OTHER_LEARNING_RATE, Method, Training
from workers.algorithms import metrics
from workers.algorithms.selection import RULES
from workers.algorithms.selection.rule import REASONS, Selection, Signals, State
from workers.reporter import Report, Stopped
from workers.training.data import Tokens
from workers.training.encoders import Student
from workers.training.evaluation import PredictionStopped, predict_probabilities

POINTS_PER_RUN = 200
"""About how many points a step series gets."""
HELD_OUT_DUPLICATE = len(REASONS)
"""A reason of the loop, not of a rule: the text also stands in the validation or test set, so it is never trained on."""
LEDGER_REASONS = (*REASONS, "in_held_out_set", "held_back", "not_labeled")


@dataclass(frozen=True)
class Pool:
    """The train rows as the loop sees them."""

    tokens: Tokens
    """Of all N rows of the dataset."""
    teacher: Tensor
    """(N, C) float32 distributions over the labels; rows without a label are NaN and not in `rows`."""
    rows: NDArray[np.int64]
    """The rows to be offered, ascending."""
    barred: NDArray[np.bool_]
    """(N,) rows whose text is also held out; they are seen, and rejected."""


@dataclass(frozen=True)
class HeldOut:
    """Rows that choose the checkpoint, with the class index each should get; others are classes the student cannot name."""

    tokens: Tokens
    rows: NDArray[np.int64]
    gold: NDArray[np.int64]


@dataclass
class Ledger:
    """What happened to each of the N rows; arrays of shape (N,)."""

    offered: NDArray[np.int32]
    selected: NDArray[np.int32]
    reason: NDArray[np.int8]
    """Index into LEDGER_REASONS of the last rejection; 0 when there was none."""
    teacher_threshold: NDArray[np.float32]
    student_threshold: NDArray[np.float32]
    uncertainty: NDArray[np.float32]

    @classmethod
    def empty(cls, rows: int) -> Ledger:
        nothing = [np.full(rows, np.nan, np.float32) for _ in range(3)]
        return cls(np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int8), *nothing)

    def note(self, rows: NDArray[np.int64], selection: Selection) -> None:
        """Take in the decisions about one batch."""
        mask = selection.mask.numpy()
        self.offered[rows] += 1
        self.selected[rows[mask]] += 1
        self.reason[rows[~mask]] = selection.reasons.numpy()[~mask]
        for name, values in (
            ("teacher_threshold", selection.teacher_threshold),
            ("student_threshold", selection.student_threshold),
            ("uncertainty", selection.uncertainty),
        ):
            known = ~torch.isnan(values).numpy()
            getattr(self, name)[rows[known]] = values.numpy()[known]

    def bar(self, rows: NDArray[np.int64]) -> None:
        """Take in rows that are seen but may not be trained on."""
        self.offered[rows] += 1
        self.reason[rows] = HELD_OUT_DUPLICATE


@dataclass
class EpochCount:
    """Rows offered and trained on in one epoch."""

    epoch: int
    seen: int = 0
    selected: int = 0


@dataclass
class Interval:
    """What is averaged between two points of the step series."""

    seen: int = 0
    selected: int = 0
    loss: float = 0.0
    steps: int = 0
    class_seen: list[int] = field(default_factory=list)
    class_selected: list[int] = field(default_factory=list)


@dataclass
class Progress:
    """All that the loop remembers between two steps, besides model, optimizer and random state."""

    epoch: int = 0
    position: int = 0
    """Rows of this epoch's order that are done."""
    step: int = 0
    counts: list[EpochCount] = field(default_factory=list)
    interval: Interval = field(default_factory=Interval)
    best_score: float = -1.0
    best_epoch: float = 0.0
    best_step: int = 0
    best_metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def selection(self) -> dict[str, Any]:
        """The figures the job shows."""
        counts = [count for count in self.counts if count.seen]
        seen = sum(count.seen for count in counts)
        selected = sum(count.selected for count in counts)
        return {
            "seen": seen,
            "selected": selected,
            "ratio": selected / seen if seen else 0.0,
            "epochs": [{**asdict(count), "ratio": count.selected / count.seen} for count in counts],
        }


@dataclass
class Run:
    """A training under way: everything that is saved and restored."""

    student: Student
    optimizer: torch.optim.Optimizer
    rule_state: State
    generator: torch.Generator
    """Of the rule's random choices."""
    ledger: Ledger
    progress: Progress
    best_weights: dict[str, Tensor] | None = None


def begin(student: Student, pool: Pool, method: Method, training: Training, classes: int) -> Run:
    """A run at its first step. The random state of the process is set from the seed."""
    torch.manual_seed(training.seed)
    model = student.model
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    plain = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=training.learning_rate or OTHER_LEARNING_RATE,
        fused=True,
    )
    return Run(
        student=student,
        optimizer=optimizer,
        rule_state=make_rule(method).initial(classes),
        generator=torch.Generator().manual_seed(training.seed),
        ledger=Ledger.empty(len(pool.tokens)),
        progress=Progress(),
    )


def make_rule(method: Method) -> Any:
    """The rule a method option names."""
    return RULES[method.kind](**method.model_dump(exclude={"kind"}))


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
    threshold_student/<label>, and what the rule says of itself; by epoch: epoch_ratio, validation_accuracy,
    validation_macro_f1.
    """
    rule, model, progress = make_rule(method), run.student.model, run.progress
    device, bf16 = model.device, training.precision == "bf16"
    rows_offered = len(pool.rows)
    steps_per_epoch = math.ceil(rows_offered / training.batch_size)
    total_steps = steps_per_epoch * training.epochs
    point_every = max(1, total_steps // POINTS_PER_RUN)
    subset = torch.zeros(len(pool.tokens), dtype=torch.bool)
    usable = pool.rows[~pool.barred[pool.rows]]
    subset[usable] = rule.prepare(pool.teacher[usable])
    report.phase("training", rows_offered * training.epochs)
    saved_at = began = time.monotonic()
    seconds_before = progress.seconds
    model.train()
    try:
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
                offered, run.rule_state = rule.offer(run.rule_state, teacher, subset[rows])

                student_view = torch.full_like(teacher, 1.0 / len(labels))
                if rule.needs_student and offered.any():
                    asked = rows[offered.numpy()]
                    student_view[offered] = predict_probabilities(model, pool.tokens, asked, bf16=bf16)

                signals = Signals(teacher, student_view, offered, subset[rows], progress.epoch, run.generator)
                selection, run.rule_state = rule.select(run.rule_state, signals)

                rate = learning_rate(progress.step, total_steps, training)
                if selection.mask.any():
                    for group in run.optimizer.param_groups:
                        group["lr"] = rate
                    chosen = pool.tokens.batch(rows[selection.mask.numpy()])
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        logits = model(**{name: tensor.to(device) for name, tensor in chosen.items()}).logits.float()
                    loss = rule.loss(logits, teacher[selection.mask], selection)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                    run.optimizer.step()
                    run.optimizer.zero_grad(set_to_none=True)
                    progress.interval.loss += loss.item()
                    progress.interval.steps += 1

                run.ledger.note(rows, selection)
                run.ledger.bar(batch[pool.barred[batch]])
                _count(progress.interval, count, len(batch), teacher, selection)
                progress.position += len(batch)
                progress.step += 1
                report.progress(progress.epoch * rows_offered + progress.position)
                if progress.step % point_every == 0 or progress.step == total_steps:
                    _report_interval(report, progress, rule, run.rule_state, labels, rate, rows_offered)
                if time.monotonic() - saved_at > save_every_seconds:
                    progress.seconds = seconds_before + time.monotonic() - began
                    report.flush()
                    save(run)
                    saved_at = time.monotonic()

            _score_epoch(run, held_out, report)
            progress.epoch += 1
            progress.position = 0
            progress.seconds = seconds_before + time.monotonic() - began
            on_epoch(run)
    except (Stopped, PredictionStopped):
        progress.seconds = seconds_before + time.monotonic() - began
        # A point before the saved step is never made again, so it must be on record before the step is.
        report.flush()
        save(run)
        raise Stopped from None
    if run.best_weights is not None:
        model.load_state_dict(run.best_weights)
    model.eval()
    report.flush()
    return run


def learning_rate(step: int, total_steps: int, training: Training) -> float:
    """Linear warm-up to the peak over `warmup_ratio` of the steps, then linear decay to 0 at the end."""
    peak = training.learning_rate or OTHER_LEARNING_RATE
    warm_up = training.warmup_ratio * total_steps
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    return peak * (total_steps - step) / max(1.0, total_steps - warm_up)


def _permutation(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch; a function of seed and epoch alone, so it need not be saved."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def _count(interval: Interval, count: EpochCount, seen: int, teacher: Tensor, selection: Selection) -> None:
    selected = int(selection.mask.sum())
    count.seen += seen
    count.selected += selected
    interval.seen += seen
    interval.selected += selected
    classes = teacher.shape[1]
    pseudo_labels = teacher.argmax(dim=1)
    for totals, chosen in (
        (interval.class_seen, pseudo_labels),
        (interval.class_selected, pseudo_labels[selection.mask]),
    ):
        by_class = torch.bincount(chosen, minlength=classes).tolist()
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
    report.metrics(progress.step, progress.epoch + progress.position / rows_per_epoch, values)
    report.selection(figures)
    progress.interval = Interval()


def _score_epoch(run: Run, held_out: HeldOut, report: Report) -> None:
    """Look at the held-out rows; keep the weights when they are the best so far."""

    def should_stop() -> bool:
        report.check()
        return False

    progress, model = run.progress, run.student.model
    probabilities = predict_probabilities(model, held_out.tokens, held_out.rows, should_stop=should_stop)
    predicted, gold = probabilities.argmax(dim=1), torch.from_numpy(held_out.gold)
    scores = {
        "validation_accuracy": float(metrics.accuracy(gold, predicted)),
        "validation_macro_f1": float(metrics.macro_f1(gold, predicted)),
    }
    count = progress.counts[-1]
    epoch = progress.epoch + 1
    report.metrics(progress.step, float(epoch), {**scores, "epoch_ratio": count.selected / count.seen})
    report.selection(progress.selection())
    report.event(
        "training.epoch",
        f"Epoch {epoch}: {count.selected} of {count.seen} rows selected, validation macro-F1 {scores['validation_macro_f1']:.4f}.",
        count=asdict(count), scores=scores,
    )  # fmt: skip
    score = scores["validation_macro_f1"] + 1e-6 * scores["validation_accuracy"]
    if score > progress.best_score:
        progress.best_score, progress.best_epoch, progress.best_step = score, float(epoch), progress.step
        progress.best_metrics = scores
        run.best_weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
