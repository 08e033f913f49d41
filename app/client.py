"""The HTTP client: `Client(url, key)` with one method a call, which waits and tries again where that is safe.

client = Client("http://127.0.0.1:8000", key)
dataset = client.upload(Path("texts.jsonl"))
job = client.wait(client.submit({"dataset_id": dataset["id"], …})["id"])
client.download(job["id"], Path("checkpoint.tar"))
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import httpx

MEDIA_TYPES = {
    ".jsonl": "application/x-ndjson",
    ".ndjson": "application/x-ndjson",
    ".json": "application/x-ndjson",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".parquet": "application/vnd.apache.parquet",
}
CHUNK_BYTES = 256 * 1024
PART_BYTES = 8 * 1024 * 1024
PARTS_ABOVE_BYTES = 32 * 1024 * 1024
"""A larger file is uploaded in parts."""
LONGEST_PAUSE = 30.0
LONGEST_COMPLETION = 3600.0
"""Seconds the server may take to check every row of an upload in parts."""

OnProgress = Callable[[int, int], None]
"""Gets bytes done and bytes in all."""


class ApiError(Exception):
    """The server refused: the fields of its problem+json (RFC 9457)."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.code: str = problem.get("code") or "error"
        self.detail: str = problem.get("detail") or problem.get("title") or f"HTTP {status}"
        self.errors: list[dict[str, Any]] = problem.get("errors") or []
        self.total_errors: int = problem.get("total_errors") or len(self.errors)
        self.request_id: str | None = problem.get("request_id")
        super().__init__(self.detail)


class DownloadDamaged(Exception):
    """What arrived is not what the server has; the damaged copy was removed."""


