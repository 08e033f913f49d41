"""Every operation of the OpenAPI document, called with what its schema allows and with what it forbids.

Whatever is sent: no 5xx, no status, header or body that the document does not tell. Each operation gets a few drawn
requests; `make fuzz` sets FUZZ_EXAMPLES and has each get so many, and with them every boundary of every field
(schemathesis's coverage phase: thousands of requests, and half a minute to think them up, hence not in `make check`).
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from sqlalchemy import Engine

from app import measurements
from app.main import create_app
from tests.support import add_dataset, new_key, sentences, submit, tiny_spec

FEW_EXAMPLES = 5
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", FEW_EXAMPLES))

UNKNOWN = "x-schemathesis-unknown-property"
"""A header nobody reads is no fault of a request, whatever the document does not name."""

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app())
schema.config.phases.coverage.enabled = EXAMPLES > FEW_EXAMPLES


@pytest.fixture
def known(database: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Path parameters that lead somewhere, and a key: without them almost every answer would be 404 or 401."""
    monkeypatch.setattr(measurements, "PICKUP_SECONDS", 0.05)  # no worker is there to measure for a dry run
    dataset_id = add_dataset(sentences(12, 1))
    job_id = submit(tiny_spec(dataset_id))
    return {"key": new_key("alice", scope="admin"), "dataset_id": dataset_id, "job_id": job_id}


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_every_answer_is_one_that_the_document_tells(case: Any, known: dict[str, str]) -> None:
    for name, value in (case.path_parameters or {}).items():
        # Every other time the id of something that is there.
        if name in known and len(str(value)) % 2:
            case.path_parameters[name] = known[name]
    assume(UNKNOWN not in {name.lower() for name in case.headers or {}})
    answer = case.call(headers={"Authorization": f"Bearer {known['key']}"})
    # No schema tells which rows a file holds, or whether labels and datasets fit each other.
    excluded = [positive_data_acceptance]
    sent = {name.partition("[")[0] for name, _ in parse_qsl(urlsplit(answer.request.url).query, keep_blank_values=True)}
    # What is wrong was not sent, as an empty list is not in an address; or it was refused before anything looked at it.
    if set(case.query or {}) - sent or answer.status_code in (413, 415):
        excluded.append(negative_data_rejection)
    case.validate_response(answer, excluded_checks=excluded)
