"""A training that is stopped, saved and restored ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from app import labels as label_cache
from app import lifecycle, options, predictions, pretrained
from app.config import settings
from app.db import engine, session_scope
from app.lifecycle import LeaseLost
from app.models import Checkpoint, Job, JobEvent, JobMetric
from app.storage import Storage
from tests.support import (
    TOPICS,
    add_dataset,
    expire_leases,
    job_of,
    label,
    run,
    sentences,
    submit,
    tiny_spec,
    wait_until,
)
from workers import artifacts, label_report, pipeline, reporter, tasks
from workers.reporter import GivenUp, MemoryReporter, Reporter, Stopped
from workers.training import resume
from workers.training.data import tokenise
from workers.training.distill import distill
from workers.training.encoders import build_student
from workers.training.run import HeldOut, Ledger, Pool, Run, begin
from workers.training.step import interruptible

ROWS = 40
TRAINING = options.Training(epochs=2, batch_size=8, learning_rate=5e-3)
WISH = options.Student(model="scratch", num_layers=1, hidden_size=32, vocab_size=300, max_length=24, dropout=0.2)
CHECKS = 2 * (ROWS // 8 + 1)
"""How often the loop asks whether to go on: before each step, and before each batch of the validation. A rule that looks at
the student asks before each batch of that too."""
METHODS: list[options.Method] = [
    TypeAdapter(options.Method).validate_python(method)
    for method in (
        {"kind": "llkd", "weighted": True, "warm_up_agreement": 0.1},
        {"kind": "random", "ratio": 0.55},
        {"kind": "softmatch"},
        {"kind": "prokt"},
        {"kind": "lgtm", "influence_every": 2, "mode": "weighted", "teacher_epochs": 0},
        {"kind": "llkd_lgtm", "influence": "finite_difference", "influence_dropout": True, "teacher_epochs": 0},
    )
]
TEACHER_FIRST: list[options.Method] = [
    TypeAdapter(options.Method).validate_python({"kind": kind, "teacher_epochs": 1, **wish})
    for kind, wish in {
        "kd": {"temperature": 2.0},
        "skd": {},
        "dist": {},
        "pkd": {"layers": "last"},
        "takd": {},
        "rco": {"anchors": 2, "teacher_epochs": 2},
        "pesf_kd": {},
        "meta_distill": {},
        "lgtm": {},
    }.items()
]
TEACHER = WISH.model_copy(update={"num_layers": 2})


class Interrupted(MemoryReporter):
    """Stops the work at its n-th question, counted from 1; None: never."""

    def __init__(self, stop_at: int | None, error: type[Exception] = Stopped) -> None:
        super().__init__()
        self.stop_at, self.error, self.asked = stop_at, error, 0

    def check(self) -> None:
        self.asked += 1
        if self.asked == self.stop_at:
            raise self.error


def fresh(method: options.Method, dropout: float = 0.2) -> tuple[Run, Pool, HeldOut]:
    """Everything a process needs to train, made anew."""
    wish, teacher_wish = (each.model_copy(update={"dropout": dropout}) for each in (WISH, TEACHER))
    rows, held_out = sentences(ROWS, 1), sentences(15, 2)
    texts = [row["text"] for row in rows]
    source = pretrained.resolve("scratch", purpose="student", roots=[], allow_hub=False)
    student = build_student(wish, TOPICS, texts, None, source, seed=0)
    teacher = torch.full((ROWS, 3), 0.0)
    for number, row in enumerate(rows):
        confidence = 0.5 + 0.4 * ((7 * number) % 11) / 10
        teacher[number] = (1 - confidence) / 2
        teacher[number, TOPICS.index(row["label"])] = confidence
    barred = np.zeros(ROWS, bool)
    barred[[4, 17]] = True
    pool = Pool(tokenise(student.tokenizer, texts), teacher, np.arange(ROWS), barred)
    validation = tokenise(student.tokenizer, [row["text"] for row in held_out])
    gold = np.array([TOPICS.index(row["label"]) for row in held_out])
    held_out = HeldOut(validation, np.arange(15), gold)
    if not isinstance(method, options.TaughtByEncoder):
        return begin(student, pool, method, TRAINING, 3), pool, held_out
    teacher_model = build_student(teacher_wish, TOPICS, texts, None, source, seed=1)
    assistant = build_student(teacher_wish, TOPICS, texts, None, source, seed=2) if method.kind == "takd" else None
    pool = replace(pool, feedback=HeldOut(validation, np.arange(10), gold[:10]))
    return begin(student, pool, method, TRAINING, 3, teacher_model, assistant), pool, held_out


def train(method: options.Method, storage: Storage, name: str, stop_at: int | None = None) -> tuple[Run, Interrupted]:
    """Begin or go on with the training of that name, in a process that has thrown dice before. Raises Stopped."""
    run, pool, held_out = fresh(method)
    if storage.exists(resume.key(name)):
        torch.manual_seed(987)
        random.seed(4)
        np.random.seed(5)
        run.generator.manual_seed(3)
        assert resume.restore(run, storage, name)
    report = Interrupted(stop_at)
    try:
        distill(
            run, pool, held_out, TOPICS, method, TRAINING, report, save=lambda run: resume.save(run, storage, name)
        )  # fmt: skip
    except Stopped:
        report.events.append(("stopped", "", {}))
    return run, report


def trace(run: Run, *reports: Interrupted) -> dict[str, Any]:
    """All that a run leaves behind, bit for bit."""
    points = {(name, step): (epoch, value) for report in reports for name, step, epoch, value in report.points}
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in run.student.model.state_dict().items()},
        "companions": {
            f"{part} {name}": tensor.numpy().tobytes()
            for part, companion in run.companions.items()
            for name, tensor in companion.encoder.model.state_dict().items()
        },
        "ledger": {entry.name: getattr(run.ledger, entry.name).tobytes() for entry in fields(Ledger)},
        "rule": {name: tensor.numpy().tobytes() for name, tensor in run.rule_state.items()},
        "selection": run.progress.selection(),
        "best": (run.progress.best_step, run.progress.best_score, run.progress.best_metrics),
        "points": points,
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_had_never_been(method: options.Method, storage: Storage) -> None:
    undisturbed, report = train(method, storage, f"job_{method.kind}-undisturbed")
    expected = trace(undisturbed, report)
    checks = report.asked
    selecting = checks - CHECKS - (2 if undisturbed.companions else 0)  # one more batch is scored in each epoch
    assert selecting == 0 if method.kind in ("random", "prokt", "lgtm") else 0 < selecting <= 2 * (ROWS // 8)
    assert undisturbed.progress.selection()["selected"] > 0
    for stop_at in range(1, checks + 1, 1 if method.kind == "llkd" else 3):
        name = f"job_{method.kind}-{stop_at}"
        _, first = train(method, storage, name, stop_at)
        assert first.events[-1][0] == "stopped"
        resumed, second = train(method, storage, name)
        got = trace(resumed, first, second)
        for part in expected:
            assert got[part] == expected[part], f"{part} differ after a stop at question {stop_at}"
        again = second.asked - (checks - stop_at + 1)
        # A stop between the scoring of student and teacher, or within a step's selection, asks once more; no step is done
        # twice.
        assert again in (0, 1), stop_at
        assert again == 0 or selecting or stop_at in (checks // 2, checks), stop_at


@pytest.mark.parametrize("method", TEACHER_FIRST, ids=lambda method: method.kind)
def test_a_run_whose_teacher_learns_first_is_stopped_in_every_stage_and_ends_the_same(
    method: options.Method, storage: Storage
) -> None:
    undisturbed, report = train(method, storage, f"job_first-{method.kind}-undisturbed")
    expected = trace(undisturbed, report)
    assert not report.events or report.events[-1][0] != "stopped"
    courses = len(undisturbed.courses)
    assert courses == (2 if method.kind == "takd" else 1)
    # In a step of a course, while it is scored, right after it, in a step of the student's second epoch.
    last = report.asked
    for stop_at in (4, ROWS // 8 + 1, ROWS // 8 + 3, last - CHECKS // 2 + 2):
        name = f"job_first-{method.kind}-{stop_at}"
        _, first = train(method, storage, name, stop_at)
        assert first.events[-1][0] == "stopped"
        resumed, second = train(method, storage, name)
        assert second.asked < last, "what was done is not done again"
        got = trace(resumed, first, second)
        for part in expected:
            assert got[part] == expected[part], f"{part} differ after a stop at question {stop_at}"


def test_what_was_learned_first_changes_only_where_the_method_says_so(storage: Storage) -> None:
    for method in TEACHER_FIRST:
        run, pool, held_out = fresh(method)
        after_course: dict[str, dict[str, torch.Tensor]] = {}

        def note(run: Run, found: dict[str, dict[str, torch.Tensor]] = after_course) -> None:
            weights = run.companions["teacher"].encoder.model.state_dict()
            found.setdefault("first", {name: tensor.clone() for name, tensor in weights.items()})

        before = {name: tensor.clone() for name, tensor in run.companions["teacher"].encoder.model.state_dict().items()}
        distill(run, pool, held_out, TOPICS, method, TRAINING, MemoryReporter(), on_epoch=note)
        end = run.companions["teacher"].encoder.model.state_dict()
        changed = {name for name, tensor in after_course["first"].items() if not torch.equal(tensor, end[name])}
        assert any(not torch.equal(before[name], tensor) for name, tensor in after_course["first"].items())
        if method.kind == "pesf_kd":
            assert changed
            assert all(name.startswith("adapter.") for name in changed)
        else:
            # rco goes from anchor to anchor
            assert bool(changed) == (method.kind in ("meta_distill", "rco", "lgtm")), method.kind


def test_a_run_that_is_stopped_at_every_step_ends_as_if_it_had_never_been(storage: Storage) -> None:
    undisturbed, report = train(METHODS[1], storage, "job_once")
    reports = []
    for _ in range(3 * CHECKS):
        run, part = train(METHODS[1], storage, "job_often", stop_at=2)
        reports.append(part)
        if part.events[-1][0] != "stopped":
            break
    assert len(reports) == CHECKS
    assert trace(run, *reports) == trace(undisturbed, report)


def test_the_random_state_that_dropout_draws_from_is_restored(storage: Storage) -> None:
    """Without it the test above could not fail: another seed after the stop gives other weights."""
    undisturbed, report = train(METHODS[2], storage, "job_dropout")
    train(METHODS[2], storage, "job_other-dropout", stop_at=4)
    run, pool, held_out = fresh(METHODS[2])
    assert resume.restore(run, storage, "job_other-dropout")
    torch.manual_seed(1)
    again = Interrupted(None)
    distill(run, pool, held_out, TOPICS, METHODS[2], TRAINING, again)
    assert trace(run, again)["weights"] != trace(undisturbed, report)["weights"]


class Cut(MemoryReporter):
    """Gives the work up at its n-th question within a step, counted from 1; None: never."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.asked = at, 0

    def check_within_step(self) -> None:
        self.asked += 1
        if self.asked == self.at:
            raise GivenUp


