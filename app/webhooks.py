"""Webhooks: a row for every job or comparison that ends, sent to the client's URL signed (Standard Webhooks), again until taken.

    note_end() ──▶ pending ── deliver() ──▶ delivered
                    │  ▲ │
          back-off  └──┘ └── the last attempt failed ──▶ failed ── redeliver() ──▶ pending

The row is written with the end it tells of, in one transaction, so no call is lost. A sender claims rows by moving their
`next_attempt_at` into the future, sends without a transaction, and records the outcome where its claim still holds. A
sender that dies leaves a claim that runs out: the call is sent again under the same id, by which receivers drop doubles.
"""

from __future__ import annotations

import asyncio
import base64
import random
import secrets
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import httpx
import orjson
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.config import settings
from app.db import session_scope
from app.models import Comparison, Job, WebhookDelivery, WebhookSecret, new_id, now

DELAYS = (5, 300, 1800, 7200, 18_000, 36_000, 36_000)
"""Seconds after each failed attempt, about 28 hours in all; there is one attempt more than delays."""
JITTER = 0.2
"""A delay is longer or shorter by up to this share, so that a receiver that was away is not met by all at once."""
BATCH = 50
"""Calls sent at once by one scheduler."""
BATCH_OF_ONE = 10
"""How many of them may be one tenant's, so that receivers that hang hold up their own tenant's calls alone."""
SEND_SECONDS = 10.0
"""For everything: the name, the connection, TLS, the request and the answer."""
CLAIM_SECONDS = 60.0
RESOLVE_SECONDS = 2.0
"""How long POST /jobs waits for a name."""
WAIT_AT_ONCE = 4
"""Requests of one API process that wait for a name at the same moment; each holds a thread and a connection."""
GRACE_HOURS = 24
"""How long a rotated secret goes on signing, beside the new one, unless told otherwise."""
LONGEST_GRACE_HOURS = 24 * 30
KEPT_BYTES = 200
"""How much of a refusal's body goes into the log."""

Address = IPv4Address | IPv6Address

RESOLVERS = ThreadPoolExecutor(64, "resolver")
"""Their own threads, because a look-up cannot be broken off: nobody has to wait for one that hangs."""
_waiting = threading.BoundedSemaphore(WAIT_AT_ONCE)


class PrivateAddress(Exception):
    """The URL leads to an address that is not public, and the operator does not allow such."""


# --- the record -----------------------------------------------------------------------------------------------------


def note_end(session: Session, ended: Job | Comparison, status: str) -> None:
    """A job or comparison has ended so: store the call its owner asked for, if any, to be sent once this is committed."""
    webhook = ended.spec.get("webhook")
    if webhook is None:
        return
    of = "job" if isinstance(ended, Job) else "comparison"
    kind = f"{of}.{status}"
    payload = {"type": kind, "timestamp": now().isoformat(), "data": {"id": ended.id, "status": status}}
    session.add(
        WebhookDelivery(
            id=new_id("whd"), tenant=ended.tenant, type=kind, url=webhook["url"], payload=payload,
            next_attempt_at=func.now(), **{f"{of}_id": ended.id},
        )
    )  # fmt: skip


def redeliver(session: Session, delivery: WebhookDelivery) -> None:
    """Send a call again, now and with all attempts before it, whatever became of it so far."""
    delivery.status, delivery.attempts, delivery.delivered_at = "pending", 0, None
    delivery.next_attempt_at = func.now()
    session.flush()
    session.refresh(delivery)


def secret_of(session: Session, tenant: str) -> str:
    """The key that signs the tenant's calls, `whsec_…`; made when it is first asked for."""
    values = {"tenant": tenant, "secret": _new_secret(), "created_at": now()}
    session.execute(insert(WebhookSecret).values(values).on_conflict_do_nothing())
    return session.scalars(select(WebhookSecret.secret).where(WebhookSecret.tenant == tenant)).one()