class Client:
    """One server and one API key. Not for several threads at once."""

    def __init__(self, url: str, key: str, *, timeout: float = 60.0, retries: int = 6) -> None:
        """`timeout` is in seconds for each step of a call; `retries` counts tries after the first."""
        self.url, self.retries = url.rstrip("/"), retries
        self._has_answered = False
        self.http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=timeout,
            # A proxy that the environment names must not get between a client and the server on its own machine.
            trust_env=httpx.URL(self.url).host not in ("127.0.0.1", "localhost", "::1"),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.http.close()

    # --- datasets ---

    def upload(self, path: Path, on_progress: OnProgress | None = None, **options: Any) -> dict[str, Any]:
        """Upload a JSONL, CSV, TSV or Parquet file, plain or `.gz`, without reading it into memory; the dataset.

        A large file goes in parts: what was sent before a cut is not sent again, also when another client, or this
        program started anew, uploads the same file. `options` are the query of POST /datasets: name, text_column,
        text_pair_column, label_column, confidence_column, distribution_column, on_error. Raises ValueError for another
        kind of file, ApiError when the server refuses it.
        """
        name = path.name.lower()
        gzipped = name.endswith(".gz")
        kind = Path(name.removesuffix(".gz")).suffix
        if kind not in MEDIA_TYPES:
            raise ValueError(f"{path.name}: the name must end in {', '.join(MEDIA_TYPES)}, or one of these and .gz")
        parameters = {"name": path.name, **{name: value for name, value in options.items() if value is not None}}
        size = path.stat().st_size
        if size > PARTS_ABOVE_BYTES:
            return self._upload_in_parts(path, size, {**parameters, "mime_type": MEDIA_TYPES[kind]}, on_progress)
        headers = {"Content-Type": MEDIA_TYPES[kind], "Idempotency-Key": secrets.token_hex(16)}
        if gzipped:
            headers["Content-Encoding"] = "gzip"

        def content() -> Iterator[bytes]:
            with path.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
                    if on_progress is not None:
                        on_progress(stream.tell(), size)

        return self._json("POST", "/datasets", params=parameters, headers=headers, make_content=content)

    def _upload_in_parts(
        self, path: Path, size: int, wish: dict[str, Any], on_progress: OnProgress | None
    ) -> dict[str, Any]:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        upload = self._pending_upload({**wish, "bytes": size, "sha256": sha256})
        address = f"/uploads/{upload['id']}"
        arrived = {part["number"]: part["sha256"] for part in upload["parts"]}
        part_bytes = min(PART_BYTES, upload["max_part_bytes"])
        with path.open("rb") as stream:
            for number in itertools.count(1):
                if not (part := stream.read(part_bytes)):
                    break
                digest = hashlib.sha256(part)
                if arrived.get(number) != digest.hexdigest():
                    headers = {
                        "Content-Type": "application/octet-stream",
                        "Content-Digest": f"sha-256=:{base64.b64encode(digest.digest()).decode()}:",
                    }
                    self._json(
                        "POST", f"{address}/parts", params={"number": number}, headers=headers, content=part,
                        repeatable=True,
                    )  # fmt: skip
                if on_progress is not None:
                    on_progress(stream.tell(), size)
        try:
            timeout = httpx.Timeout(self.http.timeout.connect, read=LONGEST_COMPLETION)
            return self._json("POST", f"{address}/complete", timeout=timeout, repeatable=True)
        except ApiError as error:
            if error.status == 422:  # what is wrong with the file stays wrong
                self._json("POST", f"{address}/cancel")
            raise

    def _pending_upload(self, wish: dict[str, Any]) -> dict[str, Any]:
        """The upload of this very file that an earlier try has begun, or a new one.

        The Idempotency-Key is made of the file, so the server finds the earlier one by itself.
        """
        facts = json.dumps([sorted(wish.items()), PART_BYTES])
        for number in itertools.count():
            key = hashlib.sha256(f"{facts} {number}".encode()).hexdigest()
            begun = self._json("POST", "/uploads", json=wish, headers={"Idempotency-Key": key})
            try:
                upload = self._json("GET", f"/uploads/{begun['id']}")
            except ApiError as error:
                if error.status != 404:  # it has expired
                    raise
                continue
            if upload["status"] == "pending":
                return upload
        raise AssertionError("unreachable")

    def dataset(self, dataset_id: str) -> dict[str, Any]:
        """One dataset."""
        return self._json("GET", f"/datasets/{dataset_id}")

    # --- jobs ---

    def submit(self, spec: dict[str, Any], *, dry_run: bool = False, measure: bool = True) -> dict[str, Any]:
        """Start a job, or with `dry_run` learn what it would need; `measure`: by asking the teacher about a few rows."""
        if dry_run:
            parameters = {"dry_run": "true", "measure": str(measure).lower()}
            return self._json("POST", "/jobs", json=spec, params=parameters)
        return self._json("POST", "/jobs", json=spec, headers={"Idempotency-Key": secrets.token_hex(16)})

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._json("GET", f"/jobs/{job_id}")

    def jobs(self, **filters: str) -> Iterator[dict[str, Any]]:
        """The jobs, newest first. Filters: status, method, `**{"metadata[team]": "support"}`."""
        return self._pages("/jobs", filters)

    def wait(
        self, id: str, on_update: Callable[[dict[str, Any]], None] | None = None, *, every: float = 1.0
    ) -> dict[str, Any]:
        """The job, or comparison, once it has succeeded, failed or been cancelled; `on_update` sees it at every look."""
        look = self.comparison if id.startswith("cmp_") else self.job
        while True:
            found = look(id)
            if on_update is not None:
                on_update(found)
            if found["is_terminal"]:
                return found
            time.sleep(every)

    def cancel(self, id: str) -> dict[str, Any]:
        """End a job, or every run of a comparison."""
        return self._json("POST", f"/{'comparisons' if id.startswith('cmp_') else 'jobs'}/{id}/cancel")

    def pause(self, job_id: str) -> dict[str, Any]:
        """Hold a job."""
        return self._json("POST", f"/jobs/{job_id}/pause")

    def resume(self, job_id: str) -> dict[str, Any]:
        """Let a paused job go on."""
        return self._json("POST", f"/jobs/{job_id}/resume")

    def retry(self, job_id: str) -> dict[str, Any]:
        """Try a failed or cancelled job again."""
        return self._json("POST", f"/jobs/{job_id}/retry")

    def events(self, job_id: str, after: int = 0) -> list[dict[str, Any]]:
        """Every event of the job with a greater `seq`."""
        return list(self._pages(f"/jobs/{job_id}/events", {"after": after, "limit": 100}))

    def metrics(self, job_id: str, *names: str) -> dict[str, list[dict[str, Any]]]:
        """The points of the job's series by name; all series when none is named."""
        answer = self._json("GET", f"/jobs/{job_id}/metrics", params={"name": list(names)})
        return {series["name"]: series["points"] for series in answer["data"]}

    def samples(self, job_id: str, **filters: Any) -> Iterator[dict[str, Any]]:
        """The ledger, row by row. Filters: decision, label, order."""
        return self._pages(f"/jobs/{job_id}/samples", {"limit": 100, **filters})

    def label_report(self, job_id: str) -> dict[str, Any]:
        """How good the teacher's labels are, and which rows to look at; there once the student is trained."""
        return self._json("GET", f"/jobs/{job_id}/labels/report")

    # --- comparisons ---

    def compare(self, spec: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Start a comparison, or with `dry_run` learn what its runs would need."""
        if dry_run:
            return self._json("POST", "/comparisons", json=spec, params={"dry_run": "true"})
        return self._json("POST", "/comparisons", json=spec, headers={"Idempotency-Key": secrets.token_hex(16)})

    def comparison(self, comparison_id: str) -> dict[str, Any]:
        """One comparison with its table."""
        return self._json("GET", f"/comparisons/{comparison_id}")

    def comparisons(self) -> Iterator[dict[str, Any]]:
        """The comparisons, newest first, without their tables."""
        return self._pages("/comparisons", {})

    def table(self, comparison_id: str, format: str = "markdown") -> str:
        """A comparison's table as `markdown`, `csv` or `latex`."""
        return self._request("GET", f"/comparisons/{comparison_id}/table", params={"format": format}).text

    # --- checkpoints ---

    def checkpoint(self, checkpoint_id: str) -> dict[str, Any]:
        """One checkpoint: scores, size, files."""
        return self._json("GET", f"/checkpoints/{checkpoint_id}")

    def download(self, id: str, path: Path, on_progress: OnProgress | None = None) -> Path:
        """Save a checkpoint, or the best one of a job, as a tar at `path`; goes on where an earlier try broke off.

        `on_progress` gets bytes done and in all. Raises ApiError, and DownloadDamaged when the SHA-256 is wrong.
        """
        address = f"/jobs/{id}/checkpoint" if id.startswith("job_") else f"/checkpoints/{id}/download"
        try:
            head = self._request("HEAD", address).headers
        except ApiError:
            self._request("GET", address, headers={"Range": "bytes=0-0"})  # refused too, and in words
            raise
        etag, size, sha256 = head["etag"], int(head["content-length"]), _sha256(head["repr-digest"])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{sha256[:16]}.partial")  # another checkpoint, another partial file
        failures = 0
        while (done := partial.stat().st_size if partial.exists() else 0) < size:
            try:
                self._fetch(address, partial, done, size, etag, on_progress)
                failures = 0
            except httpx.TransportError:
                failures += 1
                if failures > self.retries:
                    raise
                time.sleep(_pause(failures))
        with partial.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                partial.unlink()
                raise DownloadDamaged(f"{id}: the SHA-256 of the download is not {sha256}; try again")
        partial.replace(path)
        return path

    def _fetch(
        self, address: str, partial: Path, done: int, size: int, etag: str,
        on_progress: OnProgress | None,
    ) -> None:  # fmt: skip
        headers = {"Range": f"bytes={done}-", "If-Range": etag} if done else {}
        with self.http.stream("GET", address, headers=headers) as answer:
            if answer.is_error:
                answer.read()
                raise _error(answer)
            with partial.open("ab" if answer.status_code == 206 else "wb") as stream:
                for chunk in answer.iter_raw(CHUNK_BYTES):
                    stream.write(chunk)
                    if on_progress is not None:
                        on_progress(stream.tell(), size)

    # --- how a call is made ---

    def _pages(self, address: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        while True:
            page = self._json("GET", address, params=parameters)
            yield from page["data"]
            if not page["has_more"]:
                return
            parameters = {**parameters, "after": page["next"]}

    def _json(self, method: str, address: str, **arguments: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._request(method, address, **arguments).json()
        return answer

    def _request(
        self, method: str, address: str, *, make_content: Callable[[], Iterator[bytes]] | None = None,
        repeatable: bool = False, **arguments: Any,
    ) -> httpx.Response:  # fmt: skip
        """Call, and call again after 429, 503, and a lost connection unless that could do the thing twice.

        A server that has never answered is not waited for: its address is more likely wrong.
        """
        repeatable = repeatable or method in ("GET", "HEAD") or "Idempotency-Key" in (arguments.get("headers") or {})
        failures = 0
        while True:
            failures += 1
            last = failures > self.retries
            try:
                if make_content is not None:
                    arguments["content"] = make_content()
                answer = self.http.request(method, address, **arguments)
            except httpx.TransportError as error:
                unsent = isinstance(error, httpx.ConnectError)
                if last or not (self._has_answered if unsent else repeatable):
                    raise
                time.sleep(_pause(failures))
                continue
            self._has_answered = True
            if not answer.is_error:
                return answer
            refusal = _error(answer)
            busy = answer.status_code in (429, 503) or refusal.code == "request_in_flight"
            if last or not busy:
                raise refusal
            time.sleep(_pause(failures, answer.headers.get("retry-after")))


def unpack(tar: Path | BinaryIO, directory: Path) -> None:
    """Unpack a checkpoint. A tar that holds anything but plain files, or a name that leaves the directory, is refused
    before anything is written. By hand, as Python has had a filter for this only since 3.11.4.

    Raises tarfile.TarError.
    """
    inside = directory.resolve()
    with tarfile.open(tar) if isinstance(tar, Path) else tarfile.open(fileobj=tar) as archive:
        members = archive.getmembers()
        for member in members:
            if not member.isreg() or not (inside / member.name).resolve().is_relative_to(inside):
                raise tarfile.TarError(f"{member.name!r} is no plain file inside the checkpoint")
        for member in members:
            place, content = inside / member.name, archive.extractfile(member)
            assert content is not None
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("wb") as file:
                shutil.copyfileobj(content, file)


def _error(answer: httpx.Response) -> ApiError:
    problem: Any = None
    with contextlib.suppress(ValueError):
        problem = answer.json()
    return ApiError(answer.status_code, problem if isinstance(problem, dict) else {})


def _pause(failures: int, retry_after: str | None = None) -> float:
    """Seconds to wait: what the server says, else 0.25, 0.5, 1, … up to half a minute."""
    wanted = float(retry_after) if retry_after and retry_after.isdigit() else 0.25 * 2 ** (failures - 1)
    return min(wanted, LONGEST_PAUSE)


def _sha256(repr_digest: str) -> str:
    """The SHA-256 in hex out of a Repr-Digest header (RFC 9530): `sha-256=:<base64>:`."""
    encoded = repr_digest.split("sha-256=:", 1)[1].split(":", 1)[0]
    return base64.b64decode(encoded).hex()
