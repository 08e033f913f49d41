"""Datasets over HTTP: what is accepted, what is refused and how, and that an upload leaves the server's memory alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from app.db import session_scope
from app.models import Job
from app.storage import Storage
from tests.support import add_dataset, new_key, sentences, submit, tiny_spec, wait_until

ROWS = [{"text": "goal", "label": "sports"}, {"text": "soup", "label": "cooking"}, {"text": "goal", "label": "Sports"}]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
NDJSON = {"Content-Type": "application/x-ndjson"}


def stored_files(storage: Storage) -> set[str]:
    return {str(path) for path in storage.filesystem.find(f"{storage.root}/datasets")}


def parquet_bytes(tmp_path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    return (tmp_path / "rows.parquet").read_bytes()


def test_a_raw_upload_is_described_in_full(client: TestClient) -> None:
    answer = client.post("/datasets", params={"name": "mine"}, content=JSONL, headers=NDJSON)
    body = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/datasets/{body['id']}"
    assert (body["name"], body["rows"], body["bytes"], body["duplicates"]) == ("mine", 3, len(JSONL), 1)
    assert body["sha256"] == hashlib.sha256(JSONL).hexdigest()
    assert body["columns"] == ["text", "label"]
    assert body["label_counts"] == {"sports": 1, "cooking": 1, "Sports": 1}
    assert {warning["code"] for warning in body["warnings"]} >= {"similar_labels", "duplicate_texts"}
    assert client.get(f"/datasets/{body['id']}").json() == body


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("multipart", [False, True])
@pytest.mark.parametrize("format", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_arrives_as_the_same_rows(
    client: TestClient, tmp_path: Path, format: str, multipart: bool, packed: bool
) -> None:
    content, kind = {
        "jsonl": (JSONL, "application/x-ndjson"),
        "csv": (b"text,label\ngoal,sports\nsoup,cooking\ngoal,Sports\n", "text/csv"),
        "tsv": (b"text\tlabel\ngoal\tsports\nsoup\tcooking\ngoal\tSports\n", "text/tab-separated-values"),
        "parquet": (parquet_bytes(tmp_path), "application/vnd.apache.parquet"),
    }[format]
    if packed:
        content = gzip.compress(content)
    if multipart:
        name = f"rows.{format}" + ".gz" * packed
        answer = client.post("/datasets", files={"file": (name, content, "application/octet-stream")})
        assert answer.json()["name"] == name
    else:
        headers = {"Content-Type": kind} | ({"Content-Encoding": "gzip"} if packed else {})
        answer = client.post("/datasets", content=content, headers=headers)
    assert answer.status_code == 201, answer.text
    assert answer.json()["bytes"] == len(content)
    rows = client.get(f"/datasets/{answer.json()['id']}/rows").json()["data"]
    assert [{"text": row["text"], "label": row["label"]} for row in rows] == ROWS


def test_every_bad_row_is_named_with_its_line(client: TestClient, storage: Storage) -> None:
    before = stored_files(storage)
    content = b'{"text": "fine"}\n{"text": ""}\nnot json\n{"text": 5}\n'
    answer = client.post("/datasets", content=content, headers=NDJSON)
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["code"], body["total_errors"]) == ("invalid_rows", 3)
    assert [(fault["line"], fault["pointer"], fault["code"]) for fault in body["errors"]] == [
        (2, "/text", "empty_text"), (3, None, "invalid_json"), (4, "/text", "not_a_string"),
    ]  # fmt: skip
    assert stored_files(storage) == before
    skipped = client.post("/datasets", params={"on_error": "skip"}, content=content, headers=NDJSON).json()
    assert (skipped["rows"], skipped["skipped"]) == (1, 3)


@pytest.mark.parametrize(
    ("request_parts", "status", "code"),
    [
        ({"content": b"", "headers": NDJSON}, 422, "empty_file"),
        ({"content": JSONL, "headers": {"Content-Type": "application/pdf"}}, 415, "unsupported_media_type"),
        ({"content": JSONL, "headers": {**NDJSON, "Content-Encoding": "br"}}, 415, "unsupported_media_type"),
        ({"files": {"data": ("a.jsonl", JSONL)}}, 422, "unprocessable"),
        ({"files": [("file", ("a.jsonl", JSONL)), ("file", ("b.jsonl", JSONL))]}, 422, "unprocessable"),
        ({"files": {"file": ("a.jsonl", b"")}}, 422, "empty_file"),
        ({"files": {"file": ("a.docx", JSONL)}}, 415, "unsupported_media_type"),
        ({"content": JSONL, "headers": {"Content-Type": "multipart/form-data"}}, 400, "bad_request"),
        ({"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, 400, "bad_request"),
        ({"content": JSONL, "headers": NDJSON, "params": {"text_column": "body"}}, 422, "unknown_column"),
        ({"content": JSONL, "headers": NDJSON, "params": {"on_error": "ignore"}}, 422, "validation_error"),
        ({"content": JSONL, "headers": NDJSON, "params": {"name": "a\x00b"}}, 422, "validation_error"),
    ],
)
def test_what_cannot_be_taken_is_refused_in_words(
    client: TestClient, request_parts: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/datasets", **request_parts)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert client.get("/datasets").json()["data"] == []


def test_an_unknown_format_is_told_what_is_accepted(client: TestClient) -> None:
    detail = client.post("/datasets", content=JSONL, headers={"Content-Type": "application/pdf"}).json()["detail"]
    for accepted in ("application/x-ndjson", "text/csv", "text/tab-separated-values", "application/vnd.apache.parquet"):
        assert accepted in detail


def test_an_upload_over_the_limit_is_cut_off_while_it_streams(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.config import settings

    def chunks() -> Iterator[bytes]:
        """Sent without a Content-Length."""
        for _ in range(100):
            yield JSONL * 100

    monkeypatch.setattr(settings(), "max_upload_bytes", 200_000)
    assert client.post("/datasets", content=JSONL * 10_000, headers=NDJSON).status_code == 413
    answer = client.post("/datasets", content=chunks(), headers=NDJSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")

    def form() -> Iterator[bytes]:
        """A small file, and bytes without end behind the form."""
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        yield head + JSONL + b"\r\n--x--\r\n"
        for _ in range(100):
            yield b"x" * 10_000

    answer = client.post("/datasets", content=form(), headers={"Content-Type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


def test_another_tenant_sees_nothing(client: TestClient, other_client: TestClient) -> None:
    dataset_id = client.post("/datasets", content=JSONL, headers=NDJSON).json()["id"]
    assert other_client.get("/datasets").json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/rows"), ("DELETE", "")):
        assert other_client.request(method, f"/datasets/{dataset_id}{path}").status_code == 404
    assert client.get(f"/datasets/{dataset_id}").status_code == 200


def test_an_upload_without_a_key_is_refused_before_it_is_read(client: TestClient) -> None:
    answer = client.post("/datasets", content=JSONL, headers={**NDJSON, "Authorization": "Bearer us_wrong"})
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


def test_lists_come_newest_first_in_pages(client: TestClient) -> None:
    ids = [client.post("/datasets", content=JSONL, headers=NDJSON).json()["id"] for _ in range(3)]
    first = client.get("/datasets", params={"limit": 2}).json()
    second = client.get("/datasets", params={"limit": 2, "after": first["next"]}).json()
    assert [row["id"] for row in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)


def test_rows_come_in_pages_with_their_lines(client: TestClient) -> None:
    content = b'{"text": "a"}\n\n{"text": "b", "distribution": {"x": 0.25, "y": 0.75}}\n{"text": "c"}\n'
    path = f"/datasets/{client.post('/datasets', content=content, headers=NDJSON).json()['id']}/rows"
    first = client.get(path, params={"limit": 2}).json()
    assert [(row["row"], row["line"], row["text"]) for row in first["data"]] == [(0, 1, "a"), (1, 3, "b")]
    assert first["data"][1]["distribution"] == {"x": 0.25, "y": 0.75}
    assert (first["has_more"], first["next"]) == (True, 1)
    second = client.get(path, params={"limit": 2, "after": 1}).json()
    assert [row["text"] for row in second["data"]] == ["c"]
    assert (second["has_more"], second["next"]) == (False, None)
    assert client.get(path, params={"after": 2**62}).json()["data"] == []


def test_the_same_idempotency_key_stores_one_dataset(client: TestClient, storage: Storage) -> None:
    headers = {**NDJSON, "Idempotency-Key": "once"}
    first = client.post("/datasets", content=JSONL, headers=headers)
    files = stored_files(storage)
    again = client.post("/datasets", content=JSONL, headers=headers)
    other = client.post("/datasets", content=JSONL + JSONL, headers=headers)
    assert (first.status_code, again.status_code, other.status_code) == (201, 201, 422)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert other.json()["code"] == "idempotency_key_reused"
    assert stored_files(storage) == files
    assert len(client.get("/datasets").json()["data"]) == 1


def test_a_deleted_dataset_is_gone_with_its_file(client: TestClient, storage: Storage) -> None:
    before = stored_files(storage)
    dataset_id = client.post("/datasets", content=JSONL, headers=NDJSON).json()["id"]
    assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert client.get(f"/datasets/{dataset_id}").status_code == 404
    assert client.delete(f"/datasets/{dataset_id}").status_code == 404
    assert stored_files(storage) == before


def test_rows_of_a_dataset_that_is_deleted_while_they_are_read_are_not_found(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_id = client.post("/datasets", content=JSONL, headers=NDJSON).json()["id"]
    open_file = Storage.open

    def open_too_late(self: Storage, key: str) -> Any:
        assert client.delete(f"/datasets/{dataset_id}").status_code == 204
        return open_file(self, key)

    monkeypatch.setattr(Storage, "open", open_too_late)
    answer = client.get(f"/datasets/{dataset_id}/rows")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_dataset_is_deleted_only_when_its_jobs_have_ended(client: TestClient, storage: Storage) -> None:
    before = stored_files(storage)
    dataset_id = add_dataset(sentences(20, 0))
    job_id = submit(tiny_spec(dataset_id))
    refused = client.delete(f"/datasets/{dataset_id}")
    assert (refused.status_code, refused.json()["code"]) == (409, "dataset_in_use")
    with session_scope() as session:
        session.get_one(Job, job_id).status = "cancelled"
    assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert client.get(f"/datasets/{dataset_id}").status_code == 404
    assert client.get("/datasets").json()["data"] == []
    assert client.get(f"/jobs/{job_id}").status_code == 200
    assert stored_files(storage) == before
    again = client.post(f"/jobs/{job_id}/retry")
    assert (again.status_code, again.json()["code"]) == (409, "illegal_move")
    assert "has been deleted" in again.json()["detail"]


@pytest.fixture
def server(database: object) -> Iterator[tuple[str, psutil.Process]]:
    """The API in a process of its own: its URL, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    process = subprocess.Popen([*command, "--log-level", "warning"], env=os.environ, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def is_up() -> bool:
        try:
            return httpx.get(f"{url}/healthz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_up, 60, "the server did not start")
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


UPLOAD_MEGABYTES = int(os.environ.get("UNDERSTUDY_TEST_UPLOAD_MB", "200"))


def test_a_large_upload_leaves_the_servers_memory_alone(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    text = " ".join(str(number) for number in range(600))
    lines = 1024 * 1024 // (len(text) + 40)
    peak = before = process.memory_info().rss

    def rows() -> Iterator[bytes]:
        for megabyte in range(UPLOAD_MEGABYTES):
            yield "".join(
                f'{{"text": "{megabyte} {line} {text}", "label": "{line % 7}"}}\n' for line in range(lines)
            ).encode()
            watch()

    def watch() -> None:
        nonlocal peak
        peak = max(peak, process.memory_info().rss)

    def upload() -> None:
        headers = {**NDJSON, "Authorization": f"Bearer {new_key('alice')}"}
        answers.append(httpx.post(f"{url}/datasets", content=rows(), headers=headers, timeout=600))

    answers: list[httpx.Response] = []
    thread = threading.Thread(target=upload)
    thread.start()
    while thread.is_alive():
        watch()
        thread.join(0.02)
    assert answers[0].status_code == 201, answers[0].text
    assert answers[0].json()["rows"] == UPLOAD_MEGABYTES * lines
    print(f"{UPLOAD_MEGABYTES} MB grew the server by {(peak - before) / 2**20:.0f} MB")
    assert peak - before < 64 * 1024 * 1024
