"""The audit log: every change and every denial is in it, no secret is, and nobody can rewrite it."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DatabaseError
from typer.testing import CliRunner

from app import audit, cli, measurements
from app.db import session_scope
from app.main import create_app
from app.models import AuditEntry
from tests.app.test_keys_and_tenants import routes
from tests.support import TOPICS, add_dataset, new_key, sentences, tiny_spec

ROWS = b'{"text": "one"}\n{"text": "two"}\n'


def entries() -> list[AuditEntry]:
    with session_scope() as session:
        return list(session.scalars(select(AuditEntry).order_by(AuditEntry.id)))


@pytest.fixture(autouse=True)
def allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test may have as many denials as a minute has."""
    monkeypatch.setattr(audit, "_denied", audit._Allowance(audit.DENIED_A_MINUTE))


def test_a_change_is_recorded_with_who_what_and_from_where(client: TestClient) -> None:
    uploaded = client.post("/datasets", content=ROWS, headers={"Content-Type": "application/x-ndjson"})
    started = client.post("/jobs", json=tiny_spec(add_dataset(sentences(6, 1))), headers={"x-request-id": "mine-1"})
    job_id = started.json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    client.post(f"/jobs/{job_id}/resume")
    client.post("/jobs", json={"name": "not a spec"})
    client.delete(f"/datasets/{uploaded.json()['id']}")
    found = [(entry.action, entry.object_id, entry.outcome, entry.status) for entry in entries()]
    assert found == [
        ("create_dataset", uploaded.json()["id"], "done", 201),
        ("create_job", job_id, "done", 202),
        ("cancel_job", job_id, "done", 202),
        ("resume_job", job_id, "refused", 409),
        ("create_job", None, "refused", 422),
        ("delete_dataset", uploaded.json()["id"], "done", 204),
    ]
    assert {entry.tenant for entry in entries()} == {"alice"}
    assert all(entry.key_id and entry.key_id.startswith("key_") for entry in entries())
    assert {entry.address for entry in entries()} == {"testclient"}
    assert entries()[1].request_id == "mine-1"


def test_looking_is_not_recorded_but_being_denied_a_look_is(client: TestClient) -> None:
    client.get("/jobs")
    client.post("/jobs", json=tiny_spec(add_dataset(sentences(6, 1))), params={"dry_run": True})
    assert entries() == []
    client.post("/checkpoints/ckpt_none/predict", json={"texts": ["a"]})
    assert entries() == []
    client.get("/jobs", headers={"Authorization": "Bearer us_wrong"})
    assert [(entry.action, entry.outcome, entry.status, entry.key_id) for entry in entries()] == [
        ("list_jobs", "denied", 401, None)
    ]
    client.get("/webhooks/secret")
    assert entries()[-1].action == "read_secret", "handing out a secret is worth a line"


def test_a_dry_run_is_recorded_where_it_has_the_teacher_asked(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "PICKUP_SECONDS", 0.1)  # no worker is there
    spec = tiny_spec(add_dataset(sentences(40, 1)), teacher={"kind": "embedding"}, labels=TOPICS)
    for measure in (False, True):
        assert client.post("/jobs", json=spec, params={"dry_run": True, "measure": measure}).status_code == 200
    assert [(entry.action, entry.outcome, entry.object_id) for entry in entries()] == [
        ("measure_teacher", "done", None)
    ]


def test_every_route_that_changes_something_is_recorded_also_when_it_is_refused(database: Engine) -> None:
    client = TestClient(create_app(), headers={"Authorization": f"Bearer {new_key('alice', scope='admin')}"})
    paths = client.get("/openapi.json").json()["paths"]
    changing = [
        (method, path)
        for method, path in routes()
        if method not in audit.SAFE and paths[path][method.lower()]["x-scope"] != "read"
    ]
    assert len(changing) >= 12
    for method, path in changing:
        before = len(entries())
        client.request(method, re.sub(r"\{\w+\}", "some_id", path), content=b"{}")
        assert len(entries()) == before + 1, (method, path)


