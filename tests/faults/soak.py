"""Jobs under a rain of faults: kills at random moments, parts lost, the network cut; then the audit.

    python -m tests.faults.soak [--kills 50] [--seconds 900] [--seed 1]

prints a table of what was done, what became of the jobs, and what the auditor found; exit status 1 when it found anything.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.supervisor import Child
from tests.faults.auditor import Findings, audit
from tests.faults.service import LEASE_SECONDS, Service
from tests.support import sentences

MOST_IN_FLIGHT = 3
DRAIN_SECONDS = 240.0
"""How long the jobs may take to end after the last fault."""


class Rain:
    """Faults by a seed. Each is one thing done to the service, with what mends it where nothing does by itself."""

    def __init__(self, service: Service, luck: random.Random, say: Callable[[str], None]) -> None:
        self.service, self.luck, self.say = service, luck, say
        self.kills = 0
        self.done: Counter[str] = Counter()
        self.faults: list[tuple[int, str, Callable[[], None]]] = [
            (12, "worker killed", self.kill_worker),
            (3, "API killed", lambda: self.kill(service.api)),
            (3, "scheduler killed", lambda: self.kill(service.scheduler)),
            (4, "Redis killed with all it held", lambda: self.kill(service.redis)),
            (2, "Redis emptied", lambda: service.broker.flushall()),
            (4, "PostgreSQL stopped at once and started again", self.kill_postgres),
            (2, "worker stopped past its lease, then let go on", self.freeze_worker),
            (2, "connections to PostgreSQL reset", lambda: service.database_network.reset()),
            (2, "connections to Redis reset", lambda: service.broker_network.reset()),
            (1, "network to PostgreSQL stalled past the lease", lambda: self.stall(service.database_network)),
            (1, "network to Redis stalled", lambda: self.stall(service.broker_network)),
            (1, "network to PostgreSQL slow", self.slow_network),
        ]

    def one(self) -> None:
        """One fault."""
        weights = [weight for weight, _, _ in self.faults]
        _, name, fault = self.luck.choices(self.faults, weights)[0]
        self.say(name)
        self.done[name] += 1
        fault()

    def kill(self, child: Child) -> None:
        self.kills += 1
        child.kill()
        time.sleep(self.luck.uniform(0, 1.5))
        self.service.start(child)

    def kill_worker(self) -> None:
        self.kill(self.luck.choice(self.service.workers))

    def kill_postgres(self) -> None:
        self.kills += 1
        self.service.kill_postgres(self.luck.choice([signal.SIGQUIT, signal.SIGKILL]))
        time.sleep(self.luck.uniform(0, 1.5))
        self.service.start(self.service.postgres)

    def freeze_worker(self) -> None:
        worker = self.luck.choice(self.service.workers)
        if worker.is_running and worker.pid is not None:
            os.kill(worker.pid, signal.SIGSTOP)
            time.sleep(LEASE_SECONDS + self.luck.uniform(0.5, 2))
            os.kill(worker.pid, signal.SIGCONT)

    def stall(self, network: Any) -> None:
        network.stall()
        time.sleep(LEASE_SECONDS + self.luck.uniform(0.5, 2))
        network.flow()
        if self.luck.random() < 0.5:
            network.reset()

    def slow_network(self) -> None:
        self.service.database_network.delay = 0.05
        time.sleep(2)
        self.service.database_network.delay = 0.0


class Work:
    """Jobs for the service, kept coming; the same few specs again and again, so that their results can be compared."""

    def __init__(self, service: Service, luck: random.Random, epochs: int) -> None:
        self.service, self.luck = service, luck
        self.jobs: list[str] = []
        self.open: set[str] = set()
        self.verbs: Counter[str] = Counter()
        validation, test = (service.upload(sentences(18, seed)) for seed in (902, 903))
        train = service.upload(unsure(96, 901))
        common = {
            "dataset_id": train, "validation_dataset_id": validation, "test_dataset_id": test,
            "teacher": {"kind": "dataset"},
            "student": {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24, "dropout": 0.1},
        }  # fmt: skip
        training = {"epochs": epochs, "batch_size": 8, "learning_rate": 2e-3}
        self.specs = [
            {**common, "method": {"kind": "llkd", "weighted": True}, "training": training},
            {**common, "method": {"kind": "softmatch"}, "training": {**training, "seed": 1}},
            {**common, "method": {"kind": "random", "ratio": 0.5}, "training": training},
        ]
        self.count = 0

    def embedding_spec(self) -> dict[str, Any]:
        """A job whose teacher is asked, and paid, for every row: its rows are its own."""
        self.count += 1
        rows = self.service.upload(sentences(64, 10_000 + self.count, labeled=False))
        return {
            **self.specs[2], "dataset_id": rows, "labels": [{"name": name} for name in ("cooking", "sports", "weather")],
            "teacher": {"kind": "embedding"},
        }  # fmt: skip

    def submit_one(self) -> None:
        spec = self.luck.choice([*self.specs, None]) or self.embedding_spec()
        job_id = self.service.submit(spec, f"soak-{len(self.jobs)}")
        self.jobs.append(job_id)
        self.open.add(job_id)

    def tend(self) -> None:
        """Keep some jobs in flight, and now and then let an owner interfere."""
        self.open = {job_id for job_id in self.open if not self.service.job(job_id)["is_terminal"]}
        while len(self.open) < MOST_IN_FLIGHT:
            self.submit_one()
        if self.luck.random() < 0.2:
            job_id = self.luck.choice(sorted(self.open))
            verb = self.luck.choice(["pause", "pause", "pause", "cancel"])
            answer = self.service.call("POST", f"/jobs/{job_id}/{verb}")
            assert answer.status_code in (202, 409), answer.text
            if answer.status_code == 202:
                self.verbs[verb] += 1
        self.resume_the_paused()

    def resume_the_paused(self) -> None:
        """No owner forgets a paused job here."""
        for job_id in sorted(self.open):
            if self.service.job(job_id)["status"] == "paused":
                self.service.call("POST", f"/jobs/{job_id}/resume")
                self.verbs["resume"] += 1

    def drain(self) -> None:
        """Wait until every job has ended, or DRAIN_SECONDS are over: what is left is the auditor's to report."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.open and time.monotonic() < deadline:
            self.resume_the_paused()
            self.open = {job_id for job_id in self.open if not self.service.job(job_id)["is_terminal"]}
            time.sleep(0.3)


