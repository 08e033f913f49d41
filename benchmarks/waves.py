"""What asking in waves saves, and at what quality: LLKD on all rows, and where several settings of the waves would have ended.

    python -m benchmarks.waves [--data emotion yahoo-answers-titles] [--rows 6000] [--wave 500] [--seeds 2]

A job whose waves end at n rows ends as a job that has only these n rows and trains as many epochs, so one training for
each end of a wave tells what every setting would have come to. Everything runs in this process, on the training loop and the
stopping rule of the service; teacher, splits and student are those of benchmarks.cold_start. Prints two tables a data
set: the learning curves, and the settings. A finished training is on record in --out and is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging

from app import options, waves
from app.statistics import paired_bootstrap
from benchmarks.cold_start import STUDENTS, figures, prepare, train
from benchmarks.data import ROOT, present
from benchmarks.record import Record, Run, end_by_interrupt, spread, table
from workers.waves import drifted, gain_at_most

SETTINGS: dict[str, dict[str, Any] | None] = {
    "all at once": None,
    "waves by default": {},
    "`min_gain` 0.01": {"min_gain": 0.01},
    "`min_gain` 0.02": {"min_gain": 0.02},
    "`max_stretch` 1": {"max_stretch": 1},
}
"""What a row of the table changes, beside the rows of the first wave."""
Training = tuple[int, int]
"""On the first so many rows, for so many epochs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=["emotion", "yahoo-answers-titles"])
    parser.add_argument("--student", default="its first layer", choices=list(STUDENTS))
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--wave", type=int, default=500, help="rows of the first wave")
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3, help="of a training on all rows")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "waves.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    end_by_interrupt()
    data = present(arguments.data)
    names = ("student", "rows", "wave", "validation_rows", "epochs")
    record = Record(arguments.out, {name: getattr(arguments, name) for name in names})
    wishes = {
        title: None if changes is None else options.Waves(rows=arguments.wave, **changes)
        for title, changes in SETTINGS.items()
    }
    ends = {title: waves.ends(arguments.rows, wish) for title, wish in wishes.items()}
    plans = {
        title: [(end, waves.stretched(arguments.epochs, end, arguments.rows, wish)) for end in ends[title]]
        for title, wish in wishes.items()
    }
    trainings = list(dict.fromkeys(training for plan in plans.values() for training in plan))
    wanted = [
        {"data": name, "method": "{} rows, {} epochs".format(*training), "seed": seed, "training": list(training)}
        for seed in range(arguments.seeds)
        for name in data
        for training in trainings
    ]
    for run in record.missing(wanted):
        record.add({**run, **one_run(run, arguments, [end for end, _ in trainings])})
    for name in data:
        curves = [
            {tuple(run["training"]): run for run in record.runs if (run["data"], run["seed"]) == (name, seed)}
            for seed in range(arguments.seeds)
        ]
        print(f"\n{name}, student {arguments.student!r}, {arguments.rows} rows, {arguments.epochs} epochs, {arguments.seeds} seeds")  # fmt: skip
        print("\n".join(table(CURVE, [point(training, curves) for training in sorted(trainings)])))
        print("\n".join(table(SAVED, [setting(title, wishes[title], plans, curves) for title in wishes])))


def one_run(run: Run, arguments: argparse.Namespace, starts: list[int]) -> dict[str, Any]:
    """Train one student; what it came to, its answers, and since which of the starts the labels are mixed otherwise."""
    task = prepare(run["data"], arguments.rows, arguments.validation_rows)
    rows, epochs = run["training"]
    first = replace(task, texts=task.texts[:rows], teacher=task.teacher[:rows])
    rate = options.LEARNING_RATES[STUDENTS[arguments.student].model]
    began = time.process_time()
    trained, answers = train(
        first,
        arguments.student,
        {"kind": "llkd"},
        options.Training(epochs=epochs, learning_rate=rate, seed=run["seed"]),
    )
    seconds = time.process_time() - began
    labels = first.teacher.numpy()
    return {
        **figures(task, trained, answers),
        "seconds": seconds,
        "drifted_since": [start for start in starts if start < rows and drifted(labels[:start], labels[start:])],
        "answers": {split: torch.stack([task.held_out[split][1], answers[split]]).tolist() for split in answers},
    }


def trained_until_the_end(
    curve: dict[Training, Run], plan: list[Training], wish: options.Waves | None
) -> list[Training]:
    """What a job with these waves would have trained, one after the other."""
    history: list[dict[str, Any]] = []
    for number, training in enumerate(plan):
        run, start = curve[training], plan[number - 1][0] if number else 0
        gain = gain_at_most(answered(curve[plan[number - 1]]), answered(run)) if number else None
        history.append({
            "rows": training[0], "macro_f1": run["validation_macro_f1"], "gain_at_most": gain,
            "drifted": start in run["drifted_since"],
        })  # fmt: skip
        if wish is not None and waves.reason_to_stop(history, wish) is not None:
            return plan[: number + 1]
    return plan


def answered(run: Run, split: str = "validation") -> NDArray[np.int64]:
    """(3, V) number, true class and answer of each row."""
    known = np.array(run["answers"][split])
    return np.vstack([np.arange(known.shape[1]), known])


CURVE = ["rows asked about", "epochs", "of the rows selected", "validation macro-F1", "test macro-F1", "test accuracy", "CPU-seconds"]  # fmt: skip


def point(training: Training, curves: list[dict[Training, Run]]) -> list[str]:
    """The cells of one training."""
    runs = [curve[training] for curve in curves]
    scores = [spread([run[name] for run in runs]) for name in ("validation_macro_f1", "macro_f1", "accuracy")]
    selected, seconds = (statistics.mean(run[name] for run in runs) for name in ("selected", "seconds"))
    return [f"{training[0]:,}", str(training[1]), f"{selected:,.0f}", *scores, f"{seconds:.0f}"]


SAVED = ["setting", "rows asked about, by seed", "not asked about", "test macro-F1", "… minus all at once, 95 % interval", "training time, of all at once"]  # fmt: skip


def setting(
    title: str, wish: options.Waves | None, plans: dict[str, list[Training]], curves: list[dict[Training, Run]]
) -> list[str]:
    """The cells of one setting."""
    trained = [trained_until_the_end(curve, plans[title], wish) for curve in curves]
    whole = [curve[plans["all at once"][-1]] for curve in curves]
    ended = [curve[trainings[-1]] for curve, trainings in zip(curves, trained, strict=True)]
    gold = answered(whole[0], "test")[1]
    said = [[answered(run, "test")[2] for run in runs] for runs in (whole, ended)]
    difference, low, high = paired_bootstrap(gold, *said)["macro_f1"]
    asked = [trainings[-1][0] for trainings in trained]
    seconds = [sum(curve[each]["seconds"] for each in trainings) for curve, trainings in zip(curves, trained, strict=True)]  # fmt: skip
    return [
        title,
        ", ".join(f"{rows:,}" for rows in asked),
        f"{1 - statistics.mean(asked) / plans['all at once'][-1][0]:.0%}",
        spread([run["macro_f1"] for run in ended]),
        f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{sum(seconds) / sum(run['seconds'] for run in whole):.2f}",
    ]


if __name__ == "__main__":
    main()
