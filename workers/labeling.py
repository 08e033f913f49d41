"""Label a job's rows, shard by shard, beside any number of other workers: cache first, then the teacher.

Answers enter the cache chunk by chunk, and a server's as they come, so a worker that dies loses at most the chunk it was
busy with; the shard's file is written before its row says so.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import structlog
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import labels, pretrained, shards, spool
from app.config import settings
from app.db import AWAY, patiently, session_scope
from app.errors import StorageAway
from app.lifecycle import LeaseLost, WorkFailed
from app.models import Dataset, Job, LabelSet, LabelShard, new_id
from app.options import JobSpec, Label, needs_confidence
from app.storage import Storage, storage
from workers import gate
from workers.artifacts import read_rows, rows_at
from workers.failures import failure_of
from workers.reporter import Heartbeat
from workers.teachers import TEACHERS, endpoint
from workers.teachers.endpoint import EndpointTeacher
from workers.teachers.lbl2vec import Lbl2VecTeacher
from workers.teachers.teacher import AskedToStop, Row, Teacher, TeacherAway

log = structlog.get_logger()

CHUNK_ROWS = 128
RETRY_CHUNK_ROWS = 8
"""Rows that failed are asked about again in small company: one that upsets the teacher takes few others with it."""
WAIT_SECONDS = 0.2
"""Between two looks for the answer that another worker is waiting for."""
SUSPECT_PIECES = 11
"""Into about so many pieces go the rows at which a worker was lost."""

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("distribution", pa.list_(pa.float32())),
        ("confidence", pa.float32()),
        ("source", pa.string()),
        ("tokens", pa.int32()),
        ("error", pa.string()),
    ]
)


def label_job(job_id: str, worker: str, stopping: threading.Event, *, seconds: float = math.inf) -> int:
    """Claim and label shards of the job until there is none left for this worker, or the time is up. How many."""

    def claim(session: Session) -> tuple[Job, LabelSet, Dataset, LabelShard] | None:
        shard = shards.claim(session, job_id, worker)
        if shard is None:
            return None
        label_set = session.get_one(LabelSet, shard.label_set_id)
        return session.get_one(Job, job_id), label_set, session.get_one(Dataset, shard.dataset_id), shard

    labeled = 0
    began = time.monotonic()
    if not gate_job(job_id, worker, stopping):
        return labeled
    while not stopping.is_set() and (labeled == 0 or time.monotonic() < began + seconds):
        claimed = patiently(claim)
        if claimed is None:
            return labeled
        labeled += 1
        shard = claimed[-1]
        with _telling(partial(shards.fail, shard=shard), job_id=job_id, shard=shard.index) as ok:
            label_shard(*claimed, stopping)
        if not ok:
            return labeled
    return labeled


def gate_job(job_id: str, worker: str, stopping: threading.Event) -> bool:
    """Whether the job's rows may be labeled: the first ones are labeled, and judged by workers/gate.py.

    Every worker that comes before the verdict asks for it; the cache and its claims see to it that no row is asked
    about twice, and that all come to the same verdict, whichever of them is killed.
    """

    def begin(session: Session) -> tuple[Job, LabelSet, Dataset, Dataset | None, int] | None:
        job = next((job for job in shards.begin_labeling(session, job_id, worker) if job.id == job_id), None)
        if job is None:
            return None
        of_set = LabelShard.label_set_id == job.label_set_id
        rows = session.scalar(select(func.max(LabelShard.stop)).where(of_set, LabelShard.split == "train")) or 0
        is_scored = session.scalar(select(func.count()).where(of_set, LabelShard.split == "validation"))
        validation = session.get_one(Dataset, job.validation_dataset_id) if is_scored else None
        return job, job.label_set, session.get_one(Dataset, job.dataset_id), validation, min(rows, gate.TRAIN_ROWS)

    begun = patiently(begin)
    if begun is None:
        return False
    job, label_set = begun[:2]
    rows = begun[-1]
    wanted = rows > 0 and job.spec["labeling"]["smoke_gate"] and job.spec["teacher"]["kind"] != "dataset"
    if label_set.gate is not None or not wanted:
        return True
    with _telling(partial(shards.fail_labeling, label_set_id=label_set.id), job_id=job_id) as ok:
        verdict = _judge(*begun, stopping)
        patiently(lambda session: shards.pass_gate(session, label_set.id, verdict))
    return bool(ok)


def _judge(
    job: Job, label_set: LabelSet, train: Dataset, validation: Dataset | None, rows: int, stopping: threading.Event
) -> dict[str, Any]:
    """The verdict on the teacher. Raises gate.Useless, and LeaseLost when the job is no longer to be labeled."""
    names = [entry["name"] for entry in label_set.labels]
    bill = gate_bill(label_set.id)
    owner = f"{bill}/{new_id('g')[-12:]}"

    def renew() -> str | None:
        with session_scope() as session:
            shards.keep_labeling(session, label_set.id)
            labels.renew_claims(session, owner, settings().lease_seconds)
        return None

    with Heartbeat(renew, lambda session: None) as heartbeat:

        def should_stop() -> bool:
            return heartbeat.lost.is_set() or stopping.is_set()

        def check(start: int, stop: int) -> None:
            heartbeat.check()
            if stopping.is_set():
                raise AskedToStop
            if patiently(lambda session: labels.has_lost(session, job.tenant, label_set.fingerprint, f"{bill}/")):
                raise _LostAtTheGate

        def ask(wanted: list[Row]) -> Answers:
            answers = Answers(job.tenant, label_set.fingerprint, teacher, wanted, owner=owner, bill=bill)
            try:
                answers.ask_all(check, _chunks(len(wanted), CHUNK_ROWS))
            finally:
                if (cost := answers.cost) is not None:
                    patiently(lambda session: shards.note_cost(session, label_set.id, cost))
            return answers

        try:
            teacher = _ready_teacher(job, label_set, should_stop)
            first = read_rows(storage(), train, 0, rows)
            answers = ask(first)
            texts = [f"{row.text}\0{row.text_pair}" for row in first]
            gate.refuse_a_constant(answers.dense(len(names)), texts, [error for error in answers.errors if error])
            verdict: dict[str, Any] = {"verdict": "passed", "rows": rows}
            if validation is not None:
                held_out, gold = _some_labeled_rows(validation, names)
                said = ask(held_out).dense(len(names))
                known = ~np.isnan(said).any(axis=1)
                if known.any():
                    verdict |= gate.agreement(said[known].argmax(axis=1), gold[known], len(names))
                    gate.refuse_a_guesser(verdict)
        except _LostAtTheGate:
            message = "A worker was lost over the first rows; there is no verdict, and rows are labeled shard by shard."
            return {"verdict": "skipped", "rows": 0, "message": message}
        except (TeacherAway, StorageAway) as reason:
            away = _away(reason)
            patiently(lambda session: shards.note_away(session, label_set.id, *away))
            raise LeaseLost from None
    told = f"The teacher tells the first {rows} rows apart"
    if "hits" in verdict:
        told += f" and is right on {verdict['hits']} of {verdict['validation_rows']} validation rows"
        told += f" (chance: {verdict['chance']:.1%})"
    return {**verdict, "message": f"{told}."}


class _LostAtTheGate(Exception):
    """A worker died over the gate's rows, so others might: shards are what finds out which row it is."""


