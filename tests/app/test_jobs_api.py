"""Jobs over HTTP: accepted, found again, steered, watched; and what a dry run tells."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
import redis
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event, func, text, update
from sqlalchemy.exc import OperationalError

from app import db, lifecycle, overview, queue
from app.api import polls
from app.config import Endpoint, settings
from app.db import session_scope
from app.embedded import free_port
from app.main import create_app
from app.models import ApiKey, Job
from tests.support import (
    add_dataset,
    in_threads,
    label,
    new_key,
    run,
    sentences,
    stored,
    submit,
    tiny_spec,
    wait_until,
)

LABELS = ["cooking", "sports", "weather"]


@pytest.fixture
def dataset_id(database: Engine) -> str:
    return add_dataset(sentences(12, 1))


@pytest.fixture
def finished(database: Engine, client: TestClient) -> dict[str, Any]:
    """A job that has succeeded."""
    job_id = submit(tiny_spec(add_dataset(sentences(30, 1)), training={"epochs": 2, "batch_size": 4}))
    run(job_id)
    return client.get(f"/jobs/{job_id}").json()


def move(client: TestClient, job_id: str, verb: str) -> httpx.Response:
    return client.post(f"/jobs/{job_id}/{verb}")


# --- starting a job -------------------------------------------------------------------------------------------------


def test_a_whole_spec_is_accepted_and_given_back(client: TestClient, dataset_id: str) -> None:
    spec = {
        "dataset_id": dataset_id,
        "validation_dataset_id": add_dataset(sentences(6, 2)),
        "test_dataset_id": add_dataset(sentences(6, 3)),
        "name": "a whole spec",
        "labels": [{"name": "cooking", "description": "food"}, "sports", {"name": "weather"}],
        "teacher": {"kind": "embedding", "examples": [{"text": "a soup", "label": "cooking"}]},
        "student": {"model": "scratch", "max_length": 64},
        "method": {"kind": "llkd", "weighted": True, "momentum": 0.5},
        "training": {"epochs": 3, "batch_size": 64, "learning_rate": 2e-5, "seed": 7},
        "budget": {"max_labeled_rows": 50000, "max_teacher_tokens": None, "max_seconds": None},
        "metadata": {"team": "support"},
    }
    answer = client.post("/jobs", json=spec)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) > 0
    assert job["id"].startswith("job_")
    assert (job["status"], job["is_terminal"], job["phase"], job["progress"]) == ("queued", False, None, 0.0)
    assert (job["attempt"], job["error"], job["selection"], job["best_checkpoint_id"]) == (0, None, None, None)
    assert (job["name"], job["method"], job["metadata"]) == ("a whole spec", "llkd", {"team": "support"})
    assert datetime.fromisoformat(job["created_at"]).utcoffset() == timedelta(0)
    assert (job["started_at"], job["finished_at"], job["eta_seconds"]) == (None, None, None)
    assert job["phases"] == [{"name": "labeling", "started_at": None, "finished_at": None, "done": 0, "total": 24}]
    given = job["spec"]
    assert given["labels"][1] == {"name": "sports", "description": None}
    assert given["method"]["momentum"] == 0.5
    assert given["training"]["seed"] == 7
    assert client.get(f"/jobs/{job['id']}").json() == job


def test_a_finished_job_tells_everything_the_contract_names(finished: dict[str, Any]) -> None:
    assert (finished["status"], finished["is_terminal"], finished["progress"]) == ("succeeded", True, 1.0)
    assert finished["eta_seconds"] is None
    assert set(finished["selection"]) == {"seen", "selected", "ratio", "epochs"}
    assert finished["best_checkpoint_id"].startswith("ckpt_")
    assert finished["created_at"] <= finished["started_at"] <= finished["finished_at"]
    for phase in finished["phases"]:
        assert phase["started_at"] <= phase["finished_at"]


def test_an_accepted_job_is_announced_to_the_workers(client: TestClient, dataset_id: str) -> None:
    job_id = client.post("/jobs", json=tiny_spec(dataset_id)).json()["id"]
    with redis.Redis.from_url(settings().redis_url) as broker:
        messages = [json.loads(entry) for entry in broker.lrange("label", 0, -1)]
    assert len(messages) == 1
    assert job_id in messages[0]["headers"]["argsrepr"]


def test_a_job_is_accepted_while_the_broker_is_away_and_swept_up_later(
    client: TestClient, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(settings(), "redis_url", f"redis://127.0.0.1:{free_port()}/0")
        queue.producer.cache_clear()
        answer = client.post("/jobs", json=tiny_spec(dataset_id))
        queue.producer.cache_clear()
    assert answer.status_code == 202
    with redis.Redis.from_url(settings().redis_url) as broker:
        assert broker.llen("label") == 0
        with session_scope() as session:
            session.execute(text("UPDATE jobs SET enqueued_at = now() - interval '1 hour'"))
            assert lifecycle.sweep(session, {queue.LABEL, queue.TRAIN}) == 1
        assert broker.llen("label") == 1
    assert run(answer.json()["id"]).status == "succeeded"


# --- a dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_what_the_cache_lacks_and_stores_nothing(client: TestClient) -> None:
    rows, test = sentences(30, 1, labeled=False), sentences(9, 2)
    spec = tiny_spec(
        add_dataset(rows), test_dataset_id=add_dataset(test), teacher={"kind": "embedding"}, labels=LABELS,
        budget={"max_labeled_rows": 20},
    )  # fmt: skip
    before = stored()
    answer = client.post("/jobs?dry_run=true", json=spec)
    assert answer.status_code == 200
    cold = answer.json()
    assert stored() == before
    assert (cold["rows"], cold["rows_to_label"], cold["rows_cached"]) == (30, 29, 0)
    assert cold["teacher_tokens"] == sum(len(row["text"]) for row in rows[:20] + test) // 4
    assert cold["estimated_seconds"] > 0
    assert (cold["estimate_basis"], cold["labels"]) == ("default_rates", LABELS)

    label(submit(spec))
    warm = client.post("/jobs?dry_run=true", json=spec).json()
    assert (warm["rows_to_label"], warm["rows_cached"], warm["teacher_tokens"]) == (0, 29, 0)
    assert warm["estimated_seconds"] < cold["estimated_seconds"]
    whole = client.post("/jobs?dry_run=true", json=spec | {"budget": {}}).json()
    assert (whole["rows_to_label"], whole["rows_cached"]) == (10, 29)


def test_a_dry_run_counts_the_examples_that_a_prompt_shows_and_the_rows_that_a_budget_leaves(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "endpoints", {"tiny": Endpoint(base_url="http://127.0.0.1:9/v1", model="tiny")})
    examples = [{"text": row["text"], "label": row["label"]} for row in sentences(60, 5)]
    dataset = add_dataset(sentences(30, 1, labeled=False))

    def told(shown: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
        teacher = {"kind": "endpoint", "endpoint": "tiny", "examples": shown, **changes.pop("teacher", {})}
        spec = tiny_spec(dataset, teacher=teacher, labels=LABELS, method={"kind": "random"}, **changes)
        answer: dict[str, Any] = client.post("/jobs?dry_run=true&measure=false", json=spec).json()
        return answer

    few = {"few_shot": {"count": 6}}
    assert told(examples, teacher=few)["teacher_tokens"] == pytest.approx(
        told(examples[:6])["teacher_tokens"], rel=0.05
    )
    assert told(examples[:3], teacher=few)["teacher_tokens"] == told(examples[:3])["teacher_tokens"]

    half = told([], budget={"max_labeled_rows": 15})
    assert half["training_seconds"] == pytest.approx(told([])["training_seconds"] / 2, abs=0.06)


def test_a_dry_run_of_the_datasets_own_labels_costs_no_tokens(client: TestClient, dataset_id: str) -> None:
    told = client.post("/jobs?dry_run=true", json=tiny_spec(dataset_id)).json()
    assert (told["rows_to_label"], told["rows_cached"], told["teacher_tokens"]) == (12, 0, 0)


# --- lists ----------------------------------------------------------------------------------------------------------


def listed(client: TestClient, **query: Any) -> list[str]:
    """The ids of every page."""
    ids: list[str] = []
    after = None
    while True:
        page = client.get("/jobs", params=query | ({"after": after} if after else {})).json()
        assert len(page["data"]) <= query.get("limit", 20)
        ids += [job["id"] for job in page["data"]]
        after = page["next"]
        assert page["has_more"] == (after is not None)
        if after is None:
            return ids


def test_pages_of_jobs_have_neither_gaps_nor_overlaps_while_new_ones_arrive(
    client: TestClient, dataset_id: str
) -> None:
    jobs = [submit(tiny_spec(dataset_id)) for _ in range(7)]
    for limit in (1, 3, 7, 8, 100):
        assert listed(client, limit=limit) == sorted(jobs, reverse=True)
    first = client.get("/jobs", params={"limit": 3}).json()
    submit(tiny_spec(dataset_id))
    second = client.get("/jobs", params={"limit": 3, "after": first["next"]}).json()
    assert [job["id"] for job in first["data"] + second["data"]] == sorted(jobs, reverse=True)[:6]


def test_jobs_are_found_by_status_method_and_metadata(client: TestClient, dataset_id: str) -> None:
    random = submit(tiny_spec(dataset_id, method={"kind": "random"}, metadata={"team": "a", "run": "1"}))
    plain = submit(tiny_spec(dataset_id, metadata={"team": "a", "run": "2"}))
    bare = submit(tiny_spec(dataset_id))
    move(client, plain, "cancel")
    assert set(listed(client)) == {random, plain, bare}
    assert set(listed(client, status="queued")) == {random, bare}
    assert listed(client, status="cancelled") == [plain]
    assert listed(client, method="random") == [random]
    assert set(listed(client, **{"metadata[team]": "a"})) == {random, plain}
    assert listed(client, **{"metadata[team]": "a", "metadata[run]": "2"}) == [plain]
    assert listed(client, **{"metadata[team]": "b"}) == []
    assert listed(client, **{"metadata[team]": "a\x00"}) == []
    assert listed(client, method="random", status="cancelled") == []


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "status=done", "after=%00", "method=a-b"])
def test_a_query_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    answer = client.get(f"/jobs?{query}")
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["message"]


# --- steering -------------------------------------------------------------------------------------------------------


def test_a_job_is_paused_resumed_cancelled_and_retried_over_http(client: TestClient, dataset_id: str) -> None:
    job_id = submit(tiny_spec(dataset_id))
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled"), ("retry", "queued")):
        answer = move(client, job_id, verb)
        assert (answer.status_code, answer.json()["status"]) == (202, status)
        assert client.get(f"/jobs/{job_id}").json()["status"] == status
    assert run(job_id).status == "succeeded"


def test_an_illegal_move_is_a_conflict_that_says_why(client: TestClient, finished: dict[str, Any]) -> None:
    for verb in ("cancel", "pause", "resume", "retry"):
        answer = move(client, finished["id"], verb)
        assert (answer.status_code, answer.json()["code"]) == (409, "illegal_move")
        assert "succeeded" in answer.json()["detail"]


def test_two_clients_that_cancel_at_once_cancel_once(client: TestClient, dataset_id: str) -> None:
    job_id = submit(tiny_spec(dataset_id))
    answers = in_threads(4, lambda number: move(client, job_id, "cancel").status_code)
    assert answers == [202] * 4
    types = [event["type"] for event in client.get(f"/jobs/{job_id}/events").json()["data"]]
    assert types.count("job.cancelled") == 1


# --- events ---------------------------------------------------------------------------------------------------------


def test_events_are_paged_by_the_last_seq_seen(client: TestClient, finished: dict[str, Any]) -> None:
    path = f"/jobs/{finished['id']}/events"
    everything = client.get(path).json()
    assert (everything["has_more"], everything["next"]) == (False, None)
    assert [event["seq"] for event in everything["data"]] == list(range(1, len(everything["data"]) + 1))
    seen, after = [], 0
    while after is not None:
        page = client.get(path, params={"limit": 4, "after": after}).json()
        seen += page["data"]
        after = page["next"]
    assert seen == everything["data"]
    assert client.get(path, params={"after": 10_000}).json()["data"] == []
    types = [event["type"] for event in seen]
    assert (types[0], types[-1]) == ("job.queued", "job.succeeded")


@pytest.fixture
def server(database: Engine) -> Iterator[httpx.Client]:
    """The API behind a real socket."""
    config = uvicorn.Config(create_app(), host="127.0.0.1", port=free_port(), log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started, what="uvicorn")
    headers = {"Authorization": f"Bearer {new_key('alice')}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{config.port}", headers=headers, timeout=10) as client:
        yield client
    server.should_exit = True
    thread.join()


def streamed(server: httpx.Client, job_id: str, **headers: str) -> Iterator[dict[str, Any]]:
    """The events of a stream until the server closes it."""
    with server.stream("GET", f"/jobs/{job_id}/events", headers={"Accept": "text/event-stream", **headers}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if not line and fields:
                yield {"id": fields["id"], "event": fields["event"], "data": json.loads(fields["data"])}
                fields = {}
            elif line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value


def test_a_stream_of_a_finished_job_replays_everything_and_closes(server: httpx.Client) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    with session_scope() as session:
        for number in range(250):
            lifecycle.emit(session, job_id, "test", f"event {number}", number=number)
        lifecycle.cancel(session, session.get_one(Job, job_id))
    pages = server.get(f"/jobs/{job_id}/events", params={"limit": 100, "after": 0}).json()["data"]
    events = list(streamed(server, job_id))
    assert [event["data"] for event in events[:100]] == pages
    assert [int(event["id"]) for event in events] == list(range(1, 253))
    assert events[-1]["event"] == "job.cancelled"
    rest = list(streamed(server, job_id, **{"Last-Event-ID": "250"}))
    assert [int(event["id"]) for event in rest] == [251, 252]


def test_a_live_stream_tells_what_happens_and_closes_at_the_end(server: httpx.Client) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    stream = streamed(server, job_id)
    assert next(stream)["event"] == "job.queued"
    with session_scope() as session:
        lifecycle.pause(session, session.get_one(Job, job_id))
    assert next(stream)["event"] == "job.paused"
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
    assert [event["event"] for event in stream] == ["job.cancelled"]


def test_streams_at_once_are_limited_and_one_that_is_closed_makes_room(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "max_streams_at_once", 2)
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    first, second = streamed(server, job_id), streamed(server, job_id)
    assert next(first)["event"] == next(second)["event"] == "job.queued"

    def ask() -> httpx.Response:
        path, accept = f"/jobs/{job_id}/events", {"Accept": "text/event-stream"}
        with server.stream("GET", path, headers=accept) as answer:
            if answer.status_code != 200:
                answer.read()
            return answer

    refused = ask()
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_streams")
    assert refused.headers["retry-after"]
    first.close()
    wait_until(lambda: ask().status_code == 200, what="the server notices that a stream was closed")
    second.close()


@pytest.mark.parametrize("column", ["revoked_at", "expires_at"])
def test_a_live_stream_ends_soon_after_its_key(server: httpx.Client, column: str) -> None:
    stream = streamed(server, submit(tiny_spec(add_dataset(sentences(12, 1)))))
    assert next(stream)["event"] == "job.queued"
    with session_scope() as session:
        session.execute(update(ApiKey).values({column: func.now()}))
    assert list(stream) == []


# --- metrics and samples --------------------------------------------------------------------------------------------


def test_metrics_are_narrowed_by_name_and_step(client: TestClient, finished: dict[str, Any]) -> None:
    path = f"/jobs/{finished['id']}/metrics"
    everything = client.get(path).json()
    names = [entry["name"] for entry in everything["data"]]
    assert names == sorted(names) == everything["names"]
    assert {"train_loss", "learning_rate", "seen", "selected", "ratio", "epoch_ratio", "validation_macro_f1"} <= set(
        names
    )
    losses = next(entry for entry in everything["data"] if entry["name"] == "train_loss")["points"]
    steps = [point["step"] for point in losses]
    assert steps == sorted(set(steps))
    some = client.get(path, params={"name": ["train_loss", "ratio"], "from_step": steps[2], "to_step": steps[4]}).json()
    assert [entry["name"] for entry in some["data"]] == ["ratio", "train_loss"]
    assert some["data"][1]["points"] == losses[2:5]
    assert some["names"] == names
    assert client.get(path, params={"name": "no such series"}).json()["data"] == []
    assert client.get(path, params={"from_step": -1}).status_code == 422


def samples(client: TestClient, job_id: str, **query: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after: str | None = "0"
    while after is not None:
        page = client.get(f"/jobs/{job_id}/samples", params={"limit": 7, **query, "after": after}).json()
        rows += page["data"]
        after = page["next"]
        assert page["has_more"] == (after is not None)
    return rows


def test_samples_are_filtered_ordered_and_paged(client: TestClient) -> None:
    rows = [row | {"confidence": 0.5 + (number % 5) / 10} for number, row in enumerate(sentences(30, 1))]
    rows[8] = {"text": "nobody knows"}
    job_id = submit(tiny_spec(add_dataset(rows), method={"kind": "llkd"}, training={"epochs": 2, "batch_size": 6}))
    assert run(job_id).status == "succeeded"
    everything = samples(client, job_id)
    assert [row["row"] for row in everything] == list(range(30))
    assert everything[0]["distribution"] == pytest.approx({"cooking": 0.5, "sports": 0.25, "weather": 0.25}, abs=1e-6)
    assert everything[0]["line"] == 1
    for decision in ("selected", "rejected"):
        expected = [row for row in everything if row["decision"] == decision]
        assert expected
        assert samples(client, job_id, decision=decision) == expected
    assert samples(client, job_id, label="sports") == [row for row in everything if row["label"] == "sports"]
    both = samples(client, job_id, label="sports", decision="rejected")
    assert both == [row for row in everything if row["label"] == "sports" and row["decision"] == "rejected"]
    for field in ("confidence", "student_uncertainty", "selected"):
        known = [row for row in everything if row[field] is not None]
        unknown = [row for row in everything if row[field] is None]
        for sign in (1, -1):
            expected = sorted(known, key=lambda row: (sign * row[field], row["row"])) + unknown
            assert samples(client, job_id, order=field if sign == 1 else f"-{field}") == expected, field
    assert samples(client, job_id, order="-row") == everything[::-1]
    assert client.get(f"/jobs/{job_id}/samples", params={"order": "text"}).status_code == 422


def test_samples_of_a_job_that_has_not_trained_yet_are_not_ready(client: TestClient, dataset_id: str) -> None:
    answer = client.get(f"/jobs/{submit(tiny_spec(dataset_id))}/samples")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_ready")


def test_a_job_says_how_far_it_is_while_it_runs(client: TestClient, dataset_id: str) -> None:
    job_id = submit(tiny_spec(dataset_id))
    assert "retry-after" in client.get(f"/jobs/{job_id}").headers
    label(job_id)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["phase"], job["progress"]) == ("running", "training", 0.25)
    assert job["eta_seconds"] >= 0
    assert run(job_id).status == "succeeded"
    assert "retry-after" not in client.get(f"/jobs/{job_id}").headers


def test_the_status_page_and_the_figures_are_open(client: TestClient, dataset_id: str) -> None:
    submit(tiny_spec(dataset_id))
    client.headers.pop("Authorization")
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["checks"] == {"database": "ok", "broker": "ok"}
    figures = client.get("/metrics").text
    assert 'understudy_jobs{status="queued"} 1.0' in figures
    assert float(figures.partition("\nunderstudy_longest_wait_seconds ")[2].split()[0]) > 0


def test_a_poll_with_a_key_that_was_just_used_is_one_statement_and_no_transaction(
    client: TestClient, dataset_id: str
) -> None:
    path = f"/jobs/{submit(tiny_spec(dataset_id))}"
    client.get(path)
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        asked.append(statement)

    engines = (db.engine(), db.reader())
    for engine in engines:
        event.listen(engine, "before_cursor_execute", note)
    try:
        polled = client.get(path)
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", note)
    assert polled.status_code == 200
    assert len(asked) == 1, asked
    assert polled.json() == client.get("/jobs").json()["data"][0]


def test_polls_that_wait_together_are_answered_by_one_statement_each_with_its_own_job(
    client: TestClient, dataset_id: str
) -> None:
    jobs = [submit(tiny_spec(dataset_id)) for _ in range(3)]
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        asked.append(statement)

    async def poll() -> list[polls.Written | None]:
        together = polls.Polls()
        return await asyncio.gather(*(together.look(job_id) for job_id in [*jobs * 10, "job_none", "\udc80 \x00"]))

    event.listen(db.reader(), "before_cursor_execute", note)
    try:
        *found, unknown, odd = asyncio.run(poll())
    finally:
        event.remove(db.reader(), "before_cursor_execute", note)
    assert [json.loads(written.body)["id"] for written in found if written] == jobs * 10
    assert (unknown, odd) == (None, None)
    assert len(asked) == 1


def test_a_database_that_is_away_is_told_to_every_poll_that_waited_and_the_next_one_asks_anew(
    client: TestClient, dataset_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = submit(tiny_spec(dataset_id))

    async def poll(together: polls.Polls) -> list[Any]:
        return await asyncio.gather(*(together.look(job_id) for _ in range(3)), return_exceptions=True)

    async def twice() -> tuple[list[Any], list[Any]]:
        together = polls.Polls()
        with monkeypatch.context() as patched:
            patched.setattr(overview, "show", away)
            failed = await poll(together)
        return failed, await poll(together)

    def away(*_: object) -> None:
        raise OperationalError("SELECT", None, Exception("connection refused"))

    failed, answered = asyncio.run(twice())
    assert [type(error) for error in failed] == [OperationalError] * 3
    assert [json.loads(written.body)["id"] for written in answered] == [job_id] * 3


def test_polls_and_streams_survive_connections_that_the_server_has_cut(
    client: TestClient, dataset_id: str, database: Engine
) -> None:
    path = f"/jobs/{submit(tiny_spec(dataset_id))}"
    assert client.get(path).status_code == 200
    with database.connect() as connection:
        connection.execute(
            text("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'")
        )  # fmt: skip
    assert client.get(path).status_code == 200
    assert client.get(f"{path}/events").json()["data"]
