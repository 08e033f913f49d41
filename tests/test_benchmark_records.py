"""What the long benchmarks have on record: made once, ranked fairly, and written as a page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import lgtm_results, lgtm_search
from benchmarks.record import Record

OPTIONS = {"rows": 8, "epochs": 1, "batch_size": 4, "validation_rows": 4, "test_rows": 4, "shots": 1, "max_length": 8, "learning_rate": 1e-3}  # fmt: skip


def wanted(*names: str) -> list[dict[str, Any]]:
    return [{"data": name, "method": "KD", "seed": seed} for name in names for seed in (0, 1)]


def test_a_run_on_record_is_not_made_again_unless_the_options_differ(tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    first = Record(path, OPTIONS)
    assert first.missing(wanted("rte", "mrpc")) == wanted("rte", "mrpc")
    first.add({**wanted("rte")[1], "accuracy": 0.5})
    again = Record(path, OPTIONS)
    assert again.missing(wanted("rte", "mrpc")) == [wanted("rte")[0], *wanted("mrpc")]
    again.add({**wanted("mrpc")[0], "accuracy": 0.25})
    assert [run["accuracy"] for run in json.loads(path.read_text())["runs"]] == [0.25, 0.5], "sorted by data set"
    assert Record(path, OPTIONS | {"rows": 9}).missing(wanted("rte")) == wanted("rte")


def made(name: str, method: str, seed: int, score: float) -> dict[str, Any]:
    loss = [[4, 0.7], [8, 0.6]]
    run = {"data": name, "method": method, "seed": seed, "accuracy": score, "macro_f1": score, "f1": 1 - score}
    return {**run, "ratio": 1.0, "seconds": 2.0, "validation_loss": loss}


def test_methods_are_ranked_by_each_set_s_own_score_where_all_have_run(tmp_path: Path) -> None:
    runs = [made(name, method, 0, score) for name in ("mrpc", "rte") for method, score in (("KD", 0.8), ("LGTM", 0.6))]
    runs += [made("rte", "DML", 0, 0.9), made("mrpc", "Teacher alone", 0, 0.9)]
    ranks = lgtm_results.average_ranks(runs, ["mrpc", "rte"], lgtm_results.PAIRS)
    assert ranks == {"KD": 1.5, "LGTM": 1.5}, "KD is first by accuracy on rte and second by F1 on mrpc; DML has no mrpc"
    page = lgtm_results.document({"options": OPTIONS, "runs": runs})
    (line,) = [line for line in page.splitlines() if line.startswith("| LGTM |")]
    assert line == "| LGTM | 40.0 | 60.0 | 60.0 | 60.0 | 60.0 | 1.5 | 2.0 | 4 |"
    pytest.importorskip("matplotlib")
    lgtm_results.plot({"options": OPTIONS, "runs": runs}, tmp_path / "plot.svg")
    assert b"Teacher alone" in (tmp_path / "plot.svg").read_bytes()


def test_an_arm_without_a_teacher_has_no_score_of_one(tmp_path: Path) -> None:
    record = Record(tmp_path / "search.json", OPTIONS)
    for seed in range(2):
        run = {"data": "rte", "method": "student alone", "seed": seed, "student": 0.5, "teacher": math.nan, "loss": 0.7}
        record.add({**run, "seconds": 3.0})
    assert lgtm_search.row("student alone", "rte", record) == ["student alone", "50.0 ± 0.0", "–", "0.700", "3"]
