"""What makes two teacher answers the same answer: the teacher's fingerprint, the text's hash, and the cache they key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import orjson
import pyarrow.parquet as pq
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.models import Dataset, LabelCache, now
from app.options import Label, Teacher
from app.storage import Storage

LOOKUP_ROWS = 5000


def fingerprint(teacher: Teacher, labels: Sequence[Label], revision: str | None) -> str:
    """A hash of all that an answer depends on besides the text: teacher options, model revision, label set."""
    options = teacher.model_dump(mode="json", exclude={"score_held_out", "calibrate"})
    parts = [options, revision, [label.model_dump(mode="json") for label in labels]]
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def text_hash(text: str, text_pair: str | None) -> bytes:
    """Sixteen bytes that name a text, or a pair of texts."""
    hasher = hashlib.sha256(text.encode())
    if text_pair is not None:
        hasher.update(b"\x00pair\x00" + text_pair.encode())
    return hasher.digest()[:16]


def texts_of(storage: Storage, dataset: Dataset, batch_rows: int = 8192) -> Iterator[list[tuple[str, str | None]]]:
    """The texts of a dataset, batch by batch, in row order."""
    with storage.open(dataset.key) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_rows, columns=["text", "text_pair"]):
            yield list(zip(batch.column("text").to_pylist(), batch.column("text_pair").to_pylist(), strict=True))


def look_up(session: Session, tenant: str, print_: str, hashes: Sequence[bytes]) -> dict[bytes, tuple[np.ndarray, int]]:
    """Cached answers by text hash: the distribution over the labels, shape (C,) float32, and the tokens it cost."""
    found: dict[bytes, tuple[np.ndarray, int]] = {}
    for start in range(0, len(hashes), LOOKUP_ROWS):
        query = select(LabelCache.text_hash, LabelCache.probabilities, LabelCache.tokens).where(
            LabelCache.tenant == tenant,
            LabelCache.fingerprint == print_,
            LabelCache.text_hash.in_(hashes[start : start + LOOKUP_ROWS]),
        )
        for key, probabilities, tokens in session.execute(query):
            found[bytes(key)] = (np.frombuffer(probabilities, "<f4"), tokens)
    return found


def remember(session: Session, tenant: str, print_: str, answers: dict[bytes, tuple[np.ndarray, int]]) -> None:
    """Keep answers for every later job of the tenant; the first answer to a text stays."""
    moment = now()
    # In one order everywhere, so that two workers writing the same texts cannot block each other in a circle.
    rows = [
        {
            "tenant": tenant, "fingerprint": print_, "text_hash": key, "tokens": tokens, "created_at": moment,
            "probabilities": probabilities.astype("<f4").tobytes(),
        }
        for key, (probabilities, tokens) in sorted(answers.items())
    ]  # fmt: skip
    for start in range(0, len(rows), LOOKUP_ROWS):
        session.execute(insert(LabelCache).values(rows[start : start + LOOKUP_ROWS]).on_conflict_do_nothing())
