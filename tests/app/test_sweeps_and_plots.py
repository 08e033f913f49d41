"""What the command line makes of a comparison: a grid of arms before it, plots after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from app import plots
from app.plots import draw
from app.sweeps import expand

LLKD = {"name": "LLKD", "method": {"kind": "llkd", "floor": 0.05}}
OTHER = {"name": "LLKD.w", "method": {"kind": "llkd", "weighted": True}, "training": {"epochs": 3}}


def test_a_grid_becomes_an_arm_for_every_combination_and_other_arms_stay() -> None:
    arms = expand([LLKD, OTHER], ["LLKD.momentum=0.5,0.9", "LLKD.class_norm=mean,max"])
    assert [arm["name"] for arm in arms] == [
        "LLKD momentum=0.5 class_norm=mean", "LLKD momentum=0.5 class_norm=max",
        "LLKD momentum=0.9 class_norm=mean", "LLKD momentum=0.9 class_norm=max", "LLKD.w",
    ]  # fmt: skip
    assert arms[2]["method"] == {"kind": "llkd", "floor": 0.05, "momentum": 0.9, "class_norm": "mean"}
    assert arms[4] == OTHER
    assert LLKD["method"] == {"kind": "llkd", "floor": 0.05}, "the arms that were given are left as they are"


def test_options_of_training_and_student_are_swept_too_and_the_longest_name_is_meant() -> None:
    arms = expand([LLKD, OTHER], ["LLKD.w.training.learning_rate=1e-4", "LLKD.w.student.num_layers=2,3"])
    assert [arm["name"] for arm in arms[1:]] == [
        f"LLKD.w training.learning_rate=1e-4 student.num_layers={layers}" for layers in (2, 3)
    ]
    assert arms[1]["training"] == {"epochs": 3, "learning_rate": 1e-4}
    assert arms[2]["student"] == {"num_layers": 3}


@pytest.mark.parametrize("wish", ["LLKD", "LLKD.floor", "LLKD.floor=", "LLKD.floor=1,,2", "nobody.floor=1"])
def test_a_sweep_that_cannot_be_read_is_refused_with_how_to_write_it(wish: str) -> None:
    with pytest.raises(ValueError, match=r"ARM\.OPTION=VALUE,VALUE"):
        expand([LLKD], [wish])


def arm(name: str, jobs: list[str], macro_f1: float | None) -> dict[str, Any]:
    return {
        "name": name, "share": 0.5, "macro_f1": {"mean": macro_f1, "sd": 0.01, "runs": len(jobs)},
        "runs": [{"job_id": job_id, "status": "succeeded"} for job_id in jobs],
    }  # fmt: skip


def series(values: list[float | None]) -> list[dict[str, Any]]:
    return [{"step": 10 * number, "epoch": number + 1.0, "value": value} for number, value in enumerate(values)]


def test_plots_show_every_arm_that_has_the_series_and_nothing_is_drawn_without_one(tmp_path: Path) -> None:
    alone = arm("a teacher alone", [], 0.6) | {"share": None}
    told = {
        "teacher": {"macro_f1": 0.7},
        "arms": [arm("first & best", ["a", "b"], 0.8), arm("failed", [], None), alone],
    }
    metrics = {
        "a": {"ratio": series([0.2, None, 0.4] * 40), "validation_macro_f1": series([0.5, 0.6])},
        "b": {"ratio": series([0.4, 0.3, 0.6] * 40), "validation_macro_f1": series([0.7, 0.6])},
    }
    files = draw(told, metrics, tmp_path / "plots")
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in ("score_by_share", "selected_ratio", "validation_macro_f1") for kind in ("svg", "png")
    }  # fmt: skip
    for file in files:
        if file.suffix == ".svg":
            texts = ElementTree.parse(file).getroot().itertext()
            assert any("first & best" in text for text in texts) or b"first &amp; best" in file.read_bytes(), file.name
        else:
            assert file.read_bytes().startswith(b"\x89PNG")
    assert b"a teacher alone" in (tmp_path / "plots" / "score_by_share.svg").read_bytes()


def test_an_arm_looks_the_same_in_every_plot_and_no_two_look_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def keep(stem: Path, paint: Callable[[Any], None]) -> list[Path]:
        drawn[stem.name] = Figure().add_subplot()
        paint(drawn[stem.name])
        return []

    monkeypatch.setattr(plots, "_save", keep)
    told = {"teacher": None, "arms": [arm(f"arm {number}", [str(number)], 0.8) for number in range(20)]}
    metrics = {str(number): {"ratio": series([0.2, 0.4])} for number in range(20)}
    metrics["7"]["influence_mean"] = metrics["7"]["validation_macro_f1"] = series([0.25, 0.5])
    draw(told, metrics, tmp_path)

    def look(plot: str) -> dict[str, tuple[str, str]]:
        handles, names = drawn[plot].get_legend_handles_labels()
        lines = [getattr(handle, "lines", [handle])[0] for handle in handles]  # an errorbar holds its line
        return {name: (line.get_color(), line.get_marker()) for name, line in zip(names, lines, strict=True)}

    looks = look("selected_ratio")
    assert len(set(looks.values())) == 20
    assert look("score_by_share") == looks
    assert look("influence") == look("validation_macro_f1") == {"arm 7": looks["arm 7"]}
    (line,) = drawn["validation_macro_f1"].get_lines()
    assert list(line.get_ydata()) == [25, 50], "in per cent, as the axis says"
