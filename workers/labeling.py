"""Label a job's rows, shard by shard, beside any number of other workers: cache first, then the teacher.

Answers enter the cache chunk by chunk, so a worker that dies loses at most the chunk it was busy with; the shard's
file is written before its row says so.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import structlog
from sqlalchemy.orm import Session

from app import labels, lifecycle, pretrained
from app.config import settings
from app.db import AWAY, patiently, session_scope
from app.lifecycle import LeaseLost, WorkFailed
from app.models import Dataset, Job, LabelSet, LabelShard
from app.options import JobSpec, Label, needs_confidence
from app.storage import Storage, storage
from workers.artifacts import read_rows
from workers.failures import failure_of
from workers.reporter import Heartbeat
from workers.teachers import TEACHERS
from workers.teachers.endpoint import EndpointTeacher
from workers.teachers.teacher import AskedToStop, Row, Teacher, TeacherAway

log = structlog.get_logger()

CHUNK_ROWS = 128
SUSPECT_PIECES = 11
"""Into about so many pieces go the rows at which a worker was lost."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("probabilities", pa.list_(pa.float32())),
        ("confidence", pa.float32()),
        ("source", pa.string()),
        ("tokens", pa.int32()),
        ("error", pa.string()),
    ]
)


def label_job(job_id: str, worker: str, stopping: threading.Event, *, seconds: float = math.inf) -> int:
    """Claim and label shards of the job until there is none left for this worker, or the time is up. How many."""

    def claim(session: Session) -> tuple[Job, LabelSet, Dataset, LabelShard] | None:
        shard = lifecycle.claim_shard(session, job_id, worker)
        if shard is None:
            return None
        label_set = session.get_one(LabelSet, shard.label_set_id)
        return session.get_one(Job, job_id), label_set, session.get_one(Dataset, shard.dataset_id), shard

    shards = 0
    began = time.monotonic()
    while not stopping.is_set() and (shards == 0 or time.monotonic() < began + seconds):
        claimed = patiently(claim)
        if claimed is None:
            return shards
        shards += 1
        shard = claimed[-1]
        try:
            label_shard(*claimed, stopping)
        except LeaseLost:
            log.info("shard_lost", job_id=job_id, shard=shard.index)
            return shards
        except AWAY as error:  # nothing can be recorded: the lease runs out, and another labels the shard
            log.error("database_stayed_away", job_id=job_id, shard=shard.index, error=str(error))
            return shards
        except Exception as error:
            failure = failure_of(error, "labeling_failed")
            if not isinstance(error, WorkFailed):
                log.error("labeling_failed", job_id=job_id, shard=shard.index, code=failure.code, exc_info=error)
            _fail_shard(shard, failure)
            return shards
    return shards


def _fail_shard(shard: LabelShard, failure: WorkFailed) -> None:
    patiently(lambda session: lifecycle.fail_shard(session, shard, failure.code, failure.message))


def label_shard(job: Job, label_set: LabelSet, dataset: Dataset, shard: LabelShard, stopping: threading.Event) -> None:
    """Label one shard and record it. Raises LeaseLost when it is not, or no longer, this worker's."""
    spec = JobSpec.model_validate(job.spec)
    names = [Label.model_validate(entry) for entry in label_set.labels]
    answers: _Answers | None = None

    def renew() -> str | None:
        with session_scope() as session:
            lifecycle.renew_shard(session, shard)
        return None

    def note(start: int, stop: int) -> None:
        patiently(lambda session: lifecycle.note_rows(session, shard, shard.start + start, shard.start + stop))

    with Heartbeat(renew) as heartbeat:

        def should_stop() -> bool:
            return heartbeat.lost.is_set() or stopping.is_set()

        try:
            teacher = _ready_teacher(spec, names, label_set, should_stop)
            rows = read_rows(storage(), dataset, shard.start, shard.stop)
            began = time.perf_counter()
            answers = _Answers(job.tenant, label_set.fingerprint, len(names), teacher)
            for start, stop in _pieces(shard):
                heartbeat.check()
                if stopping.is_set():
                    raise AskedToStop
                note(start, stop)
                answers.add(rows[start:stop])
        except (AskedToStop, TeacherAway) as reason:
            if heartbeat.lost.is_set():
                raise LeaseLost from None
            away = str(reason) if isinstance(reason, TeacherAway) else None
            cost = answers.cost if answers else None

            def give_back(session: Session) -> None:
                lifecycle.release_shard(session, shard, cost=cost)
                if away is not None:
                    lifecycle.note_teacher_away(session, shard, away)

            patiently(give_back)
            raise LeaseLost from None
        seconds = time.perf_counter() - began
        heartbeat.check()
        _store(storage(), shard, answers.table(shard.start))

        def finish(session: Session) -> None:
            lifecycle.finish_shard(session, shard, {**answers.figures(), "seconds": round(seconds, 4)})
            known = session.get_one(LabelSet, label_set.id, with_for_update=True)
            known.confidence_method, known.report = teacher.confidence_method, teacher.report()

        patiently(finish)


