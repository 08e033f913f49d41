"""What goes, and when: jobs, checkpoints and datasets with their files, what is too old or too much, files without a row.

Rows go first and files after the commit, so that a crash leaves at most files that no row names; sweep_files() finds
those. Whatever is deleted by itself is told in the log.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

import structlog
from sqlalchemy import ColumnElement, Select, delete, event, exists, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app import lifecycle, limits
from app.config import settings
from app.db import session_scope, try_lock
from app.errors import DatasetInUse, IllegalMove, NotFound, StorageAway
from app.models import TERMINAL, Checkpoint, Comparison, Dataset, IdempotencyKey, Job, LabelSet, Upload
from app.storage import Storage

NOBODY = ""
"""The tenant of a deleted dataset whose row is kept for the jobs that learned from it; no key can have this name."""
ANSWERS_KEPT = timedelta(hours=24)
"""How long the answer to a request with an Idempotency-Key is given again; docs/api.md says so."""
BATCH = 100
"""Rows deleted in one round of retention, and ids looked up at once."""
ID = re.compile(r"[a-z]+_([0-9a-f]{12})[0-9a-f]{20}")

Thing = TypeVar("Thing", Job, Comparison, Dataset)

log = structlog.get_logger()


# --- deleting -------------------------------------------------------------------------------------------------------


def delete_job(session: Session, storage: Storage, job: Job) -> None:
    """Delete a job that has ended with all it left: events, metrics, ledger, saved state, labels, checkpoints.

    The label cache stays: what the teacher was paid for is not paid for again. Labels that another job uses stay too.
    Raises IllegalMove.
    """
    lifecycle.lock(session, job)
    if job.comparison_id is not None:
        raise IllegalMove(f"This job is a run of {job.comparison_id}, whose table needs it; delete the comparison.")
    if not lifecycle.is_terminal(job):
        raise IllegalMove(f"Only a job that has ended can be deleted; this one is {job.status}. Cancel it first.")
    _remove_job(session, storage, job)


def delete_comparison(session: Session, storage: Storage, comparison: Comparison) -> None:
    """Delete a comparison whose runs have all ended, with its runs. Raises IllegalMove."""
    for job in lifecycle.lock_all(session, comparison.jobs):
        if not lifecycle.is_terminal(job):
            raise IllegalMove(f"The run {job.id} is {job.status}; cancel the comparison first.")
        _remove_job(session, storage, job)
    session.execute(delete(Comparison).where(Comparison.id == comparison.id))


def _remove_job(session: Session, storage: Storage, job: Job) -> None:
    for checkpoint in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id)).all():
        delete_checkpoint(session, storage, checkpoint)
    datasets = {job.dataset_id, job.validation_dataset_id, job.test_dataset_id}
    session.flush()
    session.execute(delete(Job).where(Job.id == job.id).execution_options(synchronize_session=False))
    session.expunge(job)
    if not session.scalar(select(exists().where(Job.label_set_id == job.label_set_id))):
        session.execute(delete(LabelSet).where(LabelSet.id == job.label_set_id))
        _after_commit(session, lambda: storage.delete_all(f"labels/{job.label_set_id}"))
    # The rows of deleted datasets, whose files are long gone, were kept for this job.
    session.execute(delete(Dataset).where(Dataset.id.in_(datasets), Dataset.tenant == NOBODY, ~_used(Dataset.id)))
    _after_commit(session, lambda: storage.delete_all(f"jobs/{job.id}"))


def delete_checkpoint(session: Session, storage: Storage, checkpoint: Checkpoint) -> None:
    """Delete a checkpoint; its job stays."""
    job = session.get(Job, checkpoint.job_id)
    if job is not None and job.best_checkpoint_id == checkpoint.id:
        job.best_checkpoint_id = None
    session.delete(checkpoint)
    _after_commit(session, lambda: storage.delete(checkpoint.key))


def delete_dataset(session: Session, storage: Storage, dataset: Dataset) -> None:
    """Delete a dataset's rows; what jobs that have ended say of it stays until they go. Raises DatasetInUse."""
    # The lock that POST /jobs shares, so that no job can begin to use the dataset meanwhile.
    if session.get(Dataset, dataset.id, with_for_update=True, populate_existing=True) is None:
        raise NotFound
    if session.scalar(select(_used(dataset.id, Job.status.not_in(TERMINAL)))):
        raise DatasetInUse
    if session.scalar(select(_used(dataset.id))):
        dataset.tenant = NOBODY
    else:
        session.delete(dataset)
    _after_commit(session, lambda: storage.delete(dataset.key))


