"""Whose turn it is: the jobs that wait for a worker, in the order in which one should try to claim them."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Subquery, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.models import HELD, PHASES, Job, LabelSet, LabelShard, TenantTurn
from app.queue import LABEL

LONGEST_LINE = 50
"""How many jobs a worker tries before it gives a message up."""
IS_LIVE = (LabelShard.status == "claimed") & (LabelShard.lease_expires_at >= func.now())
"""Of a shard: a worker labels it."""
IS_OPEN = or_(
    LabelShard.status == "pending", (LabelShard.status == "claimed") & (LabelShard.lease_expires_at < func.now())
)
"""Of a shard: a worker may claim it; where one had, it was lost."""


def in_turn(session: Session, task: str, named: str | None = None) -> list[str]:
    """The jobs that wait for a worker, in the order in which one should try to claim them.

    A message says that there is work, not which is next: with the first come first served, one tenant's hundred jobs
    would starve another's one. So each tenant is in line with one job, then each with its second, and so on; the tenant
    with the least work of this kind in workers' hands comes first, and of equals the one whose last turn is longest ago.
    A tenant's own jobs stand in line by age, but for the one that the message has `named`.
    """
    work = _labeling_now() if task == LABEL else _training_now()
    waits = _waits_for_labelers() if task == LABEL else waits_for_a_trainer()
    place = func.row_number().over(partition_by=Job.tenant, order_by=(Job.id != (named or ""), Job.id))
    line = select(Job.id, Job.tenant, place.label("place")).where(*waits).subquery()
    query = (
        select(line.c.id)
        .outerjoin(work, work.c.tenant == line.c.tenant)
        .outerjoin(TenantTurn, (TenantTurn.tenant == line.c.tenant) & (TenantTurn.task == task))
        .order_by(line.c.place, func.coalesce(work.c.count, 0), TenantTurn.at.nulls_first(), line.c.id)
        .limit(LONGEST_LINE)
    )
    return list(session.scalars(query))


def _labeling_now() -> Subquery:
    joined = select(LabelSet.tenant, func.count().label("count")).join(LabelSet.shards)
    return joined.where(IS_LIVE).group_by(LabelSet.tenant).subquery()


def _training_now() -> Subquery:
    live = Job.status.in_(HELD) & (Job.lease_expires_at >= func.now())
    return select(Job.tenant, func.count().label("count")).where(live).group_by(Job.tenant).subquery()


def _waits_for_labelers() -> tuple[ColumnElement[bool], ...]:
    shards = select(LabelShard.index).where(LabelShard.label_set_id == Job.label_set_id)
    # Where none is open, the job waits for somebody to find that out and send it on to training.
    return (
        Job.status.in_(("queued", "running")),
        or_(Job.phase.is_(None), Job.phase == "labeling"),
        or_(shards.where(IS_OPEN).exists(), ~shards.where(LabelShard.status == "claimed").exists()),
    )


def waits_for_a_trainer() -> tuple[ColumnElement[bool], ...]:
    """Of a job that has its labels, and no worker."""
    return (
        Job.status.in_(("queued", "running")),
        Job.phase.in_(PHASES[1:]),
        or_(Job.lease_expires_at.is_(None), Job.lease_expires_at < func.now()),
    )


def take_turn(session: Session, tenant: str, task: str) -> None:
    """Note that a worker took up the tenant's work of this kind."""
    moment = func.clock_timestamp()
    statement = insert(TenantTurn).values(tenant=tenant, task=task, at=moment)
    session.execute(statement.on_conflict_do_update(index_elements=["tenant", "task"], set_={"at": moment}))
