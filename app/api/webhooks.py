"""Webhooks over HTTP: the secret that signs them, what became of each call, and sending one again."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app import webhooks
from app.api.deps import PageDep, SessionDep, TenantDep, needs, newest_first, owned, problems
from app.api.schemas import PageRead, Read
from app.errors import BadRequest, NotFound, TooLarge, Unauthorized, Unprocessable, UnsupportedMedia
from app.models import Comparison, Job, WebhookDelivery
from app.options import Options

router = APIRouter(tags=["webhooks"])


class SecretRead(Read):
    secret: str
    """`whsec_…`: give it to your receiver's Standard Webhooks library."""


class SecretRotate(Options):
    """How long the old secret goes on signing."""

    grace_hours: Annotated[float, Field(ge=0, le=webhooks.LONGEST_GRACE_HOURS, strict=True)] = webhooks.GRACE_HOURS


class SecretRotated(SecretRead):
    previous_until: datetime
    """Until then calls carry a second signature, of the secret before."""


class DeliveryRead(Read):
    """One call and what became of it."""

    id: str
    """Sent as `webhook-id`, the same at every attempt."""
    job_id: str | None
    comparison_id: str | None
    """Which of the two has ended."""
    type: str
    url: str
    payload: dict[str, Any]
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: datetime | None
    """Null when no attempt is to come."""
    last_status: int | None
    """HTTP status of the last answer; null when none came."""
    last_error: str | None
    created_at: datetime
    delivered_at: datetime | None

    @classmethod
    def of(cls, delivery: WebhookDelivery) -> DeliveryRead:
        """The call as its owner sees it."""
        read = cls.model_validate(delivery)
        return read if read.status == "pending" else read.model_copy(update={"next_attempt_at": None})


# Who has the secret can sign, so a key that may only read does not get it.
@router.get(
    "/webhooks/secret", response_model=SecretRead, openapi_extra=needs("write"), responses=problems(Unauthorized)
)
def read_secret(session: SessionDep, tenant: TenantDep) -> SecretRead:
    """The secret that signs your webhooks; made at the first call."""
    return SecretRead(secret=webhooks.secret_of(session, tenant))


@router.post(
    "/webhooks/secret/rotate",
    status_code=201,
    response_model=SecretRotated,
    responses=problems(BadRequest, Unauthorized, TooLarge, UnsupportedMedia, Unprocessable),
)
def rotate_secret(body: SecretRotate, session: SessionDep, tenant: TenantDep) -> SecretRotated:
    """Make a new secret. Until the grace period is over calls are signed with the old one too."""
    row = webhooks.rotate_secret(session, tenant, grace_hours=body.grace_hours)
    assert row.previous_until is not None
    return SecretRotated(secret=row.secret, previous_until=row.previous_until)


@router.get(
    "/jobs/{job_id}/deliveries", response_model=PageRead[DeliveryRead], responses=problems(Unauthorized, NotFound)
)
def list_deliveries(job_id: str, session: SessionDep, tenant: TenantDep, page: PageDep) -> dict[str, Any]:
    """The webhook calls of a job, newest first."""
    job = owned(session, Job, job_id, tenant)
    return _deliveries(session, WebhookDelivery.job_id == job.id, page)


@router.get(
    "/comparisons/{comparison_id}/deliveries",
    response_model=PageRead[DeliveryRead],
    responses=problems(Unauthorized, NotFound),
)
def list_deliveries_of_a_comparison(
    comparison_id: str, session: SessionDep, tenant: TenantDep, page: PageDep
) -> dict[str, Any]:
    """The webhook calls of a comparison, newest first."""
    comparison = owned(session, Comparison, comparison_id, tenant)
    return _deliveries(session, WebhookDelivery.comparison_id == comparison.id, page)


def _deliveries(session: Session, wanted: ColumnElement[bool], page: PageDep) -> dict[str, Any]:
    found = newest_first(session, select(WebhookDelivery).where(wanted), WebhookDelivery, page)
    return {**found, "data": [DeliveryRead.of(delivery) for delivery in found["data"]]}


@router.post(
    "/webhooks/deliveries/{delivery_id}/redeliver",
    status_code=202,
    response_model=DeliveryRead,
    responses=problems(Unauthorized, NotFound),
)
def redeliver(delivery_id: str, session: SessionDep, tenant: TenantDep) -> DeliveryRead:
    """Send a call again, under the same id."""
    delivery = owned(session, WebhookDelivery, delivery_id, tenant)
    webhooks.redeliver(session, delivery)
    return DeliveryRead.of(delivery)
