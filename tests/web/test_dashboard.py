"""The dashboard: what its files may not hold, and, where there is a Chromium, what a person sees and does in it."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import Engine, select

from app import ledger, lifecycle
from app.db import session_scope
from app.embedded import Embedded, free_port
from app.models import Checkpoint, Comparison, Dataset, Job, JobPhase, LabelSet, LabelShard, new_id, now
from app.storage import sha256_of, storage
from tests.support import new_key, wait_until
from tests.web.browser import CHROMEDRIVER, CHROMIUM, PATIENCE_SECONDS, Browser, browser

WEB = Path(__file__).resolve().parent.parent.parent / "app" / "web"
SCRIPTS = sorted(WEB.glob("*.js"))
NAMES = ["billing", "<img src=x onerror=alert(1)>"]

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="chromium and chromedriver are not on this machine"
)


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_page_holds_no_inline_script_or_style_and_loads_nothing_from_elsewhere() -> None:
    page = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    for file in WEB.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|url\(|@import", text), file.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_no_script_makes_html_of_text(script: Path) -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|srcdoc", script.read_text())


def test_the_page_and_its_files_are_served_without_a_key_under_a_strict_policy(client: TestClient) -> None:
    page = client.get("/", headers={"Authorization": ""})
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    for path in re.findall(r'(?:href|src)="(/web/[^"]+)"', page.text):
        assert client.get(path, headers={"Authorization": ""}).status_code == 200
    assert client.get("/web/app.js").headers["content-type"].startswith("text/javascript")


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(services: Embedded) -> Iterator[str]:
    """The API on a real socket, with the tests' database."""
    from app.main import create_app

    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(create_app(), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, what="the server starts")
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads: Path) -> Iterator[Browser]:
    """One browser for all tests of this file: starting one takes a second or two."""
    with browser(downloads) as window:
        yield window


@pytest.fixture
def page(chromium: Browser, server: str, database: Engine) -> Iterator[Browser]:
    """The dashboard in a browser that knows no key; a test during which the page complained has failed."""
    chromium.open(f"{server}/")
    yield chromium
    complaints = [line for line in chromium.complaints() if "the server responded with a status of 4" not in line]
    chromium.run("sessionStorage.clear()")
    chromium.open("about:blank")  # ends its event stream, before the tables are emptied
    assert complaints == []


def enter(page: Browser, tenant: str = "alice") -> None:
    """Give the page a key of the tenant."""
    page.type("#key", new_key(tenant))
    page.click("form button")
    page.see("Jobs", "h1")


def stored_job(*, status: str = "running", phase: str | None = "training", name: str = "first <b>job</b>") -> str:
    """A job of alice with two labels, as far as `phase`; its id."""
    with session_scope() as session:
        dataset = Dataset(
            id=new_id("ds"), tenant="alice", name="texts", rows=4, bytes=1, sha256="0" * 64, columns=["text"],
            label_counts={}, duplicates=0, skipped=0, has_text_pair=False, warnings=[],
        )  # fmt: skip
        labels = LabelSet(
            id=new_id("ls"), tenant="alice", fingerprint="f", labels=[{"name": name} for name in NAMES], report={}
        )
        session.add_all([dataset, labels])
        session.flush()
        shard = LabelShard(label_set_id=labels.id, index=0, dataset_id=dataset.id, split="train", start=0, stop=4)
        spec = {"teacher": {"kind": "embedding", "model": "m"}, "student": {"model": "scratch"}, "budget": {}}
        job = Job(
            id=new_id("job"), tenant="alice", name=name, method="llkd", status=status, phase=phase, spec=spec,
            dataset_id=dataset.id, label_set_id=labels.id, started_at=now(), metadata_={},
            warnings=[{"code": "duplicates", "message": "2 rows stand twice."}],
        )  # fmt: skip
        session.add_all([shard, job])
        session.flush()
        session.add(
            JobPhase(job_id=job.id, name="labeling", position=0, total=4, done=4, started_at=now(), finished_at=now())
        )
        session.add(JobPhase(job_id=job.id, name="training", position=1, total=8, done=2, started_at=now()))
        lifecycle.emit(session, job.id, "job.queued", "Job accepted.")
        return job.id  # fmt: skip