def _some_labeled_rows(dataset: Dataset, names: list[str]) -> tuple[list[Row], np.ndarray]:
    """Rows with a label of the job, spread evenly over the dataset, and their classes."""
    with storage().open(dataset.key) as stream:
        gold = pq.read_table(stream, columns=["label"]).column("label").to_pylist()
    index = {name: number for number, name in enumerate(names)}
    classes = np.array([index.get(name, -1) for name in gold])
    usable = np.flatnonzero(classes >= 0)
    count = min(len(usable), gate.VALIDATION_ROWS)
    chosen = usable[np.arange(count) * len(usable) // max(1, count)]
    return rows_at(storage(), dataset, chosen.tolist()), classes[chosen]


@contextlib.contextmanager
def _telling(fail: Callable[..., None], **context: Any) -> Iterator[list[bool]]:
    """Run the block; what it yields stays empty, and so false, when the block failed, which `fail` then records."""
    ok: list[bool] = []
    try:
        yield ok
        ok.append(True)
    except (LeaseLost, AskedToStop):
        log.info("shard_lost", **context)
    except AWAY as error:  # nothing can be recorded: the lease runs out, and another goes on
        log.error("database_stayed_away", error=str(error), **context)
    except Exception as error:
        failure = failure_of(error, "labeling_failed")
        if not isinstance(error, WorkFailed):
            log.error("labeling_failed", code=failure.code, exc_info=error, **context)
        evidence = error.evidence if isinstance(error, gate.Useless) else {}
        patiently(lambda session: fail(session, code=failure.code, message=failure.message, **evidence))


def label_shard(job: Job, label_set: LabelSet, dataset: Dataset, shard: LabelShard, stopping: threading.Event) -> None:
    """Label one shard and record it. Raises LeaseLost when it is no longer this worker's."""
    bill = f"{label_set.id}/{shard.index}"
    recording = threading.Lock()
    answers: Answers | None = None

    def renew() -> str:
        with recording, session_scope() as session:
            status = shards.renew(session, shard, answers.so_far(shard) if answers else None)
            if answers:
                labels.renew_claims(session, answers.owner, settings().lease_seconds)
        return status

    with Heartbeat(renew, partial(shards.release, shard=shard, call=True)) as heartbeat:

        def should_stop() -> bool:
            return heartbeat.lost.is_set() or heartbeat.status == "paused" or stopping.is_set()

        def check(start: int, stop: int) -> None:
            heartbeat.check()
            if should_stop():
                raise AskedToStop
            patiently(lambda session: shards.note_rows(session, shard, shard.start + start, shard.start + stop))

        try:
            teacher = _ready_teacher(job, label_set, should_stop)
            rows = read_rows(storage(), dataset, shard.start, shard.stop)
            owner = f"{bill}/{shard.attempt}"
            answers = Answers(job.tenant, label_set.fingerprint, teacher, rows, owner=owner, bill=bill)
            chunk_rows = CHUNK_ROWS
            if shard.answers_key is not None:
                answers.take(read_part(storage(), shard.answers_key))
                chunk_rows = RETRY_CHUNK_ROWS
            answers.ask_all(check, _pieces(shard, chunk_rows))
            heartbeat.check()
            _store(storage(), shard, answers.table(shard.start))
            figures = answers.figures(shard)

            def finish(session: Session) -> None:
                shards.finish(session, shard, figures)
                known = session.get_one(LabelSet, label_set.id, with_for_update=True)
                known.confidence_method, known.report = teacher.confidence_method, teacher.report()

            with recording:
                patiently(finish)
        except AWAY:  # nothing can be recorded
            raise
        except Exception as reason:
            away = _away(reason) if isinstance(reason, TeacherAway | StorageAway) else None
            gives_back = away is not None or isinstance(reason, AskedToStop | LeaseLost)
            spent = (answers.so_far(shard), answers.in_vain()) if answers else None

            def break_off(session: Session) -> None:
                if spent is not None:
                    shards.note_spent(session, shard, spent[0], **spent[1])
                if gives_back:
                    shards.release(session, shard, call=away is None)
                if away is not None:
                    shards.note_away(session, shard.label_set_id, *away)

            with recording:
                patiently(break_off)
            if gives_back:
                raise LeaseLost from None
            raise


def _away(reason: TeacherAway | StorageAway) -> tuple[str, str]:
    """What labeling waits for, and why."""
    return ("storage" if isinstance(reason, StorageAway) else "teacher"), str(reason).rstrip(".")


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _pieces(shard: LabelShard, chunk_rows: int) -> Iterator[tuple[int, int]]:
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
            stop = min(start + chunk_rows, count, suspect.start if start < suspect.start else count)
        yield start, stop
        start = stop


def _ready_teacher(job: Job, label_set: LabelSet, should_stop: Callable[[], bool]) -> Teacher:
    """The job's teacher, and its labels under the right fingerprint. Raises WorkFailed, TeacherAway or AskedToStop."""
    spec = JobSpec.model_validate(job.spec)
    names = [Label.model_validate(entry) for entry in label_set.labels]
    teacher, fingerprint = ready_teacher(spec, names, label_set.fingerprint, should_stop)
    if fingerprint != label_set.fingerprint:
        with session_scope() as session:
            session.get_one(LabelSet, label_set.id, with_for_update=True).fingerprint = fingerprint
        label_set.fingerprint = fingerprint
    if isinstance(teacher, EndpointTeacher) and teacher.confidence_method == "none":
        with session_scope() as session:
            shards.fail_for_want_of_confidence(session, label_set.id)
        if needs_confidence(spec.method):
            raise AskedToStop
    return teacher


def ready_teacher(
    spec: JobSpec, names: list[Label], fingerprint: str, should_stop: Callable[[], bool]
) -> tuple[Teacher, str]:
    """The teacher, and its labels' fingerprint: an endpoint's holds how its answers are read, found out here if need be.

    Raises WorkFailed, TeacherAway or AskedToStop.
    """
    global _loaded
    teacher = teacher_for(spec, names, fingerprint, should_stop)
    if isinstance(teacher, EndpointTeacher):
        found = labels.fingerprint(spec.teacher, names, teacher.revision)
        if found != fingerprint:
            _loaded = (found, teacher)
        fingerprint = found
    return teacher, fingerprint


_loaded: tuple[str, Teacher] | None = None


def teacher_for(spec: JobSpec, names: list[Label], fingerprint: str, should_stop: Callable[[], bool]) -> Teacher:
    """The job's teacher; the last one stays loaded, as a worker labels many shards of a job in a row."""
    global _loaded
    if _loaded is not None and _loaded[0] == fingerprint:
        _loaded[1].should_stop = should_stop
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
    teacher.should_stop = should_stop
    if isinstance(teacher, Lbl2VecTeacher):
        dataset = patiently(lambda session: session.get_one(Dataset, spec.dataset_id))
        teacher.learn(read_rows(storage(), dataset, 0, min(dataset.rows, teacher.documents)))
    _loaded = (fingerprint, teacher)
    return teacher


class Answers:
    """The answers to some rows as they come in, from the cache or the teacher; what it says is in the cache at once.

    A text is claimed before it is asked about, so that no other worker, of this job or another, asks about it at the
    same moment. What others are asking about is left for the end: by then they have the answer, or were lost.
    """

    def __init__(
        self, tenant: str, fingerprint: str, teacher: Teacher, rows: Sequence[Row], *, owner: str, bill: str
    ) -> None:
        """owner: of the claims. bill: what the answers count for; found again after a crash, they count as paid."""
        self.tenant, self.fingerprint, self.teacher, self.rows = tenant, fingerprint, teacher, rows
        self.owner, self.bill = owner, bill
        self.probabilities: list[np.ndarray | None] = [None] * len(rows)
        self.sources: list[str | None] = [None] * len(rows)
        self.tokens = [0] * len(rows)
        self.errors: list[str | None] = [None] * len(rows)
        self.seconds = self.seconds_saved = 0.0
        self.tokens_saved = self.rows_from_cache = 0
        self.cost: float | None = None
        self._tokens_spent = self._tokens_in_vain = 0
        self._seconds_in_vain = 0.0
        self._kept_at = 0.0
        self._paid: set[bytes] = set()
        self._keys: list[bytes] = []
        if teacher.cacheable:
            self._keys = [labels.text_hash(row.text, row.text_pair) for row in rows]

    def take(self, part: pa.Table) -> None:
        """Begin with the answers of an earlier attempt; only its failed rows are open."""
        for number, row in enumerate(part.to_pylist()):
            if row["error"] is None:
                self.probabilities[number] = np.asarray(row["distribution"], np.float32)
                self.sources[number], self.tokens[number] = row["source"], row["tokens"]

    def ask_all(self, check: Callable[[int, int], None], pieces: Iterable[tuple[int, int]]) -> None:
        """Answer every open row, piece by piece; `check` is called with a piece before it, what it raises ends the work."""
        waiting: list[list[int]] = []
        for start, stop in pieces:
            open_rows = [number for number in range(start, stop) if self.sources[number] is None]
            if open_rows:
                check(start, stop)
                waiting.append(self.ask(open_rows))
        while waiting := [piece for piece in waiting if piece]:
            before = waiting
            waiting = []
            for piece in before:
                check(piece[0], piece[-1] + 1)
                waiting.append(self.ask(piece))
            if waiting == before:
                time.sleep(WAIT_SECONDS)

    def ask(self, numbers: Sequence[int]) -> list[int]:
        """Answer these rows; those that another worker is asking about just now are left open and returned."""
        if not self.teacher.cacheable:
            self._label(numbers)
            return []
        wanted = {self._keys[number]: number for number in reversed(numbers)}

        def claim(session: Session) -> tuple[dict[bytes, labels.Answer], set[bytes], set[bytes]]:
            lease = settings().lease_seconds
            known, mine = labels.claim(session, self.tenant, self.fingerprint, wanted, self.owner, lease)
            return known, mine, self._of_the_gate(session, known)

        known, mine, taken = patiently(claim)
        ended: Exception | None = None
        errors: dict[bytes, tuple[str, int]] = {}
        if mine:
            asked = sorted(wanted[key] for key in mine)
            try:
                answers, errors, ended = self._label(asked)
            except BaseException:
                with contextlib.suppress(*AWAY), session_scope() as session:
                    labels.release(session, self.tenant, self.fingerprint, sorted(mine), self.owner)
                raise

            def remember(session: Session) -> None:
                labels.remember(session, self.tenant, self.fingerprint, answers, owner=self.owner)
                labels.release(session, self.tenant, self.fingerprint, sorted(mine - answers.keys()), self.owner)

            patiently(remember)
            known = known | answers
            taken |= set(answers)
        left = []
        for number in numbers:
            key = self._keys[number]
            if key in known:
                self._find(number, key, known[key], paid=key in taken or known[key].bill == self.bill)
            elif key in errors:
                self._fail(number, errors[key][0], 0 if key in self._paid else errors[key][1])
                self._paid.add(key)
            else:
                left.append(number)
        if ended is not None:
            raise ended
        return left

    def _label(
        self, numbers: Sequence[int]
    ) -> tuple[dict[bytes, labels.Answer], dict[bytes, tuple[str, int]], Exception | None]:
        """Ask the teacher: answers, errors with their tokens, and what kept it from going on.

        A row that hangs on the dataset is noted at once; others are told by their texts.
        """
        began = self._kept_at = time.perf_counter()
        if isinstance(self.teacher, EndpointTeacher):
            self.teacher.on_answers = partial(self._keep, numbers)
        said = self.teacher.label([self.rows[number] for number in numbers])
        seconds = time.perf_counter() - began
        answers: dict[bytes, labels.Answer] = {}
        errors: dict[bytes, tuple[str, int]] = {}
        if said.cost is not None:
            self.cost = (self.cost or 0.0) + said.cost
        for position, number in enumerate(numbers):
            error = said.errors.get(position)
            if not self.teacher.cacheable:
                self._fail(number, error) if error else self._note(number, said.probabilities[position], "dataset", 0)
            elif error:
                errors[self._keys[number]] = error, int(said.tokens[position])
            elif position not in said.unasked:
                answers[self._keys[number]] = labels.Answer(
                    said.probabilities[position], int(said.tokens[position]), seconds / len(numbers), self.bill
                )
        # What is not in the cache is not found again: should this attempt not finish, it was spent in vain.
        in_vain = seconds * (len(errors) / len(numbers) if self.teacher.cacheable else 1)
        self.seconds += in_vain
        self._seconds_in_vain += in_vain
        return answers, errors, said.ended

    def _keep(self, numbers: Sequence[int], arrived: dict[int, endpoint.Answer]) -> None:
        """Put what a server has answered into the cache: should this worker be killed, it is not paid for again.

        Meanwhile few rows are asked about, and none for long: a database that is away stops the spending.
        """
        moment = time.perf_counter()
        seconds, self._kept_at = (moment - self._kept_at) / len(arrived), moment
        answers = {
            self._keys[numbers[place]]: labels.Answer(
                answer.probabilities.astype(np.float32), answer.usage.input + answer.usage.output, seconds, self.bill
            )
            for place, answer in arrived.items()
            if answer.probabilities is not None
        }
        patiently(lambda session: labels.remember(session, self.tenant, self.fingerprint, answers))

    def _of_the_gate(self, session: Session, known: dict[bytes, labels.Answer]) -> set[bytes]:
        """The gate's answers count for the first shard that finds them."""
        gate = gate_bill(self.bill.partition("/")[0])
        there = [key for key, answer in known.items() if answer.bill == gate != self.bill]
        return labels.take_over_bill(session, self.tenant, self.fingerprint, there, gate, self.bill)

    def _find(self, number: int, key: bytes, answer: labels.Answer, *, paid: bool) -> None:
        """A row with a known answer: paid for here, or found in the cache."""
        if paid and key not in self._paid:
            self._paid.add(key)
            self.seconds += answer.seconds
            self._tokens_spent += answer.tokens
            self._note(number, answer.probabilities, "teacher", answer.tokens)
            return
        self.rows_from_cache += 1
        self.tokens_saved += answer.tokens
        self.seconds_saved += answer.seconds
        self._note(number, answer.probabilities, "cache", 0)

    def _note(self, number: int, probabilities: np.ndarray, source: str, tokens: int) -> None:
        self.probabilities[number], self.sources[number], self.tokens[number] = probabilities, source, tokens
        self.errors[number] = None

    def _fail(self, number: int, error: str, tokens: int = 0) -> None:
        self.sources[number] = "teacher" if self.teacher.cacheable else "dataset"
        self.errors[number], self.tokens[number] = error, tokens
        self._tokens_spent += tokens
        self._tokens_in_vain += tokens

    def so_far(self, shard: LabelShard) -> dict[str, Any]:
        """What the job shows while a shard is being labeled."""
        return {
            "rows_done": sum(source is not None for source in self.sources),
            "tokens": self._tokens_spent + shard.tokens_in_vain,
            "seconds": round(self.seconds + shard.seconds_in_vain, 4),
        }

    def in_vain(self) -> dict[str, Any]:
        """What this attempt has paid that no later one would find in the cache; `cost` is all it has paid."""
        return {
            "cost": self.cost, "tokens_in_vain": self._tokens_in_vain, "seconds_in_vain": self._seconds_in_vain,
        }  # fmt: skip

    def dense(self, classes: int) -> np.ndarray:
        """(N, C) float32 distributions; NaN where there is none."""
        nothing = np.full(classes, np.nan, np.float32)
        rows = [nothing if entry is None else entry for entry in self.probabilities]
        return np.array(rows, np.float32).reshape(len(rows), classes)

    def figures(self, shard: LabelShard) -> dict[str, Any]:
        """What the finished shard has cost and saved; a second try is added to the first."""
        before = shard if shard.answers_key is not None else None
        return {
            "rows_from_cache": self.rows_from_cache + (before.rows_from_cache if before else 0),
            "rows_failed": sum(error is not None for error in self.errors),
            "tokens": self._tokens_spent + shard.tokens_in_vain + (before.tokens if before else 0),
            "tokens_saved": self.tokens_saved + (before.tokens_saved if before else 0),
            "cost": self.cost,
            "seconds": round(self.seconds + shard.seconds_in_vain + (before.seconds if before else 0.0), 4),
            "seconds_saved": round(self.seconds_saved + (before.seconds_saved if before else 0.0), 4),
        }

    def table(self, start: int) -> pa.Table:
        """As SCHEMA; `start` is the number of the first row."""
        sure = self.teacher.confidence_method != "none"
        confidences = [float(entry.max()) if sure and entry is not None else None for entry in self.probabilities]
        columns = {
            "row": range(start, start + len(self.probabilities)),
            "distribution": [None if entry is None else entry.tolist() for entry in self.probabilities],
            "confidence": confidences,
            "source": self.sources,
            "tokens": self.tokens,
            "error": self.errors,
        }
        return pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names}, SCHEMA)


