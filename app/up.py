"""`understudy up`: PostgreSQL, Redis, migrations, API, workers and scheduler on one machine, in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

import httpx

from app import keys, migrate
from app.config import settings
from app.db import engine, session_scope
from app.embedded import Embedded, NotStarted, free_port
from app.supervisor import Child, restart_ended, stop

TENANT = "default"
READY_SECONDS = 60.0
LOOK_SECONDS = 0.2


class PortTaken(Exception):
    """Something else listens on the port."""


def run(directory: Path, *, host: str, port: int, workers: int) -> None:
    """Run everything until SIGTERM, SIGINT or SIGHUP; print `ready <url>` once requests are served.

    What ends by itself is started again. Raises PortTaken, AlreadyRunning and NotStarted.
    """
    port = port or free_port(host)
    _refuse_a_taken_port(host, port)
    _turn_signals_into_interrupts()
    url = f"http://127.0.0.1:{port}" if host == "0.0.0.0" else f"http://{host}:{port}"
    directory = directory.expanduser().resolve()
    try:
        with Embedded(directory) as parts:
            os.environ.update(_environment(directory, parts, workers))
            settings.cache_clear()
            migrate.upgrade()
            _write_first_key(directory / "api-key")
            services = _services(directory / "logs", host, port, workers)
            try:
                for service in services:
                    service.start()
                _wait_until_ready(services[0], url)
                _say(f"API key in {directory}/api-key, logs in {directory}/logs, dashboard and docs at {url}")
                print(f"ready {url}", flush=True)
                while True:
                    restart_ended([*parts.children, *services], _say)
                    time.sleep(LOOK_SECONDS)
            finally:
                _say("stopping")
                engine().dispose()
                stop(services)
    except KeyboardInterrupt:
        return


def _say(line: str) -> None:
    print(f"understudy: {line}", file=sys.stderr, flush=True)


def _refuse_a_taken_port(host: str, port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise PortTaken(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
            ) from None


def _turn_signals_into_interrupts() -> None:
    """The first signal ends the work wherever it is; later ones must not disturb the stopping."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


def _environment(directory: Path, parts: Embedded, workers: int) -> dict[str, str]:
    for name in ("storage", "logs"):
        (directory / name).mkdir(mode=0o700, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "UNDERSTUDY_DATABASE_URL": parts.database_url,
        "UNDERSTUDY_REDIS_URL": parts.redis_url,
        "UNDERSTUDY_STORAGE_URL": f"file://{directory}/storage",
        "UNDERSTUDY_THREADS": os.environ.get("UNDERSTUDY_THREADS") or str(max(1, cores // max(1, workers))),
    }


def _write_first_key(file: Path) -> None:
    """Leave a key that works in the file; one that is there already stays."""
    with session_scope() as session:
        if file.exists() and keys.authenticate(session, file.read_text().strip()):
            return
        _, key = keys.create(session, TENANT, "made by understudy up", scope="admin")
    partial = file.with_name("api-key.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(key + "\n")
    partial.replace(file)


def _services(logs: Path, host: str, port: int, workers: int) -> list[Child]:
    # -P: a directory named `app` where the user happens to be must not be taken for ours.
    understudy = [sys.executable, "-P", "-m", "app.cli"]
    return [
        Child("api", [*understudy, "api", "--host", host, "--port", str(port)], logs / "api.log"),
        Child("scheduler", [*understudy, "scheduler"], logs / "scheduler.log"),
        *(
            Child(f"worker-{number}", [*understudy, "worker"], logs / f"worker-{number}.log")
            for number in range(1, workers + 1)
        ),
    ]


def _wait_until_ready(api: Child, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while api.is_running and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise NotStarted(f"The API does not start; {api.log} ends with:\n{api.last_lines()}")
