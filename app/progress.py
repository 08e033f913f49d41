"""A job on the terminal: progress bars while it runs, its scores at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from app import tables
from app.terminal import escape


class _Bars:
    """Named bars on a terminal, while the block lasts; nothing is drawn where there is no terminal."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self._console = console
        self._bars: dict[str, TaskID] = {}
        note = TextColumn("{task.fields[note]}", style="dim")
        self._progress = Progress(*columns, note, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()


class JobProgress(_Bars):
    """Bars for the phases of one job, fed with the job as often as it is looked at.

    Where there is no terminal, a line is printed each time the status or the phase changes.
    """

    def __init__(self, console: Console) -> None:
        name = TextColumn("{task.description:<10}")
        super().__init__(console, name, BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
        self._said = ""

    def update(self, job: dict[str, Any]) -> None:
        """Show the job as it is now."""
        for phase in job["phases"]:
            self._show(phase, job)
        if not self._console.is_terminal:
            self._say(job)

    def _show(self, phase: dict[str, Any], job: dict[str, Any]) -> None:
        name, started, finished = phase["name"], phase["started_at"], phase["finished_at"]
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, start=False, total=phase["total"] or None, note="")
        bar = self._bars[name]
        if started and not self._progress.tasks[list(self._bars).index(name)].started:
            self._progress.start_task(bar)
        done = phase["total"] if finished else phase["done"]
        waiting = "waiting for a worker" if not started and job["status"] == "queued" else ""
        note = training_note(job) if name == "training" else waiting
        self._progress.update(bar, completed=done, total=phase["total"] or None, note=note)
        if finished:
            self._progress.stop_task(bar)

    def _say(self, job: dict[str, Any]) -> None:
        line = job["status"] if job["is_terminal"] else f"{job['status']} {job['phase'] or ''}".strip()
        if line != self._said:
            self._said = line
            self._console.print(f"{job['id']} {line}")


class ComparisonProgress(_Bars):
    """A bar for each arm of a comparison, fed with the comparison as often as it is looked at.

    Where there is no terminal, a line is printed each time a run ends.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, TextColumn("{task.description}"), BarColumn(bar_width=30), TaskProgressColumn())
        self._ended: set[str] = set()

    def update(self, told: dict[str, Any]) -> None:
        """Show the comparison as it is now."""
        for arm in told["arms"]:
            name = arm["name"]
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(escape(name), total=1.0, note="")
            done = sum(run["status"] == "succeeded" for run in arm["runs"])
            note = f"{arm['status']} · {done} of {len(arm['runs'])} seeds"
            if arm["macro_f1"]["mean"] is not None:
                note += f" · macro-F1 {100 * arm['macro_f1']['mean']:.1f}"
            self._progress.update(self._bars[name], completed=arm["progress"], note=note)
            for run in arm["runs"]:
                self._say(name, run)

    def _say(self, name: str, run: dict[str, Any]) -> None:
        if run["status"] not in ("succeeded", "failed", "cancelled") or run["job_id"] in self._ended:
            return
        self._ended.add(run["job_id"])
        if run["error"]:
            reason = f": {run['error']['message']} ({run['error']['code']})"
            self._console.print(escape(f"{name}, seed {run['seed']} {run['status']}{reason}"))
        elif not self._console.is_terminal:
            self._console.print(escape(f"{name}, seed {run['seed']} {run['status']}"))


def comparison_table(told: dict[str, Any]) -> Table:
    """The table of a comparison for the terminal."""
    table = Table(
        title=told["name"] and escape(told["name"]),
        caption=escape(tables.caption(told)),
        title_justify="left",
        caption_justify="left",
    )
    for number, heading in enumerate(tables.headings(told)):
        table.add_column(heading, justify="right" if number else "left")
    for line in tables.rows(told):
        table.add_row(*map(escape, line))
    return table


@contextmanager
def transfer_progress(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for one upload or download; call what is yielded with the bytes done and in all."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=30), DownloadColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def training_note(job: dict[str, Any]) -> str:
    """`24.1 % selected · validation macro-F1 71.20`, as far as it is known."""
    parts = []
    if job["selection"] and job["selection"]["seen"]:
        parts.append(f"{100 * job['selection']['ratio']:.1f} % selected")
    score = job["metrics"].get("validation_macro_f1")
    if score is not None:
        parts.append(f"validation macro-F1 {100 * score:.2f}")
    return " · ".join(parts)


def scores_table(job: dict[str, Any]) -> Table | None:
    """Teacher and student on the test set, or else the validation set; None for a job without scores."""
    evaluation = job["evaluation"] or {}
    sets = [(split, evaluation[split]) for split in ("test", "validation") if evaluation.get(split)]
    scored = [(split, scores) for split, scores in sets if scores["student"] or scores["teacher"]]
    if not scored:
        return None
    split, scores = scored[0]
    what = f"{split} set" if scores["source"] == "dataset" else "pseudo-labeled rows held back"
    title = f"{what}, {(scores['student'] or scores['teacher'])['rows']} rows, in per cent"
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in ("", "accuracy", "macro-F1", "95 % interval of macro-F1"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in ("teacher", "student"):
        if figures := scores.get(model):
            low, high = figures["macro_f1_interval"]
            table.add_row(
                model, *(f"{100 * figures[name]:.2f}" for name in ("accuracy", "macro_f1")),
                f"{100 * low:.2f} to {100 * high:.2f}",
            )  # fmt: skip
    if selection := job["selection"]:
        table.caption = (
            f"{job['method']} trained on {selection['selected']:,} of {selection['seen']:,} rows seen "
            f"({100 * selection['ratio']:.1f} %)"
        )
    return table