def _used(dataset_id: InstrumentedAttribute[str] | str, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    columns = (Job.dataset_id, Job.validation_dataset_id, Job.test_dataset_id)
    return exists().where(or_(*(column == dataset_id for column in columns)), *conditions)


def _after_commit(session: Session, remove: Callable[[], None]) -> None:
    """Remove files once the rows are gone. A storage that fails leaves orphans for sweep_files(), and no error."""

    def removed(session: Session) -> None:
        if session.info.get("storage_is_away"):  # each further file would wait for it anew
            return
        try:
            remove()
        except StorageAway:
            session.info["storage_is_away"] = True
            log.error("files_not_removed")
        except Exception:
            log.exception("files_not_removed")

    event.listen(session, "after_commit", removed, once=True)


# --- by itself ------------------------------------------------------------------------------------------------------


def retain(storage: Storage) -> int:
    """One round: delete what has expired, what is too old, and what is too much. How many things went.

    Only one process at a time does this; 0 where another is at it.
    """
    wish = settings()
    with try_lock("retention") as is_alone:
        if not is_alone:
            return 0
        _forget_answers()
        gone = _expire_uploads(storage)
        if (days := wish.retain_jobs_days) is not None:
            too_old = Job.finished_at < func.now() - timedelta(days=days)
            gone += sum(_delete(storage, job, "too old") for job in _found(_ended_jobs().where(too_old)))
            recent = _runs(or_(~Job.status.in_(TERMINAL), ~too_old))
            gone += sum(_delete(storage, each, "too old") for each in _found(_ended_comparisons().where(~recent)))
        if (days := wish.retain_datasets_days) is not None:
            too_old = Dataset.created_at < func.now() - timedelta(days=days)
            gone += sum(_delete(storage, dataset, "too old") for dataset in _found(_unused_datasets().where(too_old)))
        if (most := wish.retain_tenant_bytes) is not None:
            gone += sum(_shrink(storage, tenant, most) for tenant in _tenants())
        return gone


def _shrink(storage: Storage, tenant: str, most: int) -> int:
    """Delete a tenant's jobs that have ended, and datasets that no job uses, oldest first, until `most` bytes are left.

    A dataset of the last day is left alone: its job may be about to come.
    """
    gone = 0
    while gone < BATCH:
        with session_scope() as session:
            if limits.stored_bytes(session, tenant) <= most:
                break
            yesterday = func.now() - timedelta(days=1)
            datasets = _unused_datasets().where(Dataset.tenant == tenant, Dataset.created_at < yesterday).limit(1)
            jobs = _ended_jobs().where(Job.tenant == tenant).limit(1)
            comparisons = _ended_comparisons().where(Comparison.tenant == tenant).limit(1)
            oldest: list[tuple[datetime, Job | Comparison | Dataset]] = [
                *((job.finished_at or job.created_at, job) for job in session.scalars(jobs)),
                *((comparison.created_at, comparison) for comparison in session.scalars(comparisons)),
                *((dataset.created_at, dataset) for dataset in session.scalars(datasets)),
            ]
        if not oldest or not _delete(storage, min(oldest, key=lambda entry: entry[0])[1], "too much"):
            break
        gone += 1
    return gone


def _delete(storage: Storage, thing: Job | Comparison | Dataset, reason: str) -> bool:
    """Delete in a transaction of its own; False where somebody has begun to use the thing, or was quicker."""
    try:
        with session_scope() as session:
            current = session.get(type(thing), thing.id)
            if isinstance(current, Job):
                delete_job(session, storage, current)
            elif isinstance(current, Comparison):
                delete_comparison(session, storage, current)
            elif isinstance(current, Dataset):
                delete_dataset(session, storage, current)
    except (IllegalMove, DatasetInUse, NotFound):
        return False
    log.info("deleted", id=thing.id, tenant=thing.tenant, reason=reason)
    return True


def _expire_uploads(storage: Storage) -> int:
    with session_scope() as session:
        expired = session.scalars(
            select(Upload).where(Upload.expires_at < func.now()).limit(BATCH).with_for_update(skip_locked=True)
        ).all()
        for upload in expired:
            session.execute(delete(Upload).where(Upload.id == upload.id))  # its parts go with it
            if upload.status == "pending":
                log.info("deleted", id=upload.id, tenant=upload.tenant, reason="expired")
            _after_commit(session, partial(storage.delete_all, upload.folder))
        return len(expired)


def _forget_answers() -> None:
    """That of an upload in parts stays as long as somebody goes on with it: it leads a client that starts anew back there."""
    pending = exists().where(Upload.id == IdempotencyKey.body["id"].astext, Upload.status == "pending")
    with session_scope() as session:
        session.execute(
            delete(IdempotencyKey)
            .where(IdempotencyKey.created_at < func.now() - ANSWERS_KEPT, ~pending)
            .execution_options(synchronize_session=False)
        )


def _ended_jobs() -> Select[Job]:
    ended = Job.status.in_(TERMINAL)
    return select(Job).where(ended, Job.comparison_id.is_(None)).order_by(Job.finished_at)


def _ended_comparisons() -> Select[Comparison]:
    """Those whose runs have all ended."""
    return select(Comparison).where(~_runs(~Job.status.in_(TERMINAL))).order_by(Comparison.created_at)


def _runs(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """Whether a comparison has runs of a kind."""
    return exists().where(Job.comparison_id == Comparison.id, condition)


def _unused_datasets() -> Select[Dataset]:
    return select(Dataset).where(Dataset.tenant != NOBODY, ~_used(Dataset.id)).order_by(Dataset.created_at)


def _found(query: Select[Thing]) -> list[Thing]:
    with session_scope() as session:
        return list(session.scalars(query.limit(BATCH)))


def _tenants() -> list[str]:
    with session_scope() as session:
        return [*session.scalars(select(Dataset.tenant).where(Dataset.tenant != NOBODY).distinct())]


# --- files without a row --------------------------------------------------------------------------------------------


def sweep_files(storage: Storage, *, dry_run: bool = False) -> list[str]:
    """Remove files that no row names, which a crash may leave; their keys. Names that are not ours are left alone.

    A row comes after its file, so a file counts only once its id is older than `orphan_grace_seconds`.
    """
    orphans, grace = list(_orphans(storage)), settings().orphan_grace_seconds
    halves = [path for folder in FOLDERS for path in storage.abandoned(folder, grace)]
    if not dry_run:
        for key in orphans:
            storage.delete_all(key)
            log.info("orphan_removed", key=key)
        for path in halves:
            path.unlink(missing_ok=True)
            log.info("orphan_removed", path=str(path))
    return [*orphans, *map(str, halves)]


def _orphans(storage: Storage) -> Iterator[str]:
    for folder, owner in FOLDERS.items():
        for name, row in _with_rows(storage, folder, owner):
            key = f"{folder}/{name}"
            if row is None:
                if _is_old(name):
                    yield key
            elif isinstance(row, Dataset) and row.tenant == NOBODY:
                yield from _within(storage, key)
            elif isinstance(row, LabelSet):
                current = {key for shard in row.shards for key in (shard.key, shard.answers_key)}
                yield from (part for part in _within(storage, key) if part not in current)
            elif isinstance(row, Upload):
                parts = {part.key for part in row.parts} if row.status == "pending" else set()
                yield from (part for part in _within(storage, key) if part not in parts and _is_old(part))
            elif isinstance(row, Job) and row.status == "succeeded":
                yield from (f"{key}/{entry}" for entry in storage.names(key) if entry == "resume")


FOLDERS: dict[str, type[Dataset | Upload | LabelSet | Job | Checkpoint]] = {
    "datasets": Dataset, "uploads": Upload, "labels": LabelSet, "jobs": Job, "checkpoints": Checkpoint,
}  # fmt: skip
"""Which table names the entries of each folder of the storage."""


def _with_rows(storage: Storage, folder: str, owner: Any) -> Iterator[tuple[str, Any]]:
    """The entries of a folder that are named by an id, each with its row or None."""
    ids_by_name = {name: name.removesuffix(".tar") for name in storage.names(folder)}
    names = [name for name, id in ids_by_name.items() if ID.fullmatch(id)]
    for start in range(0, len(names), BATCH):
        ids = {name: ids_by_name[name] for name in names[start : start + BATCH]}
        with session_scope() as session:
            rows = {row.id: row for row in session.scalars(select(owner).where(owner.id.in_(ids.values())))}
            for name, id in ids.items():
                yield name, rows.get(id)


def _within(storage: Storage, key: str) -> list[str]:
    return [f"{key}/{name}" for name in storage.names(key) if not name.startswith(".")]


def _is_old(key: str) -> bool:
    """Whether the last id in a key was made long ago; ids begin with their milliseconds since 1970."""
    made = ID.findall(key)
    return bool(made) and int(made[-1], 16) / 1000 < time.time() - settings().orphan_grace_seconds
