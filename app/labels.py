"""What makes two teacher answers the same answer: the teacher's fingerprint, the text's hash, and the cache they key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
import pyarrow.parquet as pq
from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.models import LabelCache, LabelClaim, now
from app.options import Label, Teacher
from app.storage import Storage

LOOKUP_ROWS = 5000
Item = TypeVar("Item")


def fingerprint(teacher: Teacher, labels: Sequence[Label], revision: str | None) -> str:
    """A hash of all that an answer depends on besides the text: teacher options, model revision, label set."""
    options = teacher.model_dump(
        mode="json", exclude={"score_held_out": True, "calibrate": True, "few_shot": {"dataset_id"}}
    )
    if options.get("answers") == "labels":  # an option that came later: what was paid for before it is still found
        del options["answers"]
    parts = [options, revision, [label.model_dump(mode="json") for label in labels]]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def text_hash(text: str, text_pair: str | None) -> bytes:
    """Sixteen bytes that name a text, or a pair of texts."""
    hasher = hashlib.sha256(text.encode())
    if text_pair is not None:
        hasher.update(b"\x00pair\x00" + text_pair.encode())
    return hasher.digest()[:16]


def report_key(job_id: str) -> str:
    """Where the report on a job's labels lies in the storage."""
    return f"jobs/{job_id}/label_report.json"


def texts_of(storage: Storage, key: str, batch_rows: int = 8192) -> Iterator[list[tuple[str, str | None]]]:
    """The texts of the dataset at `key`, batch by batch, in row order."""
    with storage.open(key) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_rows, columns=["text", "text_pair"]):
            yield list(zip(batch.column("text").to_pylist(), batch.column("text_pair").to_pylist(), strict=True))


class Answer(NamedTuple):
    """What a teacher has said about a text."""

    probabilities: np.ndarray
    """(C,) float32"""
    tokens: int
    seconds: float
    bill: str | None = None
    """Who paid for it; see LabelCache."""


def look_up(session: Session, tenant: str, print_: str, hashes: Sequence[bytes]) -> dict[bytes, Answer]:
    """Cached answers by text hash."""
    found: dict[bytes, Answer] = {}
    columns = (LabelCache.text_hash, LabelCache.probabilities, LabelCache.tokens, LabelCache.seconds, LabelCache.bill)
    for some in _slices(hashes):
        query = select(*columns).where(*_of(LabelCache, tenant, print_), LabelCache.text_hash.in_(some))
        for key, probabilities, tokens, seconds, bill in session.execute(query):
            found[bytes(key)] = Answer(np.frombuffer(probabilities, "<f4"), tokens, seconds, bill)
    return found


def remember(
    session: Session, tenant: str, print_: str, answers: dict[bytes, Answer], *, owner: str | None = None
) -> None:
    """Keep answers for every later job of the tenant; the first answer to a text stays. Ends the owner's claims on them."""
    moment = now()
    # In one order everywhere, so that two workers writing the same texts cannot block each other in a circle.
    rows = [
        {
            "tenant": tenant, "fingerprint": print_, "text_hash": key, "tokens": answer.tokens,
            "seconds": answer.seconds, "bill": answer.bill, "created_at": moment,
            "probabilities": answer.probabilities.astype("<f4").tobytes(),
        }
        for key, answer in sorted(answers.items(), key=lambda entry: entry[0])
    ]  # fmt: skip
    for some in _slices(rows):
        session.execute(insert(LabelCache).values(some).on_conflict_do_nothing())
    if owner is not None:
        release(session, tenant, print_, list(answers), owner)


def take_over_bill(
    session: Session, tenant: str, print_: str, hashes: Sequence[bytes], old: str, new: str
) -> set[bytes]:
    """Move answers from one bill to another; those that were still on the old one."""
    moved: set[bytes] = set()
    for some in _slices(sorted(hashes)):
        statement = (
            update(LabelCache)
            .where(*_of(LabelCache, tenant, print_), LabelCache.text_hash.in_(some), LabelCache.bill == old)
            .values(bill=new)
            .returning(LabelCache.text_hash)
            .execution_options(synchronize_session=False)
        )
        moved.update(bytes(key) for key in session.scalars(statement))
    return moved


# --- claims: no text is asked about twice at the same moment ---------------------------------------------------------


def claim(
    session: Session, tenant: str, print_: str, hashes: Iterable[bytes], owner: str, seconds: float
) -> tuple[dict[bytes, Answer], set[bytes]]:
    """The answers that are known, and the texts that are now the owner's to ask about, for this many seconds.

    A text in neither is being asked about by another worker: look again later. It ends the claim by `remember`, or by
    `release` without an answer; the claim of one that was lost runs out.
    """
    hashes = list(hashes)
    known = look_up(session, tenant, print_, hashes)
    mine: set[bytes] = set()
    for some in _slices(sorted(set(hashes) - known.keys())):
        wish = insert(LabelClaim).values([
            {"tenant": tenant, "fingerprint": print_, "text_hash": key, "owner": owner, "expires_at": _lease(seconds)}
            for key in some
        ])  # fmt: skip
        statement = wish.on_conflict_do_update(
            index_elements=["tenant", "fingerprint", "text_hash"],
            set_={"owner": wish.excluded.owner, "expires_at": wish.excluded.expires_at},
            # One's own again: when a connection breaks, nobody knows whether the claim was committed, and asks again.
            where=or_(LabelClaim.expires_at < func.now(), LabelClaim.owner == wish.excluded.owner),
        ).returning(LabelClaim.text_hash)
        mine.update(bytes(key) for key in session.scalars(statement))
    # Whoever claimed a text before may have answered it between the two looks: the claim goes when the answer comes.
    answered = look_up(session, tenant, print_, sorted(mine))
    release(session, tenant, print_, list(answered), owner)
    return known | answered, mine - answered.keys()


def renew_claims(session: Session, owner: str, seconds: float) -> None:
    """Keep the owner's claims for this many seconds more."""
    session.execute(
        update(LabelClaim)
        .where(LabelClaim.owner == owner)
        .values(expires_at=_lease(seconds))
        .execution_options(synchronize_session=False)
    )


def has_lost(session: Session, tenant: str, print_: str, owners: str) -> bool:
    """Whether a claim has run out, of an owner whose name begins so: its worker was lost over these texts."""
    lost = select(LabelClaim.owner).where(
        *_of(LabelClaim, tenant, print_),
        LabelClaim.expires_at < func.now(),
        LabelClaim.owner.startswith(owners, autoescape=True),
    )
    return session.scalar(lost.limit(1)) is not None


def release(session: Session, tenant: str, print_: str, hashes: Sequence[bytes], owner: str) -> None:
    """End the owner's claims on these texts."""
    for some in _slices(sorted(hashes)):
        session.execute(
            delete(LabelClaim)
            .where(*_of(LabelClaim, tenant, print_), LabelClaim.text_hash.in_(some), LabelClaim.owner == owner)
            .execution_options(synchronize_session=False)
        )


def _lease(seconds: float) -> Any:
    return func.now() + timedelta(seconds=seconds)


def _of(table: type[LabelCache | LabelClaim], tenant: str, print_: str) -> tuple[Any, Any]:
    return table.tenant == tenant, table.fingerprint == print_


def _slices(entries: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(entries), LOOKUP_ROWS):
        yield entries[start : start + LOOKUP_ROWS]
