"""Receives a file, or a part of one: from the request's body, raw or multipart, to disk and never into memory."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from app.errors import BadRequest, EmptyFile, TooLarge, Unprocessable, UnsupportedMedia
from app.formats import Format

CONTENT_TYPES: dict[str, Format] = {
    "application/x-ndjson": "jsonl",
    "application/ndjson": "jsonl",
    "application/jsonl": "jsonl",
    "application/x-jsonlines": "jsonl",
    "application/json": "jsonl",
    "text/csv": "csv",
    "text/tab-separated-values": "tsv",
    "application/vnd.apache.parquet": "parquet",
    "application/x-parquet": "parquet",
}
SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
ACCEPTED = (
    "Send application/x-ndjson (.jsonl), text/csv (.csv), text/tab-separated-values (.tsv) or "
    "application/vnd.apache.parquet (.parquet), plain or gzipped (.gz), as the body or as the multipart field 'file'."
)
WRITE_BYTES = 1024 * 1024
MULTIPART_OVERHEAD_BYTES = 64 * 1024


@dataclass(frozen=True)
class ReceivedFile:
    """A file that has arrived, byte for byte as it was sent."""

    path: Path
    format: Format
    file_name: str | None
    bytes: int
    sha256: str


async def receive(request: Request, path: Path, *, name: str | None, most_bytes: int) -> ReceivedFile:
    """Write the request's file to `path`. `name` hints at the format where the Content-Type does not tell it.

    Raises TooLarge as soon as the limit is passed, UnsupportedMedia before the first byte is read where that can be
    told, Unprocessable for a form without a file, EmptyFile, and BadRequest when the client goes away.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise UnsupportedMedia(f"Content-Encoding {encoding[:50]!r} is not taken. {ACCEPTED}")
    _refuse_by_length(request, most_bytes + MULTIPART_OVERHEAD_BYTES, most_bytes)
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    try:
        with path.open("wb") as file:
            spool = Spool(file.write, most_bytes)
            if kind == b"multipart/form-data":
                form = FileForm(parameters.get(b"boundary", b""), spool, name)
                await _pump(request.stream(), form.write, spool)
                format, file_name = form.finish()
            else:
                format, file_name = format_of(kind.decode("latin-1"), name), None
                await _pump(request.stream(), spool.write, spool)
    except ClientDisconnect:
        raise BadRequest("The upload broke off.") from None
    if not spool.bytes:
        raise EmptyFile("The file is empty.")
    return ReceivedFile(path, format, file_name, spool.bytes, spool.digest.hexdigest())


async def receive_part(request: Request, path: Path, *, most_bytes: int) -> tuple[int, str]:
    """Write the request's raw body to `path`, whatever it holds; how many bytes came, and their SHA-256 in hex.

    Raises TooLarge as soon as the limit is passed, and BadRequest when the client goes away.
    """
    _refuse_by_length(request, most_bytes, most_bytes)
    try:
        with path.open("wb") as file:
            spool = Spool(file.write, most_bytes)
            await _pump(request.stream(), spool.write, spool)
    except ClientDisconnect:
        raise BadRequest("The part broke off; send it again.") from None
    return spool.bytes, spool.digest.hexdigest()


def _refuse_by_length(request: Request, most_sent: int, most_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > most_sent:
        raise _too_large(most_bytes)


def format_of(content_type: str, file_name: str | None) -> Format:
    """The format a Content-Type or else a file name tells. Raises UnsupportedMedia."""
    content_type = content_type.strip().lower()
    suffix = PurePosixPath((file_name or "").lower().removesuffix(".gz")).suffix
    format = CONTENT_TYPES.get(content_type) or SUFFIXES.get(suffix)
    if format is None:
        sent = f"as {content_type[:100]}" if content_type else "without a Content-Type"
        named = f", named {file_name[:100]!r}" if file_name else ""
        raise UnsupportedMedia(f"The file was sent {sent}{named}. {ACCEPTED}")
    return format


class Spool:
    """Collects a file's bytes into large writes, counting and hashing them."""

    def __init__(self, sink: Callable[[bytearray], object], most_bytes: int) -> None:
        self.sink, self.most_bytes = sink, most_bytes
        self.waiting = bytearray()
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Take some bytes. Raises TooLarge."""
        self.bytes += len(data)
        if self.bytes > self.most_bytes:
            raise _too_large(self.most_bytes)
        self.waiting += data

    def flush(self) -> None:
        """Hash and write what has been taken; blocks on the disk."""
        self.digest.update(self.waiting)
        self.sink(self.waiting)
        self.waiting = bytearray()


async def _pump(chunks: AsyncIterator[bytes], take: Callable[[bytes], None], spool: Spool) -> None:
    sent = 0
    async for chunk in chunks:
        sent += len(chunk)
        if sent > spool.most_bytes + MULTIPART_OVERHEAD_BYTES:  # what a form holds around its file counts too
            raise _too_large(spool.most_bytes)
        take(chunk)
        if len(spool.waiting) >= WRITE_BYTES:
            await run_in_threadpool(spool.flush)
    await run_in_threadpool(spool.flush)


class FileForm:
    """A multipart form whose one field `file` goes to the spool. Any other field is refused: options go in the query."""

    def __init__(self, boundary: bytes, spool: Spool, name: str | None) -> None:
        self.spool, self.name = spool, name
        self.format: Format | None = None
        self.file_name: str | None = None
        self.header = b""
        self.value = b""
        self.headers: dict[bytes, bytes] = {}
        self.ended = False
        if not boundary:
            raise BadRequest("The multipart body has no boundary.")
        try:
            self.parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin_part,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise BadRequest(f"The multipart body cannot be read: {error}.") from None

    def write(self, data: bytes) -> None:
        """Take some bytes of the body. Raises BadRequest, Unprocessable, UnsupportedMedia or TooLarge."""
        try:
            self.parser.write(data)
        except FormParserError as error:
            raise BadRequest(f"The multipart body cannot be read: {error}.") from None

    def finish(self) -> tuple[Format, str | None]:
        """The file's format and name. Raises Unprocessable when the form had no file, BadRequest when it broke off."""
        if not self.ended:
            raise BadRequest("The multipart body breaks off before its closing boundary.")
        if self.format is None:
            raise Unprocessable("The form has no field 'file'; send the file under that name.")
        return self.format, self.file_name

    def _begin_part(self) -> None:
        self.headers = {}

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def _header_end(self) -> None:
        self.headers[self.header.lower()] = self.value
        self.header = self.value = b""

    def _headers_finished(self) -> None:
        _, disposition = parse_options_header(self.headers.get(b"content-disposition"))
        field = disposition.get(b"name", b"").decode("utf-8", "replace")
        if field != "file":
            raise Unprocessable(f"Unexpected form field {field[:100]!r}: send 'file' alone, and options in the query.")
        if self.format is not None:
            raise Unprocessable("The form has more than one field 'file'; upload one file at a time.")
        if b"filename" in disposition:
            self.file_name = disposition[b"filename"].decode("utf-8", "replace")
        content_type, _ = parse_options_header(self.headers.get(b"content-type"))
        self.format = format_of(content_type.decode("latin-1"), self.file_name or self.name)

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.spool.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self.ended = True


def _too_large(most_bytes: int) -> TooLarge:
    return TooLarge(f"The upload is larger than {most_bytes:,} bytes, the most this server accepts.")