def rotate_secret(session: Session, tenant: str, *, grace_hours: float = GRACE_HOURS) -> WebhookSecret:
    """A new secret. For `grace_hours` calls carry two signatures, of the new one and of the one before."""
    secret_of(session, tenant)
    row = session.get_one(WebhookSecret, tenant, with_for_update=True, populate_existing=True)
    row.previous, row.previous_until = row.secret, now() + timedelta(hours=grace_hours)
    row.secret, row.created_at = _new_secret(), now()
    session.flush()
    return row


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def _signing(session: Session, tenant: str) -> tuple[str, ...]:
    """The secrets that sign just now, the newest first."""
    secret_of(session, tenant)
    row = session.get_one(WebhookSecret, tenant, populate_existing=True)
    if row.previous is None or row.previous_until is None or row.previous_until <= now():
        return (row.secret,)
    return (row.secret, row.previous)


# --- the address ----------------------------------------------------------------------------------------------------


def is_public(address: Address) -> bool:
    """Whether the address is somewhere on the internet. Addresses that wrap an IPv4 address in IPv6 are not."""
    inside = isinstance(address, IPv6Address) and (address.sixtofour is not None or address.is_site_local)
    return address.is_global and not (address.is_multicast or address.is_reserved or inside)


def leads_inside(url: str) -> bool:
    """Whether the URL's host is, or resolves to, an address that is not public; False where that is not known soon.

    It spares the owner a surprise; what protects the inside is the same question at every call.
    """
    if not _waiting.acquire(blocking=False):
        return False
    found = _look_up(httpx.URL(url))
    try:
        return not all(map(is_public, found.result(RESOLVE_SECONDS)))
    except (OSError, UnicodeError, TimeoutError):
        return False
    finally:
        found.cancel()
        _waiting.release()


def _look_up(url: httpx.URL) -> Future[list[Address]]:
    host = url.raw_host.decode()

    def resolve() -> list[Address]:
        found = socket.getaddrinfo(host, url.port or (443 if url.scheme == "https" else 80), type=socket.SOCK_STREAM)
        return [ip_address(entry[4][0]) for entry in found]

    try:
        literal = ip_address(host)
    except ValueError:
        return RESOLVERS.submit(resolve)
    known: Future[list[Address]] = Future()
    known.set_result([literal])
    return known


# --- sending --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A claimed delivery, apart from any session."""

    id: str
    url: str
    body: bytes
    secrets: tuple[str, ...]
    attempt: int
    claimed_until: datetime
    """Proof of the claim: whoever claims next, or redelivers, changes it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt: the status of the answer, if one came, and what was wrong, if anything."""

    status: int | None
    error: str | None


def deliver() -> int:
    """Claim the calls that are due, send them all at once, record what became of each. How many there were."""
    with session_scope() as session:
        calls = claim(session)
    if not calls:
        return 0
    outcomes = asyncio.run(send(calls))
    with session_scope() as session:
        for call, outcome in zip(calls, outcomes, strict=True):
            record(session, call, outcome)
    return len(calls)


def claim(session: Session) -> list[Call]:
    """The calls that are due and nobody else is sending, now the caller's for a minute: of each tenant the first ones."""
    is_due = (WebhookDelivery.status == "pending", WebhookDelivery.next_attempt_at <= func.now())
    place = func.row_number().over(partition_by=WebhookDelivery.tenant, order_by=WebhookDelivery.next_attempt_at)
    line = select(WebhookDelivery.id, place.label("place")).where(*is_due).subquery()
    due = session.scalars(
        select(WebhookDelivery)
        .join(line, line.c.id == WebhookDelivery.id)
        .where(*is_due, line.c.place <= BATCH_OF_ONE)
        .order_by(line.c.place, WebhookDelivery.next_attempt_at)
        .limit(BATCH)
        .with_for_update(of=WebhookDelivery, skip_locked=True)
    ).all()
    for delivery in due:
        delivery.attempts += 1
        delivery.next_attempt_at = func.now() + timedelta(seconds=CLAIM_SECONDS)
    session.flush()
    calls = []
    for delivery in due:
        session.refresh(delivery)
        calls.append(
            Call(
                id=delivery.id, url=delivery.url, body=orjson.dumps(delivery.payload),
                secrets=_signing(session, delivery.tenant), attempt=delivery.attempts,
                claimed_until=delivery.next_attempt_at,
            )
        )  # fmt: skip
    return calls


