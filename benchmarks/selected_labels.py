"""How right the pseudo-labels are that each method trains on, from the ledgers of the jobs of benchmarks.results.

    python -m benchmarks.selected_labels [--data-dir build/results] [--shots 32]

Starts `understudy up` on the data directory that benchmarks.results has filled, and reads the ledger of each of its jobs
through the HTTP API. Prints, for each data set and method, the share of rows whose pseudo-label is the true one: of all rows
the teacher labeled, and of the rows trained on, each counted as often as it was. The true labels are those of the data
sets, which the service never sees.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from app.client import Client
from benchmarks.data import ROOT, SHARED, few_shot, read_split
from benchmarks.record import serving, spread, table
from benchmarks.results import DATA_SETS, METHODS

Shares = tuple[float, float]
"""Of all labeled rows and of those trained on: the share with the right label."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "build" / "results")
    parser.add_argument("--shots", type=int, default=32, help="the same as those of benchmarks.results")
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"selected_labels: the data sets are not at {SHARED}")
    if not (arguments.data_dir / "api-key").is_file():
        sys.exit(f"selected_labels: {arguments.data_dir} holds no jobs; run benchmarks.results first")
    with serving(arguments.data_dir, 1) as client:
        rows = [
            [name, method, epochs, *spreads(shares)]
            for name in DATA_SETS
            for (method, epochs), shares in found(client, name, arguments.shots).items()
        ]
    print("\n".join(table(["data", "method", "epochs", "all rows, %", "rows trained on, %"], rows)))


def found(client: Client, name: str, shots: int) -> dict[tuple[str, str], list[Shares]]:
    """The shares of every job on a data set, by method and epochs, in the order of the results' table."""
    gold = [row["label"] for row in few_shot(read_split(name, "train"), shots)[1]]
    shares: dict[tuple[str, str], list[Shares]] = {}
    for job in client.jobs(**{"metadata[results]": name}):
        if job["status"] == "succeeded":
            key = (job["metadata"]["method"], str(job["spec"]["training"]["epochs"]))
            shares.setdefault(key, []).append(right(client, job["id"], gold))
    return dict(sorted(shares.items(), key=lambda entry: (list(METHODS).index(entry[0][0]), int(entry[0][1]))))


def right(client: Client, job_id: str, gold: list[str]) -> Shares:
    """The two shares of one job; the rows of its train set are the first of those whose labels `gold` holds."""
    lines = [line for line in client.samples(job_id) if line["label"] is not None]
    is_right = np.array([line["label"] == gold[line["row"]] for line in lines])
    return float(is_right.mean()), float(np.average(is_right, weights=[line["selected"] for line in lines]))


def spreads(shares: list[Shares]) -> list[str]:
    """Mean and deviation of each share over the seeds, in per cent."""
    return [spread(list(values)) for values in zip(*shares, strict=True)]


if __name__ == "__main__":
    main()
