"""create_app(): the routers, the error handler, request ids, and nothing that computes."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter, Histogram
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import audit, errors, records
from app.api import checkpoints, comparisons, datasets, health, jobs, keys, transfers, webhooks
from app.api.deps import current_key, only_known_parameters, problems, scope_needed
from app.config import settings
from app.models import new_id

ROUTERS = [
    datasets.router,
    transfers.router,
    jobs.router,
    checkpoints.router,
    comparisons.router,
    webhooks.router,
    keys.router,
]
"""Whose routes take a key."""
WEB = Path(__file__).parent / "web"
MAX_BODY_BYTES = 8 * 1024 * 1024
"""Of a request that uploads no file."""
UPLOADS = re.compile(r"/datasets|/uploads/[^/]*/parts")
"""Paths whose POST takes a file, or a part of one, and limits it itself."""
REQUEST_ID = re.compile(r"[A-Za-z0-9_\-]{1,64}")
METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""Those that are counted by name. A stranger may send any word, and each would be figures of its own, kept for ever."""
LOGGED_CHARACTERS = 500
"""Of a path, in the log."""

NOTHING = "default-src 'none'; frame-ancestors 'none'"
"""What an answer of the API may load or run in a browser."""
DASHBOARD = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SWAGGER_FROM = "https://cdn.jsdelivr.net"
WITHOUT_SWAGGER = (
    f"<p>This page is drawn by Swagger UI, which your browser loads from {SWAGGER_FROM}. Where that cannot be reached, read "
    '<a href="/openapi.json">the OpenAPI document</a>, or docs/api.md of the project.</p>'
)
"""What is seen until Swagger takes its place, and where it cannot be loaded."""
SECURE_SECONDS = 365 * 24 * 3600
"""How long a browser that came by https is told to come by nothing else."""

REQUESTS = Counter("understudy_http_requests", "Requests answered.", ["method", "route", "status"])
SECONDS = Histogram("understudy_http_seconds", "Seconds until the answer began.", ["method", "route"])

log = structlog.get_logger()


class RequestContext:
    """Gives every request an id (the caller's own if it is well-formed), security headers, a log line and figures."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if REQUEST_ID.fullmatch(sent) else new_id("req")
        method = scope["method"] if scope["method"] in METHODS else "other"
        path = scope["path"][:LOGGED_CHARACTERS]
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.perf_counter()
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
                headers.setdefault("x-frame-options", "DENY")
                headers.setdefault("referrer-policy", "no-referrer")
                headers.setdefault("cross-origin-opener-policy", "same-origin")
                headers.setdefault("content-security-policy", NOTHING)
                if not scope["path"].startswith("/web/"):
                    headers.setdefault("cache-control", "no-store")
                if scope["scheme"] == "https":
                    headers.setdefault("strict-transport-security", f"max-age={SECURE_SECONDS}")
                await _note(scope, headers, message["status"])
                route = getattr(scope.get("route"), "path", "other")
                elapsed = time.perf_counter() - began
                REQUESTS.labels(method, route, message["status"]).inc()
                SECONDS.labels(method, route).observe(elapsed)
                log.info(
                    "request", method=method, path=path, status=message["status"],
                    milliseconds=round(elapsed * 1000, 1), key_id=scope["state"].get("key_id"),
                )  # fmt: skip
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_headers)
            except Exception:
                log.exception("unexpected_error", path=path)
                if started:
                    raise
                await errors.unexpected_response(Request(scope))(scope, receive, send_with_headers)


async def _note(scope: Scope, headers: MutableHeaders, status: int) -> None:
    """Write the request into the audit log, where it belongs there."""
    route, method, state = scope.get("route"), scope["method"], scope["state"]
    action = state.get("action", getattr(route, "name", None))
    if not audit.is_recorded(method, scope_needed(method, route), action, status):
        return
    made = headers.get("location", "").rpartition("/")[2]
    ids = list(scope.get("path_params", {}).values())
    object_id = state.get("object_id") or made or (str(ids[-1]) if ids else None)
    address = (scope.get("client") or [None])[0]  # behind a trusted proxy, whatever X-Forwarded-For says
    await run_in_threadpool(
        audit.record, action=action, outcome=audit.outcome_of(status), status=status, tenant=state.get("tenant"),
        key_id=state.get("key_id"), request_id=state["request_id"],
        object_id=object_id and "".join(filter(str.isprintable, object_id))[:100], address=address and address[:64],
    )  # fmt: skip


class BodyLimit:
    """Refuses a body over MAX_BODY_BYTES, before it is parsed; only uploaded files may be larger, and count themselves."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > MAX_BODY_BYTES:
                raise errors.TooLarge(f"The body is larger than {MAX_BODY_BYTES:,} bytes, the most this route accepts.")
            return message

        uploads = scope["type"] == "http" and scope["method"] == "POST" and UPLOADS.fullmatch(scope["path"])
        await self.app(scope, receive if uploads else counted, send)


