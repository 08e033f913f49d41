"""The `understudy` command: the parts of the service, and a client that speaks HTTP only.

Heavy modules are imported where they are needed, so that `understudy jobs` does not load a web server.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from app.terminal import escape

if TYPE_CHECKING:
    from app.client import Client

EXIT_CODES = {"succeeded": 0, "failed": 1, "cancelled": 2}
INTERRUPTED = 130
PIPE_WIDTH = 200
SPLIT_FIELDS = ("dataset_id", "validation_dataset_id", "test_dataset_id")
DATASET_ID = re.compile(r"ds_[0-9a-f]{32}")
NOT_YET = "ds_" + "0" * 32
"""Stands for a dataset that is not uploaded yet."""

# Into a pipe a table may be as wide as it likes; only a terminal needs it folded.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class OneLineErrors(TyperGroup):
    """Whatever a user can mend ends as a line on stderr and exit status 1, not as a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            lines = explain(error)
            if lines is None:
                raise
            for line in lines:
                err.print(escape(line))
            raise SystemExit(1) from None


def explain(error: Exception) -> list[str] | None:
    """What to tell the user; None for what only a programmer can mend."""
    import tarfile

    import httpx

    from app.client import ApiError, DownloadDamaged

    if isinstance(error, ApiError):
        # A refusal with one error says it in `detail` already.
        shown = error.errors[:20] if len(error.errors) > 1 or error.total_errors > 1 else []
        lines = [f"error: {error.detail}" + (f" (request {error.request_id})" if error.status >= 500 else "")]
        lines += [f"  {_place(fault)}{fault.get('message')}" for fault in shown]
        more = error.total_errors - len(shown)
        lines += [f"  … and {more} more"] if shown and more > 0 else []
        if error.code in ("invalid_rows", "unknown_column"):
            lines.append("`understudy upload FILE` takes --text-column NAME, --label-column NAME and --on-error skip.")
        return lines
    if isinstance(error, httpx.TransportError):
        return [f"error: no answer from {error.request.url.copy_with(path='/')} ({error}); is the server running?"]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [f"error: {error.filename}: {error.strerror}"]
    known: tuple[type[Exception], ...] = (Mistake, DownloadDamaged, tarfile.TarError, OSError)
    if type(error).__module__ in ("app.config", "app.up", "app.embedded") or isinstance(error, known):
        return [f"error: {error}"]
    if type(error).__module__.startswith("sqlalchemy.") and type(error).__name__ == "OperationalError":
        reason = str(error.__cause__).splitlines()[0]
        return [f"error: the database does not answer ({reason}); UNDERSTUDY_DATABASE_URL says where it is"]
    return None


def _place(fault: dict[str, Any]) -> str:
    if fault.get("line") is not None:
        return f"line {fault['line']}: "
    return f"{fault['pointer']}: " if fault.get("pointer") else ""


class Mistake(Exception):
    """The command line, or a file it names, cannot be used as it is."""


app = typer.Typer(
    cls=OneLineErrors, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
    help="Knowledge distillation as a service: unlabeled text in, a small RoBERTa classifier out.",
)  # fmt: skip
keys_app = typer.Typer(
    no_args_is_help=True,
    help="Make, list, rotate, limit and revoke API keys, on the server's database; beside `up`, POST /keys does.",
)
app.add_typer(keys_app, name="keys")


# --- the service ----------------------------------------------------------------------------------------------------

Port = Annotated[int, typer.Option(min=0, max=65535, help="Where the API listens; 0 takes a free port.")]
Host = Annotated[str, typer.Option(help="The address the API listens on; 0.0.0.0 for every interface.")]


@app.command()
def up(
    port: Port = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept, also between runs.")] = Path("data"),
    workers: Annotated[int, typer.Option(min=1, max=64, help="How many worker processes.")] = 1,
    host: Host = "127.0.0.1",
) -> None:
    """Run the whole service here: PostgreSQL, Redis, migrations, API, workers, scheduler."""
    from app.up import run

    run(data_dir, host=host, port=port, workers=workers)


