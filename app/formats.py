"""Rows out of JSONL, CSV, TSV and Parquet, plain or gzipped, as a stream; a hostile file costs no more than a long one."""

from __future__ import annotations

import csv
import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import EmptyFile, Fault, TooLarge, UnreadableFile, UnsupportedMedia
from app.rows import DEFAULT_COLUMNS, BadRow, Limits, Roles, json_type, quoted

# Arrow's own allocator holds on to 20 MB more than malloc does over a large file.
pa.set_memory_pool(pa.system_memory_pool())

Format = Literal["jsonl", "csv", "tsv", "parquet"]
Found = Iterator[tuple[int, "Sequence[Any] | BadRow | None"]]
"""What a reader yields: the line, and one value per role; or why the row is bad; or None for a blank line."""

READ_BYTES = 256 * 1024
MAX_FOOTER_BYTES = 8 * 1024 * 1024
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ROWS = 1000

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


def rows_of(
    source: Path, format: Format, roles: Roles, limits: Limits, stack: ExitStack, spool: Path
) -> tuple[Found, bool]:
    """The rows of a file, and whether it began with a byte order mark. A gzipped one is recognised by its first bytes.

    What is opened is closed with the stack; `spool` is a directory for a copy. Raises EmptyFile, UnreadableFile,
    UnknownColumn, UnsupportedMedia or TooLarge, here or while the rows are read.
    """
    stream = stack.enter_context(_open(source, limits))
    had_mark = _skip_byte_order_mark(stream, format)
    if format == "parquet":
        return _parquet(_plain_file(source, stream, stack, spool), roles, limits), had_mark
    if format == "jsonl":
        return _json_lines(stream, roles, limits), had_mark
    return _delimited(stream, "," if format == "csv" else "\t", roles, limits), had_mark


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
            yield line, BadRow(None, "not_an_object", f"the line must hold a JSON object, not {json_type(row)}")
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
            raise UnreadableFile(f"The column {quoted(name)} occurs {header.count(name)} times.")


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
            raise UnreadableFile(f"The column {quoted(name)} must hold {allowed[role][0]}, not {str(kind)[:100]}.")


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
