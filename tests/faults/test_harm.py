"""One harm a test, done to a real process: killed by a row, out of memory, out of room, frozen past its lease."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from app import lifecycle, spool
from app.config import settings
from app.db import session_scope
from app.models import Job, JobEvent
from app.storage import Storage
from tests.faults.auditor import Findings, audit
from tests.faults.processes import ended, fork, harmed
from tests.support import (
    add_dataset,
    expire_leases,
    job_of,
    label,
    sentences,
    submit,
    tiny_spec,
    wait_until,
)
from workers import labeling, reporter, tasks
from workers.teachers.dataset import DatasetTeacher
from workers.teachers.teacher import Row

KILLED = -signal.SIGKILL


def audited(storage: Storage) -> Findings:
    """What the auditor says of all there is; nothing is wrong."""
    with session_scope() as session:
        found = audit(session, storage)
    assert found.wrong == []
    return found


@pytest.fixture
def storage(tmp_path: Path, database: Engine, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage of the test's own, so that the auditor finds the files of this test alone."""
    from app.storage import storage as configured

    monkeypatch.setattr(settings(), "storage_url", f"file://{tmp_path}/storage")
    configured.cache_clear()
    yield configured()
    configured.cache_clear()


def labels_until_killed(job_id: str, deadly: str, monkeypatch: pytest.MonkeyPatch, *, at_once: int = 1) -> list[int]:
    """Label in one process after the other, in which `at_once` rows that hold a word kill; how the processes ended."""
    answer = DatasetTeacher.label

    def deadly_answer(self: DatasetTeacher, rows: list[Row]) -> Any:
        if sum(deadly in row.text for row in rows) >= at_once:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, rows)

    monkeypatch.setattr(DatasetTeacher, "label", deadly_answer)
    monkeypatch.setattr(labeling, "_loaded", None)
    ends = []
    for _ in range(12):
        ends.append(harmed(lambda: label(job_id)))
        if ends[-1] == 0:
            break
        expire_leases()
    return ends


def test_a_row_that_kills_every_worker_is_found_and_named(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sentences(300, 1)
    rows[217]["text"] += " poison"
    dataset_id = add_dataset(rows)
    job_id = submit(tiny_spec(dataset_id))
    ends = labels_until_killed(job_id, "poison", monkeypatch)
    assert ends == [KILLED] * settings().max_attempts + [0]
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert job.error["message"].startswith(f"Row 217 of the train set (dataset {dataset_id}) cost 5 workers their life")
    assert f"/datasets/{dataset_id}/rows?after=216&limit=1" in job.error["message"]
    audited(storage)


def test_rows_that_kill_a_worker_only_together_are_labeled_in_smaller_pieces(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sentences(300, 1)
    for number in range(140, 170):
        rows[number]["text"] += " heavy"
    job_id = submit(tiny_spec(add_dataset(rows)))
    ends = labels_until_killed(job_id, "heavy", monkeypatch, at_once=15)
    assert ends == [KILLED, 0]
    tasks.train(job_id)
    assert job_of(job_id).status == "succeeded"
    assert audited(storage).workers_lost == 1


def test_a_worker_without_memory_fails_the_job_with_the_way_to_mend_it(storage: Storage) -> None:
    rows = [row | {"text": f"{row['text']} " + "word " * 400} for row in sentences(128, 1)]
    job_id = submit(
        tiny_spec(
            add_dataset(rows),
            student={"model": "scratch", "num_layers": 1, "hidden_size": 256, "vocab_size": 300, "max_length": 512},
            training={"epochs": 1, "batch_size": 256},
        )
    )
    label(job_id)

    def train_in_little_memory() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
        tasks.train(job_id)

    assert harmed(train_in_little_memory) == 0, "the worker itself goes on to the next job"
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["phase"]) == ("out_of_memory", "training")
    assert "batch_size" in job.error["message"]
    audited(storage)


@pytest.mark.parametrize("phase", ["labeling", "training", "packaging"])
def test_a_worker_without_room_fails_the_job_leaves_no_half_file_and_retry_goes_on(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    spec = tiny_spec(add_dataset(sentences(60, 1)), training={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3})
    undisturbed, job_id = submit(spec), submit(spec)
    for each in (undisturbed, job_id)[: 1 if phase == "labeling" else 2]:
        label(each)
    tasks.train(undisturbed)
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9 if phase == "training" else 60.0)
    room = {"labeling": 2_000, "training": 100_000, "packaging": 100_000}[phase]

    def work_in_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        label(job_id)
        tasks.train(job_id)

    assert harmed(work_in_little_room) == 0
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error["code"], job.error["phase"]) == ("no_room", phase)
    assert not [path for path in Path(storage.root).rglob("*") if path.name.startswith(".")]
    audited(storage)

    with session_scope() as session:
        lifecycle.retry(session, session.get_one(Job, job_id))
    label(job_id)
    tasks.train(job_id)
    assert job_of(job_id).status == "succeeded"
    audited(storage)  # and its student is, to the bit, that of the undisturbed job


