"""Several processes of one machine train one job: this one, which holds the job, and followers that only compute.

A follower begins with a copy of the run and goes through the same loop, sharing out the rows of every step (shares.py). It
reports and saves nothing and holds nothing that the run does not, so it may be ended at any moment: together with the training
in this process, for whatever reason that ends, and with this process itself. docs/decisions/0007 says why.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import structlog
import torch
from torch import distributed

from app.config import settings
from app.lifecycle import LeaseLost, WorkFailed
from app.options import Method, Training
from workers import memory
from workers.failures import failure_of
from workers.reporter import GivenUp, MemoryReporter, Report, Stopped
from workers.training.run import HeldOut, Pool, Run

log = structlog.get_logger()

WAIT_AT_MOST = timedelta(minutes=30)
"""How long a process waits for the others within a step: longer than the storage or the database may keep this one."""
LAST_WORDS_SECONDS = 5.0
"""How long a follower that failed may take to say why."""


def how_many() -> int:
    """Processes of a training on this machine: `processes` of the settings, and at most one for each GPU where there are any."""
    gpus = torch.cuda.device_count()
    wanted = settings().processes
    return min(wanted or gpus, gpus) if gpus else wanted or 1


@contextmanager
def together(
    processes: int, run: Run, pool: Pool, held_out: HeldOut, labels: list[str], method: Method, training: Training,
    report: Report,
) -> Iterator[None]:  # fmt: skip
    """Within the block, a `distill` with the same arguments is done by so many processes.

    Raises WorkFailed with what a follower failed of, and LeaseLost when one was killed: the job then goes on from its last
    saved state, as after the loss of this process.
    """
    if processes == 1:
        yield
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=settings().spool_dir)))
        payload = (run, pool, held_out, labels, method, training)
        torch.save(payload, directory / "training.pt", pickle_protocol=5)
        threads = stack.enter_context(_fewer_threads(processes))
        followers = Followers(directory, processes, threads)
        try:
            followers.start(report)
            stack.enter_context(_group(directory, 0, processes, run.student.model.device))
            report.event("training.processes", f"{processes} processes train together.", processes=processes)
            yield
            followers.wait()
        except (Stopped, GivenUp, LeaseLost):
            raise
        except Exception as error:
            reason = followers.why(error)
            if reason is error:
                raise
            raise reason from error
        finally:
            followers.end()  # before the group, so that none of them meets its end


@dataclass
class Followers:
    """The other processes of a training."""

    directory: Path
    """Where they find their copy of the training, and say that they are ready or why they failed."""
    processes: int
    threads: int
    """CPU threads of each."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, report: Report) -> None:
        """Start them and wait until each has read its copy; the report is asked meanwhile. Raises RuntimeError."""
        for rank in range(1, self.processes):
            command = [sys.executable, "-m", "workers.training.processes"]
            self.started.append(
                subprocess.Popen(
                    [*command, str(self.directory), str(rank), str(self.processes)],
                    stdin=subprocess.PIPE,  # closed when this process ends, however it ends: a follower ends with it
                    start_new_session=True,  # Ctrl-C is for this process, which then saves
                    env=os.environ | {"OMP_NUM_THREADS": str(self.threads)},
                )
            )
        while not all((self.directory / f"ready-{rank}").exists() for rank in range(1, self.processes)):
            report.check()
            if any(follower.poll() is not None for follower in self.started):
                raise RuntimeError("a process of the training ended before it began")
            time.sleep(0.05)

    def wait(self) -> None:
        """Let them come to the end of a training that this process has ended."""
        for follower in self.started:
            try:
                follower.wait(30)
            except subprocess.TimeoutExpired:
                log.warning("follower_did_not_end", pid=follower.pid)

    def why(self, error: Exception) -> Exception:
        """What ended the training: what a follower failed of, the loss of one, or else the error here."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        # One that fails takes the others with it, and need not be the first to have ended.
        while isinstance(error, RuntimeError) and time.monotonic() < deadline and self._are_left():
            time.sleep(0.05)
        said = {rank: self.directory / f"failure-{rank}.json" for rank in self._failed()}
        failures = [json.loads(path.read_text()) for path in said.values() if path.exists()]
        # One that met the end of another, or of this process, has only an error of ours to tell.
        for failure in failures:
            if failure["code"] != "internal_error":
                return WorkFailed(failure["code"], failure["message"])
        if len(failures) < len(said):
            log.error("follower_lost", ranks=list(said))
            return LeaseLost()
        return WorkFailed(failures[0]["code"], failures[0]["message"]) if failures else error

    def _are_left(self) -> bool:
        return any(follower.poll() is None for follower in self.started)

    def _failed(self) -> list[int]:
        return [rank for rank, follower in enumerate(self.started, start=1) if follower.poll() not in (None, 0)]

    def end(self) -> None:
        """End those that are left."""
        for follower in self.started:
            follower.kill()
            follower.wait()
            if follower.stdin is not None:
                follower.stdin.close()


def follow(directory: Path, rank: int, processes: int) -> None:
    """The life of a follower: go through the training that lies in `directory`."""
    from workers.training.distill import distill

    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    path, where = directory / "training.pt", {"cuda:0": str(device)}
    # A file of the process that started this one.
    run, pool, held_out, labels, method, training = torch.load(path, weights_only=False, map_location=where)
    (directory / f"ready-{rank}").touch()
    with _group(directory, rank, processes, device):
        distill(run, pool, held_out, labels, method, training, MemoryReporter())


@contextmanager
def _group(directory: Path, rank: int, processes: int, device: torch.device) -> Iterator[None]:
    """Belong to the processes of a training, on this machine's own network."""
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    network = {f"{library}_SOCKET_IFNAME": loopback for library in ("GLOO", "NCCL")} if loopback else {}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    # accelerate wants to be told these, and would choose them; nothing listens there, as the processes meet in a file.
    rest = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "OMP_NUM_THREADS": torch.get_num_threads()}
    with patch_environment(**{**network, **ranks, **rest}):
        PartialState._reset_state()  # a library that asked before found one process
        PartialState(
            cpu=device.type == "cpu", init_method=(directory / "meeting").as_uri(), rank=rank, world_size=processes,
            timeout=WAIT_AT_MOST,
        )  # fmt: skip
        try:
            yield
        finally:
            distributed.destroy_process_group()
            PartialState._reset_state()


@contextmanager
def _fewer_threads(processes: int) -> Iterator[int]:
    """Share the CPU threads of this process among the processes; how many each has."""
    before = torch.get_num_threads()
    each = max(1, before // processes)
    torch.set_num_threads(each)
    try:
        yield each
    finally:
        torch.set_num_threads(before)


def _end_with_parent() -> None:
    """Until the process that started this one closes its end of the pipe, or is gone."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> None:
    """`python -m workers.training.processes DIRECTORY RANK PROCESSES`: what `together` starts."""
    directory, rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # A service manager may tell all processes to end; the one that holds the job does so in order, and ends this one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory.keep_freed()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        follow(directory, rank, processes)
    except Exception as error:
        failure = failure_of(error, "internal_error")
        text = json.dumps({"code": failure.code, "message": failure.message})
        (directory / f"failure-{rank}.json").write_text(text)
        raise


if __name__ == "__main__":
    main()
