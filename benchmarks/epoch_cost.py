"""Wall time of LLKD against the same student trained on every row by transformers.Trainer, side by side.

    python -m benchmarks.epoch_cost [--rows 2000] [--rounds 3]

Both train the bundled student for one epoch on the same rows, with the same batch size, in the same process and in turn;
medians over the rounds. LLKD's time includes the passes without gradients that choose the rows. Its share of selected
rows is what the rule selects once its warm-up is over: the student first trains on the rows, outside the clock.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from app import options, pretrained
from benchmarks.data import SHARED, few_shot, read_split
from workers.reporter import MemoryReporter
from workers.teachers import TEACHERS
from workers.teachers.teacher import Row
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import Student, build_student
from workers.training.run import HeldOut, Pool, begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="emotion", help="a shared data set")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if not (SHARED / arguments.data).is_dir():
        print(f"epoch_cost: skipped, the data set {arguments.data} is not at {SHARED}")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    examples, rest = few_shot(read_split(arguments.data, "train", arguments.rows + 1000), 16)
    rows = rest[: arguments.rows]
    names = sorted({row["label"] for row in examples})
    labels = [options.Label(name=name) for name in names]
    bundled = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)
    teacher_options = options.EmbeddingTeacher(
        kind="embedding", examples=[options.Example(text=row["text"], label=row["label"]) for row in examples]
    )
    teacher = TEACHERS["embedding"](teacher_options, labels, bundled)
    probabilities = torch.from_numpy(teacher.label([Row(row["text"]) for row in rows]).probabilities)
    student = build_student(options.Student(), names, [], None, bundled, seed=0)
    tokens = tokenise(student.tokenizer, [row["text"] for row in rows])
    everything = np.arange(len(rows))
    pool = Pool(tokens, probabilities, everything, np.zeros(len(rows), bool))
    held_out = HeldOut(tokens, everything[:8], probabilities[:8].argmax(dim=1).numpy())

    warm = one_epoch(copy.deepcopy(student), pool, held_out, names, options.NoSelection(kind="no_selection"))[1]
    times: dict[str, list[float]] = {"LLKD": [], "no_selection, our loop": [], "transformers.Trainer": []}
    ratio = 0.0
    settled = options.LLKD(kind="llkd", warm_up="none")
    for _ in range(arguments.rounds):
        seconds, _, ratio = one_epoch(copy.deepcopy(warm), pool, held_out, names, settled)
        times["LLKD"].append(seconds)
        seconds, _, _ = one_epoch(copy.deepcopy(warm), pool, held_out, names, options.NoSelection(kind="no_selection"))
        times["no_selection, our loop"].append(seconds)
        times["transformers.Trainer"].append(trainer_epoch(copy.deepcopy(warm), tokens, probabilities))

    base = statistics.median(times["transformers.Trainer"])
    print(
        f"{arguments.data}, {len(rows)} rows, batch 32, {arguments.threads} thread(s), {arguments.rounds} rounds, medians"
    )
    print(f"LLKD selected {ratio:.1%} of the rows\n")
    print("| one epoch | seconds | ratio to transformers.Trainer |")
    print("|---|---|---|")
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"| {name} | {median:.2f} | {median / base:.2f} |")


def one_epoch(
    student: Student, pool: Pool, held_out: HeldOut, names: list[str], method: options.Method
) -> tuple[float, Student, float]:
    """Seconds of one epoch of our loop, the student, and the share of rows it was trained on."""
    training = options.Training(epochs=1, batch_size=32, learning_rate=5e-5)
    run = begin(student, pool, method, training, len(names))
    began = time.perf_counter()
    distill(run, pool, held_out, names, method, training, MemoryReporter())
    return time.perf_counter() - began, student, run.progress.selection()["ratio"]


def trainer_epoch(student: Student, tokens: Any, probabilities: torch.Tensor) -> float:
    """Seconds of one epoch of transformers.Trainer on every row with its pseudo-label; it pads to the longest of a batch."""
    pseudo_labels = probabilities.argmax(dim=1)
    dataset = [
        {"input_ids": tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]], "labels": int(pseudo_labels[row])}
        for row in range(len(tokens))
    ]

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padded = student.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
        return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}

    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=5e-5, weight_decay=0.01,
            warmup_steps=0.06, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model=student.model, args=arguments, train_dataset=dataset, data_collator=collate)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
