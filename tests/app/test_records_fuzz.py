"""Whatever bytes are sent, the reader answers with rows or with a problem a client can read, never with a crash."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import Problem
from app.formats import Format
from app.records import Ingested, ingest, read_rows
from app.rows import Limits

LIMITS = Limits(max_decompressed_bytes=200_000, max_line_bytes=500, max_rows=50, max_columns=8, max_text_characters=100)
FORMATS: list[Format] = ["jsonl", "csv", "tsv", "parquet"]
PLAIN = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=1, max_size=40)
TEXT = PLAIN.filter(lambda text: not text.isspace())
fast = settings(max_examples=100, deadline=None)


def check_answer(problem: Problem) -> None:
    """It can be sent: short, the client's fault, and valid UTF-8 (orjson refuses anything else)."""
    assert len(orjson.dumps([problem.detail, problem.errors])) < 100_000
    assert 400 <= problem.status < 500
    assert len(problem.detail) < 3000


def take(content: bytes, format: Format, on_error: Any = "reject") -> tuple[Ingested, list[dict[str, Any]]] | Problem:
    with tempfile.TemporaryDirectory() as directory:
        source, sink = Path(directory) / "upload", Path(directory) / "rows.parquet"
        source.write_bytes(content)
        try:
            found = ingest(source, sink, format=format, on_error=on_error, limits=LIMITS)
        except Problem as problem:
            check_answer(problem)
            return problem
        rows = read_rows(sink).to_pylist()
        assert found.rows == len(rows) > 0
        assert all(row["text"].strip() and "\x00" not in row["text"] for row in rows)
        return found, rows


def a_parquet_file() -> bytes:
    file = io.BytesIO()
    rows = [{"text": f"t{number}", "label": "x", "distribution": {"x": 0.5, "y": 0.5}} for number in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    return file.getvalue()


PARQUET = a_parquet_file()


@fast
@given(st.binary(max_size=400), st.sampled_from(FORMATS), st.sampled_from(["reject", "skip"]), st.booleans())
def test_any_bytes_are_answered(content: bytes, format: Format, on_error: str, packed: bool) -> None:
    take(gzip.compress(content) if packed else content, format, on_error)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["text", "text_pair", "label", "confidence", "distribution"]) | st.text(max_size=5)


@fast
@given(st.lists(st.dictionaries(NAMES, JSON_VALUES, max_size=6) | JSON_VALUES, max_size=6))
def test_any_json_rows_are_answered(rows: list[Any]) -> None:
    take("".join(json.dumps(row) + "\n" for row in rows).encode(), "jsonl", "skip")


@fast
@given(
    st.lists(
        st.sampled_from(["text", "label", '"', ",", "\n", "\r\n", "\r", "a", " ", "\x00", "é", "{", "1"]), max_size=40
    )
)
def test_any_csv_is_answered(parts: list[str]) -> None:
    take(("text,label\n" + "".join(parts)).encode(), "csv", "skip")


@fast
@given(st.integers(0, len(PARQUET) - 1), st.integers(0, 255), st.integers(0, len(PARQUET) - 1), st.integers(0, 255))
def test_a_damaged_parquet_file_is_answered(first: int, one: int, second: int, two: int) -> None:
    content = bytearray(PARQUET)
    content[first], content[second] = one, two
    take(bytes(content), "parquet", "skip")


@fast
@given(st.integers(0, len(PARQUET)))
def test_a_parquet_file_that_was_cut_is_refused(length: int) -> None:
    if length < len(PARQUET):
        assert isinstance(take(PARQUET[:length], "parquet"), Problem)


@fast
@given(st.lists(st.tuples(TEXT, st.none() | TEXT, st.none() | TEXT), min_size=1, max_size=8))
def test_good_rows_come_back_unchanged(rows: list[tuple[str, str | None, str | None]]) -> None:
    content = "".join(json.dumps({"text": t, "text_pair": p, "label": la}) + "\n" for t, p, la in rows).encode()
    answer = take(content, "jsonl")
    assert not isinstance(answer, Problem)
    found, kept = answer
    assert [(row["text"], row["text_pair"], row["label"]) for row in kept] == rows
    assert found.duplicates == len(rows) - len({(text, pair) for text, pair, _ in rows})
