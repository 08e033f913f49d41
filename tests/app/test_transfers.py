"""Uploads and downloads through a real server and a line that is cut: nothing is sent twice that arrived, nothing is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, select

from app import client as module
from app.client import ApiError, Client, DownloadDamaged
from app.db import session_scope
from app.models import Checkpoint, Job, Upload, new_id
from app.storage import storage
from tests.support import add_dataset, new_key, sentences, serving, submit, tiny_spec

LINES = [json.dumps({"text": f"row {number} {'x' * 80}"}) + "\n" for number in range(3000)]
PART_BYTES = 32 * 1024
CONTENT = bytes(number * 7 % 251 for number in range(1_000_000))


class Line:
    """A TCP proxy to a server, which resets its connections after so many bytes, one number for each connection."""

    def __init__(self, target: str) -> None:
        self.target = httpx.URL(target)
        self.cuts: list[int] = []
        """Bytes each of the next connections carries, both ways together; later ones are whole."""
        self.sent = 0
        """Bytes from the client so far, whether or not they arrived."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection((self.target.host, self.target.port))
            left = [self.cuts.pop(0) if self.cuts else 2**60]
            self.connections += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink, near, left), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, near: socket.socket, left: list[int]) -> None:
        try:
            while data := source.recv(4096):
                if source is near:
                    self.sent += len(data)
                left[0] -= len(data)
                if left[0] < 0:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()
        for connection in self.connections:
            connection.close()


@pytest.fixture
def line(database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    monkeypatch.setattr(module, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(module, "PARTS_ABOVE_BYTES", PART_BYTES)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with serving() as url:
        line = Line(url)
        yield line
        line.close()


@pytest.fixture
def key(database: Engine) -> str:
    return new_key("alice")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(LINES))
    return path


def uploads() -> list[Upload]:
    with session_scope() as session:
        return list(session.scalars(select(Upload)))


def test_an_upload_goes_on_after_every_cut_and_sends_only_what_was_lost(line: Line, key: str, rows: Path) -> None:
    size = rows.stat().st_size
    line.cuts = [50_000, 90_000, 1000, 120_000]
    done: list[int] = []
    with Client(line.url, key) as client:
        dataset = client.upload(rows, lambda now, total: done.append(now))
    assert (dataset["rows"], dataset["sha256"]) == (len(LINES), hashlib.sha256(rows.read_bytes()).hexdigest())
    assert line.cuts == []
    assert line.sent < size + 5 * (PART_BYTES + 4096), "each cut may cost one part"
    assert done == sorted(done)
    assert done[-1] == size
    assert [upload.status for upload in uploads()] == ["completed"]


def test_an_upload_is_taken_up_by_another_program(line: Line, key: str, rows: Path) -> None:
    line.cuts = [150_000]
    with Client(line.url, key, retries=0) as first, pytest.raises(httpx.TransportError):
        first.upload(rows)
    arrived = {part.number for part in uploads()[0].parts}
    assert len(arrived) >= 3
    before = line.sent
    with Client(line.url, key) as second:
        dataset = second.upload(rows)
    assert dataset["rows"] == len(LINES)
    assert line.sent - before < rows.stat().st_size - (len(arrived) - 1) * PART_BYTES
    assert len(uploads()) == 1


def test_the_same_file_uploaded_anew_becomes_another_dataset(line: Line, key: str, rows: Path) -> None:
    with Client(line.url, key) as client:
        assert client.upload(rows)["id"] != client.upload(rows)["id"]
    assert [upload.status for upload in uploads()] == ["completed"] * 2


def test_an_upload_with_bad_rows_is_refused_and_given_up(line: Line, key: str, rows: Path) -> None:
    rows.write_text("".join(LINES) + '{"text": ""}\n')
    with Client(line.url, key) as client:
        with pytest.raises(ApiError, match=f"line {len(LINES) + 1}"):
            client.upload(rows)
        assert [upload.status for upload in uploads()] == ["cancelled"]
        assert client.upload(rows, on_error="skip")["skipped"] == 1


@pytest.fixture
def checkpoint(database: Engine, tmp_path: Path) -> str:
    """A checkpoint whose tar is CONTENT."""
    file = tmp_path / "checkpoint.tar"
    file.write_bytes(CONTENT)
    job_id = submit(tiny_spec(add_dataset(sentences(6, 1))))
    row = Checkpoint(
        id=new_id("ckpt"), tenant="alice", job_id=job_id, step=1, epoch=1.0, metrics={}, bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(), files=[],
    )  # fmt: skip
    storage().put(row.key, file)
    with session_scope() as session:
        session.add(row)
        session.get_one(Job, job_id).best_checkpoint_id = row.id
    return row.id


def test_a_download_goes_on_after_every_cut(line: Line, key: str, checkpoint: str, tmp_path: Path) -> None:
    line.cuts = [200_000, 300_000, 100_000]
    seen: list[int] = []
    with Client(line.url, key) as client:
        path = client.download(checkpoint, tmp_path / "a.tar", lambda done, total: seen.append(done))
    assert path.read_bytes() == CONTENT
    assert line.cuts == []
    assert seen == sorted(seen), "what has arrived is not fetched again"


def test_a_file_that_was_damaged_in_the_storage_is_not_handed_out_as_whole(
    line: Line, key: str, checkpoint: str, tmp_path: Path
) -> None:
    damaged = bytearray(CONTENT)
    damaged[500_000] ^= 1
    file = tmp_path / "damaged"
    file.write_bytes(damaged)
    storage().put(f"checkpoints/{checkpoint}.tar", file)
    with Client(line.url, key) as client, pytest.raises(DownloadDamaged, match="SHA-256"):
        client.download(checkpoint, tmp_path / "a.tar")
    assert not (tmp_path / "a.tar").exists()