async def send(calls: list[Call]) -> list[Outcome]:
    """Make the calls side by side; none takes longer than SEND_SECONDS, and none spoils another."""
    # A connection is never used twice: two names at one address would share it, and with it one name's certificate.
    # The transport is given so that no proxy of the environment is used, which would look up the name by itself.
    transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=BATCH, max_keepalive_connections=0))
    async with httpx.AsyncClient(transport=transport, timeout=SEND_SECONDS, trust_env=False) as client:
        return await asyncio.gather(*(_send(client, call) for call in calls))


async def _send(client: httpx.AsyncClient, call: Call) -> Outcome:
    try:
        async with asyncio.timeout(SEND_SECONDS):
            return await _post(client, call)
    except TimeoutError:
        return Outcome(None, f"no answer within {SEND_SECONDS:g} seconds")
    except PrivateAddress as error:
        return Outcome(None, str(error))
    except Exception as error:  # whatever a stranger's server, name or certificate does, the other calls go on
        return Outcome(None, _printable(f"{type(error).__name__}: {error}"))


async def _post(client: httpx.AsyncClient, call: Call) -> Outcome:
    """POST to the very address that was checked, so that the name cannot be pointed elsewhere in between."""
    url = httpx.URL(call.url)
    addresses = await asyncio.wrap_future(_look_up(url))
    if not settings().webhook_allow_private and not all(map(is_public, addresses)):
        raise PrivateAddress(f"{url.host} resolves to a private, loopback, link-local or reserved address")
    address = addresses[
        (call.attempt - 1) % len(addresses)
    ]  # where one of several is dead, the next attempt takes another
    moment = now()
    headers = {
        "host": url.netloc.decode(),
        "content-type": "application/json",
        "accept-encoding": "identity",
        "user-agent": "understudy",
        "webhook-id": call.id,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(
            Webhook(secret).sign(call.id, moment, call.body.decode()) for secret in call.secrets
        ),
    }
    request = client.build_request(
        "POST", url.copy_with(host=str(address)), headers=headers, content=call.body,
        extensions={"sni_hostname": url.raw_host.decode()},
    )  # fmt: skip
    answer = await client.send(request, stream=True, follow_redirects=False)
    try:
        if answer.is_success:
            return Outcome(answer.status_code, None)
        return Outcome(answer.status_code, f"answered {answer.status_code}: {_printable(await _beginning(answer))}")
    finally:
        await answer.aclose()


async def _beginning(answer: httpx.Response) -> str:
    kept = b""
    async for part in answer.aiter_raw():
        kept += part
        if len(kept) >= KEPT_BYTES:
            break
    return kept[:KEPT_BYTES].decode(errors="replace")


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)[:500].strip()


def record(session: Session, call: Call, outcome: Outcome) -> None:
    """Note what became of a call, unless the claim ran out meanwhile or the call was ordered anew."""
    values: dict[str, Any] = {"last_status": outcome.status, "last_error": outcome.error}
    if outcome.error is None:
        values |= {"status": "delivered", "delivered_at": func.now()}
    elif call.attempt > len(DELAYS):
        values |= {"status": "failed"}
    else:
        seconds = DELAYS[call.attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)
        values |= {"next_attempt_at": func.now() + timedelta(seconds=seconds)}
    session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == call.id,
            WebhookDelivery.status == "pending",
            WebhookDelivery.next_attempt_at == call.claimed_until,
        )
        .values(values)
        .execution_options(synchronize_session=False)
    )
