"""The endpoint teacher against a server over HTTP: how answers are read, what failures become, what a job tells."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select

from app import lifecycle
from app.config import Endpoint, Settings, settings
from app.db import session_scope
from app.endpoints import Ability
from app.lifecycle import WorkFailed
from app.models import EndpointAbility, Job, JobEvent, LabelCache
from app.options import EndpointTeacher, Example, Label
from app.storage import storage
from tests.faults.processes import ended, fork
from tests.openai_server import (
    ALTERNATIVES,
    ECHO,
    ECHO_AND_ONE,
    FEW_ALTERNATIVES,
    NEW_LENGTH,
    World,
    opinion,
    pieces,
    row_of,
    serving,
)
from tests.support import (
    TOPICS,
    add_dataset,
    expire_leases,
    job_of,
    label,
    run,
    sentences,
    shards_of,
    shared_data,
    submit,
    tiny_spec,
    wait_until,
)
from workers import labeling
from workers.labeling import read_labels
from workers.teachers import Row, endpoint_client
from workers.teachers import endpoint as teaching
from workers.teachers.endpoint import match_label, read_alternatives
from workers.teachers.endpoint_client import _retry_after, _seconds
from workers.teachers.teacher import AskedToStop, TeacherAway

LABELS = [Label(name=topic) for topic in TOPICS]
TEXTS = [row["text"] for row in sentences(12, 1)]
ROWS = [Row(text) for text in TEXTS]
OPINIONS = np.array([[opinion(text)[topic] for topic in TOPICS] for text in TEXTS])
KEY = "sk-7f0b1c-never-shown"


@pytest.fixture
def world(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A server that lists alternatives, configured as the endpoint `tiny`; failures are waited for briefly."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(endpoint_client, "BREAKER_SECONDS", 0.3)
    with serving(World(ALTERNATIVES)) as world:
        configure(monkeypatch, world)
        yield world
    labeling._loaded = None


def configure(monkeypatch: pytest.MonkeyPatch, world: World, **changes: Any) -> None:
    monkeypatch.setattr(settings(), "endpoints", {"tiny": world.endpoint(**changes)})
    labeling._loaded = None


def teacher(**changes: Any) -> teaching.EndpointTeacher:
    return teaching.EndpointTeacher(EndpointTeacher(kind="endpoint", endpoint="tiny", **changes), LABELS)


def spec(dataset_id: str, **changes: Any) -> dict[str, Any]:
    ours = {"labels": TOPICS, "teacher": {"kind": "endpoint", "endpoint": "tiny"}, "method": {"kind": "llkd"}}
    return tiny_spec(dataset_id, **{**ours, **changes})


def ability() -> dict[str, Any] | None:
    with session_scope() as session:
        row = session.get(EndpointAbility, "tiny")
        return None if row is None else row.ability


def events(job_id: str, type: str) -> list[JobEvent]:
    with session_scope() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type)))


def cached() -> int:
    with session_scope() as session:
        return session.scalar(select(func.count()).select_from(LabelCache)) or 0


def answers(job_id: str, rows: int) -> list[dict[str, Any]]:
    return read_labels(storage(), shards_of(job_id), "train", rows).to_pylist()


# --- how answers are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("able", "mode", "method"),
    [
        ([ECHO, ALTERNATIVES], {"mode": "prompt_logprobs", "least_tokens": 0}, "prompt_logprobs"),
        ([ECHO_AND_ONE], {"mode": "prompt_logprobs", "least_tokens": 1}, "prompt_logprobs"),
        ([ALTERNATIVES], {"mode": "chat_logprobs", "top_logprobs": 20}, "top_logprobs"),
        ([FEW_ALTERNATIVES], {"mode": "chat_logprobs", "top_logprobs": 5}, "top_logprobs"),
        ([NEW_LENGTH, FEW_ALTERNATIVES], {"mode": "chat_logprobs", "top_logprobs": 5, "length_field": "max_completion_tokens"}, "top_logprobs"),
        ([], {"mode": "label_only"}, "none"),
    ],
    ids=["echo", "echo that must generate", "alternatives", "few alternatives", "new name of the length", "label alone"],
)  # fmt: skip
def test_the_best_way_that_a_server_offers_is_found_and_gives_its_distribution(
    world: World, able: list[str], mode: dict[str, Any], method: str
) -> None:
    world.able = set(able)
    one = teacher()
    answer = one.label(ROWS)
    assert ability() == Ability.model_validate(mode).model_dump()
    assert one.confidence_method == one.report()["mode"] == method
    expected = np.eye(len(TOPICS))[OPINIONS.argmax(axis=1)] if method == "none" else OPINIONS
    np.testing.assert_allclose(answer.probabilities, expected, atol=1e-6)
    assert answer.errors == {}
    assert (answer.tokens > 0).all()
    before = len(world.requests)
    teacher().label(ROWS[:1])
    # What was found out is not asked again; only the row is, and with `echo` how many tokens each label has.
    assert len(world.requests) - before == (2 if method == "prompt_logprobs" else 1)


def sure_opinion(text: str, topics: Sequence[str]) -> dict[str, float]:
    """Mostly the label that a text ends with, some of the one before it, and a little of all."""
    weights = dict.fromkeys(topics, 0.2)
    for word, weight in zip(text.split()[-2:], (20.0, 60.0), strict=False):
        if word in weights:
            weights[word] += weight
    return {topic: weight / sum(weights.values()) for topic, weight in weights.items()}


def label_names(name: str) -> list[str]:
    """The labels of a shared data set, in an order that mixes their beginnings."""
    with (shared_data(name) / "test.jsonl").open() as lines:
        return sorted({json.loads(line)["label"] for line in lines}, key=lambda label: (len(label), label))


@pytest.mark.parametrize(("data", "classes", "requests"), [("banking77", 77, 3), ("clinc150", 151, 5)])
@pytest.mark.parametrize("able", [ECHO, ALTERNATIVES, FEW_ALTERNATIVES, "label alone"])
def test_pairs_with_77_and_151_labels_are_read_in_every_way_and_what_that_takes_is_told(
    world: World, able: str, data: str, classes: int, requests: int
) -> None:
    names = label_names(data)
    assert len(names) == classes
    world.able, world.opinion = {able}, sure_opinion
    rows = [Row(f"first text {number}", f"{names[-number - 1]} {names[number * 9]}") for number in range(8)]
    true = np.array([list(sure_opinion(row.text_pair or "", names).values()) for row in rows])
    one = teaching.EndpointTeacher(
        EndpointTeacher(kind="endpoint", endpoint="tiny"), [Label(name=name) for name in names]
    )
    answer = one.label(rows)
    assert answer.errors == {}
    told = one.report()
    asked = len(world.asked())
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, atol=1e-5)
    assert (answer.probabilities.argmax(axis=1) == true.argmax(axis=1)).all()
    if able == ECHO:
        np.testing.assert_allclose(answer.probabilities, true, atol=1e-6)
        assert (asked, told["requests_per_row"], told["prompts_per_row"]) == (
            8 * requests + requests,
            requests,
            classes,
        )
        return
    assert (asked, told["requests_per_row"]) == (8, 1)
    if able == "label alone":
        assert ("note" in told, one.confidence_method) == (False, "none")
    else:
        # The label is known to within what all the unlisted ones have together, and the list is said to be short.
        np.testing.assert_allclose(answer.probabilities.max(axis=1), true.max(axis=1), atol=0.25)
        assert f"there are {classes} labels" in told["note"]


def test_a_job_of_pairs_with_77_labels_trains_on_what_an_endpoint_says(world: World, client: TestClient) -> None:
    names = label_names("banking77")
    world.opinion = sure_opinion
    rows = [
        {"text": f"what is this {number}", "text_pair": f"{names[-number % 77]} {names[number * 5 % 77]}"}
        for number in range(80)
    ]
    job = run(submit(spec(add_dataset(rows), labels=names)))
    assert job.status == "succeeded", job.error
    told = client.get(f"/jobs/{job.id}").json()["labeling"]
    assert (len(told["labels"]), told["rows_failed"]) == (77, 0)
    assert "there are 77 labels" in told["teacher"]["note"]
    samples = client.get(f"/jobs/{job.id}/samples").json()["data"]
    assert [sample["label"] for sample in samples] == [rows[number]["text_pair"].split()[-1] for number in range(20)]


def test_more_labels_than_fit_a_request_are_asked_in_several(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.able = {ECHO}
    monkeypatch.setattr(teaching, "LABELS_PER_REQUEST", 2)
    np.testing.assert_allclose(teacher().label(ROWS[:3]).probabilities, OPINIONS[:3], atol=1e-6)
    assert max(len(body["prompt"]) for _, path, body in world.requests if path == "/v1/completions") == 2


def test_an_operator_who_names_the_mode_gets_it_or_an_explanation(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, world, mode="label_only")
    assert teacher().label(ROWS[:1]).probabilities[0].max() == 1
    assert [path for _, path, _ in world.requests] == ["/v1/chat/completions"] * 2
    configure(monkeypatch, world, mode="prompt_logprobs")
    with pytest.raises(WorkFailed, match="does not give the log-probabilities of a prompt"):
        teacher().label(ROWS[:1])


def test_shares_of_sampled_answers_are_the_distribution(world: World) -> None:
    one = teacher(samples=10)
    answer = one.label(ROWS[:4])
    assert one.confidence_method == "sampled_frequency"
    asked = [body for _, _, body in world.requests if row_of(body)]
    assert len(asked) == 40
    assert {body["temperature"] for body in asked} == {1.0}
    shares = answer.probabilities * 10
    np.testing.assert_allclose(shares, shares.round(), atol=1e-5)
    np.testing.assert_allclose(answer.probabilities, OPINIONS[:4], atol=0.15)


def test_the_prompt_shows_labels_examples_and_both_texts(world: World) -> None:
    shown = teacher(examples=[Example(text="a soup", label="cooking")], instruction="Choose.")
    shown.label([Row("first half", "second half")])
    messages = world.requests[-1][2]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"].startswith("Choose.")
    assert messages[1]["content"] == "cooking"
    assert "first half" in messages[2]["content"]
    assert "second half" in messages[2]["content"]


def steps(*listed: dict[str, float]) -> list[dict[str, Any]]:
    """The log-probabilities of an answer; the first token of each step is the one that was written."""
    return [
        {
            "token": next(iter(step)), "logprob": math.log(next(iter(step.values()))),
            "top_logprobs": [{"token": token, "logprob": math.log(chance)} for token, chance in step.items()],
        }
        for step in listed
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("listed", "answer", "labels", "expected"),
    [
        ([{"joy": 0.7, "an": 0.2, "x": 0.1}, {"ful": 1.0}], "joyful", ["joyful", "anger"], [0.7, 0.2]),
        ([{" joy": 0.5, "Joy": 0.2, "anger": 0.3}], " joy", ["joy", "anger"], [0.7, 0.3]),
        ([{"s": 0.6, "j": 0.4}, {"ad": 0.75, "urprise": 0.25}], "sad", ["sad", "surprise", "joy"], [0.45, 0.15, 0.4]),
        ([{"joy": 0.6, "s": 0.4}], "joy", ["sad", "surprise", "joy"], [0.2, 0.2, 0.6]),
        ([{"joy": 0.8, "sad": 0.1}], "joy", ["joy", "sad", "fear", "love"], [0.8, 0.1, 0.05, 0.05]),
        ([{"joy": 0.5, "sad": 0.01}], "joy", ["joy", "sad", "fear"], [0.5, 0.01, 0.01]),
        ([{"The": 0.9, "joy": 0.06, "sad": 0.02}], "The mood is", ["joy", "sad"], [0.06, 0.02]),
        ([{"joy": 0.6, "sad": 0.4}, {".": 0.9, "ful": 0.1}], "joy.", ["joy", "joyful", "sad"], [0.54, 0.06, 0.4]),
        ([{"Hm": 1.0}], "Hm", ["joy", "sad"], None),
    ],
    ids=["two tokens", "case and spaces", "a common beginning", "an alternative that fits two", "what is not listed",
         "not listed is less than the least listed", "an answer that is none", "a label that begins another", "nothing"],
)  # fmt: skip
def test_alternatives_are_read_as_the_docstring_says(
    listed: list[dict[str, float]], answer: str, labels: list[str], expected: list[float] | None
) -> None:
    found = read_alternatives(steps(*listed), answer, labels)
    if expected is None:
        assert found is None
    else:
        np.testing.assert_allclose(found, np.array(expected) / sum(expected), atol=1e-9)


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("joy", "joy"), (" joy\n\nText: next", "joy"), ("Joy.", "joy"), ("**joy**", "joy"), ("Label: joy", "joy"),
        ("Card Not Working", "card_not_working"), ("<think>sad? no\n</think>\njoy", "joy"), ("C++", "C++"),
        ("c++", None), ("joyful", None), ("joy or sad", None), ("", None), ("The label is joy", None),
    ],
)  # fmt: skip
def test_an_answer_names_a_label_or_none(answer: str, label: str | None) -> None:
    labels = ["joy", "sad", "card_not_working", "C++", "C#"]
    index = match_label(answer, labels)
    assert (None if index is None else labels[index]) == label


@pytest.mark.parametrize(
    ("answer", "number"), [("7", 6), (" 12.\n", 11), ("Label: 3", 2), ("12. card_arrival", 11), ("13", None), ("none", None)]
)  # fmt: skip
def test_an_answer_by_number_names_a_label_or_none(answer: str, number: int | None) -> None:
    assert match_label(answer, [str(place) for place in range(1, 13)]) == number


# --- what failures become -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [(500, {}), (503, {}), "hang", "truncated", "cut", "reset", (429, {"retry-after": "0.2"}), (429, {})],
    ids=["500", "503", "hang", "truncated JSON", "cut answer", "connection reset", "429 with Retry-After", "429"],
)  # fmt: skip
def test_a_request_that_fails_is_sent_again_and_no_row_is_lost(
    world: World, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "hang":
        configure(monkeypatch, world, timeout_seconds=1.0)
    world.faults = {TEXTS[3]: [fault, fault], TEXTS[8]: [fault]}
    answer = teacher().label(ROWS)
    assert answer.errors == {}
    assert answer.ended is None
    np.testing.assert_allclose(answer.probabilities, OPINIONS, atol=1e-6)
    for number, text in enumerate(TEXTS):
        times = world.asked().count(text)
        expected = {3: 3, 8: 2}.get(number, 1)
        assert times == expected or (fault == "hang" and times > expected)  # a busy machine may hang by itself


def test_nobody_asks_before_the_server_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, concurrency=1)
    one = teacher()
    one.label(ROWS[:1])
    world.faults = {TEXTS[2]: [(429, {"retry-after": "0.6"})]}
    del world.requests[:]
    one.label(ROWS)
    refused = next(number for number, text in enumerate(world.asked()) if text == TEXTS[2])
    assert world.requests[refused + 1][0] - world.requests[refused][0] >= 0.6


def test_a_server_that_says_nothing_is_left_is_given_the_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, concurrency=1)
    one = teacher()
    world.headers = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "300ms"}
    one.label(ROWS[:3])
    moments = [moment for moment, _, _ in world.requests][-3:]
    assert all(later - earlier >= 0.3 for earlier, later in itertools.pairwise(moments))


def test_no_more_requests_than_allowed_are_under_way_or_sent_a_minute(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, world, concurrency=3)
    world.answer_seconds = 0.05
    teacher().label(ROWS)
    assert world.most_busy == 3
    world.answer_seconds = 0.0
    configure(monkeypatch, world, requests_per_minute=600.0)
    one, began = teacher(), time.monotonic()
    one.label(ROWS[:5])
    assert world.requests[-1][0] - began >= 0.4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("always 500", "the server failed (500), 5 times"),
        ((400, {}), "the server refuses the request (400): no, Bearer …"),
    ],
    ids=["500 for ever", "400"],
)
def test_a_row_that_no_request_helps_is_an_error_of_that_row(
    world: World, fault: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, world, api_key=KEY)
    world.faults = {TEXTS[4]: [fault]}
    answer = teacher().label(ROWS)
    assert answer.errors == {4: reason}
    assert np.isnan(answer.probabilities[4]).all()
    np.testing.assert_allclose(np.delete(answer.probabilities, 4, 0), np.delete(OPINIONS, 4, 0), atol=1e-6)


def test_a_wrong_label_is_an_error_of_that_row_that_was_paid_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, mode="label_only", price_per_million_input_tokens=1e6)
    world.faults = {f"wrong {TEXTS[4]}": ["politics"]}
    answer = teacher().label(ROWS)
    assert answer.errors == {4: "the answer is none of the labels: 'politics'"}
    assert answer.tokens[4] > 0
    said = ["politics" if number == 4 else TOPICS[best] for number, best in enumerate(OPINIONS.argmax(axis=1))]
    # At 1 a token of the prompts and nothing for those of the answers.
    assert answer.cost == pytest.approx(answer.tokens.sum() - sum(len(pieces(word)) for word in said))


def test_rows_that_break_the_server_do_not_make_it_look_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, concurrency=2)
    world.faults = {text: ["always 500"] for text in TEXTS[:4]}
    answer = teacher().label(ROWS[:4])
    assert sorted(answer.errors) == [0, 1, 2, 3]
    assert answer.ended is None


def test_a_server_that_is_down_is_left_alone_for_a_while(world: World) -> None:
    one = teacher()
    one.label(ROWS[:1])
    world.faults = {"": ["always 500"]}
    answer = one.label(ROWS[1:])
    assert isinstance(answer.ended, TeacherAway)
    assert "the server failed (500), 10 times in a row" in str(answer.ended)
    assert answer.unasked == frozenset(range(11))
    before = len(world.requests)
    again = one.label(ROWS[1:])
    assert isinstance(again.ended, TeacherAway)
    assert len(world.requests) == before
    world.faults.clear()
    wait_until(lambda: one.label(ROWS).ended is None, what="the pause ends")


def test_a_long_pause_is_not_sat_out(world: World) -> None:
    one = teacher()
    one.label(ROWS[:1])
    world.faults = {TEXTS[1]: [(429, {"retry-after": "3600"})]}
    answer = one.label(ROWS[1:2])
    assert isinstance(answer.ended, TeacherAway)
    assert "asks for a pause of 3600 s" in str(answer.ended)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "refuses the key"), (403, "refuses the key"), (404, "does not know the model"), (307, "redirect")],
)
def test_what_only_the_operator_can_mend_fails_the_job(
    world: World, monkeypatch: pytest.MonkeyPatch, status: int, reason: str
) -> None:
    configure(monkeypatch, world, api_key=KEY)
    location = {"location": f"{world.url}/elsewhere"}
    world.faults = {"": [(status, location)] * 30}
    job_id = submit(spec(add_dataset(sentences(6, 1, labeled=False))))
    label(job_id)
    error = job_of(job_id).error
    assert error is not None
    assert error["code"] == "endpoint_refuses"
    assert reason in error["message"]
    assert KEY not in error["message"]
    assert world.url not in error["message"]
    assert not [path for _, path, _ in world.requests if "elsewhere" in path]


def test_a_key_that_is_not_set_is_named_by_its_variable(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, api_key_env="TINY_KEY")
    with pytest.raises(WorkFailed, match="TINY_KEY"):
        teacher().label(ROWS[:1])
    monkeypatch.setenv("TINY_KEY", KEY)
    assert teacher().label(ROWS[:1]).errors == {}
    assert set(world.keys) == {f"Bearer {KEY}"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("12", 12), ("0.5", 0.5), ("20ms", 0.02), ("1m30s", 90), ("1h0m0s", 3600), ("6m0s", 360), ("", None), ("soon", None), ("5 apples", None)],
)  # fmt: skip
def test_the_times_of_rate_limit_headers_are_understood(text: str, seconds: float | None) -> None:
    assert _seconds(text) == (None if seconds is None else pytest.approx(seconds))


def test_retry_after_may_be_a_date() -> None:
    assert _retry_after(httpx.Response(429, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0
    wait = _retry_after(httpx.Response(429, headers={"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}))
    assert wait is not None
    assert wait > 1e9
    assert _retry_after(httpx.Response(429)) is None


# --- a job that asks an endpoint ------------------------------------------------------------------------------------


def test_a_job_pays_for_each_text_once_and_tells_what_it_cost(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, world, price_per_million_input_tokens=2.0, price_per_million_output_tokens=6.0)
    dataset = add_dataset(sentences(24, 1, labeled=False))
    job = run(submit(spec(dataset)))
    assert job.status == "succeeded", job.error
    told = client.get(f"/jobs/{job.id}").json()["labeling"]
    assert told["confidence_method"] == "top_logprobs"
    assert told["teacher"] == {
        "mode": "top_logprobs",
        "endpoint": "tiny",
        "model": "tiny",
        "revision": "",
        "samples": 1,
        "requests_per_row": 1,
        "prompts_per_row": 1,
    }
    outputs = 2 * 24
    assert told["cost"] == pytest.approx(((told["tokens"] - outputs) * 2.0 + outputs * 6.0) / 1e6, abs=1e-6)
    assert len(world.asked()) == 24
    told_before = told
    again = job_of(submit(spec(dataset, name="again")))
    assert again.label_set_id != job.label_set_id
    label(again.id)
    assert len(world.asked()) == 24
    told = client.get(f"/jobs/{again.id}").json()["labeling"]
    assert (told["cost"], told["rows_from_cache"]) == (None, 24)
    dry = client.post("/jobs?dry_run=true", json=spec(dataset)).json()
    assert (dry["rows_cached"], dry["cost"]) == (24, 0.0)
    dry = client.post("/jobs?dry_run=true", json=spec(add_dataset(sentences(100, 5, labeled=False)))).json()
    assert 0.5 < dry["cost"] / (100 * told_before["cost"] / 24) < 2


@pytest.mark.parametrize(
    ("change", "asked_again"),
    [({"model": "other"}, True), ({"revision": "2"}, True), ({"mode": "label_only"}, True), ({"api_key": KEY}, False),
     ({"concurrency": 2, "price_per_million_input_tokens": 1.0}, False)],
)  # fmt: skip
def test_the_model_and_the_way_of_reading_key_the_cache_and_the_rest_does_not(
    world: World, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], asked_again: bool
) -> None:
    dataset = add_dataset(sentences(4, 1, labeled=False))
    label(submit(spec(dataset, method={"kind": "random"})))
    configure(monkeypatch, world, **change)
    label(submit(spec(dataset, method={"kind": "random"})))
    assert len(world.asked()) == (8 if asked_again else 4)


def test_another_wording_is_asked_again(world: World) -> None:
    dataset = add_dataset(sentences(4, 1, labeled=False))
    label(submit(spec(dataset)))
    label(submit(spec(dataset, teacher={"kind": "endpoint", "endpoint": "tiny", "instruction": "Choose a topic."})))
    assert len(world.asked()) == 8


def test_without_confidence_llkd_is_refused_before_a_row_is_asked_and_then_at_the_door(
    world: World, client: TestClient
) -> None:
    world.able = set()
    dataset = add_dataset(sentences(24, 1, labeled=False))
    first = submit(spec(dataset))
    label(first)
    job = job_of(first)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "confidence_missing"
    for word in ("llkd", "teacher.samples", "no_selection", "unixkd"):
        assert word in job.error["message"]
    assert world.asked() == []
    answer = client.post("/jobs", json=spec(dataset))
    assert answer.status_code == 422
    fault = answer.json()["errors"][0]
    assert (fault["pointer"], fault["code"]) == ("/method/kind", "confidence_missing")
    sampled = spec(dataset, teacher={"kind": "endpoint", "endpoint": "tiny", "samples": 5})
    assert client.post("/jobs", json=sampled).status_code == 202


def test_without_confidence_the_other_arms_of_a_comparison_go_on(world: World, client: TestClient) -> None:
    world.able = set()
    arms = [{"name": kind, "method": {"kind": kind}} for kind in ("llkd", "random")]
    shared = spec(add_dataset(sentences(24, 1, labeled=False)), test_dataset_id=add_dataset(sentences(9, 2)))
    del shared["method"]
    made = client.post("/comparisons", json=shared | {"arms": arms, "seeds": [0]}).json()
    refused, other = [arm["runs"][0]["job_id"] for arm in made["arms"]]
    label(refused)
    assert (job_of(refused).error or {})["code"] == "confidence_missing"
    assert run(other).status == "succeeded", job_of(other).error


def test_without_confidence_a_student_learns_the_labels_and_nobody_claims_a_confidence(
    world: World, client: TestClient
) -> None:
    world.able = set()
    rows, held_out = sentences(48, 1, labeled=False), sentences(12, 2)
    changes = {"method": {"kind": "no_selection"}, "validation_dataset_id": add_dataset(held_out)}
    job = run(submit(spec(add_dataset(rows), **changes)))
    assert job.status == "succeeded", job.error
    assert job.evaluation is not None
    assert job.evaluation["validation"]["teacher"]["accuracy"] > 0.8
    assert job.evaluation["validation"]["teacher"]["expected_calibration_error"] is None
    samples = client.get(f"/jobs/{job.id}/samples").json()["data"]
    assert {sample["confidence"] for sample in samples} == {None}
    assert {max(sample["distribution"].values()) for sample in samples} == {1.0}


def test_a_job_waits_for_a_server_that_is_away_and_pays_no_row_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 4)
    configure(monkeypatch, world, price_per_million_input_tokens=1e6)
    rows = sentences(12, 1, labeled=False)
    job_id = submit(spec(add_dataset(rows)))
    # The eighth row takes the server down.
    world.down_after = rows[7]["text"]
    label(job_id)
    shard, job = shards_of(job_id)[0], job_of(job_id)
    assert (job.status, job.phase, job.error) == ("running", "labeling", None)
    assert (shard.status, shard.lost_workers, shard.lease_expires_at) == ("pending", 0, None)
    assert shard.cost is not None
    with session_scope() as session:
        answered = session.scalar(select(func.count()).select_from(LabelCache)) or 0
    assert 4 <= answered < 12
    label(job_id)
    assert len(events(job_id, "teacher.away")) == 1
    world.faults.clear()
    del world.requests[:]
    wait_until(lambda: label(job_id) is None and job_of(job_id).phase == "training", what="the server is asked again")
    assert len(world.asked()) == 12 - answered
    assert [answer["error"] for answer in answers(job_id, 12)] == [None] * 12
    assert shards_of(job_id)[0].cost > shard.cost


def test_a_server_that_is_away_from_the_beginning_is_waited_for(world: World) -> None:
    job_id = submit(spec(add_dataset(sentences(4, 1, labeled=False))))
    world.faults = {"": ["always 500"]}
    label(job_id)
    assert job_of(job_id).status == "running"
    assert len(events(job_id, "teacher.away")) == 1
    with session_scope() as session:
        assert lifecycle.sweep(session, {"label"}) == 0
    world.faults.clear()
    wait_until(lambda: label(job_id) is None and job_of(job_id).phase == "training", what="the server is asked again")


def test_a_worker_that_shuts_down_while_it_waits_keeps_what_is_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, world, timeout_seconds=30)
    monkeypatch.setattr(teaching, "STOP_SECONDS", 0.2)
    rows = sentences(12, 1, labeled=False)
    world.faults = {row["text"]: ["hang"] for row in rows[9:]}
    job_id = submit(spec(add_dataset(rows)))
    stopping = threading.Event()
    worker = threading.Thread(target=labeling.label_job, args=(job_id, "leaving", stopping))
    worker.start()
    wait_until(lambda: len(world.asked()) == 12, what="every row is asked")
    wait_until(lambda: cached() == 9, what="the answers that came are in the cache while the others are waited for")
    stopping.set()
    worker.join(10)
    assert not worker.is_alive()
    assert shards_of(job_id)[0].status == "pending"
    assert cached() == 9
    world.release.set()
    label(job_id)
    assert [world.asked().count(row["text"]) for row in rows] == [1] * 9 + [2] * 3
    assert job_of(job_id).phase == "training"


def test_a_killed_worker_costs_only_the_rows_it_was_asking_about(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at random moments: what the server was asked by then, and was asked again later, is told by its own count."""
    concurrency = 4
    configure(monkeypatch, world, concurrency=concurrency, timeout_seconds=60.0)
    monkeypatch.setattr(settings(), "max_attempts", 99)
    world.answer_seconds = 0.02
    rows = sentences(300, 1, labeled=False)
    job_id = submit(spec(add_dataset(rows), labeling={"smoke_gate": False}))
    luck = random.Random(0)
    begun = [0]
    for _ in range(4):
        enough = begun[-1] + luck.randint(20, 50)
        worker = fork(lambda: label(job_id))
        wait_until(lambda enough=enough: len(world.asked()) >= enough, 60, "rows are asked about")
        time.sleep(luck.uniform(0, 0.05))
        os.kill(worker, signal.SIGKILL)
        assert ended(worker) == -signal.SIGKILL
        wait_until(lambda: world.busy == 0, what="the server has seen the worker go")
        begun.append(len(world.asked()))
        expire_leases()
    label(job_id)
    assert job_of(job_id).phase == "training"
    asked = world.asked()
    assert set(asked) == {row["text"] for row in rows}
    for start, stop in itertools.pairwise(begun):
        assert len(set(asked[start:stop])) == stop - start
        # Those under way, and as many whose answers were on their way into the cache.
        assert len(set(asked[start:stop]) & set(asked[stop:])) <= 2 * concurrency
    assert {answer["error"] for answer in answers(job_id, len(rows))} == {None}