def record_training(job_id: str) -> None:
    """Two steps of every series that is drawn, and selection figures."""
    with session_scope() as session:
        for step, epoch in ((1, 0.5), (2, 1.0)):
            values: dict[str, float | None] = {"ratio": 0.5 / step, "train_loss": 1.0 / step, "learning_rate": 1e-5}
            for label in NAMES:
                values |= {
                    f"class_ratio/{label}": 0.25,
                    f"threshold_teacher/{label}": 0.6,
                    f"threshold_student/{label}": 0.3,
                }
            lifecycle.record_metrics(session, job_id, step, epoch, values)
        lifecycle.record_metrics(session, job_id, 2, 1.0, {"validation_macro_f1": 0.812, "epoch_ratio": 0.375})
        session.get_one(Job, job_id).selection = {"seen": 8, "selected": 3, "ratio": 0.375, "epochs": []}


def store_ledger(job_id: str, directory: Path) -> None:
    """Two rows: one selected, one rejected."""
    shared = {"text_pair": None, "source": "teacher", "student_threshold": 0.3, "influence": None, "error": None}
    rows = [
        {"row": 0, "line": 1, "text": "<script>alert(2)</script>", "label": NAMES[1], "confidence": 0.9, "selected": 2,
         "distribution": [0.1, 0.9], "offered": 2, "decision": "selected", "reason": "selected", "teacher_threshold": 0.6,
         "student_uncertainty": 0.5},
        {"row": 1, "line": 2, "text": "my invoice", "label": NAMES[0], "confidence": 0.55, "selected": 0,
         "distribution": [0.55, 0.45], "offered": 2, "decision": "rejected", "reason": "teacher_unsure",
         "teacher_threshold": 0.6, "student_uncertainty": None},
    ]  # fmt: skip
    path = directory / "samples.parquet"
    pq.write_table(pa.Table.from_pylist([shared | row for row in rows], ledger.SCHEMA), path)
    storage().put(ledger.key(job_id), path)


def finish(job_id: str, directory: Path) -> bytes:
    """Give the job scores and a checkpoint, and let it succeed; the checkpoint's bytes."""
    scores = {"rows": 40, "accuracy": 0.9, "accuracy_interval": [0.85, 0.94], "macro_f1": 0.88, "macro_f1_interval": [0.8, 0.93],
              "expected_calibration_error": 0.04, "per_class": {name: {"f1": 0.88, "support": 20} for name in NAMES}}  # fmt: skip
    path = directory / "checkpoint.tar"
    path.write_bytes(b"a checkpoint" * 1000)
    with session_scope() as session:
        job = session.get_one(Job, job_id)
        checkpoint = Checkpoint(
            id=new_id("ckpt"), tenant="alice", job_id=job_id, step=2, epoch=1.0, metrics={}, files=[],
            bytes=path.stat().st_size, sha256=sha256_of(path),
        )  # fmt: skip
        storage().put(checkpoint.key, path)
        session.add(checkpoint)
        job.best_checkpoint_id = checkpoint.id
        teacher = scores | {"macro_f1": 0.701, "macro_f1_interval": [0.65, 0.75]}
        job.evaluation = {
            "test": {"source": "dataset", "student": scores, "teacher": teacher}, "validation": None, "pseudo_labels": None,
        }  # fmt: skip
        lifecycle.finish(session, job)
    return path.read_bytes()


@needs_browser
def test_a_key_is_asked_for_kept_for_the_tab_and_forgotten(page: Browser) -> None:
    page.type("#key", "us_wrong")
    page.click("form button")
    page.see("This API key is not known", "#problem")
    enter(page)
    page.see("No jobs yet")
    page.see("understudy submit")
    page.run("location.reload()")
    page.see("No jobs yet")
    page.click("#forget")
    page.see("Which key?", "h1")
    assert page.run("return sessionStorage.length + localStorage.length") == 0


