"""What several tests need beside the fixtures."""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from sqlalchemy import func, select, text

from app import keys, lifecycle, preflight, records
from app.config import settings
from app.db import session_scope
from app.embedded import free_port
from app.models import Base, Dataset, Job, LabelShard, new_id
from app.options import JobSpec
from app.storage import sha256_of, storage

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def new_key(tenant: str, **options: Any) -> str:
    """An API key of a tenant, committed. `options` are those of keys.create."""
    with session_scope() as session:
        return keys.create(session, tenant, "made by a test", **options)[1]


def shared_data(name: str) -> Path:
    """A directory of the shared data; skips the test where there is none."""
    directory = SHARED_DATA / name
    if not directory.is_dir():
        pytest.skip(f"the shared data set {name} is not on this machine")
    return directory


def wait_until(claim: Callable[[], bool], seconds: float = 10.0, what: str = "") -> None:
    """Wait for something to become true; fail the test when it does not."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain{': ' + what if what else ''}")
        time.sleep(0.05)


@contextmanager
def serving() -> Iterator[str]:
    """The API under uvicorn, in a thread."""
    from app.main import create_app

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        wait_until(lambda: server.started, what="the server starts")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


# --- own data -------------------------------------------------------------------------------------------------------

WORDS = {
    "cooking": ["oven", "butter", "recipe", "flour", "onion", "simmer", "soup", "dough", "spice", "kitchen", "garlic"],
    "sports": ["goal", "match", "referee", "striker", "coach", "league", "stadium", "sprint", "penalty", "trophy"],
    "weather": ["storm", "drizzle", "forecast", "humid", "thunder", "breeze", "frost", "sunshine", "hail", "blizzard"],
}
FILLER = ["the", "a", "with", "very", "some", "near", "this", "before", "after", "quite"]
TOPICS = sorted(WORDS)


def sentences(count: int, seed: int, *, labeled: bool = True) -> list[dict[str, Any]]:
    """Rows about cooking, sports or weather, in turn; no two of them are equal, whatever the seeds."""
    luck = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        words = [luck.choice(WORDS[topic]) if luck.random() < 0.6 else luck.choice(FILLER) for _ in range(6)]
        row = {"text": f"{' '.join(words)} {luck.choice(WORDS[topic])} {seed} {number}"}
        rows.append(row | {"label": topic} if labeled else row)
    return rows


def add_dataset(rows: list[dict[str, Any]], tenant: str = "alice", name: str = "rows") -> str:
    """Store a dataset as an upload would; its id."""
    dataset_id = new_id("ds")
    with tempfile.TemporaryDirectory() as directory:
        source, sink = Path(directory) / "rows.jsonl", Path(directory) / "rows.parquet"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = records.ingest(source, sink, format="jsonl")
        dataset = Dataset(
            id=dataset_id, tenant=tenant, name=name, rows=found.rows, bytes=source.stat().st_size,
            sha256=sha256_of(source), columns=found.columns, label_counts=found.label_counts,
            duplicates=found.duplicates, skipped=found.skipped, has_text_pair=found.has_text_pair,
            warnings=list(found.warnings),
        )  # fmt: skip
        storage().put(dataset.key, sink)
    with session_scope() as session:
        session.add(dataset)
    return dataset_id


def tiny_spec(dataset_id: str, **changes: Any) -> dict[str, Any]:
    """A job of a second or two: the dataset's own labels, a student from scratch with one layer of width 32."""
    spec: dict[str, Any] = {
        "dataset_id": dataset_id,
        "teacher": {"kind": "dataset"},
        "student": {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24},
        "method": {"kind": "no_selection"},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 5e-3},
    }
    return spec | changes


def submit(spec: dict[str, Any], tenant: str = "alice") -> str:
    """Check and store a job as POST /jobs does; its id."""
    with session_scope() as session:
        plan = preflight.check(session, tenant, JobSpec.model_validate(spec), settings())
        return lifecycle.submit(session, tenant, plan).id


def label(job_id: str, worker: str = "labeler") -> None:
    """Label the job's rows in this thread until no shard is left."""
    from workers.labeling import label_job

    label_job(job_id, worker, threading.Event())


def run(job_id: str) -> Job:
    """Label and train the job in this thread, as workers would; the job afterwards."""
    from workers import tasks

    label(job_id)
    tasks.train(job_id)
    return job_of(job_id)


def job_of(job_id: str) -> Job:
    """The job as it stands."""
    with session_scope() as session:
        return session.get_one(Job, job_id)


def shards_of(job_id: str) -> list[LabelShard]:
    """The job's shards as they stand."""
    with session_scope() as session:
        return list(session.get_one(Job, job_id).label_set.shards)


def stored() -> dict[str, int]:
    """How many rows each table has, but for the audit log, where refusals are written too."""
    with session_scope() as session:
        return {
            table.name: session.scalar(select(func.count()).select_from(table)) or 0
            for table in Base.metadata.sorted_tables
            if table.name != "audit_log"
        }


def expire_leases() -> None:
    """Let every lease and every claim on a text have run out a second ago."""
    with session_scope() as session:
        for table in ("jobs", "label_shards"):
            session.execute(
                text(f"UPDATE {table} SET lease_expires_at = now() - interval '1 s' WHERE lease_expires_at IS NOT NULL")
            )
        session.execute(text("UPDATE label_claims SET expires_at = now() - interval '1 s'"))


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)` to `work(count - 1)` return when they start at the same moment."""
    gate = threading.Barrier(count)
    results: list[Any] = [None] * count

    def start(number: int) -> None:
        gate.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=start, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
