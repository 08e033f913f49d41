"""What the parts of the service take: memory of each process, and bytes on disk and in the database for each row.

    python -m benchmarks.sizing [--rows 1000]

starts the whole service, runs one job with the bundled teacher and the bundled student, and weighs what is there. Memory is
the resident set; PostgreSQL's processes share some of theirs, so theirs is the proportional one, where the system tells it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import text

from app.supervisor import Child
from tests.faults import service as faults
from tests.faults.service import Service
from tests.support import TOPICS, sentences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    rows = parser.parse_args().rows
    faults.FAST["UNDERSTUDY_RESUME_EVERY_SECONDS"] = "10"
    directory = Path(tempfile.mkdtemp(prefix="understudy-sizing-"))
    try:
        with Service(directory, workers=1) as service:
            weigh(service, rows)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def weigh(service: Service, rows: int) -> None:
    """Run the job and print the tables."""
    idle = {name: memory(child) for name, child in parts(service).items()}
    unlabeled = [{"text": row["text"]} for row in sentences(rows, 1)]
    spec = {
        "dataset_id": service.upload(unlabeled), "labels": [{"name": name} for name in TOPICS],
        "teacher": {"kind": "embedding"}, "method": {"kind": "no_selection"},
        "student": {"max_length": 32}, "training": {"epochs": 1, "batch_size": 32},
    }  # fmt: skip
    most, ended = dict(idle), threading.Event()
    state = 0

    def watch() -> None:
        nonlocal state
        while not ended.wait(0.2):
            for name, child in parts(service).items():
                most[name] = max(most[name], memory(child))
            state = max(state, sum(size(path) for path in root.glob("jobs/*/resume/*")))

    root = Path(service.storage.root)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job = service.wait(service.submit(spec, "sizing"), 600)
    finally:
        ended.set()
        watcher.join()
    assert job["status"] == "succeeded", job["error"]
    print(
        f"one job: {rows} rows of {sum(len(row['text']) for row in unlabeled) / rows:.0f} characters, bundled teacher and student\n"
    )
    print("| process | idle, MB | at most, MB |\n|---|---|---|")
    for name in idle:
        print(f"| {name} | {idle[name] / 1e6:.0f} | {most[name] / 1e6:.0f} |")
    print("\n| on disk, bytes a row | |\n|---|---|")
    for name, pattern in {
        "dataset": "datasets/*/*", "labels": "labels/*/*", "ledger": "jobs/*/samples.parquet", "label report": "jobs/*/label_report.json",
    }.items():  # fmt: skip
        print(f"| {name} | {sum(size(path) for path in root.glob(pattern)) / rows:.0f} |")
    print(f"| label cache, in PostgreSQL | {relation(service, 'label_cache') / rows:.0f} |")
    print("\n| on disk, MB a job | |\n|---|---|")
    print(f"| checkpoint | {sum(size(path) for path in root.glob('checkpoints/*')) / 1e6:.1f} |")
    print(f"| saved state, while it trains | {state / 1e6:.1f} |" if state else "| saved state | none was saved |")
    tables = ("jobs", "job_events", "job_metrics", "job_phases", "label_sets", "label_shards", "checkpoints")
    print(f"| its rows in PostgreSQL | {sum(relation(service, name) for name in tables) / 1e6:.2f} |")


def parts(service: Service) -> dict[str, Child]:
    return {
        "API": service.api, "scheduler": service.scheduler, "worker": service.workers[0], "PostgreSQL": service.postgres,
        "Redis": service.redis,
    }  # fmt: skip


def memory(child: Child) -> int:
    """Bytes of the process with its children."""
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    if len(family) == 1:
        return int(family[0].memory_info().rss)
    return sum(proportional(process) for process in family)


def proportional(process: psutil.Process) -> int:
    try:
        found: Any = process.memory_full_info()
        return int(getattr(found, "pss", 0) or found.rss)
    except psutil.NoSuchProcess:
        return 0


def size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def relation(service: Service, name: str) -> int:
    """Bytes of a table with its indexes."""
    with service.session() as session:
        return int(session.scalar(text("SELECT pg_total_relation_size(:name)"), {"name": name}) or 0)


if __name__ == "__main__":
    main()
