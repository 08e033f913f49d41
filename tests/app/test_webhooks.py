"""Webhooks: every end of a job is told, signed, until it is taken; and never to an address that is not public."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from sqlalchemy import Engine, func, select, text
from standardwebhooks import Webhook, WebhookVerificationError

from app import comparisons, lifecycle, webhooks
from app.config import settings
from app.db import engine, session_scope
from app.errors import InvalidSpec
from app.models import Job, WebhookDelivery, new_id, now
from app.options import ComparisonSpec, JobSpec
from app.storage import Storage
from tests.support import add_dataset, in_threads, run, sentences, submit, tiny_spec, wait_until

PUBLIC = "93.184.215.14"


class Receiver:
    """A web server in a thread that keeps what it is sent and answers as told, 204 when nothing is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.gate = threading.Event()
        self.gate.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
                receiver.gate.wait(20)
                status, headers, answer = receiver.answers.pop(0) if receiver.answers else (204, {}, b"")
                self.send_response(status)
                for name, value in {"content-length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook?a=1"

    @property
    def payloads(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]


@pytest.fixture
def receiver(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver on this machine, and a service that may call it."""
    monkeypatch.setattr(settings(), "webhook_allow_private", True)
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.gate.set()
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


class Names:
    """The outside world's DNS: each look-up of the name `hook.test` takes the next answer, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.answers, self.asked = list(answers), 0
        real = socket.getaddrinfo

        def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            if host != "hook.test":
                return real(host, port, *args, **kwargs)
            self.asked += 1
            address = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def job_with(url: str, tenant: str = "alice") -> str:
    return submit(tiny_spec(add_dataset(sentences(6, 1), tenant), webhook={"url": url}), tenant)


def ended(url: str, tenant: str = "alice") -> str:
    """A job that was cancelled; its id."""
    job_id = job_with(url, tenant)
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
    return job_id


def deliveries(job_id: str) -> list[WebhookDelivery]:
    with session_scope() as session:
        query = select(WebhookDelivery).where(WebhookDelivery.job_id == job_id).order_by(WebhookDelivery.id)
        return list(session.scalars(query))


def make_due() -> None:
    """Let the time until the next attempt have passed."""
    with session_scope() as session:
        session.execute(text("UPDATE webhook_deliveries SET next_attempt_at = now() - interval '1 s'"))


def wait_of(job_id: str) -> float:
    """Seconds until the next attempt, by PostgreSQL's clock."""
    with session_scope() as session:
        wait = select(func.extract("epoch", WebhookDelivery.next_attempt_at - func.now()))
        return float(session.scalars(wait.where(WebhookDelivery.job_id == job_id)).one())


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_a_call_carries_a_signature_that_the_tenants_secret_verifies_and_no_other(
    client: TestClient, receiver: Receiver
) -> None:
    job_id = ended(receiver.url)
    assert webhooks.deliver() == 1
    (headers, body), (row,) = receiver.requests[0], deliveries(job_id)
    secret = client.get("/webhooks/secret").json()["secret"]
    payload = Webhook(secret).verify(body, headers)
    assert payload == {
        "type": "job.cancelled", "timestamp": payload["timestamp"], "data": {"id": job_id, "status": "cancelled"}
    }  # fmt: skip
    assert (headers["webhook-id"], headers["content-type"]) == (row.id, "application/json")
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 44).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body.replace(b"cancelled", b"succeeded"), headers)


def test_for_a_grace_period_a_call_is_signed_with_the_new_secret_and_the_one_before(
    client: TestClient, other_client: TestClient, receiver: Receiver
) -> None:
    old, other = (asks.get("/webhooks/secret").json()["secret"] for asks in (client, other_client))
    rotated = client.post("/webhooks/secret/rotate", json={"grace_hours": 1})
    assert rotated.status_code == 201
    new = rotated.json()["secret"]
    assert new == client.get("/webhooks/secret").json()["secret"] != old
    assert other_client.get("/webhooks/secret").json()["secret"] == other, "another tenant's stays"
    ended(receiver.url)
    assert webhooks.deliver() == 1
    headers, body = receiver.requests[0]
    assert len(headers["webhook-signature"].split()) == 2
    for secret in (old, new):
        Webhook(secret).verify(body, headers)
    with session_scope() as session:
        session.execute(text("UPDATE webhook_secrets SET previous_until = now() WHERE tenant = 'alice'"))
    ended(receiver.url)
    assert webhooks.deliver() == 1
    headers, body = receiver.requests[1]
    Webhook(new).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(old).verify(body, headers)


