"""What asking in waves saves, and at what quality: LLKD on all rows, and where several settings of the waves would have ended.

    python -m benchmarks.waves [--data emotion yahoo-answers-titles] [--rows 1500] [--wave 300] [--seeds 2]

A job whose waves end at n rows ends as a job that has only these n rows, so one training for each number of rows at which
a wave can end tells what every setting would have come to. Everything runs in this process, on the training loop and the
stopping rule of the service; teacher, splits and student are those of benchmarks.cold_start. Prints two tables a data
set: the learning curve, and the settings. A finished training is a line of --log and is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from app import options, waves
from benchmarks.cold_start import STUDENTS, Task, prepare, run, spread
from benchmarks.data import ROOT, SHARED
from workers.waves import drifted

SETTINGS: dict[str, dict[str, Any] | None] = {
    "all at once": None,
    "waves by default": {},
    "`patience` 2": {"patience": 2},
    "`min_gain` 0.02": {"min_gain": 0.02},
    "`growth` 1": {"growth": 1},
    "`growth` 1, `patience` 2": {"growth": 1, "patience": 2},
}
"""What a row of the table changes, beside the rows of the first wave."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=["emotion", "yahoo-answers-titles"])
    parser.add_argument("--student", default="its first 3 layers", choices=list(STUDENTS))
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--wave", type=int, default=300, help="rows of the first wave")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "waves.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    arguments.log.touch()
    for name in arguments.data:
        if (SHARED / name).is_dir():
            report(name, arguments)
        else:
            print(f"waves: skipped, the data set {name} is not at {SHARED}")


def report(name: str, arguments: argparse.Namespace) -> None:
    """Train what the log lacks, then print the tables of one data set."""
    wishes = {
        title: None if changes is None else options.Waves(rows=arguments.wave, **changes)
        for title, changes in SETTINGS.items()
    }
    sizes = sorted({end for wish in wishes.values() for end in waves.ends(arguments.rows, wish)})
    curves = learn(name, sizes, arguments)
    print(
        f"\n{name}, student {arguments.student!r}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds"
    )
    print(
        "\n| rows asked about | of them selected | validation macro-F1 | test macro-F1 | test accuracy |\n|---|---|---|---|---|"
    )
    for size in sizes:
        group = [curve[size] for curve in curves]
        figures = [spread(group, column) for column in ("selected", "validation_macro_f1", "macro_f1", "accuracy")]
        print(f"| {size} | {' | '.join(figures)} |")
    print(
        "\n| setting | rows asked about, by seed | not asked about | test macro-F1 | … minus all at once | rows × epochs of training, of all at once |\n|---|---|---|---|---|---|"
    )
    for title, wish in wishes.items():
        trained = [sizes_until_the_end(curve, waves.ends(arguments.rows, wish), wish) for curve in curves]
        ended = [curve[sizes[-1]] for curve, sizes in zip(curves, trained, strict=True)]
        lost = [
            {"loss": end["macro_f1"] - curve[arguments.rows]["macro_f1"]}
            for curve, end in zip(curves, ended, strict=True)
        ]
        saved = 1 - statistics.mean(sizes[-1] for sizes in trained) / arguments.rows
        effort = statistics.mean(sum(sizes) for sizes in trained) / arguments.rows
        asked = ", ".join(str(sizes[-1]) for sizes in trained)
        print(
            f"| {title} | {asked} | {saved:.0%} | {spread(ended, 'macro_f1')} | {spread(lost, 'loss')} | {effort:.2f} |"
        )


def sizes_until_the_end(curve: dict[int, dict[str, Any]], ends: list[int], wish: options.Waves | None) -> list[int]:
    """The numbers of rows a job with these waves would have trained on, one after the other."""
    history: list[dict[str, Any]] = []
    for number, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
        shown = curve[end]
        score, is_drifted = shown["validation_macro_f1"] / 100, shown["drifted_since"].get(str(start), False)
        history.append({"rows": end, "selected": shown["selected"], "macro_f1": score, "drifted": is_drifted})
        if wish is not None and waves.reason_to_stop(history, wish) is not None:
            return ends[:number]
    return ends


def learn(name: str, sizes: list[int], arguments: argparse.Namespace) -> list[dict[int, dict[str, Any]]]:
    """By seed and number of rows: what a training on the first so many rows came to."""
    lines = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    task: Task | None = None
    curves: list[dict[int, dict[str, Any]]] = []
    for seed in range(arguments.seeds):
        curves.append({})
        for size in sizes:
            wanted = {
                "data": name, "student": arguments.student, "rows": size, "epochs": arguments.epochs, "seed": seed,
                "precision": "fp32", "method": {"kind": "llkd"},
            }  # fmt: skip
            found = next((line for line in lines if wanted.items() <= line.items()), None)
            if found is None:
                task = task or prepare(name, arguments.rows)
                first = replace(task, texts=task.texts[:size], teacher=task.teacher[:size])
                labels = first.teacher.numpy()
                apart = {str(start): drifted(labels[:start], labels[start:]) for start in sizes if start < size}
                found = wanted | run(first, wanted) | {"drifted_since": apart}
                with arguments.log.open("a") as log:
                    log.write(json.dumps(found) + "\n")
            curves[-1][size] = found
    return curves


if __name__ == "__main__":
    main()
