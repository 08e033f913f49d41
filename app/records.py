"""The records of a dataset: every row of an uploaded file checked, and written as one Parquet file.

Everything is a stream. Memory stays flat whatever the size of the file, hostile files included.
"""

from __future__ import annotations

import gzip
import os
import resource
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from app.errors import MAX_ERRORS, EmptyFile, Fault, InvalidRows, TooLarge, UnreadableFile
from app.formats import Format, rows_of
from app.rows import BadRow, Checker, Columns, Limits, Roles, Row, quoted

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

GROUP_ROWS = 10_000
GROUP_CHARACTERS = 2 * 1024 * 1024
HASHES_IN_MEMORY = 250_000

APART_MEMORY_BYTES = 512 * 1024 * 1024
APART_SECONDS = 3600


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
        found, had_mark = rows_of(source, format, roles, limits, stack, sink.parent)
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
        *([_warning("byte_order_mark", "The file began with a byte order mark; it was removed.")] * had_mark),
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
            + ", ".join(f"{quoted(name)} ({counts[name]:,} rows)" for name in names[:10])
            + ".",
        )
        for names in clashes[:20]
    ]
    padded = [name for name in counts if name != name.strip()]
    if padded:
        warnings.append(
            _warning("padded_labels", f"Labels begin or end with spaces: {', '.join(map(quoted, padded[:10]))}.")
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