@app.command()
def api(port: Port = 8000, host: Host = "127.0.0.1") -> None:
    """Run the API alone."""
    import uvicorn

    from app.logs import configure_logging

    configure_logging()
    # Event streams stay open for as long as a job runs; they must not hold up the end.
    uvicorn.run(
        "app.main:create_app", factory=True, host=host, port=port, access_log=False, timeout_graceful_shutdown=3,
        server_header=False,
    )  # fmt: skip


class Queue(StrEnum):
    LABEL = "label"
    TRAIN = "train"
    ALL = "all"


@app.command()
def worker(
    queue: Annotated[Queue, typer.Option(help="Which work to take.")] = Queue.ALL,
) -> None:
    """Run one worker: one process that does one thing at a time."""
    from app.queue import QUEUES

    queues = ",".join(sorted(set(QUEUES.values()))) if queue is Queue.ALL else queue.value
    command = [
        sys.executable, "-m", "celery", "-A", "workers.celery_app", "worker", "--pool", "solo", "--concurrency", "1",
        "-Q", queues, "-n", f"{queue.value}-{os.getpid()}@%h", "--loglevel", "INFO",
        "--without-gossip", "--without-mingle", "--without-heartbeat",
    ]  # fmt: skip
    os.execv(sys.executable, command)  # Celery takes over this process, so signals reach it directly


@app.command()
def scheduler() -> None:
    """Run the scheduler, which sets going again what a lost worker or message left behind."""
    from app.logs import configure_logging
    from app.scheduler import run

    configure_logging()
    run()


@app.command()
def migrate() -> None:
    """Bring the database to the newest schema."""
    from app.migrate import upgrade

    upgrade()


@app.command("sweep-files")
def sweep_files(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list them.")] = False,
) -> None:
    """Remove files of the storage that no row of the database names. The scheduler does so every hour by itself."""
    from app import retention
    from app.storage import storage

    for key in retention.sweep_files(storage(), dry_run=dry_run):
        out.print(key, markup=False)


class Scope(StrEnum):
    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", help="As `keys list` shows it.")]
LimitOption = Annotated[
    list[str] | None,
    typer.Option("--limit", metavar="NAME=VALUE", help="A limit that differs from the settings'; `none` for no limit."),
]


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whose data the key opens.")],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "made on the command line",
    days: Annotated[float | None, typer.Option(min=0.001, help="How long it works; for ever when left out.")] = None,
    scope: Annotated[Scope, typer.Option(help="What it may do; admin also manages the tenant's keys.")] = Scope.WRITE,
    limit: LimitOption = None,
) -> None:
    """Make a key and print it. It is shown this once."""
    from app import audit, keys
    from app.db import session_scope

    own = _limits(limit or [])
    try:
        with session_scope() as session:
            row, key = keys.create(session, tenant, name, days=days, scope=scope.value, limits=own)
            audit.add(session, action="create_key", tenant=tenant, object_id=row.id, address="command line")
    except ValueError as error:
        raise Mistake(str(error)) from None
    err.print(f"{row.id} for tenant {row.tenant}, scope {row.scope}")
    out.print(key, markup=False)


def _limits(entries: list[str]) -> dict[str, int | None]:
    from app import limits

    found: dict[str, int | None] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            found |= limits.checked({name: None if value == "none" else int(value)})
        except ValueError as error:
            raise Mistake(f"--limit {entry}: {error}") from None
    return found


