"""Several processes that train together end where one does: the same rows, the same influence, the same weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine

from app import options
from app.config import settings
from app.lifecycle import LeaseLost
from app.storage import Storage
from tests.support import TOPICS, expire_leases, job_of
from tests.workers import test_resume
from tests.workers.test_resume import TRAINING, Interrupted, events, fresh, labeled, outcome, trace
from workers import tasks
from workers.reporter import MemoryReporter, Reporter, Stopped
from workers.training import processes, resume, shares
from workers.training.distill import distill
from workers.training.run import HeldOut, Ledger, Pool, Run

spec = test_resume.spec
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])  # the libraries are loaded once for all followers of these tests
CPU = torch.device("cpu")
processes.WAIT_AT_MOST = timedelta(minutes=2)


def method_of(kind: str, **wish: Any) -> options.Method:
    return TypeAdapter(options.Method).validate_python({"kind": kind, **wish})


def made(method: options.Method, dropout: float) -> tuple[Run, Pool, HeldOut]:
    """A training. Without dropout in float64, where AdamW does not turn the rounding of a gradient that is 0 into steps."""
    run, pool, held_out = fresh(method, dropout)
    if dropout == 0:
        for encoder in (run.student, *(companion.encoder for companion in run.companions.values())):
            encoder.model.double()
    return run, pool, held_out


def follower(
    method: options.Method, training: options.Training, dropout: float, directory: Path, state: Path | None
) -> None:
    """The other process: leaves its weights in the directory."""
    torch.set_num_threads(1)
    run, pool, held_out = made(method, dropout)
    if state is not None:
        assert resume.restore(run, Storage(state.as_uri()), "job_two")
    with processes._group(directory, 1, 2, CPU):
        distill(run, pool, held_out, TOPICS, method, training, MemoryReporter())
    save_file({name: tensor.contiguous() for name, tensor in run.student.model.state_dict().items()}, directory / "end")


def in_two(
    method: options.Method, directory: Path, training: options.Training = TRAINING, dropout: float = 0.0,
    stop_at: int | None = None,
) -> tuple[Run, Interrupted]:  # fmt: skip
    """Train in this process and another one; where a state was saved in the directory, from there."""
    state = directory / "state"
    files = Storage(state.as_uri())
    run, pool, held_out = made(method, dropout)
    restored = resume.restore(run, files, "job_two")
    meeting = directory / f"meeting-{stop_at}-{restored}"
    meeting.mkdir(parents=True)
    other = SERVER.Process(target=follower, args=(method, training, dropout, meeting, state if restored else None))
    other.start()
    report = Interrupted(stop_at)
    try:
        with processes._group(meeting, 0, 2, CPU):
            try:
                distill(
                    run, pool, held_out, TOPICS, method, training, report,
                    save=lambda run: resume.save(run, files, "job_two"),
                )  # fmt: skip
            except Stopped:
                other.kill()
            other.join(60)
    finally:
        other.kill()
    if stop_at is None:
        assert other.exitcode == 0
        theirs = load_file(meeting / "end")
        for name, mine in run.student.model.state_dict().items():
            assert torch.equal(mine, theirs[name]), name
    return run, report


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (method_of("llkd", weighted=True, warm_up_agreement=0.1), 1),
        (method_of("lgtm", influence_every=2, mode="weighted"), 1),
        (method_of("llkd_lgtm", influence="finite_difference"), 3),
        (method_of("pkd", teacher_epochs=1, layers="last"), 2),
        (method_of("pesf_kd", teacher_epochs=1), 2),
        (method_of("meta_distill", teacher_epochs=1), 2),
        (method_of("random", ratio=0.55), 1),
        (method_of("dist", teacher_epochs=1), 1),
        (method_of("takd", teacher_epochs=1), 1),
        (method_of("rco", teacher_epochs=2, anchors=2), 1),
        (method_of("online", distillation_loss="dist"), 2),
        (method_of("dml"), 1),
        (method_of("prokt"), 1),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_two_processes_end_where_one_does(method: options.Method, parts: int, tmp_path: Path) -> None:
    """Also where they take their rows in parts, and the one process takes them whole."""
    alone, pool, held_out = made(method, dropout=0.0)
    report = Interrupted(None)
    distill(alone, pool, held_out, TOPICS, method, TRAINING, report)
    two, other_report = in_two(method, tmp_path, TRAINING.model_copy(update={"gradient_accumulation": parts}))

    assert alone.progress.selection() == two.progress.selection()
    for entry in fields(Ledger):
        mine, theirs = getattr(alone.ledger, entry.name), getattr(two.ledger, entry.name)
        if mine.dtype.kind == "i":
            assert mine.tolist() == theirs.tolist(), entry.name
        else:
            np.testing.assert_allclose(theirs, mine, rtol=1e-3, atol=1e-5, err_msg=entry.name)
    for name, value in alone.rule_state.items():
        torch.testing.assert_close(two.rule_state[name], value, rtol=1e-4, atol=1e-6)
    models = [(alone.student, two.student)]
    models += [(alone.companions[part].encoder, two.companions[part].encoder) for part in alone.companions]
    for one, other in models:
        for name, tensor in one.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    points, other_points = ({point[:2]: point[3] for point in each.points} for each in (report, other_report))
    assert other_points == pytest.approx(points, rel=1e-2, abs=1e-4, nan_ok=True)


def test_two_processes_that_are_stopped_go_on_as_if_they_had_never_been(tmp_path: Path) -> None:
    method = method_of("llkd", warm_up_agreement=0.1)
    undisturbed, report = in_two(method, tmp_path / "undisturbed", dropout=0.2)
    _, before = in_two(method, tmp_path / "stopped", dropout=0.2, stop_at=9)
    after, rest = in_two(method, tmp_path / "stopped", dropout=0.2)
    assert before.asked == 9
    assert trace(after, before, rest) == trace(undisturbed, report)


@pytest.mark.parametrize(("rows", "count"), [(1, 3), (3, 3), (7, 3), (8, 2)])
def test_every_row_is_dealt_and_comes_back_in_its_place(rows: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(float(rows) * 2).reshape(rows, 2)
    monkeypatch.setattr(shares, "processes", lambda: count)
    dealt = []
    for rank in range(count):
        monkeypatch.setattr(shares, "rank", lambda rank=rank: rank)
        dealt.append(values[shares.own(rows)].requires_grad_())
    assert {len(share) for share in dealt} == {-(-rows // count)}
    monkeypatch.setattr("accelerate.utils.gather", lambda mine: torch.cat([share.detach() for share in dealt]))
    for rank, mine in enumerate(dealt):
        monkeypatch.setattr(shares, "rank", lambda rank=rank: rank)
        gathered = shares.gather(mine, rows)
        assert torch.equal(gathered, values)
        (slope,) = torch.autograd.grad(gathered.sum(), mine)
        places = rank + count * np.arange(len(mine))
        assert slope[:, 0].tolist() == (places < rows).astype(float).tolist(), "a row dealt twice counts once"


def test_other_processes_draw_by_the_number_of_the_step_and_the_first_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(rank: int, *step: int) -> float:
        monkeypatch.setattr(shares, "rank", lambda: rank)
        torch.manual_seed(5)
        shares.draw_anew(0, *step)
        return torch.rand(()).item()

    of_the_first = draw(0, 0, 3)
    torch.manual_seed(5)
    assert of_the_first == torch.rand(()).item()
    assert draw(1, 0, 3) == draw(1, 0, 3)
    assert len({draw(1, 0, 3), draw(2, 0, 3), draw(1, 1, 3), draw(1, 0, 4), draw(0, 0, 3)}) == 5


KILLED, FAILED, GOES_ON = "kill -9 $$", "exit 1", "exec sleep 60"


@pytest.mark.parametrize(
    ("ends", "told", "expected"),
    [
        ((FAILED, FAILED), {1: "internal_error", 2: "out_of_memory"}, "out_of_memory"),
        ((KILLED, FAILED), {2: "internal_error"}, "lease lost"),
        ((FAILED, FAILED), {1: "internal_error", 2: "internal_error"}, "internal_error"),
        ((GOES_ON, GOES_ON), {}, "our own"),
        (("exit 0", "exit 0"), {}, "our own"),
    ],
)
def test_a_training_ends_for_the_reason_of_the_process_that_failed_first(
    ends: tuple[str, ...], told: dict[int, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LAST_WORDS_SECONDS", 0.2 if GOES_ON in ends else 20.0)
    started = [subprocess.Popen(["sh", "-c", end], stdin=subprocess.PIPE) for end in ends]
    for rank, code in told.items():
        (tmp_path / f"failure-{rank}.json").write_text(json.dumps({"code": code, "message": "because"}))
    followers = processes.Followers(tmp_path, len(ends) + 1, 1, started)
    error = RuntimeError("Connection closed by peer")
    reason = followers.why(error)
    names = {"lease lost": isinstance(reason, LeaseLost), "our own": reason is error}
    assert names.get(expected, getattr(reason, "code", None) == expected), reason
    followers.end()
    assert all(process.poll() is not None for process in started)


def test_a_job_of_two_processes_survives_the_loss_of_one(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch, database: Engine
) -> None:
    spec["student"]["dropout"] = 0.0
    monkeypatch.setattr(settings(), "processes", 1)
    alone = labeled(spec)
    tasks.train(alone)

    monkeypatch.setattr(settings(), "processes", 2)
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    started: list[processes.Followers] = []
    start, check, asked = processes.Followers.start, Reporter.check, 0

    def watched(self: processes.Followers, report: Any) -> None:
        start(self, report)
        started.append(self)

    def lose_one(self: Reporter) -> None:
        nonlocal asked
        asked += bool(started)
        if asked == 8:
            other = started[0].started[0]
            other.stdin.close()  # type: ignore[union-attr]  # as when this process is gone: it must end by itself
            assert other.wait(30) == 1
        check(self)

    monkeypatch.setattr(processes.Followers, "start", watched)
    monkeypatch.setattr(Reporter, "check", lose_one)
    job_id = labeled(spec)
    tasks.train(job_id)
    assert job_of(job_id).status == "running", "given up, for the sweep to bring back"
    expire_leases()
    tasks.train(job_id)

    job = job_of(job_id)
    assert (job.status, job.error, job.attempt) == ("succeeded", None, 2)
    assert job.selection == job_of(alone).selection
    resumed = [event.data["step"] for event in events(job_id, "training.resumed")]
    assert len(resumed) == 1
    assert 0 < resumed[0] < 12
    assert [event.data["processes"] for event in events(job_id, "training.processes")] == [2, 2]
    assert [each.started[0].poll() is not None for each in started] == [True, True]
    assert not torch.distributed.is_initialized()
    assert "LOCAL_RANK" not in os.environ
    assert outcome(job_id)["points"].keys() == outcome(alone)["points"].keys()
