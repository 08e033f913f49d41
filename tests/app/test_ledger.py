"""The samples ledger as it is read: filters, orders and pages against a slow version, over many row groups."""

from __future__ import annotations

import io
import random
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import ledger

LABELS = ["cooking", "sports"]


def entries(count: int) -> list[dict[str, Any]]:
    """Ledger rows with many equal values, and some without."""
    luck = random.Random(0)
    rows = []
    for number in range(count):
        label = luck.choice([*LABELS, None])
        selected = luck.randrange(3)
        rows.append(
            {
                "row": number, "line": number + 2, "text": f"text {number}", "text_pair": None, "label": label,
                "confidence": None if label is None else luck.choice([0.5, 0.75, 1.0]),
                "distribution": None if label is None else [0.25, 0.75], "source": None if label is None else "cache",
                "offered": 3, "selected": selected, "decision": "selected" if selected else "rejected",
                "reason": "selected", "teacher_threshold": float("nan"), "student_threshold": None,
                "student_uncertainty": luck.choice([None, 0.5, 1.5]), "influence": luck.choice([None, -0.5, 0.25]), "error": None,
            }
        )  # fmt: skip
    return rows


def stream(rows: list[dict[str, Any]]) -> io.BytesIO:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, ledger.SCHEMA), sink, row_group_size=7)
    sink.seek(0)
    return sink


def slow(rows: list[dict[str, Any]], decision: str | None, label: str | None, order: str) -> list[int]:
    """The numbers of the rows that are wanted, in order."""
    field = order.lstrip("-")
    kept = [row for row in rows if decision in (None, row["decision"]) and label in (None, row["label"])]
    sign = -1 if order.startswith("-") else 1
    known = sorted((row for row in kept if row[field] is not None), key=lambda row: (sign * row[field], row["row"]))
    return [row["row"] for row in known + [row for row in kept if row[field] is None]]


@pytest.mark.parametrize("order", get_args(ledger.Order))
def test_pages_of_every_order_and_filter_are_what_a_plain_sort_gives(order: ledger.Order) -> None:
    rows = entries(50)
    for decision in (None, "selected", "rejected"):
        for label in (None, "sports", "absent"):
            found: list[int] = []
            more = True
            while more:
                part, more = ledger.page(
                    stream(rows), LABELS, decision=decision, label=label, order=order, start=len(found), limit=8
                )
                assert len(part) == 8 or not more
                found += [row["row"] for row in part]
            assert found == slow(rows, decision, label, order)


def test_a_row_is_shown_with_names_instead_of_positions_and_without_nan() -> None:
    rows = entries(20)
    shown, _ = ledger.page(stream(rows), LABELS, decision=None, label=None, order="row", start=0, limit=20)
    labeled = next(row for row in shown if row["label"] is not None)
    assert labeled["distribution"] == {"cooking": 0.25, "sports": 0.75}
    unlabeled = next(row for row in shown if row["label"] is None)
    assert (unlabeled["distribution"], unlabeled["source"]) == (None, None)
    assert {row["teacher_threshold"] for row in shown} == {None}


def test_a_page_beyond_the_end_is_empty() -> None:
    shown, more = ledger.page(stream(entries(3)), LABELS, decision=None, label=None, order="row", start=3, limit=5)
    assert (shown, more) == ([], False)
