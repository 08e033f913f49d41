"""What a worker says about its job, written only while the job is this attempt's; and whether it should stop.

No transaction is open while the model computes: every call opens one, writes, and closes it. A thread renews the lease
and learns the job's status, so asking is free in the training loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import lifecycle
from app.config import settings
from app.db import AWAY, PATIENCE_SECONDS, patiently, session_scope
from app.lifecycle import LeaseLost
from app.models import PHASES, Job, JobPhase
from workers.celery_app import begin_anew

log = structlog.get_logger()

RENEW_SECONDS = 2.0
FLUSH_SECONDS = 2.0
HOLD_SECONDS = 4.0
"""How long the owner of a job who wants it to stop waits for the end of a step: with RENEW_SECONDS less than the 10 promised."""
UNHEARD_SECONDS = 6.5
"""How long work may go on that should end: it loads a model, or saves a large state, or hangs. Then the worker begins anew."""


ENDING = ("pausing", "paused", "cancelling")
"""What a renewal may say of work that should end."""


class Stopped(Exception):
    """The work was asked to stop: paused, cancelled, or the worker is shutting down. Save the state first."""


class GivenUp(Exception):
    """The work was given up in the middle of a step: what it holds is neither before nor after, and must not be saved."""


class Report(Protocol):
    """What training code needs of a reporter; MemoryReporter serves where there is no job."""

    def phase(self, name: str, total: int) -> None: ...
    def progress(self, done: int) -> None: ...
    def metrics(self, step: int, epoch: float, values: dict[str, float | None]) -> None: ...
    def selection(self, figures: dict[str, Any]) -> None: ...
    def event(self, type: str, message: str, *, level: str = "info", **data: Any) -> None: ...
    def flush(self) -> None: ...
    def check(self) -> None: ...
    def check_within_step(self) -> None: ...


def asking(report: Report) -> Callable[[], bool]:
    """The report's question for whoever computes for long; Stopped and LeaseLost leave as they are."""

    def should_stop() -> bool:
        report.check()
        return False

    return should_stop


