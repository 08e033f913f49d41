"""The situations a client can meet, and the one handler that writes them as problem+json (RFC 9457).

    Problem                     status, code, detail, errors
    ├── BadRequest 400
    ├── Unauthorized 401
    ├── Forbidden 403
    ├── NotFound 404
    ├── Conflict 409            DatasetInUse, IllegalMove, KeyEnded, NotReady, RequestInFlight, TooManyKeys
    ├── TooLarge 413
    ├── UnsupportedMedia 415
    ├── RangeNotSatisfiable 416
    ├── Unprocessable 422       DigestMismatch, EmptyFile, InvalidRows, InvalidSpec, KeyReused, TooManyLabels,
    │                           UnknownColumn, UnreadableFile
    ├── TooMany 429             RateLimited, StorageFull, TooManyJobs, TooManyStreams, TooManyUploads
    └── Unavailable 503         NoRoom, StorageAway, StorageRefuses

A class is a situation; its docstring is the default sentence the client reads.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from typing import Any, TypedDict

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException

log = structlog.get_logger()
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when a file cannot grow."""
MAX_ERRORS = 100
MAX_ECHO_CHARACTERS = 500
"""Of what the client sent, in one message or pointer."""


class Fault(TypedDict, total=False):
    """One bad row or field: `line` of the uploaded file, or `pointer` (RFC 6901) into the body."""

    line: int | None
    pointer: str | None
    code: str
    message: str


class Problem(Exception):
    """The request cannot be served."""

    status = 400
    code = "bad_request"

    def __init__(
        self,
        detail: str | None = None,
        *,
        errors: Iterable[Fault] = (),
        total_errors: int | None = None,
        headers: dict[str, str] | None = None,
        **extra: Any,
    ) -> None:
        self.detail = detail or (type(self).__doc__ or "").strip()
        self.errors = list(errors)
        self.total_errors = len(self.errors) if total_errors is None else total_errors
        self.headers = headers or {}
        self.extra = extra
        super().__init__(self.detail)


class BadRequest(Problem):
    """The request cannot be understood."""


class Unauthorized(Problem):
    """Send an API key: `Authorization: Bearer us_…`."""

    status, code = 401, "unauthorized"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"WWW-Authenticate": "Bearer"})


class Forbidden(Problem):
    """This API key may not do that; use one of a wider scope."""

    status, code = 403, "forbidden"


class NotFound(Problem):
    """There is nothing here under that id."""

    status, code = 404, "not_found"


class Conflict(Problem):
    """The request does not fit the present state."""

    status, code = 409, "conflict"


class DatasetInUse(Conflict):
    """The dataset is used by a job that has not ended; cancel the job first."""

    code = "dataset_in_use"


class IllegalMove(Conflict):
    """The job cannot do that from its present status."""

    code = "illegal_move"


class NotReady(Conflict):
    """The job has not got that far yet."""

    code = "not_ready"


class RequestInFlight(Conflict):
    """A request with this Idempotency-Key is still being answered; try again shortly."""

    code = "request_in_flight"


class KeyEnded(Conflict):
    """This key has expired or been revoked already; make a new one."""

    code = "key_ended"


class TooManyKeys(Conflict):
    """This tenant has as many working keys as it may have; revoke one first."""

    code = "too_many_keys"


class TooLarge(Problem):
    """The body is larger than this server accepts."""

    status, code = 413, "too_large"


class UnsupportedMedia(Problem):
    """The Content-Type is not one that this route takes."""

    status, code = 415, "unsupported_media_type"


class RangeNotSatisfiable(Problem):
    """The range lies outside the file."""

    status, code = 416, "range_not_satisfiable"


class Unprocessable(Problem):
    """The request is well-formed but cannot be carried out."""

    status, code = 422, "unprocessable"


class DigestMismatch(Unprocessable):
    """What arrived is not what was sent."""

    code = "digest_mismatch"


class InvalidRows(Unprocessable):
    """Some rows of the file are not usable."""

    code = "invalid_rows"


class InvalidSpec(Unprocessable):
    """The job cannot succeed as it is specified."""

    code = "invalid_spec"


