"""The auditor: after any harm, do the database, the files and the numbers still tell one story?

`audit(session, storage)` reads everything of the service and returns what is wrong, each finding a sentence. It knows
nothing of what was done to the service, and takes nobody's word: digests are computed from the bytes, sums from the rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import labels, ledger, predictions
from app.labels import text_hash
from app.models import TERMINAL, Checkpoint, Dataset, Job, JobEvent, JobMetric, LabelCache, LabelSet, LabelShard
from app.storage import Storage
from workers.training import resume

ENDS = ("job.succeeded", "job.failed", "job.cancelled")
NOT_REPEATABLE = {"training_seconds"}
"""Series that no two runs of one spec share."""


@dataclass
class Findings:
    """What an audit saw."""

    wrong: list[str] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)
    """Jobs by status."""
    workers_lost: int = 0
    orphans: Counter[str] = field(default_factory=Counter)
    """Files nobody speaks of, by the kind that docs/operations.md allows."""
    students: dict[str, set[str]] = field(default_factory=dict)
    """By what was asked for: the digests of the weights that came out."""


def audit(session: Session, storage: Storage) -> Findings:
    """Everything that can be checked of every job, label, number and file."""
    found = Findings()
    for job in session.scalars(select(Job).order_by(Job.id)):
        found.jobs[job.status] += 1
        if job.status not in (*TERMINAL, "paused"):
            found.wrong.append(f"{job.id} is {job.status}: neither ended nor paused by its owner")
        for problem in (*_events(session, job, found), *_labels(session, storage, job)):
            found.wrong.append(f"{job.id}: {problem}")
        if job.status == "failed" and not (job.error or {}).get("message"):
            found.wrong.append(f"{job.id} failed without a reason")
        if job.status == "succeeded":
            problems = list(_predictions(storage, job))
            if _has_student(job):
                problems += [*_numbers(session, storage, job), *_checkpoint(session, storage, job, found)]
            found.wrong += [f"{job.id}: {problem}" for problem in problems]
    found.wrong += _paid_twice(session, storage)
    found.wrong += _same_work_same_result(session, found)
    found.wrong += _files(session, storage, found)
    return found


def _events(session: Session, job: Job, found: Findings) -> Iterator[str]:
    events = list(session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq)))
    numbers = [event.seq for event in events]
    if numbers != list(range(1, job.event_seq + 1)):
        yield f"event numbers {numbers} are not 1 to {job.event_seq}"
    claims = [event.data["attempt"] for event in events if event.type == "job.claimed"]
    if claims != list(range(1, job.attempt + 1)):
        yield f"attempts were claimed as {claims}, and the job is at {job.attempt}: two writers, or a claim unrecorded"
    lost = Counter(event.data["attempt"] for event in events if event.type == "worker.lost" and job.phase != "labeling")
    found.workers_lost += sum(event.type == "worker.lost" for event in events)
    if not set(lost) <= {*claims, *range(1, 100)}:
        yield f"workers of attempts {sorted(lost)} were lost, but only {claims} were claimed"
    ends = [event.type for event in events if event.type in ENDS]
    if job.status in TERMINAL and (not ends or ends[-1] != f"job.{job.status}"):
        yield f"it is {job.status}, and its events end with {ends}"
    retries = sum(event.type == "job.retried" for event in events)
    if len(ends) > retries + 1:
        yield f"it ended {len(ends)} times and was retried {retries} times"
    labeled = Counter((event.data["split"], event.data["start"]) for event in events if event.type == "labeling.shard")
    yield from (
        f"the rows from {start} of {split} were labeled {n} times" for (split, start), n in labeled.items() if n > 1
    )


def _labels(session: Session, storage: Storage, job: Job) -> Iterator[str]:
    """Every done shard has its file, with exactly its rows, and the shards are all the rows."""
    shards = session.scalars(
        select(LabelShard).where(LabelShard.label_set_id == job.label_set_id, LabelShard.status == "done")
    )
    rows: dict[str, list[int]] = {}
    for shard in shards:
        if not storage.exists(shard.key):
            yield f"shard {shard.index} is done and its file {shard.key} is not there"
            continue
        with storage.open(shard.key) as stream:
            answered = pq.read_table(stream).column("row").to_pylist()
        if answered != list(range(shard.start, shard.stop)):
            yield f"shard {shard.index} should answer rows {shard.start} to {shard.stop - 1}, not {answered}"
        rows.setdefault(shard.split, []).extend(answered)
    for split, answered in rows.items():
        if len(answered) != len(set(answered)):
            yield f"rows of {split} are answered twice"
        if job.status == "succeeded" and job.spec["budget"] == {} and sorted(answered) != list(range(len(answered))):
            yield f"rows of {split} are missing"


def _numbers(session: Session, storage: Storage, job: Job) -> Iterator[str]:
    """Selection figures, metric series and ledger agree to the last row."""
    selection = job.selection or {}
    entries = pq.read_table(io.BytesIO(storage.read(ledger.key(job.id)))).to_pylist()
    by_ledger = (sum(entry["offered"] for entry in entries), sum(entry["selected"] for entry in entries))
    by_job = (selection["seen"], selection["selected"])
    by_epochs = tuple(sum(epoch[name] for epoch in selection["epochs"]) for name in ("seen", "selected"))
    points: dict[str, list[JobMetric]] = {}
    for point in session.scalars(select(JobMetric).where(JobMetric.job_id == job.id).order_by(JobMetric.step)):
        points.setdefault(point.name, []).append(point)
    by_metrics = tuple(points[name][-1].value for name in ("seen", "selected"))
    if not by_ledger == by_job == by_epochs == by_metrics:
        yield f"seen and selected: ledger {by_ledger}, job {by_job}, epochs {by_epochs}, metrics {by_metrics}"
    if selection["ratio"] != by_ledger[1] / by_ledger[0]:
        yield f"the ratio {selection['ratio']} is not {by_ledger[1]} / {by_ledger[0]}"
    epochs = job.waves[-1]["epochs"] if job.waves else job.spec["training"]["epochs"]
    if len(points["epoch_ratio"]) != epochs or len(selection["epochs"]) != epochs:
        yield f"{epochs} epochs were trained, and {len(points['epoch_ratio'])} are in the metrics"
    steps = [point.step for point in points["seen"]]
    every = steps[0]
    if steps[:-1] != list(range(every, steps[-1], every)):
        yield f"points are missing in the series `seen`: {steps}"
    for phase in job.phases:
        if phase.finished_at is None or phase.done != phase.total:
            yield f"phase {phase.name} is not finished: {phase.done} of {phase.total}"


def _has_student(job: Job) -> bool:
    return bool(job.spec["method"]["kind"] != "teacher_alone")


def _predictions(storage: Storage, job: Job) -> Iterator[str]:
    """The answers on the test set are those that the reported score was computed from."""
    if job.test_dataset_id is None:
        return
    with storage.open(predictions.key(job.id)) as stream:
        entries = predictions.read(stream).to_pylist()
    score = job.evaluation["test"]["student" if _has_student(job) else "teacher"]  # type: ignore[index]
    answered = [entry for entry in entries if entry["student"] is not None]
    right = sum(entry["student"] == entry["gold"] for entry in answered)
    if (len(answered), right) != (score["rows"], round(score["accuracy"] * score["rows"])):
        yield f"{right} of {len(answered)} test rows are answered right, and the score says {score}"


def _checkpoint(session: Session, storage: Storage, job: Job, found: Findings) -> Iterator[str]:
    """The bytes are what the row, the list of files and the manifest say."""
    rows = list(session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id)))
    if [row.id for row in rows] != [job.best_checkpoint_id]:
        yield f"its checkpoints are {[row.id for row in rows]}, and {job.best_checkpoint_id} is called the best"
        return
    row = rows[0]
    content = storage.read(row.key)
    if (len(content), hashlib.sha256(content).hexdigest()) != (row.bytes, row.sha256):
        yield f"{row.key} is not the {row.bytes} bytes with the digest that its row tells"
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {member.name: archive.extractfile(member) for member in archive}
        digests = {name: hashlib.sha256(file.read()).hexdigest() for name, file in members.items() if file is not None}
        manifest = json.loads(archive.extractfile("manifest.json").read())  # type: ignore[union-attr]
    if digests != {entry["name"]: entry["sha256"] for entry in row.files}:
        yield f"the files in {row.key} are not those of its row"
    if {entry["name"]: entry["sha256"] for entry in manifest["files"]} != {
        name: digest for name, digest in digests.items() if name != "manifest.json"
    }:
        yield f"the files in {row.key} are not those of its manifest"
    found.students.setdefault(_work(session, job), set()).add(digests["model.safetensors"])


def _work(session: Session, job: Job) -> str:
    """What was asked for: two jobs with the same work must end in the same weights."""
    spec = {name: value for name, value in job.spec.items() if name not in ("name", "metadata", "webhook")}
    for name in ("dataset_id", "validation_dataset_id", "test_dataset_id"):
        if spec.get(name):
            spec[name] = session.get_one(Dataset, spec[name]).sha256
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]


def _paid_twice(session: Session, storage: Storage) -> Iterator[str]:
    """Of all answers that stand in done shards, each text was paid for at most once, and the sums are the rows'."""
    paid: Counter[tuple[str, str, bytes]] = Counter()
    tables: dict[str, list[dict[str, Any]]] = {}
    done = select(LabelShard, LabelSet).join(LabelSet, LabelSet.id == LabelShard.label_set_id)
    for shard, label_set in session.execute(done.where(LabelShard.status == "done")):
        answers = pq.read_table(io.BytesIO(storage.read(shard.key))).to_pylist()
        if shard.tokens != sum(answer["tokens"] or 0 for answer in answers):
            yield f"{shard.key} counts {shard.tokens} tokens, its rows another sum"
        if shard.dataset_id not in tables:
            key = session.get_one(Dataset, shard.dataset_id).key
            columns = ["text", "text_pair"]
            tables[shard.dataset_id] = pq.read_table(io.BytesIO(storage.read(key)), columns=columns).to_pylist()
        for answer in answers:
            if answer["source"] == "teacher":
                row = tables[shard.dataset_id][answer["row"]]
                name = text_hash(row["text"], row["text_pair"])
                paid[label_set.tenant, label_set.fingerprint, name] += 1
                if not session.get(LabelCache, (label_set.tenant, label_set.fingerprint, name)):
                    yield f"{shard.key}: row {answer['row']} was answered, and the answer is not in the cache"
    twice = sum(count > 1 for count in paid.values())
    if twice:
        yield f"{twice} texts were paid for more than once"


