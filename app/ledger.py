"""The samples ledger: one Parquet row for each train row, telling what the teacher said and why the row was used or not.

Workers write it at the end of every epoch (`jobs/<id>/samples.parquet`); GET /jobs/{id}/samples reads it.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from app.records import rows_at

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("line", pa.int64()),
        ("text", pa.string()),
        ("text_pair", pa.string()),
        ("label", pa.string()),
        ("confidence", pa.float32()),
        ("distribution", pa.list_(pa.float32())),
        ("source", pa.string()),
        ("offered", pa.int32()),
        ("selected", pa.int32()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("teacher_threshold", pa.float32()),
        ("student_threshold", pa.float32()),
        ("student_uncertainty", pa.float32()),
        ("influence", pa.float32()),
        ("influence_trend", pa.list_(pa.float32())),
        ("student_label", pa.string()),
        ("student_confidence", pa.float32()),
        ("encoder_teacher_label", pa.string()),
        ("encoder_teacher_confidence", pa.float32()),
        ("error", pa.string()),
    ]
)

Order = Literal[
    "row", "-row", "confidence", "-confidence", "student_uncertainty", "-student_uncertainty", "selected", "-selected",
    "influence", "-influence",
]  # fmt: skip
"""What the rows may be ordered by; `-` puts the largest first. Rows without the value come last."""


def key(job_id: str) -> str:
    """Where a job's ledger lies in the storage."""
    return f"jobs/{job_id}/samples.parquet"


def page(
    stream: BinaryIO,
    labels: list[str],
    *,
    decision: str | None,
    label: str | None,
    order: Order,
    start: int,
    limit: int,
) -> tuple[list[dict[str, Any]], bool]:
    """`limit` rows from position `start` of the ordered, filtered ledger, and whether there are more."""
    file = pq.ParquetFile(stream)
    column, descending = order.lstrip("-"), order.startswith("-")
    filters = {name: wanted for name, wanted in (("decision", decision), ("label", label)) if wanted is not None}
    # Only what decides: a ledger may have millions of rows.
    narrow = file.read(columns=sorted({*filters, column} - {"row"}))
    positions: Any = range(file.metadata.num_rows)
    if filters:
        matches = [pc.fill_null(pc.equal(narrow.column(name), wanted), False) for name, wanted in filters.items()]
        mask = reduce(pc.and_, matches)
        narrow, positions = narrow.filter(mask), np.flatnonzero(mask)
    places: Any = range(len(positions))
    if column == "row":
        ordered = places[::-1] if descending else places
    else:
        # Equal values stay in row order, so that pages never overlap.
        table = pa.table({"value": narrow.column(column), "place": np.arange(len(positions))})
        direction = "descending" if descending else "ascending"
        ordered = pc.sort_indices(table, sort_keys=[("value", direction, "at_end"), ("place", "ascending", "at_end")])
    chosen = [int(positions[place]) for place in np.asarray(ordered[start : start + limit])]
    rows = rows_at(stream, chosen)
    for row in rows:
        distribution = row["distribution"]
        row["distribution"] = None if distribution is None else dict(zip(labels, distribution, strict=True))
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                row[name] = None
    return rows, start + limit < len(positions)