def test_no_row_is_asked_about_while_no_answer_can_be_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, concurrency=2)
    one = teacher()
    one.label(ROWS[:1])
    del world.requests[:]
    told: list[dict[int, teaching.Answer]] = []
    goes_on = threading.Event()

    def keep(arrived: dict[int, teaching.Answer]) -> None:
        goes_on.wait(20)
        told.append(arrived)

    one.on_answers = keep
    worker = threading.Thread(target=one.label, args=[ROWS])
    worker.start()
    wait_until(
        lambda: len(world.asked()) == 4 and world.busy == 0, what="every place is taken, every question answered"
    )
    time.sleep(0.2)
    assert len(world.asked()) == 4
    goes_on.set()
    worker.join(10)
    assert sorted(number for some in told for number in some) == list(range(len(ROWS)))
    assert max(map(len, told)) > 1, "what comes while others are told goes together"


def test_a_cancelled_job_stops_waiting_for_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(monkeypatch, world, timeout_seconds=30)
    monkeypatch.setattr(teaching, "STOP_SECONDS", 0.2)
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    world.faults = {"": ["hang"] * 50}
    job_id = submit(spec(add_dataset(sentences(4, 1, labeled=False))))
    worker = threading.Thread(target=label, args=(job_id,))
    worker.start()
    wait_until(lambda: len(world.requests) > 0, what="the server is asked")
    with session_scope() as session:
        lifecycle.cancel(session, session.get_one(Job, job_id))
    worker.join(10)
    assert not worker.is_alive()
    assert job_of(job_id).status == "cancelled"


