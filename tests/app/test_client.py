"""The client against a small server that misbehaves: lost connections, busy answers, damaged and hostile files."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from app import client as module
from app.client import ApiError, Client, DownloadDamaged, unpack
from app.embedded import free_port

BODY = bytes(range(256)) * 4000
Answer = Callable[[BaseHTTPRequestHandler, int], None]


class Server:
    """Answers every request with `answer(handler, number of the request)` and remembers what was asked."""

    def __init__(self) -> None:
        self.answer: Answer = lambda handler, number: reply(handler, 200, {})
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = read_body(self)
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.seen.append((self.command, self.path, headers, body))
                server.answer(self, len(server.seen))

            do_GET = do_HEAD = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=[0.02], daemon=True).start()


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    if handler.headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(handler.rfile.readline(), 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body
    return handler.rfile.read(int(handler.headers.get("content-length", 0)))


def reply(handler: BaseHTTPRequestHandler, status: int, body: Any, **headers: str) -> None:
    content = json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.close()


def serve_file(content: bytes, *, break_off: set[int] = frozenset(), lie: bool = False) -> Answer:  # type: ignore[assignment]
    """A file with Range; the requests in `break_off` lose their connection halfway through the body."""
    digest = hashlib.sha256(b"something else" if lie else content).digest()

    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        first = int(handler.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        part = content[first:]
        handler.send_response(206 if first else 200)
        handler.send_header("ETag", f'"{digest.hex()}"')
        handler.send_header("Repr-Digest", f"sha-256=:{base64.b64encode(digest).decode()}:")
        handler.send_header("Content-Length", str(len(part)))
        handler.end_headers()
        if handler.command == "GET":
            if number in break_off:
                handler.wfile.write(part[: len(part) // 2])
                handler.wfile.flush()
                hang_up(handler)
            else:
                handler.wfile.write(part)

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, "us_key", retries=3) as client:
        yield client


def test_a_download_that_breaks_off_goes_on_where_it_was(server: Server, client: Client, tmp_path: Path) -> None:
    server.answer = serve_file(BODY, break_off={2, 3})
    assert client.download("job_1", tmp_path / "model.tar").read_bytes() == BODY
    ranges = [headers.get("range") for method, _, headers, _ in server.seen if method == "GET"]
    assert ranges[0] is None
    assert 0 < int(ranges[1].removeprefix("bytes=")[:-1]) <= int(ranges[2].removeprefix("bytes=")[:-1]) < len(BODY)
    assert [path.name for path in tmp_path.iterdir()] == ["model.tar"]


def test_a_download_is_taken_up_again_by_another_client(server: Server, tmp_path: Path) -> None:
    server.answer = serve_file(BODY, break_off={2})
    with Client(server.url, "us_key", retries=0) as first, pytest.raises(httpx.TransportError):
        first.download("ckpt_1", tmp_path / "model.tar")
    done: list[int] = []
    with Client(server.url, "us_key", retries=0) as second:
        second.download("ckpt_1", tmp_path / "model.tar", lambda bytes_done, _total: done.append(bytes_done))
    assert (tmp_path / "model.tar").read_bytes() == BODY
    assert "range" in server.seen[-1][2]
    assert done[-1] == len(BODY)


def test_a_damaged_download_raises_and_leaves_nothing(server: Server, client: Client, tmp_path: Path) -> None:
    server.answer = serve_file(BODY, lie=True)
    with pytest.raises(DownloadDamaged, match="SHA-256"):
        client.download("job_1", tmp_path / "model.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_tar_that_reaches_out_of_its_directory_is_refused(tmp_path: Path) -> None:
    up, link = tarfile.TarInfo("../outside"), tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    for entry in (up, link):
        with tarfile.open(tmp_path / "evil.tar", "w") as archive:
            archive.addfile(entry, io.BytesIO())
        with pytest.raises(tarfile.TarError):
            unpack(tmp_path / "evil.tar", tmp_path / "inside")
    assert not (tmp_path / "outside").exists()
    assert not (tmp_path / "inside").exists()


def test_a_busy_server_is_asked_again_after_the_time_it_names(
    server: Server, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    busy = {1: (503, "7"), 2: (429, "3")}

    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number in busy:
            status, seconds = busy[number]
            reply(handler, status, {"code": "unavailable", "detail": "busy"}, Retry_After=seconds)
        else:
            reply(handler, 200, {"id": "job_1"})

    server.answer = answer
    assert client.job("job_1") == {"id": "job_1"}
    assert waited == [7.0, 3.0]


def test_a_server_that_stays_busy_is_given_up(server: Server, client: Client) -> None:
    server.answer = lambda handler, number: reply(handler, 503, {"code": "unavailable", "detail": "no"})
    with pytest.raises(ApiError) as caught:
        client.job("job_1")
    assert (caught.value.status, caught.value.code, len(server.seen)) == (503, "unavailable", 4)


def test_an_upload_whose_connection_is_lost_is_sent_again_whole_and_under_the_same_key(
    server: Server, client: Client, tmp_path: Path
) -> None:
    server.answer = lambda handler, number: hang_up(handler) if number == 1 else reply(handler, 201, {"id": "ds_1"})
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(BODY)
    assert client.upload(file, text_column="body", label_column=None) == {"id": "ds_1"}
    (_, path, first, _), (_, _, second, body) = server.seen
    assert body == BODY
    assert first["idempotency-key"] == second["idempotency-key"]
    assert (second["content-type"], second["content-encoding"]) == ("application/x-ndjson", "gzip")
    assert path == "/datasets?name=rows.jsonl.gz&text_column=body"


def test_a_move_whose_connection_is_lost_is_not_made_twice(server: Server, client: Client) -> None:
    server.answer = lambda handler, number: hang_up(handler)
    with pytest.raises(httpx.TransportError):
        client.retry("job_1")
    assert len(server.seen) == 1


def test_a_server_that_never_answered_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    with Client(f"http://127.0.0.1:{free_port()}", "us_key") as client, pytest.raises(httpx.ConnectError):
        client.job("job_1")
    assert waited == []


def test_a_refusal_carries_what_the_server_said(server: Server, client: Client) -> None:
    problem = {
        "detail": "2 of 3 rows are bad", "code": "invalid_rows", "request_id": "req_1", "total_errors": 2,
        "errors": [{"line": 1, "message": "no text"}, {"line": 3, "message": "no text"}],
    }  # fmt: skip
    server.answer = lambda handler, number: reply(handler, 422, problem)
    with pytest.raises(ApiError, match="2 of 3 rows") as caught:
        client.submit({})
    error = caught.value
    assert (error.status, error.code, error.request_id, error.total_errors) == (422, "invalid_rows", "req_1", 2)
    assert [fault["line"] for fault in error.errors] == [1, 3]


def test_every_page_of_a_list_is_read(server: Server, client: Client) -> None:
    pages = {
        1: {"data": [{"id": 3}, {"id": 2}], "has_more": True, "next": "2"},
        2: {"data": [{"id": 1}], "has_more": False, "next": None},
    }
    server.answer = lambda handler, number: reply(handler, 200, pages[number])
    assert [job["id"] for job in client.jobs(status="failed")] == [3, 2, 1]
    assert [path for _, path, _, _ in server.seen] == ["/jobs?status=failed", "/jobs?status=failed&after=2"]


def test_waiting_ends_with_the_job_and_shows_every_look(server: Server, client: Client) -> None:
    server.answer = lambda handler, number: reply(handler, 200, {"look": number, "is_terminal": number == 3})
    looks: list[int] = []
    assert client.wait("job_1", lambda job: looks.append(job["look"])) == {"look": 3, "is_terminal": True}
    assert looks == [1, 2, 3]