class UnreadableFile(Unprocessable):
    """The file cannot be read in the format it was sent as."""

    code = "unreadable_file"


class UnknownColumn(Unprocessable):
    """The file lacks a column that is needed."""

    code = "unknown_column"


class EmptyFile(Unprocessable):
    """The file has no rows."""

    code = "empty_file"


class TooManyLabels(Unprocessable):
    """The label column holds too many different values to be labels."""

    code = "too_many_labels"


class KeyReused(Unprocessable):
    """This Idempotency-Key was used with another body; use a new key for a new request."""

    code = "idempotency_key_reused"


class TooMany(Problem):
    """A limit of this API key is reached; try again after `Retry-After` seconds."""

    status, code = 429, "too_many"

    def __init__(self, detail: str | None = None, *, retry_after: int = 30) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after)})


class RateLimited(TooMany):
    """Too many requests in the last minute; try again after `Retry-After` seconds."""

    code = "rate_limited"


class TooManyUploads(TooMany):
    """Too many uploads at once; send this file when another has arrived."""

    code = "too_many_uploads"


class TooManyStreams(TooMany):
    """Too many event streams at once; close one, or poll."""

    code = "too_many_streams"


class TooManyJobs(TooMany):
    """Too many jobs have not ended; wait for one, or cancel one."""

    code = "too_many_jobs"


class StorageFull(TooMany):
    """The tenant's room is used up; delete datasets or checkpoints that are no longer needed."""

    code = "storage_full"


class Unavailable(Problem):
    """A part of the service is not reachable just now; try again shortly."""

    status, code = 503, "unavailable"

    def __init__(self, detail: str | None = None) -> None:
        super().__init__(detail, headers={"Retry-After": "2"})


class NoRoom(Unavailable):
    """The server's disk is full just now; try again later."""

    code = "no_room"


class StorageAway(Unavailable):
    """The storage of datasets and checkpoints does not answer as it should just now; try again shortly."""

    code = "storage_away"


class StorageRefuses(Unavailable):
    """The storage of datasets and checkpoints refuses this server; its operator has to look at the storage's rights."""

    code = "storage_refuses"


TITLES = {
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type", 416: "Range Not Satisfiable",
    422: "Unprocessable Content", 429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


def pointer(location: Iterable[str | int]) -> str:
    """A JSON pointer (RFC 6901) for pydantic's error location, e.g. `/method/weighted`.

    The first part (`body`, `query`) and the tags that discriminated unions insert are not part of the document.
    """
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in location]
    if parts and parts[0] == "body":
        parts = parts[1:]
    union = 2 if parts[:1] == ["arms"] else 0
    if len(parts) >= union + 2 and parts[union] in ("teacher", "method"):
        del parts[union + 1]
    return "".join(f"/{part}" for part in parts)


def field_faults(errors: Iterable[Any]) -> list[Fault]:
    """pydantic's errors as faults with pointers and sentences that say how to mend them."""
    faults: list[Fault] = []
    for error in errors:
        message, location = error["msg"].removeprefix("Value error, "), error["loc"]
        if error["type"] == "extra_forbidden":
            message = "unknown field; remove it or correct its spelling"
        elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = "must be a JSON object" + (" with a `kind`" if location[-1] in ("teacher", "method") else "")
        elif error["type"] == "union_tag_not_found":
            message = "has no `kind`, which says what the other fields mean"
        elif error["type"] == "union_tag_invalid":
            message = f"there is no kind {_short(error['ctx']['tag'])!r}; there are {error['ctx']['expected_tags']}"
        elif error["type"] == "missing":
            message = "required field is missing"
        elif error["type"] == "unknown_parameter":
            message = _unknown_parameter(location[-1], error["ctx"]["taken"])
        elif error["type"] in ("too_long", "too_short") and isinstance(error["input"], str):
            # pydantic counts "items" where a length stands after a validator.
            message = re.sub(r"item(s?)( after validation)?", r"character\1", message)
        elif error["type"] == "json_invalid":
            message, location = f"{error['ctx']['error']} at character {location[-1]}", ("body",)
        faults.append(
            {"line": None, "pointer": _short(pointer(location)), "code": error["type"], "message": _short(message)}
        )
    return faults


