"""PostgreSQL and Redis from their wheels: what they keep, what they survive, and that nothing outlives its parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.embedded import AlreadyRunning, Embedded
from app.supervisor import Child, restart_ended, stop
from tests.support import wait_until

PARENT = """
import sys, time
from pathlib import Path
from app.embedded import Embedded
parts = Embedded(Path(sys.argv[1]), durable=False)
parts.start()
print(*(child.pid for child in parts.children), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    # Not pytest's tmp_path: PostgreSQL, which root must run as another user, could not get into it.
    directory = Path(tempfile.mkdtemp(prefix="understudy-embedded-"))
    yield directory
    shutil.rmtree(directory)


def connect(parts: Embedded) -> psycopg.Connection:
    return psycopg.connect(parts.database_url.replace("+psycopg", ""), autocommit=True)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_rows_survive_a_killed_postgres_and_a_directory_has_one_owner(directory: Path) -> None:
    with Embedded(directory, durable=False) as parts:
        with connect(parts) as connection:
            connection.execute("CREATE TABLE kept (number int)")
            connection.execute("INSERT INTO kept VALUES (7)")
        parts.children[0].kill()
    with Embedded(directory, durable=False) as parts, connect(parts) as connection:
        assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]
        with pytest.raises(AlreadyRunning, match="in use"):
            Embedded(directory).start()
        assert connection.execute("SELECT number FROM kept").fetchall() == [(7,)]  # the owner was not disturbed


def test_nothing_outlives_a_killed_parent_and_the_next_one_starts(directory: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(directory)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    with Embedded(directory, durable=False) as parts:
        connect(parts).close()
    wait_until(lambda: all(gone(pid) for pid in pids), what="PostgreSQL and Redis of the killed parent to end")


def test_an_initdb_that_was_killed_is_begun_anew_also_where_the_path_is_too_long_for_a_socket(directory: Path) -> None:
    deep = directory / ("d" * 60) / ("e" * 60)
    unfinished = deep / "postgres.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with Embedded(deep, durable=False) as parts:
        connect(parts).close()


def test_redis_wants_the_password_and_listens_on_this_machine_alone(services: Embedded) -> None:
    with redis.Redis.from_url(services.redis_url) as broker:
        port = broker.connection_pool.connection_kwargs["port"]
    with redis.Redis(port=port, retry=None) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()
    pid = services.children[1].pid
    addresses = {connection.laddr.ip for connection in psutil.Process(pid).net_connections() if connection.laddr}
    assert addresses == {"127.0.0.1"}


def test_postgres_listens_on_no_network_and_its_socket_is_private(services: Embedded) -> None:
    process = psutil.Process(services.children[0].pid)
    assert process.net_connections(kind="inet") == []
    [socket] = [connection.laddr for connection in process.net_connections(kind="unix") if "PGSQL" in connection.laddr]
    assert os.stat(socket).st_mode & 0o077 == 0


# --- children -------------------------------------------------------------------------------------------------------


def test_a_child_that_ignores_the_stop_signal_is_killed_with_what_it_started(tmp_path: Path) -> None:
    stubborn = Child("stubborn", ["sh", "-c", "trap '' TERM; echo up; sleep 50; sleep 50"], tmp_path / "log")
    stubborn.start()
    wait_until(lambda: "up" in stubborn.last_lines())
    sleeping = psutil.Process(stubborn.pid).children()
    stop([stubborn], seconds=0.2)
    assert not stubborn.is_running
    wait_until(lambda: all(gone(process.pid) for process in sleeping))
    assert stubborn.process is not None
    assert stubborn.process.returncode == -signal.SIGKILL


def test_a_child_that_ends_is_started_again_after_longer_and_longer_pauses(tmp_path: Path) -> None:
    brief = Child("brief", ["sh", "-c", "echo started; exit 3"], tmp_path / "log")
    said: list[str] = []
    brief.start()

    def restarted(count: int) -> bool:
        restart_ended([brief], said.append)
        return brief.last_lines(99).count("started") >= count

    wait_until(lambda: restarted(3))
    assert "brief ended with status 3; starting it again in 0.5 s" in said[0]
    assert "in 1 s" in said[1]
