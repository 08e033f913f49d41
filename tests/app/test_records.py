"""Dataset files: what is read from them, what is refused and where, and what hostile ones cost."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app import records
from app.errors import EmptyFile, InvalidRows, Problem, TooLarge, UnknownColumn, UnreadableFile, UnsupportedMedia
from app.formats import Format
from app.records import Ingested, ingest, ingest_apart, read_rows, rows_at
from app.rows import Columns, Limits
from tests.support import shared_data, wait_until

SMALL = Limits(max_decompressed_bytes=1_000_000, max_line_bytes=10_000, max_rows=10_000, max_text_characters=5_000)


@pytest.fixture
def sink(tmp_path: Path) -> Path:
    return tmp_path / "rows.parquet"


def take(sink: Path, content: bytes, format: Format = "jsonl", **options: Any) -> Ingested:
    source = sink.with_name("upload")
    source.write_bytes(content)
    return ingest(source, sink, format=format, **options)


def texts_in(sink: Path, start: int = 0, stop: int | None = None) -> list[str]:
    return read_rows(sink, start, stop, ["text"])["text"].to_pylist()


def packed(content: bytes) -> bytes:
    """The content gzipped, the same bytes at any time: they are part of a test's name."""
    return gzip.compress(content, mtime=0)


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(rows), file, **options)
    return file.getvalue()


def faults(sink: Path, content: bytes, format: Format = "jsonl", **options: Any) -> list[tuple[Any, Any, Any]]:
    """(line, pointer, code) of each bad row."""
    with pytest.raises(InvalidRows) as caught:
        take(sink, content, format, **options)
    assert caught.value.total_errors >= len(caught.value.errors) > 0
    return [(fault["line"], fault["pointer"], fault["code"]) for fault in caught.value.errors]


