"""Several workers at the same rows, a gate before them, failed rows after them: asked once, judged early, told as it is."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, func, select

from app import labels, lifecycle, overview
from app.config import settings
from app.db import session_scope
from app.labels import Answer
from app.models import Job, JobEvent, JobPhase, LabelCache, LabelClaim, LabelSet
from app.options import Label
from app.storage import storage
from tests.support import (
    TOPICS,
    WORDS,
    add_dataset,
    expire_leases,
    in_threads,
    job_of,
    label,
    sentences,
    shards_of,
    submit,
    tiny_spec,
    wait_until,
)
from workers import gate, labeling
from workers.labeling import read_labels
from workers.teachers.teacher import Labeled, Row


class WordTeacher:
    """Counts a topic's words. `asked` holds every text of every worker; `hook` runs before each answer."""

    confidence_method = "words"
    cacheable = True
    asked: list[str]
    hook: Callable[[list[str]], None]
    broken: Counter[str]

    def __init__(self, options: Any, labels: list[Label], source: Any) -> None:
        self.names = [entry.name for entry in labels]

    def label(self, rows: list[Row]) -> Labeled:
        texts = [row.text for row in rows]
        self.asked.extend(texts)
        type(self).hook(texts)
        probabilities = np.stack([self.say(text) for text in texts]).astype(np.float32)
        errors = {number: "too hard" for number, text in enumerate(texts) if self.broken[text] > 0}
        for number in errors:
            self.broken[texts[number]] -= 1
        return Labeled(probabilities, np.full(len(rows), 10, np.int32), errors)

    def say(self, text: str) -> np.ndarray:
        counts = np.array([1e-3 + sum(word in WORDS[name] for word in text.split()) for name in self.names])
        return counts / counts.sum()

    def report(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def teacher(database: Engine, monkeypatch: pytest.MonkeyPatch) -> type[WordTeacher]:
    kind = type(
        "CountingTeacher", (WordTeacher,), {"asked": [], "hook": staticmethod(lambda texts: None), "broken": Counter()}
    )
    monkeypatch.setitem(labeling.TEACHERS, "embedding", kind)
    monkeypatch.setattr(labeling, "_loaded", None)
    monkeypatch.setattr(labeling, "CHUNK_ROWS", 4)
    monkeypatch.setattr(labeling, "WAIT_SECONDS", 0.02)
    return kind


def spec(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return tiny_spec(dataset_id, **{"labels": TOPICS, "teacher": {"kind": "embedding"}, **changes})


def ungated(dataset_id: str, **changes: Any) -> dict[str, Any]:
    return spec(dataset_id, labeling={"smoke_gate": False}, **changes)


def answers(job_id: str, rows: int) -> list[dict[str, Any]]:
    return read_labels(storage(), shards_of(job_id), "train", rows).to_pylist()


def figures(job_id: str) -> dict[str, Any]:
    with session_scope() as session:
        return overview.show(session, [job_id])[0].labeling


def events(job_id: str, type: str) -> list[JobEvent]:
    with session_scope() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type)))


def claims() -> int:
    with session_scope() as session:
        return session.scalar(select(func.count()).select_from(LabelClaim)) or 0


def once(teacher: type[WordTeacher]) -> bool:
    return bool(teacher.asked) and set(Counter(teacher.asked).values()) == {1}


# --- nobody asks about what another is asking about -------------------------------------------------------------------


def test_two_jobs_that_label_the_same_rows_at_once_share_the_work(teacher: type[WordTeacher]) -> None:
    rows = sentences(40, 1, labeled=False)
    jobs = [submit(ungated(add_dataset(rows))), submit(ungated(add_dataset(rows), name="the other"))]
    together = threading.Barrier(2, timeout=20)
    first = Counter[int]()

    def both_are_asking(texts: list[str]) -> None:
        me = threading.get_ident()
        first[me] += 1
        if first[me] == 1:
            together.wait()

    teacher.hook = staticmethod(both_are_asking)
    assert in_threads(2, lambda number: label(jobs[number], f"labeler-{number}")) == [None, None]
    assert sorted(teacher.asked) == sorted(row["text"] for row in rows)
    assert len(first) == 2
    said = [[answer["distribution"] for answer in answers(job, 40)] for job in jobs]
    assert said[0] == said[1]
    told = [figures(job) for job in jobs]
    assert sum(entry["tokens"] for entry in told) == 400
    assert sum(entry["tokens_saved"] for entry in told) == 400
    assert sum(entry["rows_from_cache"] for entry in told) == 40
    assert claims() == 0


