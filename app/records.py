"""Dataset rows: read JSONL, CSV, TSV or Parquet, plain or gzipped, check every row, and write them as one Parquet file.

Everything is a stream. Memory stays flat whatever the size of the file, hostile files included.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import resource
import shutil
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypedDict

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import MAX_ERRORS, Fault, InvalidRows, TooLarge, Unprocessable, UnsupportedMedia

# Arrow's own allocator holds on to 20 MB more than malloc does over a large file.
pa.set_memory_pool(pa.system_memory_pool())

Format = Literal["jsonl", "csv", "tsv", "parquet"]
OnError = Literal["reject", "skip"]

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("text_pair", pa.string()),
        pa.field("label", pa.string()),
        pa.field("confidence", pa.float64()),
        pa.field("distribution", pa.map_(pa.string(), pa.float64())),
        pa.field("line", pa.int64(), nullable=False),
    ]
)
"""The rows of a dataset as they are stored; `line` is where the row stood in the upload, counted from 1."""

DEFAULT_COLUMNS = {
    "text": ("text", "sentence", "sentence1", "content"),
    "text_pair": ("text_pair", "sentence2"),
    "label": ("label",),
    "confidence": ("confidence",),
    "distribution": ("distribution",),
}
"""Where each part of a row is looked for, in this order, when the client names no column."""

MAX_LABELS = 10_000
MAX_LABEL_CHARACTERS = 200
MAX_COLUMN_NAME_CHARACTERS = 200
SUM_TOLERANCE = 1e-3

GROUP_ROWS = 10_000
GROUP_CHARACTERS = 2 * 1024 * 1024
READ_BYTES = 256 * 1024
MAX_FOOTER_BYTES = 8 * 1024 * 1024
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ROWS = 1000
HASHES_IN_MEMORY = 250_000

APART_MEMORY_BYTES = 512 * 1024 * 1024
APART_SECONDS = 3600

FOREIGN_FILES = {
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
"""First bytes of what people send by mistake."""
ARRAY_BEGINS = re.compile(rb"\s*\[\s*(\{|$)")
"""The first line of a JSON file that is one array, on one line or on many."""
SEPARATORS = {
    "\t": "tabs; send it as TSV (.tsv)",
    ";": "semicolons; separate them by commas",
    ",": "commas; send it as CSV (.csv)",
}
"""What a header holds that was not taken apart, and what to do about it."""


@dataclass(frozen=True)
class Limits:
    """How much a file may ask of the server."""

    max_decompressed_bytes: int = 20 * 1024**3
    max_line_bytes: int = 1024**2
    """Bytes of one line of JSONL, or of one record of CSV or TSV with all its lines."""
    max_rows: int = 20_000_000
    """Rows, blank lines among them."""
    max_columns: int = 1000
    max_text_characters: int = 200_000


@dataclass(frozen=True)
class Columns:
    """The columns a client names. None: look for the default names; "": the part is left out."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    confidence: str | None = None
    distribution: str | None = None


class Warning_(TypedDict):
    """Something in the data that a person should look at."""

    code: str
    message: str


@dataclass
class Ingested:
    """What was in the file."""

    rows: int
    columns: list[str]
    label_counts: dict[str, int]
    """Rows per label, most frequent first; a label that only distributions name counts 0."""
    duplicates: int
    """Rows whose (text, text_pair) stood in an earlier row."""
    skipped: int
    has_text_pair: bool
    warnings: list[Warning_] = field(default_factory=list)


class UnreadableFile(Unprocessable):
    """The file cannot be read in the format it was sent as."""

    code = "unreadable_file"


class UnknownColumn(Unprocessable):
    """The file lacks a column that is needed."""

    code = "unknown_column"


class EmptyFile(Unprocessable):
    """The file has no rows."""

    code = "empty_file"


class TooManyLabels(Unprocessable):
    """The label column holds too many different values to be labels."""

    code = "too_many_labels"


