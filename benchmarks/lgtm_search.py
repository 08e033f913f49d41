"""Which mode, scale and schedule of LGTM make the student better, on validation data only: no test set is read.

    python -m benchmarks.lgtm_search [--data rte mrpc sst2-sentences] [--rows 600] [--epochs 3] [--seeds 2] [--out build/lgtm-search.json]

The encoder teacher is the bundled encoder with its 6 layers, the student its first 3; both learn from the true labels. Each
row of the table is the best macro-F1 over the epochs, on validation rows that give no feedback, mean ± sd over the seeds;
all arms of a seed have the same rows for training, feedback and validation, ProKT too. A run that --out holds, made with the
same options, is not made again, and each is written there as it ends. --cost makes no run that counts: it times one epoch on
32 rows of each arm and prints what the whole would take.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import TypeAdapter

from app import options, pretrained
from benchmarks.data import ROOT, SHARED, read_split
from benchmarks.record import Record, end_by_interrupt, spread, table
from workers.reporter import MemoryReporter
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import Student, build_student
from workers.training.run import HeldOut, Pool, begin
from workers.training.splits import choose, near_groups

TOGETHER: dict[str, Any] = {"teacher_epochs": 0, "zero_heads": True}
"""Teacher and student begin together, as the authors have it."""
ARMS: dict[str, dict[str, Any]] = {
    "student alone": {"kind": "no_selection"},
    "kd": {"kind": "kd"},
    "meta_distill": {"kind": "meta_distill"},
    "online": {"kind": "online"},
    "prokt": {"kind": "prokt"},
    "prokt, share 1": {"kind": "prokt", "distillation_share": 1.0},
    "prokt, share 1, heads drawn": {"kind": "prokt", "distillation_share": 1.0, "zero_heads": False},
    "prokt, teacher first": {"kind": "prokt", "teacher_epochs": None, "zero_heads": False},
    "official, scale 1": {"kind": "lgtm"},
    "official, scale 1, together": {"kind": "lgtm", **TOGETHER},
    "official, scale 100": {"kind": "lgtm", "influence_scale": 100},
    "official, scale 1000": {"kind": "lgtm", "influence_scale": 1000},
    "official, scale 1000, every 4": {"kind": "lgtm", "influence_scale": 1000, "influence_every": 4},
    "official, scale 1000, together": {"kind": "lgtm", "influence_scale": 1000, **TOGETHER},
    "weighted, scale 0.1": {"kind": "lgtm", "mode": "weighted", "influence_scale": 0.1},
    "weighted, scale 1": {"kind": "lgtm", "mode": "weighted"},
    "weighted, scale 10": {"kind": "lgtm", "mode": "weighted", "influence_scale": 10},
    "meta": {"kind": "lgtm", "mode": "meta"},
}


COST_ROWS, FEW_ROWS = 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["rte", "mrpc", "sst2-sentences"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--validation-rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--pooling", choices=["first", "mean"], help="of the student; by default what a job would take")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "lgtm-search.json")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    end_by_interrupt()
    if gone := [name for name in arguments.data if not (SHARED / name).is_dir()]:
        sys.exit(f"lgtm_search: {', '.join(gone)} not at {SHARED}")
    if arguments.cost:
        arms = {name: (ARMS[name], arguments.student_layers) for name in arguments.arms}
        tell_cost(arms, arguments.data, arguments, dict.fromkeys(arguments.data, arguments.validation_rows))
        return
    names = (
        "rows",
        "validation_rows",
        "epochs",
        "batch_size",
        "student_layers",
        "max_length",
        "learning_rate",
        "pooling",
    )
    record = Record(arguments.out, {name: getattr(arguments, name) for name in names})
    wanted = [
        {"data": name, "method": arm, "seed": seed}
        for seed in range(arguments.seeds)
        for name in arguments.data
        for arm in arguments.arms
    ]
    for run in record.missing(wanted):
        figures = one_run(
            run["data"], ARMS[run["method"]], run["seed"], rows=arguments.rows, epochs=arguments.epochs,
            layers=arguments.student_layers, max_length=arguments.max_length, learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size, validation_rows=arguments.validation_rows, pooling=arguments.pooling,
        )  # fmt: skip
        record.add({**run, **figures})
        print(json.dumps({**run, **figures}), flush=True)
    for name in arguments.data:
        print(f"\n{name}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds")
        print("\n".join(table(HEADINGS, [row(arm, name, record) for arm in arguments.arms])))


HEADINGS = ["arm", "validation macro-F1", "encoder teacher's", "validation loss, last epoch", "CPU-seconds a run"]


def row(arm: str, name: str, record: Record) -> list[str]:
    """The cells of one arm on one data set."""
    runs = [run for run in record.runs if (run["data"], run["method"]) == (name, arm)]
    mean = {key: statistics.mean(run[key] for run in runs) for key in ("loss", "seconds")}
    scores = [
        "–" if any(math.isnan(run[key]) for run in runs) else spread([run[key] for run in runs])
        for key in ("student", "teacher")
    ]
    return [arm, *scores, f"{mean['loss']:.3f}", f"{mean['seconds']:.0f}"]


def tell_cost(arms: dict[str, tuple[dict[str, Any], int]], data: list[str], arguments: Any, scored: dict[str, int]) -> float:  # fmt: skip
    """Print the CPU-seconds that the runs of these arms take, with the rows, epochs and seeds of the arguments; the sum.

    arms: by name, the method's options and the student's layers. scored: by data set, how many rows are looked at after
    an epoch, at most. Measured on one epoch of COST_ROWS rows; scoring is counted as if both models were asked each time.
    """
    total = 0.0
    for name in data:

        def seconds(wish: dict[str, Any], layers: int, validation_rows: int, name: str = name) -> float:
            return one_run(
                name, wish, 0, rows=COST_ROWS, epochs=1, layers=layers, max_length=arguments.max_length,
                learning_rate=arguments.learning_rate, batch_size=arguments.batch_size, validation_rows=validation_rows,
            )["seconds"]  # fmt: skip

        first, more = (seconds({"kind": "prokt"}, 3, rows) for rows in (FEW_ROWS, FEW_ROWS + COST_ROWS))
        a_look = max(0.0, more - first) / COST_ROWS
        print(f"\n{name}, {arguments.rows} rows, {arguments.epochs} epochs; scoring a row: {1000 * a_look:.0f} CPU-ms")
        print("\n".join(table(["arm", "CPU-ms a row and epoch", "CPU-seconds a run"], [])), flush=True)
        for arm, (wish, layers) in arms.items():
            a_row = seconds(wish, layers, FEW_ROWS) / COST_ROWS
            a_run = (arguments.rows * a_row + scored[name] * a_look) * arguments.epochs
            total += a_run * arguments.seeds
            print(f"| {arm} | {1000 * a_row:.0f} | {a_run:.0f} |", flush=True)
    print(f"\nall runs, {arguments.seeds} seeds: {total:,.0f} CPU-seconds", flush=True)
    return total


def method_of(wish: dict[str, Any], teacher: dict[str, Any]) -> Any:
    """The method, with these options of its encoder teacher where it has one."""
    method: Any = TypeAdapter(options.Method).validate_python(wish)
    if isinstance(method, options.TaughtByEncoder):
        method = TypeAdapter(options.Method).validate_python({**wish, "teacher": teacher})
    return method


def one_run(
    name: str, wish: dict[str, Any], seed: int, *, rows: int, epochs: int, layers: int, max_length: int,
    learning_rate: float, batch_size: int, validation_rows: int | None = None,
    pooling: Literal["first", "mean"] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train one arm with one seed; the best macro-F1 of student and teacher on the validation rows, and what it took."""
    encoder: dict[str, Any] = {"max_length": max_length}
    method = method_of(wish, {**encoder, "learning_rate": learning_rate})
    training = options.Training(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    read = {"train": read_split(name, "train", rows), "validation": read_split(name, "validation", validation_rows)}
    names = sorted({entry["label"] for entry in read["train"]})
    source = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)

    def build(layers: int | None) -> Student:
        wish = options.Student(num_layers=layers, pooling=None if layers is None else pooling, **encoder)
        return build_student(wish, names, [], None, source, seed)

    student = build(layers)
    teacher = build(None) if isinstance(method, options.TaughtByEncoder) else None
    assistant = None
    if teacher is not None and isinstance(method, options.TAKD):
        assistant = build(method.layers_between(teacher.model.config.num_hidden_layers, layers))

    texts = {split: [entry["text"] for entry in entries] for split, entries in read.items()}
    pairs = {split: [entry["text_pair"] for entry in entries] if "text_pair" in entries[0] else None for split, entries in read.items()}  # fmt: skip
    gold = {split: np.array([names.index(entry["label"]) for entry in entries]) for split, entries in read.items()}
    tokens = {split: tokenise(student.tokenizer, texts[split], pairs[split]) for split in read}
    joined = {split: [f"{one}\n{other}" for one, other in zip(texts[split], pairs[split] or texts[split], strict=True)] for split in read}  # fmt: skip
    splits = choose(
        near_groups(joined, lambda done: None), np.arange(len(texts["train"])), np.arange(len(texts["validation"])),
        seed=seed, validation_share=0.1, feedback_share=0.1,
    )  # fmt: skip
    labels = torch.nn.functional.one_hot(torch.from_numpy(gold["train"]), len(names)).float()
    pool = Pool(
        tokens["train"], labels, splits.train, splits.barred,
        feedback=HeldOut(tokens["train"], splits.feedback, gold["train"][splits.feedback]),
    )  # fmt: skip
    held_out = HeldOut(tokens["validation"], splits.validation, gold["validation"][splits.validation])
    report = MemoryReporter()
    began = time.process_time()
    run = begin(student, pool, method, training, len(names), teacher, assistant)
    distill(run, pool, held_out, names, method, training, report)
    seconds = time.process_time() - began

    def points(*series: str) -> list[float]:
        return [value for found, _, _, value in report.points if found in series and value is not None]

    return {
        "student": max(points("validation_macro_f1")),
        "teacher": max(points("encoder_teacher_macro_f1", "fine_tuning_macro_f1/teacher"), default=math.nan),
        "loss": points("validation_loss")[-1],
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