@contextmanager
def at_most(megabytes: int, seconds: float) -> Iterator[None]:
    """The block's memory peak and its processor time stay below these."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < megabytes
    assert time.process_time() - began < seconds


# --- what is read ---------------------------------------------------------------------------------------------------


def test_a_row_keeps_all_its_parts(sink: Path) -> None:
    found = take(
        sink,
        jsonl(
            {"text": "a", "text_pair": "b", "label": "x", "confidence": 0.75, "distribution": {"x": 0.75, "y": 0.25}}
        ),
    )
    assert (found.rows, found.has_text_pair, found.label_counts) == (1, True, {"x": 1, "y": 0})
    assert read_rows(sink).to_pylist() == [
        {"text": "a", "text_pair": "b", "label": "x", "confidence": 0.75, "distribution": [("x", 0.75), ("y", 0.25)],
         "line": 1}
    ]  # fmt: skip


def test_every_format_gives_the_same_rows(sink: Path) -> None:
    rows = [{"text": 'a,\t"b"\nc', "label": "x"}, {"text": "é 😀", "label": None}, {"text": "d", "label": "y"}]
    files: dict[Format, bytes] = {"jsonl": jsonl(*rows), "parquet": parquet(pa.Table.from_pylist(rows))}
    for format, delimiter in (("csv", ","), ("tsv", "\t")):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "label"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        files[format] = text.getvalue().encode()  # type: ignore[index]
    for format, content in files.items():
        for form in (content, packed(content)):
            assert take(sink, form, format).rows == 3
            assert read_rows(sink, columns=["text", "label"]).to_pylist() == rows


def test_a_record_is_named_by_the_line_it_begins_on(sink: Path) -> None:
    take(sink, b'text,label\r\n"two\r\nlines",x\r\n\r\nnext,y\r\n', "csv")
    assert read_rows(sink)["line"].to_pylist() == [2, 5]
    take(sink, b'\n{"text": "a"}\n   \n{"text": "b"}')
    assert read_rows(sink)["line"].to_pylist() == [2, 4]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1, "1"),
        (1.0, "1"),
        (0.5, "0.5"),
        (True, "true"),
        (-3, "-3"),
        ("", None),
        (" ", None),
        (None, None),
        (" x", " x"),
    ],
)
def test_labels_become_strings(sink: Path, value: Any, label: str | None) -> None:
    take(sink, jsonl({"text": "a", "label": value}))
    assert read_rows(sink)["label"].to_pylist() == [label]


def test_named_columns_win_over_the_usual_ones(sink: Path) -> None:
    content = jsonl({"text": "no", "body": "yes", "label": "no", "topic": "t"})
    found = take(sink, content, columns=Columns(text="body", label="topic"))
    assert (found.columns, found.label_counts) == (["text", "body", "label", "topic"], {"t": 1})
    assert texts_in(sink) == ["yes"]
    assert take(sink, content, columns=Columns(label="")).label_counts == {}


def test_the_usual_columns_are_found_row_by_row(sink: Path) -> None:
    take(sink, jsonl({"sentence1": "a"}, {"sentence1": "b", "sentence2": "c", "label": "x"}))
    assert texts_in(sink) == ["a", "b"]
    assert read_rows(sink)["text_pair"].to_pylist() == [None, "c"]


def test_a_distribution_is_scaled_to_one(sink: Path) -> None:
    take(sink, b'text,distribution\na,"{""x"": 0.5, ""y"": 0.4995}"\nb,\n', "csv")
    first, second = read_rows(sink)["distribution"].to_pylist()
    assert dict(first) == pytest.approx({"x": 0.5 / 0.9995, "y": 0.4995 / 0.9995})
    assert second is None


def test_a_parquet_struct_is_a_distribution(sink: Path) -> None:
    rows = [{"text": "a", "distribution": {"x": 0.5, "y": 0.5}}, {"text": "b", "distribution": {"x": 1.0, "y": None}}]
    take(sink, parquet(pa.Table.from_pylist(rows)), "parquet")
    assert [dict(entry) for entry in read_rows(sink)["distribution"].to_pylist()] == [{"x": 0.5, "y": 0.5}, {"x": 1.0}]


@pytest.mark.parametrize("type_", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_parquet_string_is_read(sink: Path, type_: pa.DataType) -> None:
    take(sink, parquet({"text": pa.array(["a", "b", "a"]).cast(type_)}), "parquet")
    assert texts_in(sink) == ["a", "b", "a"]


def test_a_byte_order_mark_is_removed_and_told(sink: Path) -> None:
    for content, format in ((b"\xef\xbb\xbftext\na\n", "csv"), (b'\xef\xbb\xbf{"text": "a"}', "jsonl")):
        found = take(sink, content, format)  # type: ignore[arg-type]
        assert found.columns == ["text"]
        assert [warning["code"] for warning in found.warnings] == ["byte_order_mark"]


def test_counts_and_warnings_are_those_of_a_slow_count(sink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "HASHES_IN_MEMORY", 100)
    luck = random.Random(0)
    rows = [{"text": f"t{luck.randrange(400)}", "text_pair": luck.choice(["p", "q", None]),
             "label": luck.choice(["x", "y", "X", None])} for _ in range(3000)]  # fmt: skip
    found = take(sink, jsonl(*rows))
    keys = [(row["text"], row["text_pair"]) for row in rows]
    labels_of: dict[Any, set[Any]] = {}
    for key, row in zip(keys, rows, strict=True):
        labels_of.setdefault(key, set()).update({row["label"]} - {None})
    contradictions = sum(len(labels) > 1 for labels in labels_of.values())
    assert found.duplicates == len(keys) - len(set(keys))
    assert found.label_counts == Counter(row["label"] for row in rows if row["label"])
    messages = {warning["code"]: warning["message"] for warning in found.warnings}
    assert messages["contradictory_labels"].startswith(f"{contradictions:,} texts")
    assert "'X'" in messages["similar_labels"]
    assert "'x'" in messages["similar_labels"]
    assert messages["missing_text_pairs"].startswith(f"{sum(row['text_pair'] is None for row in rows):,} of 3,000")


def test_a_slice_reads_the_rows_it_names(sink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "GROUP_ROWS", 7)
    texts = [f"t{number}" for number in range(50)]
    take(sink, jsonl(*({"text": text} for text in texts)))
    for start in range(0, 55, 3):
        for stop in (None, *range(start, 55, 5)):
            assert texts_in(sink, start, stop) == texts[start:stop]


def test_rows_are_found_by_their_numbers_in_any_order(sink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "GROUP_ROWS", 7)
    take(sink, jsonl(*({"text": f"t{number}"} for number in range(50))))
    numbers = [49, 0, 7, 6, 20, 0]
    assert rows_at(sink, numbers, ["text"]) == [{"text": f"t{number}"} for number in numbers]
    assert rows_at(sink, []) == []


def test_the_shared_data_are_read_as_their_notes_say(sink: Path) -> None:
    found = ingest(shared_data("emotion") / "train.jsonl.gz", sink, format="jsonl")
    messages = {warning["code"]: warning["message"] for warning in found.warnings}
    assert (found.rows, len(found.label_counts), found.duplicates) == (16_000, 6, 31)
    assert messages["contradictory_labels"].startswith("30 texts")


# --- what is refused, and where -------------------------------------------------------------------------------------


def test_all_bad_rows_are_named_at_once(sink: Path) -> None:
    content = b'{"text": "fine"}\n{"text": ""}\n{"text": 1}\n[1]\n{"text": "a", "confidence": 2}\n{oops\n{"label": "x"}'
    assert faults(sink, content) == [
        (2, "/text", "empty_text"), (3, "/text", "not_a_string"), (4, None, "not_an_object"),
        (5, "/confidence", "not_a_confidence"), (6, None, "invalid_json"), (7, "/text", "missing_text"),
    ]  # fmt: skip


def test_a_hundred_bad_rows_are_named_and_all_are_counted(sink: Path) -> None:
    with pytest.raises(InvalidRows) as caught:
        take(sink, jsonl({"text": "fine"}, *[{"text": ""}] * 1234))
    assert (len(caught.value.errors), caught.value.total_errors) == (100, 1234)
    assert "1,234 rows" in caught.value.detail


def test_bad_rows_are_skipped_and_counted_on_request(sink: Path) -> None:
    found = take(sink, jsonl({"text": "a"}, {"text": ""}, {"text": "b"}, {"text": " "}, 5), on_error="skip")
    assert (found.rows, found.skipped) == (2, 3)
    assert "2 empty_text, 1 not_an_object" in found.warnings[0]["message"]
    with pytest.raises(InvalidRows):
        take(sink, jsonl({"text": ""}), on_error="skip")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (rb'{"text": "\ud800"}', "invalid_utf8"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (rb'{"text": "a\u0000b"}', "nul_character"),
        (rb'{"text": "a", "label": "\u0000"}', "nul_character"),
        (b'{"text": "' + b"a" * 5001 + b'"}', "text_too_long"),
        (b'{"text": "' + b"a" * 20_000 + b'"}', "line_too_long"),
        (b'{"text": ' + b"[" * 4000 + b"]" * 4000 + b"}", "too_deep"),
        (b'{"text": "a", "label": "' + b"x" * 201 + b'"}', "label_too_long"),
        (b'{"text": "a", "label": ["x"]}', "not_a_label"),
        (b'{"text": "a", "confidence": 0}', "not_a_confidence"),
        (b'{"text": "a", "confidence": true}', "not_a_confidence"),
        (b'{"text": "a", "confidence": NaN}', "invalid_json"),
        (b'{"text": "a", "distribution": {}}', "not_a_distribution"),
        (b'{"text": "a", "distribution": [0.5, 0.5]}', "not_a_distribution"),
        (b'{"text": "a", "distribution": {"x": 1.5, "y": -0.5}}', "not_a_probability"),
        (b'{"text": "a", "distribution": {"x": "1"}}', "not_a_probability"),
        (b'{"text": "a", "distribution": {"x": 0.5, "y": 0.4}}', "does_not_sum_to_one"),
        (b'{"text": "a", "distribution": "{oops"}', "invalid_json"),
    ],
)
def test_a_bad_row_is_refused_alone(sink: Path, row: bytes, code: str) -> None:
    content = b'{"text": "before"}\n' + row + b'\n{"text": "after"}\n'
    assert [(line, found) for line, _, found in faults(sink, content, limits=SMALL)] == [(2, code)]
    assert take(sink, content, on_error="skip", limits=SMALL).rows == 2


@pytest.mark.parametrize(
    ("record", "code"),
    [
        (b"a,b,c", "wrong_field_count"),
        (b"a", "wrong_field_count"),
        (b'"a"b,c', "malformed_record"),
        (b"\xe9,x", "invalid_utf8"),
        (b"a\x00,x", "nul_character"),
        (b",x", "empty_text"),
    ],
)
def test_a_bad_record_is_refused_alone(sink: Path, record: bytes, code: str) -> None:
    content = b'text,label\n"b\ne",x\n' + record + b"\nafter,y\n"
    assert [(line, found) for line, _, found in faults(sink, content, "csv")] == [(4, code)]
    assert take(sink, content, "csv", on_error="skip").rows == 2


def test_bad_utf8_in_parquet_is_one_bad_row(sink: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string())
    assert faults(sink, parquet({"text": texts}), "parquet") == [(2, "/text", "invalid_utf8")]


@pytest.mark.parametrize(
    ("content", "format", "error", "words"),
    [
        (b"", "jsonl", EmptyFile, "no rows"),
        (b"\n\n", "jsonl", EmptyFile, "no rows"),
        (b"text,label\n", "csv", EmptyFile, "no rows"),
        (parquet({"text": pa.array([], pa.string())}), "parquet", EmptyFile, "no rows"),
        (b'[{"text": "a"}]', "jsonl", UnreadableFile, "one object per line"),
        (b'[\n  {\n    "text": "a"\n  }\n]\n', "jsonl", UnreadableFile, "one object per line"),
        (b'[{"text": "' + b"a" * 2**21 + b'"}]', "jsonl", UnreadableFile, "one object per line"),
        (b"[1]\n", "jsonl", InvalidRows, "must hold a JSON object, not"),
        (b"a,b\n1,2\n", "csv", UnknownColumn, "'a', 'b'"),
        (b"text\tlabel\na\tb\n", "csv", UnknownColumn, "tabs; send it as TSV"),
        (b"text;label\na;b\n", "csv", UnknownColumn, "separated by semicolons"),
        (b"text,label\na,b\n", "tsv", UnknownColumn, "commas; send it as CSV"),
        (b"text,label\ra,b\rc,d\r", "csv", UnreadableFile, "end the lines with a line feed"),
        (b'{"a": 1}\n{"b": 2}\n', "jsonl", UnknownColumn, "'a', 'b'"),
        (b"text,text\n1,2\n", "csv", UnreadableFile, "2 times"),
        (b'text\n"open\n', "csv", InvalidRows, "line 2: the record cannot be read: a quote is opened and never closed"),
        ("text\na\n".encode("utf-16"), "csv", UnsupportedMedia, "UTF-16"),
        (b"PK\x03\x04....", "csv", UnsupportedMedia, "zip"),
        (parquet({"text": ["a"]}), "csv", UnreadableFile, "Parquet"),
        (b'{"text": "a"}', "parquet", UnreadableFile, "does not end like"),
        (parquet({"text": ["a"]})[:-9] + b"PAR1", "parquet", UnreadableFile, ""),
        (parquet({"text": [["a"]]}), "parquet", UnreadableFile, "must hold strings"),
        (parquet({"text": ["a"], "label": [{"x": 1}]}), "parquet", UnreadableFile, "must hold"),
        (packed(jsonl({"text": "a" * 100}))[:-12], "jsonl", UnreadableFile, "gzip"),
        (packed(packed(jsonl({"text": "a"}))), "jsonl", UnreadableFile, "twice"),
        (packed(jsonl({"text": "a"})) + b"rubbish", "jsonl", UnreadableFile, "gzip"),
        (packed(parquet({"text": ["a"]}))[:-12], "parquet", UnreadableFile, "gzip"),
    ],
)
def test_a_broken_file_is_refused_in_words(
    sink: Path, content: bytes, format: Format, error: type[Problem], words: str
) -> None:
    with pytest.raises(error) as caught:
        take(sink, content, format)
    assert words in caught.value.detail or words in str(caught.value.errors)


def test_a_column_that_is_named_but_missing_is_refused(sink: Path) -> None:
    for content, format in (
        (jsonl({"text": "a"}), "jsonl"),
        (b"text\na\n", "csv"),
        (parquet({"text": ["a"]}), "parquet"),
    ):
        with pytest.raises(UnknownColumn, match=r"'topic'.*label_column.*'text'"):
            take(sink, content, format, columns=Columns(label="topic"))  # type: ignore[arg-type]
    with pytest.raises(UnknownColumn, match="two parts"):
        take(sink, jsonl({"text": "a"}), columns=Columns(text="text", label="text"))


# --- hostile files --------------------------------------------------------------------------------------------------


def test_a_gzip_bomb_stops_at_the_limit(sink: Path) -> None:
    bomb = gzip.compress(bytes(200_000_000), 9)
    for format in ("jsonl", "csv", "parquet"):
        with at_most(megabytes=30, seconds=5), pytest.raises((TooLarge, UnreadableFile)):
            take(sink, bomb, format, limits=replace(SMALL, max_decompressed_bytes=20_000_000))  # type: ignore[arg-type]


def test_ten_million_columns_are_refused(sink: Path) -> None:
    for header in (b"a," * 10_000_000, b"a," * 400_000 + b"\n"):
        with at_most(megabytes=60, seconds=5), pytest.raises(UnreadableFile):
            take(sink, header, "csv")
    with pytest.raises(UnreadableFile, match="columns"):
        take(sink, jsonl({f"c{number}": 1 for number in range(1001)}))


@pytest.mark.parametrize(
    ("content", "format", "words"),
    [
        (b'{"text": "' + b"a" * 50_000_000, "jsonl", "longer than 10,000 bytes"),
        (b'text\n"' + b"a\n" * 5_000_000, "csv", "quote left open"),
        (b"\n" * 900_000, "jsonl", "more than 10,000 rows"),
        (b"text\n" + b"\n" * 900_000, "csv", "more than 10,000 rows"),
        (jsonl(*({"text": "a", "label": number} for number in range(10_001))), "jsonl", "label_column"),
    ],
    ids=["line", "quote", "rows", "records", "labels"],
)
def test_what_never_ends_is_refused(sink: Path, content: bytes, format: Format, words: str) -> None:
    limits = replace(SMALL, max_decompressed_bytes=100_000_000, max_rows=10_000 + (words == "label_column"))
    with at_most(megabytes=40, seconds=5), pytest.raises(Problem, match=words):
        take(sink, content, format, limits=limits)


def test_a_parquet_bomb_goes_off_in_a_process_of_its_own(sink: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "APART_MEMORY_BYTES", 250_000_000)
    bomb = parquet({"text": ["a" * 150_000_000, "b"]}, compression="zstd", use_dictionary=False)
    assert len(bomb) < 100_000
    source = sink.with_name("upload")
    source.write_bytes(bomb)
    with at_most(megabytes=20, seconds=5), pytest.raises(UnreadableFile):
        ingest_apart(source, sink, format="parquet")


def test_a_parquet_file_that_crashes_arrow_is_refused(sink: Path) -> None:
    # An abort, as damaged size statistics caused in pyarrow 26, cannot be caught in the process it happens in.
    with pytest.raises(UnreadableFile, match="cannot be read"):
        ingest_apart(sink, sink, format="parquet", limits=Crash())


class Crash(Limits):
    """Ends the process that unpacks it."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_the_process_apart_ends_with_its_parent(tmp_path: Path) -> None:
    source, script = tmp_path / "upload", tmp_path / "script.py"
    source.write_bytes(parquet({"text": [f"text {number}" for number in range(2_000_000)]}))
    script.write_text(
        "from pathlib import Path\nfrom app.records import ingest_apart\n"
        "if __name__ == '__main__':\n"
        f"    ingest_apart(Path({str(source)!r}), Path({str(tmp_path / 'rows')!r}), format='parquet')\n"
    )
    parent = psutil.Popen([sys.executable, str(script)])
    wait_until(lambda: any("spawn_main" in " ".join(child.cmdline()) for child in parent.children()), 30)
    children = parent.children()
    parent.kill()
    _, alive = psutil.wait_procs([parent, *children], timeout=20)
    for process in alive:
        process.kill()
    assert alive == []