def test_what_another_worker_is_asking_about_is_left_for_the_end_and_then_taken_from_the_cache(
    teacher: type[WordTeacher],
) -> None:
    rows = sentences(12, 1, labeled=False)
    job_id = submit(ungated(add_dataset(rows)))
    with session_scope() as session:
        print_ = session.get_one(Job, job_id).label_set.fingerprint
        theirs = labels.text_hash(rows[0]["text"], None)
        assert labels.claim(session, "alice", print_, [theirs], "another", 60)[1] == {theirs}

    def answered_by_the_other(texts: list[str]) -> None:
        if len(teacher.asked) == 11:
            with session_scope() as session:
                said = {theirs: Answer(np.array([0.5, 0.3, 0.2], np.float32), 7, 0.5)}
                labels.remember(session, "alice", print_, said, owner="another")

    teacher.hook = staticmethod(answered_by_the_other)
    label(job_id)
    assert teacher.asked == [row["text"] for row in rows[1:]]
    first = answers(job_id, 12)[0]
    assert first["source"] == "cache"
    assert np.allclose(first["distribution"], [0.5, 0.3, 0.2])
    told = figures(job_id)
    assert (told["tokens"], told["tokens_saved"], told["seconds_saved"]) == (110, 7, 0.5)


def test_the_claims_of_a_lost_worker_run_out_and_its_rows_are_asked_about(teacher: type[WordTeacher]) -> None:
    rows = sentences(6, 1, labeled=False)
    job_id = submit(ungated(add_dataset(rows)))
    with session_scope() as session:
        print_ = session.get_one(Job, job_id).label_set.fingerprint
        labels.claim(session, "alice", print_, [labels.text_hash(row["text"], None) for row in rows], "lost", 0.5)
    label(job_id)
    assert sorted(teacher.asked) == sorted(row["text"] for row in rows)
    assert job_of(job_id).phase == "training"
    assert claims() == 0


def test_a_teacher_that_breaks_leaves_no_claim_behind(teacher: type[WordTeacher]) -> None:
    def breaks(texts: list[str]) -> None:
        raise RuntimeError("the weights are damaged")

    teacher.hook = staticmethod(breaks)
    job_id = submit(ungated(add_dataset(sentences(6, 1, labeled=False))))
    label(job_id)
    assert job_of(job_id).status == "failed"
    assert claims() == 0


def test_a_third_worker_joins_and_a_killed_one_costs_at_most_its_chunk(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "shard_rows", 12)
    rows = sentences(96, 1, labeled=False)
    job_id = submit(ungated(add_dataset(rows)))
    third_has_come, killed = threading.Event(), threading.Event()

    class Killed(BaseException):
        pass

    def hook(texts: list[str]) -> None:
        name = threading.current_thread().name
        if name == "third":
            third_has_come.set()
        elif len(teacher.asked) > 24:
            third_has_come.wait(20)
        if name == "first" and third_has_come.is_set() and not killed.is_set():
            killed.set()
            raise Killed

    def work() -> None:
        try:
            label(job_id, threading.current_thread().name)
        except Killed:
            return

    teacher.hook = staticmethod(hook)
    workers = [threading.Thread(target=work, name=name) for name in ("first", "second", "third")]
    for worker in workers[:2]:
        worker.start()
    wait_until(lambda: len(teacher.asked) > 24, what="two workers are at it")
    workers[2].start()
    for worker in workers:
        worker.join(60)
    assert killed.is_set()
    expire_leases()
    label(job_id, "last")
    assert job_of(job_id).phase == "training"
    counts = Counter(teacher.asked)
    assert set(counts) == {row["text"] for row in rows}
    assert len(teacher.asked) <= 96 + labeling.CHUNK_ROWS
    assert max(counts.values()) <= 2
    assert "third" in {shard.worker for shard in shards_of(job_id)}


