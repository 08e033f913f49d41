"""LLKD from a cold and from a warm start: the paper's thresholds, each safeguard by itself, and the default, side by side.

    python -m benchmarks.cold_start [--data emotion yahoo-answers-titles] [--student scratch] [--epochs 6] [--seeds 3]

Everything runs in this process, on the training loop of the service: the embedding teacher with 16 examples a class
labels the pool, each method trains the same student on it, the checkpoint is chosen on 500 validation rows. Prints one
table a data set with means over the seeds; a finished run is on record in --out and is not run again.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers.utils import logging

from app import options, pretrained
from benchmarks.data import ROOT, few_shot, present, read_split
from benchmarks.record import Record, end_by_interrupt, spread, table
from workers.algorithms import metrics
from workers.reporter import MemoryReporter
from workers.teachers import TEACHERS
from workers.teachers.teacher import Row
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import build_student
from workers.training.evaluation import predict_probabilities
from workers.training.run import HeldOut, Pool, Run, begin

PAPER = {"class_norm": "max", "student_threshold": "moving_average", "warm_up": "none", "floor": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "No_DS": {"kind": "no_selection"},
    "Random, 25 %": {"kind": "random", "ratio": 0.25},
    "LLKD, the paper's thresholds": {"kind": "llkd", **PAPER},
    "… and the level of the batch": {"kind": "llkd", **PAPER, "student_threshold": "batch_level"},
    "… and the mean norm": {"kind": "llkd", "warm_up": "none", "floor": 0.0},
    "… and the warm-up: LLKD by default": {"kind": "llkd"},
}
STUDENTS = {
    "scratch": options.Student(model="scratch", num_layers=2, hidden_size=128, max_length=64),
    options.DEFAULT_STUDENT: options.Student(max_length=64),
    "its first 3 layers": options.Student(num_layers=3, max_length=64),
    "its first layer": options.Student(num_layers=1, max_length=64, pooling="first"),
}


@dataclass(frozen=True)
class Task:
    """A pool that the teacher has labeled, and rows with true labels."""

    labels: list[str]
    texts: list[str]
    teacher: Tensor
    held_out: dict[str, tuple[list[str], Tensor]]
    """Texts and true classes of "validation" and "test"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=["emotion", "yahoo-answers-titles"])
    parser.add_argument("--student", default="scratch", choices=list(STUDENTS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--learning-rate", type=float, help="instead of the student's own default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cold-start.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    end_by_interrupt()
    data = present(arguments.data)
    names = ("student", "rows", "epochs", "precision", "learning_rate")
    record = Record(arguments.out, {name: getattr(arguments, name) for name in names})
    rate = arguments.learning_rate or options.LEARNING_RATES[STUDENTS[arguments.student].model]
    wanted = [
        {"data": name, "method": method, "seed": seed}
        for name in data
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    for run in record.missing(wanted):
        task = prepare(run["data"], arguments.rows)
        training = options.Training(
            epochs=arguments.epochs, learning_rate=rate, seed=run["seed"], precision=arguments.precision
        )
        trained, answers = train(task, arguments.student, METHODS[run["method"]], training)
        record.add({**run, **figures(task, trained, answers)})
    for name in data:
        print(f"\n{name}, student {arguments.student}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds")  # fmt: skip
        print("\n".join(table(HEADINGS, [row(method, name, record) for method in arguments.methods])))


HEADINGS = ["method", "accuracy", "macro-F1", "seen", "seen by epoch, %"]


def row(method: str, name: str, record: Record) -> list[str]:
    """The cells of one method on one data set."""
    runs = [run for run in record.runs if (run["data"], run["method"]) == (name, method)]
    accuracy, macro_f1, ratio = (spread([run[key] for run in runs]) for key in ("accuracy", "macro_f1", "ratio"))
    epochs = zip(*[run["epoch_ratios"] for run in runs], strict=True)
    return [method, accuracy, macro_f1, f"{ratio} %", " ".join(f"{100 * statistics.mean(each):.0f}" for each in epochs)]


@lru_cache(maxsize=1)
def prepare(name: str, rows: int, validation_rows: int = 500) -> Task:
    """Let the teacher label the pool; its examples come from the train rows and leave the pool."""
    examples, rest = few_shot(read_split(name, "train"), 16)
    labels = sorted({row["label"] for row in examples})
    bundled = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)
    wish = options.EmbeddingTeacher(
        kind="embedding", examples=[options.Example(text=row["text"], label=row["label"]) for row in examples]
    )
    teacher = TEACHERS["embedding"](wish, [options.Label(name=label) for label in labels], bundled)
    texts = [row["text"] for row in rest[:rows]]
    held_out = {}
    for split, limit in (("validation", validation_rows), ("test", 2000)):
        truth = read_split(name, split, limit)
        held_out[split] = ([row["text"] for row in truth], torch.tensor([labels.index(row["label"]) for row in truth]))
    probabilities = torch.from_numpy(teacher.label([Row(text) for text in texts]).probabilities)
    return Task(labels, texts, probabilities, held_out)


def train(
    task: Task, student: str, method: dict[str, Any], training: options.Training
) -> tuple[Run, dict[str, Tensor]]:
    """A finished training of one of STUDENTS, and its answers to the held-out rows, by split."""
    wish, rule = STUDENTS[student], TypeAdapter(options.Method).validate_python(method)
    source = pretrained.resolve(wish.model, purpose="student", roots=[], allow_hub=False)
    encoder = build_student(wish, task.labels, task.texts, None, source, seed=training.seed)
    everything = np.arange(len(task.texts))
    pool = Pool(tokenise(encoder.tokenizer, task.texts), task.teacher, everything, np.zeros(len(everything), bool))
    tokens = {split: tokenise(encoder.tokenizer, texts) for split, (texts, _) in task.held_out.items()}
    gold = task.held_out["validation"][1].numpy()
    held_out = HeldOut(tokens["validation"], np.arange(len(gold)), gold)
    run = begin(encoder, pool, rule, training, len(task.labels))
    distill(run, pool, held_out, task.labels, rule, training, MemoryReporter())
    return run, {split: predict_probabilities(encoder.model, tokens[split]).argmax(dim=1) for split in tokens}


def figures(task: Task, run: Run, answers: dict[str, Tensor]) -> dict[str, Any]:
    """Scores on the test rows, from 0 to 1, and what the student was trained on."""
    gold, selection = task.held_out["test"][1], run.progress.selection()
    return {
        "accuracy": float(metrics.accuracy(gold, answers["test"])),
        "macro_f1": float(metrics.macro_f1(gold, answers["test"])),
        "validation_macro_f1": run.progress.best_metrics["validation_macro_f1"],
        "ratio": selection["ratio"],
        "selected": int((run.ledger.selected > 0).sum()),
        "epoch_ratios": [epoch["ratio"] for epoch in selection["epochs"]],
        "seconds": run.progress.seconds,
    }


if __name__ == "__main__":
    main()
