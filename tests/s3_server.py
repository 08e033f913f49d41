"""An S3 server of the outside world: moto's, over real HTTP, and it fails on request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "understudy-tests"
CODES = {403: "AccessDenied", 500: "InternalError", 503: "ServiceUnavailable"}


class Bucket:
    """The bucket behind `port`, and what shall go wrong with it."""

    def __init__(self) -> None:
        self.port = 0
        self.fails: Callable[[str, str], int | None] = lambda method, path: None
        """The status to fail a request with, by its method and path; None where it is served."""
        self.failed = 0
        self._serve = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        status = self.fails(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if status is None:
            return self._serve(environ, start_response)
        self.failed += 1
        body = f"<Error><Code>{CODES[status]}</Code><Message>trouble</Message></Error>".encode()
        if environ["REQUEST_METHOD"] == "HEAD":
            body = b""
        start_response(f"{status} Trouble", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket behind a port of this machine."""
    bucket = Bucket()
    server = make_server("127.0.0.1", 0, bucket, threaded=True, request_handler=MotoRequestHandler)
    bucket.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