@keys_app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
) -> None:
    """List the keys. The keys themselves are kept nowhere."""
    from sqlalchemy import select

    from app.db import session_scope
    from app.models import ApiKey

    table = Table("id", "tenant", "name", "scope", "made", "used", "expires", "revoked", "limits")
    with session_scope() as session:
        for key in session.scalars(select(ApiKey).order_by(ApiKey.id)):
            if tenant not in (None, key.tenant):
                continue
            moments = (key.created_at, key.last_used_at, key.expires_at, key.revoked_at)
            days = (f"{moment:%Y-%m-%d}" if moment else "" for moment in moments)
            own = " ".join(f"{name}={'none' if most is None else most}" for name, most in key.limits.items())
            table.add_row(key.id, key.tenant, escape(key.name), key.scope, *days, own)
    out.print(table)


@keys_app.command("rotate")
def rotate_key(
    key_id: KeyId,
    grace_hours: Annotated[float, typer.Option(min=0, help="How long the old key goes on working.")] = 24,
) -> None:
    """Make a key in the place of another and print it. The old one goes on working for the grace period."""
    from app import audit, keys
    from app.db import session_scope
    from app.errors import KeyEnded
    from app.models import ApiKey

    with session_scope() as session:
        old = session.get(ApiKey, key_id)
        if old is None:
            raise Mistake(f"there is no key {key_id}")
        try:
            row, key = keys.rotate(session, old, grace_hours=grace_hours)
        except KeyEnded as error:
            raise Mistake(str(error)) from None
        audit.add(session, action="rotate_key", tenant=old.tenant, object_id=key_id, address="command line")
        until = old.expires_at
    err.print(f"{row.id} for tenant {row.tenant}; {key_id} works until {until:%Y-%m-%d %H:%M} UTC")
    out.print(key, markup=False)


@keys_app.command("limit")
def limit_key(
    key_id: KeyId,
    limit: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE…", help="`none` for no limit.")] = None,
) -> None:
    """Set the limits of a key that differ from the settings'; without any, the settings' hold again."""
    from app import audit
    from app.db import session_scope
    from app.models import ApiKey

    own = _limits(limit or [])
    with session_scope() as session:
        key = session.get(ApiKey, key_id, with_for_update=True)
        if key is None:
            raise Mistake(f"there is no key {key_id}")
        key.limits = own
        audit.add(session, action="limit_key", tenant=key.tenant, object_id=key_id, address="command line")


@keys_app.command("revoke")
def revoke_key(key_id: KeyId) -> None:
    """End a key."""
    from app import audit, keys
    from app.db import session_scope
    from app.models import ApiKey

    with session_scope() as session:
        revoked = keys.revoke(session, key_id)
        if revoked:
            tenant = session.get_one(ApiKey, key_id).tenant
            audit.add(session, action="revoke_key", tenant=tenant, object_id=key_id, address="command line")
    if not revoked:
        raise Mistake(f"there is no working key {key_id}")