@needs_browser
def test_jobs_are_listed_with_names_as_text_and_filtered_by_status(page: Browser) -> None:
    stored_job()
    stored_job(status="failed", name="the other")
    enter(page)
    page.see("first <b>job</b>", "table")
    page.see("the other", "table")
    page.choose("#status", "failed")
    wait_until(lambda: "first" not in page.text("table"), PATIENCE_SECONDS, "only failed jobs are listed")
    page.see("the other", "table")
    page.choose("#status", "paused")
    page.see("No job is paused.")


@needs_browser
def test_a_job_shows_what_happens_to_it_while_it_happens(page: Browser, tmp_path: Path) -> None:
    job_id = stored_job()
    enter(page)
    page.click("tbody a")
    page.see("first <b>job</b>", "h1")
    page.see("2 rows stand twice.", ".warnings")
    page.see("2 of 8", ".phases")
    page.see("Job accepted.", ".events")
    page.see("The ledger is written at the end of the first epoch")
    assert page.count(".chart > svg") == 0

    record_training(job_id)
    store_ledger(job_id, tmp_path)
    with session_scope() as session:
        lifecycle.emit(session, job_id, "training.epoch", "Epoch 1: 3 of 8 rows selected.")
    page.see("Epoch 1: 3 of 8 rows selected.", ".events")
    page.see("3 of 8 (37.5 %)", ".facts")
    page.wait_for(".chart > svg", 6)
    page.see(NAMES[1], ".chart .legend")
    page.see("<script>alert(2)</script>", ".samples")

    finish(job_id, tmp_path)
    page.see("succeeded", "h1")
    page.see("70.1 % [65.0, 75.0]", ".scores")
    page.see("88.0 % [80.0, 93.0]", ".scores")
    page.see("Finished.", ".events")
    assert page.count("main > .actions button") == 1


@needs_browser
def test_a_job_that_has_ended_shows_no_empty_charts(page: Browser, tmp_path: Path) -> None:
    job_id = stored_job()
    with session_scope() as session:
        lifecycle.record_metrics(session, job_id, 1, 0.5, {"train_loss": 1.0})
    enter(page)
    page.click("tbody a")
    page.see("nothing yet", ".chart")
    finish(job_id, tmp_path)
    page.see("succeeded", "h1")
    wait_until(lambda: page.count(".chart") == 1, PATIENCE_SECONDS, "only the loss is drawn")


@needs_browser
def test_samples_are_filtered_by_decision_and_label(page: Browser, tmp_path: Path) -> None:
    job_id = stored_job()
    store_ledger(job_id, tmp_path)
    enter(page)
    page.click("tbody a")
    page.wait_for(".samples tbody tr", 2)
    page.choose("#decision", "rejected")
    wait_until(lambda: page.count(".samples tbody tr") == 1, PATIENCE_SECONDS, "one rejected row")
    page.see("teacher unsure", ".samples")
    page.choose("#decision", "")
    page.run(
        "const s = document.getElementById('label'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
        NAMES[1],
    )
    page.see("<script>", ".samples")
    wait_until(lambda: "my invoice" not in page.text(".samples"), PATIENCE_SECONDS, "the other label is gone")
    page.choose("#decision", "rejected")
    page.see("No row is like that.")


@needs_browser
def test_a_job_is_paused_resumed_and_cancelled(page: Browser) -> None:
    job_id = stored_job(status="queued", phase=None)
    enter(page)
    page.click("tbody a")
    page.click("button.pause")
    page.see("paused", "h1")
    page.click("button.resume")
    page.see("queued", "h1")
    page.run("window.confirm = () => true")
    page.click("button.cancel")
    page.see("cancelled", "h1")
    page.wait_for("button.retry")
    with session_scope() as session:
        assert session.get_one(Job, job_id).status == "cancelled"


@needs_browser
def test_the_checkpoint_is_downloaded_whole(page: Browser, downloads: Path, tmp_path: Path) -> None:
    content = finish(stored_job(), tmp_path)
    enter(page)
    page.click("tbody a")
    page.wait_for("button.main")
    page.run(
        "delete window.showSaveFilePicker"
    )  # its dialog is the browser's own; without it the file goes to downloads
    page.click("button.main")
    wait_until(lambda: any(downloads.glob("ckpt_*.tar")), PATIENCE_SECONDS, "a downloaded file")
    assert next(downloads.glob("ckpt_*.tar")).read_bytes() == content


