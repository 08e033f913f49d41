"""A comparison's plots for a paper, drawn where the reader is: SVG and PNG by matplotlib, from what the API tells.

The server draws nothing: its image needs no matplotlib, and the dashboard has charts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

Told = dict[str, Any]
Points = list[dict[str, Any]]
Metrics = dict[str, dict[str, Points]]
"""By job id, then by series."""

SERIES = {
    "ratio": ("selected_ratio", "rows selected, %", "step", 100),
    "influence_mean": ("influence", "mean distillation influence", "step", 1),
    "validation_loss": ("validation_loss", "loss on the validation rows", "epoch", 1),
    "validation_macro_f1": ("validation_macro_f1", "macro-F1 on the validation rows, %", "epoch", 100),
}
"""Series -> the file's name, what it shows, what it is drawn against, and a factor. Drawn where at least one arm has it."""
MARKERS, DASHES = "osD^vP*X", ["-", "--", "-.", ":"]
"""Beside ten colours, so that a print without them can be read and curves that coincide are both seen."""
LEGEND_COLUMNS = 3
SMOOTHED = 40
"""Step series are drawn as means of as many groups of points."""


class NoMatplotlib(Exception):
    """matplotlib is not installed; it comes with `pip install 'understudy[plots]'`."""


def draw(told: Told, metrics: Metrics, folder: Path) -> list[Path]:
    """Draw what there is to draw into `folder`; the files. Raises NoMatplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise NoMatplotlib(NoMatplotlib.__doc__) from None
    matplotlib.use("agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = list(_save(folder / "score_by_share", partial(_score_by_share, told=told)))
    for series, (name, title, against, factor) in SERIES.items():
        lines = {arm["name"]: _mean_line(arm, metrics, series, against, factor) for arm in told["arms"]}
        if any(lines.values()):
            files += _save(folder / name, partial(_lines, lines=lines, title=title, against=against))
    return files


def _style(number: int) -> dict[str, Any]:
    """What an arm is drawn with, in every plot."""
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}


def _save(stem: Path, paint: Callable[[Any], None]) -> Iterator[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    paint(axes)
    shown = axes.get_legend_handles_labels()
    figure.set_figheight(4.2 + 0.2 * math.ceil(len(shown[0]) / LEGEND_COLUMNS))
    figure.legend(*shown, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    for suffix in (".svg", ".png"):
        figure.savefig(stem.with_suffix(suffix), dpi=150)
        yield stem.with_suffix(suffix)


def _score_by_share(axes: Any, told: Told) -> None:
    """Mean macro-F1 and its deviation over the seeds, against the share of the rows seen that was trained on.

    What trained on no rows, a teacher alone, is a line at its score.
    """
    for number, arm in enumerate(told["arms"]):
        if arm["macro_f1"]["mean"] is None:
            continue
        if arm["share"] is None:
            score = 100 * arm["macro_f1"]["mean"]
            axes.axhline(score, color=f"C{number % 10}", linestyle=DASHES[1 + number % 3], label=arm["name"])
        else:
            axes.errorbar(
                100 * arm["share"], 100 * arm["macro_f1"]["mean"], yerr=100 * (arm["macro_f1"]["sd"] or 0), linestyle="",
                capsize=3, label=arm["name"], alpha=0.8, **_style(number),
            )  # fmt: skip
    if teacher := told["teacher"]:
        axes.axhline(100 * teacher["macro_f1"], color="black", linewidth=1, label="Teacher")
    axes.set(xlabel="rows trained on, % of the rows seen", ylabel="macro-F1 on the test rows, %")


def _lines(axes: Any, lines: dict[str, list[tuple[float, float]]], title: str, against: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, points) in enumerate(lines.items()):
        if points:
            style = _style(number) | {"linestyle": DASHES[number % len(DASHES)], "markersize": 5}
            axes.plot(*zip(*points, strict=True), label=name, markevery=max(1, len(points) // 10), **style)
    axes.set(xlabel=against, ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mean_line(arm: Told, metrics: Metrics, series: str, against: str, factor: float) -> list[tuple[float, float]]:
    """`factor` times the mean over the arm's seeds at each place that all of them have."""
    runs = [
        {point[against]: point["value"] for point in metrics.get(run["job_id"], {}).get(series, [])}
        for run in arm["runs"]
        if run["status"] == "succeeded"
    ]
    if not runs or not all(runs):
        return []
    places = sorted(set.intersection(*(set(run) for run in runs)))
    means = [
        (place, factor * sum(run[place] for run in runs) / len(runs))
        for place in places
        if all(run[place] is not None for run in runs)
    ]
    return means if against == "epoch" else _smoothed(means)


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that a series that jumps from batch to batch can be read."""
    ends = [round(number * len(points) / SMOOTHED) for number in range(SMOOTHED + 1)]
    groups = [points[start:stop] for start, stop in pairwise(ends) if stop > start]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