class Understudy(FastAPI):
    """FastAPI, with an OpenAPI document that tells what errors are: always problem+json."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            _tell_problems(super().openapi())
        return super().openapi()


def _tell_problems(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = {"$ref": "#/components/schemas/ProblemRead"}
    taken_over = (problem["$ref"], "#/components/schemas/HTTPValidationError")
    told = problems(errors.Unprocessable)[422]["description"]
    for operations in document["paths"].values():
        for method, operation in operations.items():
            # Every route may be asked with a parameter that it does not know.
            refusal = {"description": told, "content": {"application/json": {"schema": problem}}}
            operation["responses"].setdefault("422", refusal)
            if "security" in operation:
                _tell_what_a_key_meets(method, operation)
            for response in operation["responses"].values():
                schema = response.get("content", {}).get("application/json", {}).get("schema", {})
                if schema.get("$ref") in taken_over:
                    response["content"] = {"application/problem+json": {"schema": problem}}


def _tell_what_a_key_meets(method: str, operation: dict[str, Any]) -> None:
    """Every route that takes a key may answer 401, 403, 429 and 503, and needs some scope."""
    operation.setdefault("x-scope", scope_needed(method.upper(), None))
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/ProblemRead"}}}
    for status, told in problems(errors.Unauthorized, errors.Forbidden, errors.TooMany, errors.Unavailable).items():
        response: dict[str, Any] = {"description": told["description"], "content": schema}
        if status in (errors.TooMany.status, errors.Unavailable.status):
            response["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
        operation["responses"].setdefault(str(status), response)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """What the server does before its first request."""
    await run_in_threadpool(records.warm_up)
    yield


def create_app() -> FastAPI:
    """The ASGI application."""
    app = Understudy(
        title="Understudy",
        summary="Knowledge distillation as a service: unlabeled text in, a small RoBERTa classifier out.",
        version="0.1.0",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(current_key), Depends(only_known_parameters)])
    app.include_router(health.router, dependencies=[Depends(only_known_parameters)])
    errors.install(app)
    app.mount("/web", StaticFiles(directory=WEB), name="web")

    @app.get("/", include_in_schema=False)
    def dashboard() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"Content-Security-Policy": DASHBOARD})

    swagger = get_swagger_ui_html(openapi_url="/openapi.json", title="Understudy", swagger_favicon_url="data:,")
    container = '<div id="swagger-ui">'
    page = bytes(swagger.body).decode().replace(container, container + WITHOUT_SWAGGER)
    policy = _policy_of(page)

    @app.get("/docs", include_in_schema=False)
    def documentation() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    if origins := settings().cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["*"]
        )
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestContext)
    return app


def _policy_of(page: str) -> str:
    """What Swagger's page may do: load itself from its home, run the one script it holds, and ask this server."""
    scripts = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    ]
    allowed = " ".join([SWAGGER_FROM, *(f"'sha256-{script}'" for script in scripts)])
    return (
        f"default-src 'none'; script-src {allowed}; style-src {SWAGGER_FROM} 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