def test_what_is_read_apart_is_what_is_read_here(sink: Path) -> None:
    source = sink.with_name("upload")
    source.write_bytes(parquet({"text": ["a", "b", "a"], "label": [1, 2, 1]}))
    here = ingest(source, sink, format="parquet")
    assert ingest_apart(source, sink, format="parquet") == here
    source.write_bytes(parquet({"text": ["a", ""]}))
    with pytest.raises(InvalidRows) as caught:
        ingest_apart(source, sink, format="parquet")
    assert [(fault["line"], fault["code"]) for fault in caught.value.errors] == [(2, "empty_text")]


@pytest.mark.parametrize("categorical", [True, False])
def test_a_long_value_that_stands_for_many_rows_stops_at_the_limit(sink: Path, categorical: bool) -> None:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * 10_000]))
    content = parquet({"text": texts if categorical else texts.cast(pa.string())})
    with at_most(megabytes=60, seconds=10), pytest.raises(TooLarge, match="unpacks"):
        take(sink, content, "parquet", limits=Limits(max_decompressed_bytes=100_000_000))


@pytest.mark.parametrize("options", [
    {}, {"data_page_version": "2.0"}, {"compression": "none"}, {"compression": "gzip"}, {"compression": "lz4"},
    {"compression": "brotli"}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},
    {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}, {"row_group_size": 100},
])  # fmt: skip
def test_parquet_is_read_however_it_is_packed(sink: Path, options: dict[str, Any]) -> None:
    texts = [f"text {number} {'x' * (number % 50)}" for number in range(1000)]
    content = parquet({"text": texts}, data_page_size=2000, **options)
    assert take(sink, content, "parquet").rows == 1000
    assert texts_in(sink) == texts


def test_a_footer_with_too_many_rows_or_bytes_is_refused(sink: Path) -> None:
    huge = parquet({"text": ["a"] * 10})
    with pytest.raises(TooLarge, match="10 rows"):
        take(sink, huge, "parquet", limits=replace(SMALL, max_rows=5))
    with pytest.raises(UnreadableFile, match="footer has"):
        take(sink, b"PAR1" + bytes(9_000_000) + (8_900_000).to_bytes(4, "little") + b"PAR1", "parquet")