def gate_bill(label_set_id: str) -> str:
    """What the gate's answers count for until a shard finds them."""
    return f"{label_set_id}/gate"


def _store(files: Storage, shard: LabelShard, table: pa.Table) -> None:
    with spool.directory() as directory:
        path = directory / "part.parquet"
        pq.write_table(table, path, compression="zstd")
        files.put(shard.key, path)


def read_part(files: Storage, key: str) -> pa.Table:
    """The answers of one shard, as SCHEMA."""
    with files.open(key) as stream:
        # By position: parts of older versions call the distribution `probabilities`.
        return pq.read_table(stream).rename_columns(SCHEMA.names).cast(SCHEMA)


def read_labels(files: Storage, shards: Sequence[LabelShard], split: str, rows: int) -> pa.Table:
    """Every answer for one split, in row order; rows beyond the budget, or a wave, have none. Columns as SCHEMA."""
    parts = []
    for shard in shards:
        if shard.split == split and shard.answers_key is not None:
            parts.append(read_part(files, shard.answers_key))
    table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
    missing = np.setdiff1d(np.arange(rows), table.column("row").to_numpy())
    if len(missing):
        withheld = [shard for shard in shards if shard.split == split and shard.status == "withheld"]
        first, last = (withheld[0].start, withheld[-1].stop) if withheld else (0, 0)
        unasked = f"not asked: the waves of labels have not gone beyond row {first - 1}"
        why = [unasked if first <= row < last else "beyond the labeling budget" for row in missing.tolist()]
        columns = {"row": pa.array(missing, pa.int64()), "error": pa.array(why, pa.string())}
        nulls = {name: pa.nulls(len(missing), SCHEMA.field(name).type) for name in SCHEMA.names if name not in columns}
        unlabeled = pa.table({**columns, **nulls}).select(SCHEMA.names).cast(SCHEMA)
        table = pa.concat_tables([table, unlabeled]).sort_by("row")
    return table
