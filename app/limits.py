"""How much one key, or its tenant, may ask: requests a minute, uploads and streams at once, stored bytes, unfinished jobs.

The settings say what is usual, a key's row what differs. Requests are counted per key, in Redis where that is the
broker; a Redis that is away lets them through. A process counts a hundredth of the limit at a time, so that not every
request has to ask. Everything else is counted per tenant, so that more keys give no more
room: uploads and streams in this process, bytes and jobs in the database under a lock of the tenant, so that nobody slips past.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from math import ceil

import structlog
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.config import settings
from app.errors import RateLimited, StorageFull, TooMany, TooManyJobs, TooManyStreams, TooManyUploads
from app.models import TERMINAL, ApiKey, Checkpoint, Dataset, Job, Upload

NAMES = (
    "max_requests_per_minute", "max_uploads_at_once", "max_streams_at_once", "max_stored_bytes", "max_unfinished_jobs",
)  # fmt: skip
"""Fields of Settings, and keys of a key's `limits`."""
TENANT_LOCK = 0x6C696D69
"""Of PostgreSQL's advisory locks; the second half of the number is the tenant's hash."""
COUNTER_SECONDS = 0.25
"""How long a request waits for Redis to count it."""
AHEAD = 0.01
"""How much of a key's limit a process counts in advance."""
AHEAD_SECONDS = 60.0
"""How long that holds; what is left of it then was counted in vain."""
MOST_COUNTED = 10_000
AWAY_SECONDS = 5.0
"""How long a Redis that did not answer is left alone."""

log = structlog.get_logger()


def limit_of(key: ApiKey, name: str) -> int | None:
    """A limit as it holds for a key: its own, or else the settings'. None: there is none."""
    limit: int | None = key.limits[name] if name in key.limits else getattr(settings(), name)
    return limit


def checked(limits: dict[str, int | None]) -> dict[str, int | None]:
    """Limits fit to be a key's own. Raises ValueError."""
    for name, value in limits.items():
        if name not in NAMES:
            raise ValueError(f"there is no limit {name!r}; there are {', '.join(NAMES)}")
        if value is not None and not 1 <= value < 2**62:
            raise ValueError(f"{name} is {value}; use a positive number, or none for no limit")
    return limits


# --- requests a minute ----------------------------------------------------------------------------------------------


@lru_cache
def _counter(url: str) -> SlidingWindowCounterRateLimiter:
    if not url.startswith(("redis://", "rediss://", "unix://")):  # another broker: each API process counts for itself
        return SlidingWindowCounterRateLimiter(MemoryStorage())
    pool = ConnectionPool.from_url(
        url, socket_timeout=COUNTER_SECONDS, socket_connect_timeout=COUNTER_SECONDS, retry=Retry(NoBackoff(), 0)
    )
    return SlidingWindowCounterRateLimiter(RedisStorage(url, connection_pool=pool))


_away_until = 0.0
_counted: dict[str, tuple[int, float]] = {}
"""By key: how many requests to come are counted already, and until when that holds."""
_counting = threading.Lock()
_asking = threading.Lock()
"""One request at a time asks, so that of many that come together the first counts for the others."""


def is_counted(key: ApiKey) -> bool:
    """Whether a request of the key may pass as it is: counted beforehand, or there is nothing to count it by."""
    if limit_of(key, "max_requests_per_minute") is None or time.monotonic() < _away_until:
        return True
    with _counting:
        left, until = _counted.get(key.id, (0, 0.0))
        if not left or time.monotonic() > until:
            return False
        _counted[key.id] = left - 1, until
        return True


def count_request(key: ApiKey) -> None:
    """Count a request of the key, and with it up to AHEAD of the limit in advance.

    Raises RateLimited. Where the counter is away, the request is let through.
    """
    global _away_until
    with _asking:
        most = limit_of(key, "max_requests_per_minute")
        if most is None or is_counted(key):
            return
        item = RateLimitItemPerMinute(most)
        ahead = int(most * AHEAD)
        try:
            counter = _counter(settings().redis_url)
            if ahead and counter.hit(item, key.id, cost=ahead + 1):
                _count_ahead(key, ahead)
                return
            if counter.hit(item, key.id):
                return
            wait = counter.get_window_stats(item, key.id).reset_time - time.time()
        except (RedisError, OSError) as error:
            _away_until = time.monotonic() + AWAY_SECONDS
            log.warning("requests_not_counted", error=type(error).__name__, seconds=AWAY_SECONDS)
            return
    wait_seconds = min(60, max(1, ceil(wait)))
    raise RateLimited(
        f"This key has made {most:,} requests within a minute, the most it may; try again in {wait_seconds} s.",
        retry_after=wait_seconds,
    )


