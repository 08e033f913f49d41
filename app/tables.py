"""The table of a comparison, as GET /comparisons/{id} tells it, in Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any

Told = dict[str, Any]

NOTHING = "–"
MARKDOWN = "\\|`*<["
"""Signs that would make of a name markup, HTML, a link or another cell."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes a cell that begins so for."""
HEADINGS = ["arm", "accuracy", "macro-F1", "Δ macro-F1", "rank", "seen", "trained on", "share", "seconds"]
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "−": "$-$",
}  # fmt: skip
CSV_COLUMNS = [
    "arm", "method", "status", "runs", "accuracy_mean", "accuracy_sd", "macro_f1_mean", "macro_f1_sd",
    "accuracy_difference", "accuracy_difference_low", "accuracy_difference_high",
    "macro_f1_difference", "macro_f1_difference_low", "macro_f1_difference_high",
    "rank", "seen", "selected", "share", "seconds", "gpu_memory_bytes",
]  # fmt: skip


def rows(told: Told) -> list[list[str]]:
    """The table's cells for reading: the teacher, then every arm; scores in per cent, figures without a value as –.

    The first cell of each is a name, which clients choose: a format has to escape it.
    """
    has_gpu = _has_gpu(told)
    lines = []
    for name, teacher in teachers(told).items():
        scores = [f"{100 * teacher[score]:.1f}" for score in ("accuracy", "macro_f1")]
        lines.append([name, *scores] + [NOTHING] * (6 + has_gpu))
    for arm in told["arms"]:
        name = arm["name"] if arm["status"] == "succeeded" else f"{arm['name']} ({arm['status']})"
        line = [name, _spread(arm["accuracy"]), _spread(arm["macro_f1"]), _difference(arm["difference"])]
        line += [_number(arm["rank"], ".1f"), _number(arm["seen"], ",.0f"), _number(arm["selected"], ",.0f")]
        line += [_number(arm["share"], ".1%").replace("%", " %"), _number(arm["seconds"], ".1f")]
        memory = arm["gpu_memory_bytes"]
        lines.append(line + [_number(memory and memory / 2**30, ".1f")] * has_gpu)
    return lines


def teachers(told: Told) -> dict[str, Told]:
    """The scores of the comparison's teacher and of those that arms have of their own, by the name of their row."""
    own = {f"Teacher of {arm['name']}": arm["teacher"] for arm in told["arms"]}
    return {name: scores for name, scores in ({"Teacher": told["teacher"]} | own).items() if scores}


def headings(told: Told) -> list[str]:
    """Of the columns of `rows`."""
    return HEADINGS + ["GPU GiB"] * _has_gpu(told)


def caption(told: Told) -> str:
    """What the table holds, in a sentence or two."""
    arms, seeds = told["arms"], told["spec"]["seeds"]
    drawn = f"mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    runs = [run["status"] for arm in arms for run in arm["runs"]]
    lost = sum(status in ("failed", "cancelled") for status in runs)
    sentence = (
        f"Scores on the test set in per cent, {drawn}. Δ: difference to {arms[0]['name']} with its 95 % paired-bootstrap "
        "interval. Rank: by macro-F1, averaged over the seeds."
    )
    return sentence + (f" {lost} of {len(runs)} runs failed or were cancelled." if lost else "")


def markdown(told: Told) -> str:
    """A table as GitHub reads it."""

    def escaped(text: str) -> str:
        return "".join(f"\\{sign}" if sign in MARKDOWN else sign for sign in _in_a_line(text))

    lines = [headings(told), *([escaped(name), *figures] for name, *figures in rows(told))]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + ["", escaped(caption(told)), ""])


def latex(told: Told) -> str:
    """A `table` with the rules of the package booktabs."""

    def escaped(cell: str) -> str:
        text = "".join(LATEX.get(sign, sign) for sign in _in_a_line(cell))
        return "{}" + text if text.startswith(("[", "*")) else text  # else it were an argument of the rule or \\ above

    lines = [" & ".join(map(escaped, line)) + r" \\" for line in [headings(told), *rows(told)]]
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{escaped(caption(told))}}}", rf"\label{{tab:{told['id']}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(headings(told)) - 1)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
            r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip


def comma_separated(told: Told) -> str:
    """Every figure as it is: shares from 0 to 1, seconds, bytes; what has no value is empty.

    A name that a spreadsheet would take for a formula has an apostrophe before it.
    """

    def harmless(name: str) -> str:
        return f"'{name}" if name.startswith(FORMULA) else name

    sheet = io.StringIO()
    writer = csv.DictWriter(sheet, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for name, teacher in teachers(told).items():
        scores = {f"{score}_mean": teacher[score] for score in ("accuracy", "macro_f1")}
        writer.writerow({"arm": harmless(name), "method": "teacher", **scores})
    for arm in told["arms"]:
        line = {name: arm[name] for name in CSV_COLUMNS if name in arm} | {"arm": harmless(arm["name"])}
        line["runs"] = arm["macro_f1"]["runs"]
        for score in ("accuracy", "macro_f1"):
            line |= {f"{score}_{name}": arm[score][name] for name in ("mean", "sd")}
            if arm["difference"]:
                mean, low, high = (arm["difference"][score][name] for name in ("mean", "low", "high"))
                line |= {f"{score}_difference": mean, f"{score}_difference_low": low, f"{score}_difference_high": high}
        writer.writerow(line)
    return sheet.getvalue()


WRITERS: dict[str, Callable[[Told], str]] = {"markdown": markdown, "csv": comma_separated, "latex": latex}


def _has_gpu(told: Told) -> bool:
    return any(arm["gpu_memory_bytes"] for arm in told["arms"])


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def _spread(figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        return NOTHING
    return f"{100 * figure['mean']:.1f}" + (f" ± {100 * figure['sd']:.1f}" if figure["sd"] is not None else "")


def _difference(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return NOTHING
    mean, low, high = (f"{100 * difference['macro_f1'][name]:+.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]".replace("-", "−")


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