class MemoryReporter:
    """A report kept in lists, for benchmarks, experiments and tests of a loop by itself."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float, float | None]] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.last_selection: dict[str, Any] = {}

    def phase(self, name: str, total: int) -> None: ...

    def progress(self, done: int) -> None: ...

    def metrics(self, step: int, epoch: float, values: dict[str, float | None]) -> None:
        self.points += [(name, step, epoch, value) for name, value in values.items()]

    def selection(self, figures: dict[str, Any]) -> None:
        self.last_selection = figures

    def event(self, type: str, message: str, *, level: str = "info", **data: Any) -> None:
        self.events.append((type, message, data))

    def flush(self) -> None: ...

    def check(self) -> None: ...

    def check_within_step(self) -> None: ...


class Heartbeat:
    """Calls `renew` every couple of seconds from a thread of its own until the block ends.

    `lost` is set once `renew` raises LeaseLost; a database that is away is asked again. Work that should end, because its
    owner says so or it is another's now, and does not for UNHEARD_SECONDS cannot be reached: `let_go` is to record that it
    was stopped, and the worker begins anew.
    """

    def __init__(self, renew: Callable[[], str | None], let_go: Callable[[Session], None]) -> None:
        self.renew, self._let_go = renew, let_go
        self.status = "running"
        self.lost = threading.Event()
        self._good_until = time.monotonic() + settings().lease_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def confirm(self) -> None:
        """Renew now. Raises LeaseLost when the work is another's."""
        began = time.monotonic()
        try:
            self.status = self.renew() or "running"
        except LeaseLost:
            self.lost.set()
            raise
        self._good_until = began + settings().lease_seconds

    def check(self) -> None:
        """Raises LeaseLost when the work is another's.

        A lease that has run out unrenewed, because the process was frozen or the database is away, may be another's
        already: it is renewed, or found lost, before the work goes on by a single step.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() > self._good_until and not self.lost.is_set():
            try:
                self.confirm()
            except AWAY as error:
                if time.monotonic() > deadline:
                    raise LeaseLost from None
                log.warning("lease_not_renewed", error=str(error))
                time.sleep(1)
        if self.lost.is_set():
            raise LeaseLost

    def _beat(self) -> None:
        interval = min(RENEW_SECONDS, settings().lease_seconds / 3)
        asked_at: float | None = None
        while not self._ended.wait(interval if asked_at is None else min(interval, 0.5)):
            if not self.lost.is_set():
                try:
                    self.confirm()
                except LeaseLost:
                    pass  # the work learns it from `lost`
                except SQLAlchemyError as error:
                    log.warning("lease_not_renewed", error=str(error))
            if not self.lost.is_set() and self.status not in ENDING:
                asked_at = None
                continue
            asked_at = asked_at or time.monotonic()
            if time.monotonic() - asked_at > UNHEARD_SECONDS:
                self._give_up()
                return

    def _give_up(self) -> None:
        log.error("work_does_not_end", status=self.status, seconds=UNHEARD_SECONDS)
        if not self.lost.is_set():
            self.lost.set()
            try:
                with session_scope() as session:
                    self._let_go(session)
            except LeaseLost:
                pass  # it ended just now
            except SQLAlchemyError as error:
                log.warning("not_let_go", error=str(error))  # the lease runs out, and the sweep sees to it
        if not self._ended.is_set():
            begin_anew()

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=10)


class Reporter:
    """The report of one attempt at one job. Every write raises LeaseLost once the job is no longer this attempt's."""

    def __init__(self, job_id: str, attempt: int, heartbeat: Heartbeat, stopping: threading.Event) -> None:
        self.job_id, self.attempt = job_id, attempt
        self._heartbeat, self._stopping = heartbeat, stopping
        self._phase = "training"
        self._done: int | None = None
        self._points: list[tuple[int, float, dict[str, float | None]]] = []
        self._selection: dict[str, Any] | None = None
        self._flushed_at = time.monotonic()
        self._asked_at: float | None = None

    def phase(self, name: str, total: int) -> None:
        """Enter a phase that will do `total` rows."""
        self.flush()

        def enter(session: Session, job: Job) -> None:
            # After a worker was lost in a later phase, the job goes back to training: what it left is not finished.
            if job.phase is not None and PHASES.index(job.phase) < PHASES.index(name):
                lifecycle.advance_phase(session, job.id, job.phase, self._total(session, job.phase), finished=True)
            job.phase = name
            lifecycle.start_phase(session, job.id, name, total)
            lifecycle.emit(session, job.id, f"{name}.started", f"Phase {name} began.", total=total)

        self._patiently(enter)
        self._phase = name

    def _total(self, session: Session, name: str) -> int:
        phase = session.get(JobPhase, (self.job_id, name))
        return phase.total if phase is not None else 0

    def progress(self, done: int) -> None:
        """Note how many rows of the phase are done; written with the next flush."""
        self._done = done
        self._flush_if_due()

    def metrics(self, step: int, epoch: float, values: dict[str, float | None]) -> None:
        """Note points of several series; written with the next flush."""
        self._points.append((step, epoch, values))
        self._flush_if_due()

    def selection(self, figures: dict[str, Any]) -> None:
        """Note how many rows were seen and selected so far; written with the next flush."""
        self._selection = figures

    def event(self, type: str, message: str, *, level: str = "info", **data: Any) -> None:
        """Record an event now."""
        self._patiently(lambda session, job: lifecycle.emit(session, job.id, type, message, level=level, **data))

    def _flush_if_due(self) -> None:
        if time.monotonic() - self._flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was noted, all in one transaction."""
        self._flushed_at = time.monotonic()
        if not self._points and self._done is None and self._selection is None:
            return

        def record(session: Session, job: Job) -> None:
            latest = dict(job.metrics)
            for step, epoch, values in self._points:
                lifecycle.record_metrics(session, job.id, step, epoch, values)
                latest.update({name: value for name, value in values.items() if value is not None})
                latest.update(step=step, epoch=epoch)
            job.metrics = latest
            if self._selection is not None:
                job.selection = self._selection
            if self._done is not None:
                lifecycle.advance_phase(session, job.id, self._phase, self._done)

        self._patiently(record)
        self._points, self._done, self._selection = [], None, None

    def _patiently(self, write: Callable[[Session, Job], None]) -> None:
        """Do a write; a database that is away for a while is waited for, as the computed work is worth more."""
        patiently(lambda session: write(session, lifecycle.held(session, self.job_id, self.attempt)))

    def confirm(self) -> None:
        """To be asked before a file appears under a name that a later attempt uses too. Raises LeaseLost."""
        self._patiently(lambda session, job: None)

    def saved(self) -> None:
        """The state is saved: workers that were lost before got the job this far, and no longer count against it."""
        self._patiently(lambda session, job: setattr(job, "lost_workers", 0))

    def check(self) -> None:
        """Go on? Raises LeaseLost when the job is another's now, Stopped when the work should end."""
        self._heartbeat.check()
        if self._heartbeat.status in ("pausing", "cancelling") or self._stopping.is_set():
            raise Stopped(self._heartbeat.status)

    def check_within_step(self) -> None:
        """Go on with a step? Raises GivenUp when the owner has waited for its end for HOLD_SECONDS.

        A worker that is shut down ends its step: it has the time, and then nothing is done twice.
        """
        if self._heartbeat.status not in ("pausing", "cancelling"):
            return
        self._asked_at = self._asked_at or time.monotonic()
        if time.monotonic() - self._asked_at > HOLD_SECONDS:
            raise GivenUp