@pytest.mark.parametrize("verb", ["pause", "cancel"])
def test_what_is_on_its_way_when_a_job_is_stopped_is_waited_for_and_not_paid_twice(
    world: World, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    configure(monkeypatch, world, concurrency=2, price_per_million_input_tokens=1e6)
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    rows = sentences(40, 1, labeled=False)
    job_id = submit(spec(add_dataset(rows), labeling={"smoke_gate": False}))
    world.answer_seconds = 0.3
    worker = threading.Thread(target=label, args=(job_id,))
    worker.start()
    wait_until(lambda: len(world.asked()) > 2, what="rows are asked about")
    with session_scope() as session:
        {"pause": lifecycle.pause, "cancel": lifecycle.cancel}[verb](session, session.get_one(Job, job_id))
    worker.join(10)
    assert not worker.is_alive()
    asked = world.asked()
    assert 2 < len(asked) < 40
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(LabelCache)) == len(asked)
    shard = shards_of(job_id)[0]
    assert (shard.status, shard.rows_done) == ("pending", len(asked))
    # At 1 a token of the prompts.
    assert shard.tokens > shard.cost > 0

    world.answer_seconds = 0.0
    with session_scope() as session:
        {"pause": lifecycle.resume, "cancel": lifecycle.retry}[verb](session, session.get_one(Job, job_id))
    label(job_id)
    assert job_of(job_id).phase == "training"
    assert sorted(world.asked()) == sorted(row["text"] for row in rows)


