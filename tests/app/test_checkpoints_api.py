"""Checkpoints over HTTP: the tar with its ranges, validators and digest."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from app.api.checkpoints import CHUNK_BYTES, requested_part
from app.db import session_scope
from app.errors import RangeNotSatisfiable
from app.models import Checkpoint, Job, new_id
from app.storage import storage
from tests.support import add_dataset, sentences, submit, tiny_spec

CONTENT = bytes(number * 7 % 251 for number in range(2 * CHUNK_BYTES + 1000))
SIZE = len(CONTENT)


@pytest.fixture
def path(client: TestClient, tmp_path: Path) -> str:
    """Where the checkpoint of a job is downloaded."""
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    file = tmp_path / "checkpoint.tar"
    file.write_bytes(CONTENT)
    checkpoint = Checkpoint(
        id=new_id("ckpt"), tenant="alice", job_id=job_id, step=12, epoch=2.0, metrics={"test_accuracy": 0.75},
        bytes=SIZE, sha256=hashlib.sha256(CONTENT).hexdigest(), files=[{"name": "x", "bytes": 1, "sha256": "0" * 64}],
    )  # fmt: skip
    storage().put(checkpoint.key, file)
    with session_scope() as session:
        session.add(checkpoint)
        session.get_one(Job, job_id).best_checkpoint_id = checkpoint.id
    return f"/checkpoints/{checkpoint.id}/download"


def test_a_download_is_whole_and_can_be_verified(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.content == CONTENT
    headers = answer.headers
    assert headers["content-type"] == "application/x-tar"
    assert int(headers["content-length"]) == SIZE
    assert headers["etag"] == f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    assert headers["accept-ranges"] == "bytes"
    assert headers["content-disposition"] == f'attachment; filename="{path.split("/")[2]}.tar"'
    digest = headers["repr-digest"].removeprefix("sha-256=:").removesuffix(":")
    assert base64.b64decode(digest) == hashlib.sha256(answer.content).digest()


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-", 100, SIZE - 1),
        ("bytes=-100", SIZE - 100, SIZE - 1),
        (f"bytes=-{SIZE + 5}", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        (f"bytes=10-{SIZE + 1000}", 10, SIZE - 1),
        (f"bytes={CHUNK_BYTES - 1}-{CHUNK_BYTES}", CHUNK_BYTES - 1, CHUNK_BYTES),
        (f"bytes=5-{'9' * 40}", 5, SIZE - 1),
    ],
)
def test_a_part_is_exactly_what_was_asked_for(client: TestClient, path: str, asked: str, first: int, last: int) -> None:
    answer = client.get(path, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == CONTENT[first : last + 1]
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{SIZE}"
    assert int(answer.headers["content-length"]) == last - first + 1
    assert base64.b64encode(hashlib.sha256(CONTENT).digest()).decode() in answer.headers["repr-digest"]


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE + 7}-{SIZE + 9}", "bytes=-0"])
def test_a_part_outside_the_file_is_not_satisfiable(client: TestClient, path: str, asked: str) -> None:
    answer = client.get(path, headers={"Range": asked})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-9", "lines=0-1", "bytes=", "bytes=-", "bytes=9-5", "0-5", f"bytes=0-{'9' * 5000}"]
)
def test_a_range_that_is_not_one_part_in_bytes_is_ignored(client: TestClient, path: str, asked: str) -> None:
    answer = client.get(path, headers={"Range": asked})
    assert (answer.status_code, len(answer.content)) == (200, SIZE)


def test_a_download_can_be_resumed_while_the_file_is_the_same(client: TestClient, path: str) -> None:
    etag = client.head(path).headers["etag"]
    same = client.get(path, headers={"Range": "bytes=1000-", "If-Range": etag})
    assert (same.status_code, CONTENT[:1000] + same.content) == (206, CONTENT)
    for validator in ('"another"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        other = client.get(path, headers={"Range": "bytes=1000-", "If-Range": validator})
        assert (other.status_code, other.content) == (200, CONTENT)


def test_what_is_known_already_is_not_sent_again(client: TestClient, path: str) -> None:
    etag = client.head(path).headers["etag"]
    for validator in (etag, f'"x", {etag}', f"W/{etag}", "*"):
        answer = client.get(path, headers={"If-None-Match": validator})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert client.get(path, headers={"If-None-Match": '"another"'}).status_code == 200


def test_head_tells_what_get_would_send(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    differ = {"x-request-id", "date"}
    assert {n: v for n, v in head.headers.items() if n not in differ} == {
        n: v for n, v in get.headers.items() if n not in differ
    }
    assert client.head(path, headers={"Range": "bytes=0-9"}).status_code == 200


def test_the_best_checkpoint_of_a_job_is_the_same_file(client: TestClient, path: str) -> None:
    checkpoint = client.get(path.removesuffix("/download")).json()
    best = f"/jobs/{checkpoint['job_id']}/checkpoint"
    assert client.get(best).content == CONTENT
    assert client.get(best, headers={"Range": "bytes=5-9"}).content == CONTENT[5:10]
    assert client.head(best).headers["etag"] == client.head(path).headers["etag"]


def test_a_checkpoint_tells_its_scores_and_files(client: TestClient, path: str) -> None:
    checkpoint = client.get(path.removesuffix("/download")).json()
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["bytes"]) == (12, 2.0, SIZE)
    assert checkpoint["metrics"] == {"test_accuracy": 0.75}
    assert checkpoint["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert checkpoint["is_best"] is True
    listed = client.get(f"/jobs/{checkpoint['job_id']}/checkpoints").json()
    assert listed == {"data": [checkpoint], "has_more": False, "next": None}


def test_a_job_without_a_checkpoint_says_so(client: TestClient) -> None:
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    answer = client.get(f"/jobs/{job_id}/checkpoint")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_ready")
    assert "queued" in answer.json()["detail"]
    assert client.get(f"/jobs/{job_id}/checkpoints").json()["data"] == []


def slow_part(first: str, last: str, content: list[Any]) -> list[Any] | None:
    """What a range names, by walking over the bytes; None: all of them, empty: not satisfiable."""
    if first == last == "":
        return None
    if first == "":
        return [byte for place, byte in enumerate(content) if len(content) - place <= int(last)]
    if last != "" and int(last) < int(first):
        return None
    return [byte for place, byte in enumerate(content) if place >= int(first) and (last == "" or place <= int(last))]


digits = st.one_of(st.just(""), st.integers(0, 30).map(str))


@given(digits, digits, st.integers(1, 20))
def test_ranges_mean_what_a_walk_over_the_bytes_finds(first: str, last: str, size: int) -> None:
    content = list(range(size))
    expected = slow_part(first, last, content)
    try:
        part = requested_part(f"bytes={first}-{last}", size)
    except RangeNotSatisfiable:
        assert expected == []
        return
    assert (None if part is None else content[part[0] : part[1] + 1]) == expected