def _same_work_same_result(session: Session, found: Findings) -> Iterator[str]:
    """Jobs that asked for the same have the same weights and the same points, whatever was done to them."""
    for work, digests in found.students.items():
        if len(digests) > 1:
            yield f"{len(digests)} different students came out of the same work {work}"
    first: dict[str, tuple[str, dict[tuple[str, int], float | None]]] = {}
    for job in session.scalars(select(Job).where(Job.status == "succeeded").order_by(Job.id)):
        points = {
            (point.name, point.step): point.value
            for point in session.scalars(select(JobMetric).where(JobMetric.job_id == job.id))
            if point.name not in NOT_REPEATABLE
        }
        other, expected = first.setdefault(_work(session, job), (job.id, points))
        if points != expected:
            differing = sorted(key for key in {*points, *expected} if points.get(key) != expected.get(key))[:5]
            yield f"{job.id} and {other} did the same work, and their metrics differ: {differing}"


def _files(session: Session, storage: Storage, found: Findings) -> Iterator[str]:
    """Every row's file is there; every file is a row's, or of a kind that a crash may leave."""
    jobs = {job.id: job for job in session.scalars(select(Job))}
    expected = {dataset.key for dataset in session.scalars(select(Dataset))}
    expected |= {checkpoint.key for checkpoint in session.scalars(select(Checkpoint))}
    shards = list(session.scalars(select(LabelShard)))
    expected |= {shard.key for shard in shards if shard.status == "done"}
    succeeded = [job for job in jobs.values() if job.status == "succeeded"]
    expected |= {key(job.id) for job in succeeded if _has_student(job) for key in (ledger.key, labels.report_key)}
    expected |= {predictions.key(job.id) for job in succeeded if job.test_dataset_id}
    allowed = {ledger.key(job.id): "ledger of a job that has not succeeded" for job in jobs.values()}
    allowed |= {labels.report_key(job.id): "label report of a job that has not succeeded" for job in jobs.values()}
    allowed |= {
        predictions.key(job.id): "answers on the test set of a job that has not succeeded"
        for job in jobs.values()
        if job.test_dataset_id
    }
    states = {
        resume.folder(
            job.id
        ): f"saved state of a job that {'has succeeded' if job.status == 'succeeded' else 'can be retried'}"
        for job in jobs.values()
    }
    for shard in shards:
        for attempt in range(1, shard.attempt + 1):
            key = f"labels/{shard.label_set_id}/part-{shard.index:06d}-{attempt}.parquet"
            allowed.setdefault(key, "answers of a lost attempt")
    root = Path(storage.root)
    present = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    for key in sorted(expected - present):
        yield f"{key} is spoken of and is not there"
    for key in sorted(present - expected):
        name = key.rpartition("/")[2]
        if name.startswith("."):
            found.orphans["half-written file under a hidden name"] += 1
        elif key.startswith("checkpoints/"):
            found.orphans["checkpoint of a lost attempt"] += 1
        elif key.startswith("datasets/"):
            found.orphans["rows of an upload that was not answered"] += 1
        elif key in allowed:
            found.orphans[allowed[key]] += 1
        elif (folder := key.rpartition("/")[0]) in states:
            found.orphans[states[folder]] += 1
        else:
            yield f"{key} belongs to nothing"
