"""What a student predicts for many rows, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import RobertaForSequenceClassification

from workers.algorithms import abstention, metrics
from workers.training import shares
from workers.training.data import Rows, Tokens, length_sorted_batches

# A batch that fits in the second-level cache is fastest on a CPU (measured: docs/experiments.md); a GPU wants it full.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 65_536}


class PredictionStopped(Exception):
    """`should_stop` said so before the last batch."""


class ClassScore(TypedDict):
    """One class: its F1, how many rows are of it, and how many were predicted to be."""

    f1: float
    support: int
    predicted: int


class Scores(TypedDict):
    """What a set of predictions is worth; intervals are 95 % bootstrap intervals, (low, high)."""

    rows: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    macro_f1_interval: tuple[float, float]
    expected_calibration_error: float | None
    """None for a teacher that gives labels without a confidence."""
    per_class: dict[str, ClassScore]


def agreement(gold: Tensor, probabilities: Tensor) -> dict[str, float]:
    """Accuracy and macro-F1 of (N, C) probabilities on (N,) class indices."""
    predicted = probabilities.argmax(dim=1)
    return {"accuracy": float(metrics.accuracy(gold, predicted)), "macro_f1": float(metrics.macro_f1(gold, predicted))}


def evaluate(probabilities: Tensor, gold: Sequence[str | None], labels: Sequence[str], seed: int) -> Scores:
    """Score (N, C) probabilities against the N true class names; equal to scikit-learn's scores on the names.

    labels: the names of the C columns. Rows whose gold is None are left out. A gold name that the labels lack is a
    class of its own: such a row is wrong, and the class counts with F1 = 0 in macro-F1. seed: of the bootstrap.

    Raises ValueError if no row has a gold name.
    """
    known = [row for row, name in enumerate(gold) if name is not None]
    if not known:
        raise ValueError("no row has a true label, so there is nothing to score")
    ids = {name: index for index, name in enumerate(labels)}
    truth = torch.tensor([ids.setdefault(str(gold[row]), len(ids)) for row in known])
    probabilities = probabilities[known]
    predicted = probabilities.argmax(dim=1)
    f1 = metrics.per_class_f1(truth, predicted, len(labels)).tolist()
    support, answered = (classes.bincount(minlength=len(labels)).tolist() for classes in (truth, predicted))
    return {
        "rows": len(known),
        "accuracy": metrics.accuracy(truth, predicted),
        "accuracy_interval": metrics.bootstrap_interval(truth, predicted, "accuracy", seed=seed),
        "macro_f1": metrics.macro_f1(truth, predicted),
        "macro_f1_interval": metrics.bootstrap_interval(truth, predicted, "macro_f1", seed=seed),
        "expected_calibration_error": metrics.expected_calibration_error(probabilities, truth),
        "per_class": {
            name: {"f1": f1[index], "support": support[index], "predicted": answered[index]}
            for index, name in enumerate(labels)
        },
    }


MISSED_ROWS, MISSED_SHARE = 5, 0.01
"""A class with at least so many of the scored rows, and such a share of them, should be predicted now and then."""


def warnings_of(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    """A warning where the student leaves out classes that have rows, by the set that chose nothing, where there is one."""
    split = "test" if evaluation["test"] else "validation"
    scores: Scores = evaluation[split]["student"]
    least = max(MISSED_ROWS, MISSED_SHARE * scores["rows"])
    answered = [name for name, score in scores["per_class"].items() if score["predicted"]]
    rows = {name: score["support"] for name, score in scores["per_class"].items() if not score["predicted"]}
    missed = sorted((name for name in rows if rows[name] >= least), key=lambda name: -rows[name])
    if not missed:
        return []
    if len(answered) == 1:
        message = (
            f"on the {split} set the student answers {answered[0]!r} for every one of {scores['rows']:,} rows: it has learned"
            " nothing but a frequent label. Try more training.epochs, another training.learning_rate, more rows, or another method"
        )
    else:
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        message = (
            f"on the {split} set of {scores['rows']:,} rows the student never answers"
            f" {', '.join(f'{name!r} ({rows[name]:,} rows)' for name in missed[:5])}{more}. Give more rows of such labels, or choose a"
            " method that selects more of them"
        )
    return [{"code": "classes_missed", "split": split, "message": message}]


DEFAULT_TARGET = 0.9


@dataclass(frozen=True)
class Answers:
    """What student and teacher said of N rows of known class."""

    student: Tensor
    """(N, C) probabilities."""
    gold: Sequence[str]
    teacher: Tensor | None = None
    """(N, C) probabilities; None where the teacher did not answer every row."""

    def right(self, labels: Sequence[str]) -> Tensor:
        """(N,) rows in which the student is right."""
        return _is_right(self.student, self.gold, labels)

    def teacher_right(self, labels: Sequence[str]) -> Tensor | None:
        """(N,) rows in which the teacher is right."""
        return None if self.teacher is None else _is_right(self.teacher, self.gold, labels)


def _is_right(probabilities: Tensor, gold: Sequence[str], labels: Sequence[str]) -> Tensor:
    predicted = probabilities.argmax(dim=1).tolist()
    return torch.tensor([labels[index] == name for index, name in zip(predicted, gold, strict=True)], dtype=torch.bool)


def calibrate(
    validation: Answers, test: Answers | None, labels: Sequence[str], *, source: str, target: float | None
) -> dict[str, Any]:
    """When the student should abstain, by the validation rows; and what comes of it on the test rows.

    target: the accuracy wanted of the rows it answers; None: the teacher's own, or DEFAULT_TARGET where that is not
    known. The curve is of the test rows where there are any: on those, nothing was chosen.
    """
    ids = {name: index for index, name in enumerate(labels)}
    known = [row for row, name in enumerate(validation.gold) if name in ids]
    gold = torch.tensor([ids[validation.gold[row]] for row in known], dtype=torch.long)
    temperature = abstention.fit_temperature(validation.student[known], gold)
    right, teacher_right = validation.right(labels), validation.teacher_right(labels)
    if target is not None:
        target_source = "spec"
    elif teacher_right is not None:
        target, target_source = float(teacher_right.double().mean()), "teacher"
    else:
        target, target_source = DEFAULT_TARGET, "default"
    threshold = abstention.threshold_for(_confidence(validation, temperature), right, target)
    shown = test or validation
    return {
        "source": source,
        "rows": len(right),
        "temperature": temperature,
        "target_accuracy": target,
        "target_source": target_source,
        "threshold": threshold,
        "validation": _kept(validation, temperature, threshold, labels),
        "test": _kept(test, temperature, threshold, labels) if test else None,
        "curve": {
            "split": "test" if test else "validation",
            "points": abstention.coverage_curve(
                _confidence(shown, temperature), shown.right(labels), shown.teacher_right(labels)
            ),
        },
    }


def _confidence(answers: Answers, temperature: float) -> Tensor:
    return abstention.soften(answers.student, temperature).amax(dim=1)


def _kept(answers: Answers, temperature: float, threshold: float | None, labels: Sequence[str]) -> dict[str, Any]:
    """Share of rows that are answered, and how many of those are right."""
    kept = _confidence(answers, temperature) >= (math.inf if threshold is None else threshold)
    right = answers.right(labels)[kept].double()
    return {"coverage": float(kept.double().mean()), "accuracy": float(right.mean()) if len(right) else None}


def predict_probabilities(
    model: RobertaForSequenceClassification,
    tokens: Tokens,
    rows: Tensor | NDArray[Any] | None = None,
    *,
    tokens_per_batch: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    bf16: bool = False,
) -> Tensor:
    """Class probabilities of N rows, without dropout and gradients: float32 on the CPU, shape (N, classes).

    rows: the row numbers wanted, shape (N,), and the order of the result; None: all. tokens_per_batch: padded tokens a
    batch holds at most (None: what suits the device); halved as often as the device runs out of memory. should_stop: asked before each batch.
    bf16: compute in bfloat16 where autocast would; probabilities then differ by about 0.001.

    The model's training mode is as before when this returns or raises. Raises PredictionStopped.
    """
    wanted = np.arange(len(tokens)) if rows is None else np.asarray(rows, dtype=np.int64)
    places = np.arange(len(wanted))  # duplicates in `rows` are rows of the result like any other
    lengths = tokens.lengths[wanted]
    device = model.device
    budget = tokens_per_batch or TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])
    probabilities = torch.empty(len(wanted), model.config.num_labels, device=device)
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pending = length_sorted_batches(lengths, places, budget)[::-1]
            while pending:
                if should_stop is not None and should_stop():
                    raise PredictionStopped
                batch = pending.pop()
                try:
                    probabilities[torch.from_numpy(batch)] = _forward(model, tokens, wanted[batch], device)
                except torch.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    budget = max(1, budget // 2)
                    rest = np.concatenate([batch, *reversed(pending)])
                    pending = length_sorted_batches(lengths, rest, budget)[::-1]
    finally:
        model.train(training)
    return probabilities.cpu()


def predict_together(model: RobertaForSequenceClassification, tokens: Tokens, rows: Rows, **options: Any) -> Tensor:
    """predict_probabilities of one row or more, each process of the training for its share of them; all call it."""
    mine = predict_probabilities(model, tokens, rows[shares.own(len(rows))], **options)
    return shares.gather(mine.to(model.device), len(rows)).cpu()


def _forward(model: RobertaForSequenceClassification, tokens: Tokens, rows: Rows, device: torch.device) -> Tensor:
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in tokens.batch(rows).items()}
    return model(**batch).logits.float().softmax(dim=-1)