def test_what_a_killed_process_left_in_the_spool_is_removed_by_another(
    database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "spool_dir", tmp_path)

    def work(signal_number: int) -> None:
        with spool.directory() as directory:
            (directory / "half.tar").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), signal_number)

    assert harmed(lambda: work(signal.SIGKILL)) == KILLED
    [left] = tmp_path.iterdir()
    frozen = fork(lambda: work(signal.SIGSTOP))
    wait_until(lambda: len(list(tmp_path.glob("*/half.tar"))) == 2)
    for directory in tmp_path.iterdir():
        os.utime(directory, (0, 0))
    spool.sweep()
    assert not left.exists()
    assert len(list(tmp_path.iterdir())) == 1, "what is in use stays, however old it is"
    os.kill(frozen, signal.SIGCONT)
    assert ended(frozen) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_was_frozen_past_its_lease_stops_at_its_next_step_and_writes_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "lease_seconds", 1.0)
    monkeypatch.setattr(reporter, "FLUSH_SECONDS", 0.0)
    spec = tiny_spec(add_dataset(sentences(100, 1)), training={"epochs": 10, "batch_size": 8, "learning_rate": 5e-3})
    job_id = submit(spec)
    label(job_id)
    worker = fork(lambda: tasks.train(job_id))
    wait_until(lambda: (job_of(job_id).selection or {}).get("seen", 0) > 0, 60, "the worker to have trained")
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1.1)  # its lease
    with session_scope() as session:
        heir = lifecycle.claim(session, job_id, "heir")
        assert heir is not None
        assert heir.attempt == 2
    before = {path: path.stat().st_mtime_ns for path in Path(storage.root).rglob("*")}
    seen, metrics = job_of(job_id).selection, job_of(job_id).metrics
    os.kill(worker, signal.SIGCONT)
    assert ended(worker) == 0, "it noticed, and went for its next message"
    job = job_of(job_id)
    assert (job.status, job.attempt, job.worker, job.selection, job.metrics) == ("running", 2, "heir", seen, metrics)
    assert {path: path.stat().st_mtime_ns for path in Path(storage.root).rglob("*")} == before
    expire_leases()
    tasks.train(job_id)
    assert job_of(job_id).status == "succeeded"
    audited(storage)


def test_a_job_killed_at_many_steps_ends_in_the_same_weights(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at a step of its own in each of several processes; the auditor compares the bytes of the weights."""
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    spec = tiny_spec(
        add_dataset([row | {"confidence": 0.5 + 0.01 * (n % 40)} for n, row in enumerate(sentences(60, 1))]),
        validation_dataset_id=add_dataset(sentences(12, 2)), method={"kind": "llkd", "weighted": True},
        student={"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24, "dropout": 0.2},
        training={"epochs": 3, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip
    undisturbed, job_id = submit(spec), submit(spec)
    for each in (undisturbed, job_id):
        label(each)
    tasks.train(undisturbed)
    from workers.reporter import Reporter

    check = Reporter.check
    deaths = 0
    for steps in (1, 4, 6, 5, 3, 7):

        def die_at(report: Reporter, left: list[int] = [steps]) -> None:  # noqa: B006 - one list for each process
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            check(report)

        monkeypatch.setattr(Reporter, "check", die_at)
        deaths += harmed(lambda: tasks.train(job_id)) == KILLED
        expire_leases()
    monkeypatch.setattr(Reporter, "check", check)
    tasks.train(job_id)
    assert deaths == 6
    assert job_of(job_id).status == "succeeded"
    with session_scope() as session:
        steps = [event.data["step"] for event in session.scalars(
            select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "training.resumed").order_by(JobEvent.seq)
        )]  # fmt: skip
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    found = audited(storage)
    assert [len(digests) for digests in found.students.values()] == [1]
