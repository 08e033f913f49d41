"""Settings: what the operator decides. The only reader of the environment (prefix `UNDERSTUDY_`)."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1024 * 1024
EndpointName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,99}$")]


class Endpoint(BaseModel):
    """An OpenAI-compatible server that `endpoint` teachers may ask. Clients know its name and never see the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)

    base_url: str
    """Where `/chat/completions` and `/completions` are, e.g. `https://api.openai.com/v1`."""
    model: Annotated[str, Field(min_length=1)]
    """The model to ask for, as the server names it."""
    revision: str = ""
    """Any text; change it when the model behind the name has changed, and nothing said before is used again."""
    api_key: SecretStr | None = None
    """Sent as `Authorization: Bearer`."""
    api_key_env: str | None = None
    """Instead of `api_key`: the environment variable of the labeling workers that holds it."""
    mode: Literal["auto", "prompt_logprobs", "chat_logprobs", "label_only"] = "auto"
    """How answers are read; `auto` asks the server what it can do, once."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 8
    """Requests at a time, of each labeling worker."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Of each labeling worker."""
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """For one request, from its beginning to the end of its answer."""
    price_per_million_input_tokens: Annotated[float, Field(ge=0)] | None = None
    """In whatever currency the operator counts; jobs then tell what they cost."""
    price_per_million_output_tokens: Annotated[float, Field(ge=0)] | None = None

    @field_validator("base_url")
    @classmethod
    def _is_an_http_url(cls, value: str) -> str:
        try:
            url = httpx.URL(value)
        except httpx.InvalidURL:
            raise ValueError("is not a URL") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError("must be like https://host/v1")
        if url.userinfo or url.query or url.fragment:
            raise ValueError("carries credentials, a query or a fragment; give a key as api_key or api_key_env")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _has_one_key(self) -> Endpoint:
        if self.api_key is not None and self.api_key_env is not None:
            raise ValueError("give api_key or api_key_env, not both")
        return self

    def key(self) -> str | None:
        """The key to send. Raises KeyError when `api_key_env` names a variable that is not set here."""
        if self.api_key is not None:
            return self.api_key.get_secret_value().strip() or None
        return os.environ[self.api_key_env].strip() or None if self.api_key_env else None

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """What so many tokens cost; null where the operator gave no price."""
        prices = (self.price_per_million_input_tokens, self.price_per_million_output_tokens)
        if prices == (None, None):
            return None
        return (input_tokens * (prices[0] or 0.0) + output_tokens * (prices[1] or 0.0)) / 1e6


