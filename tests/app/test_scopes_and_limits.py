"""What a key may do and how often: scopes, rotation, limits with 429, and keys over HTTP."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from app import keys, limits
from app.api import keys as api_keys
from app.api.keys import MOST_KEYS
from app.config import settings
from app.db import session_scope
from app.embedded import free_port
from app.errors import RateLimited, TooManyUploads
from app.main import create_app
from app.models import ApiKey, Checkpoint, Job, new_id, now
from tests.app.test_keys_and_tenants import routes
from tests.support import add_dataset, in_threads, job_of, new_key, sentences, stored, submit, tiny_spec

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
JSONL = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def clients(database: Engine) -> dict[str, TestClient]:
    """A client of the tenant alice for each scope."""
    app = create_app()
    return {
        scope: TestClient(app, headers={"Authorization": f"Bearer {new_key('alice', scope=scope)}"})
        for scope in ("read", "write", "admin")
    }


@pytest.fixture(autouse=True)
def counter() -> Iterator[None]:
    """A Redis that was found away in one test is asked again in the next."""
    yield
    limits._away_until = 0.0
    limits._counted.clear()


def client_with(**own: int | None) -> TestClient:
    """A client of alice whose key has limits of its own."""
    return TestClient(create_app(), headers={"Authorization": f"Bearer {new_key('alice', limits=own)}"})


# --- scopes ---------------------------------------------------------------------------------------------------------


def test_a_key_does_what_its_scope_includes_and_nothing_wider(clients: dict[str, TestClient]) -> None:
    """Every route there is: what the document says it needs is what it asks for."""
    document = clients["read"].get("/openapi.json").json()
    order = ["read", "write", "admin"]
    told = {"read": 0, "write": 0, "admin": 0}
    for method, path in routes():
        if method == "HEAD":
            continue
        needed = document["paths"][path][method.lower()]["x-scope"]
        told[needed] += 1
        for scope, client in clients.items():
            answer = client.request(method, re.sub(r"\{\w+\}", "some_id", path), json={})
            narrow = order.index(scope) < order.index(needed)
            assert (answer.status_code == 403) == narrow, (method, path, scope, answer.text)
            if narrow:
                assert (answer.json()["code"], answer.json()["needed_scope"]) == ("forbidden", needed)
    assert told["read"] >= 10
    assert told["write"] >= 8
    assert told["admin"] >= 4


def test_a_read_key_changes_nothing(clients: dict[str, TestClient]) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    job_id = submit(tiny_spec(dataset_id))
    before = stored()
    reader = clients["read"]
    assert reader.post("/jobs", json=tiny_spec(dataset_id)).status_code == 403
    assert reader.post("/datasets", content=ROWS, headers=JSONL).status_code == 403
    assert reader.post(f"/jobs/{job_id}/cancel").status_code == 403
    assert reader.get("/webhooks/secret").status_code == 403, "with the secret one could sign"
    assert (stored(), job_of(job_id).status) == (before, "queued")
    assert reader.get(f"/jobs/{job_id}").status_code == 200


# --- rotation -------------------------------------------------------------------------------------------------------


def test_a_rotated_key_works_beside_the_new_one_until_the_grace_period_is_over(database: Engine) -> None:
    client = TestClient(create_app())

    def status(key: str) -> int:
        return client.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code

    with session_scope() as session:
        old, old_key = keys.create(session, "alice", "robot", days=30, scope="read", limits={"max_stored_bytes": 7})
        old.created_at, old.expires_at = now() - timedelta(days=20), now() + timedelta(days=10)
        new, new_key = keys.rotate(session, old, grace_hours=2)
        old_id = old.id
        assert (new.tenant, new.name, new.scope, new.limits) == ("alice", "robot", "read", {"max_stored_bytes": 7})
        assert new.expires_at is not None
        assert abs(new.expires_at - now() - timedelta(days=30)) < timedelta(minutes=1)
        assert old.expires_at is not None
        assert abs(old.expires_at - now() - timedelta(hours=2)) < timedelta(minutes=1)
    assert (status(old_key), status(new_key)) == (200, 200)
    with session_scope() as session:
        session.get_one(ApiKey, old_id).expires_at = now()
    keys.forget()
    assert (status(old_key), status(new_key)) == (401, 200)


def test_a_grace_period_never_prolongs_a_key(database: Engine) -> None:
    with session_scope() as session:
        old, _ = keys.create(session, "alice", "robot", days=1)
        before = old.expires_at
        keys.rotate(session, old, grace_hours=24 * 30)
        assert old.expires_at == before


def test_when_a_key_was_used_last_is_noted(database: Engine, clients: dict[str, TestClient]) -> None:
    listed = clients["admin"].get("/keys").json()["data"]
    assert {entry["scope"]: entry["last_used_at"] is not None for entry in listed} == {
        "read": False, "write": False, "admin": True,
    }  # fmt: skip
    clients["read"].get("/jobs")
    listed = clients["admin"].get("/keys").json()["data"]
    assert {entry["scope"]: entry["last_used_at"] is not None for entry in listed} == {
        "read": True, "write": False, "admin": True,
    }  # fmt: skip


def test_requests_of_one_key_do_not_wait_for_each_other(database: Engine) -> None:
    """A request that is being served holds the row in which it noted the use; others pass it by."""
    key = new_key("alice")
    client = TestClient(create_app(), headers={"Authorization": f"Bearer {key}"})
    with session_scope() as session:
        assert keys.authenticate(session, key) is not None
        done = threading.Event()
        other = threading.Thread(target=lambda: (client.get("/jobs"), done.set()))
        other.start()
        assert done.wait(10), "a second request hangs on the first"
        other.join()


# --- keys over HTTP -------------------------------------------------------------------------------------------------


def test_an_administrator_makes_rotates_and_revokes_keys_of_its_tenant(clients: dict[str, TestClient]) -> None:
    admin = clients["admin"]
    made = admin.post("/keys", json={"name": "report", "scope": "write", "days": 1})
    assert made.status_code == 201
    key = made.json()["key"]
    assert key not in json.dumps(admin.get("/keys").json()), "a key is shown once"
    as_made = {"Authorization": f"Bearer {key}"}
    assert admin.get("/datasets", headers=as_made).status_code == 200
    rotated = admin.post(f"/keys/{made.json()['id']}/rotate", json={"grace_hours": 0})
    assert rotated.status_code == 201
    assert admin.get("/datasets", headers=as_made).status_code == 401, "no grace"
    as_rotated = {"Authorization": f"Bearer {rotated.json()['key']}"}
    assert admin.get("/datasets", headers=as_rotated).status_code == 200
    again = admin.post(f"/keys/{made.json()['id']}/rotate", json={})
    assert (again.status_code, again.json()["code"]) == (409, "key_ended")
    for _ in range(2):
        assert admin.delete(f"/keys/{rotated.json()['id']}").status_code == 204
    assert admin.get("/datasets", headers=as_rotated).status_code == 401


def test_a_made_key_has_its_makers_limits_and_cannot_name_its_own(database: Engine) -> None:
    key = new_key("alice", scope="admin", limits={"max_unfinished_jobs": 3})
    admin = TestClient(create_app(), headers={"Authorization": f"Bearer {key}"})
    assert admin.post("/keys", json={"name": "a"}).json()["limits"] == {"max_unfinished_jobs": 3}
    wish = admin.post("/keys", json={"name": "a", "limits": {"max_unfinished_jobs": None}})
    assert (wish.status_code, wish.json()["errors"][0]["pointer"]) == (422, "/limits")
    assert admin.post("/keys", json={"name": "a", "tenant": "bob"}).status_code == 422


def test_a_tenant_cannot_make_keys_without_end(clients: dict[str, TestClient]) -> None:
    with session_scope() as session:
        for _ in range(MOST_KEYS - keys.working(session, "alice")):
            keys.create(session, "alice", "one of many")
    answer = clients["admin"].post("/keys", json={"name": "one more"})
    assert (answer.status_code, answer.json()["code"]) == (409, "too_many_keys")


def test_of_keys_that_are_made_together_no_more_are_made_than_may_be(
    clients: dict[str, TestClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    with session_scope() as session:
        monkeypatch.setattr(api_keys, "MOST_KEYS", keys.working(session, "alice") + 2)
    answers = in_threads(8, lambda number: clients["admin"].post("/keys", json={"name": str(number)}))
    assert sorted(answer.status_code for answer in answers) == [201, 201] + [409] * 6


# --- requests a minute ----------------------------------------------------------------------------------------------


def test_requests_beyond_the_limit_are_told_when_to_come_back_and_other_keys_go_on(client: TestClient) -> None:
    hasty = client_with(max_requests_per_minute=5)
    statuses = [hasty.get("/jobs").status_code for _ in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    refused = hasty.get("/jobs")
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "rate_limited"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert client.get("/jobs").status_code == 200


def test_of_a_large_limit_a_hundredth_is_counted_at_a_time_and_no_request_too_much_passes(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = ApiKey(id=new_id("key"), tenant="alice", limits={"max_requests_per_minute": 300})
    counter = limits._counter(settings().redis_url)
    asked, hit = [], counter.hit

    def counted(item: Any, *names: str, cost: int = 1) -> bool:
        asked.append(cost)
        return hit(item, *names, cost=cost)

    monkeypatch.setattr(counter, "hit", counted)
    for _ in range(300):
        if not limits.is_counted(key):
            limits.count_request(key)
    assert asked == [4] * 75, "three ahead, and the one that asks"
    for _ in range(2):
        assert not limits.is_counted(key)
        with pytest.raises(RateLimited):
            limits.count_request(key)


def test_a_limit_of_none_is_no_limit(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "max_requests_per_minute", 1)
    free, usual = client_with(max_requests_per_minute=None), client_with()
    assert [free.get("/jobs").status_code for _ in range(3)] == [200] * 3
    assert [usual.get("/jobs").status_code for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("silent", [False, True], ids=["refusing", "hanging"])
def test_a_redis_that_is_away_takes_no_request_down(
    database: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], silent: bool
) -> None:
    client = client_with(max_requests_per_minute=1)
    port = free_port()
    with socket.socket() as listener:
        if silent:  # it takes the connection and never says a word
            listener.bind(("127.0.0.1", port))
            listener.listen()
        monkeypatch.setattr(settings(), "redis_url", f"redis://:hidden@127.0.0.1:{port}/0")
        assert [client.get("/jobs").status_code for _ in range(3)] == [200] * 3
    output = "".join(capfd.readouterr())
    assert output.count("requests_not_counted") == 1, "it is asked again only after a while"
    assert "hidden" not in output


# --- uploads, bytes, jobs -------------------------------------------------------------------------------------------


def test_uploads_at_once_are_limited_per_tenant(database: Engine) -> None:
    alice, other = (ApiKey(tenant=tenant, limits={"max_uploads_at_once": 2}) for tenant in ("alice", "bob"))
    with limits.uploading(alice), limits.uploading(alice):
        with pytest.raises(TooManyUploads), limits.uploading(alice):
            pass
        with limits.uploading(other):
            pass
        answer = client_with(max_uploads_at_once=2).post("/datasets", content=ROWS, headers=JSONL)
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_uploads")
        assert int(answer.headers["retry-after"]) > 0
    assert not limits._at_once
    assert client_with(max_uploads_at_once=1).post("/datasets", content=ROWS, headers=JSONL).status_code == 201


def test_a_tenant_whose_room_is_used_up_stores_nothing_more(database: Engine) -> None:
    client = client_with(max_stored_bytes=3 * len(ROWS) - 1)
    first = client.post("/datasets", content=ROWS, headers=JSONL).json()
    assert client.post("/datasets", content=ROWS, headers=JSONL).status_code == 201
    answer = client.post("/datasets", content=ROWS, headers=JSONL)
    assert (answer.status_code, answer.json()["code"]) == (429, "storage_full")
    chunked = client.post("/datasets", content=iter([ROWS]), headers=JSONL)
    assert chunked.status_code == 429, "also when the size is not told beforehand"
    assert stored()["datasets"] == 2
    assert client.delete(f"/datasets/{first['id']}").status_code == 204
    assert client.post("/datasets", content=ROWS, headers=JSONL).status_code == 201


def test_checkpoints_count_as_stored(database: Engine) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    with session_scope() as session:
        session.add(
            Checkpoint(id=new_id("ckpt"), tenant="alice", job_id=job_id, step=1, epoch=1, metrics={}, bytes=5000, sha256="0" * 64, files=[])
        )  # fmt: skip
    answer = client_with(max_stored_bytes=5000).post("/datasets", content=ROWS, headers=JSONL)
    assert (answer.status_code, answer.json()["code"]) == (429, "storage_full")


def test_an_upload_in_parts_takes_its_room_when_it_begins(database: Engine) -> None:
    client = client_with(max_stored_bytes=2 * len(ROWS))
    wish = {"name": "rows.jsonl", "bytes": len(ROWS)}
    begun = [client.post("/uploads", json=wish) for _ in range(3)]
    assert [answer.status_code for answer in begun] == [201, 201, 429]
    first, second = (f"/uploads/{answer.json()['id']}" for answer in begun[:2])
    assert client.post(f"{first}/parts", params={"number": 1}, content=ROWS).status_code == 201
    assert client.post(f"{first}/complete").status_code == 201, "its room was kept for it"
    assert client.post("/datasets", content=ROWS, headers=JSONL).status_code == 429
    assert client.post(f"{second}/cancel").status_code == 200
    assert client.post("/datasets", content=ROWS, headers=JSONL).status_code == 201


def test_an_upload_that_is_sent_again_is_answered_even_when_the_room_is_used_up(database: Engine) -> None:
    client = client_with(max_stored_bytes=len(ROWS))
    headers = {**JSONL, "Idempotency-Key": "once"}
    first = client.post("/datasets", content=ROWS, headers=headers)
    again = client.post("/datasets", content=ROWS, headers=headers)
    assert (first.status_code, again.status_code, again.json()["id"]) == (201, 201, first.json()["id"])


def test_of_uploads_that_end_together_no_more_are_stored_than_there_is_room_for(database: Engine) -> None:
    client = client_with(max_stored_bytes=2 * len(ROWS))
    answers = in_threads(6, lambda _: client.post("/datasets", content=ROWS, headers=JSONL).status_code)
    assert sorted(answers) == [201] * 2 + [429] * 4
    assert stored()["datasets"] == 2


def test_jobs_that_have_not_ended_are_limited(database: Engine) -> None:
    client = client_with(max_unfinished_jobs=2)
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    jobs = [client.post("/jobs", json=spec).json()["id"] for _ in range(2)]
    answer = client.post("/jobs", json=spec)
    assert (answer.status_code, answer.json()["code"]) == (429, "too_many_jobs")
    assert client.post("/jobs", json=spec, params={"dry_run": True}).status_code == 200
    assert client.post(f"/jobs/{jobs[0]}/pause").status_code == 202
    assert client.post("/jobs", json=spec).status_code == 429, "a paused job will want to go on"
    assert client.post(f"/jobs/{jobs[0]}/cancel").status_code == 202
    assert client.post("/jobs", json=spec).status_code == 202
    assert client.post(f"/jobs/{jobs[0]}/retry").status_code == 429, "nor is a retry a way around"
    assert job_of(jobs[0]).status == "cancelled"


def test_the_runs_of_a_comparison_count_as_jobs(database: Engine) -> None:
    arms = [{"name": kind, "method": {"kind": kind}} for kind in ("random", "no_selection")]
    wish = tiny_spec(add_dataset(sentences(24, 1)), test_dataset_id=add_dataset(sentences(6, 2)))
    wish = {name: part for name, part in wish.items() if name != "method"} | {"arms": arms, "seeds": [0, 1]}
    assert client_with(max_unfinished_jobs=3).post("/comparisons", json=wish).status_code == 429
    assert stored()["jobs"] == 0
    assert client_with(max_unfinished_jobs=4).post("/comparisons", json=wish).status_code == 202


def test_of_jobs_that_are_posted_together_no_more_are_taken_than_may_be(database: Engine) -> None:
    client = client_with(max_unfinished_jobs=2)
    spec = tiny_spec(add_dataset(sentences(6, 1)))
    answers = in_threads(6, lambda _: client.post("/jobs", json=spec).status_code)
    assert sorted(answers) == [202] * 2 + [429] * 4
    with session_scope() as session:
        assert session.query(Job).count() == 2


def test_a_limit_that_is_none_or_no_number_is_refused() -> None:
    for wrong in ({"max_jobs": 1}, {"max_stored_bytes": 0}):
        with pytest.raises(ValueError, match="max_"):
            limits.checked(wrong)
    assert set(limits.NAMES) <= set(type(settings()).model_fields)
