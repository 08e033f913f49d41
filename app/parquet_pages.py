"""Looks at the pages of a Parquet file before Arrow does: a few bytes of a page may stand for gigabytes.

The footer does not tell the size of a page or of a value, and a hostile one lies about the rest, so the page headers
are read in the order in which Arrow will meet them. Only flat columns are judged here, where a value is a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa

MAX_PAGE_BYTES = 64 * 1024 * 1024
MAX_PAGES = 500_000
MAX_DICTIONARY_VALUES = 10_000_000
BATCH_BYTES = 4 * 1024 * 1024
BATCH_ROWS = 4_000
HEADER_BYTES = 64 * 1024
ARROW_PADDING = 100
"""Arrow reads so many bytes beyond a column chunk, for files of writers that miscounted its length."""

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PLAIN_DICTIONARY, DELTA_BYTE_ARRAY, RLE_DICTIONARY = 2, 7, 8


class UnsafePages(Exception):
    """Reading the file would take more memory than its size justifies, or its pages are damaged."""


class Page(NamedTuple):
    """What a page header says."""

    kind: int
    unpacked_bytes: int
    packed_bytes: int
    values: int
    encoding: int
    start: int
    """Where the content begins in the file."""


def safe_batch_rows(
    path: Path, metadata: Any, columns: Collection[str], categorical: Collection[str], *, most_bytes: int
) -> int:
    """How many rows of these columns can be read at a time, so that a batch holds about 4 MiB and a page a column.

    `metadata` is pyarrow's FileMetaData; of a `categorical` column Arrow keeps all values of a row group in memory. Raises UnsafePages when a page is larger than 64 MiB, when all of them unpack
    to more than `most_bytes`, or when the headers make no sense.
    """
    widest: dict[str, float] = {}
    total = Totals(most_bytes)
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                leaf = chunk.path_in_schema
                if any(leaf == name or leaf.startswith(f"{name}.") for name in columns):
                    widest[leaf] = max(widest.get(leaf, 8.0), _widest_row(file, chunk, total, leaf in categorical))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1.0, sum(widest.values())))))


class Totals:
    """What all pages together come to."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.pages = self.bytes = self.dictionary_values = 0

    def add(self, page: Page) -> None:
        """Count a page. Raises UnsafePages."""
        self.pages += 1
        self.bytes += page.unpacked_bytes
        self.dictionary_values += page.values if page.kind == DICTIONARY_PAGE else 0
        if self.pages > MAX_PAGES:
            raise UnsafePages(f"it has more than {MAX_PAGES:,} pages")
        if self.bytes > self.most_bytes:
            raise UnsafePages(f"it unpacks to more than {self.most_bytes:,} bytes")
        if self.dictionary_values > MAX_DICTIONARY_VALUES:
            raise UnsafePages(f"its dictionaries have more than {MAX_DICTIONARY_VALUES:,} values")


def _widest_row(file: BinaryIO, chunk: Any, total: Totals, categorical: bool) -> float:
    """Bytes a row of this chunk takes at most, on average over a page."""
    widest = 8.0
    longest = 0
    before = total.bytes
    for page in _pages(file, chunk):
        total.add(page)
        if categorical and total.bytes - before > MAX_PAGE_BYTES:
            raise UnsafePages(f"the categorical column {chunk.path_in_schema!r} is too large; write plain strings")
        if chunk.physical_type != "BYTE_ARRAY":
            continue
        if page.kind == DICTIONARY_PAGE:
            longest = _longest_value(file, chunk, page)
        elif page.encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            widest = max(widest, longest)
        elif page.encoding == DELTA_BYTE_ARRAY:
            # Each value may repeat all of the one before it for nothing.
            widest = max(widest, page.unpacked_bytes)
        elif page.values:
            widest = max(widest, page.unpacked_bytes / page.values)
    return widest


def _longest_value(file: BinaryIO, chunk: Any, page: Page) -> int:
    """The longest string of a dictionary page; each is preceded by its length. Every row may stand for it."""
    file.seek(page.start)
    content = file.read(page.packed_bytes)
    if chunk.compression != "UNCOMPRESSED":
        try:
            codec = pa.Codec("lz4_raw" if chunk.compression == "LZ4" else chunk.compression.lower())
            content = codec.decompress(content, page.unpacked_bytes, asbytes=True)
        except (pa.ArrowException, OSError, ValueError):
            return page.unpacked_bytes
    longest = position = 0
    for _ in range(page.values):
        length = int.from_bytes(content[position : position + 4], "little")
        longest = max(longest, length)
        position += 4 + length
        if position >= len(content):
            break
    return min(longest, page.unpacked_bytes)


def _pages(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """The pages of a column chunk, from where Arrow begins to where it stops."""
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < chunk.dictionary_page_offset < position:
        position = chunk.dictionary_page_offset
    end = position + chunk.total_compressed_size + ARROW_PADDING
    values = 0
    while values < chunk.num_values and 0 <= position < end:
        page = _page(file, position)
        for size in (page.unpacked_bytes, page.packed_bytes):
            if not 0 <= size <= MAX_PAGE_BYTES:
                raise UnsafePages(f"a page of {size:,} bytes at byte {position:,}; at most {MAX_PAGE_BYTES:,} are read")
        if page.values < 0:
            raise UnsafePages(f"a page at byte {position:,} has {page.values:,} values")
        yield page
        values += page.values if page.kind in (DATA_PAGE, DATA_PAGE_V2) else 0
        position = page.start + page.packed_bytes


CONTENT_FIELDS = {5: 2, 7: 2, 8: 4}
"""Fields of a page header that describe its content, and where each keeps the encoding; the first is its values."""


def _page(file: BinaryIO, position: int) -> Page:
    file.seek(position)
    reader = CompactReader(file.read(HEADER_BYTES))
    numbers: dict[int, int] = {}
    content: dict[int, int] = {}
    try:
        for number, kind in reader.fields():
            if kind == CompactReader.I32:
                numbers[number] = reader.integer()
            elif kind == CompactReader.STRUCT and number in CONTENT_FIELDS:
                inner: dict[int, int] = {}
                for field, field_kind in reader.fields():
                    if field_kind == CompactReader.I32:
                        inner[field] = reader.integer()
                    else:
                        reader.skip(field_kind)
                content = {1: inner[1], 2: inner[CONTENT_FIELDS[number]]}
            else:
                reader.skip(kind)
        start = position + reader.position
        return Page(numbers[1], numbers[2], numbers[3], content.get(1, 0), content.get(2, 0), start)
    except (IndexError, KeyError, ValueError):
        raise UnsafePages(f"no page header at byte {position:,}") from None


class CompactReader:
    """As much of Thrift's compact protocol as a page header needs. Runs out of bytes with IndexError."""

    I32, STRUCT = 5, 12

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0
        self.depth = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; the caller reads or skips the value before the next one."""
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self.integer()
            yield number, head & 15

    def integer(self) -> int:
        """A zigzag number."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, kind: int) -> None:
        """Pass over a value. Raises ValueError for a type that no page header holds."""
        if kind in (1, 2):
            return
        if kind == 3:
            self.position += 1
        elif kind in (4, 5, 6):
            self._varint()
        elif kind == 7:
            self.position += 8
        elif kind == 8:
            length = self._varint()
            self.position += length
        elif kind == 12 and self.depth < 8:
            self.depth += 1
            for _, inner in self.fields():
                self.skip(inner)
            self.depth -= 1
        else:
            raise ValueError(kind)

    def _byte(self) -> int:
        value = self.content[self.position]
        self.position += 1
        return value

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("number too long")
