"""What the terminal shows of a job."""

from __future__ import annotations

from typing import Any

from app.progress import scores_table


def test_a_teacher_that_is_scored_alone_has_its_row_on_the_set_that_it_answered() -> None:
    teacher = {"rows": 18, "accuracy": 0.5, "macro_f1": 0.4, "macro_f1_interval": [0.3, 0.5]}
    nobody: dict[str, Any] = {"source": "dataset", "student": None, "teacher": None}
    evaluation = {"validation": nobody | {"teacher": teacher}, "test": nobody}
    table = scores_table({"method": "teacher_alone", "evaluation": evaluation, "selection": None})
    assert table is not None
    assert (table.title, table.row_count) == ("validation set, 18 rows, in per cent", 1)
    assert scores_table({"evaluation": {"validation": None, "test": nobody}}) is None