def test_a_secret_that_has_leaked_is_rotated_without_grace(client: TestClient, receiver: Receiver) -> None:
    leaked = client.get("/webhooks/secret").json()["secret"]
    client.post("/webhooks/secret/rotate", json={"grace_hours": 0})
    ended(receiver.url)
    assert webhooks.deliver() == 1
    headers, body = receiver.requests[0]
    with pytest.raises(WebhookVerificationError):
        Webhook(leaked).verify(body, headers)


def test_a_secret_is_made_once_per_tenant_whoever_asks_first(client: TestClient, other_client: TestClient) -> None:
    secrets = {answer.json()["secret"] for answer in in_threads(8, lambda _: client.get("/webhooks/secret"))}
    assert len(secrets) == 1
    assert other_client.get("/webhooks/secret").json()["secret"] not in secrets


def test_every_end_of_a_job_makes_one_call_and_an_end_after_a_retry_another(receiver: Receiver) -> None:
    job_ids = [job_with(receiver.url) for _ in range(3)]
    with session_scope() as session:
        lifecycle.finish(session, session.get_one(Job, job_ids[0]))
        lifecycle.fail(session, job_ids[1], "labeling_failed", "The teacher broke.")
        lifecycle.cancel(session, session.get_one(Job, job_ids[2]))
    with session_scope() as session:  # what comes too late ends nothing again
        lifecycle.fail(session, job_ids[1], "labeling_failed", "The teacher broke.")
        lifecycle.cancel(session, session.get_one(Job, job_ids[2]))
    assert [[row.type for row in deliveries(job_id)] for job_id in job_ids] == [
        ["job.succeeded"], ["job.failed"], ["job.cancelled"],
    ]  # fmt: skip
    assert webhooks.deliver() == 3
    assert webhooks.deliver() == 0
    assert {payload["data"]["id"]: payload["type"] for payload in receiver.payloads} == {
        job_ids[0]: "job.succeeded", job_ids[1]: "job.failed", job_ids[2]: "job.cancelled",
    }  # fmt: skip
    with session_scope() as session:
        lifecycle.retry(session, session.get_one(Job, job_ids[1]))
        lifecycle.cancel(session, session.get_one(Job, job_ids[1]))
    assert [row.type for row in deliveries(job_ids[1])] == ["job.failed", "job.cancelled"]


def test_a_job_that_a_worker_finishes_is_told_and_its_checkpoint_does_not_name_the_url(
    receiver: Receiver, storage: Storage
) -> None:
    url = f"{receiver.url}&secret=pl9GhJ"
    job = run(submit(tiny_spec(add_dataset(sentences(12, 1)), webhook={"url": url})))
    assert (job.status, webhooks.deliver()) == ("succeeded", 1)
    assert receiver.payloads[0]["data"] == {"id": job.id, "status": "succeeded"}
    with storage.open(f"checkpoints/{job.best_checkpoint_id}.tar") as stream, tarfile.open(fileobj=stream) as tar:
        texts = {name: tar.extractfile(name).read() for name in ("README.md", "metrics.json")}  # type: ignore[union-attr]
    assert all(job.id.encode() in text and b"pl9GhJ" not in text for text in texts.values())