def test_a_flood_of_denied_requests_does_not_fill_the_log(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_denied", audit._Allowance(3))
    statuses = {client.get("/jobs", headers={"Authorization": "Bearer us_wrong"}).status_code for _ in range(9)}
    assert statuses == {401}
    assert len(entries()) <= 6, "three a minute, and a minute may begin in between"


def test_what_a_stranger_asks_for_neither_hides_a_row_nor_steers_the_terminal_that_shows_it(database: Engine) -> None:
    """Behind a proxy that is trusted, an address is what X-Forwarded-For says."""
    admin = {"Authorization": f"Bearer {new_key('alice', scope='admin')}"}
    with TestClient(create_app(), client=("\x1b[2J" * 50, 1)) as stranger:
        assert stranger.delete("/jobs/x%1b%5d0;title%07%1b%5b2J%0aforged").status_code == 401
        assert stranger.post("/keys", json={"name": "\x1b[2J\u202e"}, headers=admin).status_code == 201
    denied, made = entries()
    assert (denied.action, denied.object_id) == ("delete_job", "x]0;title[2Jforged")
    assert made.action == "create_key"
    for command in (["audit"], ["keys", "list"]):
        shown = CliRunner().invoke(cli.app, command).output
        assert "�[2J" in shown
        assert not set(shown) & {"\x1b", "\x07", "\u202e"}


def test_no_secret_stands_in_the_log(database: Engine) -> None:
    key = new_key("alice", scope="admin")
    client = TestClient(create_app(), headers={"Authorization": f"Bearer {key}"})
    made = client.post("/keys", json={"name": "a name that tells"}).json()
    secret = client.post("/webhooks/secret/rotate", json={}).json()["secret"]
    client.get("/jobs", headers={"Authorization": "Bearer us_a-guess-that-might-be-close"})
    with session_scope() as session:
        written = str(session.execute(text("SELECT * FROM audit_log")).all())
    assert made["id"] in written
    for hidden in (key, made["key"], secret, "a-guess", "a name that tells"):
        assert hidden not in written


def test_a_row_can_neither_be_changed_nor_taken_out_but_old_ones_can_be_pruned(client: TestClient) -> None:
    client.post("/jobs", json={})
    for statement in ("UPDATE audit_log SET outcome = 'done'", "DELETE FROM audit_log"):
        with pytest.raises(DatabaseError, match="only added to"), session_scope() as session:
            session.execute(text(statement))
    assert len(entries()) == 1
    with session_scope() as session:
        session.execute(text("SET LOCAL understudy.prune_audit_log = on"))
        session.execute(text("DELETE FROM audit_log WHERE at < now() - interval '1 year'"))
    assert len(entries()) == 1
    with session_scope() as session:
        session.execute(text("SET LOCAL understudy.prune_audit_log = on"))
        session.execute(text("DELETE FROM audit_log"))
    assert entries() == []


def test_the_command_line_records_what_it_does_to_keys_and_shows_the_log(database: Engine) -> None:
    run = CliRunner().invoke
    made = run(cli.app, ["keys", "create", "alice", "--scope", "read", "--limit", "max_stored_bytes=none"])
    assert made.exit_code == 0, made.output
    key_id = entries()[0].object_id
    assert key_id is not None
    assert run(cli.app, ["keys", "limit", key_id, "max_requests_per_minute=10"]).exit_code == 0
    assert run(cli.app, ["keys", "rotate", key_id, "--grace-hours", "1"]).exit_code == 0
    assert run(cli.app, ["keys", "revoke", key_id]).exit_code == 0
    assert [entry.action for entry in entries()] == ["create_key", "limit_key", "rotate_key", "revoke_key"]
    assert {(entry.tenant, entry.object_id, entry.address) for entry in entries()} == {
        ("alice", key_id, "command line")
    }
    shown = run(cli.app, ["audit", "--tenant", "alice", "--json"]).output
    assert len(re.findall(r'"action": "\w+_key"', shown)) == 4
    assert run(cli.app, ["audit", "--denied", "--json"]).output == ""
    for mistake in (["keys", "rotate", key_id], ["keys", "rotate", "key_0"], ["keys", "limit", key_id, "max_jobs=1"]):
        refused = run(cli.app, mistake)
        assert refused.exit_code == 1, mistake
        assert "error: " in refused.output
