"""Every table on one page. PostgreSQL is the record of everything that happened.

Files lie in the storage, named by the ids here: file first, row second, so a row never points at nothing.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

JOB_STATUSES = (
    "queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed",
)  # fmt: skip
TERMINAL = ("succeeded", "failed", "cancelled")
"""Statuses in which nothing more happens to a job by itself or by a worker."""
HELD = ("running", "pausing", "cancelling")
"""Statuses in which a worker may hold the job."""
PHASES = ("labeling", "training", "evaluating", "packaging")
SCOPES = ("read", "write", "admin")
"""What a key may do, each including the one before it."""


def now() -> datetime:
    """The present moment in UTC."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """An id such as `job_018f…`: the milliseconds since 1970 and ten random bytes, so ids sort by age."""
    milliseconds = int(now().timestamp() * 1000)
    return f"{prefix}_{milliseconds:012x}{secrets.token_hex(10)}"


class Base(DeclarativeBase):
    """Base of every table."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSONB, list[Any]: JSONB, datetime: DateTime(timezone=True)}  # noqa: RUF012


class ApiKey(Base):
    """A key's hash and what it may do; the key itself is shown once and kept nowhere."""

    __tablename__ = "api_keys"
    __table_args__ = (CheckConstraint(f"scope IN {SCOPES!r}", name="scope"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(200))
    hash: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    scope: Mapped[str] = mapped_column(String(8), default="write")
    limits: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """What differs from the settings' limits; null means no limit. See app/limits.py."""
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Dataset(Base):
    """An uploaded dataset; its rows lie at `datasets/<id>/rows.parquet`."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(300))
    rows: Mapped[int] = mapped_column(BigInteger)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    columns: Mapped[list[Any]]
    label_counts: Mapped[dict[str, Any]]
    duplicates: Mapped[int] = mapped_column(BigInteger)
    skipped: Mapped[int] = mapped_column(BigInteger)
    has_text_pair: Mapped[bool] = mapped_column(Boolean)
    warnings: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def key(self) -> str:
        """Where the rows lie in the storage."""
        return f"datasets/{self.id}/rows.parquet"


class Upload(Base):
    """A file on its way, part by part; the states are drawn in app/api/transfers.py."""

    __tablename__ = "uploads"
    __table_args__ = (CheckConstraint("status IN ('pending', 'completed', 'cancelled')", name="status"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(300))
    bytes: Mapped[int] = mapped_column(BigInteger)
    format: Mapped[str] = mapped_column(String(16))
    sha256: Mapped[str | None] = mapped_column(String(64))
    options: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(String(16), default="pending")
    dataset_id: Mapped[str | None] = mapped_column(String(40))
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime] = mapped_column(index=True)
    parts: Mapped[list[UploadPart]] = relationship(order_by="UploadPart.number", lazy="selectin", viewonly=True)

    @property
    def folder(self) -> str:
        """Where the parts lie in the storage."""
        return f"uploads/{self.id}"


class UploadPart(Base):
    """A part that has arrived."""

    __tablename__ = "upload_parts"

    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    id: Mapped[str] = mapped_column(String(40))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def key(self) -> str:
        """Where the part lies in the storage; sent again, it is another file."""
        return f"uploads/{self.upload_id}/{self.id}"


class LabelSet(Base):
    """What one teacher says about a job's rows; filled shard by shard, kept as Parquet under `labels/<id>/`."""

    __tablename__ = "label_sets"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    """Hash of everything an answer depends on but the text: teacher, revision, prompt, labels."""
    labels: Mapped[list[Any]]
    confidence_method: Mapped[str | None] = mapped_column(String(64))
    report: Mapped[dict[str, Any]] = mapped_column(default=dict)
    gate: Mapped[dict[str, Any] | None]
    """What the first rows told of the teacher, once they have passed; see workers/gate.py."""
    created_at: Mapped[datetime] = mapped_column(default=now)
    shards: Mapped[list[LabelShard]] = relationship(order_by="LabelShard.index", viewonly=True)


class LabelShard(Base):
    """A run of rows that one worker labels at a time; claimed with FOR UPDATE SKIP LOCKED."""

    __tablename__ = "label_shards"
    __table_args__ = (
        CheckConstraint("status IN ('withheld', 'pending', 'claimed', 'done', 'skipped')", name="status"),
        Index(
            "ix_label_shards_open", "label_set_id", "index", postgresql_where=text("status IN ('pending', 'claimed')")
        ),
    )

    label_set_id: Mapped[str] = mapped_column(ForeignKey("label_sets.id", ondelete="CASCADE"), primary_key=True)
    index: Mapped[int] = mapped_column(Integer, primary_key=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    split: Mapped[str] = mapped_column(String(16))
    start: Mapped[int] = mapped_column(BigInteger)
    stop: Mapped[int] = mapped_column(BigInteger)
    wave: Mapped[int] = mapped_column(Integer, default=1)
    """Counted from 1; those after the first are `withheld` until the student asks for them."""
    status: Mapped[str] = mapped_column(String(16), default="pending")
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    answered_attempt: Mapped[int | None] = mapped_column(Integer)
    """The attempt whose file holds the answers; a shard that is claimed again for its failed rows keeps it meanwhile."""
    retries: Mapped[int] = mapped_column(Integer, default=0)
    """How often the shard was opened again for its failed rows."""
    lost_workers: Mapped[int] = mapped_column(Integer, default=0)
    lease_expires_at: Mapped[datetime | None]
    worker: Mapped[str | None] = mapped_column(String(200))
    busy_start: Mapped[int | None] = mapped_column(BigInteger)
    """With `busy_stop`: the rows its worker labels just now; of a lost worker, the rows it was lost at."""
    busy_stop: Mapped[int | None] = mapped_column(BigInteger)
    rows_done: Mapped[int] = mapped_column(BigInteger, default=0)
    """Rows answered so far, as counted in the job's phase."""
    rows_from_cache: Mapped[int] = mapped_column(BigInteger, default=0)
    rows_failed: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens_saved: Mapped[int] = mapped_column(BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(Double, default=0.0)
    """Time the teacher took."""
    seconds_saved: Mapped[float] = mapped_column(Double, default=0.0)
    tokens_in_vain: Mapped[int] = mapped_column(BigInteger, default=0)
    """With `seconds_in_vain`: what attempts that gave the shard back spent on rows that failed; part of `tokens` at its end."""
    seconds_in_vain: Mapped[float] = mapped_column(Double, default=0.0)
    cost: Mapped[float | None] = mapped_column(Double)
    """In the operator's currency; null where the teacher has no price."""

    @property
    def key(self) -> str:
        """Where this attempt's answers lie; the attempt is part of the name, so a late writer overwrites nothing."""
        return self._key(self.attempt)

    @property
    def answers_key(self) -> str | None:
        """Where the answers lie that count; None before there are any."""
        return None if self.answered_attempt is None else self._key(self.answered_attempt)

    def _key(self, attempt: int) -> str:
        return f"labels/{self.label_set_id}/part-{self.index:06d}-{attempt}.parquet"


class LabelCache(Base):
    """A teacher's answer to one text, shared by every job of a tenant."""

    __tablename__ = "label_cache"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    text_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    probabilities: Mapped[bytes] = mapped_column(LargeBinary)
    """The distribution over the labels as little-endian float32."""
    tokens: Mapped[int] = mapped_column(Integer, default=0)
    seconds: Mapped[float] = mapped_column(Double, default=0.0)
    """The row's share of the time the teacher took."""
    bill: Mapped[str | None] = mapped_column(String(64))
    """Who paid for the answer, `<label set>/<shard>` or `<label set>/gate`: after a crash it counts as paid, not as found."""
    created_at: Mapped[datetime] = mapped_column(default=now)


class LabelClaim(Base):
    """A text that a worker is asking a teacher about just now, so that nobody else does; see app/labels.py."""

    __tablename__ = "label_claims"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    text_hash: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime]
    """By PostgreSQL's clock; from then on another may take the claim over."""


class Measurement(Base):
    """A teacher to be tried on a few rows of a job that has not started, and what came of it; see app/measurements.py."""

    __tablename__ = "measurements"
    __table_args__ = (
        CheckConstraint("status IN ('waiting', 'running', 'done', 'failed')", name="status"),
        Index("ix_measurements_teacher", "tenant", "fingerprint"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    fingerprint: Mapped[str] = mapped_column(String(64))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"))
    spec: Mapped[dict[str, Any]]
    labels: Mapped[list[Any]]
    rows: Mapped[list[Any]]
    """Numbers of the train rows to try."""
    status: Mapped[str] = mapped_column(String(16), default="waiting")
    result: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class Comparison(Base):
    """Several methods, each with several seeds, on one set of splits and one set of labels; its runs are jobs."""

    __tablename__ = "comparisons"
    __table_args__ = (Index("ix_comparisons_tenant_created", "tenant", "id"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str | None] = mapped_column(String(200))
    spec: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    created_at: Mapped[datetime] = mapped_column(default=now)
    jobs: Mapped[list[Job]] = relationship(order_by="Job.id", viewonly=True)


class EndpointAbility(Base):
    """What a worker has found out that an operator's endpoint can do."""

    __tablename__ = "endpoint_abilities"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    configuration: Mapped[str] = mapped_column(String(64))
    """Hash of the settings it was found out with; with others it has to be found out again."""
    ability: Mapped[dict[str, Any]]
    found_at: Mapped[datetime]


class Job(Base):
    """One distillation, from labeling to the checkpoint."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(f"status IN {JOB_STATUSES!r}", name="status"),
        CheckConstraint(f"phase IN {PHASES!r}", name="phase"),
        Index("ix_jobs_tenant_created", "tenant", "id"),
        Index("ix_jobs_metadata", "metadata", postgresql_using="gin"),
        Index(
            "ix_jobs_active", "status",
            postgresql_where=text("status NOT IN ('succeeded', 'failed', 'cancelled', 'paused')"),
        ),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    name: Mapped[str | None] = mapped_column(String(200))
    method: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(16), default="queued")
    phase: Mapped[str | None] = mapped_column(String(16))
    spec: Mapped[dict[str, Any]]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    validation_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    test_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    label_set_id: Mapped[str] = mapped_column(ForeignKey("label_sets.id"), index=True)
    """The arms of a comparison that have one teacher share it."""
    comparison_id: Mapped[str | None] = mapped_column(ForeignKey("comparisons.id"), index=True)
    arm: Mapped[str | None] = mapped_column(String(100))
    """The name of the comparison's arm that this job is a run of."""
    warnings: Mapped[list[Any]] = mapped_column(default=list)
    waves: Mapped[list[Any]] = mapped_column(default=list)
    """What the student of each wave of labels has shown; see app/waves.py."""
    selection: Mapped[dict[str, Any] | None]
    metrics: Mapped[dict[str, Any]] = mapped_column(default=dict)
    evaluation: Mapped[dict[str, Any] | None]
    best_checkpoint_id: Mapped[str | None] = mapped_column(String(40))
    error: Mapped[dict[str, Any] | None]
    event_seq: Mapped[int] = mapped_column(Integer, default=0)
    """The number of the last event; raised under the row's lock, so the numbers have no gaps."""
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Raised by every claim; a worker's writes hold only while it is unchanged."""
    lost_workers: Mapped[int] = mapped_column(Integer, default=0)
    worker: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]
    enqueued_at: Mapped[datetime] = mapped_column(default=func.now())
    """By PostgreSQL's clock, as the sweep compares it with that."""
    created_at: Mapped[datetime] = mapped_column(default=now)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    phases: Mapped[list[JobPhase]] = relationship(order_by="JobPhase.position", lazy="selectin", viewonly=True)
    label_set: Mapped[LabelSet] = relationship(viewonly=True)


class JobPhase(Base):
    """How far one phase of a job has come."""

    __tablename__ = "job_phases"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(16), primary_key=True)
    position: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    total: Mapped[int] = mapped_column(BigInteger, default=0)


class JobEvent(Base):
    """Something that happened to a job; `seq` counts from 1 without gaps."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    type: Mapped[str] = mapped_column(String(64))
    level: Mapped[str] = mapped_column(String(8), default="info")
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(default=dict)
    at: Mapped[datetime] = mapped_column(default=now)


class JobMetric(Base):
    """One point of one series."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(300), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    epoch: Mapped[float] = mapped_column(Double)
    value: Mapped[float | None] = mapped_column(Double)
    at: Mapped[datetime] = mapped_column(default=now)


class Checkpoint(Base):
    """A trained student that can be downloaded; its files lie in `checkpoints/<id>.tar`."""

    __tablename__ = "checkpoints"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    step: Mapped[int] = mapped_column(BigInteger)
    epoch: Mapped[float] = mapped_column(Double)
    metrics: Mapped[dict[str, Any]]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    files: Mapped[list[Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)

    @property
    def key(self) -> str:
        """Where the tar lies in the storage."""
        return f"checkpoints/{self.id}.tar"


class WebhookDelivery(Base):
    """A call to make, or made, to the URL that a job's or comparison's spec names; the states are drawn in app/webhooks.py."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'delivered', 'failed')", name="status"),
        CheckConstraint("(job_id IS NULL) <> (comparison_id IS NULL)", name="of_one"),
        Index("ix_webhook_deliveries_due", "next_attempt_at", postgresql_where=text("status = 'pending'")),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """Sent as `webhook-id`."""
    tenant: Mapped[str] = mapped_column(String(64))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    comparison_id: Mapped[str | None] = mapped_column(ForeignKey("comparisons.id", ondelete="CASCADE"), index=True)
    type: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(String(2000))
    payload: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(String(16), default="pending")
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    next_attempt_at: Mapped[datetime]
    """By PostgreSQL's clock. While a call is being sent: when the sender's claim runs out."""
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now)
    delivered_at: Mapped[datetime | None]


class WebhookSecret(Base):
    """What signs a tenant's webhooks; it has to be kept as it is, because signing needs it."""

    __tablename__ = "webhook_secrets"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    secret: Mapped[str] = mapped_column(String(100))
    previous: Mapped[str | None] = mapped_column(String(100))
    """The secret before this one; signs too until `previous_until`."""
    previous_until: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class IdempotencyKey(Base):
    """The answer to a POST that carried an Idempotency-Key, kept so that sending it again is harmless."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (UniqueConstraint("tenant", "path", "key"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    tenant: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(100))
    key: Mapped[str] = mapped_column(String(255))
    request_hash: Mapped[str] = mapped_column(String(64))
    status: Mapped[int | None] = mapped_column(Integer)
    """Null while the first request is being answered."""
    body: Mapped[dict[str, Any] | None]
    headers: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(default=now)


class TenantTurn(Base):
    """When a tenant's work of one kind was last taken up; whoever has waited longest is next. See app/turns.py."""

    __tablename__ = "tenant_turns"

    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    task: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[datetime]


class AuditEntry(Base):
    """Who did, or tried, what. Only ever added to: a trigger of the migration refuses changes."""

    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(default=now, index=True)
    tenant: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(40))
    """Null where no known key was shown, and for what was done on the command line."""
    request_id: Mapped[str | None] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    object_id: Mapped[str | None] = mapped_column(String(100))
    outcome: Mapped[str] = mapped_column(String(8))
    """`done`, `refused`, `denied` or `failed`; see app/audit.py."""
    status: Mapped[int | None] = mapped_column(Integer)
    address: Mapped[str | None] = mapped_column(String(64))
