"""The workers' Celery application: which tasks there are, and how a worker process is set up and shut down."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from typing import Any

from celery import Celery
from celery.signals import task_postrun, worker_process_init, worker_ready, worker_shutting_down

from app.config import settings
from app.logs import configure_logging
from app.queue import configure
from workers import memory

celery = Celery("understudy", broker=settings().redis_url, include=["workers.tasks"])
configure(celery)
celery.conf.update(
    task_queues=None,
    # No limit, and still one at a time, because the solo pool runs a message before it fetches the next. With a limit of
    # one, a message whose acknowledgement fails, as Redis was killed meanwhile, counts as held for ever: the worker would
    # stay connected and never fetch another.
    worker_prefetch_multiplier=0,
    # Acknowledged when received: a training may run for days, and the lease, not the broker, brings it back.
    task_acks_late=False,
    worker_hijack_root_logger=False,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry=True,
    broker_connection_max_retries=None,
)

stopping = threading.Event()
"""Set when this process was asked to stop: running work saves its state and gives its job back."""


@worker_shutting_down.connect
def _ask_to_stop(**_: Any) -> None:
    stopping.set()


_is_worker = threading.Event()


@worker_ready.connect
def _note_worker(**_: Any) -> None:
    _is_worker.set()


@worker_ready.connect
@worker_process_init.connect
def _set_up(**_: Any) -> None:
    configure_logging()
    memory.keep_freed()


@task_postrun.connect
def _tidy_up(**_: Any) -> None:
    memory.give_back()


def begin_anew() -> None:
    """Replace this worker by a fresh one, in the same process: nothing else ends what hangs in one of its threads.

    Does nothing where the caller is no worker. A worker that was asked to shut down ends instead.
    """
    if not _is_worker.is_set():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if not stopping.is_set():
        with contextlib.suppress(OSError):
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    os._exit(1)


def worker_name() -> str:
    """Who holds a lease: host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"