def ingest(
    source: Path,
    sink: Path,
    *,
    format: Format,
    columns: Columns = Columns(),
    on_error: OnError = "reject",
    limits: Limits = Limits(),
) -> Ingested:
    """Check the rows of `source` and write them to `sink` as Parquet with SCHEMA.

    A gzipped source is recognised by its first bytes, whatever its name says. With `on_error="reject"` one bad row
    refuses the file, with "skip" it is left out and counted. Parquet of unknown origin is for `ingest_apart`.

    Raises InvalidRows with the first 100 bad rows and their number, UnknownColumn, EmptyFile, TooManyLabels,
    UnreadableFile, UnsupportedMedia, or TooLarge when a limit is passed.
    """
    roles = Roles(columns)
    faults = BadRows()
    last_line = 0
    with ExitStack() as stack:
        stream = stack.enter_context(_open(source, limits))
        byte_order_mark = _skip_byte_order_mark(stream, format)
        if format == "parquet":
            found = _parquet(_plain_file(source, stream, stack, sink.parent), roles, limits)
        elif format == "jsonl":
            found = _json_lines(stream, roles, limits)
        else:
            found = _delimited(stream, "," if format == "csv" else "\t", roles, limits)
        texts = stack.enter_context(TextHashes(sink.parent))
        writer = stack.enter_context(RowWriter(sink))
        checker = Checker(roles, limits)
        try:
            for count, (line, values) in enumerate(found, start=1):
                if count > limits.max_rows:
                    raise TooLarge(f"The file has more than {limits.max_rows:,} rows; split it into several datasets.")
                last_line = line
                if values is None:
                    continue
                try:
                    row = checker.check(values)
                except BadRow as fault:
                    faults.add(line, fault)
                    continue
                if not faults.total or on_error == "skip":
                    texts.add(row)
                    writer.write(row, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UnreadableFile(f"The gzip stream breaks off or is damaged after line {last_line}: {error}.") from None
        roles.require()
        if faults.total and (on_error == "reject" or not writer.rows):
            raise faults.problem(writer.rows)
        if not writer.rows:
            raise EmptyFile
        duplicates, contradictions = texts.count()
    counts = dict(sorted(checker.labels.items(), key=lambda item: (-item[1], item[0])))
    warnings = [
        *faults.warnings(),
        *_label_warnings(counts),
        *_text_warnings(writer, duplicates, contradictions),
        *([_warning("byte_order_mark", "The file began with a byte order mark; it was removed.")] * byte_order_mark),
    ]
    has_text_pair = writer.pairs > 0
    return Ingested(writer.rows, list(roles.seen), counts, duplicates, faults.total, has_text_pair, warnings)


def warm_up() -> None:
    """Take in one row, so that the libraries' code is in memory before the first upload needs it: `benchmarks/upload_memory.py`."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "rows.jsonl"
        source.write_text('{"text": "one row"}\n')
        ingest(source, Path(directory) / "rows.parquet", format="jsonl")


def ingest_apart(source: Path, sink: Path, **options: Any) -> Ingested:
    """`ingest` in a process of its own with bounded memory and time: a hostile Parquet file can crash Arrow, and a few
    bytes of one can stand for gigabytes.

    Raises what `ingest` raises, and UnreadableFile when the process does not survive the file.
    """
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_limit_process, initargs=(APART_MEMORY_BYTES,)
    ) as pool:
        try:
            return pool.submit(ingest, source, sink, **options).result()
        except (BrokenProcessPool, MemoryError):
            raise UnreadableFile(
                "The file cannot be read: it is damaged, or takes more memory than its size justifies."
            ) from None


def _limit_process(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (APART_SECONDS, APART_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def read_rows(
    file: Path | BinaryIO, start: int = 0, stop: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows start..stop-1 (counted from 0) of a file that `ingest` wrote; only the row groups they lie in are read."""
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        metadata = parquet.metadata
        groups: list[int] = []
        first_row = position = 0
        for group in range(metadata.num_row_groups):
            end = position + metadata.row_group(group).num_rows
            if end > start and (stop is None or position < stop):
                first_row = first_row if groups else position
                groups.append(group)
            position = end
        table = parquet.read_row_groups(groups, columns=columns, use_threads=False)
    return table.slice(start - first_row, None if stop is None else max(stop - start, 0)) if groups else table


def read_texts(file: Path | BinaryIO, start: int = 0, stop: int | None = None) -> tuple[list[str], list[str | None]]:
    """The texts and text pairs of rows start..stop-1; the second list holds None where a row has no pair."""
    table = read_rows(file, start, stop, ["text", "text_pair"])
    return table["text"].to_pylist(), table["text_pair"].to_pylist()


def rows_at(
    file: Path | BinaryIO, numbers: Sequence[int], columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows of these numbers (counted from 0) of any Parquet file, in this order; only the row groups they lie in are read."""
    found: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(file, pre_buffer=False) as parquet:
        begin = 0
        for group in range(parquet.num_row_groups):
            end = begin + parquet.metadata.row_group(group).num_rows
            inside = sorted({number for number in numbers if begin <= number < end})
            if inside:
                table = parquet.read_row_group(group, columns=columns, use_threads=False)
                found.update(zip(inside, table.take([number - begin for number in inside]).to_pylist(), strict=True))
            begin = end
    return [found[number] for number in numbers]


# --- rows: what is checked ------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One row that passed every check."""

    text: str
    text_pair: str | None
    label: str | None
    confidence: float | None
    distribution: dict[str, float] | None


class BadRow(Exception):
    """One row cannot be used: the column at fault (None: the whole row), a code, and a sentence."""

    def __init__(self, column: str | None, code: str, message: str) -> None:
        super().__init__(message)
        self.column, self.code, self.message = column, code, message


Found = Iterator[tuple[int, "Sequence[Any] | BadRow | None"]]
"""What a reader yields: the line, and one value per role; or why the row is bad; or None for a blank line."""


class Roles:
    """Which column of the file plays which part; known at once from a header, or row by row in JSONL."""

    def __init__(self, columns: Columns) -> None:
        self.named: dict[str, str] = {role: name for role, name in vars(columns).items() if name}
        self.open = {role for role in DEFAULT_COLUMNS if getattr(columns, role) is None}
        self.seen: dict[str, None] = {}
        self.names: list[str | None] = [self.named.get(role) for role in DEFAULT_COLUMNS]
        twice = [name for name, times in Counter(self.named.values()).items() if times > 1]
        if twice:
            raise UnknownColumn(f"The column {_quoted(twice[0])} is named for two parts of the row.")

    def see(self, columns: Iterable[str], limits: Limits) -> None:
        """Take note of columns of the file. Raises UnreadableFile when they are too many or not usable as names."""
        for column in columns:
            if len(column) > MAX_COLUMN_NAME_CHARACTERS:
                raise UnreadableFile(
                    f"A column name has {len(column):,} characters, more than {MAX_COLUMN_NAME_CHARACTERS}: "
                    f"{_quoted(column)}."
                )
            if flaw := _flaw(column):
                raise UnreadableFile(f"The column name {_quoted(column)} {flaw[1]}.")
            self.seen[column] = None
            if len(self.seen) > limits.max_columns:
                raise UnreadableFile(f"The file has more than {limits.max_columns:,} columns.")
        for position, role in enumerate(DEFAULT_COLUMNS):
            if role in self.open:
                found = [
                    name for name in DEFAULT_COLUMNS[role] if name in self.seen and name not in self.named.values()
                ]
                if found:
                    self.open.discard(role)
                    self.names[position] = found[0]

    def require(self) -> None:
        """Raises UnknownColumn when the text, or a column the client named, is not in the file."""
        if not self.seen:
            return
        has = (
            f"The file has {', '.join(_quoted(name) for name in list(self.seen)[:20])}{', …' * (len(self.seen) > 20)}."
        )
        for role, name in self.named.items():
            if name not in self.seen:
                raise UnknownColumn(f"There is no column {_quoted(name)} ({role}_column). {has}")
        if self.names[0] is None:
            expected = ", ".join(DEFAULT_COLUMNS["text"])
            if len(self.seen) == 1:
                [only] = self.seen
                has += next(
                    (f" It seems to be separated by {told}." for sign, told in SEPARATORS.items() if sign in only), ""
                )
            raise UnknownColumn(f"No column holds the text: looked for {expected}. Name it with text_column. {has}")


class Checker:
    """Turns the values of a row into a Row, or says why not; keeps count of the labels."""

    def __init__(self, roles: Roles, limits: Limits) -> None:
        self.roles, self.limits = roles, limits
        self.labels: dict[str, int] = {}

    def check(self, values: Sequence[Any] | BadRow) -> Row:
        """The row. Raises BadRow, or TooManyLabels."""
        if isinstance(values, BadRow):
            raise values
        text_column, pair_column, label_column, confidence_column, distribution_column = self.roles.names
        text, pair, label, confidence, distribution = values
        row = Row(
            self._text(text, text_column),
            None if pair is None or pair == "" else self._pair(pair, pair_column),
            None if label is None else self._label(label, label_column),
            None if confidence is None else _confidence(confidence, confidence_column),
            None if distribution is None else self._distribution(distribution, distribution_column),
        )
        if row.label is not None:
            self.labels[row.label] += 1
        return row

    def _text(self, value: Any, column: str | None) -> str:
        if value is None:
            raise BadRow(column, "missing_text", "the row has no text")
        if not isinstance(value, str):
            raise BadRow(column, "not_a_string", f"the text must be a string, not {_json_type(value)}")
        if not value or value.isspace():
            raise BadRow(column, "empty_text", "the text is empty")
        if len(value) > self.limits.max_text_characters:
            most = self.limits.max_text_characters
            raise BadRow(column, "text_too_long", f"the text has {len(value):,} characters; at most {most:,} are taken")
        if flaw := _flaw(value):
            raise BadRow(column, flaw[0], f"the text {flaw[1]}")
        return value

    def _pair(self, value: Any, column: str | None) -> str | None:
        return None if isinstance(value, str) and value.isspace() else self._text(value, column)

    def _label(self, value: Any, column: str | None) -> str | None:
        """Labels are strings; numbers and booleans become the strings JSON writes, and 1.0 the label "1"."""
        if isinstance(value, bool):
            value = "true" if value else "false"
        elif isinstance(value, float):
            if math.isnan(value):
                return None
            value = str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
        elif isinstance(value, int):
            value = str(value)
        elif not isinstance(value, str):
            raise BadRow(
                column, "not_a_label", f"a label must be a string, a number or a boolean, not {_json_type(value)}"
            )
        if value in self.labels:
            return value
        if not value or value.isspace():
            return None
        return self._new_label(value, column)

    def _new_label(self, value: str, column: str | None) -> str:
        if len(value) > MAX_LABEL_CHARACTERS:
            raise BadRow(
                column,
                "label_too_long",
                f"the label has {len(value):,} characters; at most {MAX_LABEL_CHARACTERS} are taken: {_quoted(value)}",
            )
        if flaw := _flaw(value):
            raise BadRow(column, flaw[0], f"the label {flaw[1]}")
        if len(self.labels) >= MAX_LABELS:
            raise TooManyLabels(
                f"The column {_quoted(column)} names more than {MAX_LABELS:,} different labels. "
                "Name another one with label_column, or send label_column= empty to take the rows without labels."
            )
        self.labels[value] = 0
        return value

    def _distribution(self, value: Any, column: str | None) -> dict[str, float] | None:
        """Probabilities by label, as an object or as JSON text; a sum within 1e-3 of 1 is scaled to 1."""
        if isinstance(value, str):
            if not value or value.isspace():
                return None
            try:
                value = orjson.loads(value)
            except ValueError as error:
                raise BadRow(column, "invalid_json", f"the distribution is not JSON: {error}") from None
        if value is None:
            return None
        if not isinstance(value, dict) or not value:
            raise BadRow(column, "not_a_distribution", "the distribution must be an object of label: probability")
        for label, probability in value.items():
            if isinstance(probability, bool) or not isinstance(probability, int | float):
                raise BadRow(column, "not_a_probability", f"the probability of {_quoted(label)} is not a number")
            if not 0 <= probability <= 1 + SUM_TOLERANCE:
                message = f"the probability of {_quoted(label)} is {probability:g}; it must lie between 0 and 1"
                raise BadRow(column, "not_a_probability", message)
        total = math.fsum(value.values())
        if abs(total - 1) > SUM_TOLERANCE:
            raise BadRow(column, "does_not_sum_to_one", f"the probabilities sum to {total:.6g}, not to 1")
        for label in value:
            if label not in self.labels:
                if not label or label.isspace():
                    raise BadRow(column, "not_a_distribution", "the distribution has an empty label")
                self._new_label(label, column)
        return {label: probability / total for label, probability in value.items()}


def _confidence(value: Any, column: str | None) -> float | None:
    if isinstance(value, str):
        if not value or value.isspace():
            return None
        try:
            value = float(value)
        except ValueError:
            raise BadRow(column, "not_a_confidence", f"the confidence is not a number: {_quoted(value)}") from None
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(column, "not_a_confidence", f"the confidence must be a number, not {_json_type(value)}")
    elif math.isnan(value):
        return None
    if not 0 < value <= 1:
        raise BadRow(column, "not_a_confidence", f"the confidence is {value:g}; it must be above 0 and at most 1")
    return float(value)


def _flaw(value: str) -> tuple[str, str] | None:
    """What keeps a string from being stored: a code and the end of a sentence."""
    if "\x00" in value:
        return "nul_character", "contains a NUL character"
    if value.isascii():
        return None
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 come here as the lone surrogates of Python's `surrogateescape`.
        return "invalid_utf8", f"is not valid UTF-8 at character {error.start + 1}; save the file as UTF-8"
    return None


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _quoted(value: str | None) -> str:
    """A short, printable form of what a client sent."""
    text = value or ""
    return ascii(text[:60] + "…") if len(text) > 60 else repr(text) if not _flaw(text) else ascii(text)


# --- files: how rows are read ---------------------------------------------------------------------------------------


class LimitedStream(io.RawIOBase):
    """A stream that refuses to give more than so many bytes, so that a bomb goes off outside."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self.stream, self.left, self.most = stream, most, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(buffer)  # type: ignore[attr-defined]
        self.left -= count
        if self.left < 0:
            raise TooLarge(f"The file holds more than {self.most:,} bytes once decompressed.")
        return int(count)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _open(source: Path, limits: Limits) -> io.BufferedReader[Any]:
    """The bytes of the file, decompressed. Raises EmptyFile, UnreadableFile or UnsupportedMedia."""
    stream: BinaryIO = source.open("rb")
    head = stream.read(4)
    stream.seek(0)
    if head[:2] == b"\x1f\x8b":
        stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
    reader = io.BufferedReader(LimitedStream(stream, limits.max_decompressed_bytes), READ_BYTES)
    try:
        head = reader.peek(4)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile(f"The gzip stream is damaged, or breaks off: {error}.") from None
    if not head:
        raise EmptyFile
    if head[:2] == b"\x1f\x8b":
        raise UnreadableFile("The file is gzipped twice; gzip it once.")
    for magic, description in FOREIGN_FILES.items():
        if head.startswith(magic):
            raise UnsupportedMedia(
                f"The file is {description}. Send UTF-8 JSONL, CSV, TSV or Parquet, plain or gzipped."
            )
    return reader


def _skip_byte_order_mark(stream: io.BufferedReader, format: Format) -> bool:
    """Whether there was one. Raises UnreadableFile for a Parquet file that was sent as text."""
    head = stream.peek(4)
    if head.startswith(b"PAR1") and format != "parquet":
        raise UnreadableFile(f"This is a Parquet file, sent as {format}; send application/vnd.apache.parquet.")
    if format == "parquet" or not head.startswith(b"\xef\xbb\xbf"):
        return False
    stream.read(3)
    return True


def _json_lines(stream: io.BufferedReader, roles: Roles, limits: Limits) -> Found:
    most = limits.max_line_bytes
    names: list[Any] = roles.names
    seen = roles.seen.keys()
    line = 0
    while content := stream.readline(most + 1):
        line += 1
        if line == 1 and ARRAY_BEGINS.match(content):
            raise UnreadableFile("The file is one JSON array. Write one object per line (JSON Lines).")
        if len(content) > most and not content.endswith(b"\n"):
            while (rest := stream.readline(READ_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield line, BadRow(None, "line_too_long", f"the line is longer than {most:,} bytes")
            continue
        try:
            row = orjson.loads(content)
        except ValueError as error:
            yield line, None if content.isspace() else _bad_json(error)
            continue
        if not isinstance(row, dict):
            yield line, BadRow(None, "not_an_object", f"the line must hold a JSON object, not {_json_type(row)}")
            continue
        if not row.keys() <= seen:
            roles.see(row, limits)
        yield line, [row.get(name) for name in names]


def _bad_json(error: ValueError) -> BadRow:
    reason = str(error)
    if "UTF-8" in reason:
        return BadRow(None, "invalid_utf8", "the line is not valid UTF-8; save the file as UTF-8")
    if "surrogate" in reason:
        return BadRow(None, "invalid_utf8", f"a string holds half of a surrogate pair ({reason})")
    if "depth" in reason:
        return BadRow(None, "too_deep", "the JSON is nested too deeply")
    return BadRow(None, "invalid_json", f"the line is not valid JSON: {reason}")


class RecordLines:
    """The lines of a CSV file for csv.reader, which asks for as many as the quotes of a record span."""

    def __init__(self, stream: io.BufferedReader, most: int) -> None:
        self.stream, self.most = stream, most
        self.line = 0
        self.start = 0
        self.bytes = 0

    def begin_record(self) -> None:
        """The next line asked for is the first of a record."""
        self.start, self.bytes = self.line + 1, 0

    def __iter__(self) -> RecordLines:
        return self

    def __next__(self) -> str:
        content = self.stream.readline(self.most + 1 - self.bytes)
        if not content:
            raise StopIteration
        self.line += 1
        self.bytes += len(content)
        if self.bytes > self.most:
            message = f"the record that begins here is longer than {self.most:,} bytes; is a quote left open?"
            fault: Fault = {"line": self.start, "pointer": None, "code": "line_too_long", "message": message}
            raise UnreadableFile(f"Line {self.start}: {message}", errors=[fault])
        return content.decode("utf-8", "surrogateescape")


def _delimited(stream: io.BufferedReader, delimiter: str, roles: Roles, limits: Limits) -> Found:
    # The module's own limit is global and lower than ours; RecordLines keeps the one that counts.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_line_bytes + 1))
    lines = RecordLines(stream, limits.max_line_bytes)
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    wanted: list[int | None] = []
    while True:
        lines.begin_record()
        try:
            fields = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UnreadableFile(f"The header line cannot be read: {_bad_record(error)}.") from None
            yield lines.start, BadRow(None, "malformed_record", f"the record cannot be read: {_bad_record(error)}")
            continue
        if not fields:
            yield lines.start, None
        elif header is None:
            header = [name.strip() for name in fields]
            _see_all(header, roles, limits)
            wanted = [None if name is None else header.index(name) for name in roles.names]
        elif len(fields) != len(header):
            message = f"the record has {len(fields):,} fields, the header {len(header):,}"
            yield lines.start, BadRow(None, "wrong_field_count", message)
        else:
            yield lines.start, [None if position is None else fields[position] for position in wanted]


def _bad_record(error: csv.Error) -> str:
    """The module's words, where they are not for its programmers."""
    reason = str(error)
    if "new-line character" in reason:
        return "it holds a carriage return inside a line; end the lines with a line feed"
    return "a quote is opened and never closed" if reason == "unexpected end of data" else reason


def _see_all(header: Sequence[str], roles: Roles, limits: Limits) -> None:
    """Take a complete header. Raises UnknownColumn and UnreadableFile."""
    if len(header) > limits.max_columns:
        raise UnreadableFile(f"The file has {len(header):,} columns; at most {limits.max_columns:,} are taken.")
    roles.see(header, limits)
    roles.require()
    for name in roles.names:
        if name is not None and header.count(name) > 1:
            raise UnreadableFile(f"The column {_quoted(name)} occurs {header.count(name)} times.")


def _plain_file(source: Path, stream: io.BufferedReader, stack: ExitStack, directory: Path) -> Path:
    """The source itself, or where it was gzipped, a decompressed copy: Parquet is read from its end."""
    with source.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return source
    copy = stack.enter_context(tempfile.NamedTemporaryFile(dir=directory))  # noqa: SIM115
    try:
        shutil.copyfileobj(stream, copy, READ_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableFile(f"The gzip stream breaks off or is damaged: {error}.") from None
    copy.flush()
    return Path(copy.name)


def _parquet(path: Path, roles: Roles, limits: Limits) -> Found:
    row = 0
    try:
        _check_footer_size(path)
        safe = {
            "thrift_string_size_limit": MAX_FOOTER_BYTES,
            "thrift_container_size_limit": 1_000_000,
            "schema_depth_limit": 16,
            "arrow_extensions_enabled": False,
        }
        with pq.ParquetFile(path, **safe) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
        if metadata.num_rows > limits.max_rows:
            raise TooLarge(f"The file has {metadata.num_rows:,} rows; at most {limits.max_rows:,} are taken.")
        if metadata.num_columns > limits.max_columns:
            raise UnreadableFile(
                f"The file has {metadata.num_columns:,} columns; at most {limits.max_columns:,} are taken."
            )
        _see_all(schema.names, roles, limits)
        names = [name for name in roles.names if name is not None]
        _check_types(schema, roles)
        most_bytes = limits.max_decompressed_bytes
        batch_rows = _batch_rows(metadata)
        # With a small buffer and without pre-buffering Arrow reads page by page instead of whole row groups.
        unpacked = 0
        with pq.ParquetFile(path, metadata=metadata, buffer_size=READ_BYTES, pre_buffer=False, **safe) as parquet:
            for batch in parquet.iter_batches(batch_rows, columns=names, use_threads=False):
                arrays = {name: _decoded(batch.column(name)) for name in names}
                unpacked += sum(array.nbytes for array in arrays.values())
                if unpacked > most_bytes:
                    raise TooLarge(f"The file unpacks to more than {most_bytes:,} bytes.")
                nothing = [None] * batch.num_rows
                columns = [nothing if name is None else _python_values(arrays[name]) for name in roles.names]
                for values in zip(*columns, strict=True):
                    row += 1
                    yield row, values
    except (pa.ArrowException, OSError, ValueError) as error:
        where = f"after row {row}" if row else "at its footer or first rows"
        raise UnreadableFile(f"The Parquet file is damaged {where}: {str(error)[:300]}") from None


def _batch_rows(metadata: Any) -> int:
    """How many rows to read at a time, by what the footer says of their size; it may lie."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    widest = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
    return max(10, min(BATCH_ROWS, int(BATCH_BYTES / max(widest, 1))))


def _check_footer_size(path: Path) -> None:
    """Raises UnreadableFile for a file whose footer is missing, encrypted, or too large to be parsed with a clear mind."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - 8, 0))
        tail = file.read(8)
    if tail[4:] == b"PARE":
        raise UnreadableFile("The Parquet file is encrypted.")
    footer_bytes = int.from_bytes(tail[:4], "little")
    if size < 12 or tail[4:] != b"PAR1" or footer_bytes > size - 12:
        raise UnreadableFile("The file does not end like a Parquet file; it is another format, or was cut off.")
    if footer_bytes > MAX_FOOTER_BYTES:
        raise UnreadableFile(f"The Parquet footer has {footer_bytes:,} bytes; at most {MAX_FOOTER_BYTES:,} are read.")


def _check_types(schema: pa.Schema, roles: Roles) -> None:
    """Raises UnreadableFile when a column is of a type that its part of the row cannot have."""
    kinds = pa.types
    allowed: dict[str, tuple[str, list[Any]]] = {
        "text": ("strings", []),
        "text_pair": ("strings", []),
        "label": ("strings, integers, floats or booleans", [kinds.is_integer, kinds.is_floating, kinds.is_boolean]),
        "confidence": ("floats", [kinds.is_integer, kinds.is_floating]),
        "distribution": ("a struct of floats, one field per label, or JSON strings", [_is_struct_of_numbers]),
    }
    for role, name in zip(DEFAULT_COLUMNS, roles.names, strict=True):
        if name is None:
            continue
        kind = schema.field(name).type
        values = kind.value_type if kinds.is_dictionary(kind) else kind
        tests = [kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null, *allowed[role][1]]
        if not any(test(values) for test in tests):
            raise UnreadableFile(f"The column {_quoted(name)} must hold {allowed[role][0]}, not {str(kind)[:100]}.")


def _is_struct_of_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and all(
        pa.types.is_floating(part.type) or pa.types.is_integer(part.type) for part in kind
    )


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _python_values(array: pa.Array) -> list[Any]:
    if pa.types.is_struct(array.type):
        # A struct has every field in every row; a null one is a label the row does not mention.
        return [
            None if row is None else {label: value for label, value in row.items() if value is not None} or None
            for row in array.to_pylist()
        ]
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:
        binary = pa.large_binary() if pa.types.is_large_string(array.type) else pa.binary()
        return [
            None if value is None else value.decode("utf-8", "surrogateescape")
            for value in array.view(binary).to_pylist()
        ]


# --- results: what is kept ------------------------------------------------------------------------------------------


class RowWriter:
    """Writes rows to Parquet in groups small enough to hold in memory."""

    def __init__(self, sink: Path) -> None:
        # Statistics of free text are of no use and would keep two texts a group in memory.
        self.parquet = pq.ParquetWriter(
            sink, SCHEMA, compression="zstd", use_dictionary=["label"], write_statistics=False
        )
        self.rows = 0
        self.pairs = 0
        self.waiting: list[tuple[Any, ...]] = []
        self.characters = 0

    def write(self, row: Row, line: int) -> None:
        """Add a row."""
        self.rows += 1
        self.characters += len(row.text)
        if row.text_pair is not None:
            self.pairs += 1
            self.characters += len(row.text_pair)
        if row.distribution is not None:
            self.characters += 16 * len(row.distribution)
        self.waiting.append((*row, line))
        if len(self.waiting) >= GROUP_ROWS or self.characters >= GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        columns = list(zip(*self.waiting, strict=True))
        columns[4] = tuple(None if value is None else list(value.items()) for value in columns[4])
        arrays = [pa.array(values, part.type) for values, part in zip(columns, SCHEMA, strict=True)]
        self.parquet.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        self.waiting, self.characters = [], 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.waiting and kind is None:
            self._flush()
        self.parquet.close()


class TextHashes:
    """Counts repeated texts by their 64-bit hashes, kept on disk: 20 million rows would be 320 MB in memory."""

    def __init__(self, directory: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115
        self.waiting: list[tuple[int, int]] = []
        self.rows = 0

    def add(self, row: Row) -> None:
        """Remember a row's text, pair and label."""
        # Python's string hash is keyed afresh in every process: nobody can prepare collisions.
        # A row without a label has 0, below every label's hash, so that it never stands between two labels of a text.
        label = 0 if row.label is None else hash(row.label) & (2**63 - 1) | 1
        self.waiting.append((hash((row.text, row.text_pair)), label))
        self.rows += 1
        if len(self.waiting) >= GROUP_ROWS:
            self._flush()

    def count(self) -> tuple[int, int]:
        """How many rows repeat an earlier text, and how many texts occur with different labels."""
        self._flush()
        passes = -(-self.rows // HASHES_IN_MEMORY)
        counts = np.array([self._count_part(part, passes) for part in range(passes)])
        return int(counts[:, 0].sum()), int(counts[:, 1].sum())

    def _count_part(self, part: int, passes: int) -> tuple[int, int]:
        kept = [chunk[chunk[:, 0] % passes == part] for chunk in self._chunks()]
        texts, labels = np.concatenate(kept).T
        order = np.lexsort((labels, texts))
        texts, labels = texts[order], labels[order]
        repeated = texts[1:] == texts[:-1]
        contradicts = repeated & (labels[1:] != labels[:-1]) & (labels[:-1] != 0) & (labels[1:] != 0)
        return int(repeated.sum()), len(np.unique(texts[1:][contradicts]))

    def _chunks(self) -> Iterator[np.ndarray]:
        self.file.seek(0)
        while content := self.file.read(16 * 65536):
            yield np.frombuffer(content, np.int64).reshape(-1, 2)

    def _flush(self) -> None:
        self.file.write(np.array(self.waiting, np.int64).tobytes())
        self.waiting = []

    def __enter__(self) -> TextHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class BadRows:
    """Every bad row counted, the first hundred kept."""

    def __init__(self) -> None:
        self.total = 0
        self.first: list[Fault] = []
        self.codes: Counter[str] = Counter()

    def add(self, line: int, fault: BadRow) -> None:
        """Count a bad row."""
        self.total += 1
        self.codes[fault.code] += 1
        if len(self.first) < MAX_ERRORS:
            column = None if fault.column is None else fault.column.replace("~", "~0").replace("/", "~1")
            pointer = None if column is None else f"/{column}"
            self.first.append({"line": line, "pointer": pointer, "code": fault.code, "message": fault.message})

    def problem(self, good: int) -> InvalidRows:
        """What the client reads when the file is refused."""
        first = self.first[0]
        advice = "Correct them, or send on_error=skip to leave them out." if good else "Not one row can be used."
        rows = "row" if self.total == 1 else "rows"
        detail = (
            f"{self.total:,} {rows} cannot be used, the first on line {first['line']}: {first['message']}. {advice}"
        )
        return InvalidRows(detail, errors=self.first, total_errors=self.total)

    def warnings(self) -> list[Warning_]:
        """What the client reads when bad rows were skipped."""
        if not self.total:
            return []
        reasons = ", ".join(f"{count:,} {code}" for code, count in self.codes.most_common())
        examples = "; ".join(f"line {fault['line']}: {fault['message']}" for fault in self.first[:3])
        return [_warning("skipped_rows", f"{self.total:,} bad rows were left out ({reasons}). For example {examples}.")]


def _label_warnings(counts: dict[str, int]) -> list[Warning_]:
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.split()).casefold(), []).append(label)
    clashes = [names for names in alike.values() if len(names) > 1]
    warnings = [
        _warning(
            "similar_labels",
            "These labels differ only by case or spaces and count as different classes: "
            + ", ".join(f"{_quoted(name)} ({counts[name]:,} rows)" for name in names[:10])
            + ".",
        )
        for names in clashes[:20]
    ]
    padded = [name for name in counts if name != name.strip()]
    if padded:
        warnings.append(
            _warning("padded_labels", f"Labels begin or end with spaces: {', '.join(map(_quoted, padded[:10]))}.")
        )
    return warnings


def _text_warnings(writer: RowWriter, duplicates: int, contradictions: int) -> list[Warning_]:
    warnings = []
    if duplicates:
        warnings.append(_warning("duplicate_texts", f"{duplicates:,} rows repeat the text of an earlier row."))
    if contradictions:
        warnings.append(_warning("contradictory_labels", f"{contradictions:,} texts occur with more than one label."))
    if 0 < writer.pairs < writer.rows:
        missing = writer.rows - writer.pairs
        warnings.append(_warning("missing_text_pairs", f"{missing:,} of {writer.rows:,} rows have no text_pair."))
    return warnings


def _warning(code: str, message: str) -> Warning_:
    return {"code": code, "message": message}
