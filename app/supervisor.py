"""Child processes that log to a file, die with their parent, are started again when they end, and stop when told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
STOP_SECONDS = 10.0
"""How long a child may take to end by itself before it is killed."""
FIRST_PAUSE, LONGEST_PAUSE, HEALTHY_SECONDS = 0.5, 30.0, 60.0


class Child:
    """One process: its command, where its output goes, and how it is asked to stop."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
        stdin: str = "",
        stop_signal: signal.Signals = signal.SIGTERM,
        orphan_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        """`stdin` is what the process reads; `orphan_signal` is what it gets when its parent is killed (Linux)."""
        self.name, self.command, self.log = name, list(command), log
        self.environment, self.user, self.stdin = environment, user, stdin
        self.stop_signal, self.orphan_signal = stop_signal, orphan_signal
        self.process: subprocess.Popen[str] | None = None
        self.started_at = 0.0
        self.restart_at: float | None = None
        self.pause = FIRST_PAUSE

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id, also after the end; None before the first start."""
        return self.process.pid if self.process else None

    def start(self) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches its parent alone."""
        privileges: dict[str, Any] = {"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                preexec_fn=_die_with_parent(self.orphan_signal),
                **privileges,
            )
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(self.stdin)
            self.process.stdin.close()
        self.started_at = time.monotonic()
        self.restart_at = None

    def ask_to_stop(self) -> None:
        """Send the stop signal; the process may take its time."""
        if self.is_running:
            self._signal(self.stop_signal)

    def kill(self) -> None:
        """End the process and everything it has started, at once."""
        self._signal(signal.SIGKILL, whole_group=True)
        if self.process is not None:
            self.process.wait()

    def _signal(self, number: signal.Signals, *, whole_group: bool = False) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(self.process.pid, number)

    def last_lines(self, count: int = 5) -> str:
        """The end of the log, for an error message."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        return ""


def stop(children: Iterable[Child], seconds: float = STOP_SECONDS) -> None:
    """Ask all to stop, wait for them together, and kill those that are still there after `seconds`."""
    running = [child for child in children if child.process is not None]
    for child in running:
        child.ask_to_stop()
    deadline = time.monotonic() + seconds
    while any(child.is_running for child in running) and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in running:
        child.kill()


def restart_ended(children: Iterable[Child], report: Callable[[str], None]) -> None:
    """Start again what has ended, each time after a longer pause while it does not stay up for a minute."""
    for child in children:
        if child.is_running:
            continue
        now = time.monotonic()
        if child.restart_at is None:
            if now - child.started_at > HEALTHY_SECONDS:
                child.pause = FIRST_PAUSE
            status = child.process.returncode if child.process else None
            report(f"{child.name} ended with status {status}; starting it again in {child.pause:g} s (see {child.log})")
            child.restart_at = now + child.pause
            child.pause = min(child.pause * 2, LONGEST_PAUSE)
        elif now >= child.restart_at:
            child.start()


def _die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """What the child runs before its command so that it gets `number` when its parent dies; Linux only."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def arrange() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died between the fork and this line
            os._exit(1)

    return arrange