def _unknown_parameter(name: str, taken: list[str]) -> str:
    if not taken:
        return "unknown parameter; this route takes none in its query"
    nearest = difflib.get_close_matches(name, taken, 1)
    meant = f" Did you mean {nearest[0]}?" if nearest else ""
    return f"unknown parameter; this route takes {', '.join(taken)}.{meant}"


def _short(text: str) -> str:
    return text if len(text) <= MAX_ECHO_CHARACTERS else text[:MAX_ECHO_CHARACTERS] + "…"


def problem_response(request: Request, problem: Problem) -> JSONResponse:
    """The problem as `application/problem+json`."""
    body = {
        "type": "about:blank",
        "title": TITLES.get(problem.status, "Error"),
        "status": problem.status,
        "detail": problem.detail,
        "code": problem.code,
        "request_id": getattr(request.state, "request_id", None),
        "errors": problem.errors[:MAX_ERRORS],
        "total_errors": problem.total_errors,
        **problem.extra,
    }
    return JSONResponse(body, problem.status, problem.headers, media_type="application/problem+json")


def install(app: FastAPI) -> None:
    """Make every error of the application leave as problem+json."""

    @app.exception_handler(Problem)
    def _problem(request: Request, error: Problem) -> JSONResponse:
        return problem_response(request, error)

    @app.exception_handler(RequestValidationError)
    def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        if isinstance(error.body, bytes):  # FastAPI leaves a body that is not declared to be JSON as it came.
            return problem_response(
                request, UnsupportedMedia("Send the body as JSON, with Content-Type: application/json.")
            )
        found = error.errors()
        faults = field_faults(found[:MAX_ERRORS])  # a body may have a hundred thousand
        first = faults[0]
        where = (first["pointer"] or "").lstrip("/") or "body"
        unreadable = any(fault["code"] == "json_invalid" for fault in faults)
        kind = BadRequest if unreadable else Unprocessable
        problem = kind(f"{where}: {first['message']}", errors=faults, total_errors=len(found))
        problem.code = "invalid_json" if unreadable else "validation_error"
        return problem_response(request, problem)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, Problem):  # FastAPI answers 400 whatever the reading of the body raised.
            return problem_response(request, error.__cause__)
        problem = Problem(str(error.detail), headers=dict(error.headers or {}))
        if error.status_code == 404:
            problem.detail = "There is no such path; /docs lists those there are."
        if error.status_code == 405:
            problem.headers["Allow"] = ", ".join(sorted(_methods(request, problem.headers.get("Allow", ""))))
            problem.detail = f"This path takes {problem.headers['Allow']}."
        problem.status = error.status_code
        problem.code = TITLES.get(error.status_code, "error").lower().replace(" ", "_")
        return problem_response(request, problem)

    @app.exception_handler(OperationalError)
    @app.exception_handler(InterfaceError)
    @app.exception_handler(NoConnectionFree)
    def _database_away(request: Request, error: Exception) -> JSONResponse:
        log.error("database_unreachable", error=str(getattr(error, "orig", error)))
        return problem_response(request, Unavailable("The database is not reachable just now; try again shortly."))

    @app.exception_handler(OSError)
    def _disk_full(request: Request, error: OSError) -> JSONResponse:
        if error.errno not in FULL:
            raise error
        log.error("disk_full", error=str(error))
        return problem_response(request, NoRoom())


def _methods(request: Request, known: str) -> set[str]:
    """Every method of the path; the router tells those of one of its routes only."""
    path = getattr(request.scope.get("route"), "path", "")
    documented = request.app.openapi()["paths"].get(path, {})
    return {method.upper() for method in documented} | set(filter(None, known.split(", ")))


def unexpected_response(request: Request) -> JSONResponse:
    """The answer to a mistake of ours; what went wrong stands in the log and nowhere else."""
    problem = Problem("Something went wrong on our side; quote the request_id when you report it.")
    problem.status, problem.code = 500, "internal_error"
    return problem_response(request, problem)
