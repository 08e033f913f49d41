"""What a training on a CPU gains where the worker keeps the memory that its steps free (workers/memory.py).

    python -m benchmarks.kept_memory [--rounds 3] [--rows 64]

One epoch of the bundled student on made-up sentences, by a method and with the memory kept or not, each in a process of its own
and in turn; seconds of the processor, pages asked of the kernel and the largest resident set, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

METHODS = {"no_selection": {"kind": "no_selection"}, "kd": {"kind": "kd"}, "lgtm": {"kind": "lgtm"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "KEPT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, kept = arguments.one
        print(json.dumps(one_epoch(method, kept == "kept", arguments.rows)))
        return
    print(f"one epoch of {arguments.rows} rows in batches of 8, one thread, {arguments.rounds} rounds, medians\n")
    print("| method | seconds | seconds, kept | share | pages, thousands | kept | largest MB | kept |")
    print("|---|---|---|---|---|---|---|---|")
    for method in METHODS:
        told: dict[str, list[list[float]]] = {"freed": [], "kept": []}
        for _ in range(arguments.rounds):
            for kept, runs in told.items():
                runs.append(in_a_process(method, kept, arguments.rows))
        (seconds, pages, most), (fewer, kept_pages, kept_most) = (
            [statistics.median(column) for column in zip(*runs, strict=True)] for runs in told.values()
        )
        print(
            f"| {method} | {seconds:.2f} | {fewer:.2f} | {fewer / seconds:.2f} | {pages / 1000:.0f} | {kept_pages / 1000:.0f}"
            f" | {most:.0f} | {kept_most:.0f} |",
            flush=True,
        )


def in_a_process(method: str, kept: str, rows: int) -> list[float]:
    """What `one_epoch` says in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.kept_memory", "--rows", str(rows), "--one", method, kept]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found: list[float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def one_epoch(method: str, kept: bool, rows: int) -> list[float]:
    """Seconds of the processor and pages asked for by the training, and the process's largest resident set in MB."""
    import numpy as np
    import torch
    from pydantic import TypeAdapter

    from app import options, pretrained
    from tests.support import TOPICS, sentences
    from workers import memory
    from workers.reporter import MemoryReporter
    from workers.training.data import tokenise
    from workers.training.distill import distill
    from workers.training.encoders import build_student
    from workers.training.run import HeldOut, Pool, begin

    torch.set_num_threads(1)
    if kept:
        memory.keep_freed()
    names = list(TOPICS)
    made = sentences(rows + 48, 1)
    labels = np.array([names.index(row["label"]) for row in made])
    source = pretrained.resolve(options.DEFAULT_STUDENT, purpose="student", roots=[], allow_hub=False)
    wish = TypeAdapter(options.Method).validate_python(METHODS[method])
    student = build_student(options.Student(num_layers=3), names, [], None, source, 0)
    teacher = build_student(options.Student(), names, [], None, source, 0) if method != "no_selection" else None
    tokens = tokenise(student.tokenizer, [row["text"] for row in made])
    train, feedback, validation = (np.arange(*ends) for ends in ((0, rows), (rows, rows + 32), (rows + 32, rows + 48)))
    soft = torch.nn.functional.one_hot(torch.from_numpy(labels), len(names)).float()
    pool = Pool(tokens, soft, train, np.zeros(len(made), bool), feedback=HeldOut(tokens, feedback, labels[feedback]))
    training = options.Training(epochs=1, batch_size=8, learning_rate=2e-4)
    run = begin(student, pool, wish, training, len(names), teacher, None)

    def pages() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    asked, began = pages(), time.process_time()
    distill(run, pool, HeldOut(tokens, validation, labels[validation]), names, wish, training, MemoryReporter())
    seconds, asked = time.process_time() - began, pages() - asked
    return [seconds, float(asked), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]


if __name__ == "__main__":
    main()
