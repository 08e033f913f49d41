"""Deleting, by hand and by itself: what goes, what stays, and that no file outlives its row for long."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from app import labels, lifecycle, limits, retention
from app.cli import app as cli
from app.config import settings
from app.db import session_scope, try_lock
from app.models import Base, Checkpoint, Dataset, Job, LabelCache, LabelShard, Upload, new_id, now
from app.storage import Storage
from tests.support import add_dataset, in_threads, job_of, label, run, sentences, stored, submit, tiny_spec

OLD = f"{int((time.time() - 90_000) * 1000):012x}"
"""The beginning of an id that was made more than a day ago."""


@pytest.fixture(autouse=True)
def _empty_storage(storage: Storage) -> None:
    if storage.filesystem.exists(storage.root):
        storage.filesystem.rm(storage.root, recursive=True)


def files(storage: Storage) -> set[str]:
    """Every key of the storage."""
    found = storage.filesystem.find(storage.root) if storage.filesystem.exists(storage.root) else []
    return {str(path).removeprefix(f"{storage.root}/") for path in found}


def put(storage: Storage, *keys: str) -> None:
    for key in keys:
        storage.put_bytes(key, b"x")


def end(job_id: str, status: str = "cancelled", days_ago: float = 0) -> None:
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        job.status, job.finished_at = status, now() - timedelta(days=days_ago)


def a_job(dataset_id: str | None = None) -> str:
    return submit(tiny_spec(dataset_id or add_dataset(sentences(6, 1))))


def test_a_deleted_job_leaves_its_dataset_and_the_label_cache_and_nothing_else(
    client: TestClient, storage: Storage
) -> None:
    dataset_id = add_dataset(sentences(12, 1))
    kept = {"datasets": 1, "label_cache": 1, "api_keys": 1, "tenant_turns": 2}
    with session_scope() as session:
        labels.remember(session, "alice", "print", {b"text": labels.Answer(labels.np.ones(2), 3, 0.1)})
    job = run(submit(tiny_spec(dataset_id, webhook={"url": "https://example.com"})))
    assert job.status == "succeeded", job.error
    assert {name.split("/")[0] for name in files(storage)} == {"datasets", "labels", "jobs", "checkpoints"}
    assert stored()["webhook_deliveries"] == 1
    assert client.delete(f"/jobs/{job.id}").status_code == 204
    assert {name: count for name, count in stored().items() if count} == kept
    assert files(storage) == {f"datasets/{dataset_id}/rows.parquet"}
    for path in ("", "/events", "/metrics", "/samples", "/labels/report", "/checkpoint"):
        assert client.get(f"/jobs/{job.id}{path}").status_code == 404
    assert client.get(f"/checkpoints/{job.best_checkpoint_id}").status_code == 404


@pytest.mark.parametrize("status", ["queued", "running", "pausing", "paused", "cancelling"])
def test_a_job_that_has_not_ended_cannot_be_deleted(client: TestClient, storage: Storage, status: str) -> None:
    job_id = a_job()
    end(job_id, status)
    before = files(storage), stored()
    answer = client.delete(f"/jobs/{job_id}")
    assert (answer.status_code, answer.json()["code"]) == (409, "illegal_move")
    assert "Cancel it first" in answer.json()["detail"]
    assert (files(storage), stored()) == before


def test_labels_that_two_jobs_share_go_with_the_last_of_them(client: TestClient, storage: Storage) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    first, second = a_job(dataset_id), a_job(dataset_id)
    label(first)
    with session_scope() as session:
        job = session.get_one(Job, second)
        unused, job.label_set_id = job.label_set_id, session.get_one(Job, first).label_set_id
        session.flush()
        session.execute(
            Base.metadata.tables["label_sets"].delete().where(Base.metadata.tables["label_sets"].c.id == unused)
        )
    shared = {name for name in files(storage) if name.startswith("labels/")}
    assert shared
    for job_id, left in ((first, shared), (second, set())):
        end(job_id)
        assert client.delete(f"/jobs/{job_id}").status_code == 204
        assert {name for name in files(storage) if name.startswith("labels/")} == left
    assert stored()["label_shards"] == stored()["label_sets"] == 0


def test_a_deleted_dataset_is_forgotten_with_its_last_job(client: TestClient) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    jobs = [a_job(dataset_id), a_job(dataset_id)]
    for job_id in jobs:
        end(job_id)
    assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert client.delete(f"/jobs/{jobs[0]}").status_code == 204
    assert stored()["datasets"] == 1, "the other job still tells what it learned from"
    assert client.delete(f"/jobs/{jobs[1]}").status_code == 204
    assert stored()["datasets"] == 0


def test_a_job_is_deleted_or_retried_but_never_half_of_each(client: TestClient) -> None:
    for _ in range(5):
        job_id = a_job()
        end(job_id)
        requests = [("DELETE", f"/jobs/{job_id}"), ("POST", f"/jobs/{job_id}/retry")] * 2
        answers = in_threads(4, lambda number, requests=requests: client.request(*requests[number]))
        statuses = [answer.status_code for answer in answers]
        left = client.get(f"/jobs/{job_id}")
        if left.status_code == 404:
            assert sorted(statuses)[0] == 204
            assert set(statuses) <= {204, 404, 202}
        else:
            assert left.json()["status"] == "queued"
            assert set(statuses) <= {202, 409}
            end(job_id)


def test_a_dataset_cannot_be_deleted_while_a_retry_looks_for_it(client: TestClient) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    job_id = a_job(dataset_id)
    end(job_id)
    with ThreadPoolExecutor(1) as other:
        with session_scope() as session:
            lifecycle.retry(session, session.get_one(Job, job_id))
            deletion = other.submit(client.delete, f"/datasets/{dataset_id}")
            time.sleep(0.5)
            assert not deletion.done(), "it waits for what becomes of the retry"
        assert deletion.result().json()["code"] == "dataset_in_use"
    assert client.get(f"/datasets/{dataset_id}/rows").status_code == 200


def test_a_deleted_checkpoint_is_gone_and_its_job_stays(client: TestClient, storage: Storage) -> None:
    job = run(a_job())
    assert client.delete(f"/checkpoints/{job.best_checkpoint_id}").status_code == 204
    assert not [name for name in files(storage) if name.startswith("checkpoints/")]
    read = client.get(f"/jobs/{job.id}").json()
    assert (read["status"], read["best_checkpoint_id"]) == ("succeeded", None)
    assert read["evaluation"]["validation"]["student"]["rows"] > 0
    assert client.get(f"/jobs/{job.id}/checkpoint").json()["code"] == "not_ready"
    assert client.delete(f"/checkpoints/{job.best_checkpoint_id}").status_code == 404


def test_another_tenant_deletes_nothing(client: TestClient, other_client: TestClient) -> None:
    job = run(a_job())
    for path in (f"/jobs/{job.id}", f"/checkpoints/{job.best_checkpoint_id}"):
        assert other_client.delete(path).status_code == 404
        assert client.get(path).status_code == 200


def test_a_storage_that_fails_does_not_bring_the_row_back_and_the_sweep_removes_the_files(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = a_job()
    label(job_id)
    end(job_id)
    with monkeypatch.context() as broken:
        broken.setattr(Storage, "delete_all", lambda *_: (_ for _ in ()).throw(OSError("the storage is away")))
        assert client.delete(f"/jobs/{job_id}").status_code == 204
    orphans = {name for name in files(storage) if name.startswith("labels/")}
    assert orphans
    assert retention.sweep_files(storage) == [], "too young: its row may be about to come"
    monkeypatch.setattr(settings(), "orphan_grace_seconds", 1e-9)
    assert len(retention.sweep_files(storage)) == 1
    assert not [name for name in files(storage) if name.startswith("labels/")]


def test_the_rows_of_a_deleted_dataset_go_although_jobs_still_tell_of_it(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    end(a_job(dataset_id))
    with monkeypatch.context() as broken:
        broken.setattr(Storage, "delete", lambda *_: (_ for _ in ()).throw(OSError("the storage is away")))
        assert client.delete(f"/datasets/{dataset_id}").status_code == 204
    assert stored()["datasets"] == 1
    assert retention.sweep_files(storage) == [f"datasets/{dataset_id}/rows.parquet"]
    assert not files(storage)


def test_the_file_sweep_takes_what_no_row_names_and_nothing_else(client: TestClient, storage: Storage) -> None:
    job = run(a_job())
    upload = client.post("/uploads", json={"name": "a.csv", "bytes": 20}).json()["id"]
    client.post(f"/uploads/{upload}/parts?number=1", content=b"text\nhello\n")
    named = files(storage)
    old, fresh = f"{OLD}{'0' * 20}", new_id("x").removeprefix("x_")
    orphans = {
        f"datasets/ds_{old}/rows.parquet", f"labels/ls_{old}/part-000000-1.parquet", f"jobs/job_{old}/samples.parquet",
        f"checkpoints/ckpt_{old}.tar", f"uploads/up_{old}/part_{old}", f"uploads/{upload}/part_{old}",
        f"labels/{job.label_set_id}/part-000000-0.parquet", f"jobs/{job.id}/resume/state.safetensors",
    }  # fmt: skip
    others = {
        f"datasets/ds_{fresh}/rows.parquet",
        f"checkpoints/ckpt_{fresh}.tar",
        "backups/mine.txt",
        "jobs/notes/a",
        f"datasets/ds_{old}.kept/rows.parquet",
    }
    put(storage, *orphans, *others)
    assert len(retention.sweep_files(storage, dry_run=True)) == len(orphans)
    assert files(storage) == named | orphans | others
    assert len(retention.sweep_files(storage)) == len(orphans)
    assert files(storage) == named | others
    assert client.get(f"/jobs/{job.id}/checkpoint").status_code == 200
    assert client.get(f"/jobs/{job.id}/samples").status_code == 200


def test_the_answers_of_a_shard_that_is_tried_again_are_no_orphan(client: TestClient, storage: Storage) -> None:
    job = run(a_job())
    with session_scope() as session:
        shard = session.get_one(LabelShard, (job.label_set_id, 0))
        answers = shard.key
        shard.status, shard.attempt = "claimed", shard.attempt + 1
    assert retention.sweep_files(storage, dry_run=True) == []
    assert answers in files(storage)


def test_files_left_half_written_are_removed_once_they_are_old(client: TestClient, storage: Storage) -> None:
    put(storage, "datasets/x/rows.parquet")
    old, fresh = (Path(storage.root) / "datasets" / "x" / name for name in (".old45678", ".new45678"))
    others = [Path(storage.root) / name for name in (".bashrc_1", "datasets/.nfs000000000001", "mine/.old45678")]
    for path in (old, fresh, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - (0 if path == fresh else 90_000),) * 2)
    assert retention.sweep_files(storage) == [str(old)]
    assert not old.exists()
    assert all(path.exists() for path in (fresh, *others)), "what is hidden is not always ours"


def test_the_command_lists_what_it_would_remove(client: TestClient, storage: Storage) -> None:
    key = f"checkpoints/ckpt_{OLD}{'0' * 20}.tar"
    put(storage, key)
    for arguments, left in ((["--dry-run"], {key}), ([], set())):
        assert CliRunner().invoke(cli, ["sweep-files", *arguments]).stdout.splitlines()[-1] == key
        assert files(storage) == left


def test_an_upload_that_nobody_goes_on_with_expires_with_its_parts(client: TestClient, storage: Storage) -> None:
    ids = []
    for _ in range(2):
        upload = client.post("/uploads", json={"name": "a.csv", "bytes": 20}).json()["id"]
        client.post(f"/uploads/{upload}/parts?number=1", content=b"text\nhello\n")
        ids.append(upload)
    with session_scope() as session:
        session.execute(update(Upload).where(Upload.id == ids[0]).values(expires_at=now() - timedelta(seconds=1)))
    assert retention.retain(storage) == 1
    assert [client.get(f"/uploads/{id}").status_code for id in ids] == [404, 200]
    assert {name.split("/")[1] for name in files(storage)} == {ids[1]}


def test_nothing_is_deleted_by_age_or_size_unless_the_operator_says_so(client: TestClient, storage: Storage) -> None:
    job_id = a_job()
    end(job_id, days_ago=10_000)
    assert retention.retain(storage) == 0
    assert stored()["jobs"] == 1


def test_jobs_that_ended_long_ago_go_and_then_the_datasets_no_job_uses(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset_id = add_dataset(sentences(6, 1))
    old, recent, running = a_job(dataset_id), a_job(), a_job()
    end(old, "succeeded", days_ago=31)
    end(recent, "failed", days_ago=29)
    with session_scope() as session:
        session.execute(update(Dataset).values(created_at=now() - timedelta(days=40)))
    monkeypatch.setattr(settings(), "retain_jobs_days", 30)
    assert retention.retain(storage) == 1
    assert [client.get(f"/jobs/{id}").status_code for id in (old, recent, running)] == [404, 200, 200]
    monkeypatch.setattr(settings(), "retain_datasets_days", 30)
    assert retention.retain(storage) == 1
    assert client.get(f"/datasets/{dataset_id}").status_code == 404
    assert stored()["datasets"] == 2, "a job still needs the others"


def test_a_tenant_over_its_size_loses_its_oldest_first_and_no_other_tenant_does(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [a_job() for _ in range(3)]
    for position, job_id in enumerate(jobs):
        end(job_id, "succeeded", days_ago=10 - position)
        with session_scope() as session:
            ckpt = Checkpoint(id=new_id("ckpt"), tenant="alice", job_id=job_id, step=1, epoch=1.0, metrics={},
                              bytes=1000, sha256="0" * 64, files=[])  # fmt: skip
            session.add(ckpt)
    with session_scope() as session:
        session.execute(update(Dataset).values(bytes=10, created_at=now() - timedelta(days=20)))
    others = submit(tiny_spec(add_dataset(sentences(6, 2), tenant="bob")), tenant="bob")
    end(others, days_ago=100)
    monkeypatch.setattr(settings(), "retain_tenant_bytes", 2030)
    retention.retain(storage)
    assert [client.get(f"/jobs/{id}").status_code for id in jobs] == [404, 200, 200]
    monkeypatch.setattr(settings(), "retain_tenant_bytes", 2020)
    retention.retain(storage)
    assert stored()["datasets"] == 3, "the dataset that lost its job, and bob's stays"
    with session_scope() as session:
        assert limits.stored_bytes(session, "alice") == 2020
        assert session.scalar(select(func.count()).where(Job.tenant == "bob")) == 1
    monkeypatch.setattr(settings(), "retain_tenant_bytes", 0)
    end(jobs[1], "paused")
    retention.retain(storage)
    assert [client.get(f"/jobs/{id}").status_code for id in jobs] == [404, 200, 404], "a paused job is not at its end"


def a_comparison(client: TestClient) -> dict[str, Any]:
    spec = {
        "dataset_id": add_dataset(sentences(12, 1)), "test_dataset_id": add_dataset(sentences(9, 2)), "seeds": [0, 1],
        "teacher": {"kind": "dataset"}, "student": tiny_spec("")["student"], "training": {"epochs": 1, "batch_size": 8},
        "arms": [{"name": "all", "method": {"kind": "no_selection"}}, {"name": "some", "method": {"kind": "random"}}],
    }  # fmt: skip
    answer = client.post("/comparisons", json=spec)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def runs_of(comparison: dict[str, Any]) -> list[str]:
    return [run["job_id"] for arm in comparison["arms"] for run in arm["runs"]]


def test_a_comparison_goes_with_its_runs_and_no_run_goes_alone(client: TestClient, storage: Storage) -> None:
    comparison = a_comparison(client)
    first, *others = runs_of(comparison)
    label(first)
    for job_id in others:
        end(job_id)
    assert client.delete(f"/comparisons/{comparison['id']}").json()["code"] == "illegal_move"
    end(first)
    refused = client.delete(f"/jobs/{first}")
    assert (refused.status_code, comparison["id"] in refused.json()["detail"]) == (409, True)
    assert client.get(f"/comparisons/{comparison['id']}").json()["is_terminal"]
    assert client.delete(f"/comparisons/{comparison['id']}").status_code == 204
    assert [stored()[name] for name in ("comparisons", "jobs", "label_sets", "label_shards")] == [0] * 4
    assert {name.split("/")[0] for name in files(storage)} == {"datasets"}


def test_a_comparison_is_as_old_as_its_last_run(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = runs_of(a_comparison(client))
    for job_id in others:
        end(job_id, days_ago=40)
    monkeypatch.setattr(settings(), "retain_jobs_days", 30)
    for state in ("running", "failed"):
        end(first, state, days_ago=29)
        assert retention.retain(storage) == 0
    end(first, "succeeded", days_ago=31)
    assert retention.retain(storage) == 1
    assert stored()["jobs"] == stored()["comparisons"] == 0


def test_two_schedulers_do_not_keep_house_at_the_same_time(
    client: TestClient, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(a_job(), days_ago=2)
    monkeypatch.setattr(settings(), "retain_jobs_days", 1)
    with try_lock("retention"):
        assert retention.retain(storage) == 0
    assert retention.retain(storage) == 1


def test_the_label_cache_outlives_every_job(client: TestClient, storage: Storage) -> None:
    spec = tiny_spec(
        add_dataset(sentences(6, 1)), labels=["cooking", "sports", "weather"], teacher={"kind": "embedding"}
    )
    first = submit(spec)
    label(first)
    end(first)
    assert client.delete(f"/jobs/{first}").status_code == 204
    assert stored()["label_cache"] == 6
    second = submit(spec)
    label(second)
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(LabelCache)) == 6
    assert job_of(second).phases[0].done == 6
    assert client.get(f"/jobs/{second}").json()["labeling"]["rows_from_cache"] == 6