@app.command("audit")
def show_audit(
    tenant: Annotated[str | None, typer.Option(help="Only what this tenant's keys did.")] = None,
    denied: Annotated[bool, typer.Option("--denied", help="Only what was denied.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show who did, or tried, what (on the server's database), newest first."""
    from sqlalchemy import select

    from app.db import session_scope
    from app.models import AuditEntry

    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if tenant is not None:
        query = query.where(AuditEntry.tenant == tenant)
    if denied:
        query = query.where(AuditEntry.outcome == "denied")
    columns = [column.name for column in AuditEntry.__table__.columns if column.name != "id"]
    table = Table(*columns)
    with session_scope() as session:
        for entry in session.scalars(query):
            values = {name: getattr(entry, name) for name in columns}
            values["at"] = f"{entry.at:%Y-%m-%d %H:%M:%S}Z" if not as_json else entry.at.isoformat()
            if as_json:
                print(json.dumps(values))
            else:
                table.add_row(*("" if value is None else escape(str(value)) for value in values.values()))
    if not as_json:
        out.print(table)


# --- the client -----------------------------------------------------------------------------------------------------


class OnError(StrEnum):
    REJECT = "reject"
    SKIP = "skip"


Url = Annotated[str, typer.Option(envvar="UNDERSTUDY_URL", help="Where the API is.")]
Key = Annotated[
    str | None, typer.Option(envvar="UNDERSTUDY_API_KEY", help="The API key; else the one in ./data/api-key.")
]
HERE = "http://127.0.0.1:8000"
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


def _client(url: str, key: str | None) -> Client:
    from app.client import Client

    if not url.startswith(("http://", "https://")):
        raise Mistake(f"--url {url!r}: must begin with http:// or https://")
    if key is None:
        try:
            key = Path("data/api-key").read_text()
        except FileNotFoundError:
            raise Mistake("no API key: give --key, set UNDERSTUDY_API_KEY, or run where data/api-key is") from None
    key = key.strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise Mistake("the API key is not one: keys look like us_…")
    return Client(url, key)


def _id(given: str, *kinds: str) -> str:
    """The id, of one of these kinds. Raises Mistake."""
    if not re.fullmatch(rf"({'|'.join(kinds)})_\w+", given, re.ASCII):
        raise Mistake(f"{given!r} is not such an id: they begin with {' or '.join(f'{kind}_' for kind in kinds)}")
    return given


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=".jsonl, .csv, .tsv or .parquet, or .gz.")],
    name: Annotated[str | None, typer.Option(help="What to call it; the file's name when left out.")] = None,
    text_column: Annotated[str | None, typer.Option(help="The column with the text.")] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="The column with the second text of a pair.")] = None,
    label_column: Annotated[str | None, typer.Option(help="The column with the label.")] = None,
    confidence_column: Annotated[str | None, typer.Option(help="The column that says how sure the label is.")] = None,
    distribution_column: Annotated[str | None, typer.Option(help="The column with a probability per label.")] = None,
    on_error: Annotated[
        OnError, typer.Option(help="What one bad row does: refuse the file, or be left out.")
    ] = OnError.REJECT,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Upload a dataset and print its id. `submit` uploads files by itself; here their columns can be named."""
    columns = {
        "text_column": text_column, "text_pair_column": text_pair_column, "label_column": label_column,
        "confidence_column": confidence_column, "distribution_column": distribution_column,
    }  # fmt: skip
    with _client(url, key) as client:
        out.print(_upload(client, file, **columns, name=name, on_error=on_error.value)["id"])


@app.command()
def submit(
    spec: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="[SPEC.json]",
            help="The body of POST /jobs; a dataset may be named by id or by the path of a file to upload.",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Unlabeled rows: a file, or an id.")] = None,
    validation: Annotated[str | None, typer.Option(help="Labeled rows that choose the checkpoint.")] = None,
    test: Annotated[str | None, typer.Option(help="Labeled rows for the final scores.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="A class: `name` or `name=description`; repeat it.")] = None,
    teacher: Annotated[str | None, typer.Option(help="embedding, lbl2vec or dataset; a spec file for others.")] = None,
    method: Annotated[str | None, typer.Option(help="llkd, no_selection, random, …")] = None,
    student: Annotated[str | None, typer.Option(help="all-MiniLM-L6-v2, scratch, or a model of the server.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="How often the student sees the rows.")] = None,
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    wait: Annotated[bool, typer.Option(help="Watch the job until it ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what the job would need.")] = False,
    measure: Annotated[
        bool, typer.Option(help="In a dry run: have a worker ask the teacher about a few rows, where one is free.")
    ] = True,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Start a job, by a spec file, by options, or by a file with options on top. Prints its id."""
    wish = _read_spec(spec)
    folder = spec.parent if spec else Path()
    for field, given in zip(SPLIT_FIELDS, (dataset, validation, test), strict=True):
        if given is not None:
            wish[field] = given if DATASET_ID.fullmatch(given) else str(Path(given).resolve())
    if label:
        wish["labels"] = [_label(entry) for entry in label]
    for field, kind in (("teacher", teacher), ("method", method)):
        if kind is not None:
            wish[field] = {"kind": kind}
    wish.setdefault("teacher", {"kind": "embedding"})
    wish.setdefault("method", {"kind": "llkd"})
    for field, change in (("student", {"model": student}), ("training", {"epochs": epochs})):
        if None not in change.values():
            if not isinstance(wish.setdefault(field, {}), dict):
                raise Mistake(f"{spec}: {field} must be a JSON object")
            wish[field] |= change
    if name is not None:
        wish["name"] = name
    if "dataset_id" not in wish:
        raise Mistake("give the rows to label: --dataset FILE, or a SPEC.json with a dataset_id")
    with _client(url, key) as client:
        _look_first(wish, folder, lambda early: client.submit(early, dry_run=True, measure=False))
        upload_files(client, wish, folder)
        if dry_run:
            _print_need(client.submit(wish, dry_run=True, measure=measure))
            return
        job = client.submit(wish)
        for warning in job["warnings"]:
            err.print(escape(f"warning: {warning['message']}"))
        out.print(job["id"])
        if wait:
            raise typer.Exit(_watch(client, job["id"], told=job["warnings"]))


