"""LLKD from a cold and from a warm start: the paper's thresholds, each safeguard by itself, and the default, side by side.

    python -m benchmarks.cold_start [--data emotion yahoo-answers-titles] [--student scratch] [--epochs 6] [--seeds 3]

Everything runs in this process, on the training loop of the service: the embedding teacher with 16 examples a class
labels the pool, each method trains the same student on it, the checkpoint is chosen on 500 validation rows. Prints one
table a data set with means over the seeds; a finished run is a line of --log and is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers.utils import logging

from app import options, pretrained
from benchmarks.data import ROOT, SHARED, few_shot, read_split
from workers.algorithms import metrics
from workers.reporter import MemoryReporter
from workers.teachers import TEACHERS
from workers.teachers.teacher import Row
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import build_student
from workers.training.evaluation import predict_probabilities
from workers.training.run import HeldOut, Pool, begin

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
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "cold_start.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    arguments.log.touch()
    for name in arguments.data:
        if (SHARED / name).is_dir():
            report(name, arguments)
        else:
            print(f"cold_start: skipped, the data set {name} is not at {SHARED}")


def report(name: str, arguments: argparse.Namespace) -> None:
    """Run what the log lacks, then print the table of one data set."""
    lines = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    task = None
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            wanted = {
                **{key: getattr(arguments, key) for key in ("student", "rows", "epochs", "precision")},
                **{"data": name, "method": METHODS[method], "seed": seed},
                **({"learning_rate": arguments.learning_rate} if arguments.learning_rate else {}),
            }
            found = next(
                (
                    line
                    for line in lines
                    if wanted.items() <= line.items() and line.get("learning_rate") == arguments.learning_rate
                ),
                None,
            )
            if found is None:
                task = task or prepare(name, arguments.rows)
                found = wanted | run(task, wanted)
                with arguments.log.open("a") as log:
                    log.write(json.dumps(found) + "\n")
            runs.setdefault(method, []).append(found)
    print(
        f"\n{name}, student {arguments.student}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds"
    )
    print("\n| method | accuracy | macro-F1 | seen | seen by epoch, % |\n|---|---|---|---|---|")
    for method, group in runs.items():
        by_epoch = " ".join(
            f"{100 * statistics.mean(shares):.0f}"
            for shares in zip(*[each["epoch_ratios"] for each in group], strict=True)
        )
        print(f"| {method} | {spread(group, 'accuracy')} | {spread(group, 'macro_f1')} | {spread(group, 'ratio')} % | {by_epoch} |")  # fmt: skip


def prepare(name: str, rows: int) -> Task:
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
    for split, limit in (("validation", 500), ("test", 2000)):
        truth = read_split(name, split, limit)
        held_out[split] = ([row["text"] for row in truth], torch.tensor([labels.index(row["label"]) for row in truth]))
    probabilities = torch.from_numpy(teacher.label([Row(text) for text in texts]).probabilities)
    return Task(labels, texts, probabilities, held_out)


def run(task: Task, wanted: dict[str, Any]) -> dict[str, Any]:
    """Train one student; its scores on the test rows and what it was trained on."""
    wish = STUDENTS[wanted["student"]]
    method = TypeAdapter(options.Method).validate_python(wanted["method"])
    training = options.Training(
        epochs=wanted["epochs"],
        learning_rate=wanted.get("learning_rate", options.LEARNING_RATES[wish.model]),
        seed=wanted["seed"],
        precision=wanted["precision"],
    )
    source = pretrained.resolve(wish.model, purpose="student", roots=[], allow_hub=False)
    student = build_student(wish, task.labels, task.texts, None, source, seed=wanted["seed"])
    everything = np.arange(len(task.texts))
    pool = Pool(tokenise(student.tokenizer, task.texts), task.teacher, everything, np.zeros(len(everything), bool))
    tokens, gold = {}, {}
    for split, (texts, truth) in task.held_out.items():
        tokens[split], gold[split] = tokenise(student.tokenizer, texts), truth
    held_out = HeldOut(tokens["validation"], np.arange(len(gold["validation"])), gold["validation"].numpy())
    training_run = begin(student, pool, method, training, len(task.labels))
    distill(training_run, pool, held_out, task.labels, method, training, MemoryReporter())
    predicted = predict_probabilities(student.model, tokens["test"]).argmax(dim=1)
    selection = training_run.progress.selection()
    return {
        "accuracy": 100 * float(metrics.accuracy(gold["test"], predicted)),
        "macro_f1": 100 * float(metrics.macro_f1(gold["test"], predicted)),
        "validation_macro_f1": 100 * training_run.progress.best_score,
        "ratio": 100 * selection["ratio"],
        "selected": int((training_run.ledger.selected > 0).sum()),
        "epoch_ratios": [epoch["ratio"] for epoch in selection["epochs"]],
        "seconds": training_run.progress.seconds,
    }


def spread(runs: list[dict[str, Any]], name: str) -> str:
    """Mean ± standard deviation over the seeds."""
    values = [run[name] for run in runs]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
