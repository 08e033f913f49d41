"""What an operator's endpoint can do, found out once and kept, and what that means for the jobs that ask it.

A worker finds it out before the first row (workers/teachers/endpoint.py); from then on POST /jobs knows it too. How the
answers were read is part of a label's fingerprint, so a server that learns to give log-probabilities is asked anew.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import orjson
from pydantic import BaseModel, ConfigDict
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.config import Endpoint
from app.models import EndpointAbility, now
from app.options import EndpointTeacher

Reading = Literal["prompt_logprobs", "top_logprobs", "sampled_frequency", "none"]
"""How the distribution of a row comes about; `none`: there is a label and no confidence."""


class Ability(BaseModel):
    """What a server understands."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    mode: Literal["prompt_logprobs", "chat_logprobs", "label_only"]
    least_tokens: int = 0
    """`prompt_logprobs`: the smallest `max_tokens` the server takes, 0 or 1."""
    top_logprobs: int = 0
    """`chat_logprobs`: how many alternatives it lists for each token."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What it calls the longest answer to a chat."""


def reading(teacher: EndpointTeacher, endpoint: Endpoint, ability: Ability | None) -> Reading | None:
    """How this teacher reads the endpoint's answers; null while nobody knows what the endpoint can do."""
    if teacher.samples > 1:
        return "sampled_frequency"
    mode = ability.mode if ability is not None else endpoint.mode
    readings: dict[str, Reading] = {
        "prompt_logprobs": "prompt_logprobs", "chat_logprobs": "top_logprobs", "label_only": "none",
    }  # fmt: skip
    return readings.get(mode)


def no_confidence(method: str) -> str:
    """Why a method cannot be used, and what can."""
    return (
        f"The endpoint answers with the label alone, and method {method!r} needs the teacher's confidence. Set "
        "teacher.samples to 5 or so, which asks each row that often and takes the shares of the answers as confidence; "
        "or use a method that looks at the label alone: no_selection, random, freematch, softmatch or unixkd."
    )


def revision(endpoint: Endpoint, how: Reading | None) -> str:
    """What answers depend on besides the spec: the model, and how it is read. Neither the URL nor the key."""
    return orjson.dumps([endpoint.model, endpoint.revision, how]).decode()


def known(session: Session, name: str, endpoint: Endpoint) -> Ability | None:
    """What is known of an endpoint as it is configured now."""
    row = session.get(EndpointAbility, name)
    if row is None or row.configuration != _configuration(endpoint):
        return None
    return Ability.model_validate(row.ability)


def learn(session: Session, name: str, endpoint: Endpoint, ability: Ability) -> Ability:
    """Keep what a worker has found out; of two that ask at the same moment, the first is believed."""
    values = {
        "name": name, "configuration": _configuration(endpoint), "ability": ability.model_dump(), "found_at": now(),
    }  # fmt: skip
    statement = insert(EndpointAbility).values(values)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["name"],
            set_={column: statement.excluded[column] for column in ("configuration", "ability", "found_at")},
            where=EndpointAbility.configuration != statement.excluded.configuration,
        )
    )
    session.expire_all()
    return known(session, name, endpoint) or ability


def _configuration(endpoint: Endpoint) -> str:
    parts = [endpoint.base_url, endpoint.model, endpoint.revision, endpoint.mode]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()