def _print_need(told: dict[str, Any]) -> None:
    """What a dry run told, a line for each thing."""
    for warning in told["warnings"]:
        err.print(escape(f"warning: {warning['message']}"))
    if told["measurement_note"]:
        err.print(escape(f"note: {told['measurement_note']}"))
    basis = {"sample": "measured on a few rows", "earlier_jobs": "as earlier jobs here", "default_rate": "a guess"}
    lines = {
        "rows to label": f"{told['rows_to_label']:,}",
        "rows in the cache": f"{told['rows_cached']:,}",
        "teacher tokens": f"{told['teacher_tokens']:,}",
        "cost": "no price" if told["cost"] is None else f"{told['cost']:,.4f}",
        "labeling": f"{told['labeling_seconds']:,.1f} s by one worker ({basis[told['labeling_basis']]})",
        "training": f"{told['training_seconds']:,.1f} s ({basis[told['training_basis']]})",
    }
    if (sample := told["measurement"]) is not None:
        said = f"{sample['rows']} rows asked, {sample['failed']} failed, {sample['rows_per_second']:.1f} rows/s"
        if sample["confidence"] is not None:
            said += ", confidence {p25:.2f} to {p75:.2f} for half of them, median {median:.2f}".format(
                **sample["confidence"]
            )
        lines["sample"] = f"{said}; these rows are paid for"
    for name, value in lines.items():
        out.print(escape(f"{name}: {value}"), highlight=False)


def _look_first(spec: dict[str, Any], folder: Path, dry_run: Callable[[dict[str, Any]], object]) -> None:
    """Before anything is uploaded: are the files there, and what does the server say of the spec but for them?

    Raises Mistake and ApiError.
    """
    from app.client import ApiError

    early = copy.deepcopy(spec)
    for part, field in list(_files(early)):
        if not (folder / part[field]).is_file():
            raise Mistake(f"{field}: there is no file {folder / part[field]}")
        part[field] = NOT_YET
    if early == spec:
        return
    try:
        dry_run(early)
    except ApiError as error:
        error.errors = [fault for fault in error.errors if NOT_YET not in fault["message"]]
        if error.status != 422 or not error.errors:
            return
        error.total_errors, first = len(error.errors), error.errors[0]
        error.detail = f"{_place(first)}{first['message']}".lstrip("/")
        raise


def upload_files(client: Client, spec: dict[str, Any], folder: Path) -> None:
    """Replace every dataset of the spec that is a path, taken from `folder`, by the id of its upload."""
    for part, field in list(_files(spec)):
        part[field] = _upload(client, folder / part[field])["id"]


