"""The whole service as processes of its own, on its own PostgreSQL and Redis, with a network that can be harmed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import httpx
import redis
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from app.embedded import Embedded, free_port
from app.storage import Storage
from app.supervisor import Child, stop
from tests.faults.proxy import Proxy
from tests.support import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
LEASE_SECONDS = 4.0
FAST = {
    "UNDERSTUDY_LEASE_SECONDS": str(LEASE_SECONDS),
    "UNDERSTUDY_SWEEP_SECONDS": "0.5",
    "UNDERSTUDY_REQUEUE_SECONDS": "2",
    "UNDERSTUDY_RESUME_EVERY_SECONDS": "0.3",
    "UNDERSTUDY_SHARD_ROWS": "32",
    "UNDERSTUDY_MAX_REQUESTS_PER_MINUTE": "none",
    "UNDERSTUDY_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What makes lost work come back within seconds."""
PREPARE = """
from app import keys, migrate
from app.db import session_scope
migrate.upgrade()
with session_scope() as session:
    print(keys.create(session, "alice", "of a fault test")[1])
"""
ANSWER_SECONDS = 60.0
"""How long a client goes on trying."""


class Service:
    """`with Service(directory) as service:` API, scheduler and workers; the workers reach the parts through proxies."""

    def __init__(self, directory: Path, *, workers: int = 2) -> None:
        self.directory = directory
        self.parts = Embedded(directory, durable=False)
        self.port = free_port()
        self.answers: dict[int, int] = {}
        """How often the API answered with which status."""
        self._workers = workers
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Service:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self) -> None:
        self._stack.enter_context(self.parts)
        self.postgres, self.redis = self.parts.children
        for name in ("storage", "spool", "logs"):
            (self.directory / name).mkdir(exist_ok=True)
        socket_path = unquote(self.parts.database_url.partition("host=")[2]) + "/.s.PGSQL.5432"
        self.broker = redis.Redis.from_url(self.parts.redis_url)
        redis_port = self.broker.connection_pool.connection_kwargs["port"]
        self.database_network = self._stack.enter_context(Proxy(socket_path))
        self.broker_network = self._stack.enter_context(Proxy(("127.0.0.1", redis_port)))
        here = self._environment(self.parts.database_url, self.parts.redis_url)
        through = self._environment(
            f"postgresql+psycopg://postgres@127.0.0.1:{self.database_network.port}/postgres",
            self.parts.redis_url.replace(f":{redis_port}/", f":{self.broker_network.port}/"),
        )
        prepared = subprocess.run(
            [sys.executable, "-c", PREPARE], env=here, capture_output=True, text=True, check=False
        )
        assert prepared.returncode == 0, prepared.stderr
        self.key = prepared.stdout.strip()
        self.engine: Engine = create_engine(self.parts.database_url, pool_pre_ping=True)
        self._stack.callback(self.engine.dispose)
        self.storage = Storage(here["UNDERSTUDY_STORAGE_URL"])

        self.api = self._child("api", here, "--port", str(self.port))
        self.scheduler = self._child("scheduler", here)
        self.workers = [self._child("worker", through, name=f"worker-{n}") for n in range(1, self._workers + 1)]
        self._stack.callback(lambda: stop([self.api, self.scheduler, *self.workers], seconds=3))
        self.http = self._stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": f"Bearer {self.key}"},
                timeout=30, trust_env=False,
            )
        )  # fmt: skip
        for child in (self.api, self.scheduler, *self.workers):
            child.start()
        wait_until(self._is_ready, 60, f"the API: {self.api.last_lines()}")

    def _environment(self, database_url: str, redis_url: str) -> dict[str, str]:
        return {
            **os.environ, **FAST,
            "PYTHONPATH": str(ROOT),
            "UNDERSTUDY_DATABASE_URL": database_url,
            "UNDERSTUDY_REDIS_URL": redis_url,
            "UNDERSTUDY_STORAGE_URL": f"file://{self.directory}/storage",
            "UNDERSTUDY_SPOOL_DIR": f"{self.directory}/spool",
        }  # fmt: skip

    def _child(self, command: str, environment: dict[str, str], *arguments: str, name: str | None = None) -> Child:
        name = name or command
        return Child(
            name, [sys.executable, "-P", "-m", "app.cli", command, *arguments],
            self.directory / "logs" / f"{name}.log", environment=environment,
        )  # fmt: skip

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    # --- looking ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A session on the service's database, past its API."""
        with Session(self.engine) as session:
            yield session

    def call(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """A request as a patient client makes it: sent again while nobody answers, or 503 does."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                answer = self.http.request(method, path, **arguments)
                self.answers[answer.status_code] = self.answers.get(answer.status_code, 0) + 1
                if answer.status_code != 503 or time.monotonic() > deadline:
                    return answer
            except httpx.TransportError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def upload(self, rows: list[dict[str, Any]]) -> str:
        """A dataset's id."""
        import json

        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        answer = self.call("POST", "/datasets", content=body, headers={"Content-Type": "application/x-ndjson"})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def submit(self, spec: dict[str, Any], idempotency_key: str) -> str:
        """A job's id; sent again under the same key, it is the same job."""
        answer = self.call("POST", "/jobs", json=spec, headers={"Idempotency-Key": idempotency_key})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """The job as its owner sees it."""
        answer = self.call("GET", f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(
        self, job_id: str, seconds: float = 120.0, until: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """The job, once it has ended, or what is waited for is true."""
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(self.job(job_id))
            return found["is_terminal"] if until is None else until(found)

        wait_until(there, seconds, f"job {job_id} to get there; it is {found}")
        return found

    # --- harming ----------------------------------------------------------------------------------------------------

    def kill(self, child: Child) -> None:
        """SIGKILL, and no restart."""
        child.kill()

    def kill_postgres(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """End PostgreSQL without a checkpoint (`immediate`): what was committed is recovered from its log."""
        assert self.postgres.pid is not None
        os.kill(self.postgres.pid, number)
        assert self.postgres.process is not None
        self.postgres.process.wait()

    def start(self, child: Child) -> None:
        """Start a killed child again. PostgreSQL may have to wait for the last of its killed processes."""
        child.start()
        if child is self.postgres:
            time.sleep(0.3)
            while not child.is_running:
                time.sleep(0.3)
                child.start()
                time.sleep(0.3)
