"""Requests to one endpoint, within its limits: so many at a time, as fast as it allows, again when that may help.

What can go wrong, and what it becomes:

    429, or few requests or tokens left    everyone waits as long as the server says, or a growing random while
    5xx, 408, no connection, a hang,       asked again, up to ATTEMPTS times; then RowRefused
    an answer that is no JSON
    other 4xx                              RowRefused at once: this request is wrong, others need not be
    401, 403, 404, a redirect              WorkFailed: no request can succeed before the operator mends something
    BREAKER_FAILURES failures in a row,    TeacherAway: nobody asks before `until`; the job waits
    or a long Retry-After
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from app.config import Endpoint
from app.lifecycle import WorkFailed
from app.models import now
from workers.teachers.teacher import TeacherAway

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 60.0
"""A server that asks for a longer pause is away: the worker does something else meanwhile."""
BREAKER_FAILURES = 10
BREAKER_SECONDS = 30.0
CONNECT_SECONDS = 10.0
SHOWN_CHARACTERS = 200
AGAIN = frozenset({408, 409, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class RowRefused(Exception):
    """There is no usable answer for this row; others may have one."""


class EndpointClient:
    """One worker's connections to one endpoint. Everything here runs in one event loop."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name, self.endpoint = name, endpoint
        self.canary: tuple[str, dict[str, Any]] | None = None
        """A request that has succeeded before: when it fails too, the server is away, and not the rows at fault."""
        self._http: httpx.AsyncClient | None = None
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._interval = 60.0 / endpoint.requests_per_minute if endpoint.requests_per_minute else 0.0
        # Moments by the monotonic clock.
        self._next_turn = self._paused_until = self._away_until = 0.0
        self._failures = 0
        self._reason = ""

    async def post(self, path: str, body: dict[str, Any], *, attempts: int = ATTEMPTS) -> dict[str, Any]:
        """The server's answer, a JSON object. Raises RowRefused, WorkFailed or TeacherAway."""
        attempt = 0
        while True:
            sent, answer, wait = await self._try(path, body)
            if isinstance(answer, dict):
                self._failures = 0
                return answer
            if wait is None:
                attempt += 1
                await self._note_failure(answer)
                if attempt >= attempts:
                    raise RowRefused(f"{answer}, {attempts} times")
                await asyncio.sleep(_random_wait(attempt))
            elif sent >= self._paused_until:  # of the requests that were under way together, the first counts
                await self._note_failure(answer)
                self._pause(wait or _random_wait(self._failures))

    def check_open(self) -> None:
        """Raises TeacherAway while nobody is to ask."""
        if (rest := self._away_until - time.monotonic()) > 0:
            raise TeacherAway(f"endpoint {self.name!r}: {self._reason}; it is asked again in {rest:.0f} s")

    async def _try(self, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any] | str, float | None]:
        """When it was sent; the answer, or what went wrong; seconds everyone must wait (0: not said), if so."""
        async with self._slots:
            await self._turn()
            sent = time.monotonic()
            try:
                async with asyncio.timeout(self.endpoint.timeout_seconds):
                    response = await self._connections().post(f"{self.endpoint.base_url}{path}", json=body)
            except (TimeoutError, httpx.TimeoutException):
                return sent, f"no answer within {self.endpoint.timeout_seconds:g} s", None
            except httpx.RequestError as error:
                return sent, f"the connection failed ({type(error).__name__})", None
        if response.status_code == 429:
            return sent, "too many requests (429)", _retry_after(response) or 0.0
        if response.status_code == 503 and (wait := _retry_after(response)) is not None:
            return sent, "unavailable (503)", wait
        if response.status_code in AGAIN:
            return sent, f"the server failed ({response.status_code})", None
        self._heed_limits(response)
        if response.is_success:
            try:
                answer = response.json()
            except ValueError:
                return sent, "the answer is no JSON", None
            if not isinstance(answer, dict):
                return sent, "the answer is no JSON object", None
            return sent, answer, None
        self._failures = 0
        raise self._refusal(response)

    def _connections(self) -> httpx.AsyncClient:
        if self._http is None:
            try:
                key = self.endpoint.key()
            except KeyError:
                raise WorkFailed(
                    "endpoint_refuses",
                    f"Endpoint {self.name!r} needs a key from the environment variable {self.endpoint.api_key_env}, which is not set where this worker runs.",
                ) from None
            self._http = httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=httpx.Timeout(self.endpoint.timeout_seconds, connect=CONNECT_SECONDS, pool=None),
                limits=httpx.Limits(max_connections=self.endpoint.concurrency),
                follow_redirects=False,
            )
        return self._http

    async def _turn(self) -> None:
        """Wait until the next request may leave."""
        while True:
            self.check_open()
            wait = max(self._next_turn, self._paused_until) - time.monotonic()
            if wait <= 0:
                break
            await asyncio.sleep(wait)
        self._next_turn = time.monotonic() + self._interval

    def _pause(self, seconds: float) -> None:
        if seconds > LONGEST_WAIT_SECONDS:
            self._leave(seconds, f"it asks for a pause of {seconds:.0f} s")
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)

    async def _note_failure(self, reason: str) -> None:
        """Count it; the last straw has the canary sent, which tells rows that break a server from one that is away."""
        self._failures += 1
        if self._failures < BREAKER_FAILURES:
            return
        self._failures = 0
        if self.canary is not None and isinstance((await self._try(*self.canary))[1], dict):
            return
        self._failures = BREAKER_FAILURES - 1  # after the pause, one failure is enough
        self._leave(BREAKER_SECONDS, f"{reason}, {BREAKER_FAILURES} times in a row")

    def _leave(self, seconds: float, reason: str) -> None:
        self._away_until, self._reason = time.monotonic() + seconds, reason
        self.check_open()

    def _heed_limits(self, response: httpx.Response) -> None:
        """Wait where the server says that nothing is left for now (`x-ratelimit-remaining-*`, `x-ratelimit-reset-*`)."""
        for what in ("requests", "tokens"):
            remaining = response.headers.get(f"x-ratelimit-remaining-{what}", "")
            reset = _seconds(response.headers.get(f"x-ratelimit-reset-{what}", ""))
            if re.fullmatch(r"-?\d+", remaining) and int(remaining) <= 0 and reset is not None:
                self._paused_until = max(self._paused_until, time.monotonic() + min(reset, LONGEST_WAIT_SECONDS))

    def _refusal(self, response: httpx.Response) -> Exception:
        status = response.status_code
        if response.is_redirect:
            reason = (
                f"answers with a redirect ({status}), and redirects are not followed: its base_url has to be mended"
            )
        elif status in (401, 403):
            reason = f"refuses the key ({status})"
        elif status == 404:
            reason = f"does not know the model or the path ({status})"
        else:
            return RowRefused(f"the server refuses the request ({status}): {self._words(response)}")
        return WorkFailed("endpoint_refuses", f"Endpoint {self.name!r} {reason}; the operator has to look.")

    def _words(self, response: httpx.Response) -> str:
        """What the server says was wrong, shortened, and without the key should it be quoted."""
        try:
            body = response.json()
            error = body.get("error") or body.get("detail") or body
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = response.text
        key = self.endpoint.key()
        return " ".join((text.replace(key, "…") if key else text).split())[:SHOWN_CHARACTERS]


def _random_wait(failures: int) -> float:
    """Seconds, up to twice as many after each failure ("full jitter")."""
    return random.uniform(0, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**failures))


def _retry_after(response: httpx.Response) -> float | None:
    """`Retry-After`, in seconds or as a date."""
    value = response.headers.get("retry-after", "").strip()
    if (seconds := _seconds(value)) is not None:
        return seconds
    try:
        return max(0.0, (parsedate_to_datetime(value) - now()).total_seconds())
    except (ValueError, TypeError):
        return None


def _seconds(text: str) -> float | None:
    """`12`, `0.5`, `20ms`, `1m30s`, `1h0m0s` in seconds; None for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * units[unit] for number, unit in parts)