def compared(url: str) -> tuple[str, list[str]]:
    """A comparison of two arms with one seed, and its runs."""
    train, test = (add_dataset(sentences(6, seed)) for seed in (1, 3))
    spec = tiny_spec(train, test_dataset_id=test, seeds=[0], webhook={"url": url})
    arms = [{"name": name, "method": {"kind": name}} for name in ("random", "no_selection")]
    del spec["method"]
    with session_scope() as session:
        asked = ComparisonSpec.model_validate(spec | {"arms": arms})
        made = comparisons.submit(session, "alice", comparisons.check(session, "alice", asked, settings()))
        return made.id, [job.id for job in made.jobs]


def test_a_comparison_tells_the_end_of_its_last_run_and_its_runs_tell_nothing(
    client: TestClient, receiver: Receiver
) -> None:
    comparison_id, runs = compared(receiver.url)
    client.post(f"/jobs/{runs[0]}/cancel")
    assert webhooks.deliver() == 0
    run(runs[1])
    assert webhooks.deliver() == 1
    (payload,) = receiver.payloads
    assert payload["type"] == "comparison.succeeded"
    assert payload["data"] == {"id": comparison_id, "status": "succeeded"}
    (call,) = client.get(f"/comparisons/{comparison_id}/deliveries").json()["data"]
    assert (call["status"], call["comparison_id"], call["job_id"]) == ("delivered", comparison_id, None)
    assert client.delete(f"/comparisons/{comparison_id}").status_code == 204
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(WebhookDelivery)) == 0


def test_of_two_runs_that_end_at_the_same_moment_one_tells_the_end_of_the_comparison(receiver: Receiver) -> None:
    for _ in range(3):
        _, runs = compared(receiver.url)

        def end(number: int, runs: list[str] = runs) -> None:
            with session_scope() as session:
                lifecycle.cancel(session, session.get_one(Job, runs[number]))

        assert in_threads(2, end) == [None, None]
        assert webhooks.deliver() == 1
    assert {payload["type"] for payload in receiver.payloads} == {"comparison.cancelled"}


def test_a_comparison_that_would_be_told_inside_is_refused_at_post(client: TestClient) -> None:
    spec = tiny_spec(add_dataset(sentences(6, 1)), test_dataset_id=add_dataset(sentences(6, 3)))
    arms = [{"name": name, "method": {"kind": name}} for name in ("random", "no_selection")]
    spec |= {"arms": arms, "webhook": {"url": "http://127.0.0.1:9/hook"}}
    del spec["method"]
    answer = client.post("/comparisons", json=spec)
    assert answer.status_code == 422
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [("/webhook/url", "webhook_not_public")]  # fmt: skip


def test_an_end_that_is_rolled_back_calls_nobody(receiver: Receiver) -> None:
    job_id = job_with(receiver.url)
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
        session.rollback()
    assert deliveries(job_id) == []


def test_a_job_without_a_webhook_calls_nobody(database: Engine) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
    assert deliveries(job_id) == []


# --- again, until it is taken ---------------------------------------------------------------------------------------


def test_a_refused_call_is_made_again_under_the_same_id_with_a_fresh_signature(
    client: TestClient, receiver: Receiver
) -> None:
    receiver.answers = [(500, {}, b"out of \x00order " + b"x" * 5000)]
    job_id = ended(receiver.url)
    assert webhooks.deliver() == 1
    (row,) = deliveries(job_id)
    assert (row.status, row.attempts, row.last_status) == ("pending", 1, 500)
    assert row.last_error is not None
    assert row.last_error.startswith("answered 500: out of  order xxx")
    assert len(row.last_error) < 250
    assert 3 < wait_of(job_id) <= 6
    assert webhooks.deliver() == 0, "not yet"
    make_due()
    assert webhooks.deliver() == 1
    (row,) = deliveries(job_id)
    assert (row.status, row.attempts, row.last_status, row.last_error) == ("delivered", 2, 204, None)
    assert row.delivered_at is not None
    assert [headers["webhook-id"] for headers, _ in receiver.requests] == [row.id, row.id]
    secret = client.get("/webhooks/secret").json()["secret"]
    for headers, body in receiver.requests:
        Webhook(secret).verify(body, headers)