def _pieces(shard: LabelShard) -> Iterator[tuple[int, int]]:
    """(start, stop) of what is labeled at a time, counted from the shard's first row.

    The rows at which the worker before this one was lost come in small pieces: either their number was the matter, or
    the next loss tells more exactly which row it is. CHUNK_ROWS rows are narrowed down to one by two more losses.
    """
    count = shard.stop - shard.start
    suspect = range(0)
    if shard.busy_start is not None and shard.busy_stop is not None:
        suspect = range(shard.busy_start - shard.start, shard.busy_stop - shard.start)
    start = 0
    while start < count:
        if start in suspect:
            stop = min(start + max(1, len(suspect) // SUSPECT_PIECES), suspect.stop)
        else:
            stop = min(start + CHUNK_ROWS, count, suspect.start if start < suspect.start else count)
        yield start, stop
        start = stop


def _ready_teacher(spec: JobSpec, names: list[Label], label_set: LabelSet, should_stop: Callable[[], bool]) -> Teacher:
    """The job's teacher. An endpoint is asked what it can do before anything else: its labels' fingerprint holds that.

    Raises WorkFailed, TeacherAway or AskedToStop.
    """
    global _loaded
    teacher = teacher_for(spec, names, label_set.fingerprint)
    if isinstance(teacher, EndpointTeacher):
        teacher.should_stop = should_stop
        fingerprint = labels.fingerprint(spec.teacher, names, teacher.revision)
        if fingerprint != label_set.fingerprint:
            with session_scope() as session:
                session.get_one(LabelSet, label_set.id, with_for_update=True).fingerprint = fingerprint
            label_set.fingerprint = fingerprint
            _loaded = (fingerprint, teacher)
        if teacher.confidence_method == "none":
            with session_scope() as session:
                lifecycle.fail_for_want_of_confidence(session, label_set.id)
            if needs_confidence(spec.method):
                raise AskedToStop
    return teacher


_loaded: tuple[str, Teacher] | None = None


def teacher_for(spec: JobSpec, names: list[Label], fingerprint: str) -> Teacher:
    """The job's teacher; the last one stays loaded, as a worker labels many shards of a job in a row."""
    global _loaded
    if _loaded is not None and _loaded[0] == fingerprint:
        return _loaded[1]
    _loaded = None
    source = None
    if (model := getattr(spec.teacher, "model", None)) is not None:
        source = pretrained.resolve(
            model,
            purpose=pretrained.teacher_purpose(spec.teacher.kind),
            roots=settings().model_roots,
            allow_hub=settings().allow_hub,
        )
    teacher: Teacher = TEACHERS[spec.teacher.kind](spec.teacher, names, source)
    _loaded = (fingerprint, teacher)
    return teacher


class _Answers:
    """The answers to a shard's rows as they come in, from the cache or the teacher."""

    def __init__(self, tenant: str, fingerprint: str, classes: int, teacher: Teacher) -> None:
        self.tenant, self.fingerprint, self.classes, self.teacher = tenant, fingerprint, classes, teacher
        self.probabilities: list[np.ndarray | None] = []
        self.sources: list[str] = []
        self.tokens: list[int] = []
        self.errors: list[str | None] = []
        self.tokens_saved = 0
        self.cost: float | None = None

    def add(self, rows: Sequence[Row]) -> None:
        """Answer a chunk of rows. What the teacher says is in the cache before this returns, or raises what ended it."""
        if not self.teacher.cacheable:
            labeled = self.teacher.label(list(rows))
            for position in range(len(rows)):
                error = labeled.errors.get(position)
                self._append(None if error else labeled.probabilities[position], "dataset", 0, error)
            return
        hashes = [labels.text_hash(row.text, row.text_pair) for row in rows]
        known = patiently(lambda session: labels.look_up(session, self.tenant, self.fingerprint, hashes))
        missing = {key: row for key, row in zip(hashes, rows, strict=True) if key not in known}
        asked: dict[bytes, tuple[np.ndarray, int]] = {}
        errors: dict[bytes, tuple[str, int]] = {}
        if missing:
            labeled = self.teacher.label(list(missing.values()))
            if labeled.cost is not None:
                self.cost = (self.cost or 0.0) + labeled.cost
            for position, key in enumerate(missing):
                if position in labeled.errors:
                    errors[key] = (labeled.errors[position], int(labeled.tokens[position]))
                elif position not in labeled.unasked:
                    asked[key] = (labeled.probabilities[position], int(labeled.tokens[position]))
            patiently(lambda session: labels.remember(session, self.tenant, self.fingerprint, asked))
            if labeled.ended is not None:
                raise labeled.ended
        paid: set[bytes] = set()
        for key in hashes:
            if key in errors:
                reason, tokens = errors[key]
                self._append(None, "teacher", 0 if key in paid else tokens, reason)
                paid.add(key)
            elif key in asked and key not in paid:
                paid.add(key)
                self._append(*asked[key][:1], "teacher", asked[key][1], None)
            else:
                probabilities, tokens = asked[key] if key in asked else known[key]
                self.tokens_saved += tokens
                self._append(probabilities, "cache", 0, None)

    def _append(self, probabilities: np.ndarray | None, source: str, tokens: int, error: str | None) -> None:
        self.probabilities.append(probabilities)
        self.sources.append(source)
        self.tokens.append(tokens)
        self.errors.append(error)

    def figures(self) -> dict[str, Any]:
        return {
            "rows_from_cache": self.sources.count("cache"),
            "rows_failed": sum(error is not None for error in self.errors),
            "tokens": sum(self.tokens),
            "tokens_saved": self.tokens_saved,
            "cost": self.cost,
        }

    def table(self, start: int) -> pa.Table:
        sure = self.teacher.confidence_method != "none"
        confidences = [float(entry.max()) if sure and entry is not None else None for entry in self.probabilities]
        columns = {
            "row": range(start, start + len(self.probabilities)),
            "probabilities": [None if entry is None else entry.tolist() for entry in self.probabilities],
            "confidence": confidences,
            "source": self.sources,
            "tokens": self.tokens,
            "error": self.errors,
        }
        return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)


def _store(files: Storage, shard: LabelShard, table: pa.Table) -> None:
    with tempfile.TemporaryDirectory(dir=settings().spool_dir) as directory:
        path = Path(directory) / "part.parquet"
        pq.write_table(table, path, compression="zstd")
        files.put(shard.key, path)


def read_labels(files: Storage, shards: Sequence[LabelShard], split: str, rows: int) -> pa.Table:
    """Every answer for one split, in row order; rows beyond the budget have none. Columns as SCHEMA."""
    parts = []
    for shard in shards:
        if shard.split == split and shard.status == "done":
            with files.open(shard.key) as stream:
                parts.append(pq.read_table(stream, schema=SCHEMA))
    table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
    missing = np.setdiff1d(np.arange(rows), table.column("row").to_numpy())
    if len(missing):
        columns = {
            "row": pa.array(missing, pa.int64()),
            "error": pa.array(["beyond the labeling budget"] * len(missing), pa.string()),
        }
        nulls = {name: pa.nulls(len(missing), SCHEMA.field(name).type) for name in SCHEMA.names if name not in columns}
        unlabeled = pa.table({**columns, **nulls}).select(SCHEMA.names).cast(SCHEMA)
        table = pa.concat_tables([table, unlabeled]).sort_by("row")
    return table
