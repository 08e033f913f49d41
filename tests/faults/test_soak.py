"""A short soak on real processes: `make soak` is the long one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.auditor import audit
from tests.faults.service import Service
from tests.faults.soak import Rain, Work
from tests.support import wait_until


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # Not pytest's tmp_path: PostgreSQL, which root must run as another user, could not get into it.
    directory = Path(tempfile.mkdtemp(prefix="understudy-faults-"))
    with Service(directory, workers=1) as service:
        yield service
    shutil.rmtree(directory)


def test_jobs_outlive_the_loss_of_every_part_and_end_in_the_same_weights(service: Service) -> None:
    import random

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
