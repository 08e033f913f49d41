"""What a long benchmark has on record: every run is written down as it ends, and none that is there is made again.

A record is a JSON file with the options that its figures depend on and a list of runs. With other options it begins anew.
So a benchmark may be stopped (Ctrl-C or SIGTERM) and started at will, on this machine or another.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from app.client import Client

Run = dict[str, Any]
"""`data`, `method` and `seed` tell one from another; the rest is what came of it."""


def identity(run: Run) -> tuple[str, str, int]:
    """What tells one run from another; sorts by data set, method and seed."""
    return run["data"], run["method"], run["seed"]


class Record:
    """The runs of one file, made with one set of options."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self._path, self._options = path, options
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"options": None}
        self.runs: list[Run] = known["runs"] if known["options"] == options else []

    def missing(self, wanted: Iterable[Run]) -> list[Run]:
        """Those of the wanted runs that are not on record, in their order."""
        known = {identity(run) for run in self.runs}
        return [run for run in wanted if identity(run) not in known]

    def add(self, run: Run) -> None:
        """Write a run down."""
        self.runs.append(run)
        self.runs.sort(key=identity)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"options": self._options, "runs": self.runs}, indent=1) + "\n")


def end_by_interrupt() -> None:
    """Let SIGTERM and SIGINT end the benchmark as Ctrl-C does; a shell starts what runs in the background without either."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


# --- runs through the service -----------------------------------------------------------------------------------------


@contextmanager
def serving(data_dir: Path, workers: int) -> Iterator[Client]:
    """`understudy up` on `data_dir` for as long as the block lasts, and a client with its first key."""
    understudy = str(Path(sys.executable).parent / "understudy")
    places = ["--port", "0", "--data-dir", str(data_dir), "--workers", str(workers)]
    server = subprocess.Popen([understudy, "up", *places], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline().split()
        if ready[:1] != ["ready"]:
            sys.exit("the server did not start")
        with Client(ready[1], (data_dir / "api-key").read_text().strip()) as client:
            yield client
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def upload(client: Client, name: str, rows: list[dict[str, str]]) -> str:
    """Upload rows and return the dataset's id."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(client.upload(path, name=name)["id"])


def find_or_submit(client: Client, spec: dict[str, Any], tags: dict[str, str]) -> str:
    """The job with these tags and this training, method and student that has not failed, or a new one."""
    filters = {f"metadata[{name}]": value for name, value in tags.items()}
    parts = [part for part in ("training", "method", "student") if part in spec]
    for job in client.jobs(**filters):
        same = all(_holds(job["spec"][part], spec[part]) for part in parts)
        if same and job["status"] not in ("failed", "cancelled"):
            return str(job["id"])
    return str(client.submit({**spec, "metadata": tags})["id"])


def _holds(whole: Any, part: Any) -> bool:
    """Whether an option is as wished, whatever else it says."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_holds(whole.get(name), value) for name, value in part.items())
    return bool(whole == part)


def finished(client: Client, runs: list[Run], workers: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Every run and its job, named in `job`, as it succeeds; a failed one ends the benchmark with its reason.

    Jobs begin in the order of the runs, so only the first of those that have not ended are looked at.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    waiting = list(runs)
    with Progress(*columns) as progress:
        task = progress.add_task("jobs", total=len(runs))
        while waiting:
            for run in waiting[: workers + 1]:
                job = client.job(run["job"])
                if not job["is_terminal"]:
                    continue
                if job["status"] != "succeeded":
                    sys.exit(f"{run['job']} {job['status']}: {job['error']}")
                waiting.remove(run)
                progress.advance(task)
                yield run, job
            time.sleep(2)


# --- words ------------------------------------------------------------------------------------------------------------


def whole_seeds(runs: list[Run]) -> list[Run]:
    """The runs of the seeds that every method on record has on every data set; all runs where there is no such seed.

    Rows of a table that is still growing would otherwise be means over different seeds.
    """
    wanted = {(run["data"], run["method"]) for run in runs}
    whole = {s for s in {run["seed"] for run in runs} if {identity(r)[:2] for r in runs if r["seed"] == s} == wanted}
    return [run for run in runs if run["seed"] in whole] or runs


def spread(values: list[float]) -> str:
    """Mean ± standard deviation of values that are given as shares, in per cent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def table(headings: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return ["", *(f"| {' | '.join(cells)} |" for cells in [headings, ["---"] * len(headings), *rows])]
