"""A dry run that measures: a worker asks the teacher about a few rows, and what it said is not paid for again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from app import measurements
from app.config import settings
from app.db import session_scope
from app.models import LabelCache, Measurement
from tests.llms import tiny_llama
from tests.openai_server import ALTERNATIVES, World, serving
from tests.support import TOPICS, add_dataset, job_of, label, sentences, stored, submit, tiny_spec, wait_until
from workers import labeling, measuring
from workers.teachers import endpoint_client

TEACHER = {"kind": "endpoint", "endpoint": "tiny"}


@pytest.fixture
def world(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(measurements, "PICKUP_SECONDS", 0.3)
    monkeypatch.setattr(settings(), "measure_seconds", 30.0)
    monkeypatch.setattr(labeling, "_loaded", None)
    with serving(World(ALTERNATIVES)) as world:
        endpoint = world.endpoint(price_per_million_input_tokens=2.0, price_per_million_output_tokens=6.0)
        monkeypatch.setattr(settings(), "endpoints", {"tiny": endpoint})
        yield world


@contextmanager
def a_worker() -> Iterator[list[str]]:
    """Takes every measurement that is asked for, as a worker does that got the message; the ids."""
    taken: list[str] = []
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.02):
            with session_scope() as session:
                ids = session.scalars(select(Measurement.id).where(Measurement.status == "waiting")).all()
            for id in ids:
                taken.append(id)
                measuring.measure(id, threading.Event())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join(30)


def spec(rows: int, **changes: Any) -> dict[str, Any]:
    dataset = add_dataset(sentences(rows, 1, labeled=False))
    return tiny_spec(dataset, **{"labels": TOPICS, "teacher": TEACHER, "method": {"kind": "llkd"}, **changes})


def dry_run(client: TestClient, body: dict[str, Any], **query: Any) -> dict[str, Any]:
    answer = client.post("/jobs", json=body, params={"dry_run": True, **query})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_worker_measures_what_the_estimate_only_guesses_and_the_job_does_not_pay_again(
    world: World, client: TestClient
) -> None:
    world.answer_seconds = 0.02
    body = spec(120)
    guessed = dry_run(client, body, measure=False)
    assert (guessed["measured"], guessed["measurement"], guessed["labeling_basis"]) == (False, None, "default_rate")
    assert world.asked() == []
    with a_worker() as taken:
        told = dry_run(client, body)
        assert (told["measured"], told["labeling_basis"], told["measurement_note"]) == (True, "sample", None)
        again = dry_run(client, body)
    asked = world.asked()
    assert len(taken) == 1
    assert len(asked) == len(set(asked)) == 32
    positions = [int(text.split()[-1]) for text in asked]
    assert max(positions) > 80  # not the first rows alone
    sample = told["measurement"]
    assert (sample["rows"], sample["failed"], sample["confidence_method"]) == (32, 0, "top_logprobs")
    assert 10 < sample["rows_per_second"] < 8 / 0.02  # eight requests at a time, each of 20 ms
    assert told["labeling_seconds"] == pytest.approx(120 / sample["rows_per_second"], abs=0.1)
    assert 1 / 3 < sample["confidence"]["min"] <= sample["confidence"]["median"] <= sample["confidence"]["max"] < 1
    assert (told["rows_to_label"], told["rows_cached"]) == (120, 0)
    assert (again["rows_to_label"], again["rows_cached"], again["measurement"]) == (88, 32, sample)

    job_id = submit(body)
    label(job_id)
    assert sorted(world.asked()) == sorted(row["text"] for row in sentences(120, 1, labeled=False))
    figures = client.get(f"/jobs/{job_id}").json()["labeling"]
    assert figures["rows_from_cache"] == 32
    # What was foretold from 32 rows, against what all 120 came to.
    assert figures["tokens"] + figures["tokens_saved"] == pytest.approx(told["teacher_tokens"], rel=0.1)
    assert figures["cost"] + sample["cost"] == pytest.approx(told["cost"], rel=0.1)


def test_without_a_free_worker_the_estimate_is_told_and_nothing_is_left_behind(
    world: World, client: TestClient
) -> None:
    body = spec(40)
    before = stored()
    told = dry_run(client, body)
    assert (told["measured"], told["measurement"]) == (False, None)
    assert "No labeling worker was free" in told["measurement_note"]
    assert told["rows_to_label"] == 40
    assert stored() == before
    measuring.measure("ms_withdrawn", threading.Event())  # its message comes late
    assert world.requests == []


def test_a_worker_that_needs_longer_than_the_dry_run_waits_is_heard_by_the_next_one(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "measure_seconds", 1.0)
    body = spec(40)
    free = threading.Event()
    monkeypatch.setattr(
        labeling, "teacher_for", lambda *arguments, own=labeling.teacher_for: free.wait(30) and own(*arguments)
    )
    with a_worker() as taken:
        told = dry_run(client, body)
        assert not told["measured"]
        assert "not done after 1 s" in told["measurement_note"]
        free.set()
        wait_until(lambda: dry_run(client, body)["measured"], what="the result is there")
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("able", "faults", "words"),
    [
        ([], {}, "teacher.samples"),
        ([ALTERNATIVES], {"": [(401, {})] * 30}, "refuses the key"),
        ([ALTERNATIVES], {"Text: ": ["always 500"]}, "labeled none of the first 6 rows"),
    ],
    ids=["no confidence", "the operator has to mend it", "every row fails"],
)
def test_what_would_make_the_job_fail_is_told_before_it_starts(
    world: World, client: TestClient, able: list[str], faults: dict[str, Any], words: str
) -> None:
    world.able, world.faults = set(able), faults
    if "Text: " in faults:
        rows = [row["text"] for row in sentences(6, 1)]
        world.faults = {text: ["always 500"] for text in rows}
    with a_worker():
        told = dry_run(client, spec(6))
    assert words in told["measurement_note"]


def test_a_language_model_of_the_workers_is_measured_with_its_tokens(
    database: Engine, client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(tmp_path / "llama")
    monkeypatch.setattr(settings(), "model_roots", [tmp_path])
    monkeypatch.setattr(settings(), "measure_seconds", 60.0)
    monkeypatch.setattr(labeling, "_loaded", None)
    body = spec(50, teacher={"kind": "causal_lm", "model": "llama"})
    with a_worker():
        told = dry_run(client, body)
    assert told["measured"], told["measurement_note"]
    job_id = submit(body)
    label(job_id)
    assert job_of(job_id).phase == "training"
    with session_scope() as session:
        tokens = session.scalars(select(LabelCache.tokens)).all()
    assert len(tokens) == 50
    assert told["teacher_tokens"] == pytest.approx(sum(tokens), rel=0.05)
    assert told["measurement"]["teacher"]["prompt_tokens"] > 20
    assert np.isclose(told["labeling_seconds"], 50 / told["measurement"]["rows_per_second"], atol=0.1)


def test_a_dataset_that_is_its_own_teacher_needs_no_measuring(world: World, client: TestClient) -> None:
    told = dry_run(client, tiny_spec(add_dataset(sentences(12, 1))))
    assert "no train row" in told["measurement_note"]