def train_until_cut(method: options.Method, storage: Storage, name: str, at: int | None) -> tuple[Run, Cut]:
    """As train(), saved after every step."""
    run, pool, held_out = fresh(method)
    resume.restore(run, storage, name)
    report = Cut(at)
    models = [run.student.model, *(companion.encoder.model for companion in run.companions.values())]
    with contextlib.suppress(GivenUp), interruptible(report, models):
        distill(
            run, pool, held_out, TOPICS, method, TRAINING, report, save=lambda run: resume.save(run, storage, name),
            save_every_seconds=0,
        )  # fmt: skip
    return run, report


@pytest.mark.parametrize(
    "method", [METHODS[0], METHODS[4], METHODS[5], TEACHER_FIRST[0]], ids=lambda method: method.kind
)
def test_a_run_given_up_within_a_step_goes_on_from_its_last_saved_state(
    method: options.Method, storage: Storage
) -> None:
    undisturbed, report = train_until_cut(method, storage, f"job_cut-{method.kind}", None)
    expected = trace(undisturbed, report)
    # Next to each other, so that some are on the way forward and some on the way back.
    for at in (*range(1, 9), *range(report.asked // 2, report.asked // 2 + 6)):
        name = f"job_cut-{method.kind}-{at}"
        _, first = train_until_cut(method, storage, name, at)
        assert first.asked == at, "it ended there"
        resumed, second = train_until_cut(method, storage, name, None)
        got = trace(resumed, first, second)
        for part in expected:
            assert got[part] == expected[part], f"{part} differ after a cut at question {at}"


def test_layers_ask_on_the_way_forward_and_back_and_no_longer_than_they_should() -> None:
    run, pool, _ = fresh(METHODS[0])
    report, model = Cut(None), run.student.model
    with interruptible(report, [model]):
        loss = model(**pool.tokens.batch(pool.rows[:2])).logits.sum()
        assert report.asked == 1
        loss.backward()
        assert report.asked == 2
        with torch.no_grad():
            model(**pool.tokens.batch(pool.rows[:2]))
        assert report.asked == 3
    model(**pool.tokens.batch(pool.rows[:2])).logits.sum().backward()
    assert report.asked == 3


def test_nothing_is_restored_where_nothing_was_saved(storage: Storage) -> None:
    run, _, _ = fresh(METHODS[0])
    before = trace(run)
    assert not resume.restore(run, storage, "job_never-seen")
    assert trace(run) == before


def test_a_run_that_lost_its_lease_saves_nothing(storage: Storage) -> None:
    run, pool, held_out = fresh(METHODS[0])
    saved = []
    with pytest.raises(LeaseLost):
        distill(
            run, pool, held_out, TOPICS, METHODS[0], TRAINING, Interrupted(4, LeaseLost), save=saved.append,
            on_epoch=saved.append,
        )  # fmt: skip
    assert saved == []


# --- the same with a job in the database ----------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, act: Any) -> None:
    """Do something at the n-th question of whether to go on, once."""
    asked = 0

    def check(self: Reporter) -> None:
        nonlocal asked
        asked += 1
        if asked == at:
            act(self)

    monkeypatch.setattr(Reporter, "check", check)


def pause(report: Reporter) -> None:
    with session_scope() as session:
        lifecycle.pause(session, session.get_one(Job, report.job_id))
    raise Stopped


def go_on(job_id: str) -> None:
    with session_scope() as session:
        lifecycle.resume(session, session.get_one(Job, job_id))
    tasks.train(job_id)


def outcome(job_id: str) -> dict[str, Any]:
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        checkpoint = session.get_one(Checkpoint, job.best_checkpoint_id)
        metrics = session.scalars(select(JobMetric).where(JobMetric.job_id == job_id))
        return {
            "weights": next(file["sha256"] for file in checkpoint.files if file["name"] == "model.safetensors"),
            "selection": job.selection,
            "points": {
                (point.name, point.step): (point.epoch, point.value)
                for point in metrics
                if point.name != "training_seconds"
            },
            "evaluation": job.evaluation,
        }


@pytest.fixture
def spec(database: Engine) -> dict[str, Any]:
    """A job of 6 + 6 steps, 2 validations and 2 evaluations, after 3 questions while texts are tokenised; a step asks when
    it begins and when it looks at the student, packing asks 3 times."""
    return tiny_spec(
        add_dataset(sentences(48, 1)), validation_dataset_id=add_dataset(sentences(12, 2)),
        test_dataset_id=add_dataset(sentences(12, 3)), method={"kind": "llkd"},
        training={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3},
    )  # fmt: skip


def labeled(spec: dict[str, Any]) -> str:
    job_id = submit(spec)
    label(job_id)
    return job_id


def events(job_id: str, type: str) -> list[JobEvent]:
    with session_scope() as session:
        return list(session.scalars(select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == type)))


def test_a_job_paused_in_any_phase_and_resumed_ends_as_if_it_had_never_been(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = labeled(spec)
    tasks.train(undisturbed)
    expected = outcome(undisturbed)
    # While texts are tokenised; in the first epoch; while rows are selected; while it is scored; in the second; while the
    # test set is scored; while the checkpoint is packed.
    for at, step in ((2, None), (10, 3), (11, 3), (16, 6), (23, 9), (31, 12), (33, 12)):
        job_id = labeled(spec)
        interrupt(monkeypatch, at, pause)
        tasks.train(job_id)
        paused = job_of(job_id)
        assert (paused.status, paused.lease_expires_at, paused.best_checkpoint_id) == ("paused", None, None), at
        go_on(job_id)
        assert job_of(job_id).status == "succeeded", at
        assert outcome(job_id) == expected, at
        assert [event.data["step"] for event in events(job_id, "training.resumed")] == ([step] if step else []), at


def test_a_pause_does_not_wait_for_the_end_of_a_long_step(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    monkeypatch.setattr(reporter, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(reporter, "HOLD_SECONDS", 0.3)
    spec |= {"method": {"kind": "no_selection"}}
    undisturbed, job_id = labeled(spec), labeled(spec)
    tasks.train(undisturbed)
    asked, ask = 0, Reporter.check_within_step

    def in_a_slow_layer(self: Reporter) -> None:
        nonlocal asked
        asked += 1
        if asked == 3:  # on the way forward in the second step
            with session_scope() as session:
                lifecycle.pause(session, session.get_one(Job, job_id))
        if asked in (3, 4):
            time.sleep(0.5)
        ask(self)

    monkeypatch.setattr(Reporter, "check_within_step", in_a_slow_layer)
    tasks.train(job_id)
    assert (job_of(job_id).status, asked) == ("paused", 4)
    go_on(job_id)
    assert [event.data["step"] for event in events(job_id, "training.resumed")] == [1]
    assert outcome(job_id) == outcome(undisturbed)


def test_the_saved_state_is_deleted_when_the_job_has_succeeded(
    spec: dict[str, Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = labeled(spec)
    interrupt(monkeypatch, 8, pause)
    tasks.train(job_id)
    assert storage.exists(resume.key(job_id))
    go_on(job_id)
    assert not storage.exists(resume.key(job_id))


def test_a_worker_whose_job_was_given_to_another_stops_and_writes_nothing(
    spec: dict[str, Any], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = labeled(spec)
    after: dict[str, Any] = {}

    def count() -> tuple[int, int]:
        with session_scope() as session:
            return (
                session.scalar(select(func.count()).select_from(JobEvent).where(JobEvent.job_id == job_id)) or 0,
                session.scalar(select(func.count()).select_from(JobMetric).where(JobMetric.job_id == job_id)) or 0,
            )

    def replaced(report: Reporter) -> None:
        expire_leases()
        with session_scope() as session:
            assert lifecycle.claim(session, job_id, "heir") is not None
        after["written"] = count()

    interrupt(monkeypatch, 6, replaced)
    tasks.train(job_id)
    job = job_of(job_id)
    assert (job.status, job.worker, job.attempt, job.best_checkpoint_id) == ("running", "heir", 2, None)
    assert count() == after["written"]
    assert not storage.exists(resume.key(job_id))
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 0


@pytest.mark.parametrize("step", ["write_predictions", "report"])
def test_answers_and_report_of_a_worker_whose_job_was_given_to_another_do_not_appear(
    spec: dict[str, Any], storage: Storage, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    job_id = labeled(spec)
    module = artifacts if step == "write_predictions" else label_report
    write = getattr(module, step)

    def too_late(*arguments: Any, **named: Any) -> Any:
        expire_leases()
        with session_scope() as session:
            assert lifecycle.claim(session, job_id, "heir") is not None
        return write(*arguments, **named)

    monkeypatch.setattr(reporter, "RENEW_SECONDS", 60)
    monkeypatch.setattr(module, step, too_late)
    if step == "report":  # what computes it must not notice first: the last moment is what is tested
        monkeypatch.setattr(Reporter, "check", lambda self: None)
    tasks.train(job_id)
    assert (job_of(job_id).worker, job_of(job_id).status) == ("heir", "running")
    assert storage.exists(predictions.key(job_id)) == (step == "report")
    assert not storage.exists(label_cache.report_key(job_id))


def test_a_job_whose_worker_died_goes_on_from_its_last_saved_step_and_ends_the_same(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = labeled(spec)
    tasks.train(undisturbed)
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    job_id = labeled(spec)

    class Killed(BaseException):
        """What a SIGKILL looks like from inside: nothing is caught, nothing is written."""

    def die(report: Reporter) -> None:
        raise Killed

    interrupt(monkeypatch, 14, die)
    with pytest.raises(Killed):
        tasks.train(job_id)
    assert job_of(job_id).status == "running"
    expire_leases()
    tasks.train(job_id)
    assert outcome(job_id) == outcome(undisturbed)
    assert [event.data["step"] for event in events(job_id, "training.resumed")] == [5]
    lost = [event.data["attempt"] for event in events(job_id, "worker.lost")]
    assert (lost, job_of(job_id).lost_workers) == ([1], 0), "a loss no longer counts once the state was saved after it"


def test_a_job_that_gets_on_between_its_losses_never_fails_of_them_and_one_that_does_not_fails(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(report: Reporter) -> None:
        raise Killed

    def lose_a_worker(job_id: str) -> None:
        with monkeypatch.context() as patch:
            interrupt(patch, 6, die)
            with pytest.raises(Killed):
                tasks.train(job_id)
        expire_leases()

    monkeypatch.setattr(settings(), "max_attempts", 2)
    stuck = labeled(spec)
    lose_a_worker(stuck)
    lose_a_worker(stuck)
    tasks.train(stuck)
    job = job_of(stuck)
    assert (job.status, (job.error or {})["code"]) == ("failed", "worker_lost")

    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    slow = labeled(spec)
    for _ in range(4):
        lose_a_worker(slow)
    tasks.train(slow)
    assert job_of(slow).status == "succeeded"
    assert len(events(slow, "worker.lost")) == 4


@pytest.mark.parametrize("phase", ["labeling", "training"])
def test_a_worker_that_is_older_than_the_job_says_so_and_the_job_can_be_retried(database: Engine, phase: str) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    if phase == "training":
        label(job_id)

    def rewrite(**fields: Any) -> None:
        with session_scope() as session:
            job = session.get_one(Job, job_id)
            job.spec = {**job.spec, **fields}

    method = job_of(job_id).spec["method"]
    rewrite(method={"kind": "of_next_year"})
    run(job_id)
    failed = job_of(job_id)
    assert failed.status == "failed"
    assert (failed.error["code"], failed.error["phase"]) == ("worker_outdated", phase)
    rewrite(method=method)
    with session_scope() as session:
        lifecycle.retry(session, session.get_one(Job, job_id))
    assert run(job_id).status == "succeeded"


@pytest.mark.parametrize(("move", "end"), [(lifecycle.cancel, "cancelled"), (lifecycle.pause, "paused")])
def test_a_job_stops_although_its_worker_hangs(
    database: Engine, monkeypatch: pytest.MonkeyPatch, move: Callable[[Session, Job], None], end: str
) -> None:
    monkeypatch.setattr(reporter, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(reporter, "UNHEARD_SECONDS", 0.2)
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    label(job_id)
    with tasks.claimed(job_id) as held:
        assert held is not None
        with session_scope() as session:
            move(session, session.get_one(Job, job_id))
        wait_until(lambda: job_of(job_id).status == end, what="the job to stop while this thread does nothing for it")
        with pytest.raises(lifecycle.LeaseLost):
            held[1].check()
    assert job_of(job_id).status == end


def test_a_checkpoint_outlives_a_commit_whose_answer_was_lost_while_it_was_being_done(
    database: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks during the commit, and the worker asks again before PostgreSQL is done with it."""
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    label(job_id)
    patiently = pipeline.patiently

    def uncertain(work: Callable[[Session], Any]) -> Any:
        if work.__qualname__ != "_publish.<locals>.end":
            return patiently(work)
        with ThreadPoolExecutor(1) as again, Session(engine()) as first:
            work(first)
            first.flush()
            second = again.submit(patiently, work)
            time.sleep(0.5)
            assert not second.done()
            first.commit()
            return second.result()

    monkeypatch.setattr(pipeline, "patiently", uncertain)
    tasks.train(job_id)
    job = job_of(job_id)
    assert job.status == "succeeded", job.error
    assert storage.exists(f"checkpoints/{job.best_checkpoint_id}.tar")


@pytest.mark.parametrize("move", ["cancel", "pause"])
def test_a_job_that_is_being_packed_stops_and_goes_on_from_there(
    database: Engine, storage: Storage, monkeypatch: pytest.MonkeyPatch, move: str
) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(12, 1))))
    label(job_id)
    saved, heard = artifacts.save_student, threading.Event()
    beat = reporter.Heartbeat.confirm

    def told(self: reporter.Heartbeat) -> None:
        beat(self)
        if self.status != "running":
            heard.set()

    def interrupted(*arguments: Any) -> None:
        saved(*arguments)
        with session_scope() as session:
            getattr(lifecycle, move)(session, session.get_one(Job, job_id))
        assert heard.wait(10)

    with monkeypatch.context() as patched:
        patched.setattr(reporter, "RENEW_SECONDS", 0.05)
        patched.setattr(reporter.Heartbeat, "confirm", told)
        patched.setattr(artifacts, "save_student", interrupted)
        tasks.train(job_id)
    job = job_of(job_id)
    assert (job.status, job.phase) == ({"cancel": "cancelled", "pause": "paused"}[move], "packaging")
    assert job.best_checkpoint_id is None
    assert storage.exists(resume.key(job_id))
    with session_scope() as session:
        {"cancel": lifecycle.retry, "pause": lifecycle.resume}[move](session, session.get_one(Job, job_id))
    tasks.train(job_id)
    assert job_of(job_id).status == "succeeded"
    with session_scope() as session:
        steps = list(
            session.scalars(select(JobEvent.type).where(JobEvent.job_id == job_id, JobEvent.type == "training.epoch"))
        )
    assert len(steps) == 1, "no epoch is trained twice"