def test_answers_that_a_lost_worker_paid_for_are_not_called_saved(
    teacher: type[WordTeacher],
) -> None:
    class Killed(BaseException):
        pass

    def dies(texts: list[str]) -> None:
        if len(teacher.asked) > 8:
            raise Killed

    teacher.hook = staticmethod(dies)
    job_id = submit(ungated(add_dataset(sentences(16, 1, labeled=False))))
    with pytest.raises(Killed):
        label(job_id)
    teacher.hook = staticmethod(lambda texts: None)
    expire_leases()
    label(job_id)
    told = figures(job_id)
    assert (told["tokens"], told["tokens_saved"], told["rows_from_cache"]) == (160, 0, 0)


def test_rows_tokens_and_pace_are_told_while_a_shard_is_being_labeled(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    job_id = submit(ungated(add_dataset(sentences(12, 1, labeled=False))))
    seen: list[dict[str, Any]] = []

    def look(texts: list[str]) -> None:
        if len(teacher.asked) == 12:
            wait_until(lambda: figures(job_id)["tokens"] == 80, what="the job shows 8 rows")
            seen.append(figures(job_id))

    teacher.hook = staticmethod(look)
    label(job_id)
    assert seen
    assert seen[0]["rows_per_second"] > 0
    assert seen[0]["eta_seconds"] > 0
    told = figures(job_id)
    assert (told["tokens"], told["eta_seconds"]) == (120, None)
    with session_scope() as session:
        phase = session.get_one(JobPhase, (job_id, "labeling"))
        assert (phase.done, phase.total) == (12, 12)


def test_a_pause_frees_the_worker_between_two_batches_and_nothing_is_paid_twice(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    rows = sentences(16, 1, labeled=False)
    teacher.broken = Counter({rows[2]["text"]: 1})
    job_id = submit(ungated(add_dataset(rows)))

    def pause(texts: list[str]) -> None:
        if len(teacher.asked) == 8:
            with session_scope() as session:
                lifecycle.pause(session, session.get_one(Job, job_id))
            threading.Event().wait(0.5)

    teacher.hook = staticmethod(pause)
    label(job_id)
    assert job_of(job_id).status == "paused"
    shard = shards_of(job_id)[0]
    assert (shard.status, shard.lease_expires_at, shard.lost_workers) == ("pending", None, 0)
    told = figures(job_id)
    assert len(teacher.asked) == 8
    assert (told["tokens"], shard.rows_done, shard.tokens_in_vain) == (80, 8, 10)
    assert claims() == 0
    label(job_id)
    assert len(teacher.asked) == 8, "nobody labels a paused job"

    with session_scope() as session:
        lifecycle.resume(session, session.get_one(Job, job_id))
    label(job_id)
    assert Counter(teacher.asked) == Counter([row["text"] for row in rows] + [rows[2]["text"]])
    assert job_of(job_id).phase == "training"
    # Sixteen answers, and one question in vain.
    told = figures(job_id)
    assert (told["tokens"], told["rows_from_cache"], told["rows_failed"]) == (170, 0, 0)


def test_the_bill_of_a_shard_that_was_given_back_has_every_try_on_it(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sentences(8, 1, labeled=False)
    teacher.broken = Counter({rows[0]["text"]: 4})
    job_id = submit(ungated(add_dataset(rows)))
    for _ in range(2):
        stopping = threading.Event()
        teacher.hook = staticmethod(lambda texts, stopping=stopping: stopping.set())
        labeling.label_job(job_id, "leaving", stopping)
        assert shards_of(job_id)[0].status == "pending"
    # The first row twice in vain, three answers, and the next worker has not come yet.
    assert (figures(job_id)["tokens"], shards_of(job_id)[0].tokens_in_vain) == (50, 20)
    assert shards_of(job_id)[0].seconds > shards_of(job_id)[0].seconds_in_vain > 0
    teacher.hook = staticmethod(lambda texts: None)
    label(job_id)
    # It fails twice more, the second time as the row that is tried again at the end.
    told = figures(job_id)
    assert teacher.asked.count(rows[0]["text"]) == 4
    assert (told["tokens"], told["rows_failed"]) == (110, 1)
    assert shards_of(job_id)[0].tokens_in_vain == 0


# --- rows that failed are asked about once more -----------------------------------------------------------------------


def test_rows_that_fail_are_tried_again_once_all_others_are_labeled(teacher: type[WordTeacher]) -> None:
    rows = sentences(12, 1, labeled=False)
    teacher.broken = Counter({rows[2]["text"]: 1, rows[7]["text"]: 9})
    job_id = submit(ungated(add_dataset(rows)))
    label(job_id)
    assert teacher.asked == [row["text"] for row in rows] + [rows[2]["text"], rows[7]["text"]]
    assert job_of(job_id).phase == "training"
    said = answers(job_id, 12)
    assert [answer["row"] for answer in said if answer["error"]] == [7]
    assert said[2]["source"] == "teacher"
    told = figures(job_id)
    # Answers cost 10 tokens each, and so do two failures, one of them twice.
    assert (told["rows_failed"], told["tokens"], told["rows_from_cache"]) == (1, 140, 0)
    assert [event.data["rows"] for event in events(job_id, "labeling.retry")] == [2]
    with session_scope() as session:
        assert session.get_one(JobPhase, (job_id, "labeling")).done == 12


def test_a_worker_lost_in_the_second_try_loses_no_answers(teacher: type[WordTeacher]) -> None:
    rows = sentences(8, 1, labeled=False)
    teacher.broken = Counter({rows[3]["text"]: 1})
    job_id = submit(ungated(add_dataset(rows)))

    class Killed(BaseException):
        pass

    def dies(texts: list[str]) -> None:
        if texts == [rows[3]["text"]]:
            raise Killed

    teacher.hook = staticmethod(dies)
    with pytest.raises(Killed):
        label(job_id)
    assert sum(answer["error"] is None for answer in answers(job_id, 8)) == 7
    teacher.hook = staticmethod(lambda texts: None)
    expire_leases()
    label(job_id)
    assert all(answer["error"] is None for answer in answers(job_id, 8))
    assert figures(job_id)["rows_failed"] == 0


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_passes_is_not_asked_twice_about_the_rows_of_the_gate(teacher: type[WordTeacher]) -> None:
    train, validation = sentences(40, 1, labeled=False), sentences(60, 2)
    job_id = submit(spec(add_dataset(train), validation_dataset_id=add_dataset(validation)))
    label(job_id)
    assert job_of(job_id).phase == "training"
    assert once(teacher)
    assert teacher.asked[:16] == [row["text"] for row in train[:16]]
    told = figures(job_id)
    assert (told["tokens"], told["tokens_saved"], told["rows_from_cache"]) == (1000, 0, 0)
    assert told["gate"]["verdict"] == "passed"
    assert told["gate"]["validation_rows"] == 60
    assert told["gate"]["kappa"] > 0.5
    assert len(events(job_id, "labeling.gate")) == 1


def test_a_teacher_that_says_the_same_of_every_text_fails_the_job_after_sixteen_rows(
    teacher: type[WordTeacher], client: TestClient
) -> None:
    teacher.say = lambda self, text: np.array([0.5, 0.3, 0.2])  # type: ignore[method-assign]
    job_id = submit(spec(add_dataset(sentences(60, 1, labeled=False))))
    label(job_id)
    job = job_of(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "teacher_useless"
    assert "16 different texts (confidence 0.5000 each time)" in job.error["message"]
    assert len(teacher.asked) == 16
    assert events(job_id, "job.failed")[0].data["different_texts"] == 16


def test_a_teacher_that_guesses_fails_the_job_with_the_figures(teacher: type[WordTeacher]) -> None:
    def guess(self: WordTeacher, text: str) -> np.ndarray:
        return np.roll([0.6, 0.3, 0.1], int(text.split()[-1]) // 3)

    teacher.say = guess  # type: ignore[method-assign]
    job_id = submit(
        spec(add_dataset(sentences(60, 1, labeled=False)), validation_dataset_id=add_dataset(sentences(300, 2)))
    )
    label(job_id)
    job = job_of(job_id)
    assert job.error is not None
    assert job.error["code"] == "teacher_useless"
    assert "of 256 validation rows" in job.error["message"]
    assert len(teacher.asked) == 16 + 256


@pytest.mark.parametrize(
    "change", [{"validation": 6}, {"labeling": {"smoke_gate": False}}], ids=["six rows prove nothing", "not wanted"]
)
def test_a_guessing_teacher_is_let_through_where_nothing_proves_it_or_nobody_asks(
    teacher: type[WordTeacher], change: dict[str, Any]
) -> None:
    teacher.say = lambda self, text: np.roll([0.6, 0.3, 0.1], int(text.split()[-1]) // 3)  # type: ignore[method-assign]
    validation = add_dataset(sentences(change.pop("validation", 300), 2))
    job_id = submit(spec(add_dataset(sentences(30, 1, labeled=False)), validation_dataset_id=validation, **change))
    label(job_id)
    assert job_of(job_id).phase == "training"


def test_a_job_that_is_cancelled_while_it_is_judged_is_labeled_no_further(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "lease_seconds", 0.3)
    job_id = submit(spec(add_dataset(sentences(40, 1, labeled=False))))

    def cancelled(texts: list[str]) -> None:
        with session_scope() as session:
            lifecycle.cancel(session, session.get_one(Job, job_id))
        threading.Event().wait(0.5)

    teacher.hook = staticmethod(cancelled)
    label(job_id)
    assert len(teacher.asked) == 4
    assert job_of(job_id).status == "cancelled"


def test_agreement_is_cohens_kappa_by_hand() -> None:
    predicted, gold = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 0]), np.array([0, 0, 1, 1, 0, 1, 0, 1, 0, 1])
    seen = gate.agreement(predicted, gold, 2)
    # 7 hits; shares of the classes .6/.4 and .5/.5: chance .6 * .5 + .4 * .5 = .5.
    assert seen["hits"] == 7
    assert seen["chance"] == pytest.approx(0.5)
    assert seen["kappa"] == pytest.approx(0.4)
    # Of ten throws of a coin 7 or more are heads in 176 of 1024 cases; with .5 + .1 * .5 a throw, at most 7 in 90 %.
    assert seen["p_value"] == pytest.approx(176 / 1024)
    assert seen["p_if_useful"] == pytest.approx(0.9004, abs=1e-4)
    gate.refuse_a_guesser(seen)


@pytest.mark.parametrize(("rows", "refused"), [(4, False), (12, False), (400, True)])
def test_the_fewer_rows_there_are_the_less_they_prove(rows: int, refused: bool) -> None:
    predicted, gold = (np.arange(rows) // 2) % 2, np.arange(rows) % 2
    seen = gate.agreement(predicted, gold, 2)
    assert (seen["accuracy"], seen["kappa"]) == (0.5, 0)
    assert (seen["p_if_useful"] < gate.DOUBT) == refused
    assert seen["p_value"] > 0.5


def test_labels_without_confidence_are_no_evidence_against_a_teacher() -> None:
    one_hot = np.tile(np.array([1.0, 0.0], np.float32), (16, 1))
    gate.refuse_a_constant(one_hot, [f"text {number}" for number in range(16)], [])
    soft = np.tile(np.array([0.9, 0.1], np.float32), (16, 1))
    gate.refuse_a_constant(soft, ["the same text"] * 16, [])
    with pytest.raises(gate.Useless):
        gate.refuse_a_constant(soft, [f"text {number}" for number in range(16)], [])


def test_every_bill_of_a_finished_job_is_a_shards(teacher: type[WordTeacher]) -> None:
    job_id = submit(spec(add_dataset(sentences(20, 1, labeled=False))))
    label(job_id)
    with session_scope() as session:
        sets = session.scalars(select(LabelSet.id)).all()
        bills = set(session.scalars(select(LabelCache.bill)))
    assert bills == {f"{sets[0]}/0"}


def test_a_worker_that_dies_over_the_first_rows_leaves_them_to_the_shards(
    teacher: type[WordTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sentences(20, 1, labeled=False)
    job_id = submit(spec(add_dataset(rows)))

    class Killed(BaseException):
        pass

    def dies(texts: list[str]) -> None:
        raise Killed

    teacher.hook = staticmethod(dies)
    with monkeypatch.context() as killed:
        killed.setattr(labels, "release", lambda *_: None)  # a killed process releases nothing
        with pytest.raises(Killed):
            label(job_id)
    assert shards_of(job_id)[0].attempt == 0
    expire_leases()
    teacher.hook = staticmethod(lambda texts: None)
    label(job_id)
    assert job_of(job_id).phase == "training"
    assert figures(job_id)["gate"]["verdict"] == "skipped"