def test_asking_to_stop_is_heard_while_the_ability_is_looked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.faults = {"": ["hang"] * 50}
    one = teacher()
    one.should_stop = lambda: True
    with pytest.raises(AskedToStop):
        one.label(ROWS)


# --- what clients may say and see -----------------------------------------------------------------------------------


def test_an_unknown_endpoint_is_refused_with_the_names_there_are(world: World, client: TestClient) -> None:
    body = spec(add_dataset(sentences(4, 1, labeled=False)), teacher={"kind": "endpoint", "endpoint": "gpt"})
    answer = client.post("/jobs", json=body)
    assert answer.status_code == 422
    fault = answer.json()["errors"][0]
    assert (fault["pointer"], fault["code"]) == ("/teacher/endpoint", "unknown_endpoint")
    assert "'gpt'" in fault["message"]
    assert "'tiny'" in fault["message"]


@pytest.mark.parametrize("field", ["base_url", "url", "api_key", "model", "headers"])
def test_a_client_cannot_send_urls_or_keys(world: World, client: TestClient, field: str) -> None:
    teacher = {"kind": "endpoint", "endpoint": "tiny", field: "http://169.254.169.254/"}
    answer = client.post("/jobs", json=spec(add_dataset(sentences(4, 1, labeled=False)), teacher=teacher))
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == f"/teacher/{field}"