def test_the_waits_grow_over_a_day_and_then_the_call_has_failed(receiver: Receiver) -> None:
    receiver.answers = [(503, {}, b"")] * 8
    job_id = ended(receiver.url)
    waits = []
    for _ in range(7):
        make_due()
        assert webhooks.deliver() == 1
        waits.append(wait_of(job_id))
    expected = [5, 300, 1800, 7200, 18_000, 36_000, 36_000]
    for wait, middle in zip(waits, expected, strict=True):
        assert 0.8 * middle - 2 < wait <= 1.2 * middle, waits
    make_due()
    assert webhooks.deliver() == 1
    (row,) = deliveries(job_id)
    assert (row.status, row.attempts, len(receiver.requests)) == ("failed", 8, 8)
    make_due()
    assert webhooks.deliver() == 0


def test_a_redirect_is_a_refusal_and_is_not_followed(receiver: Receiver) -> None:
    receiver.answers = [(307, {"location": receiver.url}, b"")]
    job_id = ended(receiver.url)
    webhooks.deliver()
    (row,) = deliveries(job_id)
    assert (row.status, row.last_status, len(receiver.requests)) == ("pending", 307, 1)


def test_a_receiver_that_is_away_or_says_nothing_is_tried_again_and_holds_up_no_other(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "SEND_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        silent_id = ended(f"http://127.0.0.1:{silent.getsockname()[1]}")
        port = closed.getsockname()[1]
        closed.close()
        away_id, good_id = ended(f"http://127.0.0.1:{port}"), ended(receiver.url)
        assert webhooks.deliver() == 3
    rows = {job_id: deliveries(job_id)[0] for job_id in (silent_id, away_id, good_id)}
    assert [row.status for row in rows.values()] == ["pending", "pending", "delivered"]
    assert rows[silent_id].last_error == "no answer within 0.5 seconds"
    assert str(rows[away_id].last_error).startswith("ConnectError")


def test_an_answer_that_trickles_in_does_not_outlast_the_time_limit(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "webhook_allow_private", True)
    monkeypatch.setattr(webhooks, "SEND_SECONDS", 0.6)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            connection, _ = server.accept()
            with connection:
                while True:
                    try:
                        connection.sendall(b"H")
                    except OSError:
                        return
                    threading.Event().wait(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        job_id = ended(f"http://127.0.0.1:{server.getsockname()[1]}")
        began = now()
        webhooks.deliver()
        thread.join(5)
    assert (now() - began).total_seconds() < 3
    assert deliveries(job_id)[0].status == "pending"


def test_a_call_whose_sender_died_is_made_again_under_the_same_id(receiver: Receiver) -> None:
    job_id = ended(receiver.url)
    with session_scope() as session:
        (lost,) = webhooks.claim(session)  # and nothing more is heard of this sender
    assert webhooks.deliver() == 0, "the claim still holds"
    assert 50 < wait_of(job_id) <= 60
    make_due()
    assert webhooks.deliver() == 1
    assert receiver.requests[0][0]["webhook-id"] == lost.id
    with session_scope() as session:  # it was only slow, and now says that it failed
        webhooks.record(session, lost, webhooks.Outcome(None, "late"))
    (row,) = deliveries(job_id)
    assert (row.status, row.last_error, row.attempts) == ("delivered", None, 2)


def test_a_scheduler_sends_and_what_it_was_sending_when_it_was_killed_is_sent_again(receiver: Receiver) -> None:
    receiver.gate.clear()
    ended(receiver.url)
    environment = {**os.environ, "UNDERSTUDY_WEBHOOK_ALLOW_PRIVATE": "true"}
    command = [sys.executable, "-c", "from app.cli import app; app(['scheduler'])"]
    scheduler = subprocess.Popen(command, env=environment)
    try:
        wait_until(lambda: len(receiver.requests) == 1, 30, "the scheduler calls")
    finally:
        scheduler.kill()
        scheduler.wait()
    receiver.gate.set()
    make_due()
    assert webhooks.deliver() == 1
    first, second = (headers["webhook-id"] for headers, _ in receiver.requests)
    assert first == second


def test_two_schedulers_share_the_calls_and_make_none_twice(receiver: Receiver) -> None:
    job_ids = [ended(receiver.url) for _ in range(6)]
    assert sum(in_threads(4, lambda _: webhooks.deliver())) == 6
    assert sorted(payload["data"]["id"] for payload in receiver.payloads) == sorted(job_ids)


def test_receivers_of_one_tenant_that_hang_hold_up_no_call_of_another(receiver: Receiver) -> None:
    job_ids = [ended(receiver.url) for _ in range(2)] + [ended(receiver.url, "bob")]
    with session_scope() as session:
        [last] = session.scalars(select(WebhookDelivery).where(WebhookDelivery.job_id == job_ids[0]))
        kept = ("tenant", "job_id", "type", "url", "payload")
        values = {name: getattr(last, name) for name in kept} | {"next_attempt_at": func.now() - timedelta(hours=1)}
        session.add_all(WebhookDelivery(id=new_id("whd"), **values) for _ in range(webhooks.BATCH))
    with session_scope() as session:
        tenants = [session.get_one(WebhookDelivery, call.id).tenant for call in webhooks.claim(session)]
    assert sorted(tenants) == ["alice"] * webhooks.BATCH_OF_ONE + ["bob"]


def test_no_transaction_is_open_while_a_call_is_on_its_way(receiver: Receiver) -> None:
    ended(receiver.url)
    receiver.gate.clear()
    thread = threading.Thread(target=webhooks.deliver)
    thread.start()
    try:
        while not receiver.requests:
            assert thread.is_alive()
        with engine().connect() as connection:
            # Raises when anybody still holds a lock on a row.
            rows = connection.execute(text("SELECT id FROM webhook_deliveries FOR UPDATE NOWAIT")).all()
            others = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()"
            assert (len(rows), connection.scalar(text(others))) == (1, 0)
    finally:
        receiver.gate.set()
        thread.join()


# --- the log over HTTP ----------------------------------------------------------------------------------------------


def test_the_log_of_a_job_shows_its_calls_and_one_can_be_made_again(client: TestClient, receiver: Receiver) -> None:
    receiver.answers = [(400, {}, b"no")]
    job_id = ended(receiver.url)
    webhooks.deliver()
    (shown,) = client.get(f"/jobs/{job_id}/deliveries").json()["data"]
    assert shown["last_error"] == "answered 400: no"
    assert {name: shown[name] for name in ("job_id", "type", "url", "status", "attempts", "last_status")} == {
        "job_id": job_id, "type": "job.cancelled", "url": receiver.url, "status": "pending", "attempts": 1, "last_status": 400,
    }  # fmt: skip
    for _ in range(2):
        answer = client.post(f"/webhooks/deliveries/{shown['id']}/redeliver")
        assert (answer.status_code, answer.json()["status"], answer.json()["attempts"]) == (202, "pending", 0)
        assert webhooks.deliver() == 1
        (after,) = client.get(f"/jobs/{job_id}/deliveries").json()["data"]
        assert (after["status"], after["next_attempt_at"], after["last_error"]) == ("delivered", None, None)
    assert [headers["webhook-id"] for headers, _ in receiver.requests] == [shown["id"]] * 3


def test_calls_of_another_tenant_are_not_found(
    client: TestClient, other_client: TestClient, receiver: Receiver
) -> None:
    job_id = ended(receiver.url)
    (row,) = deliveries(job_id)
    assert other_client.get(f"/jobs/{job_id}/deliveries").status_code == 404
    assert other_client.post(f"/webhooks/deliveries/{row.id}/redeliver").status_code == 404
    assert client.get(f"/jobs/{job_id}/deliveries").status_code == 200


# --- never inside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
     "240.0.0.1", "255.255.255.255", "192.0.2.1", "::", "::1", "fe80::1", "fec0::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
     "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused_at_post_without_a_look_up(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(webhooks.RESOLVERS, "submit", lambda *_: pytest.fail("looked up"))
    host = f"[{address}]" if ":" in address else address
    spec = tiny_spec(add_dataset(sentences(6, 1)), webhook={"url": f"https://{host}:8443/x"})
    answer = client.post("/jobs", json=spec)
    assert answer.status_code == 422
    assert [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]] == [("/webhook/url", "webhook_not_public")]  # fmt: skip


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700:4700::1111"])
def test_an_address_on_the_internet_is_public(address: str) -> None:
    assert webhooks.is_public(ip_address(address))


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f.1", "2130706433", "hook.test"])
def test_a_name_that_leads_inside_is_refused_at_post(
    database: Engine, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    Names(monkeypatch, "192.168.0.7")
    with pytest.raises(InvalidSpec, match="private"):
        job_with(f"http://{host}/")


def test_a_name_that_does_not_resolve_yet_or_not_in_time_is_accepted(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job_with("https://no-such-name.invalid/")
    never: Future[Any] = Future()
    monkeypatch.setattr(webhooks, "RESOLVE_SECONDS", 0.05)
    monkeypatch.setattr(webhooks.RESOLVERS, "submit", lambda *_: never)
    assert job_with("https://hook.test/")


def test_names_that_hang_hold_up_few_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RESOLVE_SECONDS", 0.5)
    monkeypatch.setattr(webhooks.RESOLVERS, "submit", lambda *_: Future())

    def seconds(_: int) -> float:
        began = time.monotonic()
        assert not webhooks.leads_inside("https://hangs.test/")
        return time.monotonic() - began

    waited = [took for took in in_threads(20, seconds) if took > 0.4]
    assert len(waited) == webhooks.WAIT_AT_ONCE


def test_a_name_that_is_pointed_inside_after_post_is_refused_when_it_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "webhook_allow_private", False)
    Names(monkeypatch, PUBLIC, "127.0.0.1")
    job_id = ended(f"http://hook.test:{receiver.port}/")
    assert webhooks.deliver() == 1
    (row,) = deliveries(job_id)
    assert row.last_error == "hook.test resolves to a private, loopback, link-local or reserved address"
    assert (row.status, row.last_status, receiver.requests) == ("pending", None, [])


def test_the_address_that_was_checked_is_the_one_that_is_called(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = job_with(f"http://hook.test:{receiver.port}/")
    names = Names(monkeypatch, "127.0.0.1", "127.9.9.9")
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
    webhooks.deliver()
    assert (deliveries(job_id)[0].status, names.asked) == ("delivered", 1)
    assert receiver.requests[0][0]["host"] == f"hook.test:{receiver.port}"


def test_tls_is_asked_for_the_name_and_not_for_the_address(database: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "webhook_allow_private", True)
    Names(monkeypatch, "127.0.0.1")
    hellos: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            connection, _ = server.accept()
            with connection:
                hellos.append(connection.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        ended(f"https://hook.test:{server.getsockname()[1]}/")
        webhooks.deliver()
        thread.join(5)
    assert b"hook.test" in hellos[0]


def test_no_proxy_of_the_environment_is_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    job_id = ended(receiver.url)
    webhooks.deliver()
    assert deliveries(job_id)[0].status == "delivered"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://hook.test/", "begin with"), ("hook.test/x", "begin with"), ("", "begin with"),
        ("https://user:pw@hook.test/", "credentials"), ("https://token@hook.test/", "credentials"),
        ("https://hook.test/#part", "fragment"), ("https://hook.test/#", "fragment"),
        ("https:///x", "no host"), ("https://a b/", "no host"), ("https://[::1", "not a URL"),
        ("https://hook.test:0/", "port"), ("https://hook.test:70000/", "port"),
        ("https://hook.test/" + "x" * 2000, "2000"), ("https://hook.test/\x00", "NUL"),
    ],
)  # fmt: skip
def test_a_url_that_cannot_be_called_is_refused_with_the_reason(url: str, reason: str) -> None:
    spec = tiny_spec("ds_0123456789abcdef0123", webhook={"url": url})
    with pytest.raises(ValidationError, match=reason):
        JobSpec.model_validate(spec)
