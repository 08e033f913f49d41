"""How the rate of labeling grows with the workers, and what a worker that is killed costs.

    python -m benchmarks.labeling_workers [--rows 480] [--rounds 2] [--teacher endpoint|causal_lm] [--latency 0.1] [--concurrency 4]

Real worker processes label jobs of fresh rows, one, two and three of them in turn, on their own PostgreSQL. `endpoint`: a
server that takes --latency seconds for each answer, asked for --concurrency rows at a time by each worker, so that the
machine's cores hardly matter. `causal_lm`: a small LLaMA with random weights, one thread for each worker, so that they do.
Then two begin, a third joins at a third of the rows, and at two thirds one is killed; with `endpoint` the server's own count
tells which texts were asked about twice. The gate before the first rows is off, and shards have 16 rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from app.embedded import Embedded
from tests.openai_server import ALTERNATIVES, World, serving

WORKERS = (1, 2, 3)
LEASE_SECONDS = 3.0
SHARD_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--teacher", choices=["endpoint", "causal_lm"], default="endpoint")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds until the server answers")
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time, of each worker")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="understudy-workers-") as place, serving(World(ALTERNATIVES)) as world:
        directory = Path(place)
        world.answer_seconds = arguments.latency
        if arguments.teacher == "causal_lm":
            from benchmarks.labeling import save_model

            save_model(directory / "models" / "llama", layers=4, width=256)
        with Embedded(directory / "services", durable=False) as parts:
            os.environ.update({
                "UNDERSTUDY_DATABASE_URL": parts.database_url, "UNDERSTUDY_REDIS_URL": parts.redis_url,
                "UNDERSTUDY_STORAGE_URL": f"file://{directory}/storage", "UNDERSTUDY_SHARD_ROWS": str(SHARD_ROWS),
                "UNDERSTUDY_LEASE_SECONDS": str(LEASE_SECONDS), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
                "UNDERSTUDY_MODEL_ROOTS": json.dumps([str(directory / "models")]),
                "UNDERSTUDY_ENDPOINTS": json.dumps({
                    "slow": {"base_url": world.url, "model": "slow", "concurrency": arguments.concurrency}
                }),
            })  # fmt: skip
            compare(arguments, world)


def compare(arguments: argparse.Namespace, world: World) -> None:
    """Print both tables."""
    from app import migrate

    migrate.upgrade()
    rates: dict[int, list[float]] = {count: [] for count in WORKERS}
    with workers(max(WORKERS)) as crew:
        seeds = iter(range(1000))
        label(crew, submit(64, arguments.teacher, next(seeds)))  # every worker loads its teacher
        for _ in range(arguments.rounds):
            for count in WORKERS:
                job_id = submit(arguments.rows, arguments.teacher, next(seeds))
                seconds = label(crew[:count], job_id)
                rates[count].append(arguments.rows / seconds)
        one = statistics.median(rates[1])
        kind = (
            f"{arguments.latency:g} s an answer, {arguments.concurrency} at a time"
            if arguments.teacher == "endpoint"
            else "a small LLaMA"
        )
        print(f"{arguments.teacher} ({kind}), {arguments.rows} rows, medians of {arguments.rounds} rounds\n")
        print("| workers | rows/s | times one worker |")
        print("|---|---|---|")
        for count, each in rates.items():
            rate = statistics.median(each)
            print(f"| {count} | {rate:.1f} | {rate / one:.2f} |", flush=True)
        del world.requests[:]
        job_id = submit(arguments.rows, arguments.teacher, next(seeds))
        seconds = label(crew, job_id, harm=True)
        print(
            f"\nTwo workers, a third from a third of the rows on, one of them killed at two thirds: {arguments.rows} rows in "
            f"{seconds:.1f} s, of which a lost worker's rows are waited for up to {LEASE_SECONDS:g} s."
        )
        if arguments.teacher == "endpoint":
            asked = Counter(world.asked())
            again = sum(times - 1 for times in asked.values())
            print(
                f"The server was asked about {len(asked)} texts, and about {again} of them again: those that the killed "
                "worker had asked about and whose answers nobody was left to keep."
            )


class Worker:
    """A process that labels the jobs it is told."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=work, args=(theirs, name), daemon=True)
        self.process.start()

    def begin(self, job_id: str) -> None:
        """Label this job until it is labeled."""
        self.pipe.send(job_id)

    def wait(self) -> None:
        """Until it has labeled the job it was told."""
        self.pipe.recv()


def work(pipe: Connection, name: str) -> None:
    """What a worker process does."""
    import torch

    from workers.labeling import label_job

    torch.set_num_threads(1)
    while True:
        job_id = pipe.recv()
        while is_being_labeled(job_id):
            if label_job(job_id, name, threading.Event()) == 0:
                time.sleep(0.05)
        pipe.send("done")


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """That many worker processes."""
    crew = [Worker(f"worker-{number}") for number in range(count)]
    try:
        yield crew
    finally:
        for worker in crew:
            worker.process.kill()


def label(crew: list[Worker], job_id: str, *, harm: bool = False) -> float:
    """Seconds until the job is labeled; with `harm` the last worker joins late and the first is killed on the way."""
    began = time.perf_counter()
    for worker in crew[:-1] if harm else crew:
        worker.begin(job_id)
    if harm:
        total = rows_done(job_id)[1]
        wait(lambda: rows_done(job_id)[0] >= total / 3)
        crew[-1].begin(job_id)
        wait(lambda: rows_done(job_id)[0] >= 2 * total / 3)
        crew[0].process.kill()
    wait(lambda: not is_being_labeled(job_id))
    seconds = time.perf_counter() - began
    for worker in crew[1:] if harm else crew:
        worker.wait()
    return seconds


def wait(claim: Callable[[], bool]) -> None:
    """Until it is true."""
    while not claim():
        time.sleep(0.05)


def submit(rows: int, teacher: str, seed: int) -> str:
    """A job on rows that no other job has; its id."""
    from tests.support import TOPICS, add_dataset, sentences, tiny_spec
    from tests.support import submit as store

    teachers: dict[str, dict[str, Any]] = {
        "endpoint": {"kind": "endpoint", "endpoint": "slow"},
        "causal_lm": {"kind": "causal_lm", "model": "llama"},
    }
    dataset = add_dataset(sentences(rows, seed, labeled=False))
    wish = tiny_spec(dataset, labels=TOPICS, teacher=teachers[teacher], labeling={"smoke_gate": False})
    return store(wish)


def is_being_labeled(job_id: str) -> bool:
    """Whether rows of it are open. Raises RuntimeError when it failed."""
    from app.db import session_scope
    from app.models import Job

    with session_scope() as session:
        job = session.get_one(Job, job_id)
        if job.error is not None:
            raise RuntimeError(job.error["message"])
        return job.phase != "training"


def rows_done(job_id: str) -> tuple[int, int]:
    """Rows labeled, and rows in all; shards that are done count."""
    from app.db import session_scope
    from app.models import JobPhase

    with session_scope() as session:
        phase = session.get_one(JobPhase, (job_id, "labeling"))
        return phase.done, phase.total


if __name__ == "__main__":
    main()
