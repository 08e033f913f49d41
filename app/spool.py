"""Room for files on their way: a directory each that ends with its block, or is removed by another process where its own was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from app.config import settings

PREFIX = "understudy-spool-"
SWEEP_SECONDS = 60.0
"""How often a process that uses the spool looks for what others left; younger directories may not be locked yet."""

_swept_at = -SWEEP_SECONDS

log = structlog.get_logger()


@contextmanager
def directory() -> Iterator[Path]:
    """An empty directory in the spool, while the block lasts. The system's lock on it tells others that it is in use."""
    global _swept_at
    if time.monotonic() - _swept_at > SWEEP_SECONDS:
        _swept_at = time.monotonic()
        threading.Thread(target=sweep, name="spool", daemon=True).start()
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=settings().spool_dir) as name:
        held = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)
            yield Path(name)
        finally:
            os.close(held)


def sweep() -> None:
    """Remove the directories whose processes have died, whenever that was."""
    for left in Path(settings().spool_dir or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, is in use, or is not ours
            if left.stat().st_mtime > time.time() - SWEEP_SECONDS:
                continue
            held = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
                log.info("spool_swept", path=str(left))
            finally:
                os.close(held)
