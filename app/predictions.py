"""A run's answers on the test set, row by row: what two runs are compared by; at `jobs/<id>/predictions.parquet`."""

from __future__ import annotations

from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("gold", _NAME),
        ("student", _NAME),
        ("confidence", pa.float32()),
        ("teacher", _NAME),
    ]
)
"""One row for each test row that has a true label. `student` or `teacher` is null where it gave no answer."""


def key(job_id: str) -> str:
    """Where a job's answers lie in the storage."""
    return f"jobs/{job_id}/predictions.parquet"


def read(stream: IO[bytes]) -> pa.Table:
    """The whole table, in the order of the test set."""
    return pq.read_table(stream, schema=SCHEMA)
