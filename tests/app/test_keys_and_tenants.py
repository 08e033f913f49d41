"""Who may ask: keys that are known, unexpired and not revoked; and nobody sees another tenant's things."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, text, update

from app import keys
from app.db import session_scope
from app.main import ROUTERS
from app.models import ApiKey, Checkpoint, Comparison, Job, WebhookDelivery, new_id, now
from tests.support import add_dataset, new_key, sentences, submit, tiny_spec, wait_until

OPEN = {"/healthz", "/readyz", "/metrics"}


def routes() -> list[tuple[str, str]]:
    """Method and path of every route that needs a key."""
    return [
        (method, route.path)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute) and route.path not in OPEN
        for method in sorted(route.methods)
    ]


def test_no_route_answers_without_a_key(client: TestClient) -> None:
    client.headers.pop("Authorization")
    assert len(routes()) > 15
    for method, path in routes():
        answer = client.request(method, re.sub(r"\{\w+\}", "some_id", path))
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["code"] == "unauthorized"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer us_wrong", "Basic dXM6eA==", "us_wrong", "Bearer us_\xe9"]
)
def test_whatever_is_no_known_key_is_refused(client: TestClient, header: str) -> None:
    client.headers.pop("Authorization")
    answer = client.get("/jobs", headers={b"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401


def test_a_key_works_until_it_expires_or_is_revoked(database: Engine, client: TestClient) -> None:
    with session_scope() as session:
        row, key = keys.create(session, "alice", "short-lived", days=1)
        key_id = row.id
    header = {"Authorization": f"Bearer {key}"}
    assert client.get("/jobs", headers=header).status_code == 200
    with session_scope() as session:
        session.get_one(ApiKey, key_id).expires_at = now() - timedelta(seconds=1)
    keys.forget()
    assert client.get("/jobs", headers=header).status_code == 401
    with session_scope() as session:
        session.get_one(ApiKey, key_id).expires_at = None
    assert client.get("/jobs", headers=header).status_code == 200
    with session_scope() as session:
        assert keys.revoke(session, key_id)
        assert not keys.revoke(session, key_id)
    answer = client.get("/jobs", headers=header)
    assert (answer.status_code, answer.json()["detail"]) == (
        401, "This API key is not known, or has expired or been revoked.",
    )  # fmt: skip


def test_what_another_process_does_to_a_key_takes_effect_within_seconds(
    database: Engine, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KNOWN_SECONDS", 0.5)
    key = new_key("alice")

    def status() -> int:
        return client.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code

    assert status() == 200
    with database.begin() as connection:  # as `understudy keys revoke` does, past this process
        connection.execute(update(ApiKey).where(ApiKey.hash == keys.hash_of(key)).values(revoked_at=func.now()))
    wait_until(lambda: status() == 401, 5)


def test_a_key_that_expires_ends_at_its_moment_though_it_was_just_read(
    database: Engine, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "KNOWN_SECONDS", 3600)
    key = new_key("alice", days=1)
    headers = {"Authorization": f"Bearer {key}"}
    assert client.get("/jobs", headers=headers).status_code == 200
    monkeypatch.setattr(keys, "now", lambda: now() + timedelta(days=1))
    assert client.get("/jobs", headers=headers).status_code == 401


def test_the_database_never_holds_a_key(database: Engine) -> None:
    key = new_key("alice")
    assert key.startswith("us_")
    assert len(key) > 40
    with session_scope() as session:
        row = str(session.execute(text("SELECT * FROM api_keys")).one())
    assert key not in row
    assert key.removeprefix("us_") not in row


def test_two_keys_are_never_alike_and_one_tenant_may_have_several(database: Engine, client: TestClient) -> None:
    made = {new_key("alice") for _ in range(5)}
    assert len(made) == 5
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    for key in made:
        assert client.get(f"/jobs/{job_id}", headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("tenant", ["", "Alice", "a b", "a" * 64, "-a", "a/b", "../x"])
def test_a_tenants_name_is_plain(database: Engine, tenant: str) -> None:
    with session_scope() as session, pytest.raises(ValueError, match="lower-case"):
        keys.create(session, tenant, "key")


def test_everything_of_another_tenant_looks_as_if_it_did_not_exist(
    client: TestClient, other_client: TestClient
) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    job_id = submit(tiny_spec(dataset_id))
    checkpoint_id, delivery_id = new_id("ckpt"), new_id("whd")
    with session_scope() as session:
        session.add(
            WebhookDelivery(
                id=delivery_id, tenant="alice", job_id=job_id, type="job.failed", url="https://hooks.test", payload={}, next_attempt_at=now()
            )
        )  # fmt: skip
        session.add(
            Checkpoint(
                id=checkpoint_id, tenant="alice", job_id=job_id, step=1, epoch=1, metrics={}, bytes=1, sha256="0" * 64, files=[]
            )
        )  # fmt: skip
        session.flush()
        session.get_one(Job, job_id).best_checkpoint_id = checkpoint_id
        comparison_id = new_id("cmp")
        session.add(Comparison(id=comparison_id, tenant="alice", spec={}))
        key_id = keys.create(session, "alice", "hers")[0].id
    ids = {
        "job_id": job_id, "dataset_id": dataset_id, "checkpoint_id": checkpoint_id, "delivery_id": delivery_id,
        "key_id": key_id, "comparison_id": comparison_id,
        "upload_id": client.post("/uploads", json={"name": "rows.jsonl", "bytes": 5}).json()["id"],
    }  # fmt: skip
    other_client.headers["Authorization"] = f"Bearer {new_key('bob', scope='admin')}"
    with_ids = [(method, path) for method, path in routes() if "{" in path]
    assert len(with_ids) > 12
    for method, path in with_ids:
        body = {"texts": ["a"]} if path.endswith("/predict") else {}
        sent: dict[str, Any] = {"json": body, "params": {"number": 1} if path.endswith("/parts") else {}}
        there = other_client.request(method, path.format(**ids), **sent)
        nowhere = other_client.request(method, path.format(**dict.fromkeys(ids, "job_0123")), **sent)
        assert (there.status_code, nowhere.status_code) == (404, 404), (method, path)
        if method != "HEAD":
            bodies = [{**answer.json(), "request_id": None} for answer in (there, nowhere)]
            assert bodies[0] == bodies[1], (method, path)
    for path in ("/jobs", "/datasets"):
        assert other_client.get(path).json()["data"] == []
        assert len(client.get(path).json()["data"]) == 1
    assert client.get(f"/jobs/{job_id}").json()["status"] == "queued", "nothing was cancelled from outside"
    with session_scope() as session:
        assert session.get_one(ApiKey, key_id).revoked_at is None, "no key was revoked from outside"


@pytest.mark.parametrize("job_id", ["%00", "..%2f..%2fetc", "job_%F0%9F%98%80", "%C3%28", "x" * 5000])
def test_an_id_that_cannot_be_one_is_not_found(client: TestClient, job_id: str) -> None:
    for path in (f"/jobs/{job_id}", f"/checkpoints/{job_id}", f"/jobs/{job_id}/samples"):
        assert client.get(path).status_code == 404


def test_every_answer_carries_a_request_id_and_keeps_the_callers(client: TestClient) -> None:
    assert re.fullmatch(r"req_[0-9a-f]{32}", client.get("/jobs").headers["x-request-id"])
    assert client.get("/nowhere", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert client.get("/jobs", headers={"x-request-id": "not\tmine"}).headers["x-request-id"].startswith("req_")
    lost = client.get("/nowhere")
    assert (lost.status_code, lost.headers["content-type"]) == (404, "application/problem+json")
    assert client.put("/jobs").status_code == 405
    assert client.put("/jobs").headers["content-type"] == "application/problem+json"