@needs_browser
def test_a_chart_can_be_read_with_the_keyboard(page: Browser) -> None:
    record_training(stored_job())
    enter(page)
    page.click("tbody a")
    page.wait_for(".chart > svg", 6)
    chart = "document.querySelector('.chart > svg')"
    press = f"{chart}.focus(); {chart}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowLeft'}}))"
    page.run(press)
    page.see("step 1", ".chart .where")
    page.see("50.0 %", ".chart .legend")


@needs_browser
def test_the_page_does_not_scroll_sideways_on_a_phone(page: Browser, tmp_path: Path) -> None:
    job_id = stored_job()
    record_training(job_id)
    store_ledger(job_id, tmp_path)
    finish(job_id, tmp_path)
    enter(page)
    page.resize(500, 900)
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.run(wide) == 0
    page.click("tbody a")
    page.wait_for(".samples tbody tr", 2)
    assert page.run(wide) == 0
    page.resize(1200, 900)


def stored_comparison(directory: Path) -> str:
    """Two arms of one seed, the first of which has succeeded; the comparison's id."""
    names = {"LLKD <i>": "succeeded", "No_DS": "running"}
    arms = [{"name": name, "method": {"kind": "llkd"}, "teacher": None, "dataset_id": None} for name in names]
    with session_scope() as session:
        comparison = Comparison(
            id=new_id("cmp"), tenant="alice", name="two <b>rules</b>", spec={"arms": arms, "seeds": [7]}
        )
        session.add(comparison)
    for name, status in names.items():
        job_id = stored_job(name=name)
        record_training(job_id)
        with session_scope() as session:
            job = session.get_one(Job, job_id)
            job.comparison_id, job.arm, job.spec = comparison.id, name, job.spec | {"training": {"seed": 7}}
        if status == "succeeded":
            finish(job_id, directory)
    return comparison.id


@needs_browser
def test_a_comparison_is_listed_and_shows_its_table_and_charts(page: Browser, tmp_path: Path) -> None:
    comparison_id = stored_comparison(tmp_path)
    enter(page)
    page.click('nav a[href="#/comparisons"]')
    page.see("two <b>rules</b>", ".comparisons")
    page.click("tbody a")
    page.see("running", "h1")
    wait_until(lambda: page.count(".arms tbody tr") == 3, PATIENCE_SECONDS, "the teacher and two arms")
    cells = [line.split("\t") for line in page.text(".arms tbody").splitlines()]
    assert [cell.strip() for cell in cells[0][:4]] == ["Teacher", "", "90.0 %", "70.1 %"]
    page.see("LLKD <i> seeds 7", ".arms")
    page.see("88.0 %", ".arms")
    page.see("37.5 %", ".arms")
    page.wait_for(".chart > svg", 3)
    page.see("LLKD <i>", ".chart .legend")
    page.resize(500, 900)
    assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    page.resize(1200, 900)

    page.run("window.confirm = () => true")
    page.click("button.cancel")
    with session_scope() as session:
        last = session.scalars(select(Job).where(Job.comparison_id == comparison_id, Job.arm == "No_DS")).one()
        wait_until(
            lambda: session.refresh(last) or last.status == "cancelled", PATIENCE_SECONDS, "the run is cancelled"
        )  # type: ignore[func-returns-value]
        session.rollback()
    page.see("succeeded", "h1")
    wait_until(lambda: page.count("button.cancel") == 0, PATIENCE_SECONDS, "nothing is left to cancel")


@needs_browser
def test_another_tenants_job_is_not_found(page: Browser) -> None:
    job_id = stored_job()
    enter(page, tenant="bob")
    page.see("No jobs yet")
    page.run("location.hash = '#/jobs/' + arguments[0]", job_id)
    page.see("There is nothing here under that id.", "#problem")
    assert page.text("main") == "", "nothing of the page before is left"
