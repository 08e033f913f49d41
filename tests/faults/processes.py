"""Real processes for a test that harms one: a fork of this one, which has the models' libraries loaded already."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable

from app.db import SessionLocal, engine
from app.logs import configure_logging
from app.queue import producer

PIPE_BYTES = 60_000
"""What a pipe takes before anybody reads."""
_told: dict[int, int] = {}
"""By process, where it tells of the exception that ended it."""


def fork(work: Callable[[], object]) -> int:
    """Start `work` in a process of its own; its id. Its end, whatever it is, touches nothing of this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    told, tell = os.pipe()
    process = os.fork()
    if process:
        os.close(tell)
        _told[process] = told
        return process
    status = 1
    try:
        engine().dispose(close=False)  # the connections are the parent's
        SessionLocal.configure(bind=None)
        producer.cache_clear()
        configure_logging()
        work()
        status = 0
    except BaseException:
        os.write(tell, traceback.format_exc().encode()[-PIPE_BYTES:])
    finally:
        os._exit(status)


def ended(process: int, seconds: float = 60.0) -> int:
    """Wait for the process; its exit status, or minus the signal that killed it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            with os.fdopen(_told.pop(process), "rb") as told:
                print(told.read().decode(), file=sys.stderr)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, 9)
    os.waitpid(process, 0)
    raise AssertionError(f"process {process} did not end within {seconds:g} s")


def harmed(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own; how it ended."""
    return ended(fork(work))