def unsure(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a confidence each, so that a rule has something to choose by."""
    return [
        row | {"confidence": 0.4 + 0.55 * ((7 * number) % 11) / 10} for number, row in enumerate(sentences(count, seed))
    ]


def soak(
    service: Service,
    *,
    kills: int,
    seconds: float,
    seed: int,
    epochs: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Findings, Rain, Work]:
    """Let it rain until there were `kills` kills or `seconds` are over, wait for the jobs, and audit."""
    luck = random.Random(seed)
    work, rain = Work(service, luck, epochs), Rain(service, luck, say)
    for spec in work.specs:  # undisturbed: what the others are compared with
        service.wait(service.submit(spec, f"first-{spec['method']['kind']}"), 180)
    deadline = time.monotonic() + seconds
    while rain.kills < kills and time.monotonic() < deadline:
        work.tend()
        time.sleep(luck.uniform(0.2, 2.0))
        rain.one()
    work.drain()
    with service.session() as session:
        return audit(session, service.storage), rain, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--seconds", type=float, default=600, help="when to stop whether or not there were so many kills"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--keep", action="store_true", help="leave the directory with logs and files")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="understudy-soak-"))
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    try:
        with Service(directory) as service:
            found, rain, work = soak(
                service, kills=arguments.kills, seconds=arguments.seconds, seed=arguments.seed, epochs=arguments.epochs,
                say=say,
            )  # fmt: skip
            lost = sum(f"{job_id} is " in line for job_id in work.jobs for line in found.wrong)
            print(f"\n| soak, seed {arguments.seed}, {time.monotonic() - began:.0f} s | |\n|---|---|")
            for name, count in sorted(rain.done.items()):
                print(f"| {name} | {count} |")
            print(f"| processes killed | {rain.kills} |")
            for status, count in sorted(found.jobs.items()):
                print(f"| jobs {status} | {count} |")
            for verb, count in sorted(work.verbs.items()):
                print(f"| owner's {verb} | {count} |")
            print(f"| workers found lost | {found.workers_lost} |")
            for kind, count in sorted(found.orphans.items()):
                print(f"| file left behind: {kind} | {count} |")
            for status, count in sorted(service.answers.items()):
                print(f"| answers {status} | {count} |")
            print(f"| jobs lost | {lost} |\n| findings of the auditor | {len(found.wrong)} |")
            for line in found.wrong:
                print(f"wrong: {line}")
    finally:
        if arguments.keep:
            print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    sys.exit(1 if found.wrong or any(status >= 500 and status != 503 for status in service.answers) else 0)


if __name__ == "__main__":
    main()
