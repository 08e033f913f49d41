"""Uploads in parts over HTTP: any order, sent again, cut off, damaged, cancelled; and what is left in the storage."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from app.config import settings
from app.db import try_lock
from app.storage import Storage
from tests.support import in_threads, stored

ROWS = "".join(
    json.dumps({"text": f"row {number}", "label": "ab"[number % 2]}) + "\n" for number in range(400)
).encode()
PIECES = [ROWS[start : start + 3000] for start in range(0, len(ROWS), 3000)]
SHA256 = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture(autouse=True)
def _no_parts_of_other_tests(storage: Storage) -> None:
    storage.delete_all("uploads")


def begin(client: TestClient, **changes: Any) -> str:
    answer = client.post("/uploads", json={"name": "rows.jsonl", "bytes": len(ROWS), **changes})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/uploads/{answer.json()['id']}"
    return str(answer.json()["id"])


def send(client: TestClient, upload: str, number: int, content: bytes, **headers: str) -> Response:
    headers = {"Content-Type": "application/octet-stream", **headers}
    return client.post(f"/uploads/{upload}/parts", params={"number": number}, content=content, headers=headers)


def send_all(client: TestClient, upload: str) -> None:
    for number, piece in enumerate(PIECES, 1):
        assert send(client, upload, number, piece).status_code == 201


def complete(client: TestClient, upload: str, **body: Any) -> Response:
    return client.post(f"/uploads/{upload}/complete", json=body)


def part_files(storage: Storage) -> list[str]:
    return storage.filesystem.find(f"{storage.root}/uploads")


def test_parts_in_any_order_become_the_dataset_that_one_upload_would_have_been(
    client: TestClient, storage: Storage
) -> None:
    whole = client.post("/datasets?name=rows.jsonl", content=ROWS, headers={"Content-Type": "application/x-ndjson"})
    upload = begin(client, sha256=SHA256)
    numbered = list(enumerate(PIECES, 1))
    random.Random(1).shuffle(numbered)
    for number, piece in numbered:
        part = send(client, upload, number, piece).json()
        assert (part["number"], part["bytes"]) == (number, len(piece))
        assert part["sha256"] == hashlib.sha256(piece).hexdigest()
    answer = complete(client, upload)
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == f"/datasets/{answer.json()['id']}"
    differ = ("id", "created_at")
    assert {k: v for k, v in answer.json().items() if k not in differ} == {
        k: v for k, v in whole.json().items() if k not in differ
    }
    assert client.get(f"/uploads/{upload}").json()["dataset_id"] == answer.json()["id"]
    assert part_files(storage) == []


def test_after_a_cut_the_upload_tells_which_parts_it_has(client: TestClient) -> None:
    upload = begin(client)
    for number in (1, 3):
        send(client, upload, number, PIECES[number - 1])
    read = client.get(f"/uploads/{upload}").json()
    assert [(part["number"], part["bytes"]) for part in read["parts"]] == [(1, 3000), (3, 3000)]
    assert read["status"] == "pending"
    refused = complete(client, upload)
    assert (refused.status_code, refused.json()["code"]) == (422, "unprocessable")
    assert refused.json()["detail"].startswith("Part 2 has not come; send what is missing")


def test_a_part_sent_again_does_no_harm_and_with_other_bytes_replaces_the_first(
    client: TestClient, storage: Storage
) -> None:
    upload = begin(client, sha256=SHA256)
    first = send(client, upload, 1, b"x" * 3000).json()
    again = send(client, upload, 1, b"x" * 3000).json()
    assert again == first
    assert len(part_files(storage)) == 1
    send_all(client, upload)
    assert len(part_files(storage)) == len(PIECES)
    assert complete(client, upload).status_code == 201


def test_the_same_part_from_many_senders_at_once_is_kept_once(client: TestClient, storage: Storage) -> None:
    upload = begin(client, bytes=3000)
    answers = in_threads(6, lambda number: send(client, upload, 1, bytes([65 + number % 2]) * 3000))
    assert {answer.status_code for answer in answers} == {201}
    kept = client.get(f"/uploads/{upload}").json()["parts"]
    files = part_files(storage)
    assert len(kept) == len(files) == 1
    with storage.open(f"uploads/{upload}/{kept[0]['id']}") as stream:
        assert hashlib.sha256(stream.read()).hexdigest() == kept[0]["sha256"]


def test_completing_twice_answers_with_one_dataset(client: TestClient) -> None:
    upload = begin(client)
    send_all(client, upload)
    answers = in_threads(3, lambda number: complete(client, upload))
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert len(made) == 1
    assert {answer.json()["code"] for answer in answers if answer.status_code != 201} <= {"request_in_flight"}
    assert complete(client, upload).json()["id"] in made
    assert stored()["datasets"] == 1


def test_while_one_completes_another_is_asked_to_wait(client: TestClient) -> None:
    upload = begin(client)
    send_all(client, upload)
    with try_lock(f"upload {upload}") as held:
        assert held
        answer = complete(client, upload)
    assert (answer.status_code, answer.json()["code"]) == (409, "request_in_flight")
    assert complete(client, upload).status_code == 201


def test_a_wrong_digest_is_told_and_the_damaged_part_can_be_sent_again(client: TestClient) -> None:
    upload = begin(client)
    send_all(client, upload)
    damaged = bytearray(PIECES[2])
    damaged[10] ^= 1
    send(client, upload, 3, bytes(damaged))
    answer = complete(client, upload, sha256=SHA256)
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    send(client, upload, 3, PIECES[2])
    assert complete(client, upload, sha256=SHA256).status_code == 201


def test_a_part_that_is_not_what_its_digest_says_is_refused(client: TestClient, storage: Storage) -> None:
    upload = begin(client)
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(PIECES[0]).digest()).decode()}:"
    answer = send(client, upload, 1, PIECES[1], **{"Content-Digest": digest})
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert part_files(storage) == []
    assert send(client, upload, 1, PIECES[0], **{"Content-Digest": digest}).status_code == 201
    for header in ("sha-256=:bm8=:", "md5=:abc:", "sha-256=::", "garbage"):
        assert send(client, upload, 2, PIECES[1], **{"Content-Digest": header}).status_code == 400


def test_parts_may_be_named_in_an_order_of_their_own(client: TestClient) -> None:
    upload = begin(client, bytes=6000)
    ids = [send(client, upload, number, PIECES[2 - number]).json()["id"] for number in (1, 2)]
    for wrong in ([ids[0], "part_x"], [ids[0], ids[0]], ids[:1]):
        assert complete(client, upload, part_ids=wrong).status_code == 422
    answer = complete(client, upload, part_ids=ids[::-1], sha256=hashlib.sha256(ROWS[:6000]).hexdigest())
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_rows"), "cut in the middle of a line"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "rows.jsonl"}, 422, "validation_error"),
        ({"name": "rows.jsonl", "bytes": 0}, 422, "validation_error"),
        ({"name": "rows.jsonl", "bytes": 10**15}, 413, "too_large"),
        ({"name": "rows.docx", "bytes": 10}, 415, "unsupported_media_type"),
        ({"name": "rows.jsonl", "bytes": 10, "sha256": "abc"}, 422, "validation_error"),
        ({"name": "rows.jsonl", "bytes": 10, "purpose": "x"}, 422, "validation_error"),
        ({"name": "a\x00b.jsonl", "bytes": 10}, 422, "validation_error"),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_a_byte_is_sent(
    client: TestClient, body: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post("/uploads", json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert stored()["uploads"] == 0


def test_no_more_bytes_are_kept_than_announced_and_no_part_is_larger_than_allowed(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = begin(client, bytes=5000)
    assert send(client, upload, 1, PIECES[0]).status_code == 201
    over = send(client, upload, 2, PIECES[1])
    assert (over.status_code, over.json()["code"]) == (413, "too_large")
    monkeypatch.setattr(settings(), "max_part_bytes", 1000)
    large = send(client, upload, 2, PIECES[1][:1001])
    assert (large.status_code, large.json()["code"]) == (413, "too_large")
    for number in (0, 10_001):
        assert send(client, upload, number, b"x").status_code == 422
    assert send(client, upload, 2, b"").json()["code"] == "empty_file"
    assert len(part_files(storage)) == 1


def test_a_cancelled_upload_leaves_no_part_and_takes_none(client: TestClient, storage: Storage) -> None:
    upload = begin(client)
    send(client, upload, 1, PIECES[0])
    answer = client.post(f"/uploads/{upload}/cancel")
    assert (answer.status_code, answer.json()["status"], answer.json()["parts"]) == (200, "cancelled", [])
    assert part_files(storage) == []
    assert client.post(f"/uploads/{upload}/cancel").status_code == 200
    for refused in (send(client, upload, 2, PIECES[1]), complete(client, upload)):
        assert (refused.status_code, refused.json()["code"]) == (409, "illegal_move")


def test_a_complete_upload_cannot_be_cancelled(client: TestClient) -> None:
    upload = begin(client)
    send_all(client, upload)
    complete(client, upload)
    assert client.post(f"/uploads/{upload}/cancel").json()["code"] == "illegal_move"


def test_bad_rows_are_named_and_the_options_are_those_of_one_upload(client: TestClient) -> None:
    content = b"body,label\nfine,a\n,b\n"
    upload = begin(client, name="x.csv", bytes=len(content), text_column="body")
    send(client, upload, 1, content)
    answer = complete(client, upload)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_rows")
    assert [fault["line"] for fault in answer.json()["errors"]] == [3]
    lenient = begin(client, name="rows", mime_type="text/csv", bytes=len(content), text_column="body", on_error="skip")
    send(client, lenient, 1, content)
    assert (complete(client, lenient).json()["rows"], complete(client, lenient).json()["skipped"]) == (1, 1)


def test_another_tenant_s_upload_is_not_there(client: TestClient, other_client: TestClient) -> None:
    upload = begin(client)
    answers = [
        other_client.get(f"/uploads/{upload}"),
        send(other_client, upload, 1, PIECES[0]),
        complete(other_client, upload),
        other_client.post(f"/uploads/{upload}/cancel"),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert client.get(f"/uploads/{upload}").json()["parts"] == []
