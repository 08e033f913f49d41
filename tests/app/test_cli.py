"""The command line, on one `understudy up` that is started, used, hurt, stopped, and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy import create_engine, text

from app.embedded import free_port
from tests.support import TOPICS, sentences, tiny_spec, wait_until

UNDERSTUDY = [sys.executable, "-m", "app.cli"]


class Service:
    """`understudy up` in a child process."""

    def __init__(self) -> None:
        # Not pytest's tmp_path: PostgreSQL, which root must run as another user, could not get into it.
        self.directory = Path(tempfile.mkdtemp(prefix="understudy-cli-"))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        command = [*UNDERSTUDY, "up", "--port", str(self.port), "--data-dir", str(self.directory)]
        with (self.directory / "stderr").open("a") as errors:
            environment = {**os.environ, "UNDERSTUDY_MEASURE_SECONDS": "60"}
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"ready {self.url}\n", self.errors

    @property
    def errors(self) -> str:
        return (self.directory / "stderr").read_text()

    @property
    def children(self) -> dict[str, psutil.Process]:
        kinds = {
            "postgres": "postgres",
            "redis-server": "redis",
            "api": "api",
            "scheduler": "scheduler",
            "celery": "worker",
        }
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                words = [Path(word).name for word in child.cmdline()]
                found.update({kind: child for word, kind in kinds.items() if word in words})
        return found

    def run(self, *arguments: str, key: str | None = None) -> subprocess.CompletedProcess[str]:
        """A client command against the service."""
        key = key or (self.directory / "api-key").read_text().strip()
        environment = {**os.environ, "UNDERSTUDY_URL": self.url, "UNDERSTUDY_API_KEY": key}
        return subprocess.run(
            [*UNDERSTUDY, *arguments], env=environment, cwd=self.directory, capture_output=True, text=True, timeout=120
        )


def is_ready(service: Service) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{service.url}/readyz").status_code == 200
    return False


def processes(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children(recursive=True)


def all_gone(children: list[psutil.Process]) -> bool:
    return not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    service = Service()
    try:
        service.start()
        yield service
    finally:
        service.process.kill()
        shutil.rmtree(service.directory, ignore_errors=True)


@pytest.fixture(scope="module")
def job_id(service: Service) -> str:
    """A job that was submitted with its files by `submit --wait` and has succeeded."""
    for name, rows in (("rows", sentences(48, 1)), ("validation", sentences(12, 2))):
        (service.directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = tiny_spec("rows.jsonl") | {"name": "from a file"}
    (service.directory / "spec.json").write_text(json.dumps(spec))
    done = service.run("submit", "spec.json", "--validation", "validation.jsonl", "--epochs", "2", "--wait")
    assert done.returncode == 0, done.stderr
    assert "uploaded rows.jsonl: 48 rows" in done.stderr
    assert "validation set, 12 rows" in done.stdout
    return done.stdout.splitlines()[0]


def test_the_first_key_is_for_its_owner_alone(service: Service) -> None:
    assert (service.directory / "api-key").stat().st_mode & 0o777 == 0o600
    assert (service.directory / "storage").stat().st_mode & 0o077 == 0


def test_a_job_submitted_by_a_file_runs_and_is_listed(service: Service, job_id: str) -> None:
    listed = service.run("jobs", "--status", "succeeded").stdout
    assert job_id in listed
    assert "from a file" in listed
    watched = service.run("watch", job_id)
    assert (watched.returncode, "macro-F1" in watched.stdout) == (0, True)


def test_warnings_are_told_once_those_of_the_end_too(service: Service, job_id: str) -> None:
    made = sentences(120, 5)
    rows = [row for row in made if row["label"] == "cooking"] + [row for row in made if row["label"] != "cooking"][:4]
    for name, content in (("leaning", [*rows, rows[0]]), ("fair", sentences(18, 6))):
        (service.directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (service.directory / "leaning.json").write_text(json.dumps(tiny_spec("leaning.jsonl")))
    done = service.run("submit", "leaning.json", "--validation", "fair.jsonl", "--epochs", "1", "--wait")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert any("answers 'cooking' for every one of 18 rows" in line for line in warned), done.stderr
    assert "1 rows repeat the text of an earlier row." in " ".join(warned)
    assert len(warned) == len(set(warned))
    assert "answers 'cooking' for every one" in service.run("watch", done.stdout.splitlines()[0]).stderr


def test_a_dry_run_has_a_worker_measure_and_prints_what_the_job_would_need(service: Service, job_id: str) -> None:
    spec = tiny_spec("rows.jsonl") | {"teacher": {"kind": "embedding"}, "labels": TOPICS, "method": {"kind": "llkd"}}
    (service.directory / "measured.json").write_text(json.dumps(spec))
    before = service.run("jobs").stdout
    done = service.run("submit", "measured.json", "--dry-run")
    assert done.returncode == 0, done.stderr
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert (told["rows to label"], told["rows in the cache"]) == ("48", "0"), done.stdout + done.stderr
    assert told["labeling"].endswith("s by one worker (measured on a few rows)"), done.stdout + done.stderr
    assert told["sample"].startswith("32 rows asked, 0 failed, ")
    assert "from a file" in before
    assert service.run("jobs").stdout.count("job_") == before.count("job_"), "none was started"


def test_a_checkpoint_is_downloaded_and_unpacked(service: Service, job_id: str) -> None:
    done = service.run("download", job_id, "-o", "model")
    assert (done.returncode, done.stdout) == (0, "model\n"), done.stderr
    files = {path.name for path in (service.directory / "model").iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "manifest.json"} <= files
    assert not any(name.endswith((".tar", ".partial")) for name in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["watch", "job_nothing"], "error: There is nothing here under that id."),
        (["watch", "../datasets"], "error: '../datasets' is not such an id: they begin with job_"),
        (["download", "job_nothing", "-o", "nowhere"], "error: There is nothing here under that id."),
        (["download", "../jobs", "-o", "nowhere"], "they begin with job_ or ckpt_"),
        (["retry", "job_nothing"], "error: There is nothing here under that id."),
        (["submit"], "error: give the rows to label: --dataset FILE"),
        (["submit", "numbers.json"], "error: dataset_id: Input should be a valid string"),
        (["submit", "numbers.json", "--student", "scratch"], "error: numbers.json: student must be a JSON object"),
        (["submit", "nan.json"], "error: nan.json: NaN is not a number that JSON has"),
        (["submit", "--dataset", "nowhere.jsonl"], "there is no file"),
        (["submit", "--dataset", "ds_" + "0" * 32, "--method", "magic"], "method"),
        (["submit", "broken.json"], "broken.json: "),
        (["compare"], "give either a SPEC.json to start, or the --id"),
        (["compare", "broken.json"], "broken.json: "),
        (["compare", "--id", "cmp_nothing"], "error: There is nothing here under that id."),
        (["compare", "numbers.json", "--sweep", "a.b=1"], "error: arms: must be a list of objects, each with a name"),
        (["jobs", "--url", "http://127.0.0.1:1"], "error: no answer from http://127.0.0.1:1/"),
        (["jobs", "--url", "localhost:8000"], "error: --url 'localhost:8000': must begin with http://"),
        (["jobs", "--key", "clé"], "error: the API key is not one"),
        (["upload", "broken.json", "--url", "http://127.0.0.1:1"], "error: no answer from http://127.0.0.1:1/"),
    ],
)
def test_a_mistake_is_told_in_a_line_and_without_a_traceback(
    service: Service, arguments: list[str], message: str
) -> None:
    (service.directory / "broken.json").write_text("{")
    (service.directory / "numbers.json").write_text('{"dataset_id": 1, "student": 2, "arms": 3}')
    (service.directory / "nan.json").write_text('{"dataset_id": NaN}')
    done = service.run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_wrong_spec_is_refused_before_its_files_are_uploaded(service: Service, job_id: str) -> None:
    spec = tiny_spec("rows.jsonl") | {"teacher": {"kind": "endpoint", "endpoint": "none"}, "labels": TOPICS}
    (service.directory / "wrong.json").write_text(json.dumps(spec))
    one = service.run("submit", "wrong.json")
    two = service.run("submit", "wrong.json", "--student", "nowhere")
    assert (
        one.stderr
        == "error: teacher/endpoint: 'none' is not an endpoint that the operator has configured; there is none\n"
    )
    assert "error: student/model: There is no model 'nowhere' here." in two.stderr
    assert "  /teacher/endpoint: 'none'" in two.stderr
    assert "dataset" not in two.stderr
    missing = service.run("submit", "spec.json", "--test", "nowhere.jsonl")
    assert "there is no file" in missing.stderr
    assert (one.returncode, two.returncode, missing.returncode) == (1, 1, 1)
    assert "uploaded" not in one.stderr + two.stderr + missing.stderr


def test_a_file_is_uploaded_with_its_columns_named(service: Service) -> None:
    (service.directory / "OTHER.CSV").write_text("message,kind\nhello,greeting\n,greeting\nbye,farewell\n")
    refused = service.run("upload", "OTHER.CSV")
    assert refused.returncode == 1
    assert "No column holds the text" in refused.stderr
    assert "`understudy upload FILE` takes --text-column NAME" in refused.stderr
    options = ("--text-column", "message", "--label-column", "kind", "--on-error", "skip", "--name", "others")
    done = service.run("upload", "OTHER.CSV", *options)
    assert done.returncode == 0, done.stderr
    stored = httpx.get(f"{service.url}/datasets/{done.stdout.strip()}", headers=authorization(service)).json()
    assert (stored["name"], stored["rows"], stored["skipped"]) == ("others", 2, 1)
    assert stored["label_counts"] == {"greeting": 1, "farewell": 1}


def test_a_comparison_runs_prints_its_table_and_writes_it_with_plots(service: Service, job_id: str) -> None:
    spec = tiny_spec("rows.jsonl") | {"test_dataset_id": "validation.jsonl", "name": "two [rules]", "seeds": [0]}
    del spec["method"]
    spec["arms"] = [{"name": "all", "method": {"kind": "no_selection"}}, {"name": "some", "method": {"kind": "random"}}]
    (service.directory / "compare.json").write_text(json.dumps(spec))
    done = service.run("compare", "compare.json", "--sweep", "some.ratio=0.2,0.5", "--output", "tables", "--plots")
    assert done.returncode == 0, done.stderr
    for line in ("all, seed 0 succeeded", "some ratio=0.2, seed 0 succeeded", "some ratio=0.5, seed 0 succeeded"):
        assert line in done.stderr
    assert "two [rules]" in done.stdout
    told = json.loads(next((service.directory / "tables").glob("*.json")).read_text())
    assert [arm["name"] for arm in told["arms"]] == ["all", "some ratio=0.2", "some ratio=0.5"]
    assert f"{100 * told['arms'][2]['macro_f1']['mean']:.1f}" in done.stdout
    for suffix, sign in ((".md", "| some ratio=0.5 |"), (".csv", "some ratio=0.5,random,"), (".tex", r"\toprule")):
        assert sign in (service.directory / "tables" / f"{told['id']}{suffix}").read_text()
    drawn = {path.name for path in (service.directory / "tables" / told["id"]).iterdir()}
    assert {"score_by_share.svg", "selected_ratio.png"} <= drawn
    again = service.run("compare", "--id", told["id"], "--id", told["id"])
    assert again.returncode == 0, again.stderr
    assert "average rank" in again.stdout


def test_no_secret_stands_in_a_log_or_in_any_table_but_its_own(service: Service, job_id: str) -> None:
    """After a real run: a job that was labeled and trained, and a webhook that was signed and sent in vain."""
    key = (service.directory / "api-key").read_text().strip()
    with httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
        secret = client.get("/webhooks/secret").json()["secret"]
        made = client.post("/keys", json={"name": "of a test"}).json()["key"]
        spec = client.get(f"/jobs/{job_id}").json()["spec"] | {"webhook": {"url": "https://hooks.invalid/told"}}
        told = client.post("/jobs", json=spec).json()["id"]
        assert client.post(f"/jobs/{told}/cancel").status_code == 202
        wait_until(
            lambda: bool((calls := client.get(f"/jobs/{told}/deliveries").json()["data"]) and calls[0]["last_error"]),
            seconds=60, what="the webhook is tried",
        )  # fmt: skip
        client.get("/jobs", headers={"Authorization": f"Bearer {made}x"})
        answers = [client.get(path).text for path in (f"/jobs/{job_id}", f"/jobs/{told}/events", "/keys", "/metrics")]
    logs = {path.name: path.read_text(errors="replace") for path in (service.directory / "logs").iterdir()}
    assert {"api.log", "scheduler.log", "worker-1.log"} <= set(logs)
    assert '"request_id"' in logs["api.log"]
    places = {**logs, "stderr": service.errors, "answers": "".join(answers), "tables": tables(service)}
    for name, content in places.items():
        for hidden in (key, made, secret.removeprefix("whsec_")):
            assert hidden not in content, name


def tables(service: Service) -> str:
    """Every row of every table but the one that has to keep webhook secrets."""
    engine = create_engine(service.children["api"].environ()["UNDERSTUDY_DATABASE_URL"])
    with engine.connect() as connection:
        names = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        assert {"jobs", "audit_log", "api_keys", "webhook_secrets", "idempotency_keys"} <= set(names)
        rows = [connection.execute(text(f"SELECT * FROM {name}")).all() for name in names if name != "webhook_secrets"]
    engine.dispose()
    return str(rows)


def test_a_cancelled_job_ends_watch_with_2(service: Service, job_id: str) -> None:
    dataset = httpx.get(f"{service.url}/jobs/{job_id}", headers=authorization(service)).json()["spec"]["dataset_id"]
    spec = tiny_spec(dataset, training={"epochs": 1000})
    long = httpx.post(f"{service.url}/jobs", json=spec, headers=authorization(service)).json()["id"]
    cancelled = service.run("cancel", long)
    assert (cancelled.returncode, cancelled.stdout.split()[0]) == (0, long)
    assert service.run("watch", long).returncode == 2
    assert service.run("pause", long).returncode == 1


def authorization(service: Service) -> dict[str, str]:
    return {"Authorization": f"Bearer {(service.directory / 'api-key').read_text().strip()}"}


def test_up_refuses_a_directory_in_use_and_a_port_that_is_taken(service: Service) -> None:
    other = service.directory / "other"
    twice = service.run("up", "--port", "0", "--data-dir", str(service.directory))
    taken = service.run("up", "--port", str(service.port), "--data-dir", str(other))
    assert (twice.returncode, taken.returncode) == (1, 1)
    assert "is in use by another `understudy up`" in twice.stderr
    assert f"cannot listen on 127.0.0.1:{service.port}" in taken.stderr
    assert not other.exists(), "nothing was started"


def test_every_part_that_is_killed_is_started_again(service: Service, job_id: str) -> None:
    before = service.children
    assert set(before) == {"postgres", "redis", "api", "scheduler", "worker"}
    for child in before.values():
        child.kill()

    def replaced() -> bool:
        now = service.children
        return set(now) == set(before) and all(now[kind].pid != before[kind].pid for kind in before)

    wait_until(replaced, 20, "every part to be started again")
    wait_until(lambda: is_ready(service), 30, "the API to answer again")
    assert job_id in service.run("jobs").stdout
    assert "worker-1 ended with status -9; starting it again in 0.5 s" in service.errors


def test_sigterm_stops_every_child_and_up_goes_on_where_it_was(service: Service, job_id: str) -> None:
    children = processes(service)
    key = (service.directory / "api-key").read_text()
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0
    assert service.process.stdout is not None
    assert service.process.stdout.read() == "", "`ready` was its only line"
    assert all_gone(children)
    service.start()
    assert (service.directory / "api-key").read_text() == key
    assert job_id in service.run("jobs").stdout


def test_a_killed_up_leaves_no_child_behind(service: Service) -> None:
    children = processes(service)
    assert len(children) >= 5
    service.process.kill()
    service.process.wait()
    wait_until(lambda: all_gone(children), 20, "the children of a killed up to end")
