"""Idempotency-Key on POST /jobs: sent again it is the same answer, at once or later; another body is refused."""

from __future__ import annotations

from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from app import retention
from app.db import session_scope
from app.models import IdempotencyKey
from app.storage import Storage
from tests.support import add_dataset, in_threads, sentences, stored, tiny_spec

KEY = {"Idempotency-Key": "order-66"}


def jobs() -> int:
    return stored()["jobs"]


def test_the_same_request_again_gets_the_first_answer(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    first = client.post("/jobs", json=spec, headers=KEY)
    assert (first.status_code, "idempotent-replayed" in first.headers) == (202, False)
    client.post(f"/jobs/{first.json()['id']}/cancel")
    again = client.post("/jobs", json=spec, headers=KEY)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    assert again.json() == first.json(), "the answer of then, whatever became of the job"
    for header in ("location", "retry-after", "content-type"):
        assert again.headers[header] == first.headers[header]
    assert jobs() == 1


def test_the_order_of_fields_and_defaults_that_are_spelt_out_make_no_other_request(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    client.post("/jobs", json=spec, headers=KEY)
    same = dict(reversed(spec.items())) | {"metadata": {}, "budget": {"max_seconds": None}}
    assert client.post("/jobs", json=same, headers=KEY).headers["idempotent-replayed"] == "true"


def test_the_key_with_another_body_is_refused(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    client.post("/jobs", json=spec, headers=KEY)
    other = client.post("/jobs", json=spec | {"name": "another"}, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert "use a new key" in other.json()["detail"]
    assert jobs() == 1


def test_requests_with_one_key_that_arrive_together_make_one_job(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    answers = in_threads(5, lambda number: client.post("/jobs", json=spec, headers=KEY))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted("idempotent-replayed" in answer.headers for answer in answers) == [False] + [True] * 4
    assert jobs() == 1


def test_another_key_and_no_key_make_another_job(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    for headers in (KEY, {"Idempotency-Key": "order-67"}, {}, {}):
        assert client.post("/jobs", json=spec, headers=headers).status_code == 202
    assert jobs() == 4


def test_tenants_do_not_share_keys(client: TestClient, other_client: TestClient) -> None:
    rows = sentences(6, 1)
    client.post("/jobs", json=tiny_spec(add_dataset(rows)), headers=KEY)
    answer = other_client.post("/jobs", json=tiny_spec(add_dataset(rows, "bob")), headers=KEY)
    assert (answer.status_code, "idempotent-replayed" in answer.headers) == (202, False)


def test_a_refused_request_leaves_its_key_free(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    refused = client.post("/jobs", json=spec | {"student": {"model": "no-such-model"}}, headers=KEY)
    assert refused.status_code == 422
    assert client.post("/jobs", json=spec, headers=KEY).status_code == 202


def test_a_dry_run_uses_no_key(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    assert client.post("/jobs?dry_run=true", json=spec, headers=KEY).status_code == 200
    answer = client.post("/jobs", json=spec, headers=KEY)
    assert (answer.status_code, "idempotent-replayed" in answer.headers) == (202, False)


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_a_key_is_1_to_255_visible_characters(client: TestClient, key: str) -> None:
    answer = client.post("/jobs", json=tiny_spec(add_dataset(sentences(6, 1))), headers={"Idempotency-Key": key})
    assert answer.status_code == 422
    assert jobs() == 0


def test_an_answer_is_kept_for_a_day_and_that_of_a_pending_upload_for_as_long_as_it_takes(
    client: TestClient, storage: Storage
) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    wish = {"name": "rows.jsonl", "bytes": 20}

    def age(hours: float) -> None:
        with session_scope() as session:
            session.execute(
                update(IdempotencyKey).values(created_at=IdempotencyKey.created_at - timedelta(hours=hours))
            )
        retention.retain(storage)

    def replayed() -> list[bool]:
        answers = client.post("/jobs", json=spec, headers=KEY), client.post("/uploads", json=wish, headers=KEY)
        assert [answer.status_code for answer in answers] == [202, 201]
        return ["idempotent-replayed" in answer.headers for answer in answers]

    assert replayed() == [False, False]
    age(23.9)
    assert replayed() == [True, True]
    age(0.2)
    assert replayed() == [False, True], "the job is another one, the upload goes on"
    assert jobs() == 2
    client.post(f"/uploads/{client.post('/uploads', json=wish, headers=KEY).json()['id']}/cancel")
    age(24.1)
    assert stored()["idempotency_keys"] == 0
