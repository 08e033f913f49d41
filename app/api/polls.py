"""Looking at jobs together: polls that wait at the same time are answered by one statement.

Clients ask for the state of their jobs far more often than for anything else, and most of what that costs is the way to the
database and back. So a poll that comes while others are being read waits for the next statement, which then reads for all that
have come. Nobody is told anything older than its request.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from functools import partial
from itertools import islice

from anyio.lowlevel import RunVar
from sqlalchemy.orm import Session

from app import lifecycle, overview
from app.api.deps import reading
from app.api.schemas import JobRead

ID = re.compile(r"[A-Za-z0-9_]{1,64}")
AT_ONCE = 2
"""Statements on their way, so that a job that takes long to read does not hold up all others."""
MOST_TOGETHER = 50
"""Jobs that one statement reads."""


@dataclass(frozen=True)
class Written:
    """A job as JSON, and what has to be known to send it."""

    tenant: str
    is_terminal: bool
    body: bytes


class Polls:
    """The polls of one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[Written | None]] = {}
        self._readers: set[asyncio.Task[None]] = set()

    async def look(self, job_id: str) -> Written | None:
        """The job as it is now, or later; None where there is none. Raises what reading it raised."""
        answer = self._waiting.get(job_id)
        if answer is None:
            answer = self._waiting[job_id] = asyncio.get_running_loop().create_future()
        if len(self._readers) < AT_ONCE:
            reader = asyncio.create_task(self._read())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)
        return await asyncio.shield(answer)  # others may wait for it too

    async def _read(self) -> None:
        while self._waiting:
            answers = {job_id: self._waiting.pop(job_id) for job_id in [*islice(self._waiting, MOST_TOGETHER)]}
            try:
                found = await reading(partial(_written, ids=[*answers]))
            except Exception as error:
                for answer in answers.values():
                    answer.set_exception(error)
                continue
            for job_id, answer in answers.items():
                answer.set_result(found.get(job_id))


def _written(session: Session, ids: list[str]) -> dict[str, Written]:
    # What is no id is not asked about: PostgreSQL might refuse it, and with it everybody's poll.
    shown = overview.show(session, [job_id for job_id in ids if ID.fullmatch(job_id)])
    return {
        each.job.id: Written(
            each.job.tenant, lifecycle.is_terminal(each.job), JobRead.of(each).model_dump_json().encode()
        )
        for each in shown
    }


_polls: RunVar[Polls] = RunVar("polls")


async def look(job_id: str) -> Written | None:
    """The job as it is now, or later; None where there is none."""
    try:
        polls = _polls.get()
    except LookupError:
        polls = Polls()
        _polls.set(polls)
    return await polls.look(job_id)
