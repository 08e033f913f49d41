"""Which mode, scale and schedule of LGTM make the student better, on validation data only: no test set is read.

    python -m benchmarks.lgtm_search [--data rte mrpc sst2-sentences] [--rows 1500] [--epochs 4] [--seeds 3] [--student-layers 3]

The encoder teacher is the bundled encoder with its 6 layers, the student its first 3; both learn from the true labels. Each
row of the table is the best macro-F1 over the epochs, on validation rows that give no feedback, mean ± sd over the seeds;
all arms of a seed have the same rows for training, feedback and validation, ProKT too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from app import options, pretrained
from benchmarks.data import SHARED, read_split
from workers.reporter import MemoryReporter
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import build_student
from workers.training.run import HeldOut, Pool, begin
from workers.training.splits import choose, near_groups

ARMS: dict[str, dict[str, Any]] = {
    "prokt": {"kind": "prokt"},
    "official, scale 1": {"kind": "lgtm"},
    "official, scale 100": {"kind": "lgtm", "influence_scale": 100},
    "official, scale 1000": {"kind": "lgtm", "influence_scale": 1000},
    "official, scale 1000, every 4": {"kind": "lgtm", "influence_scale": 1000, "influence_every": 4},
    "weighted, scale 0.1": {"kind": "lgtm", "mode": "weighted", "influence_scale": 0.1},
    "weighted, scale 1": {"kind": "lgtm", "mode": "weighted"},
    "weighted, scale 10": {"kind": "lgtm", "mode": "weighted", "influence_scale": 10},
    "meta": {"kind": "lgtm", "mode": "meta"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["rte", "mrpc", "sst2-sentences"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--student-layers", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.data:
        if not (SHARED / name).is_dir():
            print(f"lgtm_search: {name} is left out, it is not at {SHARED}")
            continue
        print(f"\n{name}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds\n")
        print("| arm | validation macro-F1 | encoder teacher's | validation loss, last epoch | seconds a run |")
        print("|---|---|---|---|---|")
        for arm in arguments.arms:
            runs = [one_run(name, ARMS[arm], seed, arguments) for seed in range(arguments.seeds)]
            cells = [spread([100 * run[key] for run in runs]) for key in ("student", "teacher")]
            loss = statistics.mean(run["loss"] for run in runs)
            seconds = statistics.mean(run["seconds"] for run in runs)
            print(f"| {arm} | {cells[0]} | {cells[1]} | {loss:.3f} | {seconds:.0f} |", flush=True)


def spread(values: list[float]) -> str:
    """Mean ± sd."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def one_run(name: str, wish: dict[str, Any], seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one arm with one seed; the best macro-F1 of student and teacher on the validation rows, and what it took."""
    encoder = {"max_length": arguments.max_length}
    wish = {**wish, "teacher": {**encoder, "learning_rate": arguments.learning_rate}}
    method = TypeAdapter(options.Method).validate_python(wish)
    training = options.Training(epochs=arguments.epochs, learning_rate=arguments.learning_rate, seed=seed)
    rows = {"train": read_split(name, "train", arguments.rows), "validation": read_split(name, "validation")}
    names = sorted({row["label"] for row in rows["train"]})
    source = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)
    student = build_student(
        options.Student(num_layers=arguments.student_layers, **encoder), names, [], None, source, seed
    )
    teacher = build_student(options.EncoderTeacher(**encoder), names, [], None, source, seed)

    texts = {split: [row["text"] for row in entries] for split, entries in rows.items()}
    pairs = {split: [row["text_pair"] for row in entries] if "text_pair" in entries[0] else None for split, entries in rows.items()}  # fmt: skip
    gold = {split: np.array([names.index(row["label"]) for row in entries]) for split, entries in rows.items()}
    tokens = {split: tokenise(student.tokenizer, texts[split], pairs[split]) for split in rows}
    joined = {split: [f"{one}\n{other}" for one, other in zip(texts[split], pairs[split] or texts[split], strict=True)] for split in rows}  # fmt: skip
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
    began = time.perf_counter()
    run = begin(student, pool, method, training, len(names), teacher)
    distill(run, pool, held_out, names, method, training, report)
    found = {key: [value for found, _, _, value in report.points if found == key and value is not None] for key in ("validation_macro_f1", "encoder_teacher_macro_f1", "validation_loss")}  # fmt: skip
    return {
        "student": max(found["validation_macro_f1"]),
        "teacher": max(found["encoder_teacher_macro_f1"]),
        "loss": found["validation_loss"][-1],
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    main()
