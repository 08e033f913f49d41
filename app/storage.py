"""Files by key over fsspec: `file://` on one machine, `s3://` on many. Keys are made by us and never by a client."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec
import structlog
from fsspec.exceptions import FSTimeoutError

from app import spool
from app.config import settings
from app.errors import FULL, StorageAway, StorageRefuses

KEY = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*(/[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*)*")
HALF = re.compile(r"\.[a-z0-9_]{8}")
"""Names that tempfile gives to the files that put() has begun."""
COPY_BYTES = 1024 * 1024
PART_BYTES = 5 * COPY_BYTES
"""What files go to S3 and come from it in, the least that it takes: a part, unlike a file, has a time to arrive in."""
CLIENTS = {"aiobotocore", "aiohttp", "botocore", "fsspec", "s3fs"}
"""Packages whose exceptions are a far storage's troubles."""

log = structlog.get_logger()


class Storage:
    """One place for files, named by a URL; whatever is put appears whole or not at all.

    Where it is not a local directory, every method raises StorageAway when it does not answer as it should, or within
    a bounded time (app/s3.py), after what its client tries by itself, and StorageRefuses when it does not let us.
    """

    def __init__(self, url: str) -> None:
        if url.startswith("s3:"):
            from app import s3  # its client is an extra

            self.filesystem, self.root = s3.connected(url)
        else:
            self.filesystem, self.root = fsspec.core.url_to_fs(url)
        self.is_local = "file" in self.filesystem.protocol

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"not a storage key: {key!r}")
        return f"{self.root}/{key}"

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            if self.is_local or not _is_a_storages(error):
                raise
            log.error("storage_trouble", error=f"{type(error).__name__}: {error}")
            raise (StorageRefuses if isinstance(error, PermissionError) else StorageAway) from error

    def put(self, key: str, source: Path, *, confirm: Callable[[], object] = lambda: None) -> None:
        """Copy a local file to `key`. Atomic: a reader sees the old file, or the new one, or none.

        `confirm` is called at the last moment before the file appears; what it raises leaves everything as it was.
        """
        path = self._path(key)
        if not self.is_local:
            confirm()
            with self._telling():
                self.filesystem.put_file(str(source), path, chunksize=PART_BYTES)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as partial:
            try:
                with source.open("rb") as stream:
                    while chunk := stream.read(COPY_BYTES):
                        partial.write(chunk)
                partial.flush()
                os.fsync(partial.fileno())  # else a power cut could leave the name without the bytes
                confirm()
                Path(partial.name).replace(target)
            except BaseException:
                Path(partial.name).unlink(missing_ok=True)
                raise

    def put_bytes(self, key: str, content: bytes, *, confirm: Callable[[], object] = lambda: None) -> None:
        """Store a small file. `confirm` as in put()."""
        with spool.directory() as directory:
            file = directory / "content"
            file.write_bytes(content)
            self.put(key, file, confirm=confirm)

    @contextmanager
    def open(self, key: str) -> Iterator[BinaryIO]:
        """The file for reading, seekable. Raises FileNotFoundError."""
        with self._telling(), self.filesystem.open(self._path(key), "rb") as stream:
            yield stream

    def read(self, key: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self.open(key) as stream:
            return stream.read()

    def exists(self, key: str) -> bool:
        """Whether there is a file at `key`."""
        with self._telling():
            return bool(self.filesystem.exists(self._path(key)))

    def names(self, prefix: str) -> list[str]:
        """The names of the files and folders right under `prefix/`, in order; there may be none."""
        try:
            with self._telling():
                entries = self.filesystem.ls(self._path(prefix), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in entries)

    def abandoned(self, prefix: str, seconds: float) -> list[Path]:
        """Files under `prefix/` that a process which died in put() left half-written at least so long ago.

        Only a local storage has any.
        """
        if not self.is_local:
            return []
        limit = time.time() - seconds
        hidden = (path for path in Path(self._path(prefix)).rglob(".*") if HALF.fullmatch(path.name))
        return [path for path in hidden if path.is_file() and path.stat().st_mtime < limit]

    def delete(self, key: str) -> None:
        """Remove a file; it may be gone already."""
        with contextlib.suppress(FileNotFoundError), self._telling():
            self.filesystem.rm_file(self._path(key))

    def delete_all(self, prefix: str) -> None:
        """Remove the file at `prefix`, or every file under `prefix/`; there may be none."""
        with contextlib.suppress(FileNotFoundError), self._telling():
            self.filesystem.rm(self._path(prefix), recursive=True)

    @contextmanager
    def local_copy(self, key: str) -> Iterator[Path]:
        """The file as a local path: itself on a local storage, else a temporary copy."""
        path = self._path(key)
        if self.is_local:
            if not Path(path).is_file():
                raise FileNotFoundError(key)
            yield Path(path)
            return
        with spool.directory() as directory:
            copy = directory / Path(key).name
            with self._telling():
                self.filesystem.get_file(path, str(copy))
            yield copy


def _is_a_storages(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno not in FULL:
        return True
    if isinstance(error, IndexError) and isinstance(error.__context__, FSTimeoutError):
        return True  # s3fs looks for the arguments of a timeout, which has none
    return type(error).__module__.partition(".")[0] in CLIENTS


@lru_cache
def storage() -> Storage:
    """The storage the settings name."""
    return Storage(settings().storage_url)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a local file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