def _files(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the spec names a dataset by a path: the spec itself or an arm of it, and the field."""
    arms = spec.get("arms", [])
    for part in (spec, *(arms if isinstance(arms, list) else [])):
        for field in SPLIT_FIELDS if isinstance(part, dict) else ():
            if isinstance(part.get(field), str) and not DATASET_ID.fullmatch(part[field]):
                yield part, field


def _upload(client: Client, path: Path, **options: str | None) -> dict[str, Any]:
    from app.progress import transfer_progress

    try:
        with transfer_progress(err, "upload") as update:
            stored = client.upload(path, update, **options)
    except ValueError as error:
        raise Mistake(str(error)) from None
    err.print(escape(f"uploaded {path.name}: {stored['rows']:,} rows, {stored['id']}"))
    for warning in stored["warnings"]:
        err.print(escape(f"warning: {path.name}: {warning['message']}"))
    return stored


def _read_spec(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        spec = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from None
    if not isinstance(spec, dict):
        raise Mistake(f"{path}: must be a JSON object")
    return spec


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that JSON has")


def _label(entry: str) -> dict[str, str]:
    name, separator, description = entry.partition("=")
    return {"name": name.strip(), "description": description.strip()} if separator else {"name": name.strip()}


@app.command()
def compare(
    spec: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            metavar="[SPEC.json]",
            help="The body of POST /comparisons; a dataset may be named by id or by the path of a file to upload.",
        ),
    ] = None,
    comparison_id: Annotated[
        list[str] | None,
        typer.Option(
            "--id", help="Look at one that was started before; several, on several data, are ranked together."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="ARM.OPTION=VALUE,VALUE,…: an arm for each value of a method's option; repeat it for a grid."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A directory for the table as .md, .csv, .tex and .json.")
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Also draw plots there, as .svg and .png.")] = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Run several methods and seeds on the same rows and labels, and print the table. Exit status as `watch`."""
    from app import sweeps

    if (spec is None) == (not comparison_id):
        raise Mistake("give either a SPEC.json to start, or the --id of a comparison to look at")
    if plots and output is None:
        raise Mistake("--plots needs --output, the directory to draw into")
    with _client(url, key) as client:
        ids = [_id(each, "cmp") for each in comparison_id or []]
        if spec is not None:
            wish = _read_spec(spec)
            if sweep:
                try:
                    wish["arms"] = sweeps.expand(wish.get("arms"), sweep)
                except ValueError as error:
                    raise Mistake(str(error)) from None
            _look_first(wish, spec.parent, lambda early: client.compare(early, dry_run=True))
            upload_files(client, wish, spec.parent)
            made = client.compare(wish)
            for warning in made["warnings"]:
                err.print(escape(f"warning: {warning['message']}"))
            err.print(made["id"])
            ids = [made["id"]]
        told = [_follow(client, each, output, plots) for each in ids]
        if len(told) > 1:
            _print_ranks(told)
    raise typer.Exit(max(EXIT_CODES[each["status"]] for each in told))


def _follow(client: Client, comparison_id: str, output: Path | None, plots: bool) -> dict[str, Any]:
    """Show a comparison until it ends, then print its table and write what is wanted."""
    from app.progress import ComparisonProgress, comparison_table

    try:
        with ComparisonProgress(err) as progress:
            told = client.wait(comparison_id, progress.update)
    except KeyboardInterrupt:
        err.print(f"The comparison goes on; `understudy compare --id {comparison_id}` shows it again.")
        raise
    out.print(comparison_table(told))
    if output is not None:
        _write_comparison(client, told, output, plots)
    return told


def _write_comparison(client: Client, told: dict[str, Any], output: Path, plots: bool) -> None:
    from app import tables
    from app.plots import NoMatplotlib, draw

    output.mkdir(parents=True, exist_ok=True)
    files = [output / f"{told['id']}{suffix}" for suffix in (".md", ".csv", ".tex", ".json")]
    for file, format in zip(files, tables.WRITERS, strict=False):
        file.write_text(tables.WRITERS[format](told))
    files[-1].write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    if plots:
        metrics = {run["job_id"]: client.metrics(run["job_id"]) for arm in told["arms"] for run in arm["runs"]}
        try:
            files += draw(told, metrics, output / told["id"])
        except NoMatplotlib as error:
            raise Mistake(str(error)) from None
    for file in files:
        err.print(f"wrote {file}", markup=False)


def _print_ranks(told: list[dict[str, Any]]) -> None:
    """The average rank over several comparisons, of the arms that have a rank in each."""
    ranks = [{arm["name"]: arm["rank"] for arm in each["arms"] if arm["rank"] is not None} for each in told]
    everywhere = [name for name in ranks[0] if all(name in each for each in ranks)]
    table = Table("arm", "average rank", title=f"over {len(told)} comparisons", title_justify="left")
    for name in sorted(everywhere, key=lambda name: sum(each[name] for each in ranks)):
        table.add_row(escape(name), f"{sum(each[name] for each in ranks) / len(ranks):.2f}")
    out.print(table)


@app.command()
def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    method: Annotated[str | None, typer.Option(help="Only jobs of this method.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most this many, the newest.")] = 20,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """List the jobs, newest first."""
    from itertools import islice

    from app.progress import training_note

    filters = {name: value for name, value in (("status", status), ("method", method)) if value is not None}
    table = Table("job", "status", "phase", "done", "method", "", "made", "name")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    with _client(url, key) as client:
        for job in islice(client.jobs(**filters), limit):
            made = job["created_at"][:16].replace("T", " ")
            table.add_row(
                job["id"], job["status"], job["phase"] or "", f"{100 * job['progress']:.0f} %", job["method"],
                training_note(job), made, escape(job["name"] or ""),
            )  # fmt: skip
    out.print(table)


@app.command()
def watch(job_id: JobId, url: Url = HERE, key: Key = None) -> None:
    """Show a job's progress until it ends. Exit status: 0 succeeded, 1 failed, 2 cancelled."""
    with _client(url, key) as client:
        raise typer.Exit(_watch(client, _id(job_id, "job")))


def _watch(client: Client, job_id: str, told: Sequence[dict[str, Any]] = ()) -> int:
    """Show the job until it ends, and its warnings but for those that were told already; the exit status."""
    from app.progress import JobProgress, scores_table

    try:
        with JobProgress(err) as progress:
            job = client.wait(job_id, progress.update)
    except KeyboardInterrupt:
        err.print(f"The job goes on; `understudy watch {job_id}` shows it again.")
        raise
    if job["error"]:
        err.print(escape(f"error: {job['error']['message']} ({job['error']['code']})"))
    for warning in job["warnings"]:
        if warning not in told:
            err.print(escape(f"warning: {warning['message']}"))
    if table := scores_table(job):
        out.print(table)
    return EXIT_CODES[job["status"]]


def _steer(verb: str, told: str) -> None:
    @app.command(verb, help=told)
    def move(job_id: JobId, url: Url = HERE, key: Key = None) -> None:
        with _client(url, key) as client:
            job = getattr(client, verb)(_id(job_id, *(("job", "cmp") if verb == "cancel" else ("job",))))
        out.print(f"{job['id']} {job['status']}")


_steer("cancel", "End a job, or every run of a comparison.")
_steer("pause", "Hold a job; its state is saved and its worker is free.")
_steer("resume", "Let a paused job go on.")
_steer("retry", "Try a failed or cancelled job again, from its last saved state.")


@app.command()
def download(
    job_id: Annotated[str, typer.Argument(metavar="JOB", help="A job, for its best checkpoint, or a checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory for the model's files.")],
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Download a checkpoint, check its SHA-256, and unpack it. Started again, it goes on where it broke off."""
    from app.client import unpack
    from app.progress import transfer_progress

    archive = output / f"{_id(job_id, 'job', 'ckpt')}.tar"
    with _client(url, key) as client, transfer_progress(err, "download") as update:
        client.download(job_id, archive, update)
    unpack(archive, output)
    archive.unlink()
    out.print(str(output), markup=False)


if __name__ == "__main__":
    app()