def test_the_key_and_the_url_stand_in_nothing_that_is_shown(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    configure(monkeypatch, world, api_key=KEY)
    caplog.set_level(logging.DEBUG)
    rows = sentences(6, 1, labeled=False)
    world.faults = {rows[1]["text"]: [(400, {})], rows[2]["text"]: ["reset"]}
    job_id = submit(spec(add_dataset(rows)))
    label(job_id)
    assert set(world.keys) == {f"Bearer {KEY}"}
    shown = [
        client.get(f"/jobs/{job_id}").text, client.get(f"/jobs/{job_id}/events").text, client.get("/openapi.json").text,
        repr(settings()), str(settings().endpoints), str(answers(job_id, 6)),
    ]  # fmt: skip
    printed = capfd.readouterr()
    for text in [*shown, caplog.text, printed.out, printed.err]:
        assert KEY not in text
    for text in shown[:3]:
        assert world.url not in text


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"base_url": "ftp://host"}, "https://host/v1"),
        ({"base_url": "https://me:secret@host/v1"}, "carries credentials"),
        ({"base_url": "https://host/v1?key=secret"}, "carries credentials"),
        ({"api_key": "secret", "api_key_env": "KEY"}, "not both"),
        ({"concurency": "secret"}, "concurency"),
        ({"timeout_seconds": "secret"}, "timeout_seconds"),
    ],
)
def test_an_endpoint_that_is_configured_wrongly_is_explained_without_its_secrets(
    given: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        Endpoint(**{"base_url": "https://host/v1", "model": "m", **given})
    assert "secret" not in str(caught.value)


def test_endpoints_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "UNDERSTUDY_ENDPOINTS", '{"local": {"base_url": "http://gpu:8000/v1/", "model": "llama", "api_key": "k"}}'
    )
    local = Settings().endpoints["local"]
    assert (local.base_url, local.model, local.key()) == ("http://gpu:8000/v1", "llama", "k")
    assert local.cost(1000, 10) is None
    assert local.model_copy(update={"price_per_million_input_tokens": 3.0}).cost(1_000_000, 500) == 3.0
