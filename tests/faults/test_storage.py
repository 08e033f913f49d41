"""The disk is full, or the storage in trouble: uploads are refused with the reason, jobs wait, and nobody has to mend anything."""

from __future__ import annotations

import ctypes
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from s3fs import S3FileSystem
from sqlalchemy import Engine, select

from app import lifecycle
from app.config import settings
from app.db import session_scope
from app.main import create_app
from app.models import TERMINAL, Dataset, JobEvent
from app.storage import Storage
from app.storage import storage as configured
from tests.faults.processes import harmed
from tests.faults.proxy import Proxy
from tests.s3_server import BUCKET, Bucket, serving
from tests.support import add_dataset, job_of, label, new_key, sentences, shards_of, submit, tiny_spec
from workers import tasks

JSONL = {"Content-Type": "application/x-ndjson"}
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_REMOUNT, MS_REC, MS_PRIVATE = 1 << 5, 1 << 14, 1 << 18


def rows_of(size: int) -> bytes:
    """JSONL of about `size` bytes that hardly compress."""
    return b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(size // 1012))


# --- a full disk ------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A disk of its own size at `path`, seen by this process alone: a tmpfs in a mount namespace of its own."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._libc = ctypes.CDLL(None, use_errno=True)
        if (
            os.geteuid() == 0
        ):  # in a user namespace, root could not reach the socket of PostgreSQL, which is another user's
            self._do(self._libc.unshare(CLONE_NEWNS))
            self._do(self._libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
        else:
            user, group = os.getuid(), os.getgid()
            self._do(self._libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        self._mount(size, 0)

    def grow(self, size: int) -> None:
        self._mount(size, MS_REMOUNT)

    def _mount(self, size: int, flags: int) -> None:
        self._do(self._libc.mount(b"none", str(self.path).encode(), b"tmpfs", flags, f"size={size}".encode()))

    def _do(self, result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@pytest.fixture
def disks(tmp_path: Path, database: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories `spool` and `storage`, for the server that a test's process is."""
    for name in ("spool", "storage", "probe"):
        (tmp_path / name).mkdir()
    if harmed(lambda: SmallDisk(tmp_path / "probe", 2**16)):
        pytest.skip("this machine lets nobody mount a tmpfs, not even in a user namespace of one's own")
    monkeypatch.setattr(settings(), "spool_dir", tmp_path / "spool")
    monkeypatch.setattr(settings(), "storage_url", f"file://{tmp_path}/storage")
    configured.cache_clear()
    yield tmp_path
    configured.cache_clear()


def new_client() -> TestClient:
    """The API as alice sees it, in this very process."""
    return TestClient(create_app(), headers={"Authorization": f"Bearer {new_key('alice')}"})


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def refused(answer: Any) -> None:
    assert (answer.status_code, answer.json()["code"]) == (503, "no_room"), answer.text
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("full", ["spool", "storage"])
def test_an_upload_that_the_disk_has_no_room_for_is_refused_leaves_nothing_and_goes_through_later(
    disks: Path, full: str
) -> None:
    body = rows_of(400_000)

    def upload() -> None:
        client = new_client()
        disk = SmallDisk(disks / full, 100_000)
        refused(client.post("/datasets", content=body, headers=JSONL))
        assert client.get("/datasets").json()["data"] == []
        assert files(disks / "spool") == files(disks / "storage") == []
        disk.grow(10_000_000)
        made = client.post("/datasets", content=body, headers=JSONL)
        assert made.status_code == 201, made.text
        assert client.get(f"/datasets/{made.json()['id']}/rows").json()["data"]
        assert (files(disks / "spool"), len(files(disks / "storage"))) == ([], 1)

    assert harmed(upload) == 0


@pytest.mark.parametrize("full", ["spool", "storage"])
def test_an_upload_in_parts_survives_a_full_disk(disks: Path, full: str) -> None:
    parts = [rows_of(200_000), rows_of(200_000)]

    def upload() -> None:
        client = new_client()

        def send(upload: str, number: int) -> Any:
            return client.post(f"/uploads/{upload}/parts?number={number}", content=parts[number - 1])

        # In the spool a part fits, and the whole does not; in the storage the first part does.
        disk = SmallDisk(disks / full, 300_000)
        begun = client.post("/uploads", json={"name": "rows.jsonl", "bytes": sum(map(len, parts))})
        path = f"/uploads/{begun.json()['id']}"
        assert send(begun.json()["id"], 1).status_code == 201
        if full == "spool":
            assert send(begun.json()["id"], 2).status_code == 201
            refused(client.post(f"{path}/complete"))
        else:
            refused(send(begun.json()["id"], 2))
        kept = client.get(path).json()
        assert (kept["status"], len(kept["parts"])) == ("pending", 2 if full == "spool" else 1)
        assert files(disks / "spool") == []
        assert len(files(disks / "storage")) == len(kept["parts"]), "no half file"
        disk.grow(10_000_000)
        if full == "storage":
            assert send(begun.json()["id"], 2).status_code == 201
        made = client.post(f"{path}/complete")
        assert made.status_code == 201, made.text
        assert (files(disks / "spool"), files(disks / "storage")) == ([], ["rows.parquet"])

    assert harmed(upload) == 0


# --- a storage in trouble ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with serving() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def network(server: Bucket) -> Iterator[Proxy]:
    """What lies between the service and its storage."""
    with pytest.MonkeyPatch.context() as patch, Proxy(("127.0.0.1", server.port)) as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "127.0.0.1",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        S3FileSystem().mkdir(BUCKET)
        yield proxy
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def bucket(
    server: Bucket, network: Proxy, database: Engine, monkeypatch: pytest.MonkeyPatch, request: Any
) -> Iterator[Bucket]:
    """The service's storage is a folder of a bucket."""
    monkeypatch.setattr(settings(), "storage_url", f"s3://{BUCKET}/{abs(hash(request.node.name))}")
    configured.cache_clear()
    yield server
    server.fails = lambda method, path: None
    network.flow()
    configured.cache_clear()


def keys() -> list[str]:
    """What lies in the storage."""
    found: Storage = configured()
    return sorted(path.removeprefix(f"{found.root}/") for path in found.filesystem.find(found.root))


def always(status: int) -> Callable[[str, str], int]:
    return lambda method, path: status


def spec(dataset_id: str) -> dict[str, Any]:
    return tiny_spec(dataset_id, training={"epochs": 2, "batch_size": 8, "learning_rate": 5e-3})


def test_the_whole_way_over_s3_and_nothing_is_left_after_it(client: TestClient, bucket: Bucket) -> None:
    body = "".join(json.dumps(row) + "\n" for row in sentences(40, 1))
    dataset_id = client.post("/datasets", content=body, headers=JSONL).json()["id"]
    job_id = client.post("/jobs", json=tiny_spec(dataset_id)).json()["id"]
    label(job_id)
    tasks.train(job_id)
    assert job_of(job_id).status == "succeeded", job_of(job_id).error
    assert len(client.get(f"/datasets/{dataset_id}/rows").json()["data"]) == 20
    assert len(client.get(f"/jobs/{job_id}/samples?limit=100").json()["data"]) > 0
    packed = client.get(f"/jobs/{job_id}/checkpoint").content
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert "model.safetensors" in archive.getnames()
    part = client.get(f"/jobs/{job_id}/checkpoint", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, packed[100:200])
    assert {key.partition("/")[0] for key in keys()} == {"datasets", "labels", "jobs", "checkpoints"}
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert keys() == []


@pytest.mark.parametrize(("status", "code"), [(500, "storage_away"), (503, "storage_away"), (403, "storage_refuses")])
def test_an_upload_to_a_storage_in_trouble_is_told_so_and_goes_through_later(
    client: TestClient, bucket: Bucket, status: int, code: str
) -> None:
    bucket.fails = always(status)
    answer = client.post("/datasets", content=rows_of(2_000), headers=JSONL)
    assert (answer.status_code, answer.json()["code"]) == (503, code)
    assert int(answer.headers["retry-after"]) > 0
    assert "trouble" not in answer.text
    with session_scope() as session:
        assert session.scalars(select(Dataset.id)).all() == []
    bucket.fails = lambda method, path: None
    assert keys() == []
    made = client.post("/datasets", content=rows_of(2_000), headers=JSONL)
    assert made.status_code == 201
    bucket.fails = always(status)
    assert client.get(f"/datasets/{made.json()['id']}/rows").json()["code"] == code


def test_labeling_and_training_wait_for_a_storage_in_trouble(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings(), "resume_every_seconds", 1e-9)
    dataset_id = add_dataset(sentences(40, 1))
    undisturbed, job_id = submit(spec(dataset_id)), submit(spec(dataset_id))
    label(undisturbed)
    tasks.train(undisturbed)

    bucket.fails = lambda method, path: 503 if method == "PUT" and "/labels/" in path else None
    label(job_id)
    job, shard = job_of(job_id), shards_of(job_id)[0]
    assert (job.status, job.error, shard.status, shard.lost_workers) == ("running", None, "pending", 0)
    bucket.fails = lambda method, path: None
    label(job_id)
    assert job_of(job_id).phase == "training"

    saves = iter(range(100))
    bucket.fails = lambda method, path: (
        503 if "/checkpoints/" in path or (method == "PUT" and "resume" in path and next(saves) >= 5) else None
    )
    for _ in range(2):  # while it saves its state, and again while it packs
        tasks.train(job_id)
        job = job_of(job_id)
        assert (job.status, job.error, job.lease_expires_at) == ("queued", None, None)
        saves = iter(range(-100, 0))
    with session_scope() as session:
        away = session.scalars(
            select(JobEvent.message).where(JobEvent.job_id == job_id, JobEvent.type == "storage.away")
        )
        assert len(away.all()) == 3
        assert lifecycle.sweep(session, {tasks.queue.TRAIN}) == 0, "not at once"
    bucket.fails = lambda method, path: None
    tasks.train(job_id)
    done = [job_of(each) for each in (undisturbed, job_id)]
    assert [job.status for job in done] == ["succeeded"] * 2
    figures = [{name: value for name, value in job.metrics.items() if name != "training_seconds"} for job in done]
    assert figures[0] == figures[1], "it went on from its saved state"
    assert job_of(job_id).attempt == 3


def test_a_storage_that_refuses_the_workers_fails_the_job_with_the_reason(bucket: Bucket) -> None:
    job_id = submit(spec(add_dataset(sentences(40, 1))))
    bucket.fails = always(403)
    label(job_id)
    job = job_of(job_id)
    assert (job.status, (job.error or {})["code"]) == ("failed", "storage_refuses")


# --- a storage that hangs -----------------------------------------------------------------------------------------------

TIMEOUT = 0.7
BOUND = 2 * (2 * TIMEOUT + 1) + 3
"""Seconds: two requests, a part and the end of the upload that it belonged to, each tried twice; and some for the rest."""


@pytest.fixture
def hanging(bucket: Bucket, network: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """The network to a storage that is not waited for any longer than a test can wait."""
    monkeypatch.setattr(settings(), "storage_timeout_seconds", TIMEOUT)
    return network


def away(ask: Callable[[], Any]) -> None:
    began = time.monotonic()
    answer = ask()
    assert time.monotonic() - began < BOUND
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_away"), answer.text


@pytest.mark.parametrize("after", [0, 3_000_000])
def test_a_storage_that_hangs_is_away_within_a_bounded_time(client: TestClient, hanging: Proxy, after: int) -> None:
    rows = rows_of(24_000_000)  # half as much in the storage, in three parts

    def upload() -> Any:
        return client.post("/datasets", content=rows, headers=JSONL)

    hanging.stall(after=after)
    away(upload)
    hanging.flow()
    made = upload()
    assert made.status_code == 201, made.text
    hanging.stall(after=after)
    away(lambda: client.get(f"/datasets/{made.json()['id']}/rows"))
    hanging.flow()
    assert client.get(f"/datasets/{made.json()['id']}/rows").status_code == 200


def test_what_is_deleted_while_the_storage_hangs_is_gone_within_a_bounded_time(
    client: TestClient, bucket: Bucket, hanging: Proxy
) -> None:
    job_id = submit(spec(add_dataset(sentences(40, 1))))
    label(job_id)
    tasks.train(job_id)
    hanging.stall()
    began = time.monotonic()
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    assert time.monotonic() - began < BOUND
    hanging.flow()
    assert {key.partition("/")[0] for key in keys()} >= {"labels", "jobs"}, "for the sweep"
    assert client.get(f"/jobs/{job_id}").status_code == 404


def test_a_job_waits_for_a_storage_that_hangs(bucket: Bucket, hanging: Proxy) -> None:
    job_id = submit(spec(add_dataset(sentences(40, 1))))

    def hang_while(work: Callable[[], object]) -> None:
        began = time.monotonic()
        work()
        job = job_of(job_id)
        assert (job.status in TERMINAL, job.error) == (False, None)
        assert time.monotonic() - began < BOUND + 5
        hanging.flow()

    hanging.stall()
    hang_while(lambda: label(job_id))
    label(job_id)
    hanging.stall()
    hang_while(lambda: tasks.train(job_id))

    def hang_at_the_checkpoint(method: str, path: str) -> None:
        if method == "PUT" and "/checkpoints/" in path:
            hanging.stall()

    bucket.fails = hang_at_the_checkpoint
    hang_while(lambda: tasks.train(job_id))
    bucket.fails = lambda method, path: None
    tasks.train(job_id)
    assert (job_of(job_id).status, job_of(job_id).attempt) == ("succeeded", 3)
