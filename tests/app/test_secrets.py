"""Passwords of the settings stay in the settings, whatever is away or goes wrong; test_cli.py reads a real run's logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from app.db import session_scope
from app.embedded import free_port
from app.logs import without_secrets
from app.main import create_app

PASSWORD = "correct-horse-battery"


def environment() -> dict[str, str]:
    """Settings whose database and broker are away, and have passwords."""
    return {
        **os.environ,
        "UNDERSTUDY_DATABASE_URL": f"postgresql://understudy:{PASSWORD}@127.0.0.1:{free_port()}/understudy",
        "UNDERSTUDY_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{free_port()}/0",
    }


@pytest.mark.parametrize("command", [["migrate"], ["keys", "list"], ["audit"]], ids=" ".join)
def test_a_command_that_finds_no_database_does_not_tell_its_password(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", *command], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "error" in done.stderr.lower()
    assert PASSWORD not in done.stdout + done.stderr


def test_an_api_without_database_and_broker_says_so_without_their_passwords() -> None:
    port = free_port()
    api = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "api", "--port", str(port)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    answers: list[httpx.Response] = []
    try:
        deadline = time.monotonic() + 60
        while not answers and time.monotonic() < deadline:
            try:
                answers.append(httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30))
            except httpx.TransportError:
                time.sleep(0.1)
        key = {"Authorization": "Bearer us_anything"}
        answers += [
            httpx.get(f"http://127.0.0.1:{port}{path}", headers=key, timeout=30) for path in ("/jobs", "/metrics")
        ]
    finally:
        api.terminate()
        output = api.communicate(timeout=30)[0]
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert "database_unreachable" in output
    for told in (output, *(answer.text for answer in answers)):
        assert PASSWORD not in told


def test_what_a_statement_carried_does_not_stand_in_its_error(database: Engine) -> None:
    with pytest.raises(DBAPIError) as caught, session_scope() as session:
        session.execute(text("SELECT 1 / (length(:secret) - length(:secret))"), {"secret": PASSWORD})
    assert "division by zero" in str(caught.value)
    assert PASSWORD not in str(caught.value)


def test_a_mistake_of_ours_reaches_the_log_whole_and_the_client_not_at_all(
    database: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"the secret is {PASSWORD}")

    monkeypatch.setattr("app.api.deps.keys.authenticate", broken)
    answer = TestClient(create_app()).get("/jobs", headers={"Authorization": "Bearer us_x", "x-request-id": "mine-7"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert PASSWORD not in answer.text
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    [line] = [line for line in lines if line["event"] == "unexpected_error"]
    assert line["request_id"] == "mine-7"
    assert "RuntimeError: the secret" in line["exception"]


@pytest.mark.parametrize(
    ("line", "hidden"),
    [
        ("cannot connect to postgresql+psycopg://ann:pa-55@db:5432/x", "pa-55"),
        ("redis://:pa-55@localhost:6379/0 is away", "pa-55"),
        ("Authorization: Bearer us_" + "aB3_-" * 8 + "xyz", "aB3_-aB3"),
        ("whsec_" + "aB3/" * 11, "aB3/"),
    ],
)
def test_what_looks_like_a_secret_is_blotted_out_of_a_log_line(line: str, hidden: str) -> None:
    written = without_secrets(None, "info", {"event": line, "status": 200, "error": f"before {line} after"})
    assert hidden not in str(written)
    assert written["error"].startswith("before ")
    assert written["status"] == 200


def test_a_line_that_a_stranger_chose_takes_no_longer_than_its_length() -> None:
    """Every request's path is searched for secrets, while nobody else is served."""
    began = time.perf_counter()
    for line in ("/://" + ":" * 60_000, "/://" + "://" * 20_000, "us_" * 20_000, "whsec_" * 10_000):
        without_secrets(None, "info", {"path": line})
    assert time.perf_counter() - began < 1


def test_an_ordinary_line_stays_as_it_is() -> None:
    line = {"event": "request", "path": "/jobs/job_018f", "url": "https://hooks.example.com/a@b", "note": "us_short"}
    assert without_secrets(None, "info", dict(line)) == line