class Settings(BaseSettings):
    """Where the parts are and how much a client may ask of them."""

    model_config = SettingsConfigDict(
        env_prefix="UNDERSTUDY_",
        env_file=".env",
        env_parse_none_str="none",
        extra="ignore",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    database_url: str = "postgresql+psycopg://understudy:understudy@localhost:5432/understudy"
    """PostgreSQL, as an SQLAlchemy URL; `postgresql://` is read as psycopg 3."""
    redis_url: str = "redis://localhost:6379/0"
    """The Celery broker. It only carries ids and may be lost at any time."""
    storage_url: str = "file://./data/storage"
    """Where datasets, labels and checkpoints lie: `file:///…` or `s3://bucket/prefix`."""
    storage_timeout_seconds: float = Field(10.0, gt=0)
    """How long an S3 storage may take to answer a request, or be silent in the middle of an answer; each is tried twice."""
    spool_dir: Path | None = None
    """Where uploads are spooled and checkpoints are packed; null: the system's temporary directory."""

    model_roots: Annotated[list[Path], NoDecode] = []
    """Directories with models a client may name (separated by commas, or a JSON list)."""
    allow_hub: bool = False
    """Whether models may be downloaded from the Hugging Face hub."""
    endpoints: Annotated[dict[EndpointName, Endpoint], NoDecode] = {}
    """The servers that `endpoint` teachers may ask, by name (JSON object)."""

    max_upload_bytes: int = 5 * 1024 * MIB
    max_decompressed_bytes: int = 20 * 1024 * MIB
    max_line_bytes: int = 1 * MIB
    max_rows: int = 20_000_000
    max_columns: int = 1000
    max_text_characters: int = 200_000
    max_part_bytes: int = Field(64 * MIB, ge=1)
    """Bytes of one part of an upload in parts."""
    upload_expires_seconds: float = Field(24 * 3600.0, gt=0)
    """An upload in parts that nobody goes on with for this long is removed."""

    max_requests_per_minute: int | None = Field(12_000, ge=1)
    """Of one key; `none` for no limit. This and the four limits below can be set for a key: `understudy keys limit`."""
    max_uploads_at_once: int | None = Field(16, ge=1)
    """Of one tenant, in one API process."""
    max_streams_at_once: int | None = Field(100, ge=1)
    """Event streams of one tenant, in one API process."""
    max_stored_bytes: int | None = Field(100 * 1024 * MIB, ge=1)
    """Of one tenant's datasets, as they were received, checkpoints, and uploads in parts."""
    max_unfinished_jobs: int | None = Field(1000, ge=1)
    """Of one tenant: queued, running or paused."""

    shard_rows: int = Field(512, ge=1)
    """Rows a worker claims at a time for labeling."""
    lease_seconds: float = Field(30.0, gt=0)
    """A claim that is not renewed for this long is given to another worker."""
    sweep_seconds: float = Field(2.0, gt=0)
    """How often the scheduler looks for expired leases and lost messages."""
    requeue_seconds: float = Field(15.0, gt=0)
    """Work that waits this long without a worker gets another message: the broker may have lost the first."""
    max_attempts: int = Field(5, ge=1)
    """A job, or a shard, that has lost this many workers fails."""
    resume_every_seconds: float = Field(60.0, gt=0)
    """How often a running training saves the state it would resume from."""
    retain_jobs_days: float | None = Field(None, gt=0)
    """Jobs that ended longer ago are deleted, with their checkpoints; null keeps them."""
    retain_datasets_days: float | None = Field(None, gt=0)
    """Datasets that no job uses and that are older are deleted; null keeps them."""
    retain_tenant_bytes: int | None = Field(None, ge=0)
    """Where a tenant's datasets and checkpoints take more, its oldest jobs that have ended, and datasets that no job
    uses, are deleted; null keeps them."""
    orphan_grace_seconds: float = Field(24 * 3600.0, gt=0)
    """Files that no row names are removed when they are older."""
    turn_seconds: float = Field(30.0, gt=0)
    """How long a worker labels for one tenant before it looks whether another one's turn has come."""
    measure_seconds: float = Field(20.0, ge=0)
    """How long a dry run waits for a worker that tries the teacher on a few rows; 0: dry runs only estimate."""
    threads: int | None = None
    """CPU threads of a worker's models; null leaves the choice to torch."""
    processes: int | None = Field(None, ge=1)
    """Processes of a worker that train one job together; null: one for each GPU, of which each has one at most. 1 without."""

    webhook_allow_private: bool = False
    """Whether webhooks may go to private, loopback, link-local and reserved addresses."""

    predict_bytes: int = Field(1024 * MIB, ge=0)
    """Bytes of students that an API process keeps loaded to predict with; a larger student is refused, 0 refuses all."""

    cors_origins: Annotated[list[str], NoDecode] = []
    """Web pages of other origins that may call the API (separated by commas, or a JSON list)."""

    @field_validator("model_roots", "endpoints", "cors_origins", mode="before")
    @classmethod
    def _written(cls, value: Any, told: ValidationInfo) -> Any:
        """What stands in an environment variable."""
        if not isinstance(value, str):
            return value
        if told.field_name != "endpoints" and not value.lstrip().startswith("["):
            return [part.strip() for part in value.split(",") if part.strip()]
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: str) -> str:
        if not value.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
            raise ValueError("must be like postgresql://user:password@host:5432/name")
        return value

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL with psycopg 3 as its driver."""
        for scheme in ("postgresql://", "postgres://"):
            if self.database_url.startswith(scheme):
                return "postgresql+psycopg://" + self.database_url.removeprefix(scheme)
        return self.database_url


class BadSettings(Exception):
    """What stands in the environment, or in `.env`, cannot be a setting."""


@lru_cache
def settings() -> Settings:
    """The settings of this process, read once. Raises BadSettings, without the values: some are secrets."""
    try:
        return Settings()
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False)
    told = (f"{fault['loc'][0]}".upper() + "".join(f"/{part}" for part in fault["loc"][1:]) for fault in faults)
    lines = (f"UNDERSTUDY_{name}: {fault['msg']}" for name, fault in zip(told, faults, strict=True))
    raise BadSettings("; ".join(line.replace("Value error, ", "") for line in lines))