def _count_ahead(key: ApiKey, requests: int) -> None:
    with _counting:
        if len(_counted) >= MOST_COUNTED:
            _counted.clear()
        _counted[key.id] = requests, time.monotonic() + AHEAD_SECONDS


# --- uploads and streams at once ------------------------------------------------------------------------------------

_at_once: Counter[tuple[str, str]] = Counter()
"""By limit and tenant."""
_at_once_lock = threading.Lock()


@contextmanager
def uploading(key: ApiKey) -> Iterator[None]:
    """One upload of the key's tenant, while the block runs. Raises TooManyUploads."""
    most = limit_of(key, "max_uploads_at_once")
    refusal = TooManyUploads(f"{most} uploads are on their way, the most at once; send this file when one is done.")
    with _counted_in(("max_uploads_at_once", key.tenant), most, refusal):
        yield


@contextmanager
def streaming(key: ApiKey) -> Iterator[None]:
    """One event stream of the key's tenant, while the block runs. Raises TooManyStreams."""
    most = limit_of(key, "max_streams_at_once")
    refusal = TooManyStreams(f"{most} event streams are open, the most at once; close one, or poll.")
    with _counted_in(("max_streams_at_once", key.tenant), most, refusal):
        yield


@contextmanager
def _counted_in(what: tuple[str, str], most: int | None, refusal: TooMany) -> Iterator[None]:
    with _at_once_lock:
        if most is not None and _at_once[what] >= most:
            raise refusal
        _at_once[what] += 1
    try:
        yield
    finally:
        with _at_once_lock:
            _at_once[what] -= 1
            if not _at_once[what]:
                del _at_once[what]


# --- stored bytes and unfinished jobs -------------------------------------------------------------------------------


def check_room(session: Session, key: ApiKey, more_bytes: int) -> None:
    """Whether `more_bytes` may be added to what the tenant stores; until the commit nobody else adds. Raises StorageFull."""
    most = limit_of(key, "max_stored_bytes")
    if most is None:
        return
    lock(session, key.tenant)
    stored = stored_bytes(session, key.tenant)
    if stored + more_bytes > most:
        raise StorageFull(
            f"{stored:,} bytes are stored and {more_bytes:,} more would be over the limit of {most:,}; "
            "delete datasets or checkpoints that are no longer needed."
        )


def stored_bytes(session: Session, tenant: str) -> int:
    """Bytes of the tenant's datasets, as they were received, checkpoints, and uploads in parts, as they were announced."""
    sums = [
        session.scalar(select(func.sum(table.bytes)).where(table.tenant == tenant)) for table in (Dataset, Checkpoint)
    ]
    sums.append(
        session.scalar(select(func.sum(Upload.bytes)).where(Upload.tenant == tenant, Upload.status == "pending"))
    )
    return sum(int(part or 0) for part in sums)


def check_jobs(session: Session, key: ApiKey, more: int = 1) -> None:
    """Whether `more` jobs may be added to the tenant's; until the commit nobody else adds. Raises TooManyJobs."""
    most = limit_of(key, "max_unfinished_jobs")
    if most is None:
        return
    lock(session, key.tenant)
    unfinished = session.scalar(select(func.count()).where(Job.tenant == key.tenant, Job.status.not_in(TERMINAL))) or 0
    if unfinished + more > most:
        raise TooManyJobs(
            f"{unfinished:,} jobs have not ended, and at most {most:,} may be on their way; wait for one or cancel one."
        )


def lock(session: Session, tenant: str) -> None:
    """Until the commit, nobody else counts what the tenant has in order to add to it."""
    session.execute(select(func.pg_advisory_xact_lock(TENANT_LOCK, func.hashtext(tenant))))
