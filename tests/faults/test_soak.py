"""A short soak on real processes: `make soak` is the long one."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.auditor import audit
from tests.faults.service import Service
from tests.faults.soak import Rain, Work
from tests.support import sentences, wait_until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # Not pytest's tmp_path: PostgreSQL, which root must run as another user, could not get into it.
    directory = Path(tempfile.mkdtemp(prefix="understudy-faults-"))
    with Service(directory, workers=1) as service:
        yield service
    shutil.rmtree(directory)


def test_jobs_outlive_the_loss_of_every_part_and_end_in_the_same_weights(service: Service) -> None:
    luck = random.Random(3)
    work, rain = Work(service, luck, epochs=6), Rain(service, luck, lambda line: None)
    spec = work.specs[0]
    undisturbed = service.submit(spec, "undisturbed-1")
    service.wait(undisturbed)

    service.kill(service.redis)
    accepted = service.submit(spec, "without-a-broker")  # 202, and the job runs once the broker is back
    service.start(service.redis)
    service.wait(accepted, until=lambda job: (job["selection"] or {}).get("seen", 0) > 0)
    rain.kill_worker()
    rain.kill_postgres()
    rain.kill(service.scheduler)
    service.database_network.reset()
    service.broker_network.reset()
    service.broker.flushall()
    rain.kill(service.api)
    assert service.wait(accepted)["status"] == "succeeded"
    wait_until(lambda: service.job(accepted)["is_terminal"])

    assert set(service.answers) <= {200, 201, 202, 503}
    with service.session() as session:
        found = audit(session, service.storage)
    assert found.wrong == []
    assert found.jobs == {"succeeded": 2}
    assert [len(digests) for digests in found.students.values()] == [1]


@pytest.mark.parametrize(("move", "end"), [("pause", "paused"), ("cancel", "cancelled")])
def test_a_job_whose_worker_cannot_hear_stops_within_ten_seconds_and_frees_it(
    service: Service, move: str, end: str
) -> None:
    """For half a minute the worker makes a tokenizer, which nothing in its process can break off."""
    luck = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"text": "".join(luck.choices(letters, k=4000)), "label": row["label"]} for row in sentences(800, 1)]
    student = {"model": "scratch", "num_layers": 1, "hidden_size": 32, "max_length": 24}
    spec = {"teacher": {"kind": "dataset"}, "method": {"kind": "no_selection"}, "training": {"epochs": 1}}
    deaf = service.submit(
        {**spec, "dataset_id": service.upload(rows), "student": {**student, "vocab_size": 8000}}, f"deaf-{end}"
    )
    service.wait(deaf, until=lambda job: job["phase"] == "training")
    time.sleep(3)
    assert service.job(deaf)["status"] == "running"
    asked = time.monotonic()
    assert service.call("POST", f"/jobs/{deaf}/{move}").status_code == 202
    service.wait(deaf, 20, until=lambda job: job["status"] == end)
    assert time.monotonic() - asked < 10

    small = {**student, "vocab_size": 300}
    after = service.submit({**spec, "dataset_id": service.upload(sentences(12, 2)), "student": small}, f"after-{end}")
    assert service.wait(after, 60)["status"] == "succeeded"
    assert service.workers[0].is_running
    assert "work_does_not_end" in service.workers[0].log.read_text()
